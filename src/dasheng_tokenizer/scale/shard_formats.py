"""Writing one shard of latents, in each of the formats that `generation.latent_index` describes.

The same clips give the same bytes, whenever and wherever they are written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dasheng_tokenizer.errors import OutputError
from dasheng_tokenizer.files import atomic_path, require_extra
from dasheng_tokenizer.generation.latent_index import FORMAT, VERSION, tensor_name

ROW_GROUP_BYTES = 4 << 20
"""Latents in one group of rows of a Parquet file, which is read as a whole."""

Rows = Sequence[dict[str, Any]]


def write_safetensors(stem: Path, rows: Rows, latents: Sequence[Tensor]) -> None:
    """A tensor (T, C) for each clip, and its row in lines of JSON beside it.

    Raises:
        OutputError: it cannot be written.
    """
    path = stem.with_suffix(".safetensors")
    with atomic_path(path) as temporary:
        try:
            # One metadata entry only, since safetensors writes several in random order.
            tensors = {tensor_name(place): tensor for place, tensor in enumerate(latents)}
            save_file(tensors, temporary, {"format": f"{FORMAT} {VERSION}"})
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))  # how its text ends where the system refused
            if number:
                raise OSError(int(number[1]), str(error)) from error  # atomic_path names it
            raise OutputError(f"cannot write {path}: {error}; check free space and permissions") from error
    with atomic_path(stem.with_suffix(".jsonl")) as temporary:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        temporary.write_text(lines, encoding="utf-8", newline="\n")


def write_webdataset(stem: Path, rows: Rows, latents: Sequence[Tensor]) -> None:
    """A sample for each clip: `npy`, an array (T, C), and `json`, its row. Names are unique in the whole data set.

    Raises:
        OutputError: it cannot be written.
        MissingExtraError: webdataset is not installed.
    """
    require_extra("webdataset", "scale")
    from webdataset.writer import TarWriter

    with atomic_path(stem.with_suffix(".tar")) as temporary, temporary.open("wb") as file:
        with TarWriter(file, mtime=0, user="", group="") as archive:
            for place, (row, tensor) in enumerate(zip(rows, latents, strict=True)):
                text = json.dumps(row).encode()
                archive.write({
                    "__key__": f"{stem.name.removeprefix('latents-')}-{tensor_name(place)}",
                    "json": text,
                    "npy": tensor.numpy(),
                })  # fmt: skip


def write_parquet(stem: Path, rows: Rows, latents: Sequence[Tensor]) -> None:
    """A row for each clip: `key`, `captions`, `labels` (JSON), `num_tokens`, `latents` (T·C numbers, token by token).

    Raises:
        OutputError: it cannot be written.
        MissingExtraError: pyarrow is not installed.
    """
    pyarrow, parquet = require_extra("pyarrow", "scale"), require_extra("pyarrow.parquet", "scale")
    flat = [tensor.numpy().ravel() for tensor in latents]
    ends = np.cumsum([0, *map(len, flat)])
    numbers = pyarrow.array(np.concatenate(flat) if flat else np.zeros(0, np.float32))
    table = pyarrow.table({
        "key": pyarrow.array([row["key"] for row in rows], pyarrow.string()),
        "captions": pyarrow.array([list(row["captions"]) for row in rows], pyarrow.list_(pyarrow.string())),
        "labels": pyarrow.array([json.dumps(row["labels"]) for row in rows], pyarrow.string()),
        "num_tokens": pyarrow.array([len(tensor) for tensor in latents], pyarrow.int32()),
        "latents": pyarrow.LargeListArray.from_arrays(pyarrow.array(ends, pyarrow.int64()), numbers),
    })  # fmt: skip
    table = table.replace_schema_metadata({"format": f"{FORMAT} {VERSION}"})
    group = max(1, int(len(rows) * ROW_GROUP_BYTES / max(numbers.nbytes, 1)))
    with atomic_path(stem.with_suffix(".parquet")) as temporary:
        # Neither dictionaries nor compression: both cost time and gain nothing on noisy mantissas.
        parquet.write_table(table, temporary, row_group_size=group, compression="none", use_dictionary=False)


WRITERS: dict[str, Callable[[Path, Rows, Sequence[Tensor]], None]] = {
    "safetensors": write_safetensors,
    "webdataset": write_webdataset,
    "parquet": write_parquet,
}
