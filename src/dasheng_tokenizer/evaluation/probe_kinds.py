"""The kinds of probes: what a head's targets, loss and score are for a class a clip, several classes, and events."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dasheng_tokenizer.errors import DataError
from dasheng_tokenizer.evaluation import probe_metrics
from dasheng_tokenizer.evaluation.heads import HeadResult, Items, nearest_neighbours, train_head
from dasheng_tokenizer.evaluation.probe_tasks import Event, Label, ProbeTask

if TYPE_CHECKING:
    from dasheng_tokenizer.evaluation.asr import LanguageModel
    from dasheng_tokenizer.evaluation.retrieval import TextEncoder


@dataclass
class TaskClips:
    """Embeddings and labels of one role of a fold; clips without a label are left out and counted in `notes`."""

    means: Tensor
    frames: list[Tensor]
    labels: list[Label]
    notes: list[str]


@dataclass(frozen=True)
class Companions:
    """Frozen models that some heads need beside the embedding.

    Attributes:
        text_encoder: of captions, for retrieval.
        language_model: that writes transcripts; without one, a CTC head does.
    """

    text_encoder: TextEncoder | None = None
    language_model: LanguageModel | None = None


class Probe:
    """A head on the data of one fold."""

    def __init__(
        self, task: ProbeTask, data: dict[str, TaskClips], seconds_per_frame: float, companions: Companions
    ) -> None:
        """Args: the task, its clips by role (train, valid, test), the hop of their frames, and companions."""
        self.task, self.data, self.hop, self.companions = task, data, seconds_per_frame, companions
        self.notes: list[str] = []

    def run(self, seed: int) -> HeadResult:
        """Train with a seed and score; the epoch is chosen on the validation data."""
        raise TypeError(f"{type(self).__name__} must define run")

    def knn(self) -> float | None:
        """Score of the nearest neighbours, where it makes sense."""
        return None


class LinearProbe(Probe):
    """A linear head over C classes.

    Logits and targets of clips are (N, C) and (N,) or (N, C); those of frames one (T, C) a clip, joined in a batch.
    """

    def __init__(self, *arguments: Any) -> None:
        """As `Probe`.

        Raises:
            DataError: training or validation data of a single class.
        """
        super().__init__(*arguments)
        task = self.task
        self.classes = tuple(task.classes) or tuple(sorted(set(self._names(self.data["train"].labels))))
        if len(self.classes) < 2:
            raise DataError(f"{task.name}: the training data has a single class, {self.classes}; nothing can be learnt")
        self._check_classes()

    def _names(self, labels: Iterable[Label]) -> list[str]:
        """Every class name in some labels."""
        return [label for label in labels if isinstance(label, str)]

    def _check_classes(self) -> None:
        train = set(self._names(self.data["train"].labels))
        for role in ("valid", "test"):
            names = set(self._names(self.data[role].labels))
            if role == "valid" and len(names) < 2:
                raise DataError(
                    f"{self.task.name}: the validation data has a single class, {names}; it cannot choose an epoch"
                )
            if unseen := sorted(names - train):
                self.notes.append(
                    f"{len(unseen)} classes of the {role} data have no training clip: {', '.join(unseen[:5])}"
                )

    def items(self, role: str) -> Items:
        """Features and targets of a role."""
        raise TypeError(f"{type(self).__name__} must define items")

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of a batch from its logits and targets."""
        raise TypeError(f"{type(self).__name__} must define loss")

    def score(self, role: str, logits: Any) -> float:
        """The task's metric from the logits of a role."""
        raise TypeError(f"{type(self).__name__} must define score")

    def extra(self, logits: Any) -> dict[str, float]:
        """Further figures from the logits of the test data."""
        return {}

    def run(self, seed: int) -> HeadResult:
        """Train with a seed; the epoch is chosen on the validation data."""
        result, logits = train_head(
            self.items("train"),
            (self.items("valid"), lambda logits: self.score("valid", logits)),
            (self.items("test"), lambda logits: self.score("test", logits)),
            self.loss,
            len(self.classes),
            self.task.epochs,
            self.task.batch_size,
            seed,
        )
        result.extra = self.extra(logits)
        return result


class ClipProbe(LinearProbe):
    """One class a clip: cross-entropy on the mean over time."""

    def _targets(self, role: str) -> Tensor:
        """Class of each clip; -1 for a class that the task does not know, which can only be wrong."""
        index = {name: number for number, name in enumerate(self.classes)}
        return torch.tensor([index.get(str(label), -1) for label in self.data[role].labels])

    def items(self, role: str) -> Items:
        """Features and targets of a role."""
        targets, means = self._targets(role), self.data[role].means
        if role == "train":
            means, targets = means[targets >= 0], targets[targets >= 0]
        return Items(means, targets)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of a batch from its logits and targets."""
        return F.cross_entropy(logits, targets)

    def score(self, role: str, logits: Tensor) -> float:
        """The task's metric from the logits of a role."""
        return self._rate(logits.argmax(1), self._targets(role))

    def extra(self, logits: Tensor) -> dict[str, float]:
        """Further figures from the logits of the test data."""
        if self.task.name != "pitch":
            return {}
        # Classes are MIDI note numbers here, and a semitone off is nearly right.
        notes = torch.tensor([int(name) for name in self.classes])
        targets = self._targets("test")
        near = (notes[logits.argmax(1)] - notes[targets]).abs() <= 1
        return {"within a semitone": float((near & (targets >= 0)).float().mean())}  # -1: a pitch that is no class

    def knn(self) -> float | None:
        """Score of the nearest neighbours, where it makes sense."""
        if not self.task.knn:
            return None
        train = self.items("train")
        assert isinstance(train.features, Tensor) and isinstance(train.targets, Tensor)
        predicted = nearest_neighbours(train.features, train.targets, self.data["test"].means, len(self.classes))
        return self._rate(predicted, self._targets("test"))

    def _rate(self, predicted: Tensor, target: Tensor) -> float:
        metric = getattr(probe_metrics, self.task.metric)  # accuracy or macro_accuracy
        return float(metric(predicted.numpy(), target.numpy()))


class MultilabelProbe(LinearProbe):
    """Several classes a clip: binary cross-entropy on the mean over time, mAP."""

    def _names(self, labels: Iterable[Label]) -> list[str]:
        return [str(name) for label in labels for name in ((label,) if isinstance(label, str) else label)]

    def items(self, role: str) -> Items:
        """Features and targets of a role."""
        index = {name: number for number, name in enumerate(self.classes)}
        targets = torch.zeros(len(self.data[role].labels), len(self.classes))
        for row, label in enumerate(self.data[role].labels):
            for name in self._names([label]):
                if name in index:
                    targets[row, index[name]] = 1.0
        return Items(self.data[role].means, targets)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of a batch from its logits and targets."""
        return F.binary_cross_entropy_with_logits(logits, targets)

    def score(self, role: str, logits: Tensor) -> float:
        """The task's metric from the logits of a role."""
        targets = self.items(role).targets
        assert isinstance(targets, Tensor)
        return probe_metrics.mean_average_precision(logits.numpy(), targets.numpy().astype(np.int64))


class FrameProbe(LinearProbe):
    """Events in time: binary cross-entropy in every frame, threshold 0.5, F1."""

    def _names(self, labels: Iterable[Label]) -> list[str]:
        events = (event for label in labels if isinstance(label, tuple) for event in label)
        return [event.label for event in events if isinstance(event, Event)]

    def items(self, role: str) -> Items:
        """Features and targets of a role."""
        held = self.data[role]
        if not held.frames:
            raise DataError(f"{self.task.name}: the store holds no frames of the {role} data")
        targets = [
            torch.from_numpy(probe_metrics.activity(label, self.classes, len(frames), self.hop)).float()  # type: ignore[arg-type]
            for label, frames in zip(held.labels, held.frames, strict=True)
        ]
        return Items(list(held.frames), list(targets))

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of a batch from its logits and targets."""
        weight = torch.tensor(self.task.pos_weight)
        return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weight)

    def score(self, role: str, logits: list[Tensor]) -> float:
        """The task's metric from the logits of a role."""
        active = [(clip > 0).numpy() for clip in logits]  # a sigmoid above 0.5
        labels: Any = self.data[role].labels
        if self.task.metric == "note_frame_f1":
            return probe_metrics.note_frame_f1(active, labels, self.classes, self.hop)
        targets = self.items(role).targets
        true = [target.bool().numpy() for target in targets]
        size = int(np.ceil((self.task.segment_seconds or self.hop) / self.hop - 1e-9))
        return probe_metrics.segment_f1(active, true, size, self.task.metric.rsplit("_", 1)[-1])

    def extra(self, logits: list[Tensor]) -> dict[str, float]:
        """Further figures from the logits of the test data."""
        if self.task.metric != "note_frame_f1":
            return {}
        active = [(clip > 0).numpy() for clip in logits]
        labels: Any = self.data["test"].labels
        return {"notes": probe_metrics.note_f1(active, labels, self.classes, self.hop)}


class RetrievalProbe(Probe):
    """Clips and captions in one space: recall at 1."""

    def run(self, seed: int) -> HeadResult:
        """See `Probe.run`.

        Raises:
            DataError: no text encoder is given.
        """
        from dasheng_tokenizer.evaluation.retrieval import train_retrieval

        if self.companions.text_encoder is None:
            raise DataError(f"{self.task.name} needs a text encoder; name its folder with --text-encoder")
        train, valid, test = (self._captioned(role) for role in ("train", "valid", "test"))
        return train_retrieval(train, valid, test, self.task, seed, self.companions.text_encoder)

    def _captioned(self, role: str) -> list[tuple[Any, tuple[str, ...]]]:
        held = self.data[role]
        captions = [tuple(map(str, label)) if isinstance(label, tuple) else (label,) for label in held.labels]
        return list(zip(held.means.numpy(), captions, strict=True))


class AsrProbe(Probe):
    """Transcripts, by a CTC head over characters or by an adapter into a language model: 1 - word error rate."""

    def run(self, seed: int) -> HeadResult:
        """See `Probe.run`."""
        from dasheng_tokenizer.evaluation.asr import train_adapter, train_ctc

        train, valid, test = (self._transcribed(role) for role in ("train", "valid", "test"))
        if self.companions.language_model is not None:
            return train_adapter(train, valid, test, self.task, seed, self.companions.language_model)
        notes: list[str] = []
        result = train_ctc(train, valid, test, self.task, seed, notes)
        self.notes += [note for note in notes if note not in self.notes]
        return result

    def _transcribed(self, role: str) -> list[tuple[Any, str]]:
        held = self.data[role]
        if not held.frames:
            raise DataError(f"{self.task.name}: the store holds no frames of the {role} data")
        return [(frames.numpy(), str(label)) for frames, label in zip(held.frames, held.labels, strict=True)]


PROBES: dict[str, type[Probe]] = {
    "clip": ClipProbe,
    "multilabel": MultilabelProbe,
    "frame": FrameProbe,
    "retrieval": RetrievalProbe,
    "asr": AsrProbe,
}
