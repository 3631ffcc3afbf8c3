"""Clips as files, and files as WebDataset shards with a manifest."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
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
    # libsndfile's bit rate of Opus varies unless told otherwise.
    soundfile.write(file, audio, SAMPLING_RATE, format="OGG", subtype="OPUS", compression_level=_OPUS_LEVEL)
    return "opus", file.getvalue()


def fingerprints(audio: Samples) -> tuple[str, list[float]]:
    """What equals in exact copies, and what is close in copies that were compressed: twelve levels in dB."""
    exact = hashlib.sha256((audio * 32767).round().astype(np.int16).tobytes()).hexdigest()[:16]
    powers = [float(np.mean(part**2)) for part in np.array_split(audio, 12) if len(part)]
    return exact, [round(10 * float(np.log10(max(power, 1e-9))), 1) for power in powers]


def without_copies(listed: list[Row], ruled: list[Row]) -> tuple[list[Row], int]:
    """The clips of rules that are no copies of a listed one or of each other, the test copy kept before the others.

    Copies are in the same domain, equally long within 10 ms, and alike: the same samples, or level curves that differ
    by at most 1.5 dB and beginnings whose waveforms correlate by over 0.9.
    """
    seen: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in listed:
        seen[row["domain"], _hundredths(row)].append(row)
    kept = []
    for row in sorted(ruled, key=lambda row: (_SPLIT_ORDER[row["split"]], _shuffled(row))):
        length = _hundredths(row)
        near = [other for hundredths in (length - 1, length, length + 1) for other in seen[row["domain"], hundredths]]
        rendered = row["domain"] == "instrument"  # notes of one length and like envelopes, none of them a copy
        if rendered or not any(_alike(row, other) for other in near):
            kept.append(row)
            seen[row["domain"], length].append(row)
    return kept, len(ruled) - len(kept)


def _hundredths(row: Row) -> int:
    return round(100 * row["duration_s"])


def _alike(row: Row, other: Row) -> bool:
    if row["exact"] == other["exact"]:
        return True
    if np.max(np.abs(np.subtract(row["curve"], other["curve"]))) > 1.5:
        return False
    first, second = _beginning(row["file"]), _beginning(other["file"])
    size = min(len(first), len(second))
    norms = float(np.linalg.norm(first[:size]) * np.linalg.norm(second[:size]))
    return norms > 0 and abs(float(np.dot(first[:size], second[:size]))) / norms > 0.9


@lru_cache(maxsize=1024)
def _beginning(file: str) -> Samples:
    """The first two seconds of a clip, which has no silence before it."""
    with soundfile.SoundFile(file) as sound:
        audio = sound.read(2 * sound.samplerate, dtype="float32")
        return soxr.resample(audio, sound.samplerate, SAMPLING_RATE) if sound.samplerate != SAMPLING_RATE else audio


def numbered(rows: list[Row], prefix: str) -> list[Row]:
    """Give clips keys and shards: mixed order that does not hang on the machine, shards of at most 24 MiB."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    result = []
    for row in sorted(rows, key=_shuffled):
        name = f"{prefix}{row['domain']}-{row['split']}"
        size = Path(row["file"]).stat().st_size + 4096  # headers, labels and padding in the tar
        number = (sizes[name] + size) // (SHARD_BYTES - (1 << 20))
        result.append(row | {"key": f"{name}-{counts[name]:05d}", "shard": f"{name}-{number:03d}.tar"})
        counts[name] += 1
        sizes[name] += size
    return result


def _shuffled(row: Row) -> str:
    """A place in the order that hangs on the clip alone."""
    source = [row["source_package"], row["source_path"], row.get("start_s"), row.get("key"), row["labels"].get("speed")]
    return hashlib.sha256(json.dumps(source).encode()).hexdigest()


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
                add_member(tar, f"{row['key']}.{row['format']}", Path(row["file"]).read_bytes())
                fields = {key: row[key] for key in _MEMBER_FIELDS if key in row}
                add_member(
                    tar, f"{row['key']}.json", json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
                )
        with atomic_path(stamp):
            pass
    with atomic_path(output / "manifest.jsonl") as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in (row for members in shards.values() for row in members):
            public = {key: value for key, value in row.items() if key not in ("file", "exact", "curve")}
            file.write(json.dumps(public, ensure_ascii=False) + "\n")


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Put a file into a tar; equal files make equal tars."""
    member = tarfile.TarInfo(name)  # its time stays 0, so that equal clips make equal shards
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def manifest(folder: Path) -> Iterator[Row]:
    """The rows of a corpus."""
    with (folder / "manifest.jsonl").open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
