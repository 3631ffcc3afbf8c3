"""The engine that uses several processes of this machine, one model each."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING

from dasheng_tokenizer.errors import ConfigurationError, DashengTokenizerError
from dasheng_tokenizer.scale.shard_writer import EncodingJob
from dasheng_tokenizer.scale.work import Message, WorkQueue, load_checked, try_unit

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess


@dataclass(frozen=True)
class LocalProcesses:
    """Processes that share the cores, or the GPUs, of this machine. One that dies is replaced.

    Attributes:
        workers: number of processes.
        model_name: folder or hub name of the tokenizer; None is the embedded one.
        devices: taken in turn by the processes; empty is the CPU.
        cpus: threads of each process; None divides the cores among them.
    """

    workers: int
    model_name: str | None
    devices: tuple[str, ...] = ()
    cpus: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if self.workers < 1 or (self.cpus is not None and self.cpus < 1):
            raise ConfigurationError(f"{self.workers} workers of {self.cpus} cores do nothing; give at least one each")

    def run(self, job: EncodingJob, numbers: Sequence[int], advance: Callable[[int], None]) -> None:
        """As in `encode.Engine`.

        Raises:
            WorkerError: units, or workers, failed too often.
        """
        queue = WorkQueue(job, numbers)
        workers: dict[Connection, _Worker] = {}
        count = min(self.workers, len(numbers))
        free = list(range(count))  # places, which tell the device
        try:
            while True:
                while free and queue:
                    worker = _Worker(self, job, free.pop(0), count)
                    workers[worker.pipe] = worker
                if not workers:
                    break
                for pipe in wait(list(workers)):
                    assert isinstance(pipe, Connection)
                    worker = workers[pipe]
                    if not worker.hear(queue, advance):
                        del workers[pipe]
                        free.append(worker.place)
        finally:
            for worker in workers.values():
                worker.process.kill()
        queue.check()


class _Worker:
    """A process, seen from the one that started it."""

    def __init__(self, engine: LocalProcesses, job: EncodingJob, place: int, count: int) -> None:
        context = multiprocessing.get_context("spawn")  # a forked child could use neither CUDA nor torch's threads
        self.place = place
        self.unit: int | None = None
        self.pipe, theirs = context.Pipe()
        device = engine.devices[place % len(engine.devices)] if engine.devices else "cpu"
        threads = engine.cpus or max(1, (os.cpu_count() or 1) // count)
        self.process: SpawnProcess = context.Process(
            target=_serve, args=(theirs, job, engine.model_name, device, threads), daemon=True
        )
        self.process.start()
        theirs.close()

    def hear(self, queue: WorkQueue, advance: Callable[[int], None]) -> bool:
        """Take a message; False when the process has ended."""
        try:
            kind, value = self.pipe.recv()
        except (EOFError, OSError):
            self._bury(queue)
            return False
        if kind == "fatal":
            assert isinstance(value, DashengTokenizerError)
            raise value
        if kind == "items":
            advance(value)
            return True
        if kind == "ready":
            queue.worker_started()
        elif kind == "failed":
            assert self.unit is not None
            queue.unit_lost(self.unit, str(value))
        self.unit = queue.take() if queue else None
        with contextlib.suppress(OSError):  # it died just now; the next message says so
            self.pipe.send(self.unit)
        return True

    def _bury(self, queue: WorkQueue) -> None:
        self.process.join()
        code = self.process.exitcode or 0
        if code == 0 and self.unit is None:
            return  # told to end
        reason = f"its process died ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"
        if self.unit is None:
            queue.worker_lost(reason)
        else:
            queue.unit_lost(self.unit, reason)


def _serve(pipe: Connection, job: EncodingJob, model_name: str | None, device: str, threads: int) -> None:
    """What a worker does: load the model, then encode what it is told to, until it is told None."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends its children
    import torch

    torch.set_num_threads(threads)
    message: Message = ("ready", 0)
    try:
        model = load_checked(job, model_name, device)
    except DashengTokenizerError as error:
        message = ("fatal", error)
    pipe.send(message)
    while message[0] != "fatal" and (number := pipe.recv()) is not None:
        message = try_unit(job, number, model, lambda items: pipe.send(("items", items)))
        pipe.send(message)


def _end_with_parent() -> None:
    """End at once when the parent was killed, so that a run started anew has the machine to itself."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
