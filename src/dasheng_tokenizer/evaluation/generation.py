"""How good generated clips are: distances to real clips, judgement by a probe, pitch, and agreement with the text.

A figure that cannot be made is missing, with a reason; nothing is put in its place. What a generator was asked for and
failed at counts: clips that are damaged, NaN or silent are wrong where a label or a note was asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dasheng_tokenizer.errors import ConfigurationError, DataError
from dasheng_tokenizer.evaluation import frechet
from dasheng_tokenizer.evaluation.clip_embedders import ClapEmbedder
from dasheng_tokenizer.evaluation.embedding_store import EmbeddingStore
from dasheng_tokenizer.evaluation.generation_answers import CLAP, LabelTable, pitch_table, text_table
from dasheng_tokenizer.evaluation.generation_clips import ClipSet
from dasheng_tokenizer.evaluation.generation_sets import (
    MINIMUM_CLIPS,
    NONE,
    Cells,
    Outcome,
    Sets,
    cells,
    check_unique,
    matrix,
)
from dasheng_tokenizer.evaluation.report import Table
from dasheng_tokenizer.evaluation.representations import Embedder

METHOD: tuple[str, ...] = (
    "All audio at 16 kHz, one channel; an embedding of a clip is its mean over time.",
    "Columns from and to are 95 % intervals by bootstrap over clips, of shares by Wilson. They say where the figure of "
    "as many other clips would lie, not how far it is from the figure of endlessly many.",
    "Fréchet: Gaussians of sample means and covariances, float64. Kernel: unbiased squared maximum mean discrepancy, "
    f"kernel (x·y/D + 1)³, over all clips, and as mean ± standard deviation over {frechet.SUBSETS} random sub-sets.",
    "Accuracy and pitch: clips that are damaged, NaN or silent count as wrong. KL: of the probe's posteriors in nats, "
    "real against generated.",
)
"""What the figures are, for a report."""


@dataclass(frozen=True)
class Questions:
    """What is asked beside distances.

    Attributes:
        labels: that a probe tells, each trained on `classifier`.
        classifier: real labelled clips, needed where there are labels.
        pitch: label that holds the MIDI note asked for, or None.
        clap: model for the text score and for one more embedding, or None.
        resamples: of a bootstrap.
        seed: of bootstrap, sub-sets and classifier.

    Raises:
        ConfigurationError: labels without clips to learn them from, or the reverse; fewer than 20 resamples.
    """

    labels: Sequence[str] = ()
    classifier: ClipSet | None = None
    pitch: str | None = None
    clap: ClapEmbedder | None = None
    resamples: int = frechet.RESAMPLES
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what belongs together."""
        if bool(self.labels) != (self.classifier is not None):
            raise ConfigurationError("labels and classifier data belong together: name the labels and real clips")
        if self.resamples < frechet.FEWEST_RESAMPLES:
            raise ConfigurationError(f"{self.resamples} resamples are too few; take {frechet.FEWEST_RESAMPLES} or more")


def evaluate_generation(
    systems: Sequence[ClipSet],
    real: ClipSet,
    embedders: Sequence[tuple[str, Embedder]],
    store: EmbeddingStore,
    questions: Questions,
) -> Outcome:
    """All figures of some generated sets beside one real set.

    Args:
        systems: generated sets, a row of the tables each.
        real: to compare with.
        embedders: with the names that their embeddings get; of several representations the first counts.
        store: where embeddings are kept.
        questions: what is asked beside distances.

    Raises:
        ConfigurationError: two sets or two embeddings of one name.
        MissingExtraError: a figure needs a package that is not installed.
        OutputError: embeddings cannot be kept.
    """
    given = [*embedders, *([(CLAP, questions.clap)] if questions.clap is not None else [])]
    check_unique("embeddings", [name for name, _ in given])
    sets = Sets(systems, real, questions.classifier, store)
    tables = sets.outcome.tables
    tables.append(sets.clips_table())
    tables += [distance_table(sets, name, embedder, questions) for name, embedder in given]
    for label in questions.labels:
        for name, embedder in given:
            table = LabelTable(sets, label, name, questions.resamples, questions.seed).table(embedder)
            tables += [table] if table is not None else []
    if questions.pitch is not None:
        tables.append(pitch_table(sets, questions.pitch))
    if questions.clap is not None:
        tables.append(text_table(sets, questions.clap, questions.resamples, questions.seed))
    return sets.outcome


def distance_table(sets: Sets, name: str, embedder: Embedder, questions: Questions) -> Table:
    """Fréchet and kernel distance of each generated set to the real one in one embedding."""
    rows: list[Cells] = []
    width = 0
    for system in sets.systems:
        found: Cells = [NONE] * 8
        try:
            fake, real = (matrix(sets.means(held, name, embedder)) for held in (system, sets.real))
            width = fake.shape[1]
            found = _distances(sets.outcome, f"{name}, {system.name}", fake, real, questions)
        except DataError as error:
            sets.outcome.missing(f"distances by {name}, {system.name}", error)
        rows.append([system.name, *found])
    of = f" ({width} numbers a clip)" if width else ""
    columns = ["set", "clips", "Fréchet", "from", "to", "kernel", "from", "to", "kernel of sub-sets"]
    return Table(f"Distance to {sets.real.name} by {name}{of}", columns, rows)


def _distances(outcome: Outcome, where: str, fake: frechet.Floats, real: frechet.Floats, questions: Questions) -> Cells:
    sizes = len(fake), len(real)
    if min(sizes) < MINIMUM_CLIPS:
        raise DataError(f"{sizes[0]} generated and {sizes[1]} real clips; {MINIMUM_CLIPS} of each are needed")

    def distance(first: frechet.Counts, second: frechet.Counts) -> float:
        return frechet.frechet_distance(fake, real, first, second)

    gaussian = frechet.bootstrap(distance, sizes, questions.resamples, questions.seed)
    if frechet.is_singular(fake, real):
        outcome.note(
            f"Few clips: {where}: {min(sizes)} clips for {fake.shape[1]} dimensions, so that a covariance is singular "
            "and the Fréchet distance far too large; it orders sets of equal size only. No shrinkage is applied. The "
            "kernel distance is not affected."
        )
    kernel = frechet.KernelDistance(fake, real)
    whole = frechet.bootstrap(kernel, sizes, questions.resamples, questions.seed)
    size = frechet.subset_size(*sizes)
    mean, spread = kernel.of_subsets(size, seed=questions.seed)
    return [len(fake), *cells(gaussian, low=0.0), *cells(whole), f"{mean:.4g} ± {spread:.2g} (of {size})"]
