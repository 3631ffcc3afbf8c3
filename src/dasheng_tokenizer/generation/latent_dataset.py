"""Reading latents of a captioned corpus; `latent_index` has the layout of their folder.

Nothing but the index and the token counts is held in memory: latents are mapped from disk, captions read, when a clip
is asked for. Shards in safetensors and tar need no more than the core of the package, those in Parquet pyarrow.
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
from torch import Tensor
from torch.utils.data import Dataset

from dasheng_tokenizer.errors import DataError, ModelMismatchError
from dasheng_tokenizer.generation.latent_index import (
    AGAIN,
    SUFFIXES,
    LatentIndex,
    joined_index,
    read_json,
)
from dasheng_tokenizer.generation.latent_shards import DAMAGE, OPENERS, ShardReader


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
        captions: texts that describe it; at least one, unless clips without were kept on purpose.
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
            (folder / name, index.format)
            for folder, index in zip(self.folders, indices, strict=True)
            for name in index.names
        ]
        counts = [self._token_counts(stem, kind) for stem, kind in self._stems]
        self.num_tokens: npt.NDArray[np.int64] = np.concatenate(counts)
        # Of several folders the index has no options.
        self._uncaptioned = any(index.options.get("keep_uncaptioned") is True for index in indices)
        self._first = np.cumsum([0, *map(len, counts)])  # clip that each shard begins with
        if (len(self), int(self.num_tokens.sum())) != (self.index.clips, self.index.tokens):
            raise DataError(f"{named[0]}: the shards do not hold what {self.index.clips} clips need; {AGAIN}")
        self._opened: tuple[int, dict[int, ShardReader]] = (os.getpid(), {})

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

    def _token_counts(self, stem: Path, kind: str) -> npt.NDArray[np.int64]:
        for suffix in SUFFIXES[kind]:
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
        try:
            row = self._reader(shard).row(place)
        except DAMAGE as error:  # also a line too few, and JSON that is none
            raise self._damaged(shard, error) from error
        if not _is_row(row, self._uncaptioned):
            raise self._damaged(shard, f"clip {place} has no key, captions and labels")
        return row

    def _latents(self, shard: int, place: int, clip: int) -> Tensor:
        try:
            latents = self._reader(shard).latents(place)
        except DAMAGE as error:
            raise self._damaged(shard, error) from error
        if latents.shape != (self.num_tokens[clip], self.index.latent_dim):
            raise self._damaged(shard, f"clip {place} has the shape {tuple(latents.shape)}")
        return latents.to(torch.float32, copy=True)  # (T, C), a copy: the file is only mapped

    def _damaged(self, shard: int, reason: object) -> DataError:
        stem, kind = self._stems[shard]
        names = " or ".join(stem.with_suffix(suffix).name for suffix in SUFFIXES[kind])
        return DataError(f"{stem.parent}: {names} is damaged ({reason}); {AGAIN}")

    def _reader(self, shard: int) -> ShardReader:
        """The open shard. A forked worker opens its own."""
        if self._opened[0] != os.getpid():
            self._opened = (os.getpid(), {})
        held = self._opened[1]
        if shard not in held:
            stem, kind = self._stems[shard]
            held[shard] = OPENERS[kind](stem)
        return held[shard]


def _is_row(row: Any, uncaptioned: bool) -> bool:
    """Whether a row says what `LatentItem` needs."""
    if not isinstance(row, dict) or not isinstance(row.get("key"), str) or not isinstance(row.get("labels"), dict):
        return False
    captions = row.get("captions")
    if not isinstance(captions, list) or not (captions or uncaptioned):
        return False
    return all(isinstance(caption, str) for caption in captions)
