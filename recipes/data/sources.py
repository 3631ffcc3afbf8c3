"""Clips of one package: which they are, and their audio."""

from __future__ import annotations

import hashlib
import json
import lzma
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from decoding import SAMPLING_RATE, Samples, decode, trim_silence
from instruments import SOUND_FONT, SoundFontPlayer

from dasheng_tokenizer.errors import AudioFileError, DataError

Row = dict[str, Any]

MIN_SECONDS, PADDED_SECONDS, SHORTEST_PADDED = 0.3, 0.35, 0.06
QUIETEST_DBFS = -54.0
SHORTEST_MUSIC = 3.0
WINDOW_SECONDS = 20.0
EVENT_SECONDS = 10.0
SPLITS = (("test", 0.1), ("valid", 0.05))


def listed_rows(path: Path) -> list[Row]:
    """The clips of the corpus, from its list."""
    return [json.loads(line) for line in lzma.decompress(path.read_bytes()).decode().splitlines()]


def package_of(row: Row) -> str:
    """The package that a listed clip's file, or its notes, come from."""
    return str(row.get("also_from", row["source_package"]))


def listed_clips(rows: list[Row], folder: Path, sound_font: Path | None) -> Iterator[tuple[Row, Samples]]:
    """Audio of listed clips of one package, as the list says.

    Args:
        rows: Rows with `first_sample` (files) or `notes`.
        folder: The unpacked package.
        sound_font: Folder of the unpacked sound font, where clips are rendered.
    """
    rows = sorted(rows, key=lambda row: row["source_path"])
    if rows[0]["domain"] == "instrument":
        if sound_font is None:
            raise DataError("rendered clips need the package of the sound font; add it to the list of packages")
        with SoundFontPlayer(sound_font / SOUND_FONT) as player:
            for row in rows:
                yield _public(row), _rendered(row, player, folder)
        return
    read, audio = "", np.zeros(0, np.float32)
    for row in rows:
        if row["source_path"] != read:
            read, audio = row["source_path"], decode(folder / row["source_path"])
        length = round(row["duration_s"] * SAMPLING_RATE)
        part = audio[row["first_sample"] :][:length]
        yield _public(row), np.pad(part, (0, length - len(part)))


def _public(row: Row) -> Row:
    return {key: value for key, value in row.items() if key not in ("first_sample", "window_s")}


def _rendered(row: Row, player: SoundFontPlayer, folder: Path) -> Samples:
    seconds = row["duration_s"]
    if row["subset"] == "note":
        return player.note(row["labels"], seconds)
    if "window_s" in row:
        midi = next(folder.rglob(row["source_path"].removeprefix("midi:")))
        return player.piece(midi, row["window_s"], seconds)
    return player.notes(row["notes"], row["labels"]["programs"], seconds)


def load_rules(path: Path) -> list[Row]:
    """The rules by which further packages give clips.

    Raises:
        DataError: the file cannot be read, or a rule lacks a field.
    """
    of_files = {"package", "files", "domain", "subset", "license", "caption", "labels", "group", "split"}
    rules = yaml.safe_load(path.read_text(encoding="utf-8"))
    for rule in rules:
        if missing := ({"package", "license"} if "sound_font" in rule else of_files) - rule.keys():
            raise DataError(f"a rule of {path} for {rule.get('package')} lacks {', '.join(sorted(missing))}")
    return rules


def rerendered_notes(rule: Row, folder: Path, corpus: list[Row]) -> Iterator[tuple[Row, Samples]]:
    """The single notes of the corpus, played with the sound font of another package; programs keep their side."""
    with SoundFontPlayer(folder / rule["sound_font"]) as player:
        for row in corpus:
            if row["subset"] == "note":
                changes = {"source_package": rule["package"], "license": rule["license"]}
                labels = row["labels"] | {"sound_font": rule["package"]}
                public = {key: value for key, value in row.items() if key not in ("key", "shard", "format")}
                audio = player.note(row["labels"], row["duration_s"])
                if np.mean(audio**2) > 10 ** (QUIETEST_DBFS / 10):
                    yield public | changes | {"labels": labels}, audio


def split_of(rule: Row, group: str, known: dict[str, str]) -> str:
    """Split of a group: that of the corpus where it is in it, the rule's, or by a hash of the group's name."""
    if group in known:
        return known[group]
    if rule["split"] != "by-group":
        return str(rule["split"])
    place = int(hashlib.sha256(group.encode()).hexdigest()[:8], 16) / 0xFFFFFFFF
    for name, share in SPLITS:
        if place < share:
            return name
        place -= share
    return "train"


def ruled_clips(
    rule: Row, folder: Path, taken: set[tuple[str, int]], known: dict[str, str]
) -> Iterator[tuple[Row, Samples]]:
    """Clips of the files that a rule names.

    Args:
        rule: One of `load_rules`.
        folder: The unpacked package.
        taken: (path, second) of windows that the corpus has; windows that overlap them are left out.
        known: Split of every group of the corpus.
    """
    pattern, skip = re.compile(rule["files"]), re.compile(rule.get("skip", r"(?!)"))
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    for name in names:
        match = pattern.fullmatch(name)
        if match is None or skip.search(name) or (folder / name).is_symlink():
            continue
        try:
            audio = decode(folder / name)
        except AudioFileError:
            continue  # a file of that name that holds no audio
        for start, part, padded in cut(rule, audio, {second for path, second in taken if path == name}):
            yield _ruled_row(rule, match, name, start, part, padded, known), part


def _ruled_row(
    rule: Row, match: re.Match[str], name: str, start: float, part: Samples, padded: bool, known: dict[str, str]
) -> Row:
    fields = {key: value or "" for key, value in match.groupdict().items()} | {"stem": Path(name).stem}
    group = rule["group"].format(**fields)
    labels = {key: value.format(**fields) if isinstance(value, str) else value for key, value in rule["labels"].items()}
    row = {
        "domain": rule["domain"],
        "subset": rule["subset"],
        "split": split_of(rule, group, known),
        "duration_s": round(len(part) / SAMPLING_RATE, 4),
        "source_package": rule["package"],
        "source_path": name,
        "license": rule["license"],
        "group": group,
        "labels": labels,
        "caption": rule["caption"].format(**fields),
        "start_s": round(start, 3),
    }
    return row | ({"padded": True} if padded else {})


def cut(rule: Row, audio: Samples, taken: set[int]) -> Iterator[tuple[float, Samples, bool]]:
    """Pieces of a file that are loud and long enough: (second, samples, whether silence was added)."""
    shortest = {"sound": SHORTEST_PADDED, "music": SHORTEST_MUSIC}.get(rule["domain"], MIN_SECONDS)
    for begin, end in _bounds(rule, *trim_silence(audio)):
        part, second = audio[begin:end], begin / SAMPLING_RATE
        if len(part) < shortest * SAMPLING_RATE or any(abs(second - other) < WINDOW_SECONDS for other in taken):
            continue
        if 10 * np.log10(max(float(np.mean(part**2)), 1e-12)) < QUIETEST_DBFS:
            continue
        short = len(part) < MIN_SECONDS * SAMPLING_RATE
        padding = max(0, round(PADDED_SECONDS * SAMPLING_RATE) - len(part)) if short else 0
        yield second, np.pad(part, (0, padding)), short


def _bounds(rule: Row, first: int, last: int) -> list[tuple[int, int]]:
    """Music in windows of 20 s, speech that is longer than that in equal parts, of a sound the first 10 s."""
    window = round(WINDOW_SECONDS * SAMPLING_RATE)
    parts = max(1, -(-(last - first) // window))
    if rule["domain"] == "sound":
        return [(first, min(last, first + round(EVENT_SECONDS * SAMPLING_RATE)))]
    if rule["domain"] == "music":
        edges = [first + index * window for index in range(min(parts, rule.get("windows", parts)))]
        return [(edge, min(last, edge + window)) for edge in edges]
    equal = np.linspace(first, last, parts + 1).round().astype(int).tolist()
    return list(zip(equal[:-1], equal[1:], strict=True))
