"""One generator recipe on the latents of several tokenizers: distance to real clips against training steps.

python benchmarks/generation.py recipes/generator.yaml --latents unified=LATENTS --latents VAE=LATENTS
    --real CORPUS/sound-test-000.tar … --runs runs/comparison --report docs/reports/NAME.json
    --common steps=1000 --seeds 0 1 --checkpoints 4

Every recipe is trained once a seed on each latent. At each checkpoint the averaged weights answer the captions of the
same real clips, with the same seeds and lengths. Stopped and started again, it goes on: runs resume, clips are kept.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from dasheng_tokenizer import DashengTokenizerModel, save_audio
from dasheng_tokenizer.evaluation.clip_embedders import load_embedding
from dasheng_tokenizer.evaluation.embedding_store import EmbeddingStore
from dasheng_tokenizer.evaluation.frechet import frechet_distance, kernel_distance
from dasheng_tokenizer.evaluation.generation import METHOD, Questions, evaluate_generation
from dasheng_tokenizer.evaluation.generation_clips import MANIFEST, ClipSet, write_manifest
from dasheng_tokenizer.evaluation.generation_sets import Outcome, Sets, matrix
from dasheng_tokenizer.evaluation.representations import Embedder
from dasheng_tokenizer.generation.generator import Generator
from dasheng_tokenizer.generation.latent_dataset import LatentDataset
from dasheng_tokenizer.generation.pipeline import TextToAudioPipeline
from dasheng_tokenizer.generation.training import averaged_generator, train_generator
from dasheng_tokenizer.generation.training_configuration import GeneratorTrainingConfig, load_generator_recipe
from dasheng_tokenizer.spectral import SAMPLING_RATE
from dasheng_tokenizer.training.clips import Clip, read_clips
from dasheng_tokenizer.training.run_checkpoint import list_checkpoints
from report import Report, Table

GROUPS = ("note", "drum", "event")
"""Subsets of the corpus whose clips are short and whose captions say what is heard."""


@dataclass(frozen=True)
class Arm:
    """One training: a latent and a seed."""

    latent: str
    seed: int
    config: GeneratorTrainingConfig

    def clips(self, checkpoint: Path) -> Path:
        """Folder of the clips that a checkpoint made."""
        return self.config.output / "clips" / checkpoint.name


def chosen(sources: Sequence[str], each: int, longest: float) -> list[Clip]:
    """Of every subset the same number of labelled clips, spread evenly over the shard and not over-long."""
    groups: dict[str, list[Clip]] = defaultdict(list)
    for clip in read_clips(sources):
        inner = clip.labels.get("labels") or {}
        named = any(inner.get(name) is not None for name in ("pitch", "drum", "event"))
        if clip.labels.get("subset") in GROUPS and named and len(clip.audio) <= longest * SAMPLING_RATE:
            groups[str(clip.labels["subset"])].append(clip)
    places = {name: np.linspace(0, len(held) - 1, min(each, len(held))).round() for name, held in groups.items()}
    return [held[int(place)] for name, held in sorted(groups.items()) for place in places[name]]


def write_clips(folder: Path, clips: Sequence[Clip], audio: Mapping[str, Any], seed: int = 0) -> None:
    """Audio by key as files, and the list that says what each clip was asked for; the list comes last."""
    rows = []
    for clip in clips:
        save_audio(folder / f"{clip.key}.wav", audio[clip.key], SAMPLING_RATE)
        labels = {name: value for name, value in clip.labels["labels"].items() if value is not None}
        rows.append({"file": f"{clip.key}.wav", "text": clip.labels["caption"], "seed": seed, "labels": labels})
    write_manifest(folder, rows)


def answer(generator: Path, clips: Sequence[Clip], options: argparse.Namespace) -> dict[str, Any]:
    """A generated clip for each real one: its caption, its length."""
    pipeline = TextToAudioPipeline.from_pretrained(generator)
    ordered = sorted(clips, key=lambda clip: len(clip.audio))  # less padding
    generated = pipeline(
        [clip.labels["caption"] for clip in ordered],
        [min(len(clip.audio) / SAMPLING_RATE, pipeline.generator.info.max_seconds) for clip in ordered],
        steps=options.sampling_steps,
        guidance=options.guidance,
        seed=list(range(len(ordered))),
        batch_size=32,
    )
    return {clip.key: made.audio for clip, made in zip(ordered, generated, strict=True)}


def reconstructions(tokenizer: str | None, clips: Sequence[Clip]) -> dict[str, Any]:
    """Real clips through a tokenizer: the most that a generator in its latent can reach."""
    model = DashengTokenizerModel.from_pretrained(*([tokenizer] if tokenizer else [])).eval()
    held = {}
    with torch.inference_mode():
        for clip in tqdm(clips, desc="reconstructing", disable=None):
            output = model(torch.from_numpy(clip.audio)[None])
            held[clip.key] = output.audio[0].numpy()
    return held


def arms(options: argparse.Namespace) -> Iterator[Arm]:
    """Every latent with every seed."""
    for latent in options.latents:
        name, _, folder = latent.partition("=")
        for seed in options.seeds:
            output = options.runs / f"{name}-seed{seed}"
            settings = [*options.common, f"data.folder={folder}", f"output={output}", f"seed={seed}"]
            config = load_generator_recipe(options.recipe, settings)
            every = config.steps // options.checkpoints
            keep = [f"checkpoint_every={every}", f"keep_checkpoints={options.checkpoints + 1}"]
            yield Arm(name, seed, load_generator_recipe(options.recipe, [*settings, *keep]))


def make_clips(arm: Arm, clips: Sequence[Clip], options: argparse.Namespace) -> list[Path]:
    """Answers of every checkpoint of a finished run; its checkpoints."""
    found = list_checkpoints(arm.config.output / "checkpoints")
    for checkpoint in found:
        if not (arm.clips(checkpoint) / MANIFEST).is_file():
            exported = arm.config.output / "generators" / checkpoint.name
            averaged_generator(arm.config, checkpoint).save_pretrained(exported)
            write_clips(arm.clips(checkpoint), clips, answer(exported, clips, options))
    return found


def step_of(checkpoint: Path) -> int:
    """Steps behind a checkpoint."""
    return int(checkpoint.name.partition("-")[2])


@dataclass(frozen=True)
class Curves:
    """A distance by embedding, latent, step and seed, and that of the real clips through each tokenizer."""

    distances: dict[str, dict[str, dict[int, dict[int, float]]]]
    floors: dict[str, dict[str, float]]

    def table(self, embedding: str, caption: str) -> Table:
        """Rows: latent and step; a column a seed, and their mean."""
        seeds = sorted(
            {seed for steps in self.distances[embedding].values() for held in steps.values() for seed in held}
        )
        rows: list[list[str | float | int]] = []
        for latent, steps in self.distances[embedding].items():
            for step, held in sorted(steps.items()):
                rows.append(
                    [latent, step, *(held.get(seed, "–") for seed in seeds), float(np.mean(list(held.values())))]
                )
            rows.append(
                [
                    f"{latent}: real clips through its tokenizer",
                    "–",
                    *["–"] * len(seeds),
                    self.floors[embedding][latent],
                ]
            )
        return Table(caption, ["latent", "steps", *(f"seed {seed}" for seed in seeds), "mean"], rows)


def measure(
    options: argparse.Namespace, embedders: Sequence[tuple[str, Embedder]], held: Mapping[str, ClipSet], real: ClipSet
) -> dict[str, Curves]:
    """Fréchet and kernel distance of every set to the real clips; without intervals, which would take an hour."""
    sets = Sets(list(held.values()), real, None, EmbeddingStore(options.cache))
    found = {name: Curves({}, {}) for name in ("Fréchet", "Kernel")}
    for embedding, embedder in embedders:
        truth = matrix(sets.means(real, embedding, embedder))
        for one in found.values():
            one.distances[embedding], one.floors[embedding] = defaultdict(lambda: defaultdict(dict)), {}
        for name, clips in tqdm(held.items(), desc=f"distances by {embedding}", disable=None):
            made = matrix(sets.means(clips, embedding, embedder))
            latent, seed, step = name.split("|")
            for one, value in zip(
                found.values(), (frechet_distance(made, truth), kernel_distance(made, truth)), strict=True
            ):
                if step == "real":
                    one.floors[embedding][latent] = value
                else:
                    one.distances[embedding][latent][int(step)][int(seed)] = value
    return found


def draw(curves_of: Mapping[str, Curves], path: Path) -> None:
    """A row a distance, a column an embedding: a line a seed; dashed: real clips through the tokenizer."""
    embeddings = list(next(iter(curves_of.values())).distances)
    figure = Figure(figsize=(4.2 * len(embeddings), 3.2 * len(curves_of)), layout="constrained")
    axes = figure.subplots(len(curves_of), len(embeddings), squeeze=False)
    for row, (name, held) in zip(axes, curves_of.items(), strict=True):
        for axis, embedding in zip(row, embeddings, strict=True):
            for number, (latent, steps) in enumerate(held.distances[embedding].items()):
                colour = f"C{number}"
                seeds = sorted({seed for values in steps.values() for seed in values})
                for seed in seeds:
                    points = [(step, values[seed]) for step, values in sorted(steps.items()) if seed in values]
                    label = latent if seed == seeds[0] else None
                    axis.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, label=label)
                axis.axhline(held.floors[embedding][latent], color=colour, linestyle="--", linewidth=0.8)
            axis.set(title=f"{name} distance, {embedding}", xlabel="training steps")
            axis.set_ylim(bottom=0)
            axis.legend()
    figure.savefig(path, dpi=110)


def judge(
    options: argparse.Namespace, embedders: Sequence[tuple[str, Embedder]], held: Sequence[ClipSet], real: ClipSet
) -> Outcome:
    """Of the last checkpoints, in one embedding: distances with intervals, answers of probes and pitch tracker."""
    questions = Questions(
        labels=["drum", "event"],
        classifier=ClipSet("judge", options.judge),
        pitch="pitch",
        resamples=options.resamples,
    )
    outcome = evaluate_generation(held, real, embedders, EmbeddingStore(options.cache), questions)
    del outcome.tables[0]  # how many clips there are
    for table in outcome.tables:
        if table.caption.startswith("Label"):  # without the divergence, for which no clip has a partner
            table.columns, table.rows = table.columns[:5], [row[:5] for row in table.rows]
    outcome.notes[:] = [note for note in outcome.notes if not note.startswith("Missing: KL")]
    return outcome


def sizes(found: Sequence[Arm]) -> Table:
    """What is compared: width of the latent, weights, hours of audio seen, time."""
    rows: list[list[str | float | int]] = []
    for arm in found:
        generator = Generator.from_pretrained(arm.config.output / "model")
        index = LatentDataset(arm.config.data.paths(arm.config.data.train)).index
        summary = json.loads((arm.config.output / "summary.json").read_text())
        count = sum(parameter.numel() for parameter in generator.parameters())
        loss = (summary.get("validation") or {}).get("loss", "–")
        rows.append(
            [
                arm.latent,
                arm.seed,
                index.latent_dim,
                count,
                arm.config.steps,
                summary["audio_hours_seen"],
                summary["training_hours"],
                loss,
            ]
        )
    columns = [
        "latent",
        "seed",
        "width",
        "parameters",
        "steps",
        "hours of audio seen",
        "hours of training",
        "validation loss",
    ]
    return Table("The generators; losses of different latents do not compare", columns, rows)


def main() -> None:
    """Train, answer, measure, write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--latents", action="append", required=True, metavar="NAME=FOLDER", help="for data.folder")
    parser.add_argument("--common", nargs="*", default=[], metavar="KEY=VALUE", help="settings of all runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--checkpoints", type=int, default=4, help="measured, the last one included (default: 4)")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--real", nargs="+", required=True, help="clips to answer and to compare with")
    parser.add_argument("--each", type=int, default=80, help="clips of each subset (default: 80)")
    parser.add_argument("--judge", nargs="+", required=True, help="real labelled clips that train the probes")
    parser.add_argument(
        "--embedding",
        action="append",
        required=True,
        help="as in `evaluate generation`; the first is that of the probes",
    )
    parser.add_argument("--sampling-steps", type=int, default=16)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--resamples", type=int, default=20, help="of the last checkpoints' intervals (default: 20)")
    parser.add_argument("--only", help="train and answer for this latent and seed alone (NAME-seedK), write no report")
    parser.add_argument("--cache", type=Path, default=Path("runs/embeddings"))
    parser.add_argument("--title", default="Generation in two latents")
    parser.add_argument("--note", action="append", default=[], help="a sentence for the report")
    parser.add_argument("--report", type=Path, required=True)
    options = parser.parse_args()
    found = list(arms(options))
    clips = chosen(options.real, options.each, found[0].config.data.crop_seconds)
    sets: dict[str, Path] = {}
    final = []
    for arm in found:
        if options.only and arm.config.output.name != options.only:
            continue
        train_generator(arm.config)
        for checkpoint in make_clips(arm, clips, options):
            name = f"{arm.latent}|{arm.seed}|{step_of(checkpoint)}"
            sets[name] = arm.clips(checkpoint)
        final.append(name)
    if options.only:
        return
    write_clips(options.runs / "real", clips, {clip.key: clip.audio for clip in clips})
    for arm in found:
        folder = options.runs / f"{arm.latent}-reconstructed"
        if not (folder / MANIFEST).is_file():
            tokenizer = Generator.from_pretrained(arm.config.output / "model").info.tokenizer
            write_clips(folder, clips, reconstructions(tokenizer, clips))
        sets[f"{arm.latent}|–|real"] = folder
    final += [name for name in sets if name.endswith("|real")]
    held = {name: ClipSet(name, [folder]) for name, folder in sets.items()}
    real = ClipSet("real", [options.runs / "real"])
    embedders = [load_embedding(text) for text in options.embedding]
    embeddings = [name for name, _ in embedders]
    found_curves = measure(options, embedders, held, real)
    draw(found_curves, options.report.with_suffix(".png"))
    judged = judge(options, embedders[:1], [held[name] for name in final], real)
    tables = [
        held.table(embedding, f"{name} distance to {len(clips)} real clips by {embedding}")
        for name, held in found_curves.items()
        for embedding in embeddings
    ]
    Report(
        title=options.title,
        command=shlex.join(["python", "benchmarks/generation.py", *sys.argv[1:]]),
        data=f"{len(clips)} clips of {' '.join(Path(source).name for source in options.real)}: captions, lengths",
        seed=options.seeds[0],
        tables=[sizes(found), *tables, *judged.tables],
        notes=[*options.note, *METHOD, *judged.notes],
        order=6,
    ).save(options.report)


if __name__ == "__main__":
    main()
