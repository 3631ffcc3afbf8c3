"""A trained generator: transformer, standardisation of its latents, and which tokenizer and text encoder it belongs to.

On disk it is a folder of `model.safetensors` and `config.json`. B clips, T tokens, C latent width, E text width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dasheng_tokenizer.errors import CheckpointError, ConfigurationError, LatentError
from dasheng_tokenizer.files import atomic_path
from dasheng_tokenizer.generation.dit import DiffusionTransformer, DiTConfig
from dasheng_tokenizer.generation.flow_matching import (
    Method,
    Progress,
    Velocity,
    guided,
    integrate,
    timestep_schedule,
)
from dasheng_tokenizer.generation.text_encoders import pad_text
from dasheng_tokenizer.semantic_encoder import token_mask

MODEL_TYPE = "dashengtokenizer-generator"
VERSION = 1
"""Of the folder's layout."""

WEIGHTS, CONFIG = "model.safetensors", "config.json"

STEPS, GUIDANCE, SWAY = 25, 3.0, -1.0
"""Steps and sway are those of the published text-to-audio sibling."""

MAX_SEED = 2**63 - 1

_LEAST_STD = 1e-3
"""Of the mean standard deviation: a dimension that never changes in the data must not be divided by zero."""


@dataclass(frozen=True)
class GeneratorInfo:
    """What a generator belongs to and can do.

    Attributes:
        tokenizer_hash: `weights_hash()` of the tokenizer whose latents it makes.
        tokenizer: folder or hub name of that tokenizer; None: the embedded default.
        text_encoder: name for `load_text_encoder`; None: the default.
        text_identity: `identity` of that text encoder.
        frame_rate: tokens a second.
        max_seconds: longest clip that it is meant for.
        typical_seconds: length of a clip where none is asked for; None: `max_seconds`.
        provenance: free-form facts: data, steps, licence, date.

    Raises:
        ConfigurationError: lengths or a rate out of range.
    """

    tokenizer_hash: str
    tokenizer: str | None = None
    text_encoder: str | None = None
    text_identity: str = ""
    frame_rate: float = 25.0
    max_seconds: float = 10.0
    typical_seconds: float | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse lengths and rates out of range."""
        if not (0 < self.max_seconds < math.inf and 0 < self.frame_rate < math.inf):
            raise ConfigurationError(
                f"max_seconds {self.max_seconds} and frame_rate {self.frame_rate} must be above 0 and finite"
            )
        if not 0 < self.default_seconds <= self.max_seconds:
            raise ConfigurationError(
                f"typical_seconds {self.typical_seconds} must be above 0 and at most max_seconds, {self.max_seconds}"
            )

    @property
    def default_seconds(self) -> float:
        """Length of a clip where none is asked for."""
        return self.max_seconds if self.typical_seconds is None else self.typical_seconds


class Generator(nn.Module):
    """Text embeddings → latents of one tokenizer.

    Args:
        dit_config: sizes of the transformer.
        info: what it belongs to.
        mean: (C,) of the training latents.
        std: (C,) of the training latents; far too small ones are raised to a thousandth of their mean.

    Raises:
        ConfigurationError: statistics of another width, not finite, negative, or all zero.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, dit_config: DiTConfig, info: GeneratorInfo, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        shape = (dit_config.latent_dim,)
        mean, std = mean.detach().float().clone(), std.detach().float().clone()
        if mean.shape != shape or std.shape != shape:
            raise ConfigurationError(
                f"mean {tuple(mean.shape)} and standard deviation {tuple(std.shape)} must have the shape {shape} of a "
                "latent; take those of the data set that the generator learns from"
            )
        if not bool(torch.isfinite(mean + std).all()) or bool((std < 0).any()) or not bool((std > 0).any()):
            raise ConfigurationError(
                "mean and standard deviation of the latents must be finite, the latter not negative and not all zero; "
                "encode the data set again"
            )
        self.info = info
        self.dit = DiffusionTransformer(dit_config)
        self.register_buffer("latent_mean", mean)
        self.register_buffer("latent_std", std.clamp(min=_LEAST_STD * float(std.mean())))

    def standardize(self, latents: Tensor) -> Tensor:
        """Latents (…, C) of the tokenizer → what the transformer sees: each dimension of mean 0 and variance 1."""
        return (latents - self.latent_mean) / self.latent_std

    def restore(self, latents: Tensor) -> Tensor:
        """Undo `standardize`."""
        return latents * self.latent_std + self.latent_mean

    # ------------------------------------------------------------------ sampling

    @torch.no_grad()
    def sample(
        self,
        text: Sequence[Tensor],
        num_tokens: Sequence[int],
        *,
        seeds: Sequence[int],
        steps: int = STEPS,
        guidance: float = GUIDANCE,
        method: Method = "euler",
        sway: float = SWAY,
        progress: Progress | None = None,
    ) -> list[Tensor]:
        """Draw one clip a text. A clip does not depend on the others in the batch.

        Args:
            text: (S_i, E) embeddings of real text tokens, one a clip.
            num_tokens: length T_i of each clip.
            seeds: of the noise of each clip, 0 … 2⁶³ - 1; drawn on the CPU, so that every device starts from the same.
            steps, method, sway, progress: see `flow_matching`.
            guidance: 1 follows the text, above it exaggerates it, 0 ignores it.

        Returns:
            (T_i, C) latents each, in the tokenizer's scale, float32, on the device of the transformer.

        Raises:
            ConfigurationError: settings out of range, or lists of different length.
            LatentError: the result is not finite.
        """
        if not len(text) == len(num_tokens) == len(seeds):
            raise ConfigurationError(
                f"{len(text)} texts, {len(num_tokens)} lengths and {len(seeds)} seeds: each clip needs one of all three"
            )
        times = timestep_schedule(steps, sway)
        if not text:
            return []
        noise = nn.utils.rnn.pad_sequence(
            [self._noise(seed, count) for seed, count in zip(seeds, num_tokens, strict=True)], batch_first=True
        ).to(self.latent_mean.device)  # (B, T, C)
        mask = token_mask(torch.tensor(list(num_tokens), device=noise.device), noise.shape[1])  # (B, T)
        velocity = guided(lambda conditional: self._velocity(text, mask, conditional), guidance)
        latents = self.restore(integrate(velocity, noise, times, method, progress))  # (B, T, C)
        clips = [clip[:count] for clip, count in zip(latents, num_tokens, strict=True)]
        if bad := [index for index, clip in enumerate(clips) if not bool(torch.isfinite(clip).all())]:
            raise LatentError(
                f"sampling clip {bad[0]} ended in NaN or infinity; lower the guidance ({guidance}), take more steps, "
                "or run the transformer in float32"
            )
        return clips

    def _noise(self, seed: int, count: int) -> Tensor:
        """(count, C) standard normal, a function of the seed and the count alone."""
        if not 0 <= seed <= MAX_SEED:
            raise ConfigurationError(f"seed {seed} is outside 0 … 2⁶³ - 1")
        if count < 1:
            raise ConfigurationError(f"a clip of {count} tokens was asked for; it needs at least one")
        source = torch.Generator("cpu").manual_seed(seed)
        return torch.randn(count, self.dit.config.latent_dim, generator=source)

    def _velocity(self, text: Sequence[Tensor], mask: Tensor, conditional: tuple[bool, ...]) -> Velocity:
        """Velocity of the batch repeated for each flag, with its texts or without; what hangs on them is done once."""
        null = self.dit.unconditional(1)[0][0].float()  # (1, E)
        rows = [one.to(null) for flag in conditional for one in (text if flag else [null] * len(text))]
        context = self.dit.encode_text(*pad_text(rows))
        mask = mask.repeat(len(conditional), 1)
        return lambda x, t: self.dit(x, t, context, token_mask=mask)

    # ------------------------------------------------------------------ on disk

    def save_pretrained(self, folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Write weights and config.json into a folder, which is made; a generator that is there is replaced.

        Both files are written aside and then take their names; a process killed between the two renamings leaves a pair
        that does not match, which `from_pretrained` refuses.

        Args:
            folder: where to.
            dtype: number type of the transformer's weights on disk; None: that in memory. The statistics stay float32.

        Raises:
            CheckpointError: a weight is NaN or infinite, also by rounding to `dtype`.
            OutputError: the folder cannot be written.
        """
        state = {
            name: tensor.detach().to("cpu", dtype if name.startswith("dit.") else None).contiguous()
            for name, tensor in self.state_dict().items()
        }
        _refuse_bad_numbers(state, "this generator cannot be saved")
        digest = _digest(state)
        config = {
            "model_type": MODEL_TYPE,
            "version": VERSION,
            "weights": digest,
            "dit": dataclasses.asdict(self.dit.config),
            "info": dataclasses.asdict(self.info),
        }
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        with atomic_path(Path(folder) / CONFIG) as config_file, atomic_path(Path(folder) / WEIGHTS) as weights_file:
            config_file.write_text(text, encoding="utf-8")
            save_file(state, weights_file, metadata={"weights": digest})  # one entry: the order of several is random

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str] | None = None, dtype: torch.dtype = torch.float32
    ) -> Generator:
        """Load a folder of `save_pretrained`, on the CPU and in eval mode.

        Args:
            folder: None: the generator that ships with the package.
            dtype: of the transformer's arithmetic, whatever is stored.

        Raises:
            CheckpointError: nothing there, another kind or version, damaged, incomplete, or with weights that are NaN.
        """
        path = embedded_generator() if folder is None else Path(folder)
        if not path.is_dir():
            if folder is None:
                raise CheckpointError(
                    "this version ships no trained generator; name a folder of one (--model FOLDER), or train one with "
                    "`dasheng-tokenizer train` and a recipe of kind generator"
                )
            raise CheckpointError(f"{path}: no such folder; name that of a generator, with {CONFIG} and {WEIGHTS}")
        config = _read_config(path)
        state = _read_weights(path, config.get("weights"))
        try:
            dit_config, info = DiTConfig(**config["dit"]), GeneratorInfo(**config["info"])
            with torch.device("meta"):  # no time is lost on fresh weights
                model = cls(dit_config, info, state["latent_mean"], state["latent_std"])
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{path} is damaged or incomplete ({reason}); save or copy it again") from error
        _refuse_other_keys(path, model.state_dict(), state)
        _refuse_bad_numbers(state, f"{path} is no usable generator")
        model.load_state_dict(state, assign=True)
        model.dit.to(dtype)
        return model.eval()


def embedded_generator() -> Path:
    """Folder of the generator that ships inside the package."""
    return Path(str(files("dasheng_tokenizer") / "embedded" / "generator"))


def _digest(state: dict[str, Tensor]) -> str:
    """SHA-256 of names and numbers, in hex."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is missing or damaged ({error}); name the folder of a generator") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != MODEL_TYPE:
        raise CheckpointError(f"{path} is of kind {kind!r}, not {MODEL_TYPE!r}; name the folder of a generator")
    if config.get("version") != VERSION:
        raise CheckpointError(
            f"{path} is of version {config.get('version')}; this package reads version {VERSION}, update it or save "
            "the generator again"
        )
    return config


def _read_weights(folder: Path, digest: str | None) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    try:
        with safe_open(path, "pt") as opened:
            found = (opened.metadata() or {}).get("weights")
            state = {name: opened.get_tensor(name) for name in opened.keys()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is missing or damaged ({error}); save or copy the generator again") from error
    if found is None or found != digest:
        raise CheckpointError(
            f"{path} does not belong to the {CONFIG} beside it, as after a save that was cut off; save or copy both "
            "again"
        )
    return state


def _refuse_other_keys(path: Path, wanted: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    misshapen = {name for name in set(wanted) & set(found) if wanted[name].shape != found[name].shape}
    unsuitable = {"missing": set(wanted) - set(found), "unknown": set(found) - set(wanted), "misshapen": misshapen}
    for word, names in unsuitable.items():
        if names:
            raise CheckpointError(
                f"{path}: {len(names)} weights {word}, for example {min(names)}; this is no generator of the sizes in "
                f"its {CONFIG}; save or copy it again"
            )


def _refuse_bad_numbers(state: dict[str, Tensor], problem: str) -> None:
    for name, tensor in state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{problem}: {name} holds NaN or infinity; go back to an earlier checkpoint")
