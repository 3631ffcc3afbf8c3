"""A suite of probe tasks over a corpus of tar shards, described by three files beside the shards.

    tasks.json       tasks: label, classes, and which clips of each split take part
    manifest.jsonl   one row a clip: key, shard, domain, subset, split, labels, notes
    mixtures.jsonl   recipes of mixtures of voices over a background, mixed when they are embedded (optional)

Clips are embedded once for each (domain, split), whatever number of tasks asks for them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dasheng_tokenizer.errors import DataError
from dasheng_tokenizer.evaluation.embedding_store import Split
from dasheng_tokenizer.evaluation.probe import Fold, SuiteTask
from dasheng_tokenizer.evaluation.probe_tasks import Event, Example, Label, ProbeTask, Samples
from dasheng_tokenizer.files import parse_json
from dasheng_tokenizer.spectral import SAMPLING_RATE
from dasheng_tokenizer.training.clips import SkipReport, find_shards, read_clips

ROLES = ("train", "valid", "test")

EPOCHS = 50
"""Five times those of X-ARES: these tasks have some hundred clips, hers many thousand."""

FRAME_BATCH = 8
"""Clips of 10 s a batch of the frame head."""

SAME_LENGTH_SECONDS = 1.0
"""Clips of tasks across domains are cut to their first second: their lengths would tell the domain."""

VOICE_LEVEL_DBFS = -26.0
"""RMS that voices and background of a mixture have before their gains."""


class CorpusSuite:
    """The tasks of a corpus folder."""

    def __init__(self, folder: str | Path) -> None:
        """Read the descriptions.

        Raises:
            DataError: a file is missing or damaged.
        """
        self.folder = Path(folder)
        self.rows = {row["key"]: row for row in _read_lines(self.folder / "manifest.jsonl")}
        mixtures = self.folder / "mixtures.jsonl"
        self.mixtures = _read_lines(mixtures) if mixtures.is_file() else []
        self.tasks = _read(self.folder / "tasks.json").get("tasks", [])
        self._identities: dict[str, str] = {}

    def suite(self) -> list[SuiteTask]:
        """All tasks, in the order of the file."""
        return [self._task(row) for row in self.tasks]

    def _task(self, row: dict[str, Any]) -> SuiteTask:
        name = row["name"]
        if row.get("source"):
            return self._mixture_task(row)
        frame = row["level"] == "frame"
        labels = {role: self._labels(row, role) for role in ROLES}
        crop = SAME_LENGTH_SECONDS if row["domain"] == "all" else None
        train, valid, test = (self._splits(labels[role], crop, frame) for role in ROLES)
        task = ProbeTask(
            name,
            row["domain"],
            "frame" if frame else "clip",
            "note_frame_f1" if frame else "macro_accuracy" if _is_macro(row) else "accuracy",
            classes=_pitches() if frame else tuple(map(str, row["classes"])),
            epochs=EPOCHS,
            batch_size=FRAME_BATCH if frame else 32,
            weight=0.0 if row.get("strength") == "weak" else 1.0,  # too few test clips to count in an average
        )
        return SuiteTask(task, [Fold(train, valid, test)], lambda role, key, _: labels[role][key])

    def _labels(self, row: dict[str, Any], role: str) -> dict[str, Label]:
        """Labels of the clips that take part in a role of a task."""
        filters = row["filters"][role]
        found: dict[str, Label] = {}
        for key, clip in self.rows.items():
            if not all(_matches(_field(clip, name), wanted) for name, wanted in filters.items()):
                continue
            label = _field(clip, row["label"])
            if row["level"] == "frame":
                found[key] = tuple(Event(on, off, str(pitch)) for on, off, pitch in label or ())
            elif label in row["classes"]:
                found[key] = str(label)
        if not found:
            raise DataError(f"{row['name']}: no clip of {self.folder}/manifest.jsonl matches its {role} filter")
        return found

    def _splits(self, labels: dict[str, Label], crop: float | None, frames: bool) -> list[Split]:
        domains = sorted({(self.rows[key]["domain"], self.rows[key]["split"]) for key in labels})
        return [self._split(f"{domain}-{split}", crop, frames) for domain, split in domains]

    def _split(self, stem: str, crop: float | None, frames: bool) -> Split:
        """All clips of one domain and split."""

        def examples(skipped: dict[str, str]) -> Iterator[Example]:
            report = SkipReport(skipped)
            for clip in read_clips([str(self.folder / f"{stem}-*.tar")], report):
                audio = clip.audio if crop is None else clip.audio[: round(crop * SAMPLING_RATE)]
                yield Example(clip.key, audio, None)

        cut = "" if crop is None else f", first {crop:g} s"
        return Split(f"{stem}{cut}", f"{self._identity(stem)}{cut}", examples, frames)

    def _identity(self, stem: str) -> str:
        if stem not in self._identities:
            shards = find_shards([str(self.folder / f"{stem}-*.tar")])
            held = json.dumps([shard.identity() for shard in shards])
            self._identities[stem] = hashlib.sha256(held.encode()).hexdigest()
        return self._identities[stem]

    # ------------------------------------------------------------------------------------------ mixtures

    def _mixture_task(self, row: dict[str, Any]) -> SuiteTask:
        if not self.mixtures:
            raise DataError(f"{row['name']} needs {self.folder / row['source']}, which is not there")
        labels = {mixture["key"]: str(mixture[row["label"]]) for mixture in self.mixtures}
        task = ProbeTask(row["name"], row["domain"], "clip", "accuracy", tuple(map(str, row["classes"])), EPOCHS)
        train, valid, test = ([self._mixture_split(role)] for role in ROLES)
        return SuiteTask(task, [Fold(train, valid, test)], lambda _, key, __: labels[key])

    def _mixture_split(self, role: str) -> Split:
        recipes = [mixture for mixture in self.mixtures if mixture["split"] == role]
        stems = sorted({_stem(key) for recipe in recipes for key in _parts(recipe)})
        held = json.dumps([recipes, [self._identity(stem) for stem in stems]])

        def examples(skipped: dict[str, str]) -> Iterator[Example]:
            wanted = {key for recipe in recipes for key in _parts(recipe)}
            sources = [str(self.folder / f"{stem}-*.tar") for stem in stems]
            clips = {clip.key: clip.audio for clip in read_clips(sources, SkipReport()) if clip.key in wanted}
            for recipe in recipes:
                if missing := sorted(_parts(recipe) - clips.keys()):
                    skipped[recipe["key"]] = f"its part {missing[0]} is missing or broken"
                    continue
                yield Example(recipe["key"], mix(recipe, clips), None)

        return Split(f"mixtures, {role}", hashlib.sha256(held.encode()).hexdigest(), examples)


def mix(recipe: dict[str, Any], clips: dict[str, Samples]) -> Samples:
    """A mixture, (samples,): voices at their onsets over a background that is looped or cut to its length.

    Each part is brought to -26 dBFS RMS and then given its gain.

    Args:
        recipe: row of `mixtures.jsonl`: `length_s`, `voices` with `key`, `onset_s` and `gain_db`, `background` or null.
        clips: audio of the parts by key, 16 kHz.
    """
    mixture = np.zeros(round(recipe["length_s"] * SAMPLING_RATE), np.float32)
    for voice in recipe["voices"]:
        first = round(voice["onset_s"] * SAMPLING_RATE)
        audio = _at_level(clips[voice["key"]], voice["gain_db"])[: max(0, len(mixture) - first)]
        mixture[first : first + len(audio)] += audio
    if background := recipe.get("background"):
        mixture += np.resize(_at_level(clips[background["key"]], background["gain_db"]), len(mixture))
    return mixture


def _at_level(audio: Samples, gain_db: float) -> Samples:
    level = 10 ** ((VOICE_LEVEL_DBFS + gain_db) / 20)
    scaled: Samples = audio * np.float32(level / max(float(np.sqrt(np.mean(audio**2))), 1e-9))
    return scaled


def _parts(recipe: dict[str, Any]) -> set[str]:
    background = recipe.get("background")
    return {voice["key"] for voice in recipe["voices"]} | ({background["key"]} if background else set())


def _stem(key: str) -> str:
    """`speech-train` of `speech-train-00123`."""
    return key.rpartition("-")[0]


def _pitches() -> tuple[str, ...]:
    """The 88 keys of a piano as MIDI note numbers."""
    return tuple(str(pitch) for pitch in range(21, 109))


def _is_macro(row: dict[str, Any]) -> bool:
    """Whether the accuracy is averaged over classes: the task says so, or its classes are very unequal in size."""
    return str(row["metric"]).startswith("macro") or row["domain"] == "all"


def _field(row: dict[str, Any], name: str) -> Any:
    """A field of a manifest row by its dotted name; None where it is absent."""
    held: Any = row
    for part in name.split("."):
        held = held.get(part) if isinstance(held, dict) else None
    return held


def _matches(value: Any, wanted: Any) -> bool:
    if wanted == "*":
        return value is not None
    return value in wanted if isinstance(wanted, list) else value == wanted


def _read(path: Path) -> Any:
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is missing or damaged; a corpus has tasks.json and manifest.jsonl") from error


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [parse_json(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is missing or damaged; a corpus has tasks.json and manifest.jsonl") from error
