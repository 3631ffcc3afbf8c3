"""Reading audio files, whole and in blocks: whatever libsndfile reads."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import soundfile

from dasheng_tokenizer.errors import AudioError, AudioFileError
from dasheng_tokenizer.samples import Array, check_finite

BLOCK_SECONDS = 10

_STREAMED = 0x7FFF0000  # sizes from here on mean "unknown" in headers written to a pipe by ffmpeg and sox
_UNKNOWN_FRAMES = 2**62  # libsndfile announces 2⁶³−1 for FLAC without a length
_MP3_SLACK = 4 * 1152  # samples: encoder delay and padding that a header may count
_SIZE_LINES = {  # the lines of libsndfile's log in which the header's size and the real one stand
    "WAV": r"^data : (\d+) \(should be (\d+)\)",
    "WAVEX": r"^data : (\d+) \(should be (\d+)\)",
    "AIFF": r"^\s*SSND : (\d+) \(should be (\d+)\)",
    "AU": r"^\s*Data Size\s*: (\d+) \(should be (\d+)\)",
    "W64": r"^riff : (\d+) \(should be (\d+)\)",
    "RF64": r"^\s*Riff size : (\d+) \(should be (\d+)\)",
}


class _SequentialFile(soundfile.SoundFile):
    """A file that is only read forward.

    soundfile seeks after every read, which fails in FLAC files without a length and is inexact in MP3.
    """

    def seekable(self) -> bool:
        return False


class AudioReader:
    """Read a file in blocks of constant memory.

    Attributes:
        name: Name for messages.
        sampling_rate: Hz.
        num_channels: Number of channels.
        num_samples: Samples per channel that `blocks` delivers in total.

    A file that ends before its announced length is refused when this is noticed: at once for WAV, W64, AIFF, AU and
    Ogg, at the end of reading for FLAC and for MP3 with a Xing, Info or VBRI header (all usual encoders write one). An
    MP3 without such a header does not say how long it should be: there a cut cannot be told from an early end, and
    libsndfile's estimate of the length, beyond which it does not read, can be short where the bit rate varies. Nor can
    a cut be told where the header was written to a pipe and leaves the length open.

    Raises:
        AudioFileError: missing, a folder, empty, not audio, damaged or truncated.
    """

    def __init__(self, file: str | os.PathLike[str] | IO[bytes]) -> None:
        self.name = str(file) if isinstance(file, (str, os.PathLike)) else str(getattr(file, "name", "audio stream"))
        self._file = file
        self._path = Path(file) if isinstance(file, (str, os.PathLike)) else None
        with self._open() as sound:
            self.sampling_rate: int = sound.samplerate
            self.num_channels: int = sound.channels
            self.num_samples: int = sound.frames
            self._slack = 0
            self._check_header(sound)
        if self.num_samples <= 0:
            raise AudioFileError(f"{self.name} holds no samples; record or export it again")

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.num_samples / self.sampling_rate

    def _open(self) -> _SequentialFile:
        path = self._path
        if path is not None:
            if os.path.isdir(path):  # unlike pathlib's, it does not raise for impossible names
                raise AudioFileError(f"{self.name} is a folder; give an audio file")
            if not os.path.exists(path):
                raise AudioFileError(f"{self.name} does not exist; check the path")
            if path.stat().st_size == 0:
                raise AudioFileError(f"{self.name} is empty (0 bytes); record, export or download it again")
            if not os.access(path, os.R_OK):
                raise AudioFileError(f"{self.name} cannot be read: permission denied; change its permissions")
        else:
            self._file.seek(0)  # type: ignore[union-attr]
        try:
            if path is None:
                return _SequentialFile(self._file)
            # As bytes where the system has names of bytes: soundfile refuses text that is not UTF-8.
            return _SequentialFile(os.fsencode(path) if os.name == "posix" else os.fspath(path))
        except (soundfile.SoundFileError, TypeError, ValueError, OSError) as error:
            raise AudioFileError(
                f"{self.name} is not audio that can be read here, or its beginning is damaged ({reason(error)}); "
                "convert it to WAV or FLAC, e.g. with ffmpeg"
            ) from error

    def _check_header(self, sound: soundfile.SoundFile) -> None:
        """Refuse files shorter than their header says, and find the length of those that do not say it."""
        pattern = _SIZE_LINES.get(sound.format)
        match = re.search(pattern, sound.extra_info, re.MULTILINE) if pattern else None
        if match and int(match[2]) + 16 < int(match[1]) < _STREAMED:
            raise self._truncated(f"its header announces {match[1]} bytes, {match[2]} are there")
        if sound.format == "OGG":
            with self._bytes() as raw:
                self._check_last_page(raw)
        if sound.format == "MP3":
            with self._bytes() as raw:
                announced = _announces_mp3_length(raw)
            if announced:
                self._slack = _MP3_SLACK
            else:
                self.num_samples = self._count_samples()
        elif sound.frames >= _UNKNOWN_FRAMES:
            self.num_samples = self._count_samples()

    def _bytes(self) -> IO[bytes]:
        if self._path is not None:
            return self._path.open("rb")
        self._file.seek(0)  # type: ignore[union-attr]
        return _Unclosed(self._file)  # type: ignore[return-value, arg-type]

    def _check_last_page(self, raw: IO[bytes]) -> None:
        """Ogg: the file must end where its last page ends (RFC 3533: 27 bytes, segment table, segments)."""
        size = raw.seek(0, io.SEEK_END)
        raw.seek(max(0, size - 2 * 65_307))  # two pages of the greatest size
        tail = raw.read()
        page = tail.rfind(b"OggS")
        header = tail[page : page + 27 + 255]
        if page < 0 or len(header) < 27 or len(header) < 27 + header[26]:
            raise self._truncated("its last page is cut")
        end = page + 27 + header[26] + sum(header[27 : 27 + header[26]])
        if end > len(tail):
            raise self._truncated(f"{end - len(tail)} bytes of its last page are missing")

    def _count_samples(self) -> int:
        with self._open() as sound:
            return sum(block.shape[1] for block in self._raw_blocks(sound, BLOCK_SECONDS * sound.samplerate))

    def _raw_blocks(self, sound: soundfile.SoundFile, size: int) -> Iterator[Array]:
        while True:
            try:
                block = sound.read(size, dtype="float32", always_2d=True)
            except (soundfile.SoundFileError, OSError) as error:
                raise AudioFileError(
                    f"{self.name} is truncated or damaged ({reason(error)}); copy or export it again"
                ) from error
            if len(block):
                yield np.ascontiguousarray(block.T)
            if len(block) < size:
                return

    def _truncated(self, why: str) -> AudioFileError:
        return AudioFileError(f"{self.name} is truncated ({why}); copy or export it again")

    def blocks(self, size: int | None = None) -> Iterator[Array]:
        """Yield (channels, size) blocks, the last one shorter; each call starts at the beginning.

        Args:
            size: Samples per block; 10 s by default.

        Raises:
            AudioFileError: the file turns out to be damaged or truncated.
            AudioError: it holds NaN or infinity.
        """
        if size is not None and size < 1:
            raise AudioError(f"blocks need at least one sample, got size {size}")
        size = size or BLOCK_SECONDS * self.sampling_rate
        done = 0
        with self._open() as sound:
            for block in self._raw_blocks(sound, size):
                block = block[:, : self.num_samples - done]
                if not block.shape[1]:
                    break
                check_finite(block, self.name, done)
                missing = self.num_samples - done - block.shape[1]
                if block.shape[1] < size and missing <= self._slack:
                    block = np.pad(block, ((0, 0), (0, missing)))
                done += block.shape[1]
                yield from _split(block, size)
        missing = self.num_samples - done
        if missing <= self._slack:
            yield from _split(np.zeros((self.num_channels, missing), dtype=np.float32), size)
        else:
            raise self._truncated(f"its header announces {self.num_samples} samples, {done} are there")


def _split(block: Array, size: int) -> Iterator[Array]:
    for start in range(0, block.shape[1], size):
        yield block[:, start : start + size]


def reason(error: Exception) -> str:
    """The part of soundfile's message after the file name."""
    return str(error).rpartition(": ")[2].rstrip(".") or type(error).__name__


class _Unclosed:
    """A file object of the caller in a `with` block that must not close it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.read, self.seek = file.read, file.seek

    def __enter__(self) -> _Unclosed:
        return self

    def __exit__(self, *_: object) -> None:
        self.seek(0)


def _announces_mp3_length(raw: IO[bytes]) -> bool:
    """Whether the first MPEG frame, after an ID3v2 tag, holds the length (Xing, Info or VBRI header)."""
    start = raw.read(10)
    skip = 0
    if start[:3] == b"ID3" and len(start) == 10:
        skip = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(start[6:], (21, 14, 7, 0), strict=True))
    raw.seek(skip)
    frame = raw.read(2048)
    return any(mark in frame for mark in (b"Xing", b"Info", b"VBRI"))


def load_audio(file: str | os.PathLike[str] | IO[bytes]) -> tuple[Array, int]:
    """Read a whole audio file: anything libsndfile reads (WAV, FLAC, Ogg Vorbis, Opus, MP3, AIFF, …).

    Args:
        file: Path, or a binary file object that can seek.

    Returns:
        float32 array (channels, samples) with full scale 1, and the sampling rate in Hz.

    Raises:
        AudioFileError: missing, a folder, empty, not audio, damaged or truncated (see `AudioReader`), or announces more
            samples than there is memory for.
        AudioError: NaN or infinite samples.
    """
    reader = AudioReader(file)
    shape = reader.num_channels, reader.num_samples
    try:
        audio = np.empty(shape, dtype=np.float32)
    except MemoryError:  # mostly a damaged header
        raise AudioFileError(
            f"{reader.name}: announces {shape[0]} channels of {shape[1]} samples, more than there is memory for; it is "
            "damaged, or so long that it must be read in blocks (AudioReader)"
        ) from None
    done = 0
    for block in reader.blocks():
        audio[:, done : done + block.shape[1]] = block
        done += block.shape[1]
    return audio, reader.sampling_rate
