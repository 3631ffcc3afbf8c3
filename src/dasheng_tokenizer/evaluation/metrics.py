"""Objective figures of reconstruction, as functions of two numpy arrays.

All take a reference and an estimate of equal length, shape (samples,), one channel, full scale 1. A figure that is not
defined for a clip (silence, too short) raises AudioError with the reason; nothing is put in its place.
"""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt

from dasheng_tokenizer.errors import AudioError
from dasheng_tokenizer.files import require_extra

Samples = npt.NDArray[np.floating]

MEL_WINDOWS = (32, 64, 128, 256, 512, 1024, 2048)
MEL_BANDS = (5, 10, 20, 40, 80, 160, 320)
"""Windows in samples and mel bands of the 7-scale mel distance (DAC, arXiv 2306.06546, §3.5)."""

MEL_FLOOR = 1e-5

LSD_WINDOW, LSD_HOP = 1024, 256
LSD_FLOOR = 1e-10
"""Analysis of the log-spectral distance in samples, and its power floor: -100 dB of a full-scale sine."""


def checked_pair(reference: Samples, estimate: Samples) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Check the two clips and bring them to float64.

    Raises:
        AudioError: another rank than one, no samples, unequal lengths, NaN or infinity.
    """
    if reference.ndim != 1 or reference.shape != estimate.shape or not reference.size:
        raise AudioError(
            f"metrics compare two clips of one shape (samples,), got {reference.shape} and {estimate.shape}; "
            "take one channel each and cut to the shorter"
        )
    if not (np.isfinite(reference).all() and np.isfinite(estimate).all()):
        raise AudioError("metrics need finite samples, got NaN or infinity")
    return reference.astype(np.float64), estimate.astype(np.float64)


def magnitude_spectrogram(audio: Samples, window: int, hop: int) -> npt.NDArray[np.float64]:
    """Magnitudes of the short-time Fourier transform: periodic Hann window, centred, mirrored at both ends.

    Args:
        audio: (samples,).
        window: Window and transform length in samples.
        hop: Samples between frames.

    Returns:
        (samples // hop + 1, window // 2 + 1).
    """
    padded = np.pad(audio, window // 2, mode="reflect" if audio.size > 1 else "edge")
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop]
    return np.abs(np.fft.rfft(frames * hann, axis=1))


def mel_distance(reference: Samples, estimate: Samples, sampling_rate: int = 16_000) -> float:
    """7-scale mel distance: 0 for equal clips, smaller is better.

    The mean over windows of 32, 64, …, 2048 samples (hop a quarter, 5, 10, …, 320 bands up to half the sampling rate)
    of the mean absolute difference of log10(max(mel magnitude, 1e-5)); mel filters on the Slaney scale with equal
    areas, as in DAC, and as the training loss has them. Figures at another rate than 16 kHz do not compare.

    Raises:
        AudioError: clips that cannot be compared.
    """
    from transformers.audio_utils import mel_filter_bank

    first, second = checked_pair(reference, estimate)
    distances = []
    for window, bands in zip(MEL_WINDOWS, MEL_BANDS, strict=True):
        filters = mel_filter_bank(
            window // 2 + 1, bands, 0.0, sampling_rate / 2, sampling_rate, norm="slaney", mel_scale="slaney"
        )  # (window // 2 + 1, bands)
        levels = [
            np.log10(np.maximum(magnitude_spectrogram(audio, window, window // 4) @ filters, MEL_FLOOR))
            for audio in (first, second)
        ]
        distances.append(float(np.mean(np.abs(levels[0] - levels[1]))))
    return float(np.mean(distances))


def si_sdr(reference: Samples, estimate: Samples) -> float:
    """Scale-invariant signal-to-distortion ratio in dB (Le Roux et al. 2019), means removed; greater is better.

    Raises:
        AudioError: clips that cannot be compared, or one of them constant, for which it is not defined.
    """
    first, second = checked_pair(reference, estimate)
    first, second = first - first.mean(), second - second.mean()
    energy = float(first @ first)
    if energy < 1e-12 or float(second @ second) < 1e-12:
        raise AudioError("SI-SDR is not defined for silence")
    target = (float(first @ second) / energy) * first
    distortion = second - target
    floor = 1e-12 * float(target @ target)  # 120 dB, beyond what float32 audio resolves
    if floor == 0.0:
        raise AudioError("SI-SDR is not defined for clips without any correlation")
    return float(10 * np.log10(float(target @ target) / max(float(distortion @ distortion), floor)))


def log_spectral_distance(reference: Samples, estimate: Samples) -> float:
    """Log-spectral distance in dB: 0 for equal clips, smaller is better.

    The mean over frames of the root mean square over frequency bins of 10·log10(P₁/P₂), where P is the power of a
    1024-sample Hann window every 256 samples, relative to a full-scale sine and not below 1e-10 (-100 dB). Other papers
    take other windows and floors; figures compare only with figures of this definition.

    Raises:
        AudioError: clips that cannot be compared.
    """
    levels = []
    for audio in checked_pair(reference, estimate):
        power = (magnitude_spectrogram(audio, LSD_WINDOW, LSD_HOP) / (LSD_WINDOW / 4)) ** 2  # (frames, bins)
        levels.append(10 * np.log10(np.maximum(power, LSD_FLOOR)))
    first, second = levels
    return float(np.mean(np.sqrt(np.mean((first - second) ** 2, axis=1))))


def pesq_wb(reference: Samples, estimate: Samples, sampling_rate: int = 16_000) -> float:
    """Wide-band PESQ (ITU-T P.862.2), 1.0 to 4.64; for speech; greater is better.

    Raises:
        AudioError: not 16 kHz, shorter than a quarter of a second, or without speech that PESQ detects.
        MissingExtraError: the package pesq is not installed.
    """
    if sampling_rate != 16_000:
        raise AudioError(f"wide-band PESQ is defined at 16000 Hz, not {sampling_rate}; resample first")
    return _pesq(reference, estimate, sampling_rate, "wb")


def pesq_nb(reference: Samples, estimate: Samples, sampling_rate: int = 16_000) -> float:
    """Narrow-band PESQ (ITU-T P.862, mapped by P.862.1), 1.0 to 4.55; for speech; greater is better.

    Raises:
        AudioError: neither 8 nor 16 kHz, shorter than a quarter of a second, or without speech that PESQ detects.
        MissingExtraError: the package pesq is not installed.
    """
    if sampling_rate not in (8_000, 16_000):
        raise AudioError(f"narrow-band PESQ is defined at 8000 and 16000 Hz, not {sampling_rate}; resample first")
    return _pesq(reference, estimate, sampling_rate, "nb")


def _pesq(reference: Samples, estimate: Samples, sampling_rate: int, band: str) -> float:
    first, second = checked_pair(reference, estimate)
    package = require_extra("pesq", "metrics")
    if first.size < sampling_rate // 4:
        raise AudioError("PESQ needs at least a quarter of a second")
    if not first.any() or not second.any():
        raise AudioError("PESQ is not defined for silence")
    try:
        value = float(package.pesq(sampling_rate, first.astype(np.float32), second.astype(np.float32), band))
    except package.PesqError as error:
        reason = error.args[0] if error.args else type(error).__name__
        reason = reason.decode() if isinstance(reason, bytes) else reason
        raise AudioError(f"PESQ gives no figure: {reason}") from error
    if not np.isfinite(value):
        raise AudioError("PESQ gives no figure: not a number")
    return value


def stoi(reference: Samples, estimate: Samples, sampling_rate: int = 16_000) -> float:
    """Short-time objective intelligibility (Taal et al. 2011), 0 to 1; for speech; greater is better.

    Raises:
        AudioError: fewer than 30 frames (about 0.4 s) of speech, where it is not defined.
        MissingExtraError: the package pystoi is not installed.
    """
    return _stoi(reference, estimate, sampling_rate, False)


def estoi(reference: Samples, estimate: Samples, sampling_rate: int = 16_000) -> float:
    """Extended STOI (Jensen & Taal 2016), for fluctuating distortions too; 0 to 1; for speech; greater is better.

    Raises:
        AudioError, MissingExtraError: as `stoi`.
    """
    return _stoi(reference, estimate, sampling_rate, True)


def _stoi(reference: Samples, estimate: Samples, sampling_rate: int, extended: bool) -> float:
    first, second = checked_pair(reference, estimate)
    package = require_extra("pystoi", "metrics")
    name = "ESTOI" if extended else "STOI"
    if not first.any() or not second.any():
        raise AudioError(f"{name} is not defined for silence")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # pystoi returns 1e-5 with a warning where it has no figure
        try:
            value = float(package.stoi(first, second, sampling_rate, extended=extended))
        except (RuntimeWarning, ValueError, IndexError) as error:
            raise AudioError(f"{name} gives no figure: less than 0.4 s of sound") from error
    if not np.isfinite(value):
        raise AudioError(f"{name} gives no figure: not a number")
    return value
