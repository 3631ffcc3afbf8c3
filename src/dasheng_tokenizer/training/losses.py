"""Losses of tokenizer training: spectral reconstruction, semantic preservation, hinge GAN with feature matching.

Spectral losses run in float32 whatever autocast says, and every term is a mean over items of equal weight, so that the
mean over the ranks of a run on several devices is the loss of the whole batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.audio_utils import mel_filter_bank

from dasheng_tokenizer.errors import AudioError, ConfigurationError
from dasheng_tokenizer.spectral import SAMPLING_RATE

MEL_WINDOWS = (32, 64, 128, 256, 512, 1024, 2048)
"""Window lengths in samples of the multi-scale mel loss (DAC, arXiv 2306.06546, §3.5)."""

MEL_BANDS = (5, 10, 20, 40, 80, 160, 320)
"""Mel bands of these windows, from the same paper."""

STFT_WINDOWS = (512, 1024, 2048)
"""Window lengths in samples of the multi-resolution STFT loss; all are mel windows too, so that spectra are shared."""

PHASE_WINDOW = 512
"""Window length in samples of the phase derivative loss: harmonics of a voice are apart, its pulses nearly so."""

SILENCE_AMPLITUDE = 1e-3
"""RMS at full scale 1 (-60 dBFS) of white noise below which a target counts as silence in the spectral convergence."""


class DiscriminatorOutput(NamedTuple):
    """What one discriminator says of a batch: logits of any shape (B, …), and the activations of its layers (B, …)."""

    logits: Tensor
    features: list[Tensor]


class _Magnitude(torch.autograd.Function):
    """|rfft(frames · window)| with the gradient written out.

    Autograd's own backward of `rfft` is a complex FFT of twice the size; the real inverse FFT used here halves the
    time of the whole loss on a CPU. At zero magnitude the gradient is zero.
    """

    @staticmethod
    def forward(ctx: Any, frames: Tensor, window: Tensor) -> Tensor:
        """(…, n_fft) frames and (n_fft,) window → (…, n_fft/2 + 1)."""
        spectrum = torch.fft.rfft(frames * window)
        squares = torch.view_as_real(spectrum).square()
        magnitude = (squares[..., 0] + squares[..., 1]).sqrt_()  # `abs` of complex numbers takes three times as long
        ctx.save_for_backward(spectrum, magnitude, window)
        return magnitude

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """Transposed rfft of gradient · spectrum / magnitude."""
        spectrum, magnitude, window = ctx.saved_tensors
        scale = gradient / magnitude.clamp(min=1e-12)
        scale[..., 1:-1] *= 0.5  # irfft counts every bin but the first and the last twice
        frames = torch.fft.irfft(spectrum * scale, n=window.numel(), norm="forward")
        return frames * window, None


def stft_magnitude(audio: Tensor, n_fft: int) -> Tensor:
    """STFT magnitude: periodic Hann window of n_fft samples, hop n_fft/4, centred, mirrored at the ends.

    Equals `torch.stft(…, center=True).abs()` with frames before bins; audio of n_fft/2 samples or less is first
    extended by zeros, as it is too short to mirror.

    Args:
        audio: (B, S) samples, S ≥ 1.
        n_fft: even window length in samples, a multiple of 4.

    Returns:
        (B, 1 + S // hop, n_fft/2 + 1) float32.
    """
    with torch.autocast(audio.device.type, enabled=False):
        audio = audio.float()
        half, hop = n_fft // 2, n_fft // 4
        if audio.shape[-1] <= half:
            audio = F.pad(audio, (0, half + 1 - audio.shape[-1]))
        padded = F.pad(audio[:, None], (half, half - audio.shape[-1] % hop), mode="reflect")[:, 0]
        blocks = padded.unflatten(-1, (-1, hop))  # (B, frames + 3, hop)
        num_frames = blocks.shape[1] - 3
        # Joining shifted blocks has a much cheaper gradient than `unfold`.
        frames = torch.cat([blocks[:, k : k + num_frames] for k in range(4)], dim=-1)  # (B, frames, n_fft)
        magnitude: Tensor = _Magnitude.apply(frames, torch.hann_window(n_fft, device=audio.device))  # type: ignore[no-untyped-call]
        return magnitude


class SpectraPair:
    """STFT magnitudes of a waveform and its target, each window length computed once and shared by all losses."""

    def __init__(self, audio: Tensor, target: Tensor) -> None:
        """Args: audio and target, (B, S) samples each.

        Raises:
            AudioError: shapes that differ, or are not (B, S).
        """
        _check_pair(audio, target)
        self._audio, self._target = audio, target.detach()
        self._cache: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, n_fft: int) -> tuple[Tensor, Tensor]:
        """Magnitudes of audio and target, each (B, frames, n_fft/2 + 1); the target's carry no gradient."""
        if n_fft not in self._cache:
            with torch.no_grad():
                target = stft_magnitude(self._target, n_fft)
            self._cache[n_fft] = stft_magnitude(self._audio, n_fft), target
        return self._cache[n_fft]


class MultiScaleMelLoss(nn.Module):
    """L1 distance of log10 mel magnitudes, mean over several window lengths (DAC, arXiv 2306.06546, §3.5).

    DAC sums over the scales; the mean keeps the size of the loss when scales are left out. Slaney mel scale and area
    normalisation as there (librosa's defaults).
    """

    def __init__(
        self, windows: Sequence[int] = MEL_WINDOWS, bands: Sequence[int] = MEL_BANDS, floor: float = 1e-5
    ) -> None:
        """Choose the scales.

        Args:
            windows: window lengths in samples, multiples of 4; hop is a quarter.
            bands: mel bands of each window; capped at half the window, beyond which bands would share a single bin.
            floor: smallest magnitude; anything below counts as silence.

        Raises:
            ConfigurationError: no windows, another number of bands than windows, or a window that is no multiple of 4.
        """
        super().__init__()
        if not windows or len(windows) != len(bands):
            raise ConfigurationError(f"one number of mel bands for each window: got windows {windows}, bands {bands}")
        _check_windows(windows)
        self.windows, self.floor = tuple(windows), floor
        for window, count in zip(windows, bands, strict=True):
            self.register_buffer(f"filters_{window}", mel_filters(window, min(count, window // 2)), persistent=False)

    def forward(self, audio: Tensor, target: Tensor) -> Tensor:
        """(B, S) audio and target → scalar."""
        return self.from_spectra(SpectraPair(audio, target))

    def from_spectra(self, spectra: SpectraPair) -> Tensor:
        """The loss from spectra shared with other losses → scalar."""
        return torch.stack([self._distance(window, *spectra(window)) for window in self.windows]).mean()

    def _distance(self, window: int, estimate: Tensor, target: Tensor) -> Tensor:
        filters = self.get_buffer(f"filters_{window}")  # (bins, bands)
        with torch.autocast(estimate.device.type, enabled=False):
            log_estimate = (estimate @ filters).clamp(min=self.floor).log10()  # (B, frames, bands)
            log_target = (target @ filters).clamp(min=self.floor).log10()
            return F.l1_loss(log_estimate, log_target)


class MultiResolutionSTFTLoss(nn.Module):
    """Spectral convergence plus L1 of log magnitudes, mean over several window lengths (arXiv 1910.11480, §2.2).

    The convergence is taken per item, not over the batch, so that a loud item does not hide a quiet one and the loss
    does not depend on how a batch is split over devices.
    """

    def __init__(self, windows: Sequence[int] = STFT_WINDOWS, floor: float = 1e-3) -> None:
        """Choose the resolutions.

        Args:
            windows: window lengths in samples, multiples of 4; hop is a quarter.
            floor: smallest magnitude; anything below counts as silence. Rounding noise of 16-bit audio lies near 2e-4
                a bin; with a floor below it, gradients (1/magnitude) have heavy tails that say nothing about sound.

        Raises:
            ConfigurationError: no windows, or a window that is no multiple of 4.
        """
        super().__init__()
        if not windows:
            raise ConfigurationError("the multi-resolution STFT loss needs at least one window")
        _check_windows(windows)
        self.windows, self.floor = tuple(windows), floor

    def forward(self, audio: Tensor, target: Tensor) -> Tensor:
        """(B, S) audio and target → scalar."""
        return self.from_spectra(SpectraPair(audio, target))

    def from_spectra(self, spectra: SpectraPair) -> Tensor:
        """The loss from spectra shared with other losses → scalar."""
        return torch.stack([self._distance(window, *spectra(window)) for window in self.windows]).mean()

    def _distance(self, window: int, estimate: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(estimate.device.type, enabled=False):
            # The norm of noise at the level of silence; without it a silent target divides by zero. 3/8 is the mean
            # squared Hann window.
            silence = SILENCE_AMPLITUDE * (0.375 * window * target[0].numel()) ** 0.5
            error = torch.linalg.vector_norm(estimate - target, dim=(1, 2))  # (B,)
            norm = torch.linalg.vector_norm(target, dim=(1, 2)).clamp(min=silence)  # (B,)
            log_distance = F.l1_loss(estimate.clamp(min=self.floor).log(), target.clamp(min=self.floor).log())
            return (error / norm).mean() + log_distance


class PhaseDerivativeLoss(nn.Module):
    """How far the phase's steps in time and in frequency are from the target's: 1 - cos of the difference, weighted.

    Phases themselves cannot be known from a magnitude spectrogram; their steps nearly can, since the derivatives of a
    spectrum's phase follow from those of its log magnitude (Průša, Balazs and Søndergaard 2017, doi
    10.1109/TASLP.2017.2678166). Losses on magnitudes teach phases only through overlapping frames. Anti-wrapping losses
    of instantaneous frequency and group delay are those of APNet (arXiv 2305.07952); a cosine needs no unwrapping.

    Weights are the square root of the target's magnitude: what is loud counts more, and not alone.
    """

    def __init__(self, window: int = PHASE_WINDOW) -> None:
        """Choose the resolution.

        Args:
            window: length in samples, a multiple of 4; hop is a quarter.

        Raises:
            ConfigurationError: a window that is no multiple of 4.
        """
        super().__init__()
        _check_windows([window])
        self.window = window

    def forward(self, audio: Tensor, target: Tensor) -> Tensor:
        """(B, S) audio and target → scalar, 0 to 2; 0.66 for unrelated noise, 0 for a silent target.

        Raises:
            AudioError: shapes that differ, or are not (B, S).
        """
        _check_pair(audio, target)
        with torch.autocast(audio.device.type, enabled=False):
            estimate = self._spectrum(audio.float())  # (B, frames, bins) complex
            with torch.no_grad():
                truth = self._spectrum(target.float())
            times = self._distance(estimate[:, 1:] * estimate[:, :-1].conj(), truth[:, 1:] * truth[:, :-1].conj())
            bins = self._distance(
                estimate[:, :, 1:] * estimate[:, :, :-1].conj(), truth[:, :, 1:] * truth[:, :, :-1].conj()
            )
            return (times + bins) / 2

    def _spectrum(self, audio: Tensor) -> Tensor:
        hop = self.window // 4
        padded = F.pad(audio, (self.window, self.window))  # zeros: at least two frames, whatever the length
        frames = padded.unfold(-1, self.window, hop)  # (B, frames, window)
        return torch.fft.rfft(frames * torch.hann_window(self.window, device=audio.device))

    def _distance(self, estimate: Tensor, truth: Tensor) -> Tensor:
        """Of products of neighbours, whose angles are the steps: complex (B, …) each → scalar."""
        size = truth.abs()
        silence = 0.375 * self.window * SILENCE_AMPLITUDE**2  # power of a bin
        weight = torch.where(size > silence, size.sqrt().sqrt(), 0.0)  # of the magnitude: products are of its square
        weight = weight / weight.mean((1, 2), keepdim=True).clamp(min=silence**0.25)
        # Where the estimate is far too quiet its angle says little and would get a gradient beyond all others.
        least = (0.1 * size).clamp(min=silence)
        length = (estimate.real.square() + estimate.imag.square()).clamp(min=least.square()).sqrt()
        cosine = (estimate.real * truth.real + estimate.imag * truth.imag) / (length * size.clamp(min=silence))
        return (weight * (1 - cosine)).mean()


def mel_filters(n_fft: int, bands: int) -> Tensor:
    """Slaney mel filters, 0 to 8000 Hz, (n_fft/2 + 1, bands) float32, none of them empty.

    Where a filter is narrower than the distance of two bins and falls between them, it takes the bin nearest its
    centre.
    """
    bins, nyquist = n_fft // 2 + 1, SAMPLING_RATE / 2
    scale = ("slaney", "slaney")  # area normalisation, mel scale
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about empty filters, which are mended below
        filters = torch.from_numpy(mel_filter_bank(bins, bands, 0.0, nyquist, SAMPLING_RATE, *scale)).float()
    empty = torch.nonzero(filters.amax(0) == 0).flatten().tolist()
    if empty:
        # A grid of 64 times as many bins shows the centres of all triangles.
        many = 64 * (bins - 1) + 1
        fine = torch.from_numpy(mel_filter_bank(many, bands, 0.0, nyquist, SAMPLING_RATE, *scale)).float()
        for band in empty:
            filters[round(int(fine[:, band].argmax()) / 64), band] = fine[:, band].max()
    return filters


def semantic_preservation_loss(acoustic: Tensor, semantic: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared distance of the acoustic to the frozen semantic embedding: what is injected stays close to it.

    Args:
        acoustic: (B, T, D) embeddings with gradients.
        semantic: (B, T, D) frozen embeddings; no gradient reaches them.
        mask: (B, T) bool, True for tokens that count; None counts all.

    Returns:
        Scalar, float32; 0 if no token counts.
    """
    distance = (acoustic.float() - semantic.detach().float()).square().mean(-1)  # (B, T)
    if mask is None:
        return distance.mean()
    return distance.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def discriminator_loss(real: Sequence[DiscriminatorOutput], fake: Sequence[DiscriminatorOutput]) -> Tensor:
    """Hinge loss of the discriminators: real logits above 1, fake ones below -1; mean over the discriminators.

    Args:
        real: outputs for the target audio.
        fake: outputs for the decoded audio, detached from the decoder.
    """
    terms = [
        F.relu(1 - r.logits.float()).mean() + F.relu(1 + f.logits.float()).mean()
        for r, f in zip(real, fake, strict=True)
    ]
    return torch.stack(terms).mean()


def generator_adversarial_loss(fake: Sequence[DiscriminatorOutput]) -> Tensor:
    """Hinge loss of the decoder: fake logits above 1, as in Vocos (arXiv 2306.00814); mean over the discriminators."""
    return torch.stack([F.relu(1 - f.logits.float()).mean() for f in fake]).mean()


def feature_matching_loss(real: Sequence[DiscriminatorOutput], fake: Sequence[DiscriminatorOutput]) -> Tensor:
    """L1 distance of the discriminators' activations for real and decoded audio, mean over layers and discriminators.

    No gradient reaches the real side.
    """
    terms = [
        F.l1_loss(fake_feature.float(), real_feature.detach().float())
        for r, f in zip(real, fake, strict=True)
        for real_feature, fake_feature in zip(r.features, f.features, strict=True)
    ]
    return torch.stack(terms).mean()


def _check_pair(audio: Tensor, target: Tensor) -> None:
    if audio.ndim != 2 or audio.shape != target.shape or audio.shape[-1] == 0:
        raise AudioError(f"spectral losses compare two (B, S), not {tuple(audio.shape)} with {tuple(target.shape)}")


def _check_windows(windows: Iterable[int]) -> None:
    wrong = [window for window in windows if window < 8 or window % 4]
    if wrong:
        raise ConfigurationError(f"spectral windows must be multiples of 4 of at least 8 samples, not {wrong}")
