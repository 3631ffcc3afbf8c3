"""What the tables of an evaluation of generated clips share: sets with their embeddings, notes, and cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dasheng_tokenizer.errors import ConfigurationError, DataError
from dasheng_tokenizer.evaluation.embedding_store import EmbeddingStore
from dasheng_tokenizer.evaluation.frechet import Estimate, Floats
from dasheng_tokenizer.evaluation.generation_clips import SILENCE, ClipSet
from dasheng_tokenizer.evaluation.report import Table
from dasheng_tokenizer.evaluation.representations import Embedder

MINIMUM_CLIPS = 20
"""Fewest clips of a distance or a mean: neither it nor its interval would say anything."""

NONE = "–"
"""Cell of a figure that is missing."""

MOST_NAMED = 10

Cells = list[str | float | int]

Means = dict[str, Tensor]
"""Mean embedding over time, (D,) float32, of each clip by key."""


@dataclass
class Outcome:
    """Tables, what a reader must know, and inputs that could not be used: (name, reason)."""

    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Add a note, once."""
        if text not in self.notes:
            self.notes.append(text)

    def missing(self, what: str, reason: object) -> None:
        """Say why a figure is missing."""
        self.note(f"Missing: {what}: {reason}.")


class Sets:
    """Generated sets and the real one, and their embeddings.

    Attributes:
        systems: generated sets, a row of the tables each.
        real: to compare with.
        judge: real labelled clips that a classifier learns from, or None.
        outcome: what is found out.
    """

    def __init__(self, systems: Sequence[ClipSet], real: ClipSet, judge: ClipSet | None, store: EmbeddingStore) -> None:
        """Args: the sets, and where embeddings are kept.

        Raises:
            ConfigurationError: two sets of one name.
        """
        self.systems, self.real, self.judge, self.outcome = list(systems), real, judge, Outcome()
        check_unique("sets", [held.name for held in self._every()])
        self._store = store
        self._means: dict[tuple[str, str], Means] = {}

    @property
    def all(self) -> list[ClipSet]:
        """The generated sets, then the real one."""
        return [*self.systems, self.real]

    def _every(self) -> list[ClipSet]:
        return self.all if self.judge is None else [*self.all, self.judge]

    def row_name(self, held: ClipSet) -> str:
        """Of a set in a table in which the real one has a row as the yardstick."""
        return f"{held.name} (real)" if held is self.real else held.name

    def means(self, held: ClipSet, name: str, embedder: Embedder) -> Means:
        """Embeddings of a set by an embedder that goes by a name; what has none is noted.

        Raises:
            DataError: none could be embedded.
        """
        if (held.name, name) not in self._means:
            if not held.usable:
                raise DataError("no clip can be used")
            found = self._store.load(embedder, held.split())[embedder.names[0]]
            if found.skipped:
                self.outcome.note(f"{name}: no finite embedding in {held.name}: {named(sorted(found.skipped))}.")
            self._means[held.name, name] = dict(zip(found.keys, found.means, strict=True))
        return self._means[held.name, name]

    def clips_table(self) -> Table:
        """How many clips there are, and what is wrong with some."""
        rows: list[Cells] = []
        for held in self._every():
            clips = list(held.clips.values())
            silent = [facts.key for facts in clips if facts.silent]
            seconds = round(sum(facts.seconds for facts in clips), 1)
            rows.append([held.name, len(clips), seconds, len(silent), len(held.failures)])
            self.outcome.failed += [(f"{held.name}: {key}", reason) for key, reason in held.failures.items()]
            if silent:
                self.outcome.note(f"Silent (peak below {SILENCE:g}) in {held.name}: {named(silent)}.")
            if held.failures:
                reasons = [f"{key} ({reason})" for key, reason in held.failures.items()]
                self.outcome.note(f"Could not be used in {held.name}: {named(reasons)}.")
        sizes = {held.name: len(held.usable) for held in self.systems}
        if len(set(sizes.values())) > 1:
            listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
            self.outcome.note(
                f"Fréchet distances hang on the number of clips; between sets of unequal size they do not compare "
                f"({listed})."
            )
        return Table("Clips", ["set", "clips", "seconds", "silent", "unusable"], rows)


def check_unique(kind: str, names: Sequence[str]) -> None:
    """Raise a ConfigurationError where a name comes twice."""
    if twice := sorted({name for name in names if list(names).count(name) > 1}):
        raise ConfigurationError(f"two {kind} are called {', '.join(twice)}; name each once")


def matrix(means: Means) -> Floats:
    """(clips, D) float64."""
    stacked: Floats = torch.stack(list(means.values())).numpy().astype(np.float64)
    return stacked


def cells(estimate: Estimate, scale: float = 1.0, low: float = -np.inf) -> Cells:
    """A figure and its interval for a table; an interval does not go below what the figure can be."""
    return [scale * estimate.value, scale * max(low, estimate.low), scale * estimate.high]


def named(names: Sequence[str]) -> str:
    """Some names, and how many more there are."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return "; ".join(names[:MOST_NAMED]) + more
