"""How quality hangs on the input: level, clipping, noise, sampling rate, language, kind of music.

    python benchmarks/robustness.py --data '../shared/corpus/*-test-*.tar' --unseen 'corpus/wide-*-test-*.tar' \
        --report docs/reports/robustness.json

The reference of a figure is what the tokenizer was given (clipped, noisy, band-limited), since to reconstruct that is
its task; after a change of level both are brought back, so that all levels compare. `--unseen` names clips of
languages and music that were in no training (docs/data.md, `--wide`).
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from dasheng_tokenizer import DashengTokenizerModel
from dasheng_tokenizer.audio import resample
from dasheng_tokenizer.errors import AudioError
from dasheng_tokenizer.evaluation import metrics
from dasheng_tokenizer.files import atomic_path, require_extra
from dasheng_tokenizer.training.clips import Clip, read_clips
from report import Report, Table

Samples = npt.NDArray[np.float32]
Codec = Callable[[Samples], Samples]
RATE = 16_000
LEVELS = (-40, -30, -20, -10, 0)
DRIVES = (0, 6, 12, 20)
SNRS = (40, 30, 20, 10, 0)
RATES = (8000, 11_025, 16_000, 22_050, 24_000, 44_100, 48_000)
SHORTEST, LONGEST = 1.0, 4.0  # seconds
NONE = "–"
DOMAINS = ("speech", "music", "sound", "instrument")
LEVEL = "level, dB"


def at_level(codec: Codec, audio: Samples, level: float) -> tuple[Samples, Samples]:
    """Peak at `level` dBFS; original and decoded brought back to the original level."""
    gain = 10 ** (level / 20) / float(np.abs(audio).max())
    return audio, codec(audio * np.float32(gain)) / np.float32(gain)


def clipped(codec: Codec, audio: Samples, drive: float) -> tuple[Samples, Samples]:
    """Peak `drive` dB above full scale, cut off there."""
    given = np.clip(audio * np.float32(10 ** (drive / 20) / np.abs(audio).max()), -1, 1)
    return given, codec(given)


def noisy(codec: Codec, audio: Samples, snr: float) -> tuple[Samples, Samples]:
    """White noise `snr` dB below the clip."""
    noise = np.random.default_rng(len(audio)).standard_normal(len(audio)).astype(np.float32)
    given = audio + noise * np.float32(np.sqrt(np.mean(audio**2) / np.mean(noise**2)) * 10 ** (-snr / 20))
    return given, codec(given)


def figures(pairs: Iterable[tuple[str, Samples, Samples]]) -> dict[str, list[float]]:
    """Values of every figure: `mel DOMAIN`, the level against what was given, and `PESQ-WB` and `STOI` of speech."""
    values: dict[str, list[float]] = defaultdict(list)
    for domain, given, decoded in pairs:
        values[f"mel {domain}"].append(metrics.mel_distance(given, decoded))
        powers = [float(np.mean(np.square(signal, dtype=np.float64))) for signal in (decoded, given)]
        values[LEVEL].append(10 * float(np.log10(max(powers[0], 1e-12) / max(powers[1], 1e-12))))
        if domain == "speech":
            for name, metric in (("PESQ-WB", metrics.pesq_wb), ("STOI", metrics.stoi)):
                try:
                    values[name].append(metric(given, decoded))
                except AudioError:
                    continue  # silence to the metric's own detector
    return values


def means(values: dict[str, list[float]], columns: Iterable[str]) -> list[str | float | int]:
    """Means in the order of columns."""
    return [f"{np.mean(values[name]):.3f}" if values.get(name) else NONE for name in columns]


def some_clips(data: list[str], count: int) -> list[tuple[str, Samples]]:
    """Up to `count` clips of every domain, each cut to 4 s, spread over the shards' order."""
    found: dict[str, list[Samples]] = defaultdict(list)
    for clip in read_clips(data):
        if clip.domain in DOMAINS and len(clip.audio) >= SHORTEST * RATE and np.abs(clip.audio).max() > 0.01:
            found[clip.domain].append(clip.audio[: round(LONGEST * RATE)])
    chosen = []
    for domain in DOMAINS:
        clips = found[domain]
        chosen += [
            (domain, clips[index]) for index in np.linspace(0, len(clips) - 1, min(count, len(clips)), dtype=int)
        ]
    return chosen


def joined(clips: Iterable[Clip], key: str, count: int) -> Iterator[tuple[str, Samples]]:
    """Clips with the same label `key`, short ones joined to 4 s, longer ones cut; up to `count` of each value."""
    parts: dict[str, list[Samples]] = defaultdict(list)
    made: dict[str, int] = defaultdict(int)
    for clip in clips:
        name = str(clip.labels.get("labels", {}).get(key) or "")
        if not name or made[name] >= count:
            continue
        parts[name].append(clip.audio)
        if sum(map(len, parts[name])) >= LONGEST * RATE:
            yield name, np.concatenate(parts.pop(name))[: round(LONGEST * RATE)]
            made[name] += 1


def sweep(
    model: DashengTokenizerModel, clips: list[tuple[str, Samples]], columns: list[str], bar: tqdm
) -> dict[str, list[list[str | float | int]]]:
    """Rows of figures for every value of level, clipping, noise and rate."""

    def codec(audio: Samples) -> Samples:
        with torch.inference_mode():
            return model(torch.from_numpy(np.ascontiguousarray(audio))[None]).audio[0].numpy()

    def at_rate(_: Codec, audio: Samples, rate: int) -> tuple[Samples, Samples]:
        given = resample(audio, RATE, rate)
        decoded = model.decompress(model.compress(given[None], sampling_rate=rate))
        back = [resample(np.asarray(signal).reshape(-1), rate, RATE) for signal in (given, decoded)]
        size = min(map(len, back))
        return back[0][:size], back[1][:size]

    rows: dict[str, list[list[str | float | int]]] = {}
    for name, change, values in (
        ("level", at_level, LEVELS), ("clipping", clipped, DRIVES), ("noise", noisy, SNRS), ("rate", at_rate, RATES),
    ):  # fmt: skip
        rows[name] = []
        for value in values:
            pairs = []
            for domain, audio in clips:
                pairs.append((domain, *change(codec, audio, value)))
                bar.update()
            rows[name].append([value, *means(figures(pairs), columns)])
    return rows


def by_label(
    model: DashengTokenizerModel, data: list[str], domain: str, key: str, count: int
) -> dict[str, tuple[int, dict[str, list[float]]]]:
    """Number of 4 s pieces and figures for every value of a label."""
    pairs: dict[str, list[tuple[str, Samples, Samples]]] = defaultdict(list)
    clips = (clip for clip in read_clips(data) if clip.domain == domain)
    for name, audio in tqdm(joined(clips, key, count), desc=key, unit="piece"):
        with torch.inference_mode():
            decoded = model(torch.from_numpy(audio)[None]).audio[0].numpy()
        pairs[name].append((domain, audio, decoded))
    return {name: (len(members), figures(members)) for name, members in sorted(pairs.items())}


def draw(path: Path, rows: dict[str, list[list[str | float | int]]], columns: list[str]) -> None:
    """Mel distance of each domain, and PESQ of speech, over level, clipping, noise and rate."""
    figure_module = require_extra("matplotlib.figure", "report")
    figure = figure_module.Figure(figsize=(13, 6), layout="constrained")
    axes = figure.subplots(2, 4, sharey="row")
    labels = ("peak level, dBFS", "peak above full scale, dB", "signal to noise, dB", "sampling rate, kHz")
    for column, (name, label) in enumerate(zip(rows, labels, strict=True)):
        places = [float(row[0]) / (1000 if name == "rate" else 1) for row in rows[name]]
        for index, title in enumerate(columns, start=1):
            if title in ("STOI", LEVEL):
                continue
            axis = axes[int(title == "PESQ-WB"), column]
            heights = [float("nan") if row[index] == NONE else float(row[index]) for row in rows[name]]
            axis.plot(places, heights, marker="o", label=title.removeprefix("mel "))
        axes[1, column].set_xlabel(label)
    axes[0, 0].set_ylabel("7-scale mel distance")
    axes[1, 0].set_ylabel("PESQ-WB of speech")
    axes[0, 0].legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=90, format="png")


def main() -> None:
    """Measure, draw and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="shards of the test split")
    parser.add_argument("--unseen", nargs="+", help="shards with languages and music that were in no training")
    parser.add_argument("--model", help="model folder (default: the embedded one)")
    parser.add_argument("--clips", type=int, default=16, help="of each domain, language, soundtrack (default: 16)")
    parser.add_argument("--report", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = DashengTokenizerModel.from_pretrained(arguments.model).eval()

    clips = some_clips(arguments.data, arguments.clips)
    columns = ["PESQ-WB", "STOI", *(f"mel {domain}" for domain in DOMAINS), LEVEL]
    total = len(clips) * sum(map(len, (LEVELS, DRIVES, SNRS, RATES)))
    with tqdm(total=total, unit="clip") as bar:
        rows = sweep(model, clips, columns, bar)
    picture = arguments.report.with_suffix(".png")
    draw(picture, rows, columns)
    tables = [
        Table("Peak level of the input, dBFS", ["dBFS", *columns], rows["level"]),
        Table("Clipped input: peak before clipping, dB above full scale", ["dB", *columns], rows["clipping"]),
        Table("White noise in the input: signal to noise, dB", ["dB", *columns], rows["noise"]),
        Table("Sampling rate of the input, Hz, compared at 16 kHz", ["Hz", *columns], rows["rate"]),
    ]
    for domain, key, title in (("speech", "language", "Language"), ("music", "soundtrack", "Soundtrack")):
        names = ["PESQ-WB", "STOI", "mel speech"] if domain == "speech" else ["mel music"]
        lines: list[list[str | float | int]] = []
        other = "other voices" if domain == "speech" else "other windows"
        for seen, data in (("in training", arguments.data), ("not in training", arguments.unseen)):
            groups = by_label(model, data, domain, key, arguments.clips) if data else {}
            known = {str(line[0]) for line in lines}
            for name, (count, values) in groups.items():
                told = seen if seen == "in training" or name not in known else other
                lines.append([name, told, count, *means(values, names)])
        tables.append(Table(f"{title}: pieces of 4 s", [key, "", "pieces", *names], lines))
    Report(
        title="Robustness",
        command=shlex.join(["python", "benchmarks/robustness.py", *sys.argv[1:]]),
        data=" ".join([*arguments.data, *(arguments.unseen or [])]),
        seed=0,
        tables=tables,
        notes=[
            f"Embedded default, {arguments.clips} test clips of each domain, 1 to 4 s; mel distance: lower is better.",
            "Figures compare the reconstruction with what was given, changes and all; after a change of level both are "
            "brought back to the original one.",
            "Level: power of the reconstruction against that of what was given, mean over the clips.",
            "At rates above 16 kHz the clips hold nothing above 8 kHz; what a recording has there is lost.",
            "Words and syllables of one language are joined to pieces of 4 s. `other voices`: the language was in "
            "training, these voices and recordings were not. Tracks of music were never in training, other tracks of "
            "the soundtrack were where it says so.",
            "Below 16 kHz the upper bands are empty; what little the decoder puts there counts in the mel distance.",
        ],
        order=1,
    ).save(arguments.report)


if __name__ == "__main__":
    main()
