"""Scores of probes, 0 to 1, greater is better."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dasheng_tokenizer.errors import DataError
from dasheng_tokenizer.evaluation.probe_tasks import Event
from dasheng_tokenizer.files import require_extra

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

GRID_SECONDS = 0.02
"""Grid of the frame score of note transcription."""

ONSET_SECONDS = 0.05
"""Largest distance of the onsets of a found and a true note; the usual tolerance of note transcription (MIREX)."""


def accuracy(predicted: Integers, target: Integers) -> float:
    """Fraction of (N,) predictions that are right."""
    return float(np.mean(predicted == target))


def macro_accuracy(predicted: Integers, target: Integers) -> float:
    """Mean over the classes that occur in `target` of the fraction of their clips that are right."""
    return float(np.mean([np.mean(predicted[target == label] == label) for label in np.unique(target)]))


def mean_average_precision(scores: Floats, target: Floats) -> float:
    """Mean over the classes that have a positive clip of their average precision; (N, C) scores and 0/1 targets.

    Raises:
        DataError: no class has a positive clip.
        MissingExtraError: scikit-learn is not installed.
    """
    metrics = require_extra("sklearn.metrics", "probe")
    present = target.any(0)
    if not present.any():
        raise DataError("mAP needs at least one clip with a known label")
    return float(metrics.average_precision_score(target[:, present], scores[:, present], average="macro"))


def segment_f1(
    active: Sequence[npt.NDArray[np.bool_]],
    target: Sequence[npt.NDArray[np.bool_]],
    frames_per_segment: int,
    average: str,
) -> float:
    """F1 over segments, as X-ARES has it: a class is active in a segment where it is in any of its frames.

    A last segment that is not full is left out, unless the clip has no other.

    Args:
        active: for each clip (T, C), what was found.
        target: the same, what is true.
        frames_per_segment: frames a segment.
        average: `micro` over all decisions, or `macro` over all classes, where one that neither occurs nor is found
            counts as 0.

    Raises:
        DataError: nothing is true anywhere, where F1 says nothing.
    """
    found = np.concatenate([_segments(clip, frames_per_segment) for clip in active])  # (segments, C)
    true = np.concatenate([_segments(clip, frames_per_segment) for clip in target])
    if not true.any():
        raise DataError("segment F1 needs at least one event in the test data")
    hits, sizes = (found & true).sum(0), found.sum(0) + true.sum(0)  # (C,)
    if average == "micro":
        return float(2 * hits.sum() / sizes.sum())
    return float(np.mean(2 * hits / np.maximum(sizes, 1)))


def activity(events: Sequence[Event], classes: Sequence[str], frames: int, hop: float) -> npt.NDArray[np.bool_]:
    """Which classes sound in each frame: (frames, C); events of unknown classes are left out.

    An event of T seconds from t on holds the frames ⌈t/hop⌉ to ⌈(t + T)/hop⌉ - 1, as in X-ARES, and at least one.

    Args:
        events: of a clip.
        classes: names, in the order of the columns.
        frames: T.
        hop: seconds a frame.
    """
    grid = np.zeros((frames, len(classes)), dtype=bool)
    column = {name: index for index, name in enumerate(classes)}
    for event in events:
        if event.label in column:
            first, last = (math.ceil(time / hop - 1e-6) for time in (event.onset, event.offset))
            grid[first : max(last, first + 1), column[event.label]] = True
    return grid


def note_frame_f1(
    active: Sequence[npt.NDArray[np.bool_]], events: Sequence[Sequence[Event]], classes: Sequence[str], hop: float
) -> float:
    """F1 of note activity on a grid of 20 ms, micro over clips and pitches.

    Args:
        active: for each clip (T, C), what was found, at `hop` seconds a frame.
        events: for each clip its notes, labelled by pitch.
        classes: pitches, in the order of the columns.
        hop: seconds a frame of `active`.
    """
    found, true = [], []
    for clip, notes in zip(active, events, strict=True):
        size = round(len(clip) * hop / GRID_SECONDS)
        rows = ((np.arange(size) + 0.5) * GRID_SECONDS / hop).astype(int).clip(max=len(clip) - 1)
        found.append(clip[rows])
        true.append(activity(notes, classes, size, GRID_SECONDS))
    return segment_f1(found, true, 1, "micro")


def note_f1(
    active: Sequence[npt.NDArray[np.bool_]], events: Sequence[Sequence[Event]], classes: Sequence[str], hop: float
) -> float:
    """F1 of notes, mean over clips: a found note counts if its pitch is right and its onset within 50 ms.

    A run of active frames is a note. Arguments as `note_frame_f1`; classes are MIDI note numbers.

    Raises:
        MissingExtraError: mir_eval is not installed.
    """
    transcription = require_extra("mir_eval.transcription", "probe")
    scores = []
    for clip, notes in zip(active, events, strict=True):
        found = _notes(clip, classes, hop)
        true = [
            (note.onset, max(note.offset, note.onset + 1e-3), note.label) for note in notes if note.label in classes
        ]
        if not true:
            continue
        if not found:
            scores.append(0.0)
            continue
        intervals, pitches = zip(*(_intervals(held) for held in (true, found)), strict=True)
        arrays = (intervals[0], pitches[0], intervals[1], pitches[1])
        result = transcription.precision_recall_f1_overlap(*arrays, onset_tolerance=ONSET_SECONDS, offset_ratio=None)
        scores.append(float(result[2]))
    if not scores:
        raise DataError("note F1 needs at least one note in the test data")
    return float(np.mean(scores))


def _notes(clip: npt.NDArray[np.bool_], classes: Sequence[str], hop: float) -> list[tuple[float, float, str]]:
    padded = np.pad(clip.astype(np.int8), ((1, 1), (0, 0)))
    edges = np.diff(padded, axis=0)  # (T + 1, C)
    found = []
    for column in range(clip.shape[1]):
        starts, ends = np.flatnonzero(edges[:, column] == 1), np.flatnonzero(edges[:, column] == -1)
        found += [(s * hop, e * hop, classes[column]) for s, e in zip(starts.tolist(), ends.tolist(), strict=True)]
    return found


def _intervals(notes: Sequence[tuple[float, float, str]]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """(notes, 2) onsets and offsets in seconds, and (notes,) pitches in Hz, of MIDI notes."""
    midi = np.array([float(note[2]) for note in notes])
    return np.array([note[:2] for note in notes]), 440 * 2 ** ((midi - 69) / 12)


def _segments(clip: npt.NDArray[np.bool_], size: int) -> npt.NDArray[np.bool_]:
    count = max(1, len(clip) // size)
    segments = np.asarray(clip[: count * size].reshape(count, -1, clip.shape[1]).any(axis=1), dtype=bool)
    return segments
