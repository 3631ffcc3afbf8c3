"""A folder of latents in the making: with which options, to whom it belongs, how far it is."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dasheng_tokenizer.errors import DataError, ModelMismatchError, OutputError
from dasheng_tokenizer.files import is_partial, make_folder, output_error
from dasheng_tokenizer.generation.latent_index import (
    AGAIN,
    ENCODING,
    FORMAT,
    INDEX,
    SUFFIXES,
    VERSION,
    LatentIndex,
    TokenStatistics,
    read_json,
    write_json,
)

_OURS = re.compile(r"latents-\d{5,}(-\d{3,})?\.\w+")


def part_name(unit: int, part: int) -> str:
    """Name of the files of a shard, without suffix: number of its unit of work, number within the unit."""
    return f"latents-{unit:05d}-{part:03d}"


def fingerprint(encoding: dict[str, Any]) -> str:
    """What every shard of an encoding carries, so that those of two encodings cannot mix. Names do not count."""
    held = {name: value for name, value in encoding.items() if name != "tokenizer"}
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()[:16]


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
        clear(folder)
    begun = (folder / INDEX).is_file() or any(folder.glob("latents-*.json"))
    if not begun:
        make_folder(folder)
        write_json(folder / ENCODING, encoding)
        return encoding
    held = read_json(folder / ENCODING)
    remedy = "use --overwrite (overwrite=True) to replace it, or another folder"
    if (held.get("format"), held.get("version")) != (FORMAT, VERSION):
        raise OutputError(
            f"{folder} holds a data set of another format, or one that another version of this package wrote, which "
            f"can be read, if it is complete, but not gone on with; {remedy}"
        )
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
    told = [name for name in ("latent_dim", "frame_rate") if held.get(name) != encoding[name]]
    if told or not isinstance(held.get("tokenizer"), str):
        raise DataError(f"{folder / ENCODING} is damaged ({', '.join(told) or 'tokenizer'}); {AGAIN}")
    return held


def clear(folder: Path) -> None:
    """Remove an encoding; the index first and the last shard next, so that what is left at any moment is sound."""
    ours = [file for file in folder.glob("latents-*") if _OURS.fullmatch(file.name)]
    ours.sort(key=lambda file: (file.stem, file.suffix == ".json"), reverse=True)
    partial = [file for file in folder.glob(".latents-*") if is_partial(file)]
    for file in (folder / INDEX, *ours, *partial, folder / ENCODING):
        try:
            with contextlib.suppress(FileNotFoundError):
                file.unlink()
        except OSError as error:
            raise output_error(file, error) from error


def whole_parts(folder: Path, unit: int, kind: str, mark: str, latent_dim: int) -> list[dict[str, Any]]:
    """What is noted of the shards of a unit that are whole, from the first on. `next` of the last is null at its end.

    Args:
        folder: of the latents.
        unit: number.
        kind: format of the shards.
        mark: `fingerprint` of the encoding.
        latent_dim: width of its latents.

    Raises:
        DataError: a note is damaged.
        OutputError: a shard is of another encoding.
    """
    parts: list[dict[str, Any]] = []
    while is_whole(stem := folder / part_name(unit, len(parts)), kind):
        path = stem.with_suffix(".json")
        parts.append(read_json(path))
        if not _is_note(parts[-1], latent_dim):
            raise DataError(f"{path} is damaged; {AGAIN}")
        if parts[-1]["encoding"] != mark:
            raise OutputError(
                f"{path} is of an encoding with other settings, begun in this folder at the same time; use "
                "--overwrite (overwrite=True), and a folder for each"
            )
        if parts[-1]["next"] is None:
            break
    return parts


def _is_note(part: dict[str, Any], latent_dim: int) -> bool:
    """Whether a note of a shard says what going on needs."""
    try:
        statistics = TokenStatistics.from_json(part["statistics"])
        following = part["next"] if part["next"] is not None else [0, 0]
        widths = {tuple(statistics.mean.shape), tuple(statistics.squares.shape)}
        return (
            isinstance(part["skipped"], dict)
            and isinstance(part["encoding"], str)
            and isinstance(part["tokens"], list)
            and len(following) == 2
            and all(isinstance(n, int) and 0 <= n < 2**62 for n in [*part["tokens"], *following, part["samples"]])
            and statistics.count == sum(part["tokens"])
            and widths == {(latent_dim,)}
        )
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError):
        return False


def is_done(parts: Sequence[dict[str, Any]]) -> bool:
    """Whether the notes of a unit's shards reach its end."""
    return bool(parts) and parts[-1]["next"] is None


def is_complete(folder: str | Path) -> bool:
    """Whether a folder holds a complete data set, with all its shards.

    Raises:
        DataError: its index is damaged or of another version.
    """
    if not (Path(folder) / INDEX).is_file():
        return False
    index = LatentIndex.read(folder)
    return all(is_whole(Path(folder) / name, index.format) for name in index.names)


def is_whole(stem: Path, kind: str) -> bool:
    """Whether all files of a shard are there; each appears whole or not at all."""
    return all(stem.with_suffix(suffix).is_file() for suffix in (*SUFFIXES[kind], ".json"))
