"""Checkpoints of a running training: whole or absent, the newest few kept, exact on resume.

A checkpoint is a folder `step-XXXXXXXX` with `tensors.safetensors` (trained weights, optimizer state, moving averages),
of a sharded run one such file from each rank, and `state.json` (progress, random states of every rank, what the run
trains). Frozen weights are not repeated in it. A run may go on with another number of ranks, sharded or not.
The folder is written under a temporary name and renamed, so that a run killed at any moment leaves only whole
checkpoints.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dasheng_tokenizer.errors import CheckpointError, ConfigurationError, DashengTokenizerError, OutputError
from dasheng_tokenizer.files import parse_json
from dasheng_tokenizer.training.checkpoint_tensors import CheckpointTensors, file_names, open_tensors, write_rows
from dasheng_tokenizer.training.optimization import ExponentialMovingAverage
from dasheng_tokenizer.training.sharding import is_sharded, like, local

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
    temporary = folder / f".{final.name}-{_gather(fabric, os.getpid())[0]}"
    sharded = any(is_sharded(module) for module in task.modules.values())
    files = file_names(fabric.world_size, sharded)
    tensors = _tensors(task) if sharded or fabric.is_global_zero else {}

    def write() -> None:
        if sharded or fabric.is_global_zero:
            path = temporary / files[fabric.global_rank]
            write_rows(path, tensors, fabric.global_rank)
            _sync(path)

    def complete() -> None:
        _write_state(temporary / "state.json", task, progress, states, files)
        if final.exists():  # The same step again: the old folder gives way only now that the new one is whole.
            shutil.rmtree(final)
        os.replace(temporary, final)
        _sync(folder)

    failure = _attempt(fabric, lambda: temporary.mkdir(parents=True) if fabric.is_global_zero else None)
    failure = failure or _attempt(fabric, write)
    failure = failure or _attempt(fabric, lambda: complete() if fabric.is_global_zero else None)
    if fabric.is_global_zero:
        shutil.rmtree(temporary, ignore_errors=True)
        for old in [] if failure else list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    if failure is not None:
        shared = ", which all nodes must share" if sharded else ""
        remedy = f"free some space or change `output`{shared}"
        raise OutputError(f"{final}: cannot write the checkpoint ({failure}); {remedy}")
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

    try:
        state = parse_json((path / "state.json").read_text(encoding="utf-8"), finite=False)
        tensors = open_tensors(path, state)
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


def _attempt(fabric: Fabric, action: Callable[[], None]) -> str | None:
    """Do something on every rank that may fail on one; what failed first, known to all."""
    from safetensors import SafetensorError

    failure: str | None = None
    try:
        action()
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error class
        failure = str(error)
    return next((text for text in _gather(fabric, failure) if text is not None), None)


def _write_state(path: Path, task: Checkpointable, progress: Progress, states: list[Any], files: list[str]) -> None:
    state = {
        "format": FORMAT,
        "progress": asdict(progress),
        "identity": task.identity(),
        "modules": sorted(task.modules),
        "updates": {name: average.updates for name, average in task.averages.items()},
        "random": states,
        "files": files,
    }
    path.write_text(json.dumps(state), encoding="utf-8")
    _sync(path)
    _sync(path.parent)


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
        for index, entries in _inner(optimizer).state_dict()["state"].items():
            tensors |= {f"optimizer.{name}.{index}.{key}": value for key, value in entries.items()}
    for name, average in task.averages.items():
        tensors |= {f"average.{name}.{key}": value for key, value in average.state_dict().items()}
    return tensors


def _inner(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Without Fabric's wrapper, which shows the state to rank 0 alone."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


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
def _restore(task: Checkpointable, tensors: CheckpointTensors, state: Mapping[str, Any]) -> None:
    """Copy a checkpoint's tensors into the task, in place; of sharded ones this rank's rows."""
    known = set(state["modules"])
    for name, module in task.modules.items():
        if name in known:
            for key, parameter in _trained(module).items():
                local(parameter).copy_(tensors.rows_like(f"module.{name}.{key}", parameter))
    for name, optimizer in task.optimizers.items():
        if name in known:
            # Learning rates and decays are the recipe's, so the groups stay; only the moments come from the checkpoint.
            current = _inner(optimizer).state_dict()
            current["state"] = _optimizer_state(tensors, f"optimizer.{name}.", optimizer)
            _inner(optimizer).load_state_dict(current)
    for name, average in task.averages.items():
        held = average.state_dict().items()
        values = {key: tensors.rows_like(f"average.{name}.{key}", value) for key, value in held}
        average.load_state_dict(values, state["updates"][name])


def _optimizer_state(
    tensors: CheckpointTensors, prefix: str, optimizer: torch.optim.Optimizer
) -> dict[int, dict[str, Tensor]]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key in tensors.names(prefix):
        index, entry = key.removeprefix(prefix).split(".")
        parameter = parameters[int(index)]
        # The count of steps is one number for each parameter; the moments are sharded as their parameter is.
        value = tensors.whole(key) if entry == "step" else like(parameter, tensors.rows_like(key, parameter))
        state.setdefault(int(index), {})[entry] = value
    return state


def _check_identity(path: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    wanted = json.loads(json.dumps(wanted))
    different = sorted(key for key in saved.keys() | wanted.keys() if saved.get(key) != wanted.get(key))
    if different:
        listed = "; ".join(f"{key}: {saved.get(key)!r} there, {wanted.get(key)!r} here" for key in different)
        raise ConfigurationError(f"{path} is of another run ({listed}); choose another `output` or the same settings")
