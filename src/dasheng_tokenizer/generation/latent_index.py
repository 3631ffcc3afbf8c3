"""What a folder of latents says about itself: files, index, mean and standard deviation of its tokens.

Layout, version 2, written by `scale.encode.encode_dataset` and read by `latent_dataset.LatentDataset`:

    encoding.json                   what is encoded: model, options, digest of the sources; written first
    latents-00000-000.safetensors   shard 0 of unit of work 0: for each clip a tensor (T, C), named by its place in
                                    the shard: `000000`, `000001`, …
    latents-00000-000.jsonl         for each clip a line with its key, captions and labels
    latents-00000-000.json          token counts, statistics, what was skipped, where the unit goes on; written last,
                                    so that its presence says that the shard is whole
    index.json                      names and sums of all shards; its presence says that the data set is complete

In place of the first two files, a shard may be one `.tar` (WebDataset: for each clip `NAME.npy` and `NAME.json`) or one
`.parquet` (columns key, captions, labels, num_tokens, latents). Version 1 has no units of work (`latents-00000.…`) and
safetensors only.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dasheng_tokenizer.errors import DataError, ModelMismatchError
from dasheng_tokenizer.files import atomic_path, parse_json

FORMAT = "dasheng-tokenizer-latents"
VERSION = 2

SUFFIXES = {"safetensors": (".safetensors", ".jsonl"), "webdataset": (".tar",), "parquet": (".parquet",)}
"""Formats of shards, and the suffixes of their files, besides that of the note (`.json`)."""

ENCODING = "encoding.json"
INDEX = "index.json"


def tensor_name(row: int) -> str:
    """Name of the tensor of a clip in its shard. Keys would not do: two sources may use the same one."""
    return f"{row:06d}"


@dataclass(frozen=True, eq=False)
class TokenStatistics:
    """Mean and spread of tokens, such that those of two sets give those of both.

    Attributes:
        count: tokens.
        mean: (C,) float64.
        squares: (C,) float64, sum of squared deviations from the mean.
    """

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, tokens: Tensor) -> TokenStatistics:
        """Statistics of (N, C) tokens of any number type, N ≥ 0."""
        exact = tokens.double()
        if not len(exact):
            zeros = exact.new_zeros(exact.shape[1])
            return cls(0, zeros, zeros)
        mean = exact.mean(0)
        return cls(len(exact), mean, (exact - mean).square().sum(0))

    def merge(self, other: TokenStatistics) -> TokenStatistics:
        """Statistics of both sets together (Chan, Golub, LeVeque 1983: no difference of large sums)."""
        count = self.count + other.count
        if not count:
            return self
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.count / count)
        squares = self.squares + other.squares + shift.square() * (self.count * other.count / count)
        return TokenStatistics(count, mean, squares)

    @property
    def std(self) -> Tensor:
        """(C,) float64 population standard deviation; 0 where a dimension never changes."""
        return (self.squares / max(self.count, 1)).sqrt()

    def to_json(self) -> dict[str, Any]:
        """As plain numbers; JSON keeps every bit of a float64."""
        return {"count": self.count, "mean": self.mean.tolist(), "squares": self.squares.tolist()}

    @classmethod
    def from_json(cls, held: dict[str, Any]) -> TokenStatistics:
        """Undo `to_json`."""
        mean, squares = (torch.tensor(held[name], dtype=torch.float64) for name in ("mean", "squares"))
        return cls(int(held["count"]), mean, squares)


@dataclass(frozen=True, eq=False)
class LatentIndex:
    """Summary of a complete data set.

    Attributes:
        model_hash: `weights_hash()` of the tokenizer whose latents these are.
        tokenizer: name that it was loaded by, for people and for loading it again; the hash decides.
        latent_dim: C.
        frame_rate: tokens a second.
        statistics: of all tokens, as stored.
        clips: items; a clip that was cut counts once for each of its windows.
        hours: of audio, without padding.
        skipped: what was left out, with reasons.
        names: of the shards, without suffix, in order.
        options: that the latents were made with.
        format: kind of shards, a key of `SUFFIXES`.
    """

    model_hash: str
    tokenizer: str
    latent_dim: int
    frame_rate: float
    statistics: TokenStatistics
    clips: int
    hours: float
    skipped: dict[str, str]
    names: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    format: str = "safetensors"

    @property
    def shards(self) -> int:
        """Number of shards."""
        return len(self.names)

    @property
    def tokens(self) -> int:
        """Tokens of all clips."""
        return self.statistics.count

    @property
    def mean(self) -> Tensor:
        """(C,) float32."""
        return self.statistics.mean.float()

    @property
    def std(self) -> Tensor:
        """(C,) float32; 0 where a dimension never changes."""
        return self.statistics.std.float()

    def save(self, folder: str | Path) -> None:
        """Write `index.json`; it appears whole or not at all.

        Raises:
            OutputError: it cannot be written.
        """
        held = {
            "format": FORMAT,
            "version": VERSION,
            "model_hash": self.model_hash,
            "tokenizer": self.tokenizer,
            "latent_dim": self.latent_dim,
            "frame_rate": self.frame_rate,
            "clips": self.clips,
            "hours": self.hours,
            "tokens": self.tokens,
            "shard_format": self.format,
            "shards": list(self.names),
            "options": self.options,
            "skipped": self.skipped,
            "mean": self.statistics.mean.tolist(),
            "std": self.statistics.std.tolist(),
        }
        write_json(Path(folder) / INDEX, held, indent=1)

    @classmethod
    def read(cls, folder: str | Path) -> LatentIndex:
        """Read `index.json`.

        Raises:
            DataError: no data set, one that is not complete, a damaged one, or one of another version.
        """
        path = Path(folder) / INDEX
        if not path.is_file():
            if (path.parent / ENCODING).is_file():
                raise DataError(f"{folder} is not complete; run the same `encode-dataset` again, it goes on from there")
            raise DataError(f"{folder} holds no latents ({INDEX} is missing); make them with `encode-dataset`")
        held = read_json(path)
        if held.get("format") != FORMAT or held.get("version") not in (1, VERSION):
            raise DataError(
                f"{path} is of format {held.get('format')}, version {held.get('version')}; this package reads "
                f"{FORMAT}, versions 1 and {VERSION}; encode the data again or update the package"
            )
        try:
            _check_types(held)
            index = cls(
                held["model_hash"],
                held["tokenizer"],
                held["latent_dim"],
                held["frame_rate"],
                _statistics(held),
                held["clips"],
                held["hours"],
                held["skipped"],
                _names(held),
                held["options"],
                held.get("shard_format", "safetensors"),
            )
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise DataError(f"{path} is damaged ({error!r}); {AGAIN}") from error
        widths = {tuple(index.mean.shape), tuple(index.std.shape)}
        if widths != {(index.latent_dim,)} or not bool(torch.isfinite(index.mean + index.std).all()):
            raise DataError(f"{path} is damaged: mean and standard deviation do not fit; {AGAIN}")
        return index


AGAIN = "copy the folder again, or encode the data again with --overwrite"


_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("model_hash", "tokenizer"), str),
    **dict.fromkeys(("latent_dim", "clips", "tokens"), int),
    **dict.fromkeys(("frame_rate", "hours"), (int, float)),
    **dict.fromkeys(("skipped", "options"), dict),
    **dict.fromkeys(("mean", "std"), list),
}

MOST_SHARDS = 100_000
"""Five digits of their names, in version 1."""

_NAME = re.compile(r"latents-\d{5,9}-\d{3,9}")


def _check_types(held: dict[str, Any]) -> None:
    """Raise TypeError or ValueError where an entry of the index cannot be."""
    for name, kind in _TYPES.items():
        if not isinstance(held[name], kind) or isinstance(held[name], bool):
            raise TypeError(f"{name} is {held[name]!r}")
    if min(held["latent_dim"], held["clips"], held["tokens"]) < 1:
        raise ValueError(f"{held['clips']} clips of {held['tokens']} tokens")
    if held.get("shard_format", "safetensors") not in SUFFIXES:
        raise ValueError(f"shard_format is {held['shard_format']!r}")


def _names(held: dict[str, Any]) -> tuple[str, ...]:
    """Names of the shards; nothing else, since files are opened by them."""
    shards = held["shards"]
    if held["version"] == 1:
        if not isinstance(shards, int) or isinstance(shards, bool) or not 1 <= shards <= MOST_SHARDS:
            raise ValueError(f"shards is {shards!r}")
        return tuple(f"latents-{number:05d}" for number in range(shards))
    if not isinstance(shards, list) or not shards:
        raise ValueError(f"shards is {shards!r}")
    for name in shards:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no shard")
    return tuple(shards)


def _statistics(held: dict[str, Any]) -> TokenStatistics:
    mean, std = (torch.tensor(held[name], dtype=torch.float64) for name in ("mean", "std"))
    return TokenStatistics(held["tokens"], mean, std.square() * held["tokens"])


def joined_index(folders: Sequence[Path], indices: Sequence[LatentIndex]) -> LatentIndex:
    """The index of several data sets read as one.

    Raises:
        ModelMismatchError: they hold latents of different models.
    """
    first, statistics = indices[0], indices[0].statistics
    for folder, index in zip(folders[1:], indices[1:], strict=True):
        if (index.model_hash, index.latent_dim) != (first.model_hash, first.latent_dim):
            raise ModelMismatchError(
                f"{folder} holds latents of {index.tokenizer} (weights {index.model_hash[:12]}), {folders[0]} those of "
                f"{first.tokenizer} (weights {first.model_hash[:12]}); join only latents of one model"
            )
        statistics = statistics.merge(index.statistics)
    if len(indices) == 1:
        return first
    return LatentIndex(
        first.model_hash,
        first.tokenizer,
        first.latent_dim,
        first.frame_rate,
        statistics,
        clips=sum(index.clips for index in indices),
        hours=math.fsum(index.hours for index in indices),
        skipped={f"{f}: {name}": why for f, i in zip(folders, indices, strict=True) for name, why in i.skipped.items()},
        names=tuple(f"{f}/{name}" for f, i in zip(folders, indices, strict=True) for name in i.names),
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        DataError: missing or damaged.
    """
    try:
        held = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is missing or damaged; {AGAIN}") from error
    if not isinstance(held, dict):
        raise DataError(f"{path} is damaged; {AGAIN}")
    return held


def write_json(path: Path, held: dict[str, Any], indent: int | None = None) -> None:
    """Write a JSON object; the file appears whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(held, indent=indent), encoding="utf-8")
