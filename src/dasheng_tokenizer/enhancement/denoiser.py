"""The denoiser: a few pre-norm transformer blocks from the latents of noisy audio to those of the clean.

On disk it is a folder of `model.safetensors` and `config.json`. B clips, T tokens, D latent width.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dasheng_tokenizer.checkpoint_sizes import settings_from_json
from dasheng_tokenizer.errors import CheckpointError, ConfigurationError, LatentError
from dasheng_tokenizer.injection import Part
from dasheng_tokenizer.semantic_encoder import TransformerBlock, attention_mask
from dasheng_tokenizer.weights_folder import (
    check_depth,
    check_weights,
    damaged,
    read_weights_folder,
    write_weights_folder,
)

KIND = "denoiser"
"""Of its folder, see `weights_folder`."""

POSITION_KERNEL = 31
"""Tokens that the depthwise convolution sees, 1.24 s: it tells neighbours apart, at any length. That of wav2vec 2.0
(arXiv 2006.11477) spans 2.5 s; odd, so that it is centred."""

_STATISTICS = ("latent_mean", "latent_std", "input_mean", "input_std")

_LEAST_STD = 1e-3
"""Of the mean standard deviation: a dimension that never changes in the data must not be divided by zero."""


@dataclass(frozen=True)
class DenoiserConfig:
    """Sizes.

    Attributes:
        latent_dim: width D of the latent.
        depth: transformer blocks.
        heads: attention heads; the blocks' width must be a multiple of them.
        width: of the blocks; None: the latent's. Narrow latents, such as a VAE's, leave more to blocks that are wider.

    Raises:
        ConfigurationError: sizes that contradict each other.
    """

    latent_dim: int
    depth: int = 3
    heads: int = 6
    width: int | None = None

    def __post_init__(self) -> None:
        """Refuse sizes that contradict each other."""
        if min(self.latent_dim, self.heads, self.block_width) < 1 or self.depth < 0:
            raise ConfigurationError(
                f"latent_dim {self.latent_dim}, heads {self.heads} and width {self.block_width} must be at least 1, "
                f"depth {self.depth} at least 0"
            )
        if self.block_width % self.heads:
            raise ConfigurationError(
                f"denoiser.heads {self.heads} does not divide the width, {self.block_width}; choose another"
            )

    @property
    def block_width(self) -> int:
        """Width of the blocks, W."""
        return self.latent_dim if self.width is None else self.width


@dataclass(frozen=True)
class DenoiserInfo:
    """What a denoiser belongs to.

    Attributes:
        tokenizer_hash: `weights_hash()` of the tokenizer in whose latents it works.
        tokenizer: folder or hub name of that tokenizer; None: the embedded default.
        part: what of the noisy audio it sees.
        frame_rate: tokens a second.
        window_seconds: length that it was trained on; longer audio runs in windows of it (see `enhancer`).
        clean_change: two mean squared changes of a window, in standard deviations of clean latents. What the denoiser
            would change by less than the first is clean already and passes as it is; above the second it is denoised
            whole, between them in part. None: all is denoised. For the part `unified` alone.
        provenance: free-form facts: data, steps, licence, date.

    Raises:
        ConfigurationError: an unknown part, or a length or a rate out of range.
    """

    tokenizer_hash: str
    tokenizer: str | None = None
    part: Part = "unified"
    frame_rate: float = 25.0
    window_seconds: float = 5.12
    clean_change: tuple[float, float] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if self.part not in get_args(Part):
            raise ConfigurationError(f"part {self.part!r} is not one of {', '.join(get_args(Part))}")
        if self.clean_change is not None:
            low, high = self.clean_change
            if self.part != "unified" or not 0 <= low < high < math.inf:
                raise ConfigurationError(
                    f"clean_change {self.clean_change} must be two rising numbers from 0 on, of a denoiser of the part "
                    f"unified, not {self.part}"
                )
            object.__setattr__(self, "clean_change", (float(low), float(high)))  # JSON has lists
        if not (0 < self.frame_rate < math.inf and 0 < self.window_seconds < math.inf):
            raise ConfigurationError(
                f"window_seconds {self.window_seconds} and frame_rate {self.frame_rate} must be above 0 and finite"
            )

    @property
    def window_tokens(self) -> int:
        """Tokens of a window, at least one."""
        return max(1, round(self.window_seconds * self.frame_rate))


class Denoiser(nn.Module):
    """Latents of noisy audio → latents of the clean audio, of one tokenizer.

    It learns what to add to its input, in units of standard deviations; a fresh one adds nothing.

    Args:
        config: sizes.
        info: what it belongs to.
        latent_mean: (D,) of the latents of clean audio, as the decoder takes them.
        latent_std: (D,) of the same; far too small ones are raised to a thousandth of their mean.
        input_mean: (D,) of the part of clean audio that the denoiser sees.
        input_std: (D,) of the same.

    Raises:
        ConfigurationError: statistics of another width, not finite, negative, or all zero.
    """

    latent_mean: Tensor
    latent_std: Tensor
    input_mean: Tensor
    input_std: Tensor

    def __init__(
        self,
        config: DenoiserConfig,
        info: DenoiserInfo,
        latent_mean: Tensor,
        latent_std: Tensor,
        input_mean: Tensor,
        input_std: Tensor,
    ) -> None:
        super().__init__()
        self.config, self.info = config, info
        given = zip(_STATISTICS, (latent_mean, latent_std, input_mean, input_std), strict=True)
        for name, value in given:
            self.register_buffer(name, _checked(name, value, config.latent_dim))
        width = config.block_width
        self.project_in = nn.Linear(config.latent_dim, width)
        self.position = nn.Conv1d(width, width, POSITION_KERNEL, padding=POSITION_KERNEL // 2, groups=width)
        self.blocks = nn.ModuleList(TransformerBlock(width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.project_out = nn.Linear(width, config.latent_dim)
        nn.init.zeros_(self.project_out.weight)
        nn.init.zeros_(self.project_out.bias)

    def forward(self, embeddings: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Estimate the latents of the clean audio.

        Args:
            embeddings: (B, T, D) of the noisy audio, the part that `info.part` names.
            token_mask: (B, T) bool, true for real tokens, which come first. None: all are real.

        Returns:
            (B, T, D) in the scale that the decoder takes; zero where the mask is false. A clip does not depend on the
            others in the batch.

        Raises:
            LatentError: of another rank or width.
        """
        if embeddings.ndim != 3 or embeddings.shape[-1] != self.config.latent_dim:
            raise LatentError(
                f"embeddings have shape {tuple(embeddings.shape)}; expected (batch, tokens, {self.config.latent_dim}), "
                "the latent width of this denoiser"
            )
        start = (embeddings - self.input_mean) / self.input_std  # (B, T, D)
        h = self.project_in(start)  # (B, T, W)
        hidden = None if token_mask is None else ~token_mask[..., None]  # (B, T, 1)
        if hidden is not None:
            h = h.masked_fill(hidden, 0.0)  # as the convolution's own padding
        h = h + F.gelu(self.position(h.transpose(1, 2))).transpose(1, 2)  # (B, T, W)
        mask = None if token_mask is None else attention_mask(token_mask)  # (B, 1, 1, T)
        for block in self.blocks:
            h = block(h, mask)  # (B, T, W)
        estimate = self.restore_target(start + self.project_out(self.norm(h)))  # (B, T, D)
        return estimate if hidden is None else estimate.masked_fill(hidden, 0.0)

    def standardize_target(self, latents: Tensor) -> Tensor:
        """Latents (…, D) of clean audio → mean 0 and variance 1 in each dimension."""
        return (latents - self.latent_mean) / self.latent_std

    def restore_target(self, latents: Tensor) -> Tensor:
        """Undo `standardize_target`."""
        return latents * self.latent_std + self.latent_mean

    @property
    def num_parameters(self) -> int:
        """How many numbers were learned."""
        return sum(parameter.numel() for parameter in self.parameters())

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
            dtype: number type of the weights on disk; None: that in memory. The statistics stay float32.
            state: weights to write, where those in memory are shared out among processes; None: those in memory.

        Raises:
            CheckpointError: a weight is NaN or infinite, also by rounding to `dtype`.
            OutputError: the folder cannot be written.
        """
        state = {
            name: tensor.detach().to("cpu", None if name in _STATISTICS else dtype).contiguous()
            for name, tensor in (self.state_dict() if state is None else state).items()
        }
        config = {"denoiser": dataclasses.asdict(self.config), "info": dataclasses.asdict(self.info)}
        write_weights_folder(folder, KIND, state, config)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str] | None = None) -> Denoiser:
        """Load a folder of `save_pretrained`, on the CPU, as float32 and in eval mode.

        Args:
            folder: None: the denoiser that ships with the package.

        Raises:
            CheckpointError: nothing there, another kind or version, damaged, incomplete, or with weights that are NaN.
        """
        path = embedded_denoiser() if folder is None else Path(folder)
        if folder is None and not path.is_dir():
            raise CheckpointError(
                "this version ships no trained enhancer; name the folder of one (--model FOLDER), or train one with "
                "`dasheng-tokenizer train` and a recipe of kind enhancement"
            )
        config, state = read_weights_folder(path, KIND)
        try:
            sizes = settings_from_json(DenoiserConfig, config["denoiser"])
            info = settings_from_json(DenoiserInfo, config["info"])
            check_depth(path, KIND, sizes.depth, state)
            with torch.device("meta"):  # no time is lost on fresh weights
                model = cls(sizes, info, *(state[name] for name in _STATISTICS))
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise damaged(path, error) from error
        check_weights(path, KIND, model.state_dict(), state)
        # Before they are assigned: norms keep the type that they have when the model is cast.
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
        return model.eval()


def embedded_denoiser() -> Path:
    """Folder of the denoiser that ships inside the package."""
    return Path(str(files("dasheng_tokenizer") / "embedded" / "enhancer"))


def _checked(name: str, value: Tensor, width: int) -> Tensor:
    """A statistic as a buffer: standard deviations are kept away from zero."""
    value = value.detach().float().clone()
    deviation = name.endswith("std")
    if value.shape != (width,):
        raise ConfigurationError(f"{name} has shape {tuple(value.shape)}; expected ({width},), one a dimension")
    if not bool(torch.isfinite(value).all()) or (deviation and not (bool((value >= 0).all()) and bool(value.any()))):
        raise ConfigurationError(
            f"{name} must be finite, and a standard deviation not negative and not all zero; is the clean audio silent?"
        )
    return value.clamp(min=_LEAST_STD * float(value.mean())) if deviation else value
