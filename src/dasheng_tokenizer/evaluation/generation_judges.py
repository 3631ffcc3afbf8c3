"""Judges of generated clips: a linear probe that was trained on real clips, and a pitch tracker."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dasheng_tokenizer.errors import DataError
from dasheng_tokenizer.evaluation.corpus_suite import EPOCHS
from dasheng_tokenizer.evaluation.generation_clips import ClipSet
from dasheng_tokenizer.evaluation.heads import Items, train_head
from dasheng_tokenizer.evaluation.probe_kinds import ClipProbe, Companions, TaskClips
from dasheng_tokenizer.evaluation.probe_tasks import ProbeTask
from dasheng_tokenizer.evaluation.representations import Samples
from dasheng_tokenizer.files import require_extra
from dasheng_tokenizer.spectral import SAMPLING_RATE

HELD_OUT = 5
"""Every fifth clip of a class chooses the epoch of the classifier and does not train it."""

FEWEST_STEPS = 500
"""Of the classifier's training: with few clips it takes more epochs than a probe of a suite."""

PITCH_RANGE = (27.5, 4186.01)
PITCH_FRAME, PITCH_HOP = 2048, 512
PITCH_RESOLUTION = 0.2
"""Of the pitch tracker: Hz, the range of a piano; samples at 16 kHz (128 ms windows every 32 ms); semitones."""

HALF_SEMITONE = 0.5


@dataclass(frozen=True)
class Classifier:
    """What a probe says of some clips.

    Attributes:
        classes: C names.
        log_posteriors: (C,) by set and key of a clip.
        selection: accuracy on the held-out clips that chose the epoch.
        notes: what was left out.
    """

    classes: tuple[str, ...]
    log_posteriors: dict[tuple[str, str], Tensor]
    selection: float
    notes: list[str] = field(default_factory=list)

    def says(self, clip: tuple[str, str], label: str) -> bool:
        """Whether a class is the likeliest for a clip."""
        return self.classes[int(self.log_posteriors[clip].argmax())] == label

    def divergence(self, real: tuple[str, str], generated: tuple[str, str]) -> float:
        """Kullback-Leibler divergence of the posteriors of a generated clip from those of a real one, in nats."""
        log_p, log_q = self.log_posteriors[real].double(), self.log_posteriors[generated].double()
        return float((log_p.exp() * (log_p - log_q)).sum())


def train_classifier(
    label: str, data: ClipSet, means: Mapping[str, Tensor], judged: Mapping[tuple[str, str], Tensor], seed: int
) -> Classifier:
    """Train a linear probe on real labelled clips and let it judge others.

    Args:
        label: the field to tell, each of its values a class; clips without it are left out.
        data: real clips.
        means: (D,) mean embedding over time of the clips of `data`, by key.
        judged: the same of the clips to judge, by set and key.
        seed: of weights, order and held-out clips.

    Raises:
        DataError: fewer than two classes, or a class of fewer than two clips alone to choose the epoch by.
    """
    labels = {key: data.clips[key].label(label) for key in means}
    known = {key: name for key, name in labels.items() if name is not None}
    if not known:
        raise DataError(f"no clip of the classifier data has the label {label!r}; check --label")
    roles = _hold_out(known, seed)
    held = {
        role: TaskClips(torch.stack([means[key] for key in keys]), [], [known[key] for key in keys], [])
        for role, keys in roles.items()
    }
    task = ProbeTask(label, "generation", "clip", "accuracy", knn=False)
    probe = ClipProbe(task, {**held, "test": held["valid"]}, 0.0, Companions())
    train, valid = probe.items("train"), probe.items("valid")
    targets = torch.as_tensor(valid.targets)  # (held-out clips,)
    everything = torch.cat([held["valid"].means, torch.stack(list(judged.values()))])  # (clips, D)
    _, logits = train_head(
        train,
        # By the cross-entropy and not the accuracy: the divergence needs posteriors, not decisions alone.
        (valid, lambda found: -float(probe.loss(found, targets))),
        (Items(everything, torch.zeros(len(everything))), lambda found: 0.0),  # judged below, clip by clip
        probe.loss,
        len(probe.classes),
        max(EPOCHS, math.ceil(FEWEST_STEPS / math.ceil(len(train) / task.batch_size))),
        task.batch_size,
        seed,
    )
    selection = probe.score("valid", logits[: len(valid)])
    posteriors = F.log_softmax(logits[len(valid) :].double(), dim=1)
    return Classifier(probe.classes, dict(zip(judged, posteriors, strict=True)), selection, probe.notes)


def _hold_out(labels: Mapping[str, str], seed: int) -> dict[str, list[str]]:
    """Keys to train on and to choose the epoch by; of a class with two clips or more one at least is held out."""
    by_class: dict[str, list[str]] = {}
    for key, name in labels.items():
        by_class.setdefault(name, []).append(key)
    generator = np.random.default_rng(seed)
    roles: dict[str, list[str]] = {"train": [], "valid": []}
    for _, keys in sorted(by_class.items()):
        order = [keys[index] for index in generator.permutation(len(keys))]
        count = max(len(order) // HELD_OUT, 1) if len(order) > 1 else 0
        roles["valid"] += order[:count]
        roles["train"] += order[count:]
    if not roles["valid"]:
        counts = Counter(labels.values())
        raise DataError(f"each of the {len(counts)} classes has a single clip; a classifier needs two of some")
    return roles


@dataclass(frozen=True)
class Pitched:
    """A clip of which a note was asked for.

    Attributes:
        key: of the clip.
        asked: MIDI note number, 60 is middle C.
        found: the note in the clip, with fractions; None where there is none, or the clip cannot be used.
    """

    key: str
    asked: float
    found: float | None

    @property
    def right(self) -> bool:
        """Within half a semitone."""
        return self.found is not None and abs(self.found - self.asked) <= HALF_SEMITONE

    @property
    def right_but_octave(self) -> bool:
        """Within half a semitone in some octave."""
        return self.found is not None and abs((self.found - self.asked + 6) % 12 - 6) <= HALF_SEMITONE


def pitched_clips(clips: ClipSet, label: str) -> Iterator[Pitched]:
    """Every clip with a note in a label, with the note that is heard in it.

    Clips that cannot be used or are silent come too, without a note: it was asked for.

    Raises:
        DataError: a label that is no MIDI note number. MissingExtraError: librosa is not installed.
    """
    asked = {key: _midi(key, text) for key, facts in clips.clips.items() if (text := facts.label(label)) is not None}
    todo = [key for key in asked if clips.clips[key].problem is None and not clips.clips[key].silent]
    yield from (Pitched(key, note, None) for key, note in asked.items() if key not in set(todo))
    examples = clips.examples(todo) if todo else ()
    for example in tqdm(examples, desc=f"pitch of {clips.name}", total=len(todo), delay=1, disable=None):
        yield Pitched(example.key, asked[example.key], heard_note(example.audio))


def heard_note(audio: Samples) -> float | None:
    """The note of a clip that holds a single one: MIDI note number with fractions, or None without a voiced frame.

    The median over voiced frames of F0 by probabilistic YIN (Mauch & Dixon 2014, of librosa), A0 to C8. The range does
    not hang on what was asked for.

    Args:
        audio: (samples,) at 16 kHz.

    Raises:
        MissingExtraError: librosa is not installed.
    """
    librosa = require_extra("librosa", "evaluate")
    if not audio.any():
        return None
    low, high = PITCH_RANGE
    settings = {"frame_length": PITCH_FRAME, "hop_length": PITCH_HOP, "resolution": PITCH_RESOLUTION}
    track, _, _ = librosa.pyin(audio, fmin=low, fmax=high, sr=SAMPLING_RATE, **settings)  # (frames,), NaN if unvoiced
    voiced = track[np.isfinite(track)]
    return float(69 + 12 * np.log2(np.median(voiced) / 440)) if voiced.size else None


def _midi(key: str, text: str) -> float:
    try:
        note = float(text)
    except ValueError:
        note = float("nan")
    if not 0 <= note <= 127:
        raise DataError(f"{key}: {text!r} is no MIDI note number; write 0 to 127, where 60 is middle C")
    return note
