"""Two corpora clip by clip: what is missing, how far lengths, levels and spectra are apart."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from corpus_statistics import level_dbfs, shipped_audio
from shards import manifest
from tqdm import tqdm

from dasheng_tokenizer.evaluation.report import Table

MOST_SECONDS, MOST_LEVEL_DB = 0.001, 0.5


def compare(folder: Path, shipped: Path) -> int:
    """Print where the corpus parts of both differ.

    Returns:
        0 if both have the same clips, none differs in length by over 1 ms, and in every subset and split the mean level
        differs by at most 0.5 dB; otherwise 1.
    """
    ours = {row["key"]: row for row in manifest(folder) if row.get("part", "corpus") == "corpus"}
    theirs = {row["key"]: row for row in manifest(shipped)}
    for name, keys in (("missing", theirs.keys() - ours.keys()), ("not in the shipped corpus", ours.keys() - theirs.keys())):
        if keys:
            print(f"{len(keys)} clips {name}: {', '.join(sorted(keys)[:10])}")
    both = sorted(ours.keys() & theirs.keys(), key=lambda key: (theirs[key]["shard"], key))
    ours_read = shipped_audio(folder, [ours[key] for key in both])
    theirs_read = shipped_audio(shipped, [theirs[key] for key in both])
    groups: dict[tuple[str, ...], list[tuple[float, ...]]] = defaultdict(list)
    for (row, audio), (_, other) in tqdm(zip(ours_read, theirs_read, strict=True), total=len(both), unit="clip"):
        apart = abs(len(audio) - len(other)) / 16_000
        size = min(len(audio), len(other))
        norm = float(np.linalg.norm(audio[:size]) * np.linalg.norm(other[:size])) or 1.0
        likeness = float(np.dot(audio[:size], other[:size])) / norm
        values = (len(audio) / 16_000, len(other) / 16_000, level_dbfs(audio), level_dbfs(other), apart, likeness)
        groups[row["domain"], row["subset"], row["split"]].append(values)
    table, equal = _table(groups)
    print(table.markdown())
    missing = ours.keys() != theirs.keys()
    print("The statistics are equal." if equal and not missing else "The statistics differ.")
    return 0 if equal and not missing else 1


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
