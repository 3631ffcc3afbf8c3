"""Live audio by window of the semantic encoder: latency, load and quality of the embedded default.

    python benchmarks/streaming.py --data '../shared/corpus/*-test-*.tar' --report docs/reports/streaming.json

Each clip is pushed in blocks of 20 ms. Load is computing time of one core over the duration of the audio; below 1 it
keeps up. Other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from dasheng_tokenizer import DashengTokenizerModel
from dasheng_tokenizer.errors import AudioError
from dasheng_tokenizer.evaluation import metrics
from dasheng_tokenizer.streaming import streaming_latency
from dasheng_tokenizer.training.clips import read_clips
from report import Report, Table, hardware

Samples = npt.NDArray[np.float32]
WINDOWS = (0.4, 1.0, 2.0, 5.0, 10.0, 30.0)
BLOCK = 320  # samples, 20 ms


def stream(model: DashengTokenizerModel, audio: Samples) -> tuple[Samples, list[float]]:
    """Reconstruction of a clip at 16 kHz, and seconds of a core that each push took."""
    heard, times = [], []
    with model.streaming() as live:
        for first in range(0, len(audio), BLOCK):
            began = time.process_time()
            heard.append(live.push(audio[first : first + BLOCK]).audio)
            times.append(time.process_time() - began)
        began = time.process_time()
        heard.append(live.finish().audio)
        times.append(time.process_time() - began)
    return torch.cat(heard, dim=1)[0].numpy(), times


def clips_of_each_domain(data: list[str], count: int) -> dict[str, list[Samples]]:
    """The first `count` clips of a second or more of every domain, with enough sound in speech for the metrics."""
    found: dict[str, list[Samples]] = defaultdict(list)
    for clip in read_clips(data):
        if len(found[clip.domain]) < count and len(clip.audio) >= 16_000:
            if clip.domain != "speech" or enough_sound(clip.audio):
                found[clip.domain].append(clip.audio)
    return dict(sorted(found.items()))


def enough_sound(audio: Samples) -> bool:
    """Whether PESQ and STOI, which leave out silence, have something left to measure."""
    try:
        metrics.pesq_wb(audio, audio)
        metrics.stoi(audio, audio)
    except AudioError:
        return False
    return True


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="shards or folders of the test split")
    parser.add_argument("--model", help="model folder (default: the embedded one)")
    parser.add_argument("--clips", type=int, default=25, help="of each domain (default: 25)")
    parser.add_argument("--report", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    clips = clips_of_each_domain(arguments.data, arguments.clips)
    model = DashengTokenizerModel.from_pretrained(arguments.model).eval()
    stream(model, next(iter(clips.values()))[0])  # warm up
    rows: list[list[str | float | int]] = []
    with tqdm(total=len(WINDOWS) * sum(map(len, clips.values())), unit="clip") as bar:
        for window in WINDOWS:
            model.set_encoder_window(window)
            longest, busy, seconds = 0.0, 0.0, 0.0
            pesq, stoi, distance = [], [], defaultdict(list)
            for domain, members in clips.items():
                for audio in members:
                    heard, times = stream(model, audio)
                    longest, busy, seconds = max(longest, *times), busy + sum(times), seconds + len(audio) / 16_000
                    distance[domain].append(metrics.mel_distance(audio, heard))
                    if domain == "speech":
                        pesq.append(metrics.pesq_wb(audio, heard))
                        stoi.append(metrics.stoi(audio, heard))
                    bar.update()
            to_token, to_audio = streaming_latency(model)
            mel = [f"{np.mean(distance[domain]):.3f}" for domain in clips]
            rows.append([
                f"{window:g}", f"{to_token:.2f}", f"{to_audio:.2f}", f"{1000 * longest:.0f}", f"{busy / seconds:.4f}",
                f"{np.mean(pesq):.2f}", f"{np.mean(stoi):.3f}", *mel,
            ])  # fmt: skip
    names = ["window s", "to token s", "to audio s", "longest push ms", "load", "PESQ-WB", "STOI"]
    Report(
        title="Streaming",
        command=shlex.join(["python", "benchmarks/streaming.py", *sys.argv[1:]]),
        data=" ".join(arguments.data),
        seed=0,
        tables=[
            Table(
                f"Embedded default, {arguments.clips} clips a domain, blocks of 20 ms, one thread",
                [*names, *(f"mel {domain}" for domain in clips)],
                rows,
            )
        ],
        notes=[
            "Latency: from a sample's arrival to its token, and to its reconstruction, at most; what the model waits "
            "for, without computing. Most test clips are shorter than 5 s, so larger windows hold them whole.",
            f"Load and longest push: time of one core, on {hardware()}.",
        ],
        order=2,
    ).save(arguments.report)


if __name__ == "__main__":
    main()
