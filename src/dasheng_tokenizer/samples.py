"""Audio in memory: arrays of any number type to float32, resampling whole and in blocks, lengths.

Audio is float32 of shape (channels, samples), full scale ±1.

Length rule: `n` samples at rate `a` become ceil(n · b / a) samples at rate `b`, so that one sample never becomes none
and a trip to another rate and back never loses one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dasheng_tokenizer.errors import AudioError

if TYPE_CHECKING:
    import torch

MIN_RATE = 8_000
MAX_RATE = 192_000
"""Sampling rates in Hz that are resampled; others are refused."""

MAX_CHANNELS = 64
"""More channels than this, and more than samples, is taken for an array of shape (samples, channels)."""

RESAMPLING_QUALITY = "HQ"
"""soxr's 20-bit recipe: pass band to 0.91 of the lower Nyquist frequency, rejection 120 dB."""

Array = npt.NDArray[np.float32]

_FULL_SCALE = {"int8": 2.0**7, "uint8": 2.0**7, "int16": 2.0**15, "int32": 2.0**31}
_FLOATS = ("float16", "float32", "float64")


def to_audio_array(audio: npt.ArrayLike | torch.Tensor, name: str = "audio") -> Array:
    """Bring samples of any usual kind to float32 of shape (channels, samples) with full scale 1.

    Args:
        audio: (samples,) or (channels, samples); numpy array, list or torch tensor of int8, uint8 (midpoint 128),
            int16, int32 (full scale ±1), float16, bfloat16, float32 or float64 (taken as they are).
        name: What to call it in errors, e.g. the file.

    Raises:
        AudioError: empty, NaN or infinite, more than two axes, axes swapped, or not of the number types above.
    """
    values = _as_numpy(audio, name)
    if values.ndim == 1:
        values = values[None]
    if values.ndim != 2:
        raise AudioError(f"{name} has shape {values.shape}; give (samples,) or (channels, samples), one clip at a time")
    if values.size == 0:
        raise AudioError(f"{name} has no samples (shape {values.shape}); give at least one sample")
    channels, samples = values.shape
    if channels > MAX_CHANNELS and channels > samples:
        raise AudioError(
            f"{name} has shape {values.shape}, {channels} channels of {samples} samples: the axes look swapped; "
            "give (channels, samples), e.g. audio.T"
        )
    if values.dtype.name in _FULL_SCALE:
        offset = 128.0 if values.dtype.name == "uint8" else 0.0
        return ((values.astype(np.float64) - offset) / _FULL_SCALE[values.dtype.name]).astype(np.float32)
    with np.errstate(over="ignore"):  # float64 beyond float32 turns infinite and is named below
        result = np.ascontiguousarray(values, dtype=np.float32)
    check_finite(result, name)
    return result


def _as_numpy(audio: Any, name: str) -> npt.NDArray[Any]:
    """Take lists, arrays and tensors; refuse what has no known full scale."""
    if hasattr(audio, "detach"):  # a torch tensor, recognised without importing torch
        tensor = audio.detach().cpu()
        audio = (tensor.float() if tensor.is_floating_point() and tensor.element_size() == 2 else tensor).numpy()
    try:
        values = np.asarray(audio)
    except ValueError as error:  # lists of unequal length
        raise AudioError(f"{name} is not a regular array ({error}); give channels of equal length") from error
    if values.dtype.name not in _FULL_SCALE and values.dtype.name not in _FLOATS and values.size:
        raise AudioError(
            f"{name} has number type {values.dtype}; give {', '.join(_FLOATS)} with full scale 1, "
            f"or {', '.join(_FULL_SCALE)} with the full scale of the type"
        )
    return values


def check_finite(audio: Array, name: str = "audio", first_sample: int = 0) -> None:
    """Refuse NaN and infinity, which would spread over every token of the clip.

    Args:
        audio: (channels, samples).
        name: What to call it in the error.
        first_sample: Index of the first sample of `audio` in its file, for blocks.

    Raises:
        AudioError: with the channel and the index of the first bad sample.
    """
    finite = np.isfinite(audio)
    if finite.all():
        return
    sample = int(np.argmin(finite.all(axis=0)))
    channel = int(np.argmin(finite[:, sample]))
    count = int(finite.size - np.count_nonzero(finite))
    raise AudioError(
        f"{name} has {count} NaN or infinite values, the first in channel {channel} at sample {first_sample + sample} "
        f"({audio[channel, sample]}); repair or cut that part"
    )


def check_rate(rate: Any, name: str = "sampling rate") -> int:
    """Return the rate as an integer.

    Raises:
        AudioError: it is not a whole number of Hz between `MIN_RATE` and `MAX_RATE`.
    """
    if isinstance(rate, bool) or not isinstance(rate, (int, float, np.number)) or int(rate) != rate:
        raise AudioError(f"the {name} must be a whole number of Hz, got {rate!r}")
    if not MIN_RATE <= rate <= MAX_RATE:
        raise AudioError(f"the {name} is {rate} Hz; rates from {MIN_RATE} to {MAX_RATE} Hz are supported")
    return int(rate)


def resampled_length(num_samples: int, from_rate: int, to_rate: int) -> int:
    """Number of samples after resampling: ceil(num_samples · to_rate / from_rate)."""
    return -(-num_samples * to_rate // from_rate)


def fit_length(audio: Array, num_samples: int) -> Array:
    """Trim at the end, or append zeros, to exactly `num_samples` on the last axis."""
    missing = num_samples - audio.shape[-1]
    if missing <= 0:
        return audio[..., :num_samples]
    return np.pad(audio, [(0, 0)] * (audio.ndim - 1) + [(0, missing)])


class StreamingResampler:
    """Resample a stream block by block; the blocks together equal `resample` of the whole.

    Args:
        from_rate: Rate of the input in Hz.
        to_rate: Rate of the output in Hz.
        num_channels: Channels of each block.

    Raises:
        AudioError: a rate is out of range.
    """

    def __init__(self, from_rate: int, to_rate: int, num_channels: int) -> None:
        import soxr

        self.from_rate = check_rate(from_rate)
        self.to_rate = check_rate(to_rate, "target sampling rate")
        self.num_channels = num_channels
        self._received = 0
        self._returned = 0
        self._finished = False
        self._stream = None
        if self.from_rate != self.to_rate:
            self._stream = soxr.ResampleStream(
                self.from_rate, self.to_rate, num_channels, dtype="float32", quality=RESAMPLING_QUALITY
            )

    def process(self, block: Array, last: bool = False) -> Array:
        """Return the samples that are ready: (channels, samples) in, (channels, some samples) out.

        With `last`, everything that remains comes out, and the total is `resampled_length` of the total received.

        Raises:
            AudioError: the block has another number of channels, or comes after the last one.
        """
        if block.ndim != 2 or block.shape[0] != self.num_channels:
            raise AudioError(f"a block of shape {block.shape} was given; expected ({self.num_channels}, samples)")
        if self._finished:
            raise AudioError("a block was given after the last one; make a new StreamingResampler")
        self._finished = last
        self._received += block.shape[1]
        if self._stream is None:
            return block
        if last:  # soxr rounds its length; zeros behind the end, which it assumes anyway, make it reach the ceiling
            block = np.pad(block, ((0, 0), (0, -(-self.from_rate // self.to_rate) + 1)))
        frames = np.ascontiguousarray(block.T, dtype=np.float32)  # (samples, channels)
        output = self._stream.resample_chunk(frames, last=last).reshape(-1, self.num_channels).T
        if last:
            total = resampled_length(self._received, self.from_rate, self.to_rate)
            output = fit_length(output, total - self._returned)
        self._returned += output.shape[1]
        return np.ascontiguousarray(output)


def resample(audio: Array, from_rate: int, to_rate: int) -> Array:
    """Resample (samples,) or (channels, samples) with soxr.

    Returns:
        The same rank, with `resampled_length(samples, from_rate, to_rate)` samples. At equal rates the input itself.

    Raises:
        AudioError: a rate is out of range, or the array has no samples.
    """
    rows = np.atleast_2d(audio)
    if audio.ndim > 2 or rows.shape[1] == 0:
        raise AudioError(f"audio of shape {audio.shape} cannot be resampled; give (samples,) or (channels, samples)")
    stream = StreamingResampler(from_rate, to_rate, rows.shape[0])
    return stream.process(rows, last=True).reshape(*audio.shape[:-1], -1)
