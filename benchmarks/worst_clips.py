"""The test clips that come out worst, in pictures, with a line on each about what is wrong.

    python benchmarks/worst_clips.py --data '../shared/corpus/*-test-*.tar' --report docs/reports/worst_clips.json

Ten clips by mel distance over the median of their domain, and ten of speech by PESQ. The lines are in
`benchmarks/worst_clips.yaml`, written from looking at the pictures; a clip without one shows a dash.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import yaml
from tqdm import tqdm

from dasheng_tokenizer import DashengTokenizerModel
from dasheng_tokenizer.errors import AudioError
from dasheng_tokenizer.evaluation import metrics
from dasheng_tokenizer.files import atomic_path, require_extra
from dasheng_tokenizer.training.clips import Clip, read_clips
from report import Report, Table

Samples = npt.NDArray[np.float32]
LINES = Path(__file__).with_suffix(".yaml")
RATE = 16_000
WINDOW, HOP = 512, 128
RANGE_DB = 80.0
RUMBLE_HZ = 60.0  # below the lowest voices


@dataclass
class Measured:
    """A clip, its reconstruction and figures; `pesq` is None where there is none."""

    clip: Clip
    decoded: Samples
    distance: float
    pesq: float | None
    relative: float = 0.0


def measure(model: DashengTokenizerModel, data: list[str]) -> list[Measured]:
    """Figures of every clip, `relative` being its mel distance over the median of its domain."""
    found = []
    for clip in tqdm(read_clips(data), unit="clip"):
        with torch.inference_mode():
            decoded = model(torch.from_numpy(clip.audio)[None]).audio[0].numpy()
        pesq = None
        if clip.domain == "speech":
            try:
                pesq = metrics.pesq_wb(clip.audio, decoded)
            except AudioError:
                pesq = None  # too short, or silence to PESQ's own detector
        found.append(Measured(clip, decoded, metrics.mel_distance(clip.audio, decoded), pesq))
    distances: dict[str, list[float]] = defaultdict(list)
    for each in found:
        distances[each.clip.domain].append(each.distance)
    for each in found:
        each.relative = each.distance / float(np.median(distances[each.clip.domain]))
    return found


def without_rumble(audio: Samples) -> Samples:
    """The clip above 60 Hz, no constant offset left."""
    signal = require_extra("scipy.signal", "evaluate")
    high_pass = signal.butter(4, RUMBLE_HZ, "highpass", fs=RATE, output="sos")
    return signal.sosfiltfilt(high_pass, audio).astype(np.float32)


def level_change(each: Measured) -> float:
    """By how many dB the reconstruction is louder than the original."""
    powers = [float(np.mean(np.square(audio, dtype=np.float64))) for audio in (each.decoded, each.clip.audio)]
    return 10 * float(np.log10(powers[0] / powers[1]))


def draw(path: Path, chosen: list[Measured], titles: list[str]) -> None:
    """Spectrograms of original and reconstruction side by side, a clip a row, on one scale of 80 dB."""
    figure = require_extra("matplotlib.figure", "report").Figure(figsize=(11, 1.9 * len(chosen)), layout="constrained")
    axes = figure.subplots(len(chosen), 2, squeeze=False)
    for row, each, title in zip(axes, chosen, titles, strict=True):
        spectra = [
            20 * np.log10(np.maximum(metrics.magnitude_spectrogram(audio, WINDOW, HOP), 1e-6)).T
            for audio in (each.clip.audio, each.decoded)
        ]
        top = float(spectra[0].max())
        for axis, spectrum in zip(row, spectra, strict=True):
            extent = (0.0, len(each.clip.audio) / RATE, 0.0, RATE / 2000)
            axis.imshow(
                spectrum, origin="lower", aspect="auto", extent=extent, vmin=top - RANGE_DB, vmax=top, cmap="magma"
            )
            axis.tick_params(labelsize=7)
        row[0].set_title(title, loc="left", fontsize=8)
        row[0].set_ylabel("kHz", fontsize=8)
    axes[0, 1].set_title("reconstruction", loc="right", fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=75, format="png")


def table(chosen: list[Measured], lines: dict[str, str], caption: str) -> Table:
    """Figures of the clips and the lines about them."""
    rows: list[list[Any]] = []
    for number, each in enumerate(chosen, start=1):
        pesq = ["–", "–"]
        if each.pesq is not None:
            above = metrics.pesq_wb(without_rumble(each.clip.audio), without_rumble(each.decoded))
            pesq = [f"{each.pesq:.2f}", f"{above:.2f}"]
        what = str(each.clip.labels.get("caption", ""))
        figures = [f"{each.distance:.3f}", f"{each.relative:.2f}", f"{level_change(each):+.1f}", *pesq]
        rows.append([number, each.clip.key, what, *figures, lines.get(each.clip.key, "–")])
    columns = [
        "",
        "clip",
        "what it is",
        "mel",
        "mel / median",
        "level dB",
        "PESQ-WB",
        "PESQ above 60 Hz",
        "what is wrong",
    ]
    return Table(caption, columns, rows)


def main() -> None:
    """Measure, draw and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="shards of the test split")
    parser.add_argument("--model", help="model folder (default: the embedded one)")
    parser.add_argument("--count", type=int, default=10, help="clips in each picture (default: 10)")
    parser.add_argument("--report", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = DashengTokenizerModel.from_pretrained(arguments.model).eval()
    found = measure(model, arguments.data)
    lines = yaml.safe_load(LINES.read_text(encoding="utf-8")) or {}
    by_distance = sorted(found, key=lambda each: -each.relative)[: arguments.count]
    speech = [each for each in found if each.pesq is not None]
    by_pesq = sorted(speech, key=lambda each: each.pesq or 0.0)[: arguments.count]
    tables, pictures = [], []
    for name, chosen, caption in (
        ("mel", by_distance, "Worst by mel distance, relative to the median of the domain"),
        ("pesq", by_pesq, "Worst speech by PESQ-WB"),
    ):
        picture = arguments.report.with_name(f"{arguments.report.stem}_{name}.png")
        titles = [f"{number}  {each.clip.key}" for number, each in enumerate(chosen, start=1)]
        draw(picture, chosen, titles)
        pictures.append(f"reports/{picture.name}")
        tables.append(table(chosen, lines, caption))
    Report(
        title="The worst clips",
        command=shlex.join(["python", "benchmarks/worst_clips.py", *sys.argv[1:]]),
        data=" ".join(arguments.data),
        seed=0,
        tables=tables,
        notes=[
            f"Of {len(found)} clips, {len(speech)} of speech with a PESQ. Pictures: original left, reconstruction "
            "right, 0 to 8 kHz, 80 dB down from the loudest point of the original.",
            "The first picture belongs to the first table, the second to the second. Level: of the reconstruction, "
            "against the original.",
        ],
        pictures=pictures,
        order=1,
    ).save(arguments.report)


if __name__ == "__main__":
    main()
