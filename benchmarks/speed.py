"""Speed and memory of a model on this machine: audio-seconds a second, and peak memory of short and long files.

    python benchmarks/speed.py --report docs/reports/speed.json [--model FOLDER] [--runs 5]

Real-time factors are medians of several runs after a warm-up. Peak memory is that of a fresh process that encodes a
file or decodes its tokens, as the command line does.
"""

from __future__ import annotations

import argparse
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from dasheng_tokenizer import DashengTokenizerModel
from dasheng_tokenizer.audio import AudioWriter
from dasheng_tokenizer.chunking import decode_file, encode_file
from dasheng_tokenizer.token_stream import TokenReader
from report import Report, Table

RATE = 16_000
MINUTES = (5, 60)


def signal(seconds: int, batch: int = 1) -> torch.Tensor:
    """(batch, samples) of noise and tones; speed does not hang on the content."""
    generator = torch.Generator().manual_seed(0)
    time_axis = torch.arange(seconds * RATE) / RATE
    return 0.1 * torch.sin(880 * time_axis) + 0.05 * torch.randn(batch, seconds * RATE, generator=generator)


def median_seconds(action: Callable[[], object], runs: int) -> float:
    """Median time of an action, after one run to warm up."""
    action()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def speed_rows(model: DashengTokenizerModel, runs: int) -> list[list[str | float | int]]:
    """Real-time factors of clips of several lengths and batch sizes."""
    rows: list[list[str | float | int]] = []
    for seconds, batch in ((1, 1), (10, 1), (60, 1), (1, 16), (10, 8)):
        audio = signal(seconds, batch)
        with torch.inference_mode():
            latents = model.encode(audio)
            encode = median_seconds(lambda audio=audio: model.encode(audio), runs)  # type: ignore[misc]
            decode = median_seconds(lambda latents=latents: model.decode(latents), runs)  # type: ignore[misc]
        total = seconds * batch
        rows.append([f"{seconds} s", batch, f"{total / encode:.0f}", f"{total / decode:.0f}"])
    return rows


def write_file(path: Path, minutes: int) -> None:
    """A FLAC file of so many minutes, written in constant memory."""
    second = signal(1).numpy().astype(np.float32)
    with AudioWriter(path, RATE, 1) as out:
        for _ in range(60 * minutes):
            out.write(second)


def peak_mebibytes(action: str, folder: Path, model: str | None) -> float:
    """Peak resident memory of a fresh process that does one action."""
    command = [sys.executable, __file__, "--action", action, "--folder", str(folder)]
    command += ["--model", model] if model else []
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.strip().splitlines()[-1])


def act(action: str, folder: Path, model_name: str | None) -> None:
    """What the fresh process does; prints its peak memory in MiB."""
    model = DashengTokenizerModel.from_pretrained(model_name).eval()
    tokens = folder / "tokens.safetensors"
    if action == "encode":
        encode_file(model, folder / "audio.flac", tokens)
    elif action == "decode":
        decode_file(model, TokenReader(tokens), folder / "decoded.flac")
    print(peak_of_this_process() / 1024)


def peak_of_this_process() -> float:
    """KiB. Linux counts the memory of the process that started this one into ru_maxrss, hence its own figure first."""
    status = Path("/proc/self/status")
    if status.is_file():
        lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        if lines:
            return float(lines[0].split()[1])
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def memory_rows(model: str | None) -> list[list[str | float | int]]:
    """Peak memory of encoding and decoding files of 5 minutes and of an hour."""
    rows: list[list[str | float | int]] = []
    for minutes in MINUTES:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_file(folder / "audio.flac", minutes)
            rows.append([f"{minutes} min", *(f"{peak_mebibytes(a, folder, model):.0f}" for a in ("encode", "decode"))])
    growth = [f"{100 * (float(rows[1][k]) / float(rows[0][k]) - 1):+.0f} %" for k in (1, 2)]
    return [*rows, ["growth", *growth]]


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, default=Path("docs/reports/speed.json"))
    parser.add_argument("--model", help="model folder (default: the embedded one)")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--action", choices=("encode", "decode"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.action:
        act(arguments.action, arguments.folder, arguments.model)
        return
    model = DashengTokenizerModel.from_pretrained(arguments.model).eval()
    tables = [
        Table(
            "Audio-seconds a second, float32, median of several runs",
            ["clip", "batch", "encode", "decode"],
            speed_rows(model, arguments.runs),
        ),
        Table("Peak memory of a process, MiB", ["file", "encode", "decode"], memory_rows(arguments.model)),
    ]
    Report(
        title="Speed and memory",
        command=shlex.join(["python", "benchmarks/speed.py", *sys.argv[1:]]),
        data="synthetic audio, 16 kHz mono",
        seed=0,
        tables=tables,
        order=2,
    ).save(arguments.report)


if __name__ == "__main__":
    main()
