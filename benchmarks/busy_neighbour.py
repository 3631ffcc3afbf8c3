"""Encoding on two threads beside a process that holds a core, with threads that spin while they wait and without.

    python benchmarks/busy_neighbour.py --report docs/reports/busy_neighbour.json

Threads that share a matrix product wait for one another. By default they spin meanwhile, and what the neighbour leaves
of a core goes into the spinning. The command line therefore asks for threads that sleep (`OMP_WAIT_POLICY=PASSIVE`).
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from dasheng_tokenizer import DashengTokenizerConfig, DashengTokenizerModel
from report import Report, Table
from throughput_systems import noise

DEPTH = 4
"""Layers of the published width; the slowdown is that of the full depth, in an eighth of the time."""

RUNS = 9


@torch.inference_mode()
def seconds_a_clip(threads: int) -> float:
    """Median time by the clock of encoding 10 s."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = DashengTokenizerModel(DashengTokenizerConfig(depth=DEPTH, decoder_depth=1)).eval()
    audio = noise(160_000, 1, "cpu")
    model.encode(audio)
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        model.encode(audio)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def fresh(threads: int, policy: str) -> float:
    """`seconds_a_clip` in a fresh process, since the policy is read once."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment["OMP_WAIT_POLICY"] = policy
    command = [sys.executable, __file__, "--threads", str(threads)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, default=Path("docs/reports/busy_neighbour.json"))
    parser.add_argument("--rounds", type=int, default=3, help="of alone and beside, one after the other (default: 3)")
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        print(seconds_a_clip(options.threads))
        return
    systems = {"one thread": (1, "ACTIVE"), "two, spinning": (2, "ACTIVE"), "two, sleeping": (2, "PASSIVE")}
    alone: dict[str, list[float]] = {name: [] for name in systems}
    beside: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(options.rounds):
        for name, system in systems.items():
            alone[name].append(fresh(*system))
            with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as neighbour:
                beside[name].append(fresh(*system))
                neighbour.kill()
    rows = []
    for name in systems:
        quiet, busy = statistics.median(alone[name]), statistics.median(beside[name])
        rows.append([name, f"{quiet:.3f}", f"{busy:.3f}", f"{busy / quiet:.2f}"])
    Report(
        title="Beside a process that holds a core",
        command=shlex.join(["python", "benchmarks/busy_neighbour.py", *sys.argv[1:]]),
        data="noise, 10 s",
        seed=0,
        tables=[
            Table(
                f"Encoding 10 s, {DEPTH} layers of the published width, {os.cpu_count()} cores: seconds by the clock",
                ["threads", "alone", "beside", "slower by"],
                rows,
            )
        ],
        order=2,
    ).save(options.report)


if __name__ == "__main__":
    main()
