"""The division of sources into units of work: the same in every run on the same sources."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from dasheng_tokenizer.audio_formats import READ_SUFFIXES
from dasheng_tokenizer.errors import DataError
from dasheng_tokenizer.files import require_extra
from dasheng_tokenizer.scale.manifest import is_manifest, split_manifest
from dasheng_tokenizer.scale.storage import base_name, file_system, folder_of, is_url
from dasheng_tokenizer.scale.units import FilesUnit, TarUnit, Unit, labels_name
from dasheng_tokenizer.training.clips import FILES_PER_SHARD, TAR_SUFFIXES, Shard, expand_source, find_shards

CLIPS_PER_UNIT = FILES_PER_SHARD
"""Files of a folder, or rows of a manifest, that one worker encodes at a time. A tar shard is one unit."""


@dataclass(frozen=True)
class Plan:
    """Units of work, and a hash that changes with the sources, wherever they lie."""

    units: tuple[Unit, ...]
    digest: str


def plan_units(sources: Sequence[str | Path], clips_per_unit: int, path_key: str | None = None) -> Plan:
    """Divide sources into units of work.

    The hash sees of local tar files names, sizes and beginnings, of local audio files names, sizes and captions, of
    manifests their content, and of what lies behind URLs names and sizes.

    Args:
        sources: local ones as in `training.clips.find_shards`; manifests; URLs of tar shards, folders, audio files and
            manifests, with globs and ranges.
        clips_per_unit: files, or rows of a manifest, that form a unit.
        path_key: column of the audio in manifests; None searches for it.

    Raises:
        DataError: no sources, one that matches nothing, or a folder without audio.
        ConfigurationError: a URL of an unknown kind.
        MissingExtraError: webdataset, fsspec or pyarrow is needed and not installed.
    """
    names = [os.fspath(source) for source in sources]
    if not names:
        raise DataError("no audio is named; list tar shards, folders, files, manifests or URLs")
    local = [name for name in names if not is_url(name) and not is_manifest(name)]
    units: list[Unit] = []
    seen: list[Any] = []
    if local:
        shards = _regrouped(find_shards(local), clips_per_unit)
        seen += [_identity(shard) for shard in shards]
        units += [_local_unit(shard) for shard in shards]
    for name in names:
        if is_url(name):
            _plan_url(name, clips_per_unit, path_key, units, seen)
        elif is_manifest(name):
            for path in expand_source(name):
                _plan_manifest(os.path.abspath(path), clips_per_unit, path_key, units, seen)
    digest = hashlib.sha256()
    for entry in seen:
        digest.update(json.dumps(entry).encode())
    return Plan(tuple(units), digest.hexdigest())


def _regrouped(shards: Sequence[Shard], size: int) -> list[Shard]:
    found: list[Shard] = [shard for shard in shards if not shard.files]
    loose = (shard for shard in shards if shard.files)
    for root, group in groupby(loose, key=lambda shard: shard.path):
        files = [file for shard in group for file in shard.files]
        found += [Shard(root, tuple(files[start : start + size])) for start in range(0, len(files), size)]
    return found


def _identity(shard: Shard) -> list[Any]:
    """As `Shard.identity`, with the captions of loose files.

    Raises:
        DataError: a source cannot be read.
    """
    try:
        digest = hashlib.sha256()
        for file in shard.files:
            if (labels := file.with_suffix(".json")).exists():
                digest.update(hashlib.sha256(labels.read_bytes()).digest())
        return [shard.identity(), digest.hexdigest()]
    except OSError as error:
        raise DataError(f"{error.filename or shard.path} cannot be read: {error.strerror or error}") from error


def _local_unit(shard: Shard) -> Unit:
    if not shard.files:
        return TarUnit(os.path.abspath(shard.path))
    return FilesUnit(
        os.path.abspath(shard.path), tuple(file.relative_to(shard.path).as_posix() for file in shard.files)
    )


def _plan_manifest(name: str, rows: int, path_key: str | None, units: list[Unit], seen: list[Any]) -> None:
    parts, digest = split_manifest(name, rows, path_key)
    units += parts
    seen.append([base_name(name), rows, path_key, digest])


def _plan_url(url: str, size: int, path_key: str | None, units: list[Unit], seen: list[Any]) -> None:
    """Add what a URL names: ranges in braces, globs, folders, files."""
    names = require_extra("braceexpand", "scale").braceexpand(url) if "{" in url else [url]
    for name in names:
        system, path = file_system(name)
        try:
            found = sorted(system.glob(path)) if any(mark in path for mark in "*?[") else [path]
            if not found:
                raise DataError(f"{name} matches nothing; check the URL")
            for one in found:
                _plan_remote(system, one, size, path_key, units, seen)
        except OSError as error:
            raise DataError(f"{name} cannot be read: {error.strerror or error}") from error


def _plan_remote(system: Any, path: str, size: int, path_key: str | None, units: list[Unit], seen: list[Any]) -> None:
    url = str(system.unstrip_protocol(path))
    if is_manifest(path):
        _plan_manifest(url, size, path_key, units, seen)
    elif path.lower().endswith(TAR_SUFFIXES):
        units.append(TarUnit(url))
        seen.append([base_name(path), system.info(path)["size"]])
    elif not system.isdir(path):
        units.append(FilesUnit(folder_of(url), (base_name(path),)))
        seen.append([base_name(path), system.info(path)["size"]])
    else:
        _plan_remote_folder(system, path.rstrip("/"), size, units, seen)


def _plan_remote_folder(system: Any, folder: str, size: int, units: list[Unit], seen: list[Any]) -> None:
    held = system.find(folder, detail=True)
    names = {name[len(folder) + 1 :]: info for name, info in sorted(held.items())}
    visible = [name for name in names if not base_name(name).startswith(".")]
    tars = [name for name in visible if name.lower().endswith(TAR_SUFFIXES)]
    audio = [name for name in visible if os.path.splitext(name)[1].lower() in READ_SUFFIXES]
    if not tars and not audio:
        raise DataError(f"{folder} holds no tar shards and no audio files; name another folder")
    root = str(system.unstrip_protocol(folder))
    units += [TarUnit(f"{root}/{name}") for name in tars]
    units += [FilesUnit(root, tuple(audio[start : start + size])) for start in range(0, len(audio), size)]
    seen += [[name, names[name]["size"]] for name in tars]
    for name in audio:
        labels = names.get(labels_name(name), {}).get("size")
        seen.append([name, names[name]["size"], labels])
    seen.append(size)
