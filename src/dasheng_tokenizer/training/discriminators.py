"""Discriminators: networks that tell decoded from real audio, the adversary of the decoder.

Both return one `DiscriminatorOutput` (logits, activations) for each of their parts. Nothing in them mixes items of a
batch, so an item is judged the same alone and in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from dasheng_tokenizer.errors import ConfigurationError
from dasheng_tokenizer.training.losses import DiscriminatorOutput, stft_magnitude

LEAKY_SLOPE = 0.1
"""Slope of the leaky ReLU below zero (HiFi-GAN, arXiv 2010.05646; Vocos)."""


class MultiFrequencyDiscriminator(nn.Module):
    """Judges spectra at several resolutions: log-magnitude and magnitude at hops 128, 256 and 512, n_fft = 4·hop."""

    def __init__(self, hops: Sequence[int] = (128, 256, 512), channels: int = 32) -> None:
        """Choose the resolutions and the width.

        Args:
            hops: STFT hops in samples; the window is four times as long.
            channels: width of the convolutions; the cost grows with its square.

        Raises:
            ConfigurationError: no hops, or a hop or width below 1.
        """
        super().__init__()
        if not hops or min(hops) < 2 or channels < 1:
            raise ConfigurationError(f"the discriminator needs hops of 2 or more and channels: {hops}, {channels}")
        self.parts = nn.ModuleList(SpectrogramDiscriminator(4 * hop, channels) for hop in hops)

    def forward(self, audio: Tensor) -> list[DiscriminatorOutput]:
        """(B, S) samples → one output for each hop."""
        return [part(audio) for part in self.parts]


class SpectrogramDiscriminator(nn.Module):
    """2-D convolutions over one spectrogram, strided first in frequency and then in both directions."""

    def __init__(self, n_fft: int, channels: int) -> None:
        super().__init__()
        self.n_fft = n_fft
        # Strided early: the layer before a stride sees the most positions and would be by far the dearest.
        self.layers = nn.ModuleList(
            [
                _conv2d(2, channels, kernel=(3, 9), stride=(1, 4)),
                _conv2d(channels, channels, kernel=(3, 5), stride=(2, 2)),
                _conv2d(channels, channels, kernel=(3, 5), stride=(2, 2)),
                _conv2d(channels, channels, kernel=(3, 3), stride=(1, 1)),
            ]
        )
        self.head = _conv2d(channels, 1, kernel=(3, 3), stride=(1, 1))

    def forward(self, audio: Tensor) -> DiscriminatorOutput:
        """(B, S) samples → logits (B, 1, ~frames/4, ~bins/16) and the activations of the four layers."""
        # Divided by the norm of the Hann window, noise has the magnitude of its RMS at every resolution.
        magnitude = stft_magnitude(audio, self.n_fft) / (0.375 * self.n_fft) ** 0.5  # (B, frames, bins)
        # Channels last in memory, and with it all activations: several times faster on a CPU.
        spectra = torch.stack([magnitude.clamp(min=1e-5).log(), magnitude], dim=-1)  # (B, frames, bins, 2)
        hidden = spectra.permute(0, 3, 1, 2)  # (B, 2, frames, bins)
        features = []
        for layer in self.layers:
            hidden = F.leaky_relu(layer(hidden), LEAKY_SLOPE)
            features.append(hidden)
        return DiscriminatorOutput(self.head(hidden), features)


class MultiPeriodDiscriminator(nn.Module):
    """Judges the waveform folded at several periods: every p-th sample in a row (HiFi-GAN, arXiv 2010.05646)."""

    def __init__(self, periods: Sequence[int] = (2, 3, 5, 7, 11), channels: Sequence[int] = (32, 64, 128, 256)) -> None:
        """Choose the periods and the widths.

        Args:
            periods: in samples; primes see different structure each.
            channels: width of each strided layer (HiFi-GAN: 32, 128, 512, 1024); a last unstrided one repeats the
                widest.

        Raises:
            ConfigurationError: no periods or channels, or values below 1.
        """
        super().__init__()
        if not periods or not channels or min(periods) < 1 or min(channels) < 1:
            raise ConfigurationError(f"periods and channels must be 1 or more: {periods}, {channels}")
        self.parts = nn.ModuleList(PeriodDiscriminator(period, channels) for period in periods)

    def forward(self, audio: Tensor) -> list[DiscriminatorOutput]:
        """(B, S) samples → one output for each period."""
        return [part(audio) for part in self.parts]


class PeriodDiscriminator(nn.Module):
    """Convolutions along time over a waveform folded at one period."""

    def __init__(self, period: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.period = period
        widths = [1, *channels]
        self.layers = nn.ModuleList(
            _conv2d(before, after, kernel=(5, 1), stride=(3, 1))
            for before, after in zip(widths[:-1], widths[1:], strict=True)
        )
        self.layers.append(_conv2d(widths[-1], widths[-1], kernel=(5, 1), stride=(1, 1)))
        self.head = _conv2d(widths[-1], 1, kernel=(3, 1), stride=(1, 1))

    def forward(self, audio: Tensor) -> DiscriminatorOutput:
        """(B, S) samples → logits (B, 1, ~S/(period·3^layers), period) and the activations of the layers."""
        padded = F.pad(audio, (0, -audio.shape[-1] % self.period))
        hidden = padded.unflatten(-1, (-1, self.period)).unsqueeze(1)  # (B, 1, S/period, period)
        features = []
        for layer in self.layers:
            hidden = F.leaky_relu(layer(hidden), LEAKY_SLOPE)
            features.append(hidden)
        return DiscriminatorOutput(self.head(hidden), features)


def _conv2d(inputs: int, outputs: int, kernel: tuple[int, int], stride: tuple[int, int]) -> nn.Module:
    padding = (kernel[0] // 2, kernel[1] // 2)
    return weight_norm(nn.Conv2d(inputs, outputs, kernel, stride, padding))
