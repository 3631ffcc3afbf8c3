"""Reconstruction quality on the test split of a corpus: the embedded default, and a decoder on semantic features alone.

    python benchmarks/quality.py --data '../shared/corpus/*-test-*.tar' --report docs/reports/quality.json \
        [--model FOLDER] [--baseline FOLDER --at-equal-length FOLDER] [--log runs/default/log.jsonl]

Speech: PESQ-WB and STOI. All domains: 7-scale mel distance, SI-SDR and offset. Everything at 16 kHz.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from dasheng_tokenizer import DashengTokenizerModel
from dasheng_tokenizer.errors import AudioError
from dasheng_tokenizer.evaluation import metrics
from dasheng_tokenizer.training.clips import Clip, read_clips
from report import Report, Table

Samples = npt.NDArray[np.float32]
METRICS = ("pesq_wb", "stoi", "mel_distance", "si_sdr")
SPEECH_ONLY = ("pesq_wb", "stoi")


def measure(job: tuple[str, str, Samples, Samples]) -> dict[str, Any]:
    """Figures of one clip; a metric without a figure is left out and its reason counted."""
    domain, subset, original, decoded = job
    row: dict[str, Any] = {"domain": domain, "subset": subset, "failed": []}
    row["offsets"] = [abs(float(samples.mean(dtype=np.float64))) for samples in (original, decoded)]
    for name in METRICS:
        if name in SPEECH_ONLY and domain != "speech":
            continue
        try:
            row[name] = getattr(metrics, name)(original, decoded)
        except AudioError as error:
            row["failed"].append(f"{name}: {error}")
    return row


def reconstructions(model: DashengTokenizerModel, clips: Iterable[Clip]) -> Iterator[tuple[str, str, Samples, Samples]]:
    """Originals and reconstructions, one clip at a time, so that no clip is padded."""
    for clip in clips:
        with torch.inference_mode():
            decoded = model(torch.from_numpy(clip.audio)[None]).audio[0].numpy()
        yield clip.domain, str(clip.labels.get("subset", "")), clip.audio, decoded


def evaluate(folder: str | None, data: list[str], workers: int) -> list[dict[str, Any]]:
    """Rows of figures for every clip."""
    model = DashengTokenizerModel.from_pretrained(folder).eval()
    jobs = reconstructions(model, read_clips(data))
    with ProcessPoolExecutor(workers) as pool:
        # Submitted in slices: `map` would first draw all clips into memory.
        rows: list[dict[str, Any]] = []
        with tqdm(desc=str(folder or "embedded default"), unit="clip") as bar:
            while batch := [job for _, job in zip(range(32), jobs, strict=False)]:
                rows += pool.map(measure, batch, chunksize=4)
                bar.update(len(batch))
    return rows


def mean_interval(values: list[float]) -> str:
    """Mean ± 95 % interval of the mean."""
    if not values:
        return "–"
    spread = 1.96 * float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else float("nan")
    return f"{np.mean(values):.3f} ± {spread:.3f}"


def summary(rows: list[dict[str, Any]], key: str) -> list[list[str | float | int]]:
    """One line for each value of `key`."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row[key]].append(row)
    lines: list[list[str | float | int]] = []
    for name, members in sorted(groups.items()):
        cells = [mean_interval([m[metric] for m in members if metric in m]) for metric in METRICS]
        lines.append([name, len(members), *cells])
    return lines


def gain(unified: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> list[list[str | float | int]]:
    """Mel distance of both, domain by domain, and by how much the unified one is lower."""
    lines: list[list[str | float | int]] = []
    for domain in sorted({row["domain"] for row in unified}):
        both = [
            float(np.mean([r["mel_distance"] for r in rows if r["domain"] == domain])) for rows in (unified, baseline)
        ]
        lines.append([domain, f"{both[0]:.3f}", f"{both[1]:.3f}", f"{100 * (1 - both[0] / both[1]):.0f} %"])
    return lines


def offsets(rows: list[dict[str, Any]]) -> list[list[str | float | int]]:
    """Means of originals and of reconstructions in dBFS: the median and the greatest of each domain."""
    lines: list[list[str | float | int]] = []
    for domain in sorted({row["domain"] for row in rows}):
        held = np.maximum([row["offsets"] for row in rows if row["domain"] == domain], 1e-6)  # (clips, 2)
        lines.append([domain, *(f"{20 * math.log10(x):.0f}" for x in (*np.median(held, axis=0), *held.max(axis=0)))])
    return lines


def learning_curve(log: Path) -> Table:
    """Validation figures against hours of audio seen, from the log of the run."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    rows = [r for r in records if r["kind"] == "validation"]
    names = ["audio_hours", "pesq_wb", "stoi", "mel_speech", "mel_music", "mel_sound", "mel_instrument"]
    cells: list[list[str | float | int]] = [[r["step"], *(f"{r[n]:.3f}" for n in names)] for r in rows]
    return Table("Validation clips against hours of audio seen", ["step", *names], cells)


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="shards or folders of the test split")
    parser.add_argument("--model", help="model folder (default: the embedded one)")
    parser.add_argument("--baseline", help="model trained with latent=semantic")
    parser.add_argument("--at-equal-length", help="the unified model after as many steps as the baseline")
    parser.add_argument("--log", type=Path, help="log.jsonl of the run, for the learning curve")
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--title", default="Reconstruction")
    parser.add_argument("--note", action="append", default=[], help="what a reader of the figures must know")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()

    rows = evaluate(arguments.model, arguments.data, arguments.workers)
    columns = ["", "clips", "PESQ-WB", "STOI", "mel distance", "SI-SDR dB"]
    speech = [row for row in rows if row["domain"] == "speech"]
    tables = [
        Table("By domain, mean over clips ± 95 % interval", columns, summary(rows, "domain")),
        Table("Speech by subset", columns, summary(speech, "subset")),
        Table(
            "Offset of a clip, its mean, in dBFS",
            ["", "median before", "after", "greatest before", "after "],
            offsets(rows),
        ),
    ]
    notes = [
        "Mel distance: 7 scales, lower is better. The test split was in no training; most voices were.",
        "SI-SDR compares waveforms sample by sample. A decoder trained on spectra makes its own phases, so its SI-SDR "
        "is negative however it sounds.",
    ]
    if arguments.baseline:
        other = arguments.at_equal_length
        equal = evaluate(other, arguments.data, arguments.workers) if other else rows
        baseline = evaluate(arguments.baseline, arguments.data, arguments.workers)
        names = ["", "unified", "semantic alone", "lower by"]
        caption = "7-scale mel distance of decoders trained equally long, same recipe and same step of its schedule"
        tables.append(Table(caption, names, gain(equal, baseline)))
    if arguments.log:
        tables.append(learning_curve(arguments.log))
    notes += arguments.note
    failed = Counter(reason for row in rows for reason in row["failed"])
    notes += [f"Without a figure, {count} clips: {reason}" for reason, count in failed.most_common()]
    Report(
        title=arguments.title,
        command=shlex.join(["python", "benchmarks/quality.py", *sys.argv[1:]]),
        data=" ".join(arguments.data),
        seed=0,
        tables=tables,
        notes=notes,
        order=1 if not arguments.baseline else 2,
    ).save(arguments.report)


if __name__ == "__main__":
    main()
