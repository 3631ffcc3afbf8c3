"""Vocos decoder: ConvNeXt blocks at 50 Hz predict magnitude and phase; an inverse STFT gives the waveform.

Numerics and key names are those of the published layout; sizes come from the configuration.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dasheng_tokenizer.configuration import DashengTokenizerConfig
from dasheng_tokenizer.spectral import Float32LayerNorm, Float32Module, InverseSTFT

MAX_MAGNITUDE = 100.0
"""Magnitudes above this are clipped, as in Vocos: a guard against exp() running away early in training."""


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution over time, then a two-layer perceptron per frame, scaled per channel, with a residual."""

    def __init__(self, width: int, intermediate_size: int, gamma: float) -> None:
        super().__init__()
        self.dwconv = nn.Conv1d(width, width, kernel_size=7, padding=3, groups=width)
        self.norm = Float32LayerNorm(width, eps=1e-6)
        self.pwconv1 = nn.Linear(width, intermediate_size)
        self.pwconv2 = nn.Linear(intermediate_size, width)
        self.gamma = nn.Parameter(torch.full((width,), gamma))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) → (B, T, width) float32, at float32 in."""
        dtype = self.pwconv1.weight.dtype
        h = self.dwconv(x.to(dtype).transpose(1, 2)).transpose(1, 2)  # (B, T, width)
        h = self.pwconv2(F.gelu(self.pwconv1(self.norm(h).to(dtype))))  # (B, T, width)
        return x + self.gamma * h


class VocosBackbone(nn.Module):
    """Width change by a convolution over 7 frames, then the ConvNeXt blocks."""

    def __init__(self, config: DashengTokenizerConfig) -> None:
        super().__init__()
        width, depth = config.decoder_embed_dim, config.decoder_depth
        self.embed = nn.Conv1d(config.embed_dim, width, kernel_size=7, padding=3)
        self.norm = Float32LayerNorm(width, eps=1e-6)
        # 1/depth keeps the sum of all residual branches at the scale of one, as in Vocos.
        self.convnext = nn.ModuleList(
            ConvNeXtBlock(width, config.decoder_intermediate_size, gamma=1.0 / depth) for _ in range(depth)
        )
        self.final_layer_norm = Float32LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, width) float32."""
        h = self.norm(self.embed(x.transpose(1, 2)).transpose(1, 2))  # (B, T, width)
        for block in self.convnext:
            h = block(h)  # (B, T, width)
        return self.final_layer_norm(h)  # (B, T, width)


class ISTFTHead(Float32Module):
    """Log-magnitude and phase of every bin from one linear layer, in float32, then the inverse STFT."""

    def __init__(self, width: int, n_fft: int, hop_length: int, block_dc: bool = False) -> None:
        super().__init__()
        self.block_dc = block_dc
        self.out = nn.Linear(width, n_fft + 2)
        self.istft = InverseSTFT(n_fft, hop_length)

    def forward(self, h: Tensor) -> Tensor:
        """(B, T, width) → (B, T·hop) float32 samples."""
        with torch.autocast(h.device.type, enabled=False):
            return self.istft(*self.spectrum(h.float()))  # (B, T·hop)

    def spectrum(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, width) float32 → real and imaginary parts, each (B, T, n_fft/2 + 1)."""
        log_magnitude, phase = self.out(h).chunk(2, dim=-1)  # (B, T, n_fft/2 + 1) each
        # min(exp(x), 100), clipped before exp() so that an overflow cannot turn the gradient into 0 · inf.
        magnitude = log_magnitude.clamp(max=math.log(MAX_MAGNITUDE)).exp()
        real, imaginary = magnitude * phase.cos(), magnitude * phase.sin()
        if self.block_dc:
            # A Hann window is 1/2 at bin 0 and -1/4 at its neighbours: the windowed frame sums to (X[0] - Re X[1])/2.
            real = torch.cat([real[..., 1:2], real[..., 1:]], dim=-1)
        return real, imaginary


class VocosDecoder(nn.Module):
    """(B, T, D) upsampled latents at 50 Hz → (B, 320·T) samples at 16 kHz."""

    def __init__(self, config: DashengTokenizerConfig) -> None:
        super().__init__()
        self.backbone = VocosBackbone(config)
        self.head = ISTFTHead(config.decoder_embed_dim, config.istft_n_fft, config.istft_hop, config.istft_block_dc)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, 320·T) float32 samples."""
        return self.head(self.backbone(x))  # (B, 320·T)

    @property
    def context_frames(self) -> int:
        """Frames on each side that an output sample can depend on: 3 per convolution, and 2 of overlap-add."""
        istft = self.head.istft
        overlap = istft.n_fft // istft.hop_length // 2
        return 3 + 3 * len(self.backbone.convnext) + overlap
