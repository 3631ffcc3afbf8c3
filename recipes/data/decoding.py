"""Any audio file of a package to mono samples at 16 kHz."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from dasheng_tokenizer.errors import AudioFileError
from dasheng_tokenizer.files import require_extra

SAMPLING_RATE = 16_000
PEAK = 0.999
Samples = npt.NDArray[np.float32]


def decode(path: Path) -> Samples:
    """Decode, average to mono, resample with soxr (VHQ).

    libsndfile reads most; FFmpeg (PyAV) reads what it cannot (WavPack, G.722, damaged headers).

    Returns:
        (samples,), full scale 1.

    Raises:
        AudioFileError: not audio, or damaged.
    """
    try:
        # libsndfile takes a headerless file of that name for raw samples of another kind.
        audio, rate = _ffmpeg(path) if path.suffix == ".g722" else _libsndfile(path)
    except soundfile.LibsndfileError:
        audio, rate = _ffmpeg(path)
    mono = audio.mean(axis=0, dtype=np.float32)
    if not len(mono) or not np.isfinite(mono).all():
        raise AudioFileError(f"{path} holds no samples, or samples that are no numbers")
    return soxr.resample(mono, rate, SAMPLING_RATE, quality="VHQ") if rate != SAMPLING_RATE else mono


def _libsndfile(path: Path) -> tuple[Samples, int]:
    audio, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return audio.T, rate


def _ffmpeg(path: Path) -> tuple[Samples, int]:
    av = require_extra("av", "data")
    try:
        with av.open(str(path), format="g722" if path.suffix == ".g722" else None) as container:
            stream = container.streams.audio[0]
            resampler = av.AudioResampler(format="fltp")
            blocks = [block.to_ndarray() for frame in container.decode(stream) for block in resampler.resample(frame)]
            blocks += [block.to_ndarray() for block in resampler.resample(None)]
            return np.concatenate(blocks, axis=1), stream.codec_context.sample_rate
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise AudioFileError(f"{path} cannot be decoded: {error}") from error


def within_full_scale(audio: Samples) -> Samples:
    """A clip that lossy codecs or resampling brought above full scale, made just so much softer; others as they are."""
    return audio * np.float32(min(1.0, PEAK / max(float(np.abs(audio).max(initial=0.0)), 1e-9)))


def trim_silence(audio: Samples, threshold: float = 10 ** (-60 / 20), margin: float = 0.02) -> tuple[int, int]:
    """First and last sample (exclusive) that are louder than `threshold`, with `margin` seconds around them."""
    loud = np.flatnonzero(np.abs(audio) > threshold)
    if not len(loud):
        return 0, 0
    around = round(margin * SAMPLING_RATE)
    return max(0, int(loud[0]) - around), min(len(audio), int(loud[-1]) + 1 + around)
