"""Damage to recordings: narrow bands, clipping, and lossy codecs. All keep the length and the place of every sample.

Arrays are (S,) float32 at 16 kHz and full scale 1.
"""

from __future__ import annotations

import io
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from dasheng_tokenizer.errors import ConfigurationError
from dasheng_tokenizer.spectral import SAMPLING_RATE

Samples = npt.NDArray[np.float32]
Codec = Literal["opus", "vorbis", "mp3", "gsm", "ulaw"]

CODECS: tuple[Codec, ...] = get_args(Codec)

TELEPHONE = (300.0, 3400.0)
"""Hz, the classic telephone channel (ITU-T G.712)."""

NARROW_RATE = 8000
"""Hz, of the codecs of telephony."""

MAX_COMPRESSION = 0.9
"""Of 0 (best) to 1 (smallest file); libsndfile's MP3 encoder refuses 1."""

_FORMATS: dict[Codec, tuple[str, str]] = {
    "opus": ("OGG", "OPUS"),
    "vorbis": ("OGG", "VORBIS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "gsm": ("WAV", "GSM610"),
    "ulaw": ("WAV", "ULAW"),
}

_NARROW: tuple[Codec, ...] = ("gsm", "ulaw")


def band_limit(audio: Samples, low: float, high: float) -> Samples:
    """Keep the band from `low` to `high` Hz, 6 dB down there, without any delay.

    The edges fall over a third of an octave. `low` 0 keeps everything below `high`.

    Raises:
        ConfigurationError: edges that do not rise, or lie outside 0 … 8000 Hz.
    """
    if not 0 <= low < high <= SAMPLING_RATE / 2:
        raise ConfigurationError(f"a band needs 0 <= low < high <= {SAMPLING_RATE // 2} Hz, not {low} … {high}")
    # Zeros between the end and the beginning, which the discrete Fourier transform joins.
    size = 1 << (len(audio) + SAMPLING_RATE // 8 - 1).bit_length()
    hertz = np.fft.rfftfreq(size, 1 / SAMPLING_RATE)
    gain = 1 - _rise(hertz, high)
    if low > 0:
        gain *= _rise(hertz, low)
    return np.fft.irfft(np.fft.rfft(audio, size) * gain, size)[: len(audio)].astype(np.float32)


def clip(audio: Samples, depth_db: float) -> Samples:
    """Cut off what lies above a level `depth_db` below the peak, as an overdriven input does.

    Raises:
        ConfigurationError: a negative depth.
    """
    if depth_db < 0:
        raise ConfigurationError(f"the depth of clipping must not be negative, not {depth_db} dB")
    level = np.float32(np.abs(audio).max(initial=0.0) * 10 ** (-depth_db / 20))
    return np.clip(audio, -level, level)


def code(audio: Samples, codec: Codec, compression: float = 0.5) -> Samples:
    """Encode with a lossy codec and decode again.

    Opus, Vorbis and MP3 work at 16 kHz, GSM 06.10 and mu-law at 8 kHz. Samples beyond full scale are clipped.

    Args:
        audio: at least one sample.
        codec: one of `CODECS`.
        compression: 0 (best) to 0.9 (smallest) for Opus, Vorbis and MP3; the others have one rate.

    Raises:
        ConfigurationError: the installed libsndfile cannot write this format, or an unknown codec.
    """
    check_codec(codec)
    container, kind = _FORMATS[codec]
    options: dict[str, Any] = {} if codec in _NARROW else {"compression_level": min(compression, MAX_COMPRESSION)}
    rate = NARROW_RATE if codec in _NARROW else SAMPLING_RATE
    held = np.clip(_resampled(audio, SAMPLING_RATE, rate), -1.0, 1.0)
    buffer = io.BytesIO()
    soundfile.write(buffer, held, rate, format=container, subtype=kind, **options)
    buffer.seek(0)
    decoded, _ = soundfile.read(buffer, dtype="float32")
    restored = _resampled(decoded[: len(held)], rate, SAMPLING_RATE)[: len(audio)]
    return np.pad(restored, (0, len(audio) - len(restored))).astype(np.float32)


def check_codec(codec: str) -> None:
    """See that a codec is known and can be written.

    Raises:
        ConfigurationError: it is not, or cannot.
    """
    if codec not in CODECS:
        raise ConfigurationError(f"codecs are {', '.join(CODECS)}, not {codec!r}")
    container, kind = _FORMATS[codec]
    if container not in soundfile.available_formats() or not soundfile.check_format(container, kind):
        raise ConfigurationError(
            f"the installed libsndfile cannot write {codec} ({container}, {kind}); leave it out of the codecs"
        )


def _rise(hertz: npt.NDArray[np.floating[Any]], edge: float) -> npt.NDArray[np.floating[Any]]:
    """0 below and 1 above an edge, half of it there; a raised cosine over a third of an octave."""
    octaves = np.log2(np.maximum(hertz, 1e-3) / edge)
    return 0.5 - 0.5 * np.cos(np.pi * np.clip(3 * octaves + 0.5, 0.0, 1.0))


def _resampled(audio: Samples, rate: int, target: int) -> Samples:
    return audio if rate == target else soxr.resample(audio, rate, target)
