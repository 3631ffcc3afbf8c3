"""A trained generator: transformer, standardisation of its latents, and which tokenizer and text encoder it belongs to.

On disk it is a folder of `model.safetensors` and `config.json`. B clips, T tokens, C latent width, E text width.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dasheng_tokenizer.checkpoint_sizes import settings_from_json
from dasheng_tokenizer.errors import CheckpointError, ConfigurationError
from dasheng_tokenizer.generation.dit import DiffusionTransformer, DiTConfig
from dasheng_tokenizer.generation.flow_matching import Method, Progress, Velocity
from dasheng_tokenizer.generation.sampling import STEPS, SWAY, clip_mask, sample_clips
from dasheng_tokenizer.generation.text_encoders import pad_text
from dasheng_tokenizer.weights_folder import (
    check_depth,
    check_weights,
    damaged,
    model_folder,
    read_weights_folder,
    write_weights_folder,
)

KIND = "generator"
"""Of its folder, see `weights_folder`."""

GUIDANCE = 3.0

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
        mask = clip_mask(num_tokens, self.latent_mean.device)  # (B, T)
        clips = sample_clips(
            lambda conditional: self._velocity(text, mask, conditional),
            len(text),
            num_tokens,
            seeds,
            self.dit.config.latent_dim,
            self.latent_mean.device,
            steps=steps,
            guidance=guidance,
            method=method,
            sway=sway,
            progress=progress,
        )
        return [self.restore(clip) for clip in clips]

    def _velocity(self, text: Sequence[Tensor], mask: Tensor, conditional: tuple[bool, ...]) -> Velocity:
        """Velocity of the batch repeated for each flag, with its texts or without; what hangs on them is done once."""
        null = self.dit.unconditional(1)[0][0].float()  # (1, E)
        rows = [one.to(null) for flag in conditional for one in (text if flag else [null] * len(text))]
        context = self.dit.encode_text(*pad_text(rows))
        mask = mask.repeat(len(conditional), 1)
        return lambda x, t: self.dit(x, t, context, token_mask=mask)

    # ------------------------------------------------------------------ on disk

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        dtype: torch.dtype | None = None,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write weights and config.json into a folder; see `write_weights_folder`.

        Args:
            folder: where to.
            dtype: number type of the transformer's weights on disk; None: that in memory. The statistics stay float32.
            state: weights to write, where those in memory are shared out among processes; None: those in memory.

        Raises:
            CheckpointError: a weight is NaN or infinite, also by rounding to `dtype`.
            OutputError: the folder cannot be written.
        """
        state = {
            name: tensor.detach().to("cpu", dtype if name.startswith("dit.") else None).contiguous()
            for name, tensor in (self.state_dict() if state is None else state).items()
        }
        config = {"dit": dataclasses.asdict(self.dit.config), "info": dataclasses.asdict(self.info)}
        write_weights_folder(folder, KIND, state, config)

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str] | None = None, dtype: torch.dtype = torch.float32
    ) -> Generator:
        """Load a folder of `save_pretrained`, on the CPU and in eval mode.

        Args:
            folder: or hub name; None: the generator that ships with the package.
            dtype: of the transformer's arithmetic, whatever is stored.

        Raises:
            CheckpointError: nothing there, another kind or version, damaged, incomplete, or with weights that are NaN.
        """
        path = embedded_generator() if folder is None else model_folder(folder, KIND)
        if not path.is_dir():
            raise CheckpointError(
                "this version ships no trained generator; name a folder of one (--model FOLDER), or train one with "
                "`dasheng-tokenizer train` and a recipe of kind generator"
            )
        config, state = read_weights_folder(path, KIND)
        try:
            dit_config = settings_from_json(DiTConfig, config["dit"])
            info = settings_from_json(GeneratorInfo, config["info"])
            check_depth(path, KIND, dit_config.depth, state)
            with torch.device("meta"):  # no time is lost on fresh weights
                model = cls(dit_config, info, state["latent_mean"], state["latent_std"])
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise damaged(path, error) from error
        check_weights(path, KIND, model.state_dict(), state)
        model.load_state_dict(state, assign=True)
        model.dit.to(dtype)
        return model.eval()


def embedded_generator() -> Path:
    """Folder of the generator that ships inside the package."""
    return Path(str(files("dasheng_tokenizer") / "embedded" / "generator"))
