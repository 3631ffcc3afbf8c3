"""Runs the inputs in a process of their own, so that crashes, hangs and greed for memory are seen and survived."""

from __future__ import annotations

import multiprocessing
import resource
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

HANG = 10.0
"""Seconds that one input may take."""

GROWTH = 1024
"""MiB that the process may grow by while it reads one input, at its peak."""

ADDRESSES = 4096
"""MiB of address space beyond that of the warm process; asking for more fails as on a machine that is full."""

START = 120.0
"""Seconds for a process to start and warm up."""


@dataclass
class Outcome:
    """Figures of a run.

    Attributes:
        counts: inputs by kind.
        findings: of each the number, kind, what happened.
        growth: MiB, the largest of all inputs.
        slowest: seconds, of one input.
    """

    counts: Counter[str] = field(default_factory=Counter)
    findings: list[dict[str, Any]] = field(default_factory=list)
    growth: float = 0.0
    slowest: float = 0.0


def run(
    root: Path,
    seed: int,
    first: int,
    count: int,
    seconds: float,
    keep: Path | None = None,
    hang: float = HANG,
    growth: float = GROWTH,
) -> Iterator[Outcome]:
    """Run the inputs `first` … `first + count - 1`, or as many as the time allows; yields after each.

    Args:
        root: folder to work in; seeds are made in `root/seeds`.
        seed: of the damage.
        first: number of the first input.
        count: of inputs.
        seconds: of time.
        keep: where inputs that led to a finding are kept.
        hang: seconds that one input may take.
        growth: MiB that the process may grow by.
    """
    outcome, end, index, last = Outcome(), time.monotonic() + seconds, first, first + count
    while index < last and time.monotonic() < end:
        worker = _Worker(root, seed, index, last, hang, growth)
        try:
            for index in range(index, last):  # noqa: B020 (goes on behind an input that killed the process)
                if time.monotonic() > end:
                    index = last
                    break
                result = worker.next()
                outcome.counts[result["kind"]] += 1
                outcome.growth = max(outcome.growth, result.get("growth", 0.0))
                outcome.slowest = max(outcome.slowest, result["seconds"])
                if result.get("problem"):
                    outcome.findings.append({"index": index, "kind": result["kind"], "problem": result["problem"]})
                    if keep is not None:
                        if result.get("dead"):
                            worker.close()  # it may be at work in the folder still
                        (keep / f"{seed}-{index}").mkdir(parents=True, exist_ok=True)
                        if (root / "work").is_dir():
                            shutil.copytree(root / "work", keep / f"{seed}-{index}", dirs_exist_ok=True)
                        (keep / f"{seed}-{index}.txt").write_text(result["problem"], errors="backslashreplace")
                yield outcome
                if result.get("dead"):
                    break
            index += 1
        finally:
            worker.close()


class _Worker:
    """A process that runs inputs one after the other, each when it is asked for."""

    def __init__(self, root: Path, seed: int, first: int, last: int, hang: float, growth: float) -> None:
        self._hang = hang
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, root, seed, first, last, growth), daemon=True)
        self._process.start()
        other.close()
        if not self._pipe.poll(START):
            raise RuntimeError("the process did not start")
        self._pipe.recv()

    def next(self) -> dict[str, Any]:
        from fuzz.targets import kind_of

        began = time.monotonic()
        self._pipe.send("next")
        try:
            index = self._pipe.recv()
            if self._pipe.poll(self._hang):
                return {**self._pipe.recv(), "seconds": time.monotonic() - began}
            problem = f"no end after {self._hang:g} s"
        except EOFError:
            self._process.join(5)
            problem = f"the process died with code {self._process.exitcode}"
        return {"kind": kind_of(index), "problem": problem, "seconds": time.monotonic() - began, "dead": True}

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _serve(pipe: Connection, root: Path, seed: int, first: int, last: int, most_growth: float) -> None:
    import torch

    from fuzz.seeds import make_seeds
    from fuzz.targets import Finding, kind_of, make_case, run_case

    torch.set_num_threads(1)
    seeds = root / "seeds"
    if not (root / "ready").exists():
        shutil.rmtree(seeds, ignore_errors=True)
        make_seeds(seeds)
        (root / "ready").touch()
    _warm_up(seeds, root / "work")
    _limit_memory()
    pipe.send("ready")
    for index in range(first, last):
        pipe.recv()
        pipe.send(index)
        kind, problem = kind_of(index), ""
        case = make_case(seeds, root / "work", seed, index)
        before = restart_peak()
        try:
            run_case(case, kind)
        except Finding as finding:
            problem = str(finding)
        except BaseException:
            problem = traceback.format_exc()[-4000:]
        growth = peak() - before
        if not problem and growth > most_growth:
            problem = f"grew by {growth:.0f} MiB"
        pipe.send({"kind": kind, "problem": problem, "growth": growth})


def _warm_up(seeds: Path, work: Path) -> None:
    """Every target once on a sound seed, so that imports count for no input."""
    from fuzz.targets import KINDS, make_case, run_case

    for seed, kind in enumerate(KINDS):
        index = _index_of(kind)
        case = make_case(seeds, work, seed, index)
        shutil.copy(seeds / KINDS[kind].seeds / case.path.relative_to(case.folder), case.path)
        run_case(case, kind)


def _index_of(kind: str) -> int:
    from fuzz.targets import ORDER

    return ORDER.index(kind)


def _limit_memory() -> None:
    limit = int(1024 * _status("VmSize")) + ADDRESSES * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _status(name: str) -> float:
    """KiB of an entry of the process's status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return float(line.split()[1])
    return 0.0


def restart_peak() -> float:
    """Let the peak be counted anew; MiB held now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS") / 1024


def peak() -> float:
    return _status("VmHWM") / 1024
