"""Measures reconstructions in several processes; rows are kept as they are made, so that a killed run goes on.

The result does not depend on the number of processes: each clip is measured by itself, in a process of one thread.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait as wait_for
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dasheng_tokenizer.errors import ConfigurationError, DashengTokenizerError, DataError
from dasheng_tokenizer.evaluation.metric_columns import METRICS, Metric, measure, versions
from dasheng_tokenizer.evaluation.reconstruction_inputs import Inputs, Source, System, Task
from dasheng_tokenizer.files import make_folder, output_error, parse_json

ROWS = "rows.jsonl"
"""File of finished rows in the output folder."""

VERSION = 1
"""Raised when the meaning of a figure changes, so that kept rows are not taken for new ones."""

THREADS = ("OMP", "OPENBLAS", "MKL", "NUMBA", "VECLIB_MAXIMUM")
"""Beginnings of the variables `…_NUM_THREADS` (`VECLIB_MAXIMUM_THREADS`) by which libraries choose their threads."""

Row = dict[str, Any]


@dataclass
class Outcome:
    """Everything a table needs.

    Attributes:
        rows: one a task, in the order of the tasks: `system`, `file`, `domain`, `seconds`, `bits`, `cut_samples`, the
            columns of the metrics, `missing` (column → reason) and `error` (or None).
        failures: inputs with which nothing could be done.
        versions: of the packages that made the figures.
        kept: number of rows that an earlier run had made.
    """

    systems: list[System]
    metrics: tuple[Metric, ...]
    rows: list[Row]
    failures: dict[str, str]
    versions: dict[str, str] = field(default_factory=dict)
    kept: int = 0

    def failed(self) -> list[tuple[str, str]]:
        """Names of inputs and clips that could not be measured, with reasons."""
        errors = [(f"{row['file']} ({row['system']})", row["error"]) for row in self.rows if row["error"]]
        return [*self.failures.items(), *errors]


def run(inputs: Inputs, metrics: tuple[Metric, ...], folder: Path, workers: int) -> Outcome:
    """Measure everything.

    Args:
        inputs: pairs or clips.
        metrics: as `require_metrics` gives them.
        folder: where rows are kept.
        workers: processes, at least one.

    Raises:
        ConfigurationError: no process. DataError: no audio. OutputError: rows cannot be kept.
    """
    if workers < 1:
        raise ConfigurationError(f"--workers {workers}: at least one process is needed")
    store = RowStore(folder / ROWS)
    settings = [VERSION, [metric.name for metric in metrics], made_by := versions(metrics)]
    rows: dict[int, Row] = {}
    kept = 0
    with tqdm(desc="measuring", unit="file", total=inputs.total, delay=1, disable=None) as bar, _Pool(workers) as pool:

        def collect(most: int) -> None:
            for task, index, digest, result in pool.results(most):
                rows[index] = row = _row(task, metrics, result)
                if not row["error"]:  # a failure may have a passing cause, such as memory
                    store.add(digest, row)
                bar.update()

        for index, task in enumerate(inputs.tasks()):
            digest = _digest([settings, task.key, task.system, task.domain, task.identity])
            if digest in store.rows:
                rows[index] = store.rows[digest]
                kept += 1
                bar.update()
                continue
            try:
                source = task.prepare()
            except Exception as error:  # of one clip, for which the others must not pay
                rows[index] = _row(task, metrics, _reason(error))
                bar.update()
                continue
            pool.submit(task, index, digest, source, [metric.name for metric in metrics])
            collect(2 * workers)  # so many are under way at most, whatever the data's size
        collect(0)
    if not rows:
        raise DataError("nothing was measured")
    ordered = [rows[index] for index in sorted(rows)]
    return Outcome(inputs.systems, metrics, ordered, inputs.failures, made_by, kept)


class RowStore:
    """Rows of finished files, appended one by one to a file of JSON lines.

    A line that a killed run left half-written is cut off. Each line has a checksum: a changed one counts for nothing.

    Attributes:
        rows: by digest.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Row] = {}
        make_folder(path.parent)
        try:
            content = path.read_bytes() if path.exists() else b""
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):
                os.truncate(path, len(whole))
        except OSError as error:
            raise output_error(path, error) from error
        for line in whole.splitlines():
            try:
                held = parse_json(line, finite=False)
                if held["check"] == _digest([held["id"], held["row"]]):
                    self.rows[held["id"]] = held["row"]
            except (ValueError, KeyError, TypeError):  # no line of ours: it is measured again
                continue

    def add(self, digest: str, row: Row) -> None:
        """Append a row.

        Raises:
            OutputError: it cannot be written.
        """
        try:
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                line = {"id": digest, "row": row, "check": _digest([digest, row])}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        except OSError as error:
            raise output_error(self.path, error) from error
        self.rows[digest] = row


def measure_source(source: Source, domain: str, names: Sequence[str]) -> Row | str:
    """What a worker does: the figures of one pair, or why there are none."""
    try:
        opened = source.open()
    except Exception as error:  # of one clip, for which the others must not pay
        return _reason(error)
    pair = opened.pair
    values, missing = measure(pair, domain, [METRICS[name] for name in names])
    return {
        "seconds": round(pair.reference.size / pair.sampling_rate, 4),
        "bits": opened.bits,
        "cut_samples": opened.cut_samples,
        **values,
        "missing": missing,
        "error": None,
    }


def _row(task: Task, metrics: Sequence[Metric], result: Row | str) -> Row:
    """The whole row; a text in place of a result is the reason for which every figure is missing."""
    row: Row = {"system": task.system, "file": task.key, "domain": task.domain}
    if not isinstance(result, str):
        return row | result
    columns = [column for metric in metrics for column in metric.columns]
    missing = {column.name: result for column in columns if column.applies(task.domain)}
    empty = dict.fromkeys(["seconds", "bits", "cut_samples", *(column.name for column in columns)])
    return row | empty | {"missing": missing, "error": result}


class _Pool:
    """Processes that measure, and what they are at.

    A process that dies, as of a fault in a library's C code, takes the whole pool along; the files under way are then
    measured one at a time, so that the one at fault is known and the others get done.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.pending: dict[Future[Row | str], tuple[Task, int, str, tuple[Any, ...]]] = {}

    def __enter__(self) -> _Pool:
        self._threads = _one_thread()
        self._threads.__enter__()
        self._executor = self._start(self.workers)
        return self

    def __exit__(self, *error: object) -> None:
        self._executor.shutdown(wait=error[0] is None, cancel_futures=True)
        self._threads.__exit__(None, None, None)

    def submit(self, task: Task, index: int, digest: str, source: Source, names: list[str]) -> None:
        arguments = (source, task.domain, names)
        try:
            future = self._executor.submit(measure_source, *arguments)
        except BrokenProcessPool as broken:
            future = Future()
            future.set_exception(broken)
        self.pending[future] = (task, index, digest, arguments)

    def results(self, most: int) -> Iterator[tuple[Task, int, str, Row | str]]:
        """What is finished; waits until no more than `most` are under way."""
        while len(self.pending) > most:
            done, _ = wait(self.pending, return_when=FIRST_COMPLETED)
            if any(isinstance(future.exception(), BrokenProcessPool) for future in done):
                wait(self.pending)
                yield from self._one_by_one()
                continue
            for future in done:
                task, index, digest, _ = self.pending.pop(future)
                yield task, index, digest, future.result()

    def _one_by_one(self) -> Iterator[tuple[Task, int, str, Row | str]]:
        self._executor.shutdown()
        suspects, self.pending = self.pending, {}
        alone = self._start(1)
        for future, (task, index, digest, arguments) in suspects.items():
            if future.exception() is None:
                yield task, index, digest, future.result()
                continue
            try:
                yield task, index, digest, alone.submit(measure_source, *arguments).result()
            except BrokenProcessPool:
                alone.shutdown()
                alone = self._start(1)
                yield task, index, digest, "the process that measured it died; try fewer metrics for this clip"
        alone.shutdown()
        self._executor = self._start(self.workers)

    def _start(self, workers: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(workers, mp_context=_context(), initializer=_start_worker)


def _context() -> BaseContext:
    """Processes that share nothing with this one: a fork of a process with threads or a GPU can hang.

    Where there is a fork server, libraries are imported once, by the server, and not by each process.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])
    return context


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it: a killed parent cannot say goodbye."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent.sentinel,), daemon=True).start()


def _exit_after(sentinel: int) -> None:
    wait_for([sentinel])
    os._exit(1)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let processes started meanwhile compute in one thread each; libraries read these variables when they load."""
    names = [f"{name}_THREADS" if name.endswith("MAXIMUM") else f"{name}_NUM_THREADS" for name in THREADS]
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _reason(error: Exception) -> str:
    """What an error says; the name of its class where it is none of ours."""
    return str(error) if isinstance(error, DashengTokenizerError) else f"{type(error).__name__}: {error}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
