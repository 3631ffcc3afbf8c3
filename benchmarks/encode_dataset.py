"""Encoding of data sets: audio seconds per second by 1 and 2 workers of each engine, bytes and error of number types.

    python benchmarks/encode_dataset.py --data ../shared/corpus/*-test-*.tar --report docs/reports/encode_dataset.json

Each worker has one thread. The rate is that between the first and the last unit of work that is done, so that it leaves
out the start of workers, which has a column of its own; of several rounds, taken in turn, the best counts, since other
work on the machine only ever slows it down. Where such work takes cores away, two workers cannot show what they could
do; so the cores that the run got are measured too: processor time of all its processes by time that passed.
"""

from __future__ import annotations

import argparse
import io
import shlex
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import soundfile
import torch
from tqdm import tqdm

from dasheng_tokenizer import DashengTokenizerModel
from dasheng_tokenizer.evaluation import metrics
from dasheng_tokenizer.scale.encode import Engine, encode_dataset
from dasheng_tokenizer.scale.local_engine import LocalProcesses
from dasheng_tokenizer.scale.options import EncodingOptions
from dasheng_tokenizer.scale.ray_engine import RayActors
from dasheng_tokenizer.token_file import DTYPES
from dasheng_tokenizer.training.clips import EncodedClip, read_clips
from report import Report, Table, hardware

CLIP_SECONDS = 10
CLIPS_PER_TAR = 8


def write_corpus(folder: Path, tars: int) -> str:
    """Tar shards of clips of noise: what is in a clip makes no difference to the time that it takes."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for tar in range(tars):
        with tarfile.open(folder / f"{tar:03d}.tar", "w") as archive:
            for clip in range(CLIPS_PER_TAR):
                audio = io.BytesIO()
                soundfile.write(audio, 0.1 * rng.standard_normal(CLIP_SECONDS * 16_000), 16_000, format="FLAC")
                for name, data in ((f"{clip}.flac", audio.getvalue()), (f"{clip}.json", b'{"caption": "noise"}')):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    return str(folder)


def processor_seconds(seen: dict[int, float]) -> float:
    """Of all processes below this one; `seen` remembers those that have ended."""
    for child in psutil.Process().children(recursive=True):
        try:
            spent = child.cpu_times()
        except psutil.Error:  # ended just now
            continue
        seen[child.pid] = spent.user + spent.system
    return sum(seen.values())


@dataclass
class Watch:
    """Notes when items were added."""

    engine: Engine
    times: list[tuple[float, int]] = field(default_factory=list)
    used: list[float] = field(default_factory=list)  # processor seconds
    seen: dict[int, float] = field(default_factory=dict)

    def run(self, job: object, numbers: object, advance: Callable[[int], None]) -> None:
        """As in `encode.Engine`."""
        self.begun = time.monotonic()

        def noting(items: int) -> None:
            if items:
                self.times.append((time.monotonic(), items))
                self.used.append(processor_seconds(self.seen))
            advance(items)

        self.engine.run(job, numbers, noting)  # type: ignore[arg-type]

    @property
    def start(self) -> float:
        """Seconds until the first unit was done."""
        return self.times[0][0] - self.begun

    @property
    def rate(self) -> float:
        """Audio seconds per second after that."""
        items = sum(count for _, count in self.times[1:])
        return items * CLIP_SECONDS / (self.times[-1][0] - self.times[0][0])

    @property
    def cores(self) -> float:
        """Cores that the processes had in that time."""
        return (self.used[-1] - self.used[0]) / (self.times[-1][0] - self.times[0][0])


def scaling(model: DashengTokenizerModel, tars: int, rounds: int) -> list[list[str | float | int]]:
    """A row for each engine and number of workers."""
    engines: dict[tuple[str, int], Engine] = {
        **{("local", count): LocalProcesses(count, None, cpus=1) for count in (1, 2)},
        **{("ray", count): RayActors(count, None, device="cpu") for count in (1, 2)},
    }
    found: dict[tuple[str, int], list[Watch]] = {name: [] for name in engines}
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_corpus(Path(folder) / "corpus", tars)
        for turn in tqdm(range(rounds), unit="round"):
            for name, engine in engines.items():
                watch = Watch(engine)
                target = Path(folder) / f"{name[0]}-{name[1]}-{turn}"
                encode_dataset(corpus, target, watch, model, EncodingOptions(), source_name="embedded", progress=False)
                found[name].append(watch)
    best = {name: max(watches, key=lambda watch: watch.rate) for name, watches in found.items()}
    per_core = {name: max(watch.rate / watch.cores for watch in watches) for name, watches in found.items()}
    return [
        [name, count, f"{best[name, count].rate:.1f}", f"{best[name, count].rate / best[name, 1].rate:.2f}",
         f"{best[name, count].cores:.2f}", f"{per_core[name, count]:.1f}",
         f"{min(watch.start for watch in found[name, count]):.0f}"]
        for name, count in engines
    ]  # fmt: skip


@torch.inference_mode()
def number_types(model: DashengTokenizerModel, data: list[str], clips: int) -> list[list[str | float | int]]:
    """A row for each number type that latents may be stored in."""
    audio = []
    for clip in read_clips(data):
        audio.append(torch.from_numpy(clip.audio)[None])  # (1, S)
    audio = audio[:: max(1, len(audio) // clips)][:clips]
    latents = [model.encode(one) for one in audio]  # (1, T, D)
    rows: list[list[str | float | int]] = []
    for name, dtype in DTYPES.items():
        stored = [one.to(dtype).float() for one in latents]
        squares = sum(float((a - b).square().sum()) for a, b in zip(stored, latents, strict=True))
        error = (squares / sum(float(one.square().sum()) for one in latents)) ** 0.5
        distances = [
            metrics.mel_distance(one[0].numpy(), model.decode(z, num_samples=one.shape[1])[0].numpy())
            for one, z in zip(audio, stored, strict=True)
        ]
        size = 25 * 3600 * dtype.itemsize / 1e6
        width = model.latent_dim
        rows.append([name, f"{size * width:.0f}", f"{size * 1280:.0f}", f"{error:.1e}", f"{np.mean(distances):.4f}"])
    return rows


def reading() -> list[list[str | float | int]]:
    """A row for each kind of file: audio seconds per second that one core decodes and resamples."""
    rng = np.random.default_rng(0)
    rows: list[list[str | float | int]] = []
    for kind, rate, channels in (("FLAC", 16_000, 1), ("FLAC", 44_100, 2), ("MP3", 44_100, 2)):
        file = io.BytesIO()
        soundfile.write(file, 0.1 * rng.standard_normal((60 * rate, channels)), rate, format=kind)
        clip = EncodedClip("clip", file.getvalue(), {})
        times = []
        for _ in range(5):
            begun = time.perf_counter()
            clip.decode()
            times.append(time.perf_counter() - begun)
        rows.append([f"{kind}, {rate / 1000:g} kHz, {channels} channels", f"{60 / min(times):.0f}"])
    return rows


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="shards or folders, for the number types")
    parser.add_argument("--clips", type=int, default=100, help="of these (default: 100)")
    parser.add_argument("--tars", type=int, default=16, help="of 80 s each, for the engines (default: 16)")
    parser.add_argument("--rounds", type=int, default=2, help="default: 2")
    parser.add_argument("--report", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = DashengTokenizerModel.from_pretrained().eval()
    kinds = number_types(model, arguments.data, arguments.clips)
    files = reading()
    rows = scaling(model, arguments.tars, arguments.rounds)
    Report(
        title="Encoding of data sets",
        command=shlex.join(["python", "benchmarks/encode_dataset.py", *sys.argv[1:]]),
        data=" ".join(arguments.data),
        seed=0,
        tables=[
            Table(
                f"Embedded default, {arguments.tars} tar shards of {CLIPS_PER_TAR} clips of {CLIP_SECONDS} s, "
                "workers of one thread",
                ["engine", "workers", "audio s per s", "times 1 worker", "cores got", "audio s per core s", "start s"],
                rows,
            ),
            Table(
                f"Number types of stored latents, {arguments.clips} clips",
                ["type", f"MB per hour, D = {model.latent_dim}", "MB per hour, D = 1280", "relative error", "mel"],
                kinds,
            ),
            Table("Reading, one thread", ["file", "audio s per s"], files),
        ],
        notes=[
            f"Best of {arguments.rounds} rounds on {hardware()}; the rate begins when the first unit is done. Other "
            "work ran on the machine: cores got are processor time by time passed, in the round of the rate; audio "
            "seconds per core second are the best of the rounds.",
            "Relative error: root mean square of the difference to the float32 latents, divided by theirs; mel: "
            "distance of the decoded to the original audio.",
        ],
        order=3,
    ).save(arguments.report)


if __name__ == "__main__":
    main()
