"""Clips of audio from WebDataset tar shards and plain folders, one by one in constant memory.

A broken member, file or shard is left out, counted and named; only if nothing is left is that an error.
"""

from __future__ import annotations

import glob
import hashlib
import io
import logging
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from dasheng_tokenizer.audio import READ_SUFFIXES, load_audio, resample
from dasheng_tokenizer.errors import AudioError, AudioFileError, DataError
from dasheng_tokenizer.files import parse_json, require_extra
from dasheng_tokenizer.spectral import SAMPLING_RATE

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")

FILES_PER_SHARD = 512
"""Files of a plain folder that are handled together, as if they were one shard."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Clip:
    """A decoded clip: `audio` (samples,) float32, 16 kHz, mono, full scale 1; `labels` of its JSON file, or empty."""

    key: str
    audio: npt.NDArray[np.float32]
    labels: dict[str, Any]

    @property
    def domain(self) -> str:
        """The label `domain` (speech, music, …), or `audio` where there is none."""
        return str(self.labels.get("domain") or "audio")


@dataclass(frozen=True)
class EncodedClip:
    """A clip as stored: the bytes of an audio file, not looked at yet."""

    key: str
    data: bytes
    labels: dict[str, Any]

    @property
    def domain(self) -> str:
        """As in `Clip`."""
        return str(self.labels.get("domain") or "audio")

    def decode(self) -> Clip:
        """Decode, average to mono, resample to 16 kHz.

        Raises:
            AudioFileError: not audio, damaged or truncated.
            AudioError: NaN or infinite samples, no samples.
        """
        file = io.BytesIO(self.data)
        file.name = self.key  # for the reader's messages
        audio, rate = load_audio(file)
        mono = np.ascontiguousarray(audio.mean(axis=0, dtype=np.float32))
        return Clip(self.key, resample(mono, rate, SAMPLING_RATE), self.labels)


@dataclass(frozen=True)
class Shard:
    """One tar file (`files` is empty), or some files of the folder `path`."""

    path: Path
    files: tuple[Path, ...] = ()

    def identity(self) -> list[Any]:
        """What tells whether the data changed, wherever it lies: names and sizes, of a tar its first bytes too.

        Tar files of equal names and sizes are common; the first bytes hold names and times of their first members.
        """
        if self.files:
            return [[file.relative_to(self.path).as_posix(), file.stat().st_size] for file in self.files]
        with self.path.open("rb") as file:
            beginning = hashlib.sha256(file.read(1 << 20)).hexdigest()
        return [self.path.name, self.path.stat().st_size, beginning]


@dataclass
class SkipReport:
    """What was left out: name of the clip, file or shard, and the reason."""

    skipped: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, reason: object) -> None:
        """Note one; the first reason for a name is kept."""
        self.skipped.setdefault(name, str(reason))

    def __len__(self) -> int:
        return len(self.skipped)

    def summary(self, most: int = 5) -> str:
        """How many were left out, and the first of them with their reasons."""
        named = [f"{name} ({reason})" for name, reason in list(self.skipped.items())[:most]]
        more = f"; and {len(self) - most} more" if len(self) > most else ""
        return f"{len(self)} left out: {'; '.join(named)}{more}"


def find_shards(sources: Sequence[str | Path]) -> list[Shard]:
    """Expand sources to shards, in a fixed order and each once.

    Args:
        sources: tar shards, audio files, folders (searched at any depth for both), globs (`data/*-train-*.tar`) and
            ranges
            (`data/train-{000..127}.tar`).

    Raises:
        DataError: no sources, a source that matches nothing, or a folder without audio.
        MissingExtraError: webdataset is not installed.
    """
    if not sources:
        raise DataError("no audio is named; list tar shards, files or folders (in a recipe: data.train, data.valid)")
    tars: dict[Path, None] = {}
    loose: dict[Path, Path] = {}  # file → the folder its key is relative to
    for path in (path for source in sources for path in expand_source(str(source))):
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
            audio = [file for file in files if file.suffix.lower() in READ_SUFFIXES]
            shards = [file for file in files if _is_tar(file)]
            if not audio and not shards:
                raise DataError(f"{path} holds no tar shards and no audio files; name another folder")
            tars.update(dict.fromkeys(shards))
            for file in audio:
                loose.setdefault(file, path)
        elif _is_tar(path):
            tars[path] = None
        else:
            loose.setdefault(path, path.parent)
    return [Shard(tar) for tar in tars] + _file_shards(loose)


def encoded_clips(shard: Shard, report: SkipReport) -> Iterator[EncodedClip]:
    """The clips of one shard, undecoded. What cannot be read is noted in `report`."""
    for name, data, labels in _tar_members(shard.path, report) if not shard.files else _file_members(shard, report):
        try:
            held = parse_json(labels) if labels else {}
        except ValueError as error:  # also UnicodeDecodeError
            report.add(f"{name}.json", f"labels are not JSON: {error}")
            held = {}
        yield EncodedClip(name, data, held if isinstance(held, dict) else {})


def read_clips(sources: Sequence[str | Path], report: SkipReport | None = None) -> Iterator[Clip]:
    """Decode all clips of the sources, in a fixed order.

    Args:
        sources: as in `find_shards`.
        report: receives what was left out; it is logged as a warning too.

    Raises:
        DataError: nothing to read, or nothing that could be read.
    """
    report = SkipReport() if report is None else report
    count = 0
    for shard in find_shards(sources):
        for clip in decoded_clips(shard, report):
            count += 1
            yield clip
    if not count:
        raise DataError(f"none of the clips can be used; {report.summary()}" if report else "the shards hold no audio")
    if report:
        _log.warning(report.summary())


def decoded_clips(shard: Shard, report: SkipReport) -> Iterator[Clip]:
    """The clips of one shard, decoded. What cannot be read or decoded is noted in `report`."""
    for encoded in encoded_clips(shard, report):
        try:
            clip = encoded.decode()
        except (AudioError, AudioFileError) as error:
            report.add(encoded.key, error)
            continue
        yield clip


def _is_tar(path: Path) -> bool:
    return path.name.lower().endswith(TAR_SUFFIXES)


def expand_source(source: str) -> Iterator[Path]:
    """Local paths that a source names: ranges in braces, then globs.

    Raises:
        DataError: it matches nothing.
        MissingExtraError: braceexpand is not installed.
    """
    if Path(source).exists():  # a name may hold brackets or braces itself
        yield Path(source)
        return
    braces = require_extra("braceexpand", "train")  # comes with webdataset
    for name in braces.braceexpand(source):
        found = [name] if Path(name).exists() else sorted(glob.glob(name, recursive=True))
        if not found:
            raise DataError(f"{name} does not exist or matches nothing; name shards, files, folders or globs")
        yield from map(Path, found)


def _file_shards(files: dict[Path, Path]) -> list[Shard]:
    by_root: dict[Path, list[Path]] = {}
    for file, root in files.items():
        by_root.setdefault(root, []).append(file)
    return [
        Shard(root, tuple(group[start : start + FILES_PER_SHARD]))
        for root, group in by_root.items()
        for start in range(0, len(group), FILES_PER_SHARD)
    ]


def _file_members(shard: Shard, report: SkipReport) -> Iterator[tuple[str, bytes, bytes | None]]:
    for file in shard.files:
        key = file.relative_to(shard.path).as_posix()
        labels = file.with_suffix(".json")
        try:
            member = key, file.read_bytes(), labels.read_bytes() if labels.exists() else None
        except OSError as error:
            report.add(key, error.strerror or error)
            continue
        yield member


def _tar_members(path: Path, report: SkipReport) -> Iterator[tuple[str, bytes, bytes | None]]:
    require_extra("webdataset", "train")
    from webdataset.tariterators import group_by_keys, tar_file_expander

    def note(error: Exception) -> bool:
        report.add(os.fspath(path), f"broken shard: {error.args[0] if error.args else error}")
        return True

    try:
        stream = path.open("rb")
    except OSError as error:
        report.add(os.fspath(path), error.strerror or error)
        return
    with stream:
        # Opened here and not by webdataset's own opener, which would run a "path" that begins with `pipe:` in a shell.
        members = tar_file_expander([{"url": os.fspath(path), "stream": stream}], handler=note)
        for sample in group_by_keys(members, handler=note):
            yield from _sample_members(sample)
    if path.suffix.lower() == ".tar" and os.fspath(path) not in report.skipped:
        _note_silent_end(path, report)


def _note_silent_end(path: Path, report: SkipReport) -> None:
    """Note a shard whose reading ended before its end: tarfile stops in silence at a header that is damaged."""
    try:
        with path.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            while archive.next() is not None:
                pass
            check_tar_end(stream, archive.offset)
    except (tarfile.TarError, OSError) as error:
        report.add(os.fspath(path), f"broken shard, the rest of it is left out: {error}")


def check_tar_end(stream: BinaryIO, offset: int) -> None:
    """See that an archive ends where its reader stopped: two blocks of zeros, and nothing but zeros after them.

    Raises:
        tarfile.ReadError: it does not.
    """
    stream.seek(offset)
    if len(block := stream.read(2 * tarfile.BLOCKSIZE)) < 2 * tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"ends at byte {offset + len(block)} without the mark that ends an archive")
    while block:
        if any(block):
            raise tarfile.ReadError(f"damaged after byte {offset}")
        block = stream.read(1 << 20)


def _sample_members(sample: dict[str, Any]) -> Iterable[tuple[str, bytes, bytes | None]]:
    """Audio members of a WebDataset sample, whose key ends at the first dot of the name: `take` for `take.1.wav`."""
    for name, data in sample.items():
        stem, _, suffix = name.rpartition(".")
        if not name.startswith("__") and f".{suffix}" in READ_SUFFIXES:
            dotted = f".{stem}" if stem else ""
            yield sample["__key__"] + dotted, data, sample.get(f"{stem}.json" if stem else "json")


def clip_label(labels: Mapping[str, Any], name: str) -> str | None:
    """A label as text, also one of the group `labels`; None where there is none."""
    inner = labels.get("labels")
    found = labels.get(name, inner.get(name) if isinstance(inner, Mapping) else None)
    return None if found is None else str(found)
