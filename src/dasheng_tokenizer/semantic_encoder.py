"""Semantic encoders: frozen networks that give one vector every 40 ms.

`SemanticEncoder` is the interface and holds what all encoders share: windows that do not see each other, so that long
audio needs constant memory. `DashengEncoder` is the published one. Others live in `semantic_adapters`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dasheng_tokenizer.configuration import DashengTokenizerConfig
from dasheng_tokenizer.errors import ConfigurationError
from dasheng_tokenizer.spectral import (
    CONTEXT,
    SAMPLES_PER_TOKEN,
    SAMPLING_RATE,
    Float32BatchNorm1d,
    Float32Conv2d,
    Float32LayerNorm,
    Float32Module,
    MelSpectrogram,
)

FRAMES_PER_TOKEN = 4
"""Mel frames (10 ms) a token (40 ms)."""


WINDOWS_TOKENS = {"cpu": 252, "cuda": 16_128}
"""Tokens of windows that an encoder takes at once, by device; elsewhere as on a CPU.

One window of 10 s keeps the matrix products of a CPU busy already and its activations in the cache. On an accelerator
64 windows fill the machine and need about 0.5 GiB in half precision at the published size.
"""


def token_mask(num_tokens: Tensor, length: int) -> Tensor:
    """(B,) token counts → (B, length) bool, true for tokens that hold signal."""
    return torch.arange(length, device=num_tokens.device) < num_tokens[:, None]


def attention_mask(mask: Tensor) -> Tensor | None:
    """(B, N) → (B, 1, 1, N) bool for scaled-dot-product attention; None where nothing is hidden (faster kernels)."""
    if not torch.compiler.is_compiling() and bool(mask.all()):
        return None
    return mask[:, None, None, :]


def encoder_mask(mask: Tensor, dtype: torch.dtype) -> Tensor | None:
    """`attention_mask` of an encoder, which always sees a token; in an exported graph as what is added to the scores.

    With a bool mask a graph chooses scores and looks for rows that see nothing; without, onnxruntime encodes faster.

    Args:
        mask: (B, N) bool, true for what may be seen.
        dtype: of queries and keys.
    """
    seen = attention_mask(mask)
    if seen is None or not torch.compiler.is_exporting():
        return seen
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min / 2)


class SemanticEncoder(nn.Module):
    """Interface of a frozen encoder.

    Attributes:
        output_dim: width of its vectors.
        window_tokens: tokens that see each other; longer audio runs as independent windows of this size.
        max_window_tokens: the largest such size, that which the encoder is configured for.
        needs_level: whether a window needs a figure of the whole clip (`level`) first.
    """

    output_dim: int
    window_tokens: int
    max_window_tokens: int
    needs_level: bool = False

    def set_window(self, seconds: float) -> None:
        """See `DashengTokenizerModel.set_encoder_window`."""
        tokens = round(seconds * SAMPLING_RATE / SAMPLES_PER_TOKEN)
        longest = self.max_window_tokens * SAMPLES_PER_TOKEN / SAMPLING_RATE
        if (
            not 1 <= tokens <= self.max_window_tokens
            or abs(tokens * SAMPLES_PER_TOKEN / SAMPLING_RATE - seconds) > 1e-6
        ):
            raise ConfigurationError(
                f"a window of {seconds} s was asked for; it must be a multiple of 0.04 s up to {longest:g} s"
            )
        self.window_tokens = tokens

    def layers(self) -> Iterable[nn.Module]:
        """The layers that all alike take (B, N, D); what `DashengTokenizerModel.compile_layers` compiles."""
        raise TypeError(f"{type(self).__name__} must define layers")

    def level(self, context_audio: Tensor, num_frames: Tensor) -> Tensor:
        """Figure of a piece of a clip, (B,); the clip's is the maximum over its pieces. Only where `needs_level`."""
        return context_audio.new_zeros(context_audio.shape[0])

    def encode_window(self, context_audio: Tensor, num_tokens: Tensor, level: Tensor | None) -> Tensor:
        """One window: (B, CONTEXT + 640·N + CONTEXT) samples → (B, N, D); `num_tokens` (B,) of them are real.

        Samples past the real tokens are zero. What is returned past them is arbitrary.
        """
        raise TypeError(f"{type(self).__name__} must define encode_window")

    def forward(self, context_audio: Tensor, num_tokens: Tensor, level: Tensor | None = None) -> Tensor:
        """Clips of any length.

        Args:
            context_audio: (B, CONTEXT + 640·T + CONTEXT) samples, zero past each clip's end.
            num_tokens: (B,) tokens of each clip, ≤ T.
            level: (B,) figure of the whole clip; computed here when not given.

        Returns:
            (B, T, D); zero past each clip's tokens.
        """
        length = (context_audio.shape[-1] - 2 * CONTEXT) // SAMPLES_PER_TOKEN
        if self.needs_level and level is None:
            level = self.level(context_audio, FRAMES_PER_TOKEN * num_tokens)
        whole, rest = divmod(length, self.window_tokens)
        parts = []
        if whole:
            parts.append(self._encode_windows(context_audio, num_tokens, level, 0, whole, self.window_tokens))
        if rest:
            parts.append(self._encode_windows(context_audio, num_tokens, level, length - rest, 1, rest))
        tokens = torch.cat(parts, dim=1)  # (B, T, D)
        return tokens.masked_fill(~token_mask(num_tokens, length)[..., None], 0.0)

    def windows_at_once(self, device: torch.device) -> int:
        """How many windows to give the encoder together, by `WINDOWS_TOKENS`."""
        return max(1, WINDOWS_TOKENS.get(device.type, WINDOWS_TOKENS["cpu"]) // self.window_tokens)

    def _encode_windows(
        self, context_audio: Tensor, num_tokens: Tensor, level: Tensor | None, start: int, count: int, size: int
    ) -> Tensor:
        """`count` windows of `size` tokens from token `start` on: → (B, count·size, D).

        Windows after a clip's end are left out: they cost nothing and cannot disturb.
        """
        span = size * SAMPLES_PER_TOKEN
        audio = context_audio[:, start * SAMPLES_PER_TOKEN :].unfold(1, span + 2 * CONTEXT, span)[:, :count]
        audio = audio.flatten(0, 1)  # (B·count, CONTEXT + span + CONTEXT)
        first = start + size * torch.arange(count, device=num_tokens.device)  # (count,)
        real = (num_tokens[:, None] - first).clamp(0, size).flatten()  # (B·count,)
        levels = None if level is None else level.repeat_interleave(count)  # (B·count,)
        if torch.compiler.is_compiling():  # which windows are present hangs on the data
            return self.encode_window(audio, real, levels).unflatten(0, (-1, count)).flatten(1, 2)
        at_once = max(len(context_audio), self.windows_at_once(audio.device))
        places = real.nonzero()[:, 0].split(at_once)
        parts = [self.encode_window(audio[i], real[i], None if levels is None else levels[i]) for i in places]
        tokens = parts[0].new_zeros(len(real), *parts[0].shape[1:])
        tokens[real > 0] = torch.cat(parts)
        return tokens.unflatten(0, (-1, count)).flatten(1, 2)  # (B, count·size, D)


class Attention(nn.Module):
    """Multi-head self-attention with fused, biased query, key and value projections."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, N, dim) → (B, N, dim); `mask` (B, 1, 1, N) is true for keys that may be seen."""
        qkv = self.qkv(x.to(self.qkv.weight.dtype)).unflatten(-1, (3, self.num_heads, -1))  # (B, N, 3, heads, head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, head_dim) each
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, heads, N, head_dim)
        return self.proj(h.transpose(1, 2).flatten(2))  # (B, N, dim)


class MLP(nn.Module):
    """Two linear layers with exact GELU, hidden width 4·dim."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, dim) → (B, N, dim)."""
        return self.fc2(F.gelu(self.fc1(x.to(self.fc1.weight.dtype))))  # (B, N, dim)


class TransformerBlock(nn.Module):
    """Pre-norm transformer block, LayerNorm eps 1e-6."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = Float32LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = Float32LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, N, dim) → (B, N, dim) float32."""
        x = x + self.attn(self.norm1(x), mask)  # (B, N, dim)
        return x + self.mlp(self.norm2(x))  # (B, N, dim)


class PatchEmbed(nn.Module):
    """One linear layer on patches of `bands` x 4 frames, stored as the convolution it equals, in float32."""

    def __init__(self, bands: int, dim: int) -> None:
        super().__init__()
        patch = (bands, FRAMES_PER_TOKEN)
        self.proj = Float32Conv2d(1, dim, kernel_size=patch, stride=patch)

    def forward(self, spectrogram: Tensor) -> Tensor:
        """(B, bands, 4·N) → (B, N, dim)."""
        return linear_patches(spectrogram, self.proj.weight, self.proj.bias)


def linear_patches(spectrogram: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The patch convolution as the matrix product it is, in float32.

    (B, bands, 4·N) with weight (D, 1, bands, 4) → (B, N, D).
    """
    patches = spectrogram.unflatten(-1, (-1, FRAMES_PER_TOKEN)).transpose(1, 2).flatten(2)  # (B, N, bands·4)
    with torch.autocast(patches.device.type, enabled=False):
        return F.linear(patches, weight.flatten(1), bias)  # (B, N, D)


class DashengEncoder(SemanticEncoder):
    """The published semantic encoder: a ViT over 40 ms patches of a 64-band dB mel spectrogram (arXiv 2406.06992).

    The dB floor hangs on the loudest band of the whole clip; that maximum is the clip's `level`.
    """

    window_tokens = max_window_tokens = 252  # 10.08 s, the positions the encoder was trained with
    needs_level = True
    dynamic_range_db = 120.0

    def __init__(self, config: DashengTokenizerConfig) -> None:
        super().__init__()
        dim, bands = config.embed_dim, 64
        self.output_dim = dim
        self.time_pos_embed = nn.Parameter(0.02 * torch.randn(1, dim, 1, self.max_window_tokens))
        self.freq_pos_embed = nn.Parameter(0.02 * torch.randn(1, dim, 1, 1))
        # Lists keep the published key names front_end.0 and init_bn.1, whose neighbours hold no weights.
        self.front_end = nn.ModuleList([MelSpectrogram(n_fft=512, n_mels=bands, power=2.0)])
        self.patch_embed = PatchEmbed(bands, dim)
        self.init_bn = nn.ModuleList([nn.Identity(), Float32BatchNorm1d(bands)])
        self.blocks = nn.ModuleList(TransformerBlock(dim, config.num_heads) for _ in range(config.depth))
        self.norm = Float32LayerNorm(dim, eps=1e-6)

    def layers(self) -> Iterable[nn.Module]:
        """See `SemanticEncoder.layers`."""
        return self.blocks

    def level(self, context_audio: Tensor, num_frames: Tensor) -> Tensor:
        """Loudest mel power of each clip's `num_frames` (B,) frames: (B,) float32."""
        if torch.compiler.is_compiling():  # the longest clip hangs on the data
            frames = (context_audio.shape[-1] - 2 * CONTEXT) // SAMPLES_PER_TOKEN * FRAMES_PER_TOKEN
        else:
            frames = int(num_frames.max())
        mel = self.front_end[0](context_audio, frames)  # (B, 64, F)
        mask = token_mask(num_frames, mel.shape[-1])  # (B, F)
        return mel.amax(1).masked_fill(~mask, 0.0).amax(1)

    def encode_window(self, context_audio: Tensor, num_tokens: Tensor, level: Tensor | None) -> Tensor:
        """See `SemanticEncoder.encode_window`; without a `level`, that of this window."""
        length = (context_audio.shape[-1] - 2 * CONTEXT) // SAMPLES_PER_TOKEN
        if level is None:
            level = self.level(context_audio, FRAMES_PER_TOKEN * num_tokens)
        mel = self.front_end[0](context_audio, FRAMES_PER_TOKEN * length)  # (B, 64, 4N)
        floor = 10 * level.clamp(min=1e-10).log10() - self.dynamic_range_db  # (B,)
        decibel = torch.maximum(10 * mel.clamp(min=1e-10).log10(), floor[:, None, None])  # (B, 64, 4N)
        with torch.autocast(mel.device.type, enabled=False):
            decibel = self.init_bn[1](decibel)  # (B, 64, 4N)
        x = self.patch_embed(decibel)  # (B, N, D)
        x = x + self.time_pos_embed[0, :, 0, :length].T + self.freq_pos_embed[0, :, 0, 0]  # (B, N, D)
        mask = encoder_mask(token_mask(num_tokens, length), self.time_pos_embed.dtype)
        for block in self.blocks:
            x = block(x, mask)  # (B, N, D)
        return self.norm(x)  # (B, N, D)


class FeatureNorm(Float32Module):
    """Zero mean and unit variance in every dimension, by fixed statistics; the identity until they are set."""

    mean: Tensor
    std: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    @torch.no_grad()
    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Take (dim,) statistics of features; a dimension that hardly varies is centred only."""
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 1e-4, std, 1.0))

    def forward(self, features: Tensor) -> Tensor:
        """(B, T, dim) → (B, T, dim), of the same type."""
        return ((features.float() - self.mean) / self.std).to(features.dtype)


def build_semantic_encoder(config: DashengTokenizerConfig) -> SemanticEncoder:
    """The encoder that `config.semantic_encoder` describes, with fresh weights."""
    if config.semantic_encoder["kind"] == "dasheng":
        return DashengEncoder(config)
    from dasheng_tokenizer.semantic_adapters import build_adapter

    return build_adapter(config.semantic_encoder)
