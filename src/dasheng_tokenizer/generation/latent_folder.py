"""A folder of latents in the making: with which options, to whom it belongs, how far it is."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dasheng_tokenizer.errors import ConfigurationError, DataError, ModelMismatchError, OutputError
from dasheng_tokenizer.files import is_partial, make_folder, output_error
from dasheng_tokenizer.generation.latent_index import (
    AGAIN,
    ENCODING,
    FORMAT,
    INDEX,
    VERSION,
    LatentIndex,
    TokenStatistics,
    read_json,
    shard_stem,
    write_json,
)
from dasheng_tokenizer.spectral import SAMPLES_PER_TOKEN, SAMPLING_RATE
from dasheng_tokenizer.token_file import DTYPES

MAX_SECONDS = 30.0
"""Longest item: a window of the Whisper encoder, and longer than the clips of the usual captioned corpora."""

ENTRY_BYTES = 128
"""Room for a tensor's line in the header of a shard, which takes about 80 bytes."""


@dataclass(frozen=True)
class EncodingOptions:
    """What the latents hang on, besides model and sources.

    Attributes:
        captions: key of the captions, a text or a list of texts, in the JSON file of a clip.
        max_seconds: longer clips are cut into windows of equal length, each with the captions of the clip.
        shard_megabytes: largest file of latents, MiB.
        dtype: number type stored: float16, bfloat16 or float32.
    """

    captions: str = "caption"
    max_seconds: float = MAX_SECONDS
    shard_megabytes: float = 64
    dtype: str = "float16"

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if not self.captions:
            raise ConfigurationError("the key of the captions is empty; name that of the JSON files, such as caption")
        if self.dtype not in DTYPES:
            raise ConfigurationError(f"latents cannot be stored as {self.dtype!r}; choose from {', '.join(DTYPES)}")
        if not SAMPLES_PER_TOKEN / SAMPLING_RATE <= self.max_seconds <= 3600:
            raise ConfigurationError(f"clips are cut at 0.04 to 3600 seconds, not at {self.max_seconds}")
        if not 0 < self.shard_megabytes < float("inf"):
            raise ConfigurationError(f"a shard of {self.shard_megabytes} MiB holds nothing; 64 are usual")

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest item."""
        return int(self.max_seconds * SAMPLING_RATE / SAMPLES_PER_TOKEN + 1e-6)

    @property
    def shard_bytes(self) -> int:
        """Bytes that the tensors of a shard and their entries in its header may take."""
        return int(self.shard_megabytes * 2**20) - 1024

    def item_bytes(self, tokens: int, latent_dim: int) -> int:
        """Bytes that an item adds to a shard."""
        return tokens * latent_dim * DTYPES[self.dtype].itemsize + ENTRY_BYTES


def claim(folder: Path, encoding: dict[str, Any], overwrite: bool) -> dict[str, Any]:
    """Make the folder one of this encoding. A folder without a whole shard may have been begun as another.

    Returns:
        `encoding`, or what the folder was begun with, which may name the tokenizer otherwise.

    Raises:
        ModelMismatchError: the folder holds latents of another model.
        OutputError: it holds those of other sources or options, or cannot be written.
        DataError: its description is missing or damaged.
    """
    if overwrite:
        _clear(folder)
    begun = (folder / INDEX).is_file() or (folder / shard_stem(0)).with_suffix(".json").is_file()
    if not begun:
        make_folder(folder)
        write_json(folder / ENCODING, encoding)
        return encoding
    held = read_json(folder / ENCODING)
    remedy = "use --overwrite (overwrite=True) to replace it, or another folder"
    if (held.get("format"), held.get("version")) != (FORMAT, VERSION):
        raise OutputError(f"{folder} holds a data set of another format or version; {remedy}")
    if held.get("model_hash") != encoding["model_hash"]:
        raise ModelMismatchError(
            f"{folder} holds latents of {held.get('tokenizer')} (weights {str(held.get('model_hash'))[:12]}), this "
            f"model is {encoding['tokenizer']} (weights {encoding['model_hash'][:12]}); {remedy}"
        )
    if held.get("options") != encoding["options"]:
        before: dict[str, Any] = held.get("options") or {}
        changed = [
            f"{name} {before.get(name)} → {new}" for name, new in encoding["options"].items() if before.get(name) != new
        ]
        raise OutputError(f"{folder} was encoded with other options ({', '.join(changed)}); {remedy}")
    if held.get("sources") != encoding["sources"]:
        raise OutputError(f"{folder} holds latents of other sources, or of these before they changed; {remedy}")
    return held


def _clear(folder: Path) -> None:
    """Remove an encoding; the index first and the last shard next, so that what is left at any moment is sound."""
    ours = [file for file in folder.glob("latents-*") if re.fullmatch(r"latents-\d{5}\.\w+", file.name)]
    ours.sort(key=lambda file: (file.stem, file.suffix == ".json"), reverse=True)
    partial = [file for file in folder.glob(".latents-*") if is_partial(file)]
    for file in (folder / INDEX, *ours, *partial, folder / ENCODING):
        try:
            with contextlib.suppress(FileNotFoundError):
                file.unlink()
        except OSError as error:
            raise output_error(file, error) from error


def whole_parts(folder: Path, latent_dim: int) -> Iterator[dict[str, Any]]:
    """What is noted of the shards that are whole, from the first on.

    Args:
        folder: of the encoding.
        latent_dim: width of its latents.

    Raises:
        DataError: a note is damaged.
    """
    number = 0
    while _is_whole(folder / shard_stem(number)):
        path = (folder / shard_stem(number)).with_suffix(".json")
        part = read_json(path)
        if not _is_note(part, latent_dim):
            raise DataError(f"{path} is damaged; {AGAIN}")
        yield part
        number += 1


def _is_note(part: dict[str, Any], latent_dim: int) -> bool:
    """Whether an entry of a shard says what going on needs."""
    try:
        statistics = TokenStatistics.from_json(part["statistics"])
        whole = [*part["tokens"], *part["next"], part["samples"]]
        widths = {tuple(statistics.mean.shape), tuple(statistics.squares.shape)}
        return (
            isinstance(part["skipped"], dict)
            and len(part["next"]) == 3
            and all(isinstance(number, int) and 0 <= number < 2**62 for number in whole)
            and statistics.count == sum(part["tokens"])
            and widths == {(latent_dim,)}
        )
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError):
        return False


def is_complete(folder: str | Path) -> bool:
    """Whether a folder holds a complete data set, with all its shards.

    Raises:
        DataError: its index is damaged or of another version.
    """
    if not (Path(folder) / INDEX).is_file():
        return False
    return all(_is_whole(Path(folder) / shard_stem(number)) for number in range(LatentIndex.read(folder).shards))


def _is_whole(stem: Path) -> bool:
    return all(stem.with_suffix(suffix).is_file() for suffix in (".safetensors", ".jsonl", ".json"))
