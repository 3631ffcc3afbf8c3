"""Lists of clips: a JSON object a line (`.jsonl`), or a row of a Parquet file (`.parquet`), for each clip.

A row has the path or URL of its audio, absolute or relative to the folder of the manifest; or, in Parquet, the audio
itself as {"bytes", "path"}, as data sets on the Hugging Face hub have it. Its captions stand under the key of the
captions, its name under `id` or `key`; all else comes along as labels.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dasheng_tokenizer.errors import DataError, one_line
from dasheng_tokenizer.files import parse_json, require_extra
from dasheng_tokenizer.scale.storage import base_name, folder_of, join, opened, read_bytes
from dasheng_tokenizer.training.clips import EncodedClip, SkipReport

SUFFIXES = (".jsonl", ".parquet")

PATH_KEYS = ("path", "audio", "audio_filepath", "audio_path", "file", "url")
"""Columns that are searched for the audio, in this order, unless one is named."""

KEY_KEYS = ("id", "key")


def is_manifest(name: str) -> bool:
    """Whether a source is a manifest, by its suffix."""
    return name.lower().endswith(SUFFIXES)


@dataclass(frozen=True)
class ManifestUnit:
    """Rows of a manifest.

    Attributes:
        manifest: path or URL.
        first: number of the first row, from 0.
        last: number of the one after the last.
        start: byte at which the first row begins (JSON lines).
        end: byte at which the last one ends (JSON lines).
        path_key: column of the audio; None searches `PATH_KEYS`.
    """

    manifest: str
    first: int
    last: int
    start: int = 0
    end: int = 0
    path_key: str | None = None

    @property
    def group(self) -> str:
        """What the names of clips in messages begin with."""
        return base_name(self.manifest)

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.group}, rows {self.first + 1} to {self.last}"

    def clips(self, report: SkipReport, first: int) -> Iterator[tuple[int, EncodedClip]]:
        """Place of a clip among the rows of this unit, and the clip, from that place on."""
        for place, row in enumerate(self._rows(report)):
            if place < first or row is None:
                continue
            mark = f"{self.group}, row {self.first + place + 1}"
            if not isinstance(row, dict):
                report.add(mark, "not a JSON object")
                continue
            clip = self._clip(row, mark, report)
            if clip is not None:
                yield place, clip

    def _rows(self, report: SkipReport) -> Iterator[Any]:
        """The rows; None for an empty line, text for one that is no JSON. Parquet ends at the first damaged page."""
        if self.manifest.lower().endswith(".jsonl"):
            for line in read_bytes(self.manifest, self.start, self.end).split(b"\n")[: self.last - self.first]:
                try:
                    yield parse_json(line) if line.strip() else None
                except ValueError:
                    yield line
            return
        try:
            yield from self._parquet_rows()
        except (OSError, ValueError, NotImplementedError, KeyError) as error:
            if not _is_damage(error):
                raise
            report.add(self.name, f"damaged, rows that were not read yet are left out ({one_line(str(error))})")

    def _parquet_rows(self) -> Iterator[Any]:
        with opened(self.manifest) as file:
            parquet = require_extra("pyarrow.parquet", "scale").ParquetFile(file)
            sizes = [parquet.metadata.row_group(number).num_rows for number in range(parquet.num_row_groups)]
            ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
            group = bisect_right(ends, self.first)
            place = ends[group] - sizes[group]
            groups = range(group, bisect_right(ends, self.last - 1) + 1)
            # Group by group, so that a damaged one takes none of those before it along.
            batches = (b for number in groups for b in parquet.iter_batches(batch_size=64, row_groups=[number]))
            for batch in batches:
                if place + batch.num_rows > self.first:
                    part = batch.slice(max(self.first - place, 0))
                    yield from part.slice(0, self.last - max(place, self.first)).to_pylist()
                place += batch.num_rows
                if place >= self.last:
                    return

    def _clip(self, row: dict[str, Any], mark: str, report: SkipReport) -> EncodedClip | None:
        named = [self.path_key] if self.path_key else [key for key in PATH_KEYS if row.get(key) is not None]
        held = row.get(named[0]) if named else None
        data, path = (held.get("bytes"), held.get("path")) if isinstance(held, dict) else (None, held)
        if data is None and (not isinstance(path, str) or not path):
            report.add(mark, f"no path of audio under {self.path_key or ', '.join(PATH_KEYS)}")
            return None
        key = next((str(row[name]) for name in KEY_KEYS if row.get(name) is not None), path or mark)
        labels = {
            str(name): _plain(value) for name, value in row.items() if not (name == named[0] and isinstance(held, dict))
        }
        if data is None:
            try:
                data = read_bytes(join(folder_of(self.manifest), str(path)))
            except OSError as error:
                report.add(f"{self.group}/{key}", f"{path}: {error.strerror or error}")
                return None
        return EncodedClip(str(key), data, labels)


def _is_damage(error: Exception) -> bool:
    """Whether it is pyarrow's word on bytes that are no Parquet, and not that of a disk or network that fails."""
    arrow = require_extra("pyarrow", "scale")
    if isinstance(error, (arrow.ArrowException, UnicodeDecodeError)):
        return True
    return type(error) is OSError and error.errno is None


def _plain(value: Any) -> Any:
    """A value as JSON knows it; Parquet knows dates, bytes and numbers that are none."""
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def split_manifest(manifest: str, rows: int, path_key: str | None) -> tuple[list[ManifestUnit], str]:
    """Units of `rows` rows each, and a hash of the manifest.

    Raises:
        DataError: it cannot be read, or holds no rows.
        MissingExtraError: pyarrow is not installed (Parquet).
    """
    digest, units = hashlib.sha256(), []
    with opened(manifest) as file:
        if manifest.lower().endswith(".jsonl"):
            begins, start = [], 0
            number = 0
            for number, line in enumerate(file, 1):  # noqa: B007
                if (number - 1) % rows == 0:
                    begins.append(start)
                start += len(line)
                digest.update(line)
            total = number
            for place, begin in enumerate(begins):
                end = begins[place + 1] if place + 1 < len(begins) else start
                units.append(ManifestUnit(manifest, place * rows, min((place + 1) * rows, total), begin, end, path_key))
        else:
            parquet = require_extra("pyarrow.parquet", "scale")
            while block := file.read(1 << 24):
                digest.update(block)
            file.seek(0)
            try:
                total = parquet.ParquetFile(file).metadata.num_rows
            except (OSError, ValueError) as error:  # pyarrow's errors are of these kinds
                raise DataError(f"{manifest} is no Parquet file ({error}); write it again") from error
            units = [
                ManifestUnit(manifest, first, min(first + rows, total), path_key=path_key)
                for first in range(0, total, rows)
            ]
    if not units:
        raise DataError(f"{manifest} holds no rows; list one clip a line")
    return units, digest.hexdigest()
