"""Decoded audio of a data set with its labels: 16 kHz, mono, int16 on disk, mapped into memory.

Layout. For each shard of the data two files, named by the shard and the hash of its content list:

    NAME.audio   int16 samples of all clips, one after the other
    NAME.json    keys, lengths and labels; written last, so that its presence says the part is whole

A killed preparation repeats at most one part, data that is added later costs only itself, and different filters by
labels share the same parts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from dasheng_tokenizer.errors import DataError
from dasheng_tokenizer.files import atomic_path, parse_json
from dasheng_tokenizer.spectral import SAMPLING_RATE
from dasheng_tokenizer.training.clips import Shard, SkipReport, decoded_clips, find_shards
from dasheng_tokenizer.training.semantic_cache import FULL_SCALE, to_int16

STORE_VERSION = 1

Samples = npt.NDArray[np.float32]

_log = logging.getLogger(__name__)


class ClipStore:
    """Clips of some sources that pass a filter, in a fixed order; samples stay on disk until they are asked for.

    Attributes:
        keys: of the clips.
        labels: of the clips, as their JSON files hold them.
        num_samples: int64 (clips,).
    """

    def __init__(self, folder: Path, names: Sequence[str], where: Mapping[str, Any] | None = None) -> None:
        """Open parts that `prepare_clips` wrote.

        Args:
            folder: that they are in.
            names: of the parts.
            where: labels that a clip must have, see `matches`.

        Raises:
            DataError: a damaged part, or no clip that passes.
        """
        self.keys: list[str] = []
        self.labels: list[dict[str, Any]] = []
        self._files: list[tuple[Path, int]] = []
        self._maps: dict[int, npt.NDArray[np.int16]] = {}
        rows: list[tuple[int, int, int]] = []  # part, first sample, samples
        report, seen = SkipReport(), 0
        for number, name in enumerate(names):
            held = _read(folder / f"{name}.json")
            for key, reason in held["skipped"].items():
                report.add(key, reason)
            first = 0
            for clip in held["clips"]:
                seen += 1
                if matches(clip["labels"], where or {}):
                    rows.append((number, first, clip["samples"]))
                    self.keys.append(clip["key"])
                    self.labels.append(clip["labels"])
                first += clip["samples"]
            self._files.append((folder / f"{name}.audio", first))
            _check_size(*self._files[-1])
        if not rows:
            missing = f"none of {seen} clips has {dict(where)}" if where and seen else "the data holds no clips"
            raise DataError(missing + (f"; {report.summary()}" if report else ""))
        self.skipped = report
        self._part, self._first, self.num_samples = np.array(rows, dtype=np.int64).T
        self._ends = np.cumsum(self.num_samples)

    def __len__(self) -> int:
        return len(self.keys)

    def __getstate__(self) -> dict[str, Any]:
        """For processes that load batches: maps are opened anew there, and not copied."""
        return {**self.__dict__, "_maps": {}}

    @property
    def hours(self) -> float:
        """Of all clips together."""
        return float(self._ends[-1]) / SAMPLING_RATE / 3600

    def audio(self, clip: int, start: int = 0, samples: int | None = None) -> Samples:
        """Samples of a clip from `start` on, all of them or at most so many; float32 at full scale 1."""
        first, whole = int(self._first[clip]), int(self.num_samples[clip])
        stop = whole if samples is None else min(whole, start + samples)
        number = int(self._part[clip])
        if number not in self._maps:
            path, length = self._files[number]
            self._maps[number] = np.memmap(path, np.int16, "r", shape=(length,))
        held = self._maps[number][first + start : first + stop]
        return held.astype(np.float32) / np.float32(FULL_SCALE)

    def at(self, place: int) -> tuple[int, int]:
        """Clip and sample of a place in all clips, one after the other; 0 ≤ place < `total`."""
        clip = int(np.searchsorted(self._ends, place, side="right"))
        return clip, place - int(self._ends[clip] - self.num_samples[clip])

    @property
    def total(self) -> int:
        """Samples of all clips together."""
        return int(self._ends[-1])


def prepare_clips(
    sources: Sequence[str],
    folder: str | Path,
    where: Mapping[str, Any] | None = None,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = True,
) -> ClipStore:
    """Decode sources once, as far as that was not done before, and open those of their clips that pass a filter.

    Several processes share the parts among them, and each returns when all parts are there.

    Args:
        sources: shards, files, folders, globs or ranges, see `training.clips.find_shards`.
        folder: of the store; other sources may share it.
        where: labels that a clip must have, see `matches`.
        rank: of this process.
        world_size: number of processes that share the work.
        progress: show a bar where there is a terminal.

    Raises:
        DataError: sources that match nothing, or no clip that can be used and passes.
        OutputError: the store cannot be written.
    """
    folder = Path(folder)
    shards = find_shards(sources)
    names = [_part_name(shard) for shard in shards]
    pairs = dict(zip(names, shards, strict=True))  # a shard named twice is one
    todo = [(name, shard) for name, shard in pairs.items() if not (folder / f"{name}.json").exists()]
    shown = None if progress and rank == 0 and todo else True  # None: only on a terminal
    with tqdm(todo[rank::world_size], desc="decoding clips", unit=" shards", disable=shown) as bar:
        for name, shard in bar:
            _write_part(shard, folder, name)
    while world_size > 1 and not all((folder / f"{name}.json").exists() for name in pairs):
        time.sleep(0.2)
    store = ClipStore(folder, list(pairs), where)
    if store.skipped and rank == 0:
        _log.warning(store.skipped.summary())
    return store


def matches(labels: Mapping[str, Any], where: Mapping[str, Any]) -> bool:
    """Whether a clip has every label of a filter.

    Args:
        labels: of the clip; a group named `labels` in it counts as if its labels stood beside it.
        where: label → value, or list of values any of which will do; compared as text.
    """
    inner = labels.get("labels")
    known = {**(inner if isinstance(inner, Mapping) else {}), **labels}
    for name, value in where.items():
        wanted = value if isinstance(value, (list, tuple)) else [value]
        if name not in known or str(known[name]) not in map(str, wanted):
            return False
    return True


def _part_name(shard: Shard) -> str:
    """Names and sizes alone would not tell clean from noisy recordings, which share both: some content counts too."""
    content = json.dumps([STORE_VERSION, shard.identity(), [_middle(file) for file in shard.files]])
    return f"{shard.path.name.split('.')[0]}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def _middle(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(path.stat().st_size // 2)
        return hashlib.sha256(file.read(4096)).hexdigest()


def _write_part(shard: Shard, folder: Path, name: str) -> None:
    report = SkipReport()
    clips: list[dict[str, Any]] = []
    with atomic_path(folder / f"{name}.audio") as path, path.open("wb") as file:
        for clip in decoded_clips(shard, report):
            audio = to_int16(clip.audio)
            file.write(audio.tobytes())
            clips.append({"key": clip.key, "samples": len(audio), "labels": clip.labels})
    with atomic_path(folder / f"{name}.json") as path:
        path.write_text(json.dumps({"clips": clips, "skipped": report.skipped}), encoding="utf-8")


def _check_size(path: Path, samples: int) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; delete its folder, it is made again") from error
    if size != 2 * samples:
        raise DataError(f"{path} has {size} bytes instead of {2 * samples}; delete its folder, it is made again")


def _read(path: Path) -> dict[str, Any]:
    try:
        held: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"), finite=False)
        held["clips"], held["skipped"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is missing or damaged; delete its folder, it is made again") from error
    return held
