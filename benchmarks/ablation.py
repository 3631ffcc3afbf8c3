"""Variants of a recipe, trained equally long and compared: reconstruction on validation clips, linear probes on test.

python benchmarks/ablation.py recipes/default.yaml --runs runs/ablation --data CORPUS --report docs/reports/NAME.json
    --common steps=600 --variant "weight 0" loss_weights.semantic=0 --variant "weight 1" loss_weights.semantic=1 …

Stopped and started again, it goes on: runs resume, embeddings are kept.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dasheng_tokenizer import DashengTokenizerModel
from dasheng_tokenizer.evaluation.corpus_suite import CorpusSuite
from dasheng_tokenizer.evaluation.embedding_store import EmbeddingStore
from dasheng_tokenizer.evaluation.probe import ProbeScore, SuiteTask, probe_task
from dasheng_tokenizer.evaluation.probe_report import average_table, by_representation, injection_sentences, score_table
from dasheng_tokenizer.evaluation.representations import TokenizerEmbedder
from dasheng_tokenizer.training import train
from dasheng_tokenizer.training.run_log import read_log
from report import Report, Table

SEEDS = (0, 1, 2)
"""Of the heads; each variant is trained once."""

FIGURES = {"audio_hours": "hours of audio seen", "mel": "mel distance", "pesq_wb": "PESQ-WB", "stoi": "STOI"}


def variant_row(name: str, run: Path) -> list[str | float | int]:
    """Figures of a finished run: validation, and mean training losses of the last tenth of its steps."""
    records = list(read_log(run / "log.jsonl"))
    validation = [record for record in records if record["kind"] == "validation"][-1]
    steps = validation["step"]
    last = [record for record in records if record["kind"] == "train" and record["step"] > 0.9 * steps]
    figures = [round(validation[key], 4) if key in validation else "–" for key in FIGURES]
    distances = [record["semantic"] for record in last if "semantic" in record]
    return [name, steps, *figures, round(float(np.mean(distances)), 4) if distances else "–"]


def probe_variant(name: str, run: Path, suite: Sequence[SuiteTask], store: EmbeddingStore) -> Iterator[ProbeScore]:
    """Probe the unified and the acoustic embedding of a run, and the semantic one, which all variants share."""
    embedder = TokenizerEmbedder(DashengTokenizerModel.from_pretrained(run / "model"))
    for task in suite:
        for score in probe_task(task, embedder, store, SEEDS):
            if score.representation != "semantic":
                score.representation = f"{score.representation}, {name}"
            yield score


def main() -> None:
    """Train, probe, write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--variant", nargs="+", action="append", required=True, metavar="NAME KEY=VALUE")
    parser.add_argument("--common", nargs="*", default=[], metavar="KEY=VALUE", help="settings of all variants")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs, one folder a variant")
    parser.add_argument("--data", type=Path, required=True, help="the corpus, for the probes")
    parser.add_argument("--tasks", help="names of tasks with commas between them (default: all that are not tiny)")
    parser.add_argument("--cache", type=Path, default=Path("runs/embeddings"))
    parser.add_argument("--title", default="Ablation")
    parser.add_argument("--note", action="append", default=[], help="a sentence for the report")
    parser.add_argument("--report", type=Path, required=True)
    options = parser.parse_args()
    wanted = options.tasks.split(",") if options.tasks else None
    suite = [t for t in CorpusSuite(options.data).suite() if (t.task.name in wanted if wanted else t.task.weight)]
    store = EmbeddingStore(options.cache)
    rows: list[list[str | float | int]] = []
    scores: list[ProbeScore] = []
    for name, *settings in options.variant:
        run = options.runs / re.sub(r"[^\w.=-]+", "-", name)
        train(options.recipe, [*options.common, *settings, f"output={run}"])
        rows.append(variant_row(name, run))
        scores += probe_variant(name, run, suite, store)
    held = by_representation(scores)
    names = [name for name, *_ in options.variant]
    notes = [text for name in names for text in injection_sentences(held, f"unified, {name}")[-1:]]
    Report(
        title=options.title,
        command=shlex.join(["python", "benchmarks/ablation.py", *sys.argv[1:]]),
        data=f"training, validation and test clips of {options.data.name}",
        seed=0,
        tables=[
            Table(
                "Reconstruction of validation clips; squared distance of acoustic to semantic embedding in training",
                ["variant", "steps", *FIGURES.values(), "acoustic to semantic"],
                rows,
            ),
            average_table(held, "Linear probes: averages over tasks (percent, mean ± standard deviation over 3 seeds)"),
            score_table(held, "Linear probes (percent, mean ± standard deviation over 3 seeds of the head)"),
        ],
        notes=[*options.note, *notes],
        order=4,
    ).save(options.report)


if __name__ == "__main__":
    main()
