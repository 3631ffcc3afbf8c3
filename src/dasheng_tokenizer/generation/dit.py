"""Diffusion transformer (DiT): the velocity of noisy latents, given the time and a text.

Blocks of self-attention with rotary positions (arXiv 2104.09864), cross-attention to the text and a gated perceptron
(arXiv 2002.05202). Time and the mean of the text act through adaptive layer norm whose gates start at zero (adaLN-zero,
arXiv 2212.09748). One projection serves all blocks, each adds its own offsets (adaLN-single, arXiv 2310.00426): a
projection a block would be a quarter of all weights, and the width cannot be saved on, see `DiTConfig`.

B clips, T tokens, C latent width, S text tokens, E text width. Masks are true for real tokens, which come first.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dasheng_tokenizer.errors import ConfigurationError, LatentError, MaskError
from dasheng_tokenizer.generation.dit_blocks import TIME_FEATURES, DiTBlock, adaptive_norm, rotary_turns, time_features
from dasheng_tokenizer.semantic_encoder import attention_mask, token_mask

Size = Literal["tiny", "small", "base", "large"]

HEAD_SIZE = 64
"""Channels of an attention head in the presets, as in the published text-to-audio sibling of the tokenizer."""

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"width": 256, "depth": 4, "mlp_ratio": 2.0},
    "small": {"width": 448, "depth": 8},
    "base": {"width": 1280, "depth": 11},
    "large": {"width": 1536, "depth": 26},
}


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of the transformer.

    The width must not be below the latent's: a narrower network cannot carry the noise that it has to predict in every
    dimension. Later work on the published latent (1280 dimensions) found a width of 512 to fail (Fréchet distance 34.7
    with 208 M parameters) where 1536 works (7.2 with 322 M).

    Attributes:
        latent_dim: width C of the latents.
        text_dim: width E of the text embeddings.
        width: of the residual stream.
        depth: blocks.
        heads: attention heads; each has an even number of channels, width / heads.
        mlp_ratio: hidden width of the perceptron over `width`. Being gated it has three matrices, so the hidden width
            is cut to two thirds of that (see `mlp_hidden`): it costs what a plain perceptron of this ratio does.
        long_skips: join the outputs of the first half of the blocks to the inputs of the second half (U-ViT, arXiv
            2209.12152), last in, first out.

    Raises:
        ConfigurationError: sizes that contradict each other.
    """

    latent_dim: int
    text_dim: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    long_skips: bool = False

    def __post_init__(self) -> None:
        """Refuse sizes that contradict each other."""
        for name in ("latent_dim", "text_dim", "width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} of the diffusion transformer must be at least 1")
        if self.long_skips and self.depth < 2:
            raise ConfigurationError("long_skips join two halves; give at least 2 blocks or leave them out")
        if not self.mlp_ratio > 0:
            raise ConfigurationError(f"mlp_ratio must be above 0, not {self.mlp_ratio}")
        if self.width < self.latent_dim:
            raise ConfigurationError(
                f"width {self.width} is below the latent's {self.latent_dim}: such a transformer cannot carry the "
                f"noise of every dimension and fails to learn; take a width of at least {self.latent_dim}"
            )
        if self.width % self.heads or self.width // self.heads % 2:
            raise ConfigurationError(
                f"width {self.width} over {self.heads} heads gives no even number of channels a head, which rotary "
                "positions need; change one of the two"
            )

    @property
    def mlp_hidden(self) -> int:
        """Hidden width of the gated perceptron, in multiples of 64, which suit the matrix units of accelerators."""
        return math.ceil(2 / 3 * self.mlp_ratio * self.width / 64) * 64

    @classmethod
    def preset(cls, size: Size, latent_dim: int, text_dim: int, **changes: Any) -> DiTConfig:
        """A named size. A latent wider than the preset widens it to the next multiple of 64, the size of a head.

        Real counts of parameters, for a text width of 384 (tiny, small) or 1024 (base, large):

        | size | width x depth | latent 128 | latent 384 | latent 1280 |
        |---|---|---|---|---|
        | tiny | 256 x 4; 384 x 4 for latent 384 | 4.2 M | 9.3 M | |
        | small | 448 x 8 | 28.6 M | 28.8 M | |
        | base | 1280 x 11 | 310.4 M | 311.1 M | 313.4 M |
        | large | 1536 x 26 | 1010.5 M | 1011.3 M | 1014.0 M |

        To compare latents of different width under one transformer, give the same `width` for both.

        Args:
            size: name of the preset.
            latent_dim: width of the latents.
            text_dim: width of the text embeddings.
            changes: other fields, in place of the preset's. `heads` follows the width unless given.

        Raises:
            ConfigurationError: an unknown size or field, or what the class refuses.
        """
        if size not in PRESETS:
            raise ConfigurationError(f"unknown size {size!r} of the diffusion transformer; known: {', '.join(PRESETS)}")
        unknown = set(changes) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ConfigurationError(f"the diffusion transformer has no setting {', '.join(sorted(unknown))}")
        fields = {**PRESETS[size], "latent_dim": latent_dim, "text_dim": text_dim}
        fields["width"] = max(fields["width"], math.ceil(latent_dim / HEAD_SIZE) * HEAD_SIZE)
        fields.update(changes)
        fields.setdefault("heads", math.ceil(fields["width"] / HEAD_SIZE))
        return cls(**fields)


class TextContext(NamedTuple):
    """What the transformer needs of a text, whatever the time and the latents: computed once, used at every step.

    Attributes:
        keys: (B, heads, S, head size) for each block.
        values: alike.
        mask: (B, 1, 1, S) bool, or None where every text token is real.
        pooled: (B, width) mean of the real text tokens, projected.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor | None
    pooled: Tensor


class DiffusionTransformer(nn.Module):
    """Velocity of noisy latents under a text. A fresh one answers zero everywhere.

    A clip's velocity does not depend on the clips and the padding beside it, nor on what lies under the masks. There
    is no limit of length.

    Attributes:
        config: sizes.
        gradient_checkpointing: compute the inside of the blocks again in the backward pass instead of keeping it:
            less memory, about a third more time, the same gradients.
    """

    blocks: Sequence[DiTBlock]

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        width = config.width
        self.latent_in = nn.Linear(config.latent_dim, width)
        self.time_mlp = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        self.text_mlp = nn.Sequential(
            nn.LayerNorm(config.text_dim), nn.Linear(config.text_dim, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.text_norm = nn.LayerNorm(width)
        self.text_pool = nn.Linear(width, width)
        self.null_text = nn.Parameter(torch.randn(config.text_dim))
        self.modulation = nn.Linear(width, 6 * width)
        # With long skips the last depth // 2 blocks take one; an odd depth leaves the middle block without.
        first_skip = config.depth - config.depth // 2 if config.long_skips else config.depth
        self.blocks = nn.ModuleList(  # type: ignore[assignment]  # for mypy it holds any modules
            DiTBlock(width, config.heads, config.mlp_hidden, skip=index >= first_skip) for index in range(config.depth)
        )
        self.final_modulation = nn.Linear(width, 2 * width)
        self.latent_out = nn.Linear(width, config.latent_dim)
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for zero in (self.modulation, self.final_modulation, self.latent_out):
            nn.init.zeros_(zero.weight)
        for block in self.blocks:
            nn.init.zeros_(block.cross_attention.out.weight)
            if block.skip is not None:  # starts as if there were no skip
                identity = torch.eye(self.config.width, device=block.skip.weight.device)
                block.skip.weight.copy_(torch.cat([identity, torch.zeros_like(identity)], dim=1))

    @property
    def num_parameters(self) -> int:
        """Count of all weights."""
        return sum(parameter.numel() for parameter in self.parameters())

    def unconditional(self, count: int) -> tuple[Tensor, Tensor]:
        """The learned text that stands for "no text": (count, 1, E) and its mask (count, 1)."""
        text = self.null_text.expand(count, 1, -1)  # (count, 1, E)
        return text, torch.ones(count, 1, dtype=torch.bool, device=text.device)

    def encode_text(self, text: Tensor, text_mask: Tensor | None = None) -> TextContext:
        """Everything that hangs on the text alone, for use at every step of a sampler.

        Args:
            text: (B, S, E) text embeddings.
            text_mask: (B, S) bool; None: every token is real.

        Raises:
            ConfigurationError: text of wrong rank or width.
            MaskError: a mask of wrong shape or type, with holes, padding on the left, or without a real token.
        """
        if text.ndim != 3 or text.shape[-1] != self.config.text_dim:
            raise ConfigurationError(
                f"text embeddings have shape {tuple(text.shape)}; expected (batch, tokens, {self.config.text_dim}). "
                "Use the text encoder that this transformer was trained with"
            )
        if text_mask is None:
            text_mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        _check_mask(text_mask, text.shape[:2], "text_mask")
        real = text_mask[..., None]  # (B, S, 1)
        text = text.masked_fill(~real, 0.0).to(self.latent_in.weight.dtype)  # (B, S, E)
        projected = self.text_norm(self.text_mlp(text))  # (B, S, width)
        mean = projected.masked_fill(~real, 0.0).sum(1) / real.sum(1)  # (B, width)
        keys, values = zip(*(block.cross_attention.keys_values(projected) for block in self.blocks), strict=True)
        return TextContext(keys, values, attention_mask(text_mask), self.text_pool(mean))

    def forward(
        self,
        latents: Tensor,
        t: Tensor,
        text: Tensor | TextContext,
        text_mask: Tensor | None = None,
        token_mask: Tensor | None = None,
    ) -> Tensor:
        """Velocity at the given latents and times.

        Args:
            latents: (B, T, C) noisy latents.
            t: (B,) times, 0 = noise, 1 = data.
            text: (B, S, E) text embeddings, or what `encode_text` made of them.
            text_mask: (B, S) bool; None: every text token is real. Not with a `TextContext`, which holds it.
            token_mask: (B, T) bool; None: every token is real.

        Returns:
            (B, T, C) in the type of `latents`; zero at padded tokens.

        Raises:
            LatentError: latents of wrong rank or width, none at all, or another count of times or texts.
            ConfigurationError: text of wrong rank or width.
            MaskError: a mask of wrong shape or type, with holes, padding on the left, or without a real token.
        """
        if isinstance(text, TextContext):
            if text_mask is not None:
                raise MaskError("the text context holds its mask already; leave text_mask out")
            context = text
        else:
            context = self.encode_text(text, text_mask)
        self._check(latents, t, context.pooled.shape[0], token_mask)
        x = latents if token_mask is None else latents.masked_fill(~token_mask[..., None], 0.0)  # (B, T, C)
        x = self.latent_in(x.to(self.latent_in.weight.dtype))  # (B, T, width)
        condition = F.silu(self.time_mlp(time_features(t).to(self.latent_in.weight.dtype)) + context.pooled)
        x = self._run_blocks(x, self.modulation(condition), context, token_mask)  # (B, T, width)
        shift, scale = self.final_modulation(condition)[:, None].chunk(2, dim=-1)  # (B, 1, width) each
        velocity = self.latent_out(adaptive_norm(x, shift, scale)).to(latents.dtype)  # (B, T, C)
        return velocity if token_mask is None else velocity.masked_fill(~token_mask[..., None], 0.0)

    def _run_blocks(self, x: Tensor, modulation: Tensor, context: TextContext, token_mask: Tensor | None) -> Tensor:
        turns = rotary_turns(x.shape[1], self.config.width // self.config.heads, x.device)  # (2, T, head size / 2)
        mask = None if token_mask is None else attention_mask(token_mask)  # (B, 1, 1, T)
        skips: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            if block.skip is not None:
                x = torch.cat([x, skips.pop()], dim=-1)  # (B, T, 2·width)
            keys, values = context.keys[index], context.values[index]
            arguments = (x, modulation, turns, mask, keys, values, context.mask)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *arguments, use_reentrant=False)  # (B, T, width)
            else:
                x = block(*arguments)  # (B, T, width)
            if self.config.long_skips and index < self.config.depth // 2:
                skips.append(x)
        return x

    def _check(self, latents: Tensor, t: Tensor, texts: int, mask: Tensor | None) -> None:
        if latents.ndim != 3 or latents.shape[-1] != self.config.latent_dim or 0 in latents.shape:
            raise LatentError(
                f"latents have shape {tuple(latents.shape)}; expected (batch, tokens, {self.config.latent_dim}), one "
                "clip and one token at least, of the tokenizer that this transformer was trained with"
            )
        # Not len(): tracing would fix the count of clips.
        if t.shape != latents.shape[:1] or texts != latents.shape[0]:
            raise LatentError(
                f"{latents.shape[0]} clips, but times of shape {tuple(t.shape)} and {texts} texts; each needs one"
            )
        if mask is not None:
            _check_mask(mask, latents.shape[:2], "token_mask")


def _check_mask(mask: Tensor, shape: torch.Size, name: str) -> None:
    if mask.dtype != torch.bool or mask.shape != shape:
        raise MaskError(
            f"{name} has type {mask.dtype} and shape {tuple(mask.shape)}; expected boolean of shape {tuple(shape)}"
        )
    if torch.compiler.is_compiling():  # data-dependent checks cannot be traced
        return
    counts = mask.sum(1)  # (B,)
    if not bool((counts > 0).all()):
        raise MaskError(f"{name} hides every token of item {int(counts.argmin())}; an item needs at least one")
    contiguous = (mask == token_mask(counts, mask.shape[1])).all(1)  # (B,)
    if not bool(contiguous.all()):
        item = int(contiguous.int().argmin())
        raise MaskError(f"{name} of item {item} has holes or padding on the left; real tokens come first")
