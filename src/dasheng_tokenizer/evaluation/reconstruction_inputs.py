"""What is measured: pairs of files, or clips that systems reconstruct, as tasks that are done one by one."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dasheng_tokenizer.audio import READ_SUFFIXES, load_audio
from dasheng_tokenizer.cli_paths import DECODED, RECONSTRUCTED, is_audio
from dasheng_tokenizer.errors import AudioError, ConfigurationError, DataError
from dasheng_tokenizer.evaluation.codecs import RATE, Codec, GriffinLim, Opus, Original
from dasheng_tokenizer.evaluation.metric_columns import Pair
from dasheng_tokenizer.files import parse_json
from dasheng_tokenizer.training.clips import EncodedClip, SkipReport, encoded_clips, find_shards

LENGTH_TOLERANCE = 0.05
"""Seconds by which the files of a pair may differ, about a token; the longer is cut, and the cut is in the table."""

Samples = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Opened:
    """A pair to measure, the bits of its code, and by how many samples one of both was longer."""

    pair: Pair
    bits: int | None = None
    cut_samples: int = 0


class Source(Protocol):
    """What a worker process is sent."""

    def open(self) -> Opened:
        """Read, or make, the pair."""


@dataclass(frozen=True)
class FilePair:
    """An original and its reconstruction on disk; several channels are averaged."""

    reference: Path
    estimate: Path

    def open(self) -> Opened:
        """As in `Source`.

        Raises:
            AudioFileError: one of both cannot be read. AudioError: NaN, or files that do not belong together.
        """
        (first, rate), (second, other) = load_audio(self.reference), load_audio(self.estimate)
        if rate != other:
            raise AudioError(f"the original has {rate} Hz and {self.estimate} {other} Hz; resample one of both")
        if len(first) != len(second):
            raise AudioError(
                f"the original has {len(first)} channels and {self.estimate} {len(second)}; mix one of both"
            )
        lengths = first.shape[1], second.shape[1]
        if abs(lengths[0] - lengths[1]) > LENGTH_TOLERANCE * rate:
            raise AudioError(
                f"the original has {lengths[0]} samples and {self.estimate} {lengths[1]}, more than "
                f"{1000 * LENGTH_TOLERANCE:g} ms apart; cut both to the same part"
            )
        shorter = min(lengths)
        original, estimate = (audio[:, :shorter].mean(axis=0, dtype=np.float32) for audio in (first, second))
        return Opened(Pair(original, estimate, rate), None, max(lengths) - shorter)


@dataclass(frozen=True, eq=False)
class DecodedClip:
    """A clip and what a model made of it."""

    reference: Samples
    estimate: Samples
    bits: int | None

    def open(self) -> Opened:
        """As in `Source`."""
        return Opened(Pair(self.reference, self.estimate, RATE), self.bits)


@dataclass(frozen=True, eq=False)
class ClipForCodec:
    """A clip for a codec without weights, which runs in the worker."""

    reference: Samples
    codec: Codec

    def open(self) -> Opened:
        """As in `Source`."""
        decoded = self.codec.reconstruct(self.reference)
        return Opened(Pair(self.reference, decoded.audio, RATE), decoded.bits)


@dataclass(frozen=True)
class System:
    """A row of the tables: its name, the frames of its code a second, and a sentence on it."""

    name: str
    frame_rate: float | None = None
    about: str = ""


@dataclass(frozen=True, eq=False)
class Task:
    """One file of one system.

    Attributes:
        key: names the file in tables.
        system: names the system.
        domain: of the file.
        identity: changes whenever the audio or the system changes.
        prepare: makes what the worker is sent; runs the model where there is one.
    """

    key: str
    system: str
    domain: str
    identity: list[Any]
    prepare: Callable[[], Source]


class Inputs(Protocol):
    """Everything that is to be measured.

    Attributes:
        systems: rows of the tables.
        failures: inputs with which nothing can be done, with reasons; complete when all tasks were drawn.
        total: number of tasks, or None where only reading tells.
    """

    systems: list[System]
    failures: dict[str, str]
    total: int | None

    def tasks(self) -> Iterator[Task]:
        """All tasks, in a fixed order."""


@dataclass
class PairInputs:
    """Files of two or more folders, matched by their path below the folder without its suffix.

    Args:
        reference: folder of the originals.
        estimates: folders of reconstructions, each a system of its own.
        domain: of all files, or None: label `domain` of a JSON file beside the original, else its top folder.

    Raises:
        DataError: a folder that is absent, without audio, or of which no file matches.
    """

    reference: Path
    estimates: Sequence[Path]
    domain: str | None = None
    systems: list[System] = field(init=False)
    failures: dict[str, str] = field(init=False, default_factory=dict)
    total: int | None = field(init=False)

    def __post_init__(self) -> None:
        """Match the files."""
        originals = self._files(self.reference, is_audio, "originals")
        names = [path.name or str(path) for path in self.estimates]
        if len(set(names)) < len(names):
            names = [str(path) for path in self.estimates]
        self.systems = [System(name) for name in _unique(names)]
        self._pairs: list[tuple[str, str, Path, Path]] = []  # system, key, original, reconstruction
        for system, folder in zip(self.systems, self.estimates, strict=True):
            beside = folder.resolve() == self.reference.resolve()  # where `reconstruct` puts them without -o
            found = self._files(folder, _is_output if beside else _is_any, "reconstructions")
            matched = [key for key in originals if key in found]
            if not matched:
                raise DataError(f"no file of {folder} has the name of one in {self.reference}; check both folders")
            self._pairs += [(system.name, key, originals[key], found[key]) for key in matched]
            for key in originals.keys() - found.keys():
                self.failures[str(originals[key])] = f"no file of that name in {folder}; it was left out"
            for key in found.keys() - originals.keys():
                self.failures[str(found[key])] = f"no original of that name in {self.reference}; it was left out"
        self.failures = dict(sorted(self.failures.items()))
        self.total = len(self._pairs)

    def tasks(self) -> Iterator[Task]:
        """As in `Inputs`."""
        for system, key, original, estimate in self._pairs:
            labels = _labels(original.with_suffix(".json"))
            identity = ["pair", _digest(original), _digest(estimate)]
            source = FilePair(original, estimate)
            yield Task(key, system, self.domain or _domain(key, labels), identity, functools.partial(_same, source))

    def _files(self, folder: Path, accepts: Callable[[Path], bool], kind: str) -> dict[str, Path]:
        """Audio files by path below the folder, without suffix and without what `reconstruct` and `decode` append."""
        if not folder.is_dir():
            raise DataError(f"{folder} is no folder; give the folder of the {kind}")
        found: dict[str, Path] = {}
        for path in sorted(folder.rglob("*")):
            if path.name.startswith(".") or not accepts(path) or not path.is_file():
                continue
            stem = path.stem.removesuffix(RECONSTRUCTED).removesuffix(DECODED)
            key = (path.relative_to(folder).parent / stem).as_posix()
            if key in found:
                self.failures[str(path)] = f"{found[key]} has the same name; it was left out"
            else:
                found[key] = path
        if not found:
            raise DataError(f"{folder} holds no audio files; give the folder of the {kind}")
        return found


@dataclass
class ClipInputs:
    """Clips of folders and tar shards, and the systems that reconstruct them.

    Args:
        sources: as in `training.clips.find_shards`.
        codecs: at least one.
        domain: of all clips, or None: their label `domain`, else the top folder of their key.

    Raises:
        ConfigurationError: two systems of one name. DataError: a source without audio.
    """

    sources: Sequence[str | Path]
    codecs: Sequence[Codec]
    domain: str | None = None
    systems: list[System] = field(init=False)
    failures: dict[str, str] = field(init=False, default_factory=dict)
    total: int | None = field(init=False)

    def __post_init__(self) -> None:
        """Find the shards."""
        _unique([codec.name for codec in self.codecs])
        self.systems = [System(codec.name, codec.frame_rate, codec.about) for codec in self.codecs]
        self._shards = find_shards(self.sources)
        files = [len(shard.files) for shard in self._shards]
        self.total = sum(files) * len(self.codecs) if all(files) else None

    def tasks(self) -> Iterator[Task]:
        """As in `Inputs`.

        Raises:
            DataError: nothing to read, or nothing that could be read.
        """
        report, count = SkipReport(self.failures), 0
        identities = [codec.identity() for codec in self.codecs]
        for shard in self._shards:
            for clip in encoded_clips(shard, report):
                count += 1
                lazy = _LazyClip(clip)
                digest = hashlib.sha256(clip.data).hexdigest()
                domain = self.domain or _domain(clip.key, clip.labels)
                for codec, identity in zip(self.codecs, identities, strict=True):
                    prepare = functools.partial(_prepare, lazy, codec)
                    yield Task(clip.key, codec.name, domain, ["clip", digest, *identity], prepare)
        if not count:
            reasons = f"; {report.summary()}" if report else ""
            raise DataError(f"{' '.join(map(str, self.sources))}: no clip to measure{reasons}")


def _is_any(path: Path) -> bool:
    return path.suffix.lower() in READ_SUFFIXES


def _is_output(path: Path) -> bool:
    return _is_any(path) and not is_audio(path)


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:  # the worker will say why
        return "unreadable"


class _LazyClip:
    """Decodes once, and only when a system needs it."""

    def __init__(self, clip: EncodedClip) -> None:
        self.clip = clip

    @functools.cached_property
    def audio(self) -> Samples:
        """(samples,) at 16 kHz."""
        return self.clip.decode().audio


def _prepare(lazy: _LazyClip, codec: Codec) -> Source:
    if isinstance(codec, (Original, Opus, GriffinLim)):  # light to send, and single-threaded
        return ClipForCodec(lazy.audio, codec)
    decoded = codec.reconstruct(lazy.audio)
    return DecodedClip(lazy.audio, decoded.audio, decoded.bits)


def _same(source: Source) -> Source:
    return source


def _unique(names: list[str]) -> list[str]:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigurationError(f"two systems are called {', '.join(twice)}; name each once")
    return names


def _labels(path: Path) -> dict[str, Any]:
    try:
        held = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # labels are optional
        return {}
    return held if isinstance(held, dict) else {}


def _domain(key: str, labels: dict[str, Any]) -> str:
    """The label `domain`, else the top folder, else `audio`."""
    folder, slash, _ = key.partition("/")
    return str(labels.get("domain") or (folder if slash and folder else "audio"))
