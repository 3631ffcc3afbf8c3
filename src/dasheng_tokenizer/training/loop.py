"""The training loop, whatever is trained: steps, log, validation, checkpoints, resume, a clean stop on a signal.

What is trained comes as a `Task`. One process, `torchrun` with several, and several nodes run the same code through
Lightning Fabric.
"""

from __future__ import annotations

import inspect
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dasheng_tokenizer.errors import ConfigurationError
from dasheng_tokenizer.files import atomic_path, make_folder, parse_json, require_extra
from dasheng_tokenizer.training.configuration import LoopConfig
from dasheng_tokenizer.training.optimization import any_rank
from dasheng_tokenizer.training.run_checkpoint import (
    Checkpointable,
    Progress,
    clean_leftovers,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from dasheng_tokenizer.training.run_log import RunLog
from dasheng_tokenizer.training.sharding import fsdp_strategy

if TYPE_CHECKING:
    from lightning_fabric import Fabric

SUMMARY = "summary.json"
"""Written last: its presence says that a run is finished."""

CHECKPOINTS = "checkpoints"
"""Their folder inside the run folder."""

MAX_SKIPPED_IN_A_ROW = 100
"""Steps without a finite gradient after which a run gives up: its weights no longer learn anything."""


@dataclass(frozen=True)
class StepResult:
    """Outcome of one optimizer step: scalar losses, detached; `applied` is False where a step was skipped."""

    losses: dict[str, Tensor]
    applied: bool


class Task(Checkpointable, Protocol):
    """What the loop trains. Every method is called on every rank."""

    def batches(self, first_step: int, last_step: int) -> Iterator[Any]:
        """This rank's batches of the steps `first_step` … `last_step` - 1, a function of seed, step and rank alone."""
        ...

    def audio_seconds(self, batch: Any) -> float:
        """Seconds of audio in a batch of this rank."""
        ...

    def training_step(self, batch: Any, step: int) -> StepResult:
        """One optimizer step."""
        ...

    def validate(self, step: int, log: RunLog) -> dict[str, float]:
        """Measure the averaged weights on held-out clips."""
        ...

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the result of the run; `summary` says how it came about."""
        ...


def make_fabric(config: LoopConfig) -> Fabric:
    """Start Lightning Fabric: devices, precision, and DDP or FSDP where there is more than one process.

    Under `torchrun` the number of processes is torchrun's, whatever the recipe says.

    Raises:
        ConfigurationError: `strategy: fsdp` for several devices without `torchrun`.
        MissingExtraError: Lightning Fabric is not installed.
    """
    lightning = require_extra("lightning_fabric", "train")
    devices, nodes = config.devices, config.num_nodes
    if "TORCHELASTIC_RUN_ID" in os.environ:
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    strategy: Any = config.strategy
    several = nodes > 1 or (isinstance(devices, int) and devices > 1)
    if strategy == "fsdp":
        strategy = _fsdp(config, devices, nodes)
    if strategy in ("auto", "ddp") and several:
        # Buffers are constants here (windows, mel filters, frozen statistics): nothing to send each step. torch 2.13
        # renamed the setting.
        known = inspect.signature(torch.nn.parallel.DistributedDataParallel).parameters
        setting = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        strategy = lightning.strategies.DDPStrategy(gradient_as_bucket_view=True, **{setting: False})
    fabric: Fabric = lightning.Fabric(
        accelerator=config.accelerator, devices=devices, num_nodes=nodes, strategy=strategy, precision=config.precision
    )
    # Fabric would round what goes into a module to bfloat16 before the module sees it: noise at -56 dB in all audio,
    # which fills every band that holds nothing, and latents that no encoder gives. Autocast rounds where it may.
    fabric.strategy.precision.convert_input = _unchanged  # type: ignore[method-assign]
    fabric.launch()
    return fabric


def _unchanged(data: Any) -> Any:
    return data


def _fsdp(config: LoopConfig, devices: int | str, nodes: int) -> Any:
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # One process holds everything anyhow.
        return fsdp_strategy(int(devices) * nodes) if int(devices) * nodes > 1 else "auto"
    found = torch.cuda.device_count() if config.accelerator != "cpu" and devices == "auto" else devices
    if nodes > 1 or found not in ("auto", 0, 1):
        raise ConfigurationError("strategy fsdp needs torchrun: torchrun --nproc_per_node=N -m dasheng_tokenizer.cli …")
    return "auto"


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed Python's, NumPy's and torch's generators of this process."""
    mixed = int(np.random.SeedSequence([seed, rank]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def fit(fabric: Fabric, task: Task, config: LoopConfig) -> bool:
    """Run or resume a training.

    Args:
        fabric: launched.
        task: set up with `fabric`.
        config: of the run; `config.output` is the run folder.

    Returns:
        True when the run is finished, False when a signal stopped it (its checkpoint is written).

    Raises:
        OutputError: the run folder cannot be written.
        CheckpointError: the newest checkpoint is damaged.
        ConfigurationError: the folder holds another run, or the run does not learn (gradients are never finite).
    """
    folder = config.output / CHECKPOINTS
    if fabric.is_global_zero:
        make_folder(folder)
        clean_leftovers(folder)
    fabric.barrier()
    progress = load_checkpoint(fabric, folder, task)
    first = progress.step
    if first:
        fabric.print(f"Resuming {config.output} at step {first} of {config.steps}.")
    with StopSignal() as stop, RunLog(config.output, first, active=fabric.is_global_zero) as log:
        finished = _run_steps(fabric, task, config, progress, log, stop)
        if progress.step > first:
            save_checkpoint(fabric, folder, task, progress, config.keep_checkpoints)
        if not finished:
            fabric.print(f"Stopped at step {progress.step}; the same command goes on from there.")
            return False
        metrics = _validate(fabric, task, progress, log)
    summary = summarise(fabric, config, progress, metrics)
    task.finish(summary)
    if fabric.is_global_zero:
        with atomic_path(config.output / SUMMARY) as path:
            path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    fabric.barrier()
    return True


def is_finished(config: LoopConfig) -> bool:
    """Whether the run folder holds a finished run of at least as many steps."""
    try:
        summary = parse_json((config.output / SUMMARY).read_text(encoding="utf-8"), finite=False)
        return int(summary["steps"]) >= config.steps
    except (OSError, ValueError, KeyError, TypeError):
        return False


def is_started(config: LoopConfig) -> bool:
    """Whether the run folder holds a checkpoint to go on from."""
    return bool(list_checkpoints(config.output / CHECKPOINTS))


def summarise(fabric: Fabric, config: LoopConfig, progress: Progress, metrics: dict[str, float]) -> dict[str, Any]:
    """Facts of a run for its model card: steps, hours of audio seen, time, hardware, quality."""
    device = fabric.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {
        "steps": progress.step,
        "audio_hours_seen": round(progress.audio_hours, 4),
        "training_hours": round(progress.elapsed_seconds / 3600, 4),
        "skipped_steps": progress.skipped,
        "hardware": f"{fabric.world_size} x {name}",
        "precision": config.precision,
        "torch": torch.__version__,
        "validation": metrics,
    }


class StopSignal:
    """Turns the first SIGTERM or SIGINT into a wish to stop after the current step; a second one acts as usual."""

    def __init__(self) -> None:
        self.wanted = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        """Take the signals over, where this is the main thread."""
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._previous[number] = signal.signal(number, self._receive)
            except ValueError:  # Signals belong to the main thread; elsewhere the caller decides when to stop.
                break
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.wanted = True
        signal.signal(number, self._previous[number])


@dataclass
class _Meter:
    """Means of the losses and rates since the last log line."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    audio_seconds: float = 0.0
    wait_seconds: float = 0.0
    seconds: float = 0.0

    def add(self, result: StepResult) -> None:
        """Take in a step; a skipped one would turn every mean into NaN."""
        if result.applied:
            for name, value in result.losses.items():
                self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
                self.counts[name] = self.counts.get(name, 0) + 1

    def values(self, fabric: Fabric) -> dict[str, Any]:
        """Means over steps and ranks. The only place where losses leave the accelerator."""
        names = sorted(self.sums)
        means: list[float] = []
        if names:
            stacked = torch.stack([self.sums[name].float() / self.counts[name] for name in names])
            if fabric.world_size > 1:
                stacked = fabric.all_reduce(stacked, reduce_op="mean")  # type: ignore[assignment]
            means = stacked.tolist()
        rates = {
            "audio_seconds_per_second": round(self.audio_seconds / max(self.seconds, 1e-9), 2),
            "data_wait": round(self.wait_seconds / max(self.seconds, 1e-9), 4),
        }
        return {**{name: round(mean, 6) for name, mean in zip(names, means, strict=True)}, **rates}


def _run_steps(
    fabric: Fabric, task: Task, config: LoopConfig, progress: Progress, log: RunLog, stop: StopSignal
) -> bool:
    """Do the remaining steps; False when a signal cut them short."""
    from tqdm import tqdm

    shown = None if fabric.is_global_zero else True  # None: only on a terminal
    bar = tqdm(total=config.steps, initial=progress.step, unit="step", disable=shown, smoothing=0.05)
    meter, in_a_row = _Meter(), 0
    batches = task.batches(progress.step, config.steps)
    with bar:
        while progress.step < config.steps:
            started = time.perf_counter()
            batch = next(batches)
            meter.wait_seconds += time.perf_counter() - started
            result = task.training_step(batch, progress.step)
            in_a_row = 0 if result.applied else in_a_row + 1
            if in_a_row >= MAX_SKIPPED_IN_A_ROW:
                raise ConfigurationError(
                    f"{in_a_row} steps in a row had no finite gradient (last: step {progress.step}); lower "
                    "optimizer.lr, or look for broken audio in the data"
                )
            _count(fabric, task, batch, progress, meter, result, time.perf_counter() - started)
            bar.update()
            stopping = _stop_wanted(fabric, stop)
            last = stopping or progress.step == config.steps
            if last or progress.step % config.log_every == 0:
                _log(fabric, progress, meter, log, bar)
                meter = _Meter()
            if stopping and progress.step < config.steps:
                return False
            # The end of the run saves and validates in any case.
            if not last and progress.step % config.checkpoint_every == 0:
                save_checkpoint(fabric, config.output / "checkpoints", task, progress, config.keep_checkpoints)
            if not last and config.validate_every and progress.step % config.validate_every == 0:
                _validate(fabric, task, progress, log)
    return True


def _count(
    fabric: Fabric, task: Task, batch: Any, progress: Progress, meter: _Meter, result: StepResult, seconds: float
) -> None:
    audio_seconds = task.audio_seconds(batch) * fabric.world_size
    progress.step += 1
    progress.audio_seconds += audio_seconds
    progress.elapsed_seconds += seconds
    progress.skipped += 0 if result.applied else 1
    meter.audio_seconds += audio_seconds
    meter.seconds += seconds
    meter.add(result)


def _log(fabric: Fabric, progress: Progress, meter: _Meter, log: RunLog, bar: Any) -> None:
    values = meter.values(fabric)
    shared = {"audio_hours": round(progress.audio_hours, 4), "hours": round(progress.elapsed_seconds / 3600, 4)}
    log.record("train", progress.step, {**values, **shared, "skipped": progress.skipped})
    bar.set_postfix({name: f"{values[name]:.3g}" for name in ("loss", "audio_seconds_per_second") if name in values})


def _validate(fabric: Fabric, task: Task, progress: Progress, log: RunLog) -> dict[str, float]:
    metrics = task.validate(progress.step, log)
    log.record("validation", progress.step, {**metrics, "audio_hours": round(progress.audio_hours, 4)})
    shown = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
    fabric.print(f"step {progress.step}, {progress.audio_hours:.2f} h of audio seen: {shown}")
    fabric.barrier()
    return metrics


def _stop_wanted(fabric: Fabric, stop: StopSignal) -> bool:
    """Whether any rank was asked to stop; a signal may reach one only."""
    if fabric.world_size == 1:
        return stop.wanted
    return any_rank(fabric, torch.tensor(stop.wanted, device=fabric.device))
