"""Two corpora clip by clip: what is missing, how far lengths, levels and spectra are apart."""

from __future__ import annotations

import json
import shlex
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from corpus_statistics import level_dbfs, shipped_audio
from decoding import SAMPLING_RATE
from shards import manifest
from tqdm import tqdm

from dasheng_tokenizer.evaluation.report import Report, Table

MOST_SECONDS, MOST_LEVEL_DB = 0.001, 0.5


def compare(folder: Path, shipped: Path, report: Path | None = None) -> int:
    """Print where the corpus parts of both differ.

    Args:
        folder: What was built.
        shipped: What it is compared with.
        report: Where the comparison and the statistics of both are written, for the results page.

    Returns:
        0 if both have the same clips, none differs in length by over 1 ms, and in every subset and split the mean level
        differs by at most 0.5 dB; otherwise 1.
    """
    ours = {row["key"]: row for row in manifest(folder) if row.get("part", "corpus") == "corpus"}
    theirs = {row["key"]: row for row in manifest(shipped)}
    for name, keys in (
        ("missing", theirs.keys() - ours.keys()),
        ("not in the other corpus", ours.keys() - theirs.keys()),
    ):
        if keys:
            print(f"{len(keys)} clips {name}: {', '.join(sorted(keys)[:10])}")
    both = sorted(ours.keys() & theirs.keys(), key=lambda key: (theirs[key]["shard"], key))
    ours_read = shipped_audio(folder, [ours[key] for key in both])
    theirs_read = shipped_audio(shipped, [theirs[key] for key in both])
    groups: dict[tuple[str, ...], list[tuple[float, ...]]] = defaultdict(list)
    for (row, audio), (_, other) in tqdm(zip(ours_read, theirs_read, strict=True), total=len(both), unit="clip"):
        apart = abs(len(audio) - len(other)) / SAMPLING_RATE
        size = min(len(audio), len(other))
        norm = float(np.linalg.norm(audio[:size]) * np.linalg.norm(other[:size])) or 1.0
        likeness = float(np.dot(audio[:size], other[:size])) / norm
        seconds = (len(audio) / SAMPLING_RATE, len(other) / SAMPLING_RATE)
        groups[row["domain"], row["subset"], row["split"]].append(
            (*seconds, level_dbfs(audio), level_dbfs(other), apart, likeness)
        )
    table, equal = _table(groups)
    equal = equal and ours.keys() == theirs.keys()
    print(table.markdown())
    print("The statistics are equal." if equal else "The statistics differ.")
    if report is not None:
        _save(report, table, json.loads((folder / "statistics.json").read_text(encoding="utf-8")))
    return 0 if equal else 1


def _save(path: Path, comparison: Table, statistics: dict[str, Any]) -> None:
    domains = sorted({name for hours in statistics["hours"].values() for name in hours})
    rows: list[list[Any]] = [
        [part, *(f"{hours.get(name, 0):.2f}" for name in domains), f"{sum(hours.values()):.2f}"]
        for part, hours in statistics["hours"].items()
    ]
    splits: list[list[Any]] = [
        [group["part"], group["domain"], group["subset"], group["split"], group["clips"], f"{60 * group['hours']:.1f}"]
        for group in statistics["groups"]
        if group["part"] != "corpus"
    ]
    languages = ", ".join(f"{name} {60 * hours:.0f}" for name, hours in statistics["hours_of_language"].items())
    Report(
        title="Training data",
        command=shlex.join(["python", "recipes/data/build.py", *sys.argv[1:]]),
        data="packages of Debian 12, recipes/data/packages.yaml",
        seed=0,
        tables=[
            Table("Hours of what recipes/data/build.py makes", ["", *domains, "all"], rows),
            Table("Beyond the corpus", ["part", "domain", "subset", "split", "clips", "minutes"], splits),
            comparison,
        ],
        notes=[
            "Rendered pieces differ from the shipped ones: the list of notes does not tell how loud a note is, nor of "
            "generated ones which program plays it.",
            f"Minutes of each language in corpus and wide part: {languages}.",
            f"Clips that the rules gave and that were copies of others: {statistics['copies_left_out']}.",
        ],
        order=8,
    ).save(path)


def _table(groups: dict[tuple[str, ...], list[tuple[float, ...]]]) -> tuple[Table, bool]:
    rows: list[list[Any]] = []
    equal = True
    for key, values in sorted(groups.items()):
        ours, theirs, level, other_level, apart, likeness = np.array(values).T
        difference = float(level.mean() - other_level.mean())
        same = float(apart.max()) <= MOST_SECONDS and abs(difference) <= MOST_LEVEL_DB
        equal = equal and same
        rows.append([
            " ".join(key), len(values), f"{theirs.sum() / 60:.2f}", f"{ours.sum() / 60:.2f}", f"{apart.max():.4f}",
            f"{difference:+.2f}", f"{np.median(likeness):.4f}", "" if same else "differs",
        ])  # fmt: skip
    columns = ["", "clips", "minutes shipped", "minutes here", "largest difference s", "level dB", "correlation", ""]
    caption = "Clips of both; difference of mean levels; median correlation of waveforms"
    return Table(caption, columns, rows), equal
