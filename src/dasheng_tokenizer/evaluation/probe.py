"""Linear evaluation of frozen representations: embeddings from the store, heads, scores over seeds and folds.

The epoch of a head is chosen on the validation splits of its fold. Where a suite copies a protocol that chooses it on
test data, it names those as validation splits, and the report says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dasheng_tokenizer.errors import DataError
from dasheng_tokenizer.evaluation.embedding_store import Embeddings, EmbeddingStore, Split
from dasheng_tokenizer.evaluation.probe_kinds import PROBES, Companions, TaskClips
from dasheng_tokenizer.evaluation.probe_tasks import Label, ProbeTask
from dasheng_tokenizer.evaluation.representations import Embedder


@dataclass(frozen=True)
class Fold:
    """Splits of one fold: to learn from, to choose the epoch by, and to score."""

    train: list[Split]
    valid: list[Split]
    test: list[Split]


@dataclass(frozen=True)
class SuiteTask:
    """A task with its data.

    Attributes:
        task: what is asked.
        folds: where the clips come from.
        label: (role, key, carried label) → the label of a clip, or None where it has none; raises KeyError for clips
            of a shared split that are not part of the task.
    """

    task: ProbeTask
    folds: list[Fold]
    label: Callable[[str, str, Label | None], Label | None]


@dataclass
class ProbeScore:
    """Scores of one representation on one task.

    Attributes:
        task, domain, metric, representation: of the figures.
        scores: one for each seed, mean over folds.
        knn: nearest-neighbour accuracy, where it makes sense.
        extra: further figures, mean over seeds and folds.
        clips: number of clips used for training, validation and test.
        notes: what was left out.
    """

    task: str
    domain: str
    metric: str
    representation: str
    scores: list[float]
    knn: float | None = None
    extra: dict[str, float] = field(default_factory=dict)
    clips: dict[str, int] = field(default_factory=dict)
    weight: float = 1.0
    notes: list[str] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.scores)

    @property
    def std(self) -> float:
        """Standard deviation over the seeds; 0 for a single one."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else 0.0


def probe_task(
    suite_task: SuiteTask,
    embedder: Embedder,
    store: EmbeddingStore,
    seeds: Sequence[int] = (0, 1, 2),
    companions: Companions | None = None,
) -> list[ProbeScore]:
    """Score every representation of an embedder on a task.

    Args:
        suite_task: what is asked, and of which clips.
        embedder: what is probed.
        store: where embeddings are kept.
        seeds: of the heads.
        companions: frozen models that retrieval and speech recognition need.

    Raises:
        DataError: no usable clips, a single class, validation data of one class, or labels that the head cannot read.
    """
    task = suite_task.task
    results = {}
    for name in embedder.names:
        results[name] = ProbeScore(task.name, task.domain, task.metric, name, [], weight=task.weight)
    per_seed: dict[tuple[str, int], list[float]] = {}
    knn: dict[str, list[float]] = {name: [] for name in embedder.names}
    extra: dict[str, dict[str, list[float]]] = {name: {} for name in embedder.names}
    for fold in suite_task.folds:
        roles = {"train": fold.train, "valid": fold.valid, "test": fold.test}
        stored = {role: [store.load(embedder, split) for split in splits] for role, splits in roles.items()}
        for name, result in results.items():
            data = {role: _collect([part[name] for part in parts], role, suite_task) for role, parts in stored.items()}
            for role, held in data.items():
                result.clips[role] = result.clips.get(role, 0) + len(held.labels)
                result.notes += [note for note in held.notes if note not in result.notes]
            probe = PROBES[task.head](task, data, embedder.seconds_per_frame, companions or Companions())
            for seed in seeds:
                outcome = probe.run(seed)
                per_seed.setdefault((name, seed), []).append(outcome.score)
                for key, value in outcome.extra.items():
                    extra[name].setdefault(key, []).append(value)
            result.notes += [note for note in probe.notes if note not in result.notes]
            if (neighbours := probe.knn()) is not None:
                knn[name].append(neighbours)
    for name, result in results.items():
        result.scores = [statistics.fmean(per_seed[name, seed]) for seed in seeds]
        result.knn = statistics.fmean(knn[name]) if knn[name] else None
        result.extra = {key: statistics.fmean(values) for key, values in extra[name].items()}
    return list(results.values())


def _collect(parts: Sequence[Embeddings], role: str, suite_task: SuiteTask) -> TaskClips:
    means: list[Tensor] = []
    frames: list[Tensor] = []
    labels: list[Label] = []
    unlabelled = skipped = 0
    for part in parts:
        skipped += len(part.skipped)
        for row, (key, carried) in enumerate(zip(part.keys, part.labels, strict=True)):
            try:
                label = suite_task.label(role, key, carried)
            except KeyError:  # of another task that shares the split
                continue
            if label is None:
                unlabelled += 1
                continue
            labels.append(label)
            means.append(part.means[row])
            if part.frames:
                frames.append(torch.from_numpy(part.frames[row]))
    notes = [f"{unlabelled} {role} clips without a label left out"] if unlabelled else []
    notes += [f"{skipped} clips of the {role} data could not be read or embedded"] if skipped else []
    if not labels:
        raise DataError(
            f"{suite_task.task.name}: no labelled clip in the {role} data; {'; '.join(notes) or 'it is empty'}"
        )
    return TaskClips(torch.stack(means), frames, labels, notes)
