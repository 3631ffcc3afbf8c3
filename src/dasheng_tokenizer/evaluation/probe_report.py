"""Reports of probes: scores with their spread over seeds, averages per domain, and what injection changes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from dasheng_tokenizer.evaluation.probe import ProbeScore
from dasheng_tokenizer.evaluation.report import Table
from dasheng_tokenizer.files import atomic_path, make_folder, require_extra

Scores = dict[str, dict[str, ProbeScore]]
"""Representation → task → score."""


def by_representation(scores: Sequence[ProbeScore]) -> Scores:
    """Scores in the order they came, by representation and task."""
    table: Scores = {}
    for score in scores:
        table.setdefault(score.representation, {})[score.task] = score
    return table


def score_table(scores: Scores, caption: str) -> Table:
    """Percent, mean ± standard deviation over the seeds; a row a task, a column a representation."""
    rows: list[list[str | float | int]] = []
    for task, first in _tasks(scores).items():
        cells = [_percent(held[task]) if task in held else "–" for held in scores.values()]
        rows.append([first.domain, task, first.metric, *cells])
    return Table(caption, ["domain", "task", "metric", *scores], rows)


def knn_table(scores: Scores, caption: str) -> Table:
    """Percent of clips whose ten nearest neighbours vote for the right class."""
    rows: list[list[str | float | int]] = []
    for task, first in _tasks(scores).items():
        values = [held[task].knn if task in held else None for held in scores.values()]
        if any(value is not None for value in values):
            rows.append([first.domain, task, *("–" if value is None else f"{100 * value:.1f}" for value in values)])
    return Table(caption, ["domain", "task", *scores], rows)


def extra_table(scores: Scores, caption: str) -> Table:
    """Further figures of single tasks, in percent."""
    rows: list[list[str | float | int]] = []
    for task, first in _tasks(scores).items():
        for name in first.extra:
            values = [held[task].extra.get(name) if task in held else None for held in scores.values()]
            rows.append([task, name, *("–" if value is None else f"{100 * value:.1f}" for value in values)])
    return Table(caption, ["task", "figure", *scores], rows)


def average_table(scores: Scores, caption: str) -> Table:
    """Mean over the tasks of each domain, and over all tasks; those of weight 0 are left out.

    The mean over all tasks is weighted by the tasks' weights, those of domains are plain means, as in X-ARES.
    """
    domains = list(dict.fromkeys(score.domain for score in _tasks(scores).values() if score.weight))
    rows: list[list[str | float | int]] = []
    for domain in [*domains, "overall"]:
        cells = []
        for held in scores.values():
            chosen = [s for s in held.values() if s.weight and domain in (s.domain, "overall")]
            cells.append(_average(chosen, weighted=domain == "overall"))
        rows.append([domain, *cells])
    return Table(caption, ["domain", *scores], rows)


def injection_sentences(scores: Scores, unified: str = "unified", semantic: str = "semantic") -> list[str]:
    """Where the unified embedding beats the semantic one, where it loses, by how much against the noise of the seeds.

    A difference counts when it is larger than its 95 % confidence interval over the seeds (Welch).
    """
    if unified not in scores or semantic not in scores:
        return []
    groups: dict[str, list[str]] = {"helps": [], "hurts": [], "makes no difference beyond the noise of the seeds": []}
    differences = []
    for task, one in scores[unified].items():
        other = scores[semantic].get(task)
        if other is None:
            continue
        difference = 100 * (one.mean - other.mean)
        noise = 100 * _interval(one.scores, other.scores)
        if one.weight:
            differences.append(difference)
        kind = list(groups)[2] if abs(difference) <= noise else "helps" if difference > 0 else "hurts"
        groups[kind].append(f"{task} ({difference:+.1f} ± {noise:.1f})")
    sentences = [f"Injection {kind}: {', '.join(tasks)}." for kind, tasks in groups.items() if tasks]
    if differences:
        mean = statistics.fmean(differences)
        sentences.append(
            f"Mean difference, {unified} minus {semantic}, over {len(differences)} tasks: {mean:+.1f} points."
        )
    return sentences


def draw_bars(scores: Scores, path: Path) -> None:
    """A picture of all scores: a group of bars a task, one colour a representation, whiskers of one deviation.

    Raises:
        OutputError: the file cannot be written; MissingExtraError: matplotlib is not installed.
    """
    figure_module = require_extra("matplotlib.figure", "report")
    tasks = list(_tasks(scores))
    figure = figure_module.Figure(figsize=(9, 0.5 + 0.16 * len(tasks) * (len(scores) + 1)), layout="constrained")
    axes = figure.add_subplot(xlabel="score, percent", xlim=(0, 100))
    width = 0.85 / len(scores)
    for number, (name, held) in enumerate(scores.items()):
        rows = [(row, held[task]) for row, task in enumerate(tasks) if task in held]
        places = [row + (number + 0.5) * width - 0.425 for row, _ in rows]
        values, errors = [100 * s.mean for _, s in rows], [100 * s.std for _, s in rows]
        axes.barh(places, values, width, xerr=errors, label=name, error_kw={"linewidth": 0.8})
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set_ylim(len(tasks) - 0.45, -0.55)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower right", fontsize="small")
    make_folder(path.parent)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lstrip(".") or "png", dpi=110)


def notes_of(scores: Scores) -> list[str]:
    """What was left out, each once."""
    return list(
        dict.fromkeys(f"{s.task}: {note}." for held in scores.values() for s in held.values() for note in s.notes)
    )


def _tasks(scores: Scores) -> dict[str, ProbeScore]:
    return {task: score for held in reversed(list(scores.values())) for task, score in held.items()}


def _percent(score: ProbeScore) -> str:
    return f"{100 * score.mean:.1f} ± {100 * score.std:.1f}" if len(score.scores) > 1 else f"{100 * score.mean:.1f}"


def _average(scores: Sequence[ProbeScore], weighted: bool) -> str:
    """Mean over tasks, taken for each seed first, so that the spread is that of the average."""
    if not scores:
        return "–"
    weights = [score.weight if weighted else 1.0 for score in scores]
    seeds = range(min(len(score.scores) for score in scores))
    means = [sum(w * s.scores[k] for w, s in zip(weights, scores, strict=True)) / sum(weights) for k in seeds]
    spread = f" ± {100 * statistics.stdev(means):.1f}" if len(means) > 1 else ""
    return f"{100 * statistics.fmean(means):.1f}{spread}"


def _interval(one: Sequence[float], other: Sequence[float]) -> float:
    """Half the 95 % confidence interval of the difference of two means (Welch's t test)."""
    if min(len(one), len(other)) < 2:
        return math.inf
    if statistics.pvariance(one) == statistics.pvariance(other) == 0:
        return 0.0
    stats = require_extra("scipy.stats", "probe")
    low, high = stats.ttest_ind(one, other, equal_var=False).confidence_interval(0.95)
    return float(high - low) / 2
