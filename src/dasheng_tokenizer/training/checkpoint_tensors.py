"""Tensors of a checkpoint as safetensors: one file of whole tensors, or a file of rows from each process.

The files of rows are laid out as those of torch's own `HuggingFaceStorageWriter`: their metadata tells where in the
whole tensor the rows of each begin. Any number of processes reads back what any other number has written, each only
the rows that it holds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dasheng_tokenizer.files import parse_json
from dasheng_tokenizer.training.sharding import first_row, local

WHOLE = "tensors.safetensors"
OFFSETS = "DCP_SHARDING_INFO"
"""Key of the metadata, as torch names it."""


def file_names(ranks: int, sharded: bool) -> list[str]:
    """Files of a checkpoint, one for each rank if the run is sharded."""
    return [f"tensors-{rank:05d}-of-{ranks:05d}.safetensors" for rank in range(ranks)] if sharded else [WHOLE]


def write_rows(path: Path, tensors: Mapping[str, Tensor], rank: int) -> None:
    """Write this rank's rows of sharded tensors; of tensors that all ranks hold alike, rank 0 writes its own.

    Raises:
        OSError, SafetensorError: the file cannot be written.
    """
    from safetensors.torch import save_file

    rows: dict[str, Tensor] = {}
    offsets: dict[str, dict[str, list[int]]] = {}
    for name, tensor in tensors.items():
        held = local(tensor)
        sharded = held is not tensor
        if held.numel() if sharded else rank == 0:
            rows[name] = held.detach().cpu().contiguous()
            start = first_row(tensor) if sharded else 0
            offsets[name] = {"saved_offsets": [start, *[0] * (held.ndim - 1)] if held.ndim else []}
    save_file(rows, path, metadata={"format": "pt", "DCP_VERSION": "1.0", OFFSETS: json.dumps(offsets)})


class CheckpointTensors:
    """Reads tensors, or this process's rows of them, wherever they lie."""

    def __init__(self, folder: Path, files: Sequence[str] = (WHOLE,)) -> None:
        """Read the headers.

        Args:
            folder: of the checkpoint.
            files: in it.

        Raises:
            OSError, SafetensorError, ValueError: a file that is missing or damaged.
        """
        from safetensors import safe_open

        self._pieces: dict[str, list[tuple[int, int, Any]]] = {}  # first row, end, file
        for name in files:
            path = folder / Path(name).name
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing")
            opened = safe_open(path, framework="pt")
            offsets = parse_json((opened.metadata() or {}).get(OFFSETS, "{}"))
            for key in opened.keys():  # noqa: SIM118 (no mapping)
                shape = opened.get_slice(key).get_shape()
                try:
                    start = int(offsets[key]["saved_offsets"][0]) if shape and key in offsets else 0
                except (LookupError, TypeError) as error:
                    raise ValueError(f"{path}: no offset of {key}") from error
                self._pieces.setdefault(key, []).append((start, start + (shape[0] if shape else 1), opened))
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece[:2])

    def names(self, prefix: str = "") -> list[str]:
        """Names that begin with a prefix."""
        return [name for name in self._pieces if name.startswith(prefix)]

    def whole(self, name: str) -> Tensor:
        """A tensor with all its rows.

        Raises:
            KeyError: it is not there, or not all of it.
        """
        pieces = self._pieces[name]
        if not pieces[0][2].get_slice(name).get_shape():
            scalar: Tensor = pieces[0][2].get_tensor(name)
            return scalar
        return self._rows(name, 0, max(end for _, end, _ in pieces))

    def rows_like(self, name: str, tensor: Tensor) -> Tensor:
        """The rows that this process holds of a sharded tensor; the whole for one that is not sharded.

        Raises:
            KeyError: it is not there, or not all of it.
        """
        held = local(tensor)
        if held is tensor:
            return self.whole(name)
        if not len(held):
            return torch.empty(held.shape, dtype=held.dtype)
        start = first_row(tensor)
        return self._rows(name, start, start + len(held))

    def state(self, prefix: str) -> dict[str, Tensor]:
        """Whole tensors whose names begin with a prefix, without it."""
        return {name.removeprefix(prefix): self.whole(name) for name in self.names(prefix)}

    def _rows(self, name: str, start: int, end: int) -> Tensor:
        parts: list[Tensor] = []
        reached = start
        for first, last, opened in self._pieces[name]:
            if first <= reached < min(last, end):
                parts.append(opened.get_slice(name)[reached - first : min(last, end) - first])
                reached = min(last, end)
        if reached < end:
            raise KeyError(f"rows {reached} to {end} of {name}")
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def open_tensors(folder: Path, state: Mapping[str, Any]) -> CheckpointTensors:
    """The tensors of a checkpoint, whose `state.json` names its files since runs can be sharded.

    Raises:
        OSError, SafetensorError, ValueError: a file that is missing or damaged.
    """
    files = state.get("files", [WHOLE])
    if not (isinstance(files, list) and all(isinstance(name, str) for name in files)):
        raise ValueError("files is no list of names")
    return CheckpointTensors(folder, files)
