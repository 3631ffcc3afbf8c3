"""Velocity predictor of the published sibling generator, in its key layout.

A diffusion transformer with long skips (arXiv 2209.12152). Unlike `dit`, every block has its own adaptive layer norm
(adaLN, arXiv 2212.09748) and its own norm of the text, gates act as 1 - gate, and a second, time-aligned condition is
added to each token. For text to audio that one is the same learned vector everywhere, so that it is kept as one vector
a block.

B clips, T tokens, C latent width, S text tokens, N times. Masks are true for real tokens, which come first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dasheng_tokenizer.generation.audiogen_configuration import AudioGenConfig
from dasheng_tokenizer.generation.dit_blocks import ROTARY_BASE, TIME_FEATURES, rotary_turns, rotate, sinusoids
from dasheng_tokenizer.semantic_encoder import attention_mask


class SceneContext(NamedTuple):
    """What the backbone needs of a prompt, whatever the time and the latents: computed once, used at every step.

    Attributes:
        keys: (B, heads, S, head size) for each block.
        values: alike.
        mask: (B, 1, 1, S) bool, or None where every text token is real.
        aligned: (B, 1, width) for each block: the time-aligned condition, the same at every token.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor | None
    aligned: tuple[Tensor, ...]


class Modulation(NamedTuple):
    """What the backbone needs of the times, whatever the prompt and the latents: computed once for all steps.

    A fifth of all weights makes these few numbers; at one clip a batch, reading them again at every step would be a
    fifth of the time.

    Attributes:
        blocks: (N, 6 · width) for each block: shift, scale and gate of the attention, then of the perceptron.
        final: (N, 2 · width) shift and scale of the last norm.
    """

    blocks: tuple[Tensor, ...]
    final: Tensor

    def at(self, index: Tensor) -> Modulation:
        """Rows (B,) of it."""
        return Modulation(tuple(block[index] for block in self.blocks), self.final[index])


class Rotary(nn.Module):
    """Holds the frequencies that the published files store; the positions are computed anew, in float32."""

    inv_freq: Tensor

    def __init__(self, head_size: int) -> None:
        super().__init__()
        channels = torch.arange(0, head_size, 2, dtype=torch.float32)
        self.register_buffer("inv_freq", ROTARY_BASE ** (-channels / head_size))


class Attention(nn.Module):
    """Self-attention with rotary positions, or cross-attention without; queries and keys are normalised a head."""

    def __init__(self, width: int, heads: int, rotary: bool) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width, width, bias=False)
        self.to_v = nn.Linear(width, width, bias=False)
        self.norm_q = nn.LayerNorm(width // heads)
        self.norm_k = nn.LayerNorm(width // heads)
        self.proj = nn.Linear(width, width)
        self.rotary = Rotary(width // heads) if rotary else None

    def keys_values(self, x: Tensor, turns: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, S, width) → keys and values, (B, heads, S, head size) each."""
        k, v = self._split(self.to_k(x)), self._split(self.to_v(x))
        return self._turned(self.norm_k(k), turns), v

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, turns: Tensor | None = None
    ) -> Tensor:
        """(B, T, width) → (B, T, width); `mask` (B, 1, 1, S), `turns` from `rotary_turns`."""
        q = self._turned(self.norm_q(self._split(self.to_q(x))), turns)  # (B, heads, T, head size)
        h = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)  # (B, heads, T, head size)
        return self.proj(h.transpose(1, 2).flatten(2))  # (B, T, width)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, T, head size)

    @staticmethod
    def _turned(x: Tensor, turns: Tensor | None) -> Tensor:
        return x if turns is None else rotate(x, turns).to(x.dtype)


class GEGLU(nn.Module):
    """Linear layer whose first half is multiplied by the GELU of its second (arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) → (B, T, hidden)."""
        h, gate = self.proj(x).chunk(2, dim=-1)  # (B, T, hidden) each
        return h * F.gelu(gate)


class MLP(nn.Module):
    """Perceptron with a gated hidden layer."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        # The layout numbers its three layers; the middle one is a dropout, which has no weights.
        self.net = nn.Sequential(GEGLU(width, hidden), nn.Identity(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) → (B, T, width)."""
        return self.net(x)


class AdaLN(nn.Module):
    """Shifts, scales and gates of a block, from the time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.time_ada = nn.Linear(width, 6 * width)


class Block(nn.Module):
    """Self-attention, time-aligned condition, cross-attention, perceptron."""

    def __init__(self, config: AudioGenConfig, skip: bool) -> None:
        super().__init__()
        width = config.dit_embed_dim
        if skip:
            self.skip_norm = nn.LayerNorm(2 * width)
            self.skip_linear = nn.Linear(2 * width, width)
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, config.dit_num_heads, rotary=True)
        self.ta_context_norm = nn.LayerNorm(config.dit_ta_context_dim)
        self.ta_context_projection = nn.Linear(config.dit_ta_context_dim, width, bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.norm_context = nn.LayerNorm(width)
        self.cross_attn = Attention(width, config.dit_num_heads, rotary=False)
        self.norm3 = nn.LayerNorm(width)
        self.mlp = MLP(width, int(config.dit_mlp_ratio * width))
        self.adaln = AdaLN(width)

    def forward(
        self,
        x: Tensor,
        skip: Tensor | None,
        modulation: Tensor,
        turns: Tensor,
        mask: Tensor | None,
        keys: Tensor,
        values: Tensor,
        text_mask: Tensor | None,
        aligned: Tensor,
    ) -> Tensor:
        """(B, T, width), in the second half also the `skip` (B, T, width), → (B, T, width)."""
        if skip is not None:
            x = self.skip_linear(self.skip_norm(torch.cat([x, skip], dim=-1)))  # (B, T, width)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation[:, None].chunk(6, dim=-1)  # (B, 1, width) each
        h = self.norm1(x) * (1 + scale1) + shift1  # (B, T, width)
        x = x + torch.tanh(1 - gate1) * self.attn(h, *self.attn.keys_values(h, turns), mask, turns)
        x = x + aligned
        x = x + self.cross_attn(self.norm2(x), keys, values, text_mask)  # (B, T, width)
        # No tanh here; so it was published.
        return x + (1 - gate2) * self.mlp(self.norm3(x) * (1 + scale2) + shift2)  # (B, T, width)


class PatchEmbed(nn.Module):
    """Latents to the width of the transformer; a patch is one token."""

    def __init__(self, config: AudioGenConfig) -> None:
        super().__init__()
        self.proj = nn.Conv1d(config.latent_dim, config.dit_embed_dim, kernel_size=1)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, T, C) → (B, T, width)."""
        return self.proj(latents.transpose(1, 2)).transpose(1, 2)


class TimeEmbed(nn.Module):
    """Sinusoids to the time token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, position: Tensor) -> Tensor:
        """(N,) on the scale of 0 … 1000 → (N, width)."""
        return F.silu(self.mlp(sinusoids(position.float()).to(next(self.parameters()).dtype)))


class FinalBlock(nn.Module):
    """Back to the width of the latent; the convolution sees one neighbour on each side."""

    def __init__(self, config: AudioGenConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dit_embed_dim)
        self.linear = nn.Linear(config.dit_embed_dim, config.latent_dim)
        self.final_layer = nn.Conv1d(config.latent_dim, config.latent_dim, kernel_size=3, padding=1)

    def forward(self, x: Tensor, modulation: Tensor, token_mask: Tensor | None) -> Tensor:
        """(B, T, width) and (B, 2 · width) → (B, T, C); where masked, the neighbour is silent as at the end."""
        shift, scale = modulation[:, None].chunk(2, dim=-1)  # (B, 1, width) each
        x = self.linear(self.norm(x) * (1 + scale) + shift)  # (B, T, C)
        if token_mask is not None:
            x = x.masked_fill(~token_mask[..., None], 0.0)
        return self.final_layer(x.transpose(1, 2)).transpose(1, 2)  # (B, T, C)


class AudioGenBackbone(nn.Module):
    """Velocity of noisy latents towards the noise, as published: the opposite of `flow_matching`'s direction.

    There is no limit of length. Inference only.
    """

    in_blocks: Sequence[Block]
    out_blocks: Sequence[Block]

    def __init__(self, config: AudioGenConfig) -> None:
        super().__init__()
        self.config = config
        width, half = config.dit_embed_dim, config.dit_depth // 2
        self.patch_embed = PatchEmbed(config)
        self.time_embed = TimeEmbed(width)
        self.time_ada_final = nn.Linear(width, 2 * width)
        self.context_embed = nn.Sequential(nn.Linear(config.content_dim, width), nn.SiLU(), nn.Linear(width, width))
        # For mypy a ModuleList holds any modules.
        self.in_blocks = nn.ModuleList(Block(config, skip=False) for _ in range(half))  # type: ignore[assignment]
        self.mid_block = Block(config, skip=False)
        self.out_blocks = nn.ModuleList(Block(config, skip=True) for _ in range(half))  # type: ignore[assignment]
        self.final_block = FinalBlock(config)

    def blocks(self) -> Iterator[Block]:
        """All blocks in the order in which they run."""
        yield from self.in_blocks
        yield self.mid_block
        yield from self.out_blocks

    def encode_context(self, content: Tensor, text_mask: Tensor, aligned: Tensor) -> SceneContext:
        """Everything that hangs on the prompt alone.

        Args:
            content: (B, S, content width) from the content adapter; zeros for the unconditional half.
            text_mask: (B, S) bool.
            aligned: (B, content width) time-aligned condition of every token; zeros for the unconditional half.
        """
        text = self.context_embed(content)  # (B, S, width)
        pairs = [block.cross_attn.keys_values(block.norm_context(text)) for block in self.blocks()]
        keys, values = zip(*pairs, strict=True)
        projected = tuple(
            block.ta_context_projection(block.ta_context_norm(aligned[:, None])) for block in self.blocks()
        )
        return SceneContext(keys, values, attention_mask(text_mask), projected)

    def modulation(self, position: Tensor) -> Modulation:
        """Everything that hangs on the times alone: (N,) on the scale of 0, data, … 1000, noise."""
        c = self.time_embed(position)  # (N, width)
        return Modulation(tuple(block.adaln.time_ada(c) for block in self.blocks()), self.time_ada_final(c))

    def forward(
        self,
        latents: Tensor,
        modulation: Modulation,
        context: SceneContext,
        token_mask: Tensor | None = None,
        published_padding: bool = False,
    ) -> Tensor:
        """Velocity.

        Args:
            latents: (B, T, C).
            modulation: one row a clip.
            context: from `encode_context`.
            token_mask: (B, T) bool; None: every token is real.
            published_padding: let the last convolution see what lies after the end of a shorter clip, as the published
                code does; then a clip depends on the ones beside it.

        Returns:
            (B, T, C); what stands at padded tokens is arbitrary.
        """
        turns = rotary_turns(latents.shape[1], self.config.dit_embed_dim // self.config.dit_num_heads, latents.device)
        mask = None if token_mask is None else attention_mask(token_mask)  # (B, 1, 1, T)
        x = self.patch_embed(latents.to(self.patch_embed.proj.weight.dtype))  # (B, T, width)
        skips: list[Tensor] = []
        half = len(self.in_blocks)
        for index, block in enumerate(self.blocks()):
            skip = skips.pop() if index > half else None  # last in, first out
            cross = (context.keys[index], context.values[index], context.mask, context.aligned[index])
            x = block(x, skip, modulation.blocks[index], turns, mask, *cross)  # (B, T, width)
            if index < half:
                skips.append(x)
        hidden = None if published_padding else token_mask
        return self.final_block(x, modulation.final, hidden).to(latents.dtype)  # (B, T, C)
