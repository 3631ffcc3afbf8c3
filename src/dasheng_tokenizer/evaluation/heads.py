"""Heads that are trained on frozen embeddings, by the protocol of X-ARES: LayerNorm and one linear layer.

Adam, learning rate 1e-3, cosine to a tenth of it, the epoch that does best on held-out data. Everything drawn at random
hangs on the seed alone, so the same seed gives the same score.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dasheng_tokenizer.errors import DataError

LEARNING_RATE = 1e-3
FINAL_FRACTION = 0.1

NEIGHBOURS = 10
TEMPERATURE = 0.07
"""Of the nearest-neighbour score: cosine similarity, votes weighted by exp(similarity / temperature)."""


@dataclass
class HeadResult:
    """How a head did.

    Attributes:
        score: on the test data, of the chosen epoch.
        selection: on the data that the epoch was chosen by.
        epoch: the chosen one, from 1.
        extra: further figures on the test data.
    """

    score: float
    selection: float
    epoch: int
    extra: dict[str, float] = field(default_factory=dict)


class LinearHead(nn.Module):
    """LayerNorm and a linear layer: (…, D) → (…, C) logits."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.linear = nn.Linear(dim, classes)

    def forward(self, features: Tensor) -> Tensor:
        """(…, D) → (…, C)."""
        return self.linear(self.norm(features))


@dataclass(frozen=True)
class Items:
    """Samples of a split: features (N, D) with targets (N,) or (N, C); or for frames, one tensor (T, …) a clip."""

    features: Tensor | list[Tensor]
    targets: Tensor | list[Tensor]

    def __len__(self) -> int:
        return len(self.features)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Features and targets of some samples; the frames of several clips are joined."""
        return _take(self.features, rows).float(), _take(self.targets, rows)


Score = Callable[[Any], float]
"""From the logits of a split, (N, C) or for frames one (T, C) a clip, to its score."""


def train_head(
    train: Items,
    selection: tuple[Items, Score],
    test: tuple[Items, Score],
    loss: Callable[[Tensor, Tensor], Tensor],
    classes: int,
    epochs: int,
    batch_size: int,
    seed: int,
) -> tuple[HeadResult, Any]:
    """Train a linear head and score its best epoch.

    Args:
        train: to learn from.
        selection: data that the epoch is chosen by, and its score.
        test: data that is reported, and its score.
        loss: from logits and targets of a batch, items joined, to a scalar.
        classes: C.
        epochs, batch_size: of the training; a batch holds whole items.
        seed: of weights and order.

    Returns:
        The result, and the logits of the test items.

    Raises:
        DataError: no epoch has a selection score that is a number.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = LinearHead(train.features[0].shape[-1], classes)
    optimizer = torch.optim.Adam(head.parameters(), lr=LEARNING_RATE)
    best: tuple[float, int, dict[str, Tensor]] = (-math.inf, 0, {})
    for epoch in range(1, epochs + 1):
        optimizer.param_groups[0]["lr"] = epoch_rate(epoch, epochs)
        for rows in torch.randperm(len(train), generator=generator).split(batch_size):
            features, targets = train.batch(rows)
            optimizer.zero_grad()
            loss(head(features), targets).backward()
            optimizer.step()
        score = selection[1](_logits(head, selection[0]))
        if score > best[0]:
            best = score, epoch, copy.deepcopy(head.state_dict())
    if not best[1]:
        raise DataError("the head's training diverged: no epoch has a score that is a number; check the embeddings")
    head.load_state_dict(best[2])
    logits = _logits(head, test[0])
    return HeadResult(test[1](logits), best[0], best[1]), logits


def nearest_neighbours(train: Tensor, labels: Tensor, test: Tensor, classes: int) -> Tensor:
    """Votes of the ten nearest training clips by cosine similarity: (N, D), (N,), (M, D) → (M,) predicted classes."""
    similarity = F.normalize(test, dim=1) @ F.normalize(train, dim=1).T  # (M, N)
    nearest, rows = similarity.topk(min(NEIGHBOURS, len(train)), dim=1)  # (M, k)
    votes = F.one_hot(labels[rows], classes) * (nearest / TEMPERATURE).exp()[..., None]  # (M, k, C)
    return votes.sum(1).argmax(1)


def epoch_rate(epoch: int, epochs: int) -> float:
    """Learning rate of an epoch, counted from 1: a cosine from `LEARNING_RATE` to a tenth of it, as X-ARES steps it."""
    cosine = 0.5 * (1 + math.cos(math.pi * (epoch - 1) / epochs))
    return LEARNING_RATE * (FINAL_FRACTION + (1 - FINAL_FRACTION) * cosine)


@torch.no_grad()
def _logits(head: LinearHead, items: Items) -> Tensor | list[Tensor]:
    if isinstance(items.features, Tensor):
        return head(items.features.float())  # type: ignore[no-any-return]
    return [head(features.float()) for features in items.features]


def _take(held: Tensor | list[Tensor], rows: Tensor) -> Tensor:
    return held[rows] if isinstance(held, Tensor) else torch.cat([held[row] for row in rows.tolist()])
