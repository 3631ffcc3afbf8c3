"""Probe tasks as data: what is asked of an embedding, by which head, and where the clips come from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

Head = Literal["clip", "multilabel", "frame", "retrieval", "asr"]

Samples = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ProbeTask:
    """One task of a suite.

    Attributes:
        name: of the task.
        domain: speech, sound, music, …; averages are taken per domain.
        head: what is trained on the frozen embedding.
        metric: the score, 0 to 1, greater is better: accuracy, macro_accuracy, mAP, segment_f1_micro,
            segment_f1_macro, note_frame_f1, recall@1 or 1-wer.
        classes: label names; empty takes those of the training data, sorted.
        epochs, batch_size: of the head's training.
        crop_seconds: clips are cut into full crops of this length, each a sample of its own; None leaves them whole.
        segment_seconds: frame heads: length of the segments that are scored.
        pos_weight: frame and multilabel heads: weight of the positive class in the binary cross-entropy.
        weight: of the task in the weighted mean of its suite.
        knn: whether a nearest-neighbour score makes sense, too.
    """

    name: str
    domain: str
    head: Head
    metric: str
    classes: tuple[str, ...] = ()
    epochs: int = 10
    batch_size: int = 32
    crop_seconds: float | None = None
    segment_seconds: float | None = None
    pos_weight: float = 1.0
    weight: float = 1.0
    knn: bool = True


@dataclass(frozen=True)
class Event:
    """Something that sounds from `onset` to `offset` (seconds)."""

    onset: float
    offset: float
    label: str


Label = str | tuple[str, ...] | tuple[Event, ...]
"""Class or transcript; several classes, or captions; events. Which of them it is hangs on the task's head."""


@dataclass(frozen=True, eq=False)
class Example:
    """A clip with its label: `audio` (samples,) float32 at 16 kHz; `label` None where the data has none."""

    key: str
    audio: Samples
    label: Label | None


class TaskData(Protocol):
    """Where the clips of a task come from.

    Attributes:
        folds: names of the splits that each fold trains, validates and tests on; one entry for tasks without folds.
    """

    @property
    def folds(self) -> list[dict[str, list[str]]]:
        """`{"train": […], "valid": […], "test": […]}` for each fold."""
        ...

    def identity(self, split: str) -> str:
        """Changes whenever the clips of the split change; part of the key of cached embeddings."""
        ...

    def examples(self, split: str) -> Iterator[Example]:
        """The clips of a split in a fixed order, decoded one by one."""
        ...


def label_to_json(label: Label | None) -> Any:
    """A label as JSON holds it."""
    if label is None or isinstance(label, str):
        return label
    return [[item.onset, item.offset, item.label] if isinstance(item, Event) else item for item in label]


def label_from_json(held: Any) -> Label | None:
    """The label that `label_to_json` gave."""
    if held is None or isinstance(held, str):
        return held
    if held and isinstance(held[0], list):
        return tuple(Event(float(onset), float(offset), str(label)) for onset, offset, label in held)
    return tuple(held)
