"""Throughput: audio-seconds a second, memory, operations and how near the machine's limit, of us and of others.

    python benchmarks/throughput.py --report docs/reports/throughput.json [--device cuda] [--published-hour]

Every system runs in a fresh process, whose peak memory is reported. On a CPU one thread is used and its processor time
counts, so that other processes on the machine disturb little; on a GPU it is time by the clock, and the device's memory
counts. The limit is the best rate of a large matrix product of the same number type, measured in the same process.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tqdm import tqdm

from report import Report, Table
from speed import peak_of_this_process
from throughput_systems import (
    System,
    decode_hour,
    encode_hour,
    gigaflops,
    noise,
    ours,
    peer,
    plain,
    random_published_model,
    scratch,
)

PEERS = ("Dac", "Encodec", "Mimi")
OURS = ("published size", "embedded default")
REFERENCE = (10, 1)  # the clip that operations, errors and the ratio to the plain form are taken from
CLIPS = ((1, 1), REFERENCE, (10, 4), (60, 1))
PEER_CLIPS = ((1, 1), REFERENCE)
COMPILED_CLIPS = (REFERENCE, (60, 1))
HOUR = 3600
RUNS, BUDGET = 5, 8.0  # of a cell: medians of 5 runs, or of as many as 8 seconds allow


def clock(device: str) -> float:
    """Seconds: of this process on a CPU, by the clock on a GPU whose work is done."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def median_seconds(action: Callable[[], object], device: str, warm: bool) -> float:
    """Median of several runs; after one to warm up, unless shorter clips did that."""
    if not warm:
        action()
    times: list[float] = []
    while len(times) < RUNS and sum(times) < BUDGET:
        start = clock(device)
        action()
        times.append(clock(device) - start)
    return statistics.median(times)


def matrix_peak(dtype: torch.dtype, device: str) -> float:
    """10⁹ operations a second of the best of several large matrix products."""
    size = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    runs = 1 if device == "cpu" else 20
    best = 0.0
    for _ in range(8):
        start = clock(device)
        for _ in range(runs):
            a @ b
        best = max(best, 2 * size**3 * runs / (clock(device) - start) / 1e9)
    return best


def build(system: str, dtype: torch.dtype, device: str, compiled: bool, folder: str) -> System:
    """The system of that name."""
    if system == "plain transcription":
        return plain(folder, device)
    if system in PEERS:
        return peer(system, dtype, device)
    return ours(folder if system == OURS[0] else None, dtype, device, compiled)


@torch.inference_mode()
def measure(options: argparse.Namespace) -> dict[str, Any]:
    """What a fresh process does: all clips of one system."""
    dtype = getattr(torch, options.dtype)
    slow = dtype == torch.float16 and options.device == "cpu"
    peak = 0.0 if slow else matrix_peak(dtype, options.device)
    system = build(options.system, dtype, options.device, options.compiled, options.folder)
    found: dict[str, Any] = {"peak": peak, "cells": []}
    clips = PEER_CLIPS if options.system in PEERS else COMPILED_CLIPS if options.compiled else CLIPS
    for seconds, batch in clips:
        warm = options.device == "cpu" and (seconds, batch) not in PEER_CLIPS
        audio = noise(seconds * system.rate, batch, options.device)
        encoded = system.encode(audio)
        times = [
            median_seconds(lambda audio=audio: system.encode(audio), options.device, warm),  # type: ignore[misc]
            median_seconds(lambda encoded=encoded: system.decode(encoded), options.device, warm),  # type: ignore[misc]
        ]
        found["cells"].append([seconds, batch, *times])
        if (seconds, batch) == REFERENCE and not options.compiled:
            found["work"] = [
                gigaflops(lambda audio=audio: system.encode(audio)) / seconds,  # type: ignore[misc]
                gigaflops(lambda encoded=encoded: system.decode(encoded)) / seconds,  # type: ignore[misc]
            ]
            if options.keep and system.model is not None:
                found["error"] = error(system, encoded, Path(options.keep))
    if system.model is not None and options.hour:
        with scratch() as name:
            start = clock(options.device)
            latents = encode_hour(system.model, Path(name))
            middle = clock(options.device)
            decode_hour(system.model, latents)
            found["cells"].append([HOUR, 1, middle - start, clock(options.device) - middle])
    cuda = options.device != "cpu"
    found["memory"] = torch.cuda.max_memory_allocated() / 2**20 if cuda else peak_of_this_process() / 1024
    return found


def error(system: System, encoded: torch.Tensor, path: Path) -> list[float] | None:
    """Relative error of the latents and signal-to-noise ratio in dB of the same latents decoded, against float32.

    The first process of a system, in float32, writes what the others compare with.
    """
    if not path.is_file():
        torch.save([encoded.cpu(), system.decode(encoded).cpu()], path)
        return None
    latents, audio = torch.load(path, weights_only=True)
    difference = system.decode(latents.to(encoded.device)).cpu() - audio
    relative = (encoded.float().cpu() - latents).norm() / latents.norm()
    return [float(relative), float(20 * torch.log10(audio.norm() / difference.norm()))]


def run(options: argparse.Namespace, folder: str, system: str, dtype: str, compiled: bool) -> dict[str, Any]:
    """`measure` in a fresh process."""
    command = [sys.executable, __file__, "--system", system, "--dtype", dtype, "--device", options.device]
    command += ["--folder", folder, "--keep", str(Path(folder) / f"{system}.pt")]
    command += ["--compiled"] if compiled else []
    hour = system == OURS[1] or (system == OURS[0] and options.published_hour and dtype == "bfloat16")
    command += ["--hour"] if hour and not compiled else []
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if options.device == "cpu" else {})
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return {"system": system, "dtype": dtype, "compiled": compiled, **json.loads(done.stdout.splitlines()[-1])}


def plan(device: str) -> list[tuple[str, str, bool]]:
    """System, number type, compiled: all that is measured. CPUs emulate float16, a thousand times slower."""
    types = ("float32", "bfloat16") if device == "cpu" else ("float32", "bfloat16", "float16")
    work = [("plain transcription", "float32", False)]
    work += [(system, dtype, compiled) for system in OURS for compiled in (False, True) for dtype in types]
    return work + [(system, "float32", False) for system in PEERS]


def times_real_time(cell: list[float]) -> list[str]:
    """Audio-seconds a second of encoding and decoding."""
    return [f"{cell[0] * cell[1] / cell[column]:.3g}" for column in (2, 3)]


def clip_name(seconds: float, batch: float) -> str:
    """As the tables say it."""
    return ("1 h" if seconds == HOUR else f"{seconds:g} s") + (f" × {batch:g}" if batch > 1 else "")


def tables(results: list[dict[str, Any]], device: str) -> list[Table]:
    """Of the report."""
    work = {found["system"]: found["work"] for found in results if "work" in found}
    yardstick = reference_cell(results[0])
    speed: list[list[Any]] = []
    for found in results:
        name = [found["system"], found["dtype"], "compiled" if found["compiled"] else "eager"]
        for cell in found["cells"]:
            factors = [cell[0] * cell[1] / cell[column] for column in (2, 3)]
            shares = [
                f"{100 * factor * flops / found['peak']:.0f} %"
                for factor, flops in zip(factors, work[found["system"]], strict=True)
            ]
            speed.append([*name, clip_name(*cell[:2]), *times_real_time(cell), *shares])
    memory: list[list[Any]] = [
        [f["system"], f["dtype"], f"{f['memory']:.0f}", *(f"{w:.3g}" for w in work[f["system"]]), f"{f['peak']:.0f}"]
        for f in results
        if not f["compiled"]
    ]
    errors: list[list[Any]] = []
    for found in results:
        if found["system"] in OURS and not found["compiled"]:
            cell, error = reference_cell(found), found.get("error")
            ratios = [f"{yardstick[k] / cell[k]:.2f}" for k in (2, 3)] if found["system"] == OURS[0] else [None] * 2
            accuracy = [f"{100 * error[0]:.2f} %", f"{error[1]:.1f}"] if error else [None, None]
            errors.append([found["system"], found["dtype"], *ratios, *accuracy])
    one = "one thread" if device == "cpu" else "one GPU"
    return [
        Table(
            f"Audio-seconds a second, {one}, and the share of the measured matrix peak",
            ["system", "type", "layers", "clip", "encode", "decode", "encode of peak", "decode of peak"],
            speed,
        ),
        Table(
            "Peak memory in MiB, 10⁹ operations an audio-second, measured matrix peak in 10⁹ operations a second",
            ["system", "type", "memory", "encode", "decode", "peak"],
            memory,
        ),
        Table(
            "Clip of 10 s: times as fast as the plain transcription; error against float32",
            ["system", "type", "encode", "decode", "error of latents", "SNR of decoding, dB"],
            errors,
        ),
    ]


def reference_cell(found: dict[str, Any]) -> list[float]:
    """Of the clip that everything is compared on."""
    return next(cell for cell in found["cells"] if tuple(cell[:2]) == REFERENCE)


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, default=Path("docs/reports/throughput.json"))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--published-hour", action="store_true", help="an hour at the published size, too (bfloat16)")
    parser.add_argument("--only", nargs="+", help="some systems alone, for a trial", choices=(*OURS, *PEERS))
    for name in ("system", "dtype", "folder", "keep"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    for name in ("compiled", "hour"):
        parser.add_argument(f"--{name}", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.system:
        if options.device == "cpu":
            torch.set_num_threads(1)
        print(json.dumps(measure(options)))
        return
    chosen = [
        item for item in plan(options.device) if not options.only or item[0] in (*options.only, "plain transcription")
    ]
    with TemporaryDirectory() as folder:
        random_published_model(Path(folder))
        results = [run(options, folder, *item) for item in tqdm(chosen, unit="system")]
    Report(
        title="Throughput",
        command=shlex.join(["python", "benchmarks/throughput.py", *sys.argv[1:]]),
        data="noise at each system's own rate",
        seed=0,
        tables=tables(results, options.device),
        notes=[
            "Published size: random weights. Plain transcription: benchmarks/plain_forward.py, a test holds it against "
            "the golden tensors of the published code. DAC, EnCodec and Mimi: transformers, default sizes, random "
            "weights; they work at 16, 24 and 24 kHz and their rates and purposes differ.",
            "An hour goes through in blocks, as files do. Operations: two for a multiplication and an addition, matrix "
            "products and convolutions alone, so that a share of the peak cannot count spectra, norms or copies.",
        ],
        order=2,
    ).save(options.report)


if __name__ == "__main__":
    main()
