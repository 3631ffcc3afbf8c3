"""Whether generated clips are what was asked for: labels by a probe, notes by a pitch tracker, text by CLAP.

The real set has a row in each table: what the judge says of clips that are right is the most that a generator can get.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import cosine_similarity

from dasheng_tokenizer.errors import DataError
from dasheng_tokenizer.evaluation import frechet
from dasheng_tokenizer.evaluation.clip_embedders import ClapEmbedder
from dasheng_tokenizer.evaluation.generation_clips import ClipSet, pairs
from dasheng_tokenizer.evaluation.generation_judges import Classifier, pitched_clips, train_classifier
from dasheng_tokenizer.evaluation.generation_sets import MINIMUM_CLIPS, NONE, Cells, Sets, cells, named
from dasheng_tokenizer.evaluation.report import Table
from dasheng_tokenizer.evaluation.representations import Embedder

CLAP = "clap"
"""Name of the embedding of the CLAP model that scores texts."""


class LabelTable:
    """A label by a probe on one embedding: accuracy against what was asked for, and divergence from paired clips."""

    def __init__(self, sets: Sets, label: str, name: str, resamples: int, seed: int) -> None:
        """Args: sets, label, name of the embedding, resamples of the bootstrap, seed of it and of the probe."""
        self.sets, self.label, self.name = sets, label, name
        self.resamples, self.seed = resamples, seed

    def table(self, embedder: Embedder) -> Table | None:
        """Train the probe on the real labelled clips and judge; None, with a note, where nothing can judge."""
        data = self.sets.judge
        judged: dict[tuple[str, str], Tensor] = {}
        unjudged: set[str] = set()  # sets on which the embedding failed, for which the clips are not to blame
        for held in self.sets.all:
            try:
                means = self.sets.means(held, self.name, embedder) if held.usable else {}
            except DataError as error:
                self.sets.outcome.missing(self._where(held), error)
                unjudged.add(held.name)
                continue
            judged |= {(held.name, key): mean for key, mean in means.items()}
        try:
            if data is None or not judged:
                raise DataError("no clip to judge" if data else "no clips to learn from")
            learnt = self.sets.means(data, self.name, embedder)
            classifier = train_classifier(self.label, data, learnt, judged, self.seed)
        except DataError as error:
            self.sets.outcome.missing(f"{self.label} by {self.name}", error)
            return None
        for note in classifier.notes:
            self.sets.outcome.note(f"Probe of {self.label} on {self.name}: {note}.")
        self.sets.outcome.note(
            f"Probe of {self.label} on {self.name}: {len(classifier.classes)} classes, accuracy "
            f"{100 * classifier.selection:.1f} % on clips held out of its training data, by which its epoch was chosen."
        )
        self._name_overlap(data)
        blank: Cells = [0, *[NONE] * 7]
        rows = [
            [self.sets.row_name(held), *(blank if held.name in unjudged else self._row(held, classifier))]
            for held in self.sets.all
        ]
        columns = ["set", "clips asked", "accuracy, %", "from", "to", "pairs", "KL", "from", "to"]
        return Table(f"Label {self.label} by a probe on {self.name}", columns, rows)

    def _where(self, held: ClipSet) -> str:
        return f"{self.label} by {self.name}, {held.name}"

    def _row(self, held: ClipSet, classifier: Classifier) -> Cells:
        asked = {key: text for key, facts in held.clips.items() if (text := facts.label(self.label)) is not None}
        known = {key: text for key, text in asked.items() if text in classifier.classes}
        if foreign := sorted(set(asked.values()) - set(classifier.classes)):
            count = len(asked) - len(known)
            where = self._where(held)
            self.sets.outcome.note(
                f"{where}: {count} clips left out, no training clip of their class: {named(foreign)}."
            )
        accuracy: Cells = [len(known), NONE, NONE, NONE]
        if known:
            # Clips that are silent or without an embedding were asked for all the same.
            posteriors = classifier.log_posteriors
            heard = [key for key in known if (held.name, key) in posteriors and not held.clips[key].silent]
            hits = sum(classifier.says((held.name, key), known[key]) for key in heard)
            accuracy = [len(known), *cells(frechet.share_estimate(hits, len(known)), scale=100)]
        else:
            self.sets.outcome.missing(f"accuracy, {self._where(held)}", f"no clip has a known label {self.label!r}")
        divergence: Cells = [NONE] * 4 if held is self.sets.real else self._divergence(held, classifier)
        return [*accuracy, *divergence]

    def _divergence(self, held: ClipSet, classifier: Classifier) -> Cells:
        """Over pairs of which the real clip has the label, or over all pairs where none has."""
        real, judged = self.sets.real, classifier.log_posteriors
        found = [
            pair for pair in pairs(held, real) if (held.name, pair[0]) in judged and (real.name, pair[1]) in judged
        ]
        found = [pair for pair in found if real.clips[pair[1]].label(self.label) is not None] or found
        if len(found) < MINIMUM_CLIPS:
            reason = f"{len(found)} clips have the name of a real one or name it; {MINIMUM_CLIPS} are needed"
            self.sets.outcome.missing(f"KL, {self._where(held)}", reason)
            return [len(found), NONE, NONE, NONE]
        values = [classifier.divergence((real.name, second), (held.name, first)) for first, second in found]
        return [len(found), *cells(frechet.mean_estimate(values, self.resamples, self.seed), low=0.0)]

    def _name_overlap(self, data: ClipSet) -> None:
        known = {facts.digest for facts in data.clips.values()}
        if same := [key for key, facts in self.sets.real.clips.items() if facts.digest in known]:
            self.sets.outcome.note(
                f"{len(same)} clips of {self.sets.real.name} are in the classifier data, too: the accuracy on real "
                f"clips is too good ({named(same)})."
            )


def pitch_table(sets: Sets, label: str) -> Table:
    """Notes asked for against those that are heard.

    Args:
        sets: generated and real.
        label: that holds the MIDI note.

    Raises:
        MissingExtraError: librosa is not installed.
    """
    rows: list[Cells] = []
    for held in sets.all:
        found: Cells = [0, NONE, NONE, NONE, NONE, NONE]
        try:
            notes = list(pitched_clips(held, label))
            if not notes:
                raise DataError(f"no clip has the label {label!r}")
            right = frechet.share_estimate(sum(note.right for note in notes), len(notes))
            octave = 100 * sum(note.right_but_octave for note in notes) / len(notes)
            none = 100 * sum(note.found is None for note in notes) / len(notes)
            found = [len(notes), *cells(right, scale=100), octave, none]
        except DataError as error:
            sets.outcome.missing(f"pitch, {held.name}", error)
        rows.append([sets.row_name(held), *found])
    columns = ["set", "notes asked", "within half a semitone, %", "from", "to", "in any octave, %", "no pitch, %"]
    return Table("Pitch of single notes", columns, rows)


def text_table(sets: Sets, clap: ClapEmbedder, resamples: int, seed: int) -> Table:
    """CLAP score: cosine of the embeddings of a clip and of the text that it was asked for by."""
    rows: list[Cells] = []
    for held in sets.all:
        found: Cells = [0, NONE, NONE, NONE]
        try:
            values = _similarities(sets, held, clap)
            found[0] = len(values)
            if len(values) < MINIMUM_CLIPS:
                raise DataError(f"{len(values)} clips have a text; {MINIMUM_CLIPS} are needed")
            found = [len(values), *cells(frechet.mean_estimate(values, resamples, seed))]
        except DataError as error:
            sets.outcome.missing(f"CLAP score, {held.name}", error)
        rows.append([sets.row_name(held), *found])
    return Table("CLAP score: cosine of clip and text", ["set", "clips", "score", "from", "to"], rows)


def _similarities(sets: Sets, held: ClipSet, clap: ClapEmbedder) -> Sequence[float]:
    means = sets.means(held, CLAP, clap)
    texts = {key: text for key in means if (text := held.clips[key].text) is not None}
    different = sorted(set(texts.values()))
    vectors = dict(zip(different, clap.texts(different), strict=True)) if different else {}
    return [float(cosine_similarity(means[key], vectors[text], dim=0)) for key, text in texts.items()]
