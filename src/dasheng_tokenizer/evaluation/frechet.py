"""Distances between two sets of clips in the space of an embedding, and intervals by bootstrap.

Embeddings are (clips, D), one vector a clip; everything is computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dasheng_tokenizer.errors import ConfigurationError, DataError

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

CONFIDENCE = 0.95
QUANTILE = 1.959963984540054
"""Of the normal distribution, for `CONFIDENCE`."""

FEWEST_RESAMPLES = 20
RESAMPLES = 200
"""Of a bootstrap: the end of an interval is then itself known to about a tenth of the interval's half width."""

SUBSETS = 100
SUBSET_SIZE = 1000
"""Of the sub-set estimate of the kernel distance, as published (Bińkowski et al., arXiv 1801.01401, §4)."""


@dataclass(frozen=True)
class Estimate:
    """A figure with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def frechet_distance(
    first: npt.NDArray[np.floating],
    second: npt.NDArray[np.floating],
    first_counts: Counts | None = None,
    second_counts: Counts | None = None,
) -> float:
    """Fréchet distance of the Gaussians with the means and covariances of two sets (Heusel et al., arXiv 1706.08500).

    |μ₁ − μ₂|² + tr Σ₁ + tr Σ₂ − 2·tr (Σ₁Σ₂)^½, covariances with n − 1. The last trace is the sum of the singular
    values of L₁·L₂ᵀ with Σ = LᵀL. That equals the sum of square roots of the eigenvalues of the symmetric product
    Σ₁^½·Σ₂·Σ₁^½, but no covariance is formed and no root of a rounding error is taken, so that singular covariances
    cost no digits and an imaginary part never arises.

    With no more clips than dimensions a covariance is singular. The distance is still defined and is computed as it is,
    without shrinkage, which would change its meaning; see `is_singular` for what it is then worth. With any number of
    clips it is too large on average, by an amount that falls as 1/clips: compare figures of equal numbers only.

    Args:
        first: (N, D).
        second: (M, D).
        first_counts: (N,) how often each row counts; once when None.
        second_counts: (M,) the same.

    Raises:
        DataError: fewer than two clips, unequal widths, NaN or infinity.
    """
    (mean, factor), (other_mean, other_factor) = (
        _moments(array, counts)
        for array, counts in zip(_checked(first, second), (first_counts, second_counts), strict=True)
    )
    root = np.linalg.svd(factor @ other_factor.T, compute_uv=False).sum()
    spread = np.square(factor).sum() + np.square(other_factor).sum()
    return max(0.0, float(np.square(mean - other_mean).sum() + spread - 2 * root))


def is_singular(first: npt.NDArray[np.floating], second: npt.NDArray[np.floating]) -> bool:
    """Whether a covariance has no full rank, (N, D) and (M, D): no more clips than dimensions.

    A Fréchet distance is then mostly a matter of the number of clips: it orders sets of equal size and says nothing
    beside figures of other sizes. The kernel distance has no such limit.
    """
    return min(len(first), len(second)) <= first.shape[1]


def kernel_distance(first: npt.NDArray[np.floating], second: npt.NDArray[np.floating]) -> float:
    """Unbiased squared maximum mean discrepancy with the cubic kernel (Bińkowski et al., arXiv 1801.01401).

    Its mean over sets drawn from one distribution is 0 whatever their sizes, so it may be negative.

    Args:
        first: (N, D).
        second: (M, D).

    Raises:
        DataError: fewer than two clips, unequal widths, NaN or infinity.
    """
    return KernelDistance(first, second)()


class KernelDistance:
    """The kernel distance of two sets and of parts of them; the kernel (x·y / D + 1)³ of all pairs is computed once."""

    def __init__(self, first: npt.NDArray[np.floating], second: npt.NDArray[np.floating]) -> None:
        """Args: (N, D) and (M, D). Holds N² + M² + N·M numbers.

        Raises:
            DataError: as `kernel_distance`.
        """
        a, b = _checked(first, second)
        self.sizes = len(a), len(b)
        self.within, self.beyond, self.across = _kernel(a, a), _kernel(b, b), _kernel(a, b)
        np.fill_diagonal(self.within, 0.0)  # a clip is no evidence about itself: what makes it unbiased
        np.fill_diagonal(self.beyond, 0.0)

    def __call__(self, first_counts: Counts | None = None, second_counts: Counts | None = None) -> float:
        """The distance, with (N,) and (M,) how often each clip counts, once when None.

        A clip that counts twice makes no pair with itself, or resampling would bias what is unbiased.
        """
        counts = first_counts, second_counts
        a, b = (np.ones(n) if c is None else c.astype(float) for n, c in zip(self.sizes, counts, strict=True))
        inner = [
            float(w @ kernel @ w) / float(w.sum() ** 2 - w @ w) for w, kernel in ((a, self.within), (b, self.beyond))
        ]
        return sum(inner) - 2 * float(a @ self.across @ b) / float(a.sum() * b.sum())

    def of_subsets(self, size: int, subsets: int = SUBSETS, seed: int = 0) -> tuple[float, float]:
        """Mean and standard deviation of the distance over random sub-sets, as the measure was published.

        Args:
            size: clips of each set, drawn without repetition.
            subsets: how many.
            seed: of the draws.

        Raises:
            ConfigurationError: a size below two or above that of a set.
        """
        if not 2 <= size <= min(self.sizes):
            raise ConfigurationError(
                f"sub-sets of {size} clips cannot be drawn from {self.sizes[0]} and {self.sizes[1]}"
            )
        generator = np.random.default_rng(seed)
        found = []
        for _ in range(subsets):
            rows, columns = (generator.choice(n, size, replace=False) for n in self.sizes)
            inner = self.within[np.ix_(rows, rows)].sum() + self.beyond[np.ix_(columns, columns)].sum()
            found.append(inner / (size * (size - 1)) - 2 * self.across[np.ix_(rows, columns)].mean())
        return float(np.mean(found)), float(np.std(found))


def subset_size(first: int, second: int) -> int:
    """Clips of a sub-set for sets of these sizes: 1000 as published, but half of the smaller set at most."""
    return min(SUBSET_SIZE, min(first, second) // 2)


def bootstrap(
    statistic: Callable[..., float], sizes: Sequence[int], resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """A figure with its 95 % interval, by drawing clips with repetition.

    The interval is where the figure of other clips, as many and from the same sources, would lie: the quantiles of the
    resampled figures, moved by the difference between the figure and their mean. Without that step the interval of a
    Fréchet distance would lie above the figure, since sets with repeated clips are narrower and farther apart.

    Args:
        statistic: takes for each set an array (clips,) of how often each clip counts, and gives the figure.
        sizes: clips of each set, drawn independently.
        resamples: how many.
        seed: of the draws.

    Raises:
        ConfigurationError: fewer than 20 resamples, too few for an interval.
    """
    if resamples < FEWEST_RESAMPLES:
        raise ConfigurationError(f"{resamples} resamples are too few; take {FEWEST_RESAMPLES} or more")
    generator = np.random.default_rng(seed)
    value = statistic(*(np.ones(size, np.int64) for size in sizes))
    drawn = [
        statistic(*(generator.multinomial(size, np.full(size, 1 / size)) for size in sizes)) for _ in range(resamples)
    ]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail]) + (value - np.mean(drawn))
    return Estimate(value, float(low), float(high))


def mean_estimate(values: npt.ArrayLike, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """The mean of (clips,) values with its interval by `bootstrap`.

    Raises:
        DataError: fewer than two values, which have no spread.
    """
    array = np.asarray(values, np.float64)
    if len(array) < 2:
        raise DataError(f"{len(array)} values have no interval; two or more are needed")
    return bootstrap(lambda counts: float(counts @ array / counts.sum()), [len(array)], resamples, seed)


def share_estimate(hits: int, count: int) -> Estimate:
    """A share of clips with its 95 % interval by Wilson (1927).

    Not by bootstrap, which gives an interval of no width where all clips are right or none.

    Raises:
        DataError: no clips.
    """
    if not count:
        raise DataError("a share of no clips is not defined")
    share, z = hits / count, QUANTILE**2 / count
    middle = (share + z / 2) / (1 + z)
    half = math.sqrt(share * (1 - share) * z + z * z / 4) / (1 + z)
    return Estimate(share, max(0.0, middle - half), min(1.0, middle + half))


def _checked(first: npt.NDArray[np.floating], second: npt.NDArray[np.floating]) -> tuple[Floats, Floats]:
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise DataError(f"distances compare (N, D) with (M, D), got {first.shape} and {second.shape}")
    if min(len(first), len(second)) < 2:
        raise DataError(f"a distance needs two clips a set at least, got {len(first)} and {len(second)}")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise DataError("embeddings hold NaN or infinity; leave those clips out")
    return first.astype(np.float64), second.astype(np.float64)


def _moments(array: Floats, counts: Counts | None) -> tuple[Floats, Floats]:
    """(N, D) → mean (D,), and a factor L with LᵀL the covariance: (rows, D), at most D rows."""
    weights = np.ones(len(array)) if counts is None else counts.astype(float)
    used = weights > 0  # of a resample about two thirds
    array, weights = array[used], weights[used, None]
    total = weights.sum()
    mean = (weights * array).sum(0) / total
    factor: Floats = np.sqrt(weights / (total - 1)) * (array - mean)
    if len(factor) > factor.shape[1]:
        factor = np.asarray(np.linalg.qr(factor, mode="r"))
    return mean, factor


def _kernel(first: Floats, second: Floats) -> Floats:
    return (first @ second.T / first.shape[1] + 1) ** 3
