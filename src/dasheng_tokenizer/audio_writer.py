"""Writing audio files, whole and in blocks. They appear whole or not at all."""

from __future__ import annotations

import os
import warnings
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import soundfile

from dasheng_tokenizer.audio_formats import WRITE_FORMATS
from dasheng_tokenizer.audio_reader import reason
from dasheng_tokenizer.errors import AudioError, OutputError
from dasheng_tokenizer.files import atomic_path
from dasheng_tokenizer.samples import Array, check_finite, to_audio_array

_MAX_WAV_BYTES = 2**32 - 4096  # sizes in a WAV header have 32 bits


class _GuardedFile:
    """Keeps the first error of writing: libsndfile drops it for MP3 and Ogg, and it may come as late as on closing."""

    def __init__(self, handle: IO[bytes]) -> None:
        self._handle = handle
        self.error: OSError | None = None
        self.seek, self.tell, self.read = handle.seek, handle.tell, handle.read
        self.readinto: Any = getattr(handle, "readinto", None)

    def write(self, data: bytes) -> int:
        if self.error is None:
            try:
                return self._handle.write(data)
            except OSError as error:
                self.error = error
        return 0


class AudioWriter:
    """Write a file in blocks of constant memory; a context manager. The file appears whole when the block ends.

    Args:
        path: .wav, .w64, .flac, .ogg, .opus or .mp3.
        sampling_rate: Hz.
        num_channels: Number of channels.
        subtype: libsndfile's name of the sample format, e.g. "PCM_24" or "FLOAT"; by default 16 bits, or what the
            compressed format has.
        overwrite: Whether an existing file may be replaced.

    Samples beyond full scale are clipped, except in FLOAT and DOUBLE files; one warning says how many.

    Raises:
        AudioError: the format is unknown or does not take this rate, number of channels or subtype.
        OutputError: the file cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        sampling_rate: int,
        num_channels: int,
        subtype: str | None = None,
        overwrite: bool = True,
    ) -> None:
        self.path = Path(path)
        self.sampling_rate, self.num_channels = int(sampling_rate), num_channels
        self.format, self.subtype = self._choose(subtype)
        self.num_samples = 0
        self._overwrite = overwrite
        self._clipped = 0
        self._stack = ExitStack()

    def _choose(self, subtype: str | None) -> tuple[str, str]:
        """Check the wishes against the format; libsndfile's own messages do not say which of them is wrong."""
        suffix = self.path.suffix.lower()
        if suffix not in WRITE_FORMATS:
            raise AudioError(f"cannot write {self.path}: suffix {suffix!r}; use one of {', '.join(WRITE_FORMATS)}")
        name, default, channels, rates = WRITE_FORMATS[suffix]
        chosen = (subtype or default).upper()
        if not soundfile.check_format(name, chosen):
            known = ", ".join(soundfile.available_subtypes(name)) or "none in this build of libsndfile"
            raise AudioError(f"cannot write {self.path} as {chosen}; {suffix} takes {known}")
        if not 1 <= self.num_channels <= channels:
            raise AudioError(
                f"{suffix} takes 1 to {channels} channels, not {self.num_channels}; use .wav for {self.path}"
            )
        if rates is not None and self.sampling_rate not in rates:
            raise AudioError(
                f"{suffix} takes only sampling rates of {', '.join(map(str, rates))} Hz, not {self.sampling_rate}; "
                f"resample, or use .flac or .wav for {self.path}"
            )
        return name, chosen

    def __enter__(self) -> AudioWriter:
        with ExitStack() as stack:
            temporary = stack.enter_context(atomic_path(self.path, self._overwrite))
            stack.callback(self._raise_write_error)
            self._guard = _GuardedFile(stack.enter_context(temporary.open("rb+")))
            try:
                self._sound = soundfile.SoundFile(
                    self._guard, "w", self.sampling_rate, self.num_channels, self.subtype, format=self.format
                )
            except soundfile.SoundFileError as error:
                self._raise_write_error()
                raise AudioError(f"cannot write {self.path}: {reason(error)}; use .wav or .flac") from error
            stack.callback(self._sound.close)
            self._stack = stack.pop_all()
        return self

    def _raise_write_error(self) -> None:
        if self._guard.error is not None:
            raise self._guard.error

    def write(self, block: Array) -> None:
        """Append a (channels, samples) block.

        Raises:
            AudioError: wrong shape, NaN or infinity.
            OutputError: a WAV file would pass 4 GiB.
        """
        if block.ndim != 2 or block.shape[0] != self.num_channels:
            raise AudioError(f"a block of shape {block.shape} was given; expected ({self.num_channels}, samples)")
        check_finite(block, str(self.path), self.num_samples)
        if self.subtype not in ("FLOAT", "DOUBLE"):
            self._clipped += int(np.count_nonzero(np.abs(block) > 1.0))
            block = np.clip(block, -1.0, 1.0)
        self.num_samples += block.shape[1]
        if self.format == "WAV" and self.num_samples * self.num_channels * _sample_bytes(self.subtype) > _MAX_WAV_BYTES:
            raise OutputError(f"{self.path} would pass the 4 GiB that WAV allows; write .w64 or .flac instead")
        try:
            self._sound.write(np.ascontiguousarray(block.T, dtype=np.float32))
        except (AssertionError, soundfile.SoundFileError) as error:  # soundfile asserts that all samples were written
            self._raise_write_error()
            raise OutputError(f"cannot write {self.path}: {reason(error)}") from error
        self._raise_write_error()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        if error is None and self._clipped:
            warnings.warn(
                f"{self._clipped} samples of {self.path} were beyond full scale and clipped; "
                "turn the level down or write a float WAV",
                stacklevel=2,
            )


def _sample_bytes(subtype: str) -> int:
    return {"PCM_S8": 1, "PCM_U8": 1, "PCM_16": 2, "PCM_24": 3, "DOUBLE": 8}.get(subtype, 4)


def save_audio(
    path: str | os.PathLike[str],
    audio: Any,
    sampling_rate: int,
    subtype: str | None = None,
    overwrite: bool = True,
) -> None:
    """Write a whole audio file; it appears whole or not at all.

    Args:
        path: .wav, .w64, .flac, .ogg, .opus or .mp3.
        audio: (samples,) or (channels, samples), anything `to_audio_array` takes.
        sampling_rate: Hz.
        subtype: See `AudioWriter`, e.g. "FLOAT" for a float32 WAV without clipping.
        overwrite: Whether an existing file may be replaced.

    Raises:
        AudioError: unusable samples, or a format that does not take them.
        OutputError: the file cannot be written.
    """
    samples = to_audio_array(audio)
    with AudioWriter(path, sampling_rate, samples.shape[0], subtype, overwrite) as writer:
        writer.write(samples)
