"""The clips of an X-ARES task from its original tar layout, with what was left out and why.

`DIR/NAME/*.tar` or `DIR/env/NAME/*.tar`, in each shard `key.flac` (or wav, mp3, ogg, …) beside `key.json`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dasheng_tokenizer.audio import READ_SUFFIXES
from dasheng_tokenizer.errors import AudioError, AudioFileError, DataError
from dasheng_tokenizer.evaluation.probe_tasks import Event, Example, Label, Samples
from dasheng_tokenizer.evaluation.xares_tasks import XaresRow, find_shards
from dasheng_tokenizer.files import parse_json
from dasheng_tokenizer.spectral import SAMPLING_RATE
from dasheng_tokenizer.training.clips import EncodedClip, Shard, SkipReport, check_tar_end

HELD_OUT = 10
"""Where the original has no validation split, one training clip in so many is held out to choose the epoch by."""

_FIT, _HELD = "/fit", "/held"  # parts of a training split, by a hash of the clip's name

_log = logging.getLogger(__name__)


class XaresData:
    """The clips of one task, as `TaskData`: mono, 16 kHz.

    A task with crops gives full ones only, but a clip shorter than one crop is extended to it by zeros, as the original
    does. Each has a key of its own, `SHARD/CLIP@NUMBER`.
    """

    def __init__(self, row: XaresRow, folder: str | Path, xares_protocol: bool = False) -> None:
        """Find the shards.

        Args:
            row: of `XARES_ROWS`.
            folder: that holds `NAME/*.tar` or `env/NAME/*.tar`.
            xares_protocol: choose the epoch by the data that the original chooses it by, where `selects_on_test` says
                so the test data. Otherwise the fold after the tested one (or a tenth of the training clips where there
                are no folds) is left out of the training for that.

        Raises:
            DataError: shards are missing; the message names their source.
        """
        self.row, self.xares_protocol = row, xares_protocol
        self._shards = find_shards(row, Path(folder))

    @property
    def folds(self) -> list[dict[str, list[str]]]:
        """Names of the splits that each fold trains, validates and tests on."""
        names = list(self.row.shards)
        if not self.row.folded:
            train, *valid, test = names
            if valid:
                return [{"train": [train], "valid": valid, "test": [test]}]
            if self.xares_protocol:
                return [{"train": [train + _FIT, train + _HELD], "valid": [test], "test": [test]}]
            return [{"train": [train + _FIT], "valid": [train + _HELD], "test": [test]}]
        folds: list[dict[str, list[str]]] = []
        for index, test in enumerate(names):
            chosen_by = test if self.xares_protocol else names[(index + 1) % len(names)]
            rest = [name for name in names if name not in (test, chosen_by)]
            folds.append({"train": rest, "valid": [chosen_by], "test": [test]})
        return folds

    def identity(self, split: str) -> str:
        """SHA-256 over names, sizes and beginnings of the shards, and over how they are read."""
        task, row = self.row.task, self.row
        shards = [Shard(path).identity() for path in self._shards[_base(split)]]
        held = [split, task.name, task.head, task.crop_seconds, task.classes, row.fields, HELD_OUT, shards]
        return hashlib.sha256(json.dumps(held).encode()).hexdigest()

    def examples(self, split: str, skipped: dict[str, str] | None = None) -> Iterator[Example]:
        """The clips of a split in a fixed order, decoded one by one, all of them with a label.

        Args:
            split: a name that occurs in `folds`.
            skipped: receives what was left out (clips without or with an unknown label, damaged audio or shards), by
                name with the reason; None logs it instead.
        """
        report = SkipReport({} if skipped is None else skipped)
        for path in self._shards[_base(split)]:
            for key, members in tar_samples(path, report):
                name = f"{path.stem}/{key}"
                if split == _base(split) or (_drawn(name) == split.endswith(_HELD)):
                    yield from self._read(name, members, report)
        if skipped is None and report:
            _log.warning("%s %s: %s", self.row.task.name, split, report.summary())

    def _read(self, name: str, members: dict[str, bytes], report: SkipReport) -> Iterator[Example]:
        suffix = next((suffix for suffix in members if f".{suffix.rpartition('.')[2]}" in READ_SUFFIXES), None)
        if suffix is None:
            report.add(name, f"no audio that can be read; the shard holds {', '.join(members)}")
            return
        try:
            label = read_label(self.row, members.get("json"))
            clip = EncodedClip(f"{name}.{suffix}", members[suffix], {}).decode()
        except (DataError, AudioError, AudioFileError) as error:
            report.add(name, error)
            return
        for number, crop in enumerate(_crops(clip.audio, self.row.task.crop_seconds)):
            yield Example(f"{name}@{number}" if self.row.task.crop_seconds else name, crop, label)


def read_label(row: XaresRow, data: bytes | None) -> Label:
    """The label of a clip from the bytes of its JSON file, None where there is none.

    Raises:
        DataError: missing, damaged, of another form, or of an unknown class.
    """
    if data is None:
        raise DataError("no label: no JSON file beside the audio")
    try:
        held = parse_json(data)
        label = _label(row, held)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
        raise DataError(f"no label: {what}") from error
    parts = [label] if isinstance(label, str) else label
    used = {item.label if isinstance(item, Event) else item for item in parts}
    unknown = sorted(used - set(row.task.classes)) if row.task.classes else []
    if unknown:
        raise DataError(f"label {unknown[0]!r} is none of the classes of {row.task.name}")
    return label


def _label(row: XaresRow, held: Any) -> Label:
    head = row.task.head
    if head == "frame":
        if not isinstance(held, list):
            raise ValueError("events are not a list")
        onset, offset, label = row.fields
        # One entry may name several classes that sound together.
        return tuple(
            _event(float(item[onset]), float(item[offset]), name)
            for item in held
            for name in str(item[label]).split(",")
        )
    if head == "retrieval":
        captions = tuple(str(value).strip() for value in held.values())
        if not captions or not all(captions):
            raise ValueError("captions are empty")
        return captions
    value = held[row.fields[0]]
    if value is None or not str(value).strip():
        raise ValueError(f"field '{row.fields[0]}' is empty")
    if head == "multilabel":
        return tuple(name for name in str(value).split(";") if name)
    return str(value)


def _event(onset: float, offset: float, label: str) -> Event:
    if not (math.isfinite(onset) and math.isfinite(offset) and 0 <= onset <= offset):
        raise ValueError(f"event from {onset} s to {offset} s")
    return Event(onset, offset, label)


def _crops(audio: Samples, seconds: float | None) -> Iterator[Samples]:
    if seconds is None:
        yield audio
        return
    size = round(seconds * SAMPLING_RATE)
    if len(audio) < size:
        yield np.pad(audio, (0, size - len(audio)))
    for start in range(0, len(audio) - size + 1, size):
        yield audio[start : start + size]


def _base(split: str) -> str:
    return split.removesuffix(_FIT).removesuffix(_HELD)


def _drawn(name: str) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % HELD_OUT == 0


def tar_samples(path: Path, report: SkipReport) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Samples of a tar shard: key, and bytes by suffix. Members of a sample follow one another, as WebDataset has them.

    What comes before a damage is given; the damage itself is noted under the shard's name. Python's own reader ends in
    silence at a header that is damaged or cut off, so the end is looked at: there must be the two blocks of zeros that
    end every tar archive, and nothing but zeros after them.
    """
    try:
        with path.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            yield from _grouped(archive)
            check_tar_end(stream, archive.offset)
    except (tarfile.TarError, OSError) as error:
        report.add(path.name, f"cut or damaged shard, clips may be missing from it: {error}")


def _grouped(archive: tarfile.TarFile) -> Iterator[tuple[str, dict[str, bytes]]]:
    last, members = "", dict[str, bytes]()
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # kept by tarfile for looking up names
        folder, _, name = member.name.removeprefix("./").rpartition("/")
        stem, _, suffix = name.partition(".")
        if not member.isreg() or not stem:
            continue
        key = f"{folder}/{stem}" if folder else stem
        if key != last and members:
            yield last, members
            members = {}
        last = key
        held = archive.extractfile(member)
        members[suffix.lower()] = held.read() if held else b""
    if members:
        yield last, members
