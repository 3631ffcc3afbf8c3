"""The engine that uses Ray: actors on one machine or on a cluster, one model each.

Actors and not Ray Data: a unit of work is minutes of reading, encoding and writing, of which nothing but a count comes
back, so there is no data for Ray to move, and tries are counted by unit. An actor holds one unit at a time, which is
all the backpressure needed. Actors that wait for a node are the demand that Ray's autoscaler sees; one that finds no
more work is ended, which frees its node.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dasheng_tokenizer.errors import ConfigurationError, DashengTokenizerError
from dasheng_tokenizer.files import require_extra
from dasheng_tokenizer.scale.shard_writer import EncodingJob
from dasheng_tokenizer.scale.work import Message, WorkQueue, load_checked, try_unit

PATIENCE = 60.0
"""Seconds without one worker, after which the run says what it waits for."""


@dataclass(frozen=True)
class RayActors:
    """Actors of a Ray cluster. One that dies, with its node or alone, is replaced.

    Attributes:
        workers: most actors at a time; None takes as many as its GPUs, or its cores, have room for.
        model_name: folder or hub name of the tokenizer, the same on all nodes; None is the embedded one.
        address: of the cluster, such as `auto` or `ray://head:10001`; None takes `RAY_ADDRESS`, or starts Ray here.
        device: cpu or cuda; None takes GPUs where the cluster has them.
        cpus: cores, and threads, of each actor.
        gpus: share of a GPU that each actor takes where it uses one.
    """

    workers: int | None
    model_name: str | None
    address: str | None = None
    device: str | None = None
    cpus: int = 1
    gpus: float = 1

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if (self.workers is not None and self.workers < 1) or self.cpus < 1:
            raise ConfigurationError(f"{self.workers} workers of {self.cpus} cores do nothing; give at least one each")
        if not 0 < self.gpus <= 1:
            raise ConfigurationError(f"a worker takes a GPU or a share of one, not {self.gpus}; give 1, 0.5, 0.25, …")

    def run(self, job: EncodingJob, numbers: Sequence[int], advance: Callable[[int], None]) -> None:
        """As in `encode.Engine`.

        Raises:
            ConfigurationError: there is no cluster at the address.
            MissingExtraError: Ray is not installed.
            WorkerError: units, or actors, failed too often.
        """
        with self._connected() as ray:
            resources = ray.cluster_resources()
            gpus = int(resources.get("GPU", 0)) if self.device in (None, "cuda") else 0
            if self.device == "cuda" and not gpus:
                warnings.warn("the cluster has no GPU yet; the run waits until it gets one", stacklevel=2)
            on_gpu = bool(gpus) or self.device == "cuda"
            most = self.workers or int(gpus / self.gpus) or int(resources.get("CPU", 1) // self.cpus) or 1
            actor = ray.remote(UnitEncoder).options(
                num_cpus=self.cpus, num_gpus=self.gpus if on_gpu else 0, max_restarts=0
            )
            arguments = (ray.put(job), self.model_name, "cuda" if on_gpu else "cpu", self.cpus)
            pool = _Pool(ray, lambda: actor.remote(*arguments), WorkQueue(job, numbers), min(most, len(numbers)))
            pool.run(advance)

    @contextmanager
    def _connected(self) -> Iterator[Any]:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the behaviour to come; unset, Ray warns
        ray = require_extra("ray", "scale")
        if ray.is_initialized():  # by the caller, who ends it, too
            yield ray
            return
        address = self.address or os.environ.get("RAY_ADDRESS") or "local"
        settings: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        if address == "local":
            cores = max(os.cpu_count() or 1, (self.workers or 1) * self.cpus)
            settings |= {"num_cpus": cores, "include_dashboard": False, "object_store_memory": 100 << 20}
        try:
            ray.init(address=address, **settings)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigurationError(
                f"there is no Ray cluster at {address} ({error}); start one with `ray start`"
            ) from error
        try:
            yield ray
        finally:
            ray.shutdown()


class UnitEncoder:
    """What runs in an actor."""

    def __init__(self, job: EncodingJob, model_name: str | None, device: str, threads: int) -> None:
        self._job, self._model_name, self._device, self._threads = job, model_name, device, threads
        self._model: Any = None

    def load(self) -> Message:
        """Load the model."""
        import torch

        torch.set_num_threads(self._threads)
        try:
            self._model = load_checked(self._job, self._model_name, self._device)
        except DashengTokenizerError as error:
            return "fatal", error
        return "ready", 0

    def encode(self, number: int) -> tuple[Message, int]:
        """Encode a unit; returns what came of it and the number of items added."""
        added: list[int] = []
        return try_unit(self._job, number, self._model, added.append), sum(added)


class _Pool:
    """Actors and what each does at the moment."""

    def __init__(self, ray: Any, start: Callable[[], Any], queue: WorkQueue, most: int) -> None:
        self._ray, self._start, self._queue, self._most = ray, start, queue, most
        self._actors: dict[Any, tuple[Any, int | None]] = {}  # by what is awaited: actor, its unit
        self._begun = time.monotonic()
        self._started = False

    def run(self, advance: Callable[[int], None]) -> None:
        """Encode all units.

        Raises:
            WorkerError: units, or actors, failed too often.
        """
        try:
            while True:
                while self._queue and len(self._actors) < self._most:
                    actor = self._start()
                    self._actors[actor.load.remote()] = (actor, None)
                # Actors that wait for a node when no unit waits any more are not waited for.
                if not self._queue and all(unit is None for _, unit in self._actors.values()):
                    break
                self._next(advance)
        finally:
            for actor, _ in self._actors.values():
                self._end(actor)
        self._queue.check()

    def _next(self, advance: Callable[[int], None]) -> None:
        finished, _ = self._ray.wait(list(self._actors), num_returns=1, timeout=10)
        if not finished and not self._started and time.monotonic() - self._begun > PATIENCE:
            self._started = True
            warnings.warn(
                f"no worker has started for {PATIENCE:.0f} s; the cluster is full, or has no node that fits (see "
                "`ray status`); the run goes on waiting",
                stacklevel=2,
            )
        for reference in finished:
            actor, unit = self._actors.pop(reference)
            try:
                answer = self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                self._end(actor)
                self._lost(unit, f"its worker was lost ({type(error).__name__})")
                continue
            self._started = True
            if self._took(unit, answer, advance) and self._queue:
                number = self._queue.take()
                self._actors[actor.encode.remote(number)] = (actor, number)
            else:
                self._end(actor)

    def _took(self, unit: int | None, answer: Any, advance: Callable[[int], None]) -> bool:
        """Act on an answer; True when the actor can go on."""
        (kind, value), added = (answer, 0) if unit is None else answer
        advance(added)
        if kind == "fatal":
            raise value
        if kind == "ready":
            self._queue.worker_started()
        elif kind == "failed":
            self._lost(unit, str(value))
        return True

    def _lost(self, unit: int | None, reason: str) -> None:
        if unit is None:
            self._queue.worker_lost(reason)
        else:
            self._queue.unit_lost(unit, reason)

    def _end(self, actor: Any) -> None:
        with contextlib.suppress(Exception):  # it is gone already
            self._ray.kill(actor, no_restart=True)
