"""What a small generator does of what it is asked for: notes by a pitch tracker, drums and sounds by a probe, pictures.

python benchmarks/generator_quality.py --corpus CORPUS --report docs/reports/generator.json [--model GENERATOR]

Probes are trained on the test clips of the corpus, which the generator never saw, and on altered copies of them; the
row of the real validation clips says how far the judges can be trusted. Stopped and started again, it keeps the clips
that are there.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dasheng_tokenizer import save_audio
from dasheng_tokenizer.evaluation.clip_embedders import load_embedding
from dasheng_tokenizer.evaluation.embedding_store import EmbeddingStore
from dasheng_tokenizer.evaluation.generation import METHOD, Questions, evaluate_generation
from dasheng_tokenizer.evaluation.generation_clips import MANIFEST, ClipSet, write_manifest
from dasheng_tokenizer.evaluation.generation_sets import Outcome
from dasheng_tokenizer.evaluation.metrics import magnitude_spectrogram
from dasheng_tokenizer.generation.pipeline import TextToAudioPipeline
from dasheng_tokenizer.spectral import SAMPLING_RATE
from dasheng_tokenizer.training.clips import Clip, read_clips
from judge_copies import LABELS, write_copies
from report import Report, Table

NAMES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
MIDDLE = range(36, 85)
"""C2 to C6: notes asked for are drawn from what an instrument has in the training data within this range."""

SHOWN = (
    "a flute playing a single note, C4",
    "a violin playing a single note, B4",
    "an acoustic grand piano playing a single note, D#3",
    "a single snare drum hit",
    "a ride cymbal hit",
    "the sound of footsteps",
    "a whoosh or magic sound effect",
    "an excerpt of orchestral fantasy game music",
    "a woman speaking English",
)
"""Captions of the picture, as far as training clips have them: the real one is shown beside."""

LONGEST_SHOWN = 4.0
"""Seconds."""

COPIES = 3
"""Of each real test clip, altered, for the second judge."""


@dataclass(frozen=True)
class Request:
    """A clip to ask for."""

    text: str
    seconds: float
    seed: int
    labels: dict[str, Any] = field(default_factory=dict)


def note_requests(train: Sequence[Clip], each: int) -> list[Request]:
    """For each instrument of the training data some notes of the middle range, drawn with a fixed seed."""
    notes: dict[str, list[int]] = defaultdict(list)
    phrases: dict[str, str] = {}
    for clip in train:
        if clip.labels.get("subset") == "note":
            inner = clip.labels["labels"]
            notes[inner["instrument"]].append(inner["pitch"])
            phrases[inner["instrument"]] = clip.labels["caption"].rpartition(", ")[0]
    found = []
    for instrument, pitches in sorted(notes.items()):
        able = [pitch for pitch in MIDDLE if min(pitches) <= pitch <= max(pitches)]
        rng = np.random.default_rng(len(found))
        for pitch in rng.choice(able, size=min(each, len(able)), replace=False).tolist():
            text = f"{phrases[instrument]}, {NAMES[pitch % 12]}{pitch // 12 - 1}"
            found.append(Request(text, 1.5, len(found), {"pitch": pitch, "instrument": instrument}))
    return found


def class_requests(train: Sequence[Clip], label: str, each: int) -> list[Request]:
    """For each class its caption, at the median length of its training clips, with several seeds."""
    lengths: dict[tuple[str, str], list[float]] = defaultdict(list)
    for clip in train:
        inner = clip.labels.get("labels") or {}
        if inner.get(label):
            lengths[inner[label], clip.labels["caption"]].append(len(clip.audio) / SAMPLING_RATE)
    return [
        Request(caption, min(float(np.median(held)), 4.0), seed, {label: name})
        for (name, caption), held in sorted(lengths.items())
        for seed in range(each)
    ]


def answer(
    pipeline: TextToAudioPipeline, requests: Sequence[Request], folder: Path, guidance: float, steps: int
) -> None:
    """Make the clips of a set, unless they are there."""
    if (folder / MANIFEST).is_file():
        return
    ordered = sorted(requests, key=lambda request: request.seconds)  # less padding
    clips = pipeline(
        [request.text for request in ordered],
        [request.seconds for request in ordered],
        steps=steps,
        guidance=guidance,
        seed=[request.seed for request in ordered],
        batch_size=32,
    )
    rows = []
    for number, (request, clip) in enumerate(zip(ordered, clips, strict=True)):
        name = f"{number:04d}.wav"
        save_audio(folder / name, clip.audio, SAMPLING_RATE)
        rows.append({"file": name, "text": request.text, "seed": request.seed, "labels": request.labels})
    write_manifest(folder, rows)


def show(axis: Axes, audio: Any, title: str) -> None:
    """A spectrogram in dB, 80 dB below its peak."""
    level = 20 * np.log10(np.maximum(magnitude_spectrogram(audio, 1024, 256).T, 1e-5))
    extent = (0.0, len(audio) / SAMPLING_RATE, 0.0, SAMPLING_RATE / 2000)
    top = float(level.max())
    axis.imshow(level, origin="lower", aspect="auto", extent=extent, vmin=top - 80, vmax=top, cmap="magma")
    axis.set_title(title, fontsize=7, loc="left")
    axis.tick_params(labelsize=6)


def draw(pipeline: TextToAudioPipeline, train: Sequence[Clip], options: argparse.Namespace, path: Path) -> None:
    """Rows: captions. Columns: a real clip, the same through the tokenizer, two generated ones."""
    real = {clip.labels["caption"]: clip.audio for clip in reversed(train)}
    shown = [caption for caption in SHOWN if caption in real]
    figure = Figure(figsize=(12, 1.7 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), 4, sharey=True)
    for row, caption in zip(axes, shown, strict=True):
        audio = real[caption][: round(LONGEST_SHOWN * SAMPLING_RATE)]
        with torch.inference_mode():
            decoded = pipeline.tokenizer(torch.from_numpy(audio)[None]).audio[0].numpy()
        show(row[0], audio, caption)
        show(row[1], decoded, "through the tokenizer")
        for axis, seed in zip(row[2:], (0, 1), strict=True):
            seconds = len(audio) / SAMPLING_RATE
            made = pipeline(caption, seconds, steps=options.steps, guidance=options.guidance, seed=seed)[0]
            show(axis, made.audio, f"generated, seed {seed}")
    figure.savefig(path, dpi=90)


def judge(options: argparse.Namespace, names: Sequence[str]) -> Outcome:
    """Distances, notes, and labels by three probes: of test clips, of altered copies of them too, of training clips.

    The first two know nothing of the generator's data, and little of it: the row of the real training clips says how
    many of them they recognise, which a perfect generator would not exceed. The third knows them.
    """
    systems = [ClipSet(name, [options.clips / name]) for name in names]
    taught = ClipSet("real training clips", [options.corpus / "sound-train-000.tar"])
    real = ClipSet(
        "real validation clips", [options.corpus / f"{kind}-valid-000.tar" for kind in ("instrument", "sound")]
    )
    embedders = [load_embedding(text) for text in options.embedding or ["semantic"]]
    store = EmbeddingStore(options.cache)

    def asked(sources: Sequence[Path], pitch: str | None) -> Questions:
        return Questions(labels=list(LABELS), classifier=ClipSet("judge", list(sources)), pitch=pitch)

    test, train = options.corpus / "sound-test-000.tar", options.corpus / "sound-train-000.tar"
    outcome = evaluate_generation(systems, real, embedders, store, asked([test], "pitch"))
    labels = [table for table in outcome.tables if table.caption.startswith("Label")]
    _add_row(labels, evaluate_generation([taught], real, embedders, store, asked([test], None)), taught.name)
    for table in labels:
        table.caption += ", trained on real test clips"
    judges = {"real test clips and altered copies of them": [test, options.copies], "real training clips": [train]}
    for name, sources in judges.items():
        found = evaluate_generation(systems, real, embedders, store, asked(sources, None))
        tables = [table for table in found.tables if table.caption.startswith("Label")]
        if sources != [train]:
            known = evaluate_generation([taught], real, embedders, store, asked(sources, None))
            _add_row(tables, known, taught.name)
        for table in tables:
            table.caption += f", trained on {name}"
        outcome.tables += tables
        outcome.notes += [f"Trained on {name}: {note}" for note in found.notes if note.startswith("Probe of")]
    for table in outcome.tables:
        if table.caption.startswith(("Label", "Pitch")):
            # Without the divergence, for which no clip has a partner, and without sets asked for something else.
            width = 5 if table.caption.startswith("Label") else len(table.columns)
            table.columns, table.rows = table.columns[:width], [row[:width] for row in table.rows if row[1]]
    # Each set is asked for one thing only; that the others are missing says nothing.
    expected = ("Missing: KL", "Missing: accuracy", "Missing: pitch")
    outcome.notes[:] = [note for note in outcome.notes if not note.startswith(expected)]
    return outcome


def _add_row(tables: Sequence[Table], other: Outcome, name: str) -> None:
    """The row of a set from the label tables of another outcome, before the last row, that of the real clips."""
    more = [table for table in other.tables if table.caption.startswith("Label")]
    for table, source in zip(tables, more, strict=True):
        table.rows.insert(-1, next(row for row in source.rows if row[0] == name))


def main() -> None:
    """Ask, judge, draw, write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--model", help="generator folder (default: the embedded one)")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--notes", type=int, default=2, help="an instrument (default: 2)")
    parser.add_argument("--each", type=int, default=10, help="clips a class, and seeds of the flute (default: 10)")
    parser.add_argument("--embedding", action="append", metavar="NAME[=PATH]", help="of the probes (default: semantic)")
    parser.add_argument("--clips", type=Path, default=Path("runs/generator-quality"), help="folder of the clips")
    parser.add_argument("--cache", type=Path, default=Path("runs/embeddings"))
    parser.add_argument("--no-picture", action="store_true")
    parser.add_argument("--note", action="append", default=[], help="a sentence for the report")
    parser.add_argument("--report", type=Path, required=True)
    options = parser.parse_args()
    pipeline = TextToAudioPipeline.from_pretrained(options.model)
    train = list(read_clips([options.corpus / f"{domain}-train-*.tar" for domain in ("instrument", "sound", "music")]))
    train += list(read_clips([options.corpus / "speech-train-000.tar"])) if not options.no_picture else []
    flute = [Request("a flute playing a single note, C4", 1.5, seed, {"pitch": 60}) for seed in range(2 * options.each)]
    wanted = {
        "flute, C4": flute,
        "notes": note_requests(train, options.notes),
        "drums": class_requests(train, "drum", options.each),
        "sounds": class_requests(train, "event", options.each),
    }
    for name, requests in wanted.items():
        answer(pipeline, requests, options.clips / name, options.guidance, options.steps)
    options.copies = options.clips / "altered test clips"
    write_copies(options.corpus / "sound-test-000.tar", options.copies, COPIES, pipeline.tokenizer)
    outcome = judge(options, list(wanted))
    if not options.no_picture:
        draw(pipeline, train, options, options.report.with_suffix(".png"))
    facts = pipeline.generator.info.provenance
    Report(
        title="The small generator: does it do what it is asked for?",
        command=shlex.join(["python", "benchmarks/generator_quality.py", *sys.argv[1:]]),
        data="clips generated from captions; real clips of the corpus",
        seed=0,
        tables=outcome.tables,
        notes=[*options.note, f"Generator: {json.dumps(facts, ensure_ascii=False)}", *METHOD, *outcome.notes],
        order=5,
    ).save(options.report)
    for table in outcome.tables:
        print(table.markdown(), end="\n\n")


if __name__ == "__main__":
    main()
