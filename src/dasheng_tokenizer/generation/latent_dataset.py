"""Reading latents of a captioned corpus; `latent_index` has the layout of their folder.

Nothing but the index and the token counts is held in memory: latents are mapped from disk, captions read, when a clip
is asked for. Needs no more than the core of the package.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from dasheng_tokenizer.errors import DataError, ModelMismatchError
from dasheng_tokenizer.files import parse_json
from dasheng_tokenizer.generation.latent_index import (
    AGAIN,
    LatentIndex,
    joined_index,
    read_json,
    shard_stem,
    tensor_name,
)


class HashedModel(Protocol):
    """Anything whose weights have a hash, such as `DashengTokenizerModel`."""

    def weights_hash(self) -> str:
        """SHA-256 of the weights, in hex."""


@dataclass(frozen=True, eq=False)
class LatentItem:
    """A clip of a latent data set.

    Attributes:
        key: of the clip in its source; of a window of a longer clip `KEY@FIRST`, its first sample at 16 kHz.
        latents: (T, C) float32, not standardised.
        captions: texts that describe it, at least one.
        labels: the JSON object of the clip without its captions.
    """

    key: str
    latents: Tensor
    captions: tuple[str, ...]
    labels: dict[str, Any]


class LatentDataset(Dataset[LatentItem]):
    """One folder of latents, or several of the same model read as one.

    It can be given to a `DataLoader` with any number of workers, forked or spawned: each opens the files itself.

    Attributes:
        index: summary; of several folders that of all, mean and standard deviation weighted by their tokens.
        num_tokens: int64 array (clips,), T of each.
    """

    def __init__(self, folders: str | Path | Sequence[str | Path]) -> None:
        """Open folders that `encode-dataset` made.

        Args:
            folders: one or several.

        Raises:
            DataError: no folder, no latents in one, or an encoding that is damaged or not complete.
            ModelMismatchError: folders of different models.
        """
        named = [folders] if isinstance(folders, (str, Path)) else list(folders)
        if not named:
            raise DataError("no folder of latents is named; give at least one that `encode-dataset` made")
        self.folders = [Path(folder) for folder in named]
        indices = [LatentIndex.read(folder) for folder in self.folders]
        self.index = joined_index(self.folders, indices)
        self._stems = [
            folder / shard_stem(number)
            for folder, index in zip(self.folders, indices, strict=True)
            for number in range(index.shards)
        ]
        counts = [self._token_counts(stem) for stem in self._stems]
        self.num_tokens: npt.NDArray[np.int64] = np.concatenate(counts)
        self._first = np.cumsum([0, *map(len, counts)])  # clip that each shard begins with
        if (len(self), int(self.num_tokens.sum())) != (self.index.clips, self.index.tokens):
            raise DataError(f"{named[0]}: the shards do not hold what {self.index.clips} clips need; {AGAIN}")
        self._lines: dict[int, npt.NDArray[np.int64]] = {}
        self._opened: tuple[int, dict[int, Any]] = (os.getpid(), {})

    def __len__(self) -> int:
        return len(self.num_tokens)

    def __getitem__(self, index: int) -> LatentItem:
        """Read one clip.

        Raises:
            IndexError: there is no such clip.
            DataError: its shard is damaged.
        """
        clip, shard, place = self._place(index)
        row = self._row(shard, place)
        return LatentItem(row["key"], self._latents(shard, place, clip), tuple(row["captions"]), row["labels"])

    def description(self, index: int) -> tuple[str, tuple[str, ...], dict[str, Any]]:
        """Key, captions and labels of a clip, as in `LatentItem`, without reading its latents.

        Raises:
            IndexError: there is no such clip.
            DataError: its shard is damaged.
        """
        _, shard, place = self._place(index)
        row = self._row(shard, place)
        return row["key"], tuple(row["captions"]), row["labels"]

    def require_model(self, model: str | HashedModel) -> None:
        """Refuse latents of another model.

        Args:
            model: the tokenizer, or its `weights_hash()`.

        Raises:
            ModelMismatchError: the latents were made by a model with other weights.
        """
        wanted = model if isinstance(model, str) else model.weights_hash()
        if wanted != self.index.model_hash:
            raise ModelMismatchError(
                f"the latents in {self.folders[0]} were made by {self.index.tokenizer} (weights "
                f"{self.index.model_hash[:12]}), this model has weights {wanted[:12]}; use that model, or encode the "
                "corpus with this one into another folder"
            )

    def __getstate__(self) -> dict[str, Any]:
        """For spawned workers: an open file cannot be sent to another process."""
        return {**self.__dict__, "_opened": (os.getpid(), {})}

    def _place(self, index: int) -> tuple[int, int, int]:
        """Number of a clip, its shard, and its place there."""
        clip = index + len(self) if index < 0 else index
        if not 0 <= clip < len(self):
            raise IndexError(f"clip {index} of {len(self)}")
        shard = int(np.searchsorted(self._first, clip, side="right")) - 1
        return clip, shard, clip - int(self._first[shard])

    def _token_counts(self, stem: Path) -> npt.NDArray[np.int64]:
        for suffix in (".safetensors", ".jsonl"):
            if not stem.with_suffix(suffix).is_file():
                raise DataError(f"{stem.with_suffix(suffix)} is missing; {AGAIN}")
        try:
            counts = np.array(read_json(stem.with_suffix(".json"))["tokens"], dtype=np.int64)
            if counts.ndim != 1 or not len(counts) or counts.min() < 1:
                raise ValueError("its token counts are none")
            return counts
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(f"{stem.with_suffix('.json')} is damaged ({error!r}); {AGAIN}") from error

    def _row(self, shard: int, place: int) -> dict[str, Any]:
        path = self._stems[shard].with_suffix(".jsonl")
        try:
            if shard not in self._lines:
                text = np.fromfile(path, dtype=np.uint8)
                self._lines[shard] = np.append(0, np.flatnonzero(text == ord("\n")) + 1)
            first, end = self._lines[shard][place : place + 2]
            with path.open("rb") as file:
                file.seek(first)
                row: dict[str, Any] = parse_json(file.read(end - first))
        except (OSError, ValueError) as error:  # also a line too few, and JSON that is none
            raise DataError(f"{path} is damaged ({error}); {AGAIN}") from error
        if not _is_row(row):
            raise DataError(f"{path} is damaged: line {place + 1} has no key, captions and labels; {AGAIN}")
        return row

    def _latents(self, shard: int, place: int, clip: int) -> Tensor:
        path = self._stems[shard].with_suffix(".safetensors")
        try:
            latents: Tensor = self._file(shard, path).get_tensor(tensor_name(place))
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path} is damaged ({error}); {AGAIN}") from error
        if latents.shape != (self.num_tokens[clip], self.index.latent_dim):
            raise DataError(f"{path} is damaged: clip {place} has the shape {tuple(latents.shape)}; {AGAIN}")
        return latents.to(torch.float32, copy=True)  # (T, C), a copy: the file is only mapped

    def _file(self, shard: int, path: Path) -> Any:
        """The open shard; a mapping, which takes no file handle. A forked worker opens its own."""
        if self._opened[0] != os.getpid():
            self._opened = (os.getpid(), {})
        held = self._opened[1]
        if shard not in held:
            held[shard] = safe_open(path, framework="pt")
        return held[shard]


def _is_row(row: Any) -> bool:
    """Whether a line says what `LatentItem` needs."""
    if not isinstance(row, dict) or not isinstance(row.get("key"), str) or not isinstance(row.get("labels"), dict):
        return False
    captions = row.get("captions")
    return isinstance(captions, list) and bool(captions) and all(isinstance(caption, str) for caption in captions)
