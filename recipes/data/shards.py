"""Clips as files, and files as WebDataset shards with a manifest."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from decoding import SAMPLING_RATE, Samples

from dasheng_tokenizer.files import atomic_path

Row = dict[str, Any]

SHARD_BYTES = 24 << 20
OPUS_BITS = 48_000
# libsndfile maps 0 … 1 to 256 … 6 kbit/s a channel.
_OPUS_LEVEL = (256_000 - OPUS_BITS) / 250_000
_MEMBER_FIELDS = ("key", "domain", "subset", "split", "duration_s", "group", "labels", "caption", "notes")
_SPLIT_ORDER = {"test": 0, "valid": 1, "train": 2}


def encoded(audio: Samples, split: str) -> tuple[str, bytes]:
    """Format and bytes of a clip: FLAC (16 bit) in a test split, Ogg Opus (48 kbit/s, variable) elsewhere.

    One codec for all domains keeps the codec from telling the domain.
    """
    file = io.BytesIO()
    if split == "test":
        soundfile.write(file, audio, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
        return "flac", file.getvalue()
    soundfile.write(
        file, audio, SAMPLING_RATE, format="OGG", subtype="OPUS", compression_level=_OPUS_LEVEL, bitrate_mode="VARIABLE"
    )
    return "opus", file.getvalue()


def fingerprints(audio: Samples) -> tuple[str, str]:
    """What equals in exact copies, and in copies of another level of compression: length and coarse level curve."""
    exact = hashlib.sha256((audio * 32767).round().astype(np.int16).tobytes()).hexdigest()[:16]
    powers = [float(np.mean(part**2)) for part in np.array_split(audio, 12) if len(part)]
    levels = [round(10 * np.log10(max(power, 1e-9)) / 2) for power in powers]
    return exact, f"{round(len(audio) / SAMPLING_RATE, 2)}:{','.join(map(str, levels))}"


def without_copies(listed: list[Row], ruled: list[Row]) -> tuple[list[Row], int]:
    """The clips of rules that are no copies of a listed one or of each other, the test copy kept before the others."""
    seen = {mark for row in listed for mark in marks(row)}
    kept = []
    for row in sorted(ruled, key=lambda row: (_SPLIT_ORDER[row["split"]], row["source_package"], row["file"])):
        if seen.isdisjoint(marks(row)):
            kept.append(row)
        seen.update(marks(row))
    return kept, len(ruled) - len(kept)


def marks(row: Row) -> set[tuple[str, str]]:
    """Fingerprints of a clip, within its domain."""
    return {(row["domain"], row["exact"]), (row["domain"], row["curve"])}


def numbered(rows: list[Row], prefix: str) -> list[Row]:
    """Give clips keys and shards: mixed order that does not hang on the machine, shards of at most 24 MiB."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    result = []
    for row in sorted(rows, key=lambda row: hashlib.sha256(row["file"].encode()).hexdigest()):
        name = f"{prefix}{row['domain']}-{row['split']}"
        size = Path(row["file"]).stat().st_size + 4096  # headers, labels and padding in the tar
        number = (sizes[name] + size) // (SHARD_BYTES - (1 << 20))
        result.append(row | {"key": f"{name}-{counts[name]:05d}", "shard": f"{name}-{number:03d}.tar"})
        counts[name] += 1
        sizes[name] += size
    return result


def write_shards(rows: Iterable[Row], output: Path) -> None:
    """Write the shards and `manifest.jsonl`; shards that are there are kept, the manifest comes last.

    Raises:
        OutputError: something cannot be written.
    """
    shards: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["key"]):
        shards[row["shard"]].append(row)
    for name, members in shards.items():
        digest = hashlib.sha256("".join(row["key"] + row["exact"] for row in members).encode()).hexdigest()[:16]
        stamp = output / ".stamps" / f"{name}.{digest}"
        if stamp.is_file() and (output / name).is_file():
            continue
        with atomic_path(output / name) as temporary, tarfile.open(temporary, "w") as tar:
            for row in members:
                _add(tar, f"{row['key']}.{row['format']}", Path(row["file"]).read_bytes())
                fields = {key: row[key] for key in _MEMBER_FIELDS if key in row}
                _add(tar, f"{row['key']}.json", json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode())
        with atomic_path(stamp):
            pass
    with atomic_path(output / "manifest.jsonl") as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in (row for members in shards.values() for row in members):
            public = {key: value for key, value in row.items() if key not in ("file", "exact", "curve")}
            file.write(json.dumps(public, ensure_ascii=False) + "\n")


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # its time stays 0, so that equal clips make equal shards
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def manifest(folder: Path) -> Iterator[Row]:
    """The rows of a corpus."""
    with (folder / "manifest.jsonl").open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
