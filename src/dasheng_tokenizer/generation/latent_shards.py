"""Readers of one shard of latents, in each of the formats that `latent_index` describes."""

from __future__ import annotations

import io
import tarfile
from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dasheng_tokenizer.files import parse_json, require_extra
from dasheng_tokenizer.generation.latent_index import tensor_name

DAMAGE = (OSError, ValueError, TypeError, LookupError, EOFError, AttributeError, SafetensorError, tarfile.TarError)
"""What the readers raise at a damaged file."""


class ShardReader(Protocol):
    """An open shard."""

    def row(self, place: int) -> dict[str, Any]:
        """`key`, `captions` and `labels` of a clip."""

    def latents(self, place: int) -> Tensor:
        """(T, C) in the type stored."""


class SafetensorsShard:
    """Tensors in a mapped file, which takes no file handle; rows in lines of JSON beside it."""

    def __init__(self, stem: Path) -> None:
        self._tensors, self._text = stem.with_suffix(".safetensors"), stem.with_suffix(".jsonl")
        self._mapped: Any = None
        self._lines: npt.NDArray[np.int64] | None = None

    def row(self, place: int) -> dict[str, Any]:
        """As in `ShardReader`."""
        if self._lines is None:
            text = np.fromfile(self._text, dtype=np.uint8)
            self._lines = np.append(0, np.flatnonzero(text == ord("\n")) + 1)
        first, end = self._lines[place : place + 2]
        with self._text.open("rb") as file:
            file.seek(first)
            row: dict[str, Any] = parse_json(file.read(end - first))
        return row

    def latents(self, place: int) -> Tensor:
        """As in `ShardReader`."""
        if self._mapped is None:
            self._mapped = safe_open(self._tensors, framework="pt")
        found: Tensor = self._mapped.get_tensor(tensor_name(place))
        return found


class WebDatasetShard:
    """A tar file with `NAME.npy` and `NAME.json` for each clip, whose places are looked up once."""

    def __init__(self, stem: Path) -> None:
        self._path = stem.with_suffix(".tar")
        self._members: dict[str, list[tuple[int, int]]] | None = None  # by suffix: first byte, size

    def row(self, place: int) -> dict[str, Any]:
        """As in `ShardReader`."""
        row: dict[str, Any] = parse_json(self._read("json", place))
        return row

    def latents(self, place: int) -> Tensor:
        """As in `ShardReader`."""
        return torch.from_numpy(np.load(io.BytesIO(self._read("npy", place)), allow_pickle=False))

    def _read(self, suffix: str, place: int) -> bytes:
        if self._members is None:
            found: dict[str, list[tuple[int, int]]] = {"json": [], "npy": []}
            with tarfile.open(self._path, "r:") as archive:
                for member in archive:
                    found[member.name.rpartition(".")[2]].append((member.offset_data, member.size))
            self._members = found
        start, size = self._members[suffix][place]
        with self._path.open("rb") as file:
            file.seek(start)
            return file.read(size)


class ParquetShard:
    """A Parquet file, of which the group of rows read last is held."""

    def __init__(self, stem: Path) -> None:
        self._file = require_extra("pyarrow.parquet", "scale").ParquetFile(stem.with_suffix(".parquet"))
        sizes = (self._file.metadata.row_group(n).num_rows for n in range(self._file.num_row_groups))
        self._first = [0, *accumulate(sizes)]
        self._held: tuple[int, Any] = (-1, None)

    def row(self, place: int) -> dict[str, Any]:
        """As in `ShardReader`."""
        group, line = self._place(place)
        table = self._file.read_row_group(group, columns=["key", "captions", "labels"])
        row: dict[str, Any] = table.slice(line, 1).to_pylist()[0]
        return {**row, "labels": parse_json(row["labels"])}

    def latents(self, place: int) -> Tensor:
        """As in `ShardReader`."""
        group, line = self._place(place)
        if self._held[0] != group:
            self._held = (group, self._file.read_row_group(group, columns=["num_tokens", "latents"]))
        table = self._held[1]
        numbers = table.column("latents")[line].values.to_numpy(zero_copy_only=False)
        return torch.from_numpy(numbers.reshape(table.column("num_tokens")[line].as_py(), -1).copy())

    def _place(self, place: int) -> tuple[int, int]:
        group = bisect_right(self._first, place) - 1
        return group, place - self._first[group]


OPENERS: dict[str, Callable[[Path], ShardReader]] = {
    "safetensors": SafetensorsShard,
    "webdataset": WebDatasetShard,
    "parquet": ParquetShard,
}
