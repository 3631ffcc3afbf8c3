"""Embeddings of a split, computed once and kept on disk.

Layout. One folder for each (embedder, split), named by a hash of both; in it parts of some hundred clips:

    00000.safetensors   for each representation NAME: `NAME/mean` (clips, D) float32, the mean over time, and for
                        splits of frame tasks `NAME/frames` (frames of all clips, D) float16 and `lengths` (clips,)
    00000.json          keys and labels; written last, so that its presence says that the part is whole
    done.json           clips that were left out, with reasons; its presence says that the split is whole

A killed extraction repeats at most one part.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from dasheng_tokenizer.errors import DataError
from dasheng_tokenizer.evaluation.probe_tasks import Example, Label, label_from_json, label_to_json
from dasheng_tokenizer.evaluation.representations import Embedder
from dasheng_tokenizer.files import atomic_path, make_folder, parse_json
from dasheng_tokenizer.spectral import SAMPLING_RATE

STORE_VERSION = 1

CLIPS_PER_PART = 256

BATCH_SECONDS = 120.0
"""Audio, padding included, that is embedded at once."""

_log = logging.getLogger(__name__)


@dataclass
class Embeddings:
    """One representation of one split.

    Attributes:
        keys: of the clips.
        labels: as the data gave them; None where it had none.
        means: (clips, D) float32, mean over time of each clip.
        frames: for each clip (T, D) float16; empty where only means are kept.
        skipped: clips without an embedding, with reasons.
    """

    keys: list[str]
    labels: list[Label | None]
    means: Tensor
    frames: list[npt.NDArray[np.float16]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


class Split:
    """What the store needs to know of a split: where its clips come from, and whether frames are kept."""

    def __init__(self, name: str, identity: str, examples: Any, frames: bool = False) -> None:
        """Describe a split.

        Args:
            name: for messages.
            identity: changes with the data.
            examples: called with a dict that receives what is left out; gives the examples in a fixed order.
            frames: keep every frame, not the mean over time alone.
        """
        self.name, self.identity, self.examples, self.frames = name, identity, examples, frames


class EmbeddingStore:
    """A folder of embeddings."""

    def __init__(self, folder: str | Path, progress: bool = True) -> None:
        """Args: the folder, made when something is written; whether bars are shown."""
        self.folder, self.progress = Path(folder), progress

    def load(self, embedder: Embedder, split: Split) -> dict[str, Embeddings]:
        """All representations of a split; what is missing is extracted first.

        Raises:
            DataError: no clip of the split could be embedded, or a damaged store.
            OutputError: the folder cannot be written.
        """
        folder = self.folder / _digest(
            {
                "version": STORE_VERSION,
                "embedder": embedder.identity,
                "names": sorted(embedder.names),
                "split": split.identity,
                "frames": split.frames,
            }
        )
        if not (folder / "done.json").is_file():
            self._extract(embedder, split, folder)
        return _read(folder, embedder.names, split)

    def _extract(self, embedder: Embedder, split: Split, folder: Path) -> None:
        make_folder(folder)
        parts = _whole_parts(folder)
        known = {key for part in parts for key in _read_json(part)["keys"]}
        skipped: dict[str, str] = {}
        todo = (example for example in split.examples(skipped) if example.key not in known)
        number = len(parts)
        with tqdm(desc=f"embedding {split.name}", unit=" clips", disable=None if self.progress else True) as bar:
            while group := list(itertools.islice(todo, CLIPS_PER_PART)):
                _write_part(embedder, group, folder / f"{number:05d}", split.frames, skipped)
                number += 1
                bar.update(len(group))
        # Reasons found by an earlier, killed run come again: broken clips are read again, embedded ones are not.
        for part in parts:
            skipped = {**_read_json(part)["skipped"], **skipped}
        _write_json(folder / "done.json", {"skipped": skipped})
        if skipped:
            _log.warning("%s: %d clips left out, for example %s", split.name, len(skipped), next(iter(skipped.items())))


def _write_part(
    embedder: Embedder, group: Sequence[Example], path: Path, frames: bool, skipped: dict[str, str]
) -> None:
    """Embed some clips and keep them; those whose embedding is not finite are noted and left out."""
    kept: list[Example] = []
    found: list[dict[str, Tensor]] = []
    bad: dict[str, str] = {}
    for batch in _batches(group):
        for example, item in zip(batch, embedder([example.audio for example in batch]), strict=True):
            if all(bool(torch.isfinite(tensor).all()) for tensor in item.values()):
                kept.append(example)
                found.append(item)
            else:
                bad[example.key] = "its embedding is not finite"
    skipped.update(bad)
    tensors: dict[str, Tensor] = {}
    for name in embedder.names if kept else ():
        tensors[f"{name}/mean"] = torch.stack([item[name].mean(0) for item in found])  # (clips, D)
        if frames:
            tensors[f"{name}/frames"] = torch.cat([item[name] for item in found]).half()
    if frames and kept:
        tensors["lengths"] = torch.tensor([len(item[embedder.names[0]]) for item in found])
    with atomic_path(path.with_suffix(".safetensors")) as temporary:
        save_file(tensors, temporary)
    labels = [label_to_json(example.label) for example in kept]
    _write_json(path.with_suffix(".json"), {"keys": [e.key for e in kept], "labels": labels, "skipped": bad})


def _batches(group: Sequence[Example]) -> Iterator[list[Example]]:
    """Clips of like length together, at most BATCH_SECONDS of padded audio each; one longer clip goes alone."""
    batch: list[Example] = []
    for example in sorted(group, key=lambda item: len(item.audio)):
        if batch and (len(batch) + 1) * len(example.audio) > BATCH_SECONDS * SAMPLING_RATE:
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch


def _read(folder: Path, names: Sequence[str], split: Split) -> dict[str, Embeddings]:
    keys: list[str] = []
    labels: list[Label | None] = []
    tensors: list[dict[str, Tensor]] = []
    for part in _whole_parts(folder):
        held = _read_json(part)
        if not held["keys"]:
            continue
        keys += held["keys"]
        labels += [label_from_json(label) for label in held["labels"]]
        try:
            tensors.append(load_file(part.with_suffix(".safetensors")))
        except (OSError, SafetensorError) as error:
            raise DataError(f"{part}: damaged ({error}); delete the folder {folder} and extract again") from error
    skipped = _read_json(folder / "done.json")["skipped"]
    if not keys:
        reason = f"; {len(skipped)} left out, for example {next(iter(skipped.items()))}" if skipped else ""
        raise DataError(f"{split.name}: no clip could be embedded{reason}")
    result = {}
    for name in names:
        means = torch.cat([item[f"{name}/mean"] for item in tensors])  # (clips, D)
        frames = [array for item in tensors for array in _frames(item, name)] if split.frames else []
        result[name] = Embeddings(keys, labels, means, frames, skipped)
    return result


def _frames(item: dict[str, Tensor], name: str) -> list[npt.NDArray[np.float16]]:
    return [part.numpy() for part in item[f"{name}/frames"].split(item["lengths"].tolist())]


def _whole_parts(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.json") if path.stem.isdigit())


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:20]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        held: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"), finite=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is missing or damaged; delete its folder and extract again") from error
    return held


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value), encoding="utf-8")
