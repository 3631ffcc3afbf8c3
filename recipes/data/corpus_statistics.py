"""Statistics of a corpus, measured on its shards."""

from __future__ import annotations

import io
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
from decoding import SAMPLING_RATE, Samples
from shards import manifest
from tqdm import tqdm

Row = dict[str, Any]


def shipped_audio(folder: Path, rows: list[Row]) -> Iterator[tuple[Row, Samples]]:
    """Rows with their decoded audio at 16 kHz, shard by shard."""
    shards: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        shards[row["shard"]].append(row)
    for name, members in sorted(shards.items()):
        with tarfile.open(folder / name) as tar:
            for row in members:
                data = tar.extractfile(f"{row['key']}.{row['format']}")
                assert data is not None
                audio, rate = soundfile.read(io.BytesIO(data.read()), dtype="float32")
                yield row, soxr.resample(audio, rate, SAMPLING_RATE) if rate != SAMPLING_RATE else audio


def level_dbfs(audio: Samples) -> float:
    """Root mean square in dB below full scale, at least -120."""
    return float(10 * np.log10(max(float(np.mean(np.square(audio, dtype=np.float64))), 1e-12)))


def measure(folder: Path) -> dict[str, Any]:
    """Clips, hours and mean level of every part, domain, subset and split; hours of every part, domain and package."""
    rows = list(manifest(folder))
    groups: dict[tuple[str, ...], list[tuple[float, float]]] = defaultdict(list)
    packages: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    languages: dict[str, float] = defaultdict(float)
    for row, audio in tqdm(shipped_audio(folder, rows), total=len(rows), unit="clip", desc="statistics"):
        hours = len(audio) / SAMPLING_RATE / 3600
        part = row.get("part", "corpus")
        groups[part, row["domain"], row["subset"], row["split"]].append((hours, level_dbfs(audio)))
        packages[part, row["source_package"], row["license"]].append(hours)
        if part != "augmented" and row["labels"].get("language"):
            languages[row["labels"]["language"]] += hours
    hours_of: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for (part, domain, _, _), values in groups.items():
        hours_of[part][domain] += sum(hours for hours, _ in values)
    return {
        "clips": len(rows),
        "hours": {
            part: {name: round(value, 4) for name, value in sorted(domains.items())}
            for part, domains in hours_of.items()
        },
        "groups": [
            dict(zip(("part", "domain", "subset", "split"), key, strict=True))
            | {
                "clips": len(values),
                "hours": round(sum(hours for hours, _ in values), 4),
                "level_dbfs": round(float(np.mean([level for _, level in values])), 2),
            }
            for key, values in sorted(groups.items())
        ],
        "packages": [
            {"part": key[0], "package": key[1], "license": key[2], "clips": len(hours), "hours": round(sum(hours), 4)}
            for key, hours in sorted(packages.items())
        ],
        "hours_of_language": {name: round(value, 4) for name, value in sorted(languages.items())},
    }
