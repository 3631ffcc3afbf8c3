"""Spectral front ends and the inverse STFT, always in float32.

Log-spectra span 120 dB and phases wrap at 2π; both are beyond half precision. Every module here keeps its tensors in
float32 when the model is cast (`model.half()`, `from_pretrained(dtype=…)`) and switches autocast off.

Context audio. Front ends never pad. They take audio with `CONTEXT` samples on each side of the frames asked for, so
that a block cut from a long file gives the very frames of the whole file. `with_context` makes it for a whole clip.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.audio_utils import mel_filter_bank

CONTEXT = 512
"""Samples of context on each side of a block: half the longest analysis window (1024)."""

SAMPLES_PER_TOKEN = 640
"""Samples a token stands for: 4 frames of 160 samples, 40 ms at 16 kHz (arXiv 2602.23765)."""

SAMPLING_RATE = 16_000
"""Hz; the only rate the networks know."""


class Float32Module(nn.Module):
    """A module whose floating-point tensors stay float32 whatever the rest of the model is cast to."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Module:
        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if tensor.is_floating_point() and moved.dtype != tensor.dtype else moved

        super()._apply(keep_float32, recurse)  # type: ignore[no-untyped-call]
        return self


class Float32LayerNorm(Float32Module, nn.LayerNorm):
    """LayerNorm in float32 of any type, at float32 out.

    In a model of half precision the sum of all residual branches stays in float32 too, and only the matrix products are
    rounded: half the error at full size, where a sum of 64 branches in bfloat16 would round 64 times.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(…, dim) → (…, dim) float32."""
        return super().forward(x.float())


class Float32Conv2d(Float32Module, nn.Conv2d):
    """Weights of the linear layers on spectra, which are used as matrices (`semantic_encoder.linear_patches`)."""


class Float32BatchNorm1d(Float32Module, nn.BatchNorm1d):
    """BatchNorm over mel bands in float32: dB values near -20 with variances near 300 do not survive half precision."""


class _Window(Float32Module):
    """Holds the analysis window under the published key `….spectrogram.window`."""

    window: Tensor

    def __init__(self, n_fft: int) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(n_fft, dtype=torch.float32))


class _FilterBank(Float32Module):
    """Holds the mel filters (frequency bins, bands) under the published key `….mel_scale.fb`."""

    fb: Tensor

    def __init__(self, n_fft: int, n_mels: int, mel_scale: str, norm: str | None) -> None:
        super().__init__()
        bank = mel_filter_bank(n_fft // 2 + 1, n_mels, 0.0, SAMPLING_RATE / 2, SAMPLING_RATE, norm, mel_scale)
        self.register_buffer("fb", torch.tensor(bank, dtype=torch.float32))


class MelSpectrogram(nn.Module):
    """Mel spectrogram of context audio: STFT with a periodic Hann window, |·|^power, then mel bands.

    The defaults of `mel_scale` and `norm` are those of the published front ends (HTK, no area normalisation).
    """

    def __init__(
        self,
        n_fft: int,
        n_mels: int,
        power: float,
        hop_length: int = 160,
        mel_scale: str = "htk",
        norm: str | None = None,
    ) -> None:
        super().__init__()
        if n_fft > 2 * CONTEXT:
            raise ValueError(f"n_fft {n_fft} needs more context than the {CONTEXT} samples that blocks carry")
        self.n_fft, self.n_mels, self.hop_length, self.power = n_fft, n_mels, hop_length, power
        self.spectrogram = _Window(n_fft)
        self.mel_scale = _FilterBank(n_fft, n_mels, mel_scale, norm)

    def forward(self, context_audio: Tensor, num_frames: int) -> Tensor:
        """Mel bands of frames centred at samples CONTEXT, CONTEXT + hop, …

        Args:
            context_audio: (B, ≥ CONTEXT + (num_frames - 1)·hop + n_fft/2) samples, full scale 1.
            num_frames: how many frames to return.

        Returns:
            (B, n_mels, num_frames) float32, magnitude (power 1) or power (power 2).
        """
        first = CONTEXT - self.n_fft // 2
        last = first + (num_frames - 1) * self.hop_length + self.n_fft
        with torch.autocast(context_audio.device.type, enabled=False):
            audio = context_audio[:, first:last].float()  # (B, samples)
            window = self.spectrogram.window
            stft = torch.stft(audio, self.n_fft, self.hop_length, window=window, center=False, return_complex=True)
            magnitude = stft.abs()  # (B, n_fft/2 + 1, frames)
            spectrum = magnitude if self.power == 1.0 else magnitude.pow(self.power)
            return self.mel_scale.fb.T @ spectrum  # (B, n_mels, frames)


def with_context(audio: Tensor, num_tokens: int) -> Tensor:
    """Whole clips with the context that front ends need: mirrored before the first sample, zeros after the last.

    The mirror repeats the published centred STFT on the left. On the right the signal goes on as silence, so that a
    clip gives the same frames alone and padded in a batch. A clip too short to mirror is first extended by zeros.

    Args:
        audio: (B, S) samples; S may be shorter or longer than 640·num_tokens.
        num_tokens: tokens wanted.

    Returns:
        (B, CONTEXT + 640·num_tokens + CONTEXT) samples.
    """
    samples = num_tokens * SAMPLES_PER_TOKEN + CONTEXT
    audio = F.pad(audio, (0, max(0, samples - audio.shape[-1])))[..., :samples]
    mirrored = audio[..., 1 : CONTEXT + 1].flip(-1)
    return torch.cat([mirrored, audio], dim=-1)


def with_reflected_context(audio: Tensor, num_tokens: int) -> Tensor:
    """The published form: mirrored at both ends. (B, S ≥ 513) → (B, CONTEXT + max(S, 640·num_tokens) + CONTEXT)."""
    reflected = F.pad(audio.unsqueeze(1), (CONTEXT, CONTEXT), mode="reflect").squeeze(1)
    missing = num_tokens * SAMPLES_PER_TOKEN - audio.shape[-1]  # never read by a frame, only fills the shape
    return F.pad(reflected, (0, max(0, missing)))


class InverseSTFT(Float32Module):
    """Inverse STFT as one real matrix product and an overlap-add.

    A real inverse FFT of N points is linear in the real and imaginary parts of its N/2 + 1 bins, so it is a product
    with a cosine and a sine basis. This needs no complex type and no FFT of an odd size, so it exports to ONNX with
    dynamic length and runs on every device. It equals the complex form to float32 rounding. On a CPU, where the product
    would be a sixth of a small decoder's arithmetic, the FFT does the same (`use_fft`).

    "Same" padding as in Vocos: (n_fft - hop)/2 samples are trimmed at each end, so T frames give T·hop samples.
    """

    window: Tensor
    basis: Tensor

    def __init__(self, n_fft: int, hop_length: int) -> None:
        super().__init__()
        if n_fft % hop_length or (n_fft - hop_length) % 2:
            raise ValueError(f"n_fft {n_fft} must be a multiple of the hop {hop_length}, with an even difference")
        self.n_fft, self.hop_length = n_fft, hop_length
        self.register_buffer("window", torch.hann_window(n_fft, dtype=torch.float32))
        self.register_buffer("basis", torch.empty(n_fft + 2, n_fft, dtype=torch.float32), persistent=False)
        self.reset_basis()
        self.use_fft: bool | None = None
        """True: FFT, False: matrix product, None: FFT on a CPU outside of export, else the product."""

    def reset_basis(self) -> None:
        """Fills the basis; called again by the model after it was created on the meta device."""
        if self.basis.is_meta:
            return
        bins = torch.arange(self.n_fft // 2 + 1, dtype=torch.float64)
        # k·n modulo N keeps the angles exact for any N.
        turns = torch.outer(bins, torch.arange(self.n_fft, dtype=torch.float64)) % self.n_fft / self.n_fft
        weight = torch.full_like(bins, 2.0 / self.n_fft)
        weight[0] = weight[-1] = 1.0 / self.n_fft  # 0 Hz and Nyquist have no mirror image
        cosine = weight[:, None] * torch.cos(2 * math.pi * turns)
        sine = -weight[:, None] * torch.sin(2 * math.pi * turns)
        with torch.no_grad():
            self.basis.copy_(torch.cat([cosine, sine]))

    def overlap_add(self, frames: Tensor) -> Tensor:
        """(B, T, n_fft) frames at distance hop → (B, T·hop + n_fft - hop) samples."""
        parts = self.n_fft // self.hop_length
        pieces = frames.unflatten(-1, (parts, self.hop_length))  # (B, T, parts, hop)
        shifted = [F.pad(pieces[:, :, k], (0, 0, k, parts - 1 - k)) for k in range(parts)]
        return torch.stack(shifted).sum(0).flatten(1)

    def forward(self, real: Tensor, imaginary: Tensor) -> Tensor:
        """Real and imaginary parts, each (B, T, n_fft/2 + 1) → (B, T·hop) float32 samples."""
        trim = (self.n_fft - self.hop_length) // 2
        with torch.autocast(real.device.type, enabled=False):
            audio = self.overlap_add(self._frames(real.float(), imaginary.float()) * self.window)
            squared = self.window.square().expand(1, real.shape[1], self.n_fft)
            envelope = self.overlap_add(squared)
            return audio[:, trim:-trim] / envelope[:, trim:-trim]  # (B, T·hop)

    def _frames(self, real: Tensor, imaginary: Tensor) -> Tensor:
        """Inverse real DFT of every frame: (B, T, n_fft/2 + 1) twice → (B, T, n_fft)."""
        use_fft = self.use_fft
        if use_fft is None:
            use_fft = (
                real.device.type == "cpu" and not torch.compiler.is_exporting() and not torch.onnx.is_in_onnx_export()
            )
        if use_fft:
            return torch.fft.irfft(torch.complex(real, imaginary), n=self.n_fft)
        return torch.cat([real, imaginary], dim=-1) @ self.basis
