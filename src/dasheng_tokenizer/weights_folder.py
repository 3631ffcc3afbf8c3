"""Folders of `model.safetensors` and `config.json` for the models that transformers does not keep: generator, denoiser.

The two files belong together by a digest, so that a pair from a save that was cut off is refused and not used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dasheng_tokenizer.checkpoint_sizes import refuse_other_weights
from dasheng_tokenizer.errors import CheckpointError
from dasheng_tokenizer.files import atomic_path, parse_json

WEIGHTS, CONFIG = "model.safetensors", "config.json"

VERSION = 1
"""Of the folder's layout."""

PREFIX = "dashengtokenizer-"
"""Of `model_type`; what follows is what the model is called in messages."""


def write_weights_folder(
    folder: str | os.PathLike[str], kind: str, state: Mapping[str, Tensor], config: Mapping[str, Any]
) -> None:
    """Write weights and config.json into a folder, which is made; a model that is there is replaced.

    Both files are written aside and then take their names; a process killed between the two renamings leaves a pair
    that does not match, which `read_weights_folder` refuses.

    Args:
        folder: where to.
        kind: what the model is called, such as `generator`.
        state: weights by name, on the CPU, contiguous.
        config: what else config.json tells.

    Raises:
        CheckpointError: a weight is NaN or infinite.
        OutputError: the folder cannot be written.
    """
    _refuse_bad_numbers(state, f"this {kind} cannot be saved")
    digest = _digest(state)
    told = {"model_type": PREFIX + kind, "version": VERSION, "weights": digest, **config}
    text = json.dumps(told, indent=2, ensure_ascii=False) + "\n"
    with atomic_path(Path(folder) / CONFIG) as config_file, atomic_path(Path(folder) / WEIGHTS) as weights_file:
        config_file.write_text(text, encoding="utf-8")
        save_file(dict(state), weights_file, metadata={"weights": digest})  # one entry: the order of several is random


def read_weights_folder(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the weights of a folder.

    Raises:
        CheckpointError: no such folder, another kind or version, damaged, or two files that do not belong together.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; name that of a {kind}, with {CONFIG} and {WEIGHTS}")
    refuse_other_weights(path)
    config = _read_config(path, kind)
    return config, _read_weights(path, kind, config.get("weights"))


def model_folder(name: str | os.PathLike[str], kind: str) -> Path:
    """A folder as it is; of a hub name OWNER/NAME the folder in the local cache that its files were downloaded to.

    Only JSON and safetensors are fetched: nothing that runs and nothing that is unpickled.

    Raises:
        CheckpointError: no such folder and no hub name, or it cannot be downloaded.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise CheckpointError(
            f"{name}: no such folder, and no hub name of the form OWNER/NAME; name that of a {kind}, with {CONFIG} and "
            f"{WEIGHTS}"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # many kinds: network, names, permissions, an incomplete cache
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{name}: no such folder, and it cannot be had from the hub ({reason}); check the name and the network, or "
            f"name a folder of the {kind}"
        ) from error


def check_weights(path: Path, kind: str, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Refuse weights of a folder that are not those of the model that its config describes.

    Raises:
        CheckpointError: weights missing, unknown, of another shape, NaN or infinite.
    """
    misshapen = {name for name in set(wanted) & set(found) if wanted[name].shape != found[name].shape}
    unsuitable = {"missing": set(wanted) - set(found), "unknown": set(found) - set(wanted), "misshapen": misshapen}
    for word, names in unsuitable.items():
        if names:
            raise CheckpointError(
                f"{path}: {len(names)} weights {word}, for example {min(names)}; this is no {kind} of the sizes in "
                f"its {CONFIG}; save or copy it again"
            )
    _refuse_bad_numbers(found, f"{path} is no usable {kind}")


def check_depth(path: Path, kind: str, depth: int, found: Mapping[str, Tensor]) -> None:
    """Refuse a config of more blocks than there are weights, before blocks are made.

    Raises:
        CheckpointError: it has.
    """
    if depth > len(found):
        raise CheckpointError(
            f"{path}: {CONFIG} says {depth} blocks, but there are {len(found)} weights; this is no {kind} of the sizes "
            f"in its {CONFIG}; save or copy it again"
        )


def damaged(path: Path, error: Exception) -> CheckpointError:
    """For a config whose entries make no model."""
    return CheckpointError(f"{path} is damaged or incomplete ({type(error).__name__}: {error}); save or copy it again")


def _digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and numbers, in hex."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_config(folder: Path, kind: str) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is missing or damaged ({error}); name the folder of a {kind}") from error
    found = config.get("model_type") if isinstance(config, dict) else None
    if found != PREFIX + kind:
        raise CheckpointError(f"{path} is of kind {found!r}, not {PREFIX + kind!r}; name the folder of a {kind}")
    if config.get("version") != VERSION:
        raise CheckpointError(
            f"{path} is of version {config.get('version')}; this package reads version {VERSION}, update it or save "
            f"the {kind} again"
        )
    return dict(config)


def _read_weights(folder: Path, kind: str, digest: str | None) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    try:
        with safe_open(path, "pt") as opened:
            found = (opened.metadata() or {}).get("weights")
            state = {name: opened.get_tensor(name) for name in opened.keys()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is missing or damaged ({error}); save or copy the {kind} again") from error
    if found is None or found != digest:
        raise CheckpointError(
            f"{path} does not belong to the {CONFIG} beside it, as after a save that was cut off; save or copy both "
            "again"
        )
    return state


def _refuse_bad_numbers(state: Mapping[str, Tensor], problem: str) -> None:
    for name, tensor in state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{problem}: {name} holds NaN or infinity; go back to an earlier checkpoint")
