"""Generated and real clips: what was asked for, what is wrong with them, and which belong together.

A folder of generated audio may hold `generated.jsonl`, one JSON object a clip:

    {"file": "kick 3.wav", "text": "a bass drum", "seed": 3, "labels": {"drum": "kick"}, "reference": "sound-00012"}

`file` is the path below the folder; everything else is optional. `text` is what was asked for (in real data `caption`),
`labels` what the clip should be recognised as, `reference` the key of the real clip it answers to, where names differ.
Labels may also stand outside of `labels`. Shards and folders without the file have the same fields in a JSON file
beside each clip; where both have a field, that of `generated.jsonl` counts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dasheng_tokenizer.audio import READ_SUFFIXES
from dasheng_tokenizer.cli_paths import DECODED, RECONSTRUCTED
from dasheng_tokenizer.errors import AudioError, AudioFileError, DataError
from dasheng_tokenizer.evaluation.embedding_store import Split
from dasheng_tokenizer.evaluation.probe_tasks import Example
from dasheng_tokenizer.files import atomic_path, parse_json, write_text
from dasheng_tokenizer.spectral import SAMPLING_RATE
from dasheng_tokenizer.training.clips import EncodedClip, SkipReport, encoded_clips, find_shards

MANIFEST = "generated.jsonl"

SILENCE = 1e-3
"""Peak below which a clip is called silent: -60 dB of full scale."""


@dataclass(frozen=True, eq=False)
class ClipFacts:
    """What is known of a clip without its samples.

    Attributes:
        key: names it within its set.
        pair: key that its partner in another set has, too.
        labels: of its JSON file and its line of `generated.jsonl`.
        digest: of the file.
        seconds: 0 where it cannot be read.
        silent: its peak is below `SILENCE`.
        problem: why it cannot be used (damaged, NaN), or None.
    """

    key: str
    pair: str
    labels: dict[str, Any]
    digest: str
    seconds: float = 0.0
    silent: bool = False
    problem: str | None = None

    @property
    def text(self) -> str | None:
        """What was asked for; of several captions the first."""
        held = self.labels.get("text") or self.labels.get("caption")
        held = held[0] if isinstance(held, list) and held else held
        return held if isinstance(held, str) and held.strip() else None

    def label(self, name: str) -> str | None:
        """A label as text, from the fields or from `labels` among them; None where it is absent or a list."""
        inner = self.labels.get("labels")
        held = self.labels.get(name)
        if held is None and isinstance(inner, Mapping):
            held = inner.get(name)
        return str(held) if isinstance(held, (str, int, float)) and str(held).strip() else None


@dataclass
class ClipSet:
    """Clips of folders, files and tar shards, read once to see what they are.

    Args:
        name: for tables.
        sources: as in `training.clips.find_shards`.

    Attributes:
        clips: facts by key, in the order of reading.
        failures: whatever could not be used, clips and shards and lines of `generated.jsonl`, with reasons.

    Raises:
        DataError: nothing to read, or a `generated.jsonl` that is none.
    """

    name: str
    sources: Sequence[str | Path]
    clips: dict[str, ClipFacts] = field(init=False, default_factory=dict)
    failures: dict[str, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Read every clip once."""
        folders = [Path(source) for source in self.sources if (Path(source) / MANIFEST).is_file()]
        asked = {(folder, key): row for folder in folders for key, row in read_manifest(folder).items()}
        report, found = SkipReport(self.failures), set()
        for key, root, clip in tqdm(self._encoded(report), desc=f"reading {self.name}", delay=1, disable=None):
            found.add((root, clip.key))
            facts = _facts(key, clip, asked.get((root, clip.key), {}))
            self.clips[key] = facts
            if facts.problem:
                report.add(key, facts.problem)
        for folder, key in asked.keys() - found:
            report.add(key, f"{folder / MANIFEST} names it, but it is not there")
        if not self.clips:
            raise DataError(f"{self.name}: no clip to measure{f'; {report.summary()}' if report else ''}")

    @property
    def usable(self) -> dict[str, ClipFacts]:
        """Those that can be embedded."""
        return {key: facts for key, facts in self.clips.items() if facts.problem is None}

    def split(self) -> Split:
        """For the embedding store; known by the contents of its files: generated ones often differ in nothing else."""
        held = [[key, facts.digest] for key, facts in self.clips.items()]
        identity = hashlib.sha256(json.dumps(held).encode()).hexdigest()
        return Split(self.name, identity, lambda skipped: self.examples(self.usable))

    def examples(self, keys: Iterable[str]) -> Iterator[Example]:
        """Some clips, decoded to 16 kHz one by one, in the order of reading."""
        wanted = set(keys)
        for key, _, clip in self._encoded(SkipReport()):
            if key in wanted:
                yield Example(key, clip.decode().audio, None)

    def _encoded(self, report: SkipReport) -> Iterator[tuple[str, Path, EncodedClip]]:
        """Every clip with a key of its own and the folder or shard it is from."""
        seen: dict[str, int] = {}
        for shard in find_shards(self.sources):
            for clip in encoded_clips(shard, report):
                seen[clip.key] = seen.get(clip.key, 0) + 1
                number = seen[clip.key]
                yield clip.key if number == 1 else f"{clip.key} ({number})", shard.path, clip


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """The lines of `generated.jsonl` in a folder, by their `file`.

    Raises:
        DataError: it cannot be read, a line is no JSON object with a `file`, or two lines name one file.
    """
    path = folder / MANIFEST
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # a text may hold other separators, such as U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    rows: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: no JSON ({error}); write one object a line") from error
        if not isinstance(row, dict) or not isinstance(row.get("file"), str):
            raise DataError(f'{path}, line {number}: write an object with "file", the path of a clip below the folder')
        if row["file"] in rows:
            raise DataError(f"{path}, line {number}: {row['file']} is named twice")
        rows[row["file"]] = row
    return rows


def write_manifest(folder: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write `generated.jsonl` into a folder of generated clips, whole or not at all.

    Args:
        folder: that holds the clips.
        rows: `file`, the path below the folder with forward slashes, and any of `text`, `seed`, `labels`, `reference`.

    Raises:
        OutputError: it cannot be written.
    """
    path = folder / MANIFEST
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with atomic_path(path) as temporary:
        write_text(temporary, lines)
    return path


def pairs(generated: ClipSet, real: ClipSet) -> list[tuple[str, str]]:
    """Keys of generated and real clips that belong together; several generated ones may answer to one real clip."""
    known = {facts.pair: key for key, facts in reversed(real.usable.items())}  # of equal names the first
    return [(key, known[facts.pair]) for key, facts in generated.usable.items() if facts.pair in known]


def _facts(key: str, clip: EncodedClip, asked: dict[str, Any]) -> ClipFacts:
    labels = {**clip.labels, **asked}
    pair = _stem(str(labels.get("reference") or key))
    digest = hashlib.sha256(clip.data).hexdigest()
    try:
        audio = clip.decode().audio
    except (AudioError, AudioFileError) as error:
        return ClipFacts(key, pair, labels, digest, problem=str(error))
    peak = float(np.abs(audio).max(initial=0.0))
    return ClipFacts(key, pair, labels, digest, len(audio) / SAMPLING_RATE, peak < SILENCE)


def _stem(key: str) -> str:
    """A key without the suffix of an audio file and without what `reconstruct` and `decode` append."""
    path = Path(key)
    stem = path.with_suffix("") if path.suffix.lower() in READ_SUFFIXES else path
    return stem.as_posix().removesuffix(RECONSTRUCTED).removesuffix(DECODED)
