"""Choices of a recipe, each trained with an equal budget and compared on validation clips: benchmarks/choices.yaml.

    python benchmarks/choices.py --runs runs/choices --report docs/reports/choices.json [--seeds 0 1] [--only GROUP …]

The report is written after every run, from what is done so far. Stopped and started again, it goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import re
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

import yaml

from dasheng_tokenizer import DashengTokenizerModel
from dasheng_tokenizer.training import train
from dasheng_tokenizer.training.run_log import read_log
from report import Report, Table

CHOICES = Path(__file__).with_suffix(".yaml")
FIGURES = {"mel": "mel distance", "pesq_wb": "PESQ-WB", "stoi": "STOI"}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A row of the report: a name, and the settings that make it."""

    group: str
    name: str
    settings: tuple[str, ...]

    def run(self, runs: Path, seed: int) -> Path:
        """Its folder; variants of two groups with the same settings share it."""
        own = hashlib.sha256(" ".join(self.settings).encode()).hexdigest()[:6]
        return runs / f"{re.sub(r'[^a-z0-9.]+', '-', self.name.lower()).strip('-')[:40]}-{own}-seed{seed}"

    def finished(self, runs: Path, seeds: list[int]) -> list[Path]:
        """Folders of its runs that are done; by their settings, since another group may have named them."""
        own = self.run(runs, 0).name.rpartition("-seed")[0].rpartition("-")[2]
        found = [next(runs.glob(f"*-{own}-seed{seed}/summary.json"), None) for seed in seeds]
        return [path.parent for path in found if path is not None]


def read_choices(path: Path, only: list[str] | None) -> list[Variant]:
    """All variants of the file, or those of the groups that are named."""
    groups: list[dict[str, Any]] = yaml.safe_load(path.read_text(encoding="utf-8"))
    wanted = [group for group in groups if only is None or group["group"] in only]
    if only is not None and len(wanted) < len(only):
        raise SystemExit(f"{path} has the groups {', '.join(repr(group['group']) for group in groups)}")
    return [
        Variant(group["group"], str(name), (*group["common"], *settings))
        for group in wanted
        for name, settings in group["variants"].items()
    ]


def trained_parameters(run: Path) -> float:
    """Millions in upsampler and decoder."""
    model = DashengTokenizerModel.from_pretrained(run / "model")
    return sum(p.numel() for part in (model.upsampler, model.decoder) for p in part.parameters()) / 1e6


def row(variant: Variant, runs: list[Path]) -> list[str | float | int]:
    """Means over seeds, with the least and the greatest where there are several."""
    last = [[r for r in read_log(run / "log.jsonl") if r["kind"] == "validation"][-1] for run in runs]
    cells: list[str | float | int] = [variant.name, len(runs), f"{trained_parameters(runs[0]):.1f}"]
    for key in FIGURES:
        values, digits = [record[key] for record in last], 4 if key == "mel" else 3
        spread = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""
        cells.append(f"{statistics.fmean(values):.{digits}f}{spread}")
    return cells


def write_report(variants: list[Variant], options: argparse.Namespace) -> None:
    """A table for each group of which two variants are done."""
    tables = []
    for group in dict.fromkeys(variant.group for variant in variants):
        members = [(v, v.finished(options.runs, options.seeds)) for v in variants if v.group == group]
        rows = [row(variant, runs) for variant, runs in members if runs]
        if len(rows) > 1:  # the default alone says nothing
            columns = ["variant", "seeds", "trained parameters, 10⁶", *FIGURES.values()]
            tables.append(Table(group, columns, rows))
    Report(
        title="Ablations: choices of the default",
        command=shlex.join(["python", "benchmarks/choices.py", *sys.argv[1:]]),
        data="64 validation clips of the corpus of all domains; PESQ and STOI by the spoken ones",
        seed=options.seeds[0],
        tables=tables,
        notes=[
            "Equal steps of 10.24 s of audio within a group; settings in benchmarks/choices.yaml. Means over seeds, in "
            "brackets the least and the greatest. A seed draws the weights of the decoder, the order and the crops.",
        ],
        order=4,
    ).save(options.report)


def main() -> None:
    """Train what is missing, all variants with the first seed before any with the second."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/default.yaml"))
    parser.add_argument("--runs", type=Path, default=Path("runs/choices"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", metavar="GROUP", help="these groups are trained (default: all)")
    parser.add_argument("--report", type=Path, required=True)
    options = parser.parse_args()
    everything = read_choices(CHOICES, None)
    for seed in options.seeds:
        for variant in read_choices(CHOICES, options.only):
            if not variant.finished(options.runs, [seed]):
                train(options.recipe, [*variant.settings, f"seed={seed}", f"output={variant.run(options.runs, seed)}"])
                if not variant.finished(options.runs, [seed]):
                    raise SystemExit("interrupted; the same command goes on")
                write_report(everything, options)
    write_report(everything, options)


if __name__ == "__main__":
    main()
