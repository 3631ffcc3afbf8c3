"""Checkpoints of a running training: whole or absent, the newest few kept, exact on resume.

A checkpoint is a folder `step-XXXXXXXX` with `tensors.safetensors` (trained weights, optimizer state, moving averages)
and `state.json` (progress, random states of every rank, what the run trains). Frozen weights are not repeated in it.
The folder is written under a temporary name and renamed, so that a run killed at any moment leaves only whole
checkpoints.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dasheng_tokenizer.errors import CheckpointError, ConfigurationError, DashengTokenizerError, OutputError
from dasheng_tokenizer.files import parse_json
from dasheng_tokenizer.training.optimization import ExponentialMovingAverage

if TYPE_CHECKING:
    from lightning_fabric import Fabric

FORMAT = 1

KEPT = "_kept_in_checkpoints"
"""Attribute of parameters that `keep_in_checkpoints` marked."""


class Checkpointable(Protocol):
    """What a checkpoint stores of a training task."""

    modules: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]
    averages: dict[str, ExponentialMovingAverage]

    def identity(self) -> dict[str, Any]:
        """Settings that a resumed run must share with the checkpoint, flat, as JSON holds them."""
        ...


@dataclass
class Progress:
    """How far a run is: steps done, audio seen by all ranks together, steps skipped, seconds at work."""

    step: int = 0
    audio_seconds: float = 0.0
    skipped: int = 0
    elapsed_seconds: float = 0.0

    @property
    def audio_hours(self) -> float:
        """Hours of audio seen, every crop counted each time it is seen."""
        return self.audio_seconds / 3600


def save_checkpoint(fabric: Fabric, folder: Path, task: Checkpointable, progress: Progress, keep: int) -> Path:
    """Write a checkpoint of all ranks and delete the oldest beyond `keep`. Called on every rank.

    Raises:
        OutputError: the folder cannot be written, or the disk is full; older checkpoints stay.
    """
    final = folder / f"step-{progress.step:08d}"
    states = _gather(fabric, random_state())
    failure: str | None = None
    if fabric.is_global_zero:
        try:
            _write(folder, final, task, progress, states)
        except OSError as error:
            failure = f"{final}: cannot write the checkpoint ({error}); free some space or change `output`"
        else:
            for old in list_checkpoints(folder)[:-keep]:
                shutil.rmtree(old, ignore_errors=True)
    failure = _gather(fabric, failure)[0]
    if failure is not None:
        raise OutputError(failure)
    return final


def load_checkpoint(fabric: Fabric, folder: Path, task: Checkpointable) -> Progress:
    """Restore the newest checkpoint in `folder` into `task`; without one, nothing changes. Called on every rank.

    Modules that the checkpoint does not have (discriminators that start later) keep their fresh weights. Random states
    are restored when the number of ranks is the same.

    Raises:
        CheckpointError: a damaged checkpoint.
        ConfigurationError: the checkpoint trains something else than `task`.
    """
    found = list_checkpoints(folder)
    if not found:
        return Progress()
    path = found[-1]
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = parse_json((path / "state.json").read_text(encoding="utf-8"), finite=False)
        tensors = load_file(path / "tensors.safetensors")
        if state["format"] != FORMAT:
            raise CheckpointError(f"{path}: format {state['format']}, but {FORMAT} is known; start a new `output`")
        _check_identity(path, state["identity"], task.identity())
        _restore(task, tensors, state)
        progress = Progress(**state["progress"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DashengTokenizerError):
            raise
        raise CheckpointError(f"{path}: damaged ({error!r}); delete this folder to resume from an older one") from error
    if len(state["random"]) == fabric.world_size:
        set_random_state(state["random"][fabric.global_rank])
    return progress


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / "state.json").is_file())


def clean_leftovers(folder: Path) -> None:
    """Delete what a killed run left half-written."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def random_state() -> dict[str, Any]:
    """States of the random generators of this process (Python, NumPy, torch, accelerators), as JSON holds them."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    accelerators = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": [state.numpy().tobytes().hex() for state in accelerators],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore what `random_state` gave."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_bytes(state["torch"]))
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_bytes(item) for item in state["cuda"]])


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _gather(fabric: Fabric, item: Any) -> list[Any]:
    """Collect one item of every rank, in rank order."""
    if fabric.world_size == 1:
        return [item]
    items: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(items, item)
    return items


def _write(folder: Path, final: Path, task: Checkpointable, progress: Progress, states: list[Any]) -> None:
    from safetensors.torch import save_file

    temporary = folder / f".{final.name}-{os.getpid()}"
    temporary.mkdir(parents=True)
    state = {
        "format": FORMAT,
        "progress": asdict(progress),
        "identity": task.identity(),
        "modules": sorted(task.modules),
        "updates": {name: average.updates for name, average in task.averages.items()},
        "random": states,
    }
    try:
        save_file(_tensors(task), temporary / "tensors.safetensors")
        (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
        for path in temporary.iterdir():
            _sync(path)
        if final.exists():  # The same step again: the old folder gives way only now that the new one is whole.
            shutil.rmtree(final)
        os.replace(temporary, final)
        _sync(folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # safetensors reports a full disk as its own error class.
        if isinstance(error, OSError) or not isinstance(error, Exception):
            raise
        raise OSError(str(error)) from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _tensors(task: Checkpointable) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, module in task.modules.items():
        tensors |= {f"module.{name}.{key}": value for key, value in _trained(module).items()}
    for name, optimizer in task.optimizers.items():
        for index, entries in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{name}.{index}.{key}": value for key, value in entries.items()}
    for name, average in task.averages.items():
        tensors |= {f"average.{name}.{key}": value for key, value in average.state_dict().items()}
    return {key: value.detach().cpu().contiguous() for key, value in tensors.items()}


def _trained(module: nn.Module) -> dict[str, Tensor]:
    """Parameters that are trained, and buffers, among them statistics taken from the data.

    Nothing that is frozen, except for parameters marked by `keep_in_checkpoints`.
    """
    state = module.state_dict(keep_vars=True)
    return {
        name: held
        for name, held in state.items()
        if held.requires_grad or not isinstance(held, nn.Parameter) or getattr(held, KEPT, False)
    }


def keep_in_checkpoints(module: nn.Module) -> None:
    """Mark a frozen module that was made from the data: a resumed run must find it as it was."""
    for parameter in module.parameters():
        setattr(parameter, KEPT, True)


@torch.no_grad()
def _restore(task: Checkpointable, tensors: dict[str, Tensor], state: Mapping[str, Any]) -> None:
    """Copy a checkpoint's tensors into the task, in place."""
    known = set(state["modules"])
    for name, module in task.modules.items():
        if name in known:
            for key, parameter in _trained(module).items():
                parameter.copy_(tensors[f"module.{name}.{key}"])
    for name, optimizer in task.optimizers.items():
        if name in known:
            # Learning rates and decays are the recipe's, so the groups stay; only the moments come from the checkpoint.
            current = optimizer.state_dict()
            current["state"] = _optimizer_state(tensors, f"optimizer.{name}.")
            optimizer.load_state_dict(current)
    for name, average in task.averages.items():
        prefix = f"average.{name}."
        values = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        average.load_state_dict(values, state["updates"][name])


def _optimizer_state(tensors: dict[str, Tensor], prefix: str) -> dict[int, dict[str, Tensor]]:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(prefix):
            index, entry = key.removeprefix(prefix).split(".")
            state.setdefault(int(index), {})[entry] = value
    return state


def _check_identity(path: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    wanted = json.loads(json.dumps(wanted))
    different = sorted(key for key in saved.keys() | wanted.keys() if saved.get(key) != wanted.get(key))
    if different:
        listed = "; ".join(f"{key}: {saved.get(key)!r} there, {wanted.get(key)!r} here" for key in different)
        raise ConfigurationError(f"{path} is of another run ({listed}); choose another `output` or the same settings")
