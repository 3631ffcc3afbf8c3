"""Layers of the diffusion transformer: time features, rotary positions, attentions, gated perceptron, block.

B clips, T tokens, S text tokens. Masks are (B, 1, 1, N) bool, true for keys that may be seen, or None for all.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TIME_FEATURES = 256
"""Size of the sinusoidal time embedding; it, its scale and its base of 10,000 are those of DiT."""

TIME_SCALE = 1000.0
"""Times in [0, 1] are brought to the range that the sinusoids were made for."""

ROTARY_BASE = 10_000.0
"""Base of the rotary frequencies (arXiv 2104.09864)."""

NORM_EPS = 1e-6


def time_features(t: Tensor) -> Tensor:
    """(B,) times in [0, 1] → (B, 256) float32: cosines, then sines, of 1000·t at frequencies from 1 to 1/10000."""
    return sinusoids(TIME_SCALE * t.float())


def sinusoids(position: Tensor) -> Tensor:
    """(B,) float32 → (B, 256): cosines, then sines, at frequencies from 1 to 1/10000."""
    half = TIME_FEATURES // 2
    frequencies = torch.exp(
        -math.log(10_000.0) / half * torch.arange(half, device=position.device, dtype=torch.float32)
    )  # (128,)
    angles = position[:, None] * frequencies  # (B, 128)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)  # (B, 256)


def rotary_turns(length: int, head_size: int, device: torch.device) -> Tensor:
    """(2, length, head_size / 2) float32: cosines and sines of positions 0 … length - 1, of any length."""
    channels = torch.arange(0, head_size, 2, device=device, dtype=torch.float32)
    frequencies = ROTARY_BASE ** (-channels / head_size)  # (head_size / 2,)
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequencies  # (T, head_size / 2)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the channel pairs (i, i + half) of (…, T, head_size), in float32; `turns` is what `rotary_turns` gives."""
    cos, sin = turns  # (T, head_size / 2) each
    first, second = x.float().chunk(2, dim=-1)  # (…, T, head_size / 2) each
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class HeadNorm(nn.Module):
    """RMS norm over the channels of a head, in float32: keeps attention scores from growing without bound."""

    def __init__(self, head_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_size))

    def forward(self, x: Tensor) -> Tensor:
        """(…, head_size) → the same shape, float32."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), NORM_EPS)


class SelfAttention(nn.Module):
    """Attention among the tokens of a clip."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.norm_q = HeadNorm(width // heads)
        self.norm_k = HeadNorm(width // heads)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, turns: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T, width) → (B, T, width); `turns` from `rotary_turns`, `mask` (B, 1, 1, T)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, T, 3, heads, head size)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, T, head size) each
        q = rotate(self.norm_q(q), turns).to(v.dtype)  # (B, heads, T, head size)
        k = rotate(self.norm_k(k), turns).to(v.dtype)  # (B, heads, T, head size)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, heads, T, head size)
        return self.out(h.transpose(1, 2).flatten(2))  # (B, T, width)


class CrossAttention(nn.Module):
    """Attention of the tokens to the text, without positions: the text encoder has put them in already."""

    called_apart = ("kv", "norm_k")
    """Parts that run before the block does; see `training.sharding`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.norm_q = HeadNorm(width // heads)
        self.norm_k = HeadNorm(width // heads)
        self.out = nn.Linear(width, width)

    def keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, width) projected text → keys and values, (B, heads, S, head size) each."""
        k, v = self.kv(text).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.norm_k(k).to(v.dtype), v

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T, width) → (B, T, width); `keys` and `values` from `keys_values`, `mask` (B, 1, 1, S)."""
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, T, head size)
        q = self.norm_q(q).to(values.dtype)
        h = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)  # (B, heads, T, head size)
        return self.out(h.transpose(1, 2).flatten(2))  # (B, T, width)


class GatedMLP(nn.Module):
    """Two linear layers, the hidden one multiplied by a GELU gate."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) → (B, T, width)."""
        h, gate = self.fc1(x).chunk(2, dim=-1)  # (B, T, hidden) each
        return self.fc2(h * F.gelu(gate))  # (B, T, width)


def adaptive_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm of (B, T, width) whose (B, 1, width) shift and scale come from the condition."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * (1 + scale) + shift


class DiTBlock(nn.Module):
    """Self-attention, cross-attention, perceptron. A fresh block changes nothing."""

    def __init__(self, width: int, heads: int, mlp_hidden: int, skip: bool) -> None:
        super().__init__()
        self.skip = nn.Linear(2 * width, width) if skip else None
        # One vector, not a matrix: offsets are biases, which weight decay leaves alone.
        self.offsets = nn.Parameter(torch.zeros(6 * width))
        self.attention = SelfAttention(width, heads)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.cross_attention = CrossAttention(width, heads)
        self.mlp = GatedMLP(width, mlp_hidden)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        turns: Tensor,
        mask: Tensor | None,
        keys: Tensor,
        values: Tensor,
        text_mask: Tensor | None,
    ) -> Tensor:
        """(B, T, width), with a skip joined to it (B, T, 2·width), → (B, T, width); `modulation` (B, 6·width)."""
        if self.skip is not None:
            x = self.skip(x)  # (B, T, width)
        shift1, scale1, gate1, shift2, scale2, gate2 = (modulation + self.offsets)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attention(adaptive_norm(x, shift1, scale1), turns, mask)  # (B, T, width)
        x = x + self.cross_attention(self.norm(x), keys, values, text_mask)  # (B, T, width)
        return x + gate2 * self.mlp(adaptive_norm(x, shift2, scale2))  # (B, T, width)
