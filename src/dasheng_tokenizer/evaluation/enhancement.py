"""Measures enhancers of speech beside noisy speech, classical methods and the ceiling that the tokenizer sets.

Rows are kept as they are made, in the folder of the output, so that a killed run goes on (see `reconstruction`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from dasheng_tokenizer.audio import save_audio
from dasheng_tokenizer.errors import ConfigurationError, DashengTokenizerError
from dasheng_tokenizer.evaluation.enhancement_inputs import RATE, SILENCE_SECONDS, Example, ExampleSet
from dasheng_tokenizer.evaluation.enhancement_systems import System
from dasheng_tokenizer.evaluation.enhancement_words import Recogniser
from dasheng_tokenizer.evaluation.metric_columns import SPEECH, Metric, Pair
from dasheng_tokenizer.evaluation.reconstruction import Row, RowStore, run
from dasheng_tokenizer.evaluation.reconstruction_inputs import DecodedClip, Opened, Source, Task
from dasheng_tokenizer.evaluation.reconstruction_inputs import System as TableRow

VERSION = 1
"""Raised when the meaning of a figure changes, so that kept rows are not taken for new ones."""

WORDS, LEVELS, AUDIO = "words.jsonl", "levels.jsonl", "audio"
"""In the output folder: what was heard, levels without speech, and the clips where they are kept."""

SILENCE = "digital silence"

LOWEST_DB = -100.0
"""Levels in dB of full scale are not told apart below this."""

Samples = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Level:
    """Level of an input without speech and of what a system made of it, root mean square in dB of full scale."""

    system: str
    name: str
    before: float
    after: float | None
    error: str | None = None


@dataclass
class Outcome:
    """Everything that the tables need.

    Attributes:
        systems: that were compared, the unprocessed clips first.
        metrics: that were measured.
        rows: one an example and system: those of `reconstruction.Outcome`, and `clip`, `snr_db`, `noise`, and where
            words were counted `heard`, `errors` and `words`.
        levels: of inputs without speech.
        failures: inputs with which nothing could be done, with reasons.
        versions: of the packages that made the figures.
        notes: how inputs and figures were made.
        kept: number of rows that an earlier run had made.
    """

    systems: Sequence[System]
    metrics: tuple[Metric, ...]
    rows: list[Row]
    levels: list[Level]
    failures: dict[str, str]
    versions: dict[str, str]
    notes: list[str]
    kept: int = 0

    def failed(self) -> list[tuple[str, str]]:
        """Names of inputs and clips that could not be measured, with reasons."""
        rows = [(f"{row['file']} ({row['system']})", row["error"]) for row in self.rows if row["error"]]
        levels = [(f"{level.name} ({level.system})", level.error) for level in self.levels if level.error]
        return [*self.failures.items(), *rows, *levels]


def evaluate_enhancement(
    examples: ExampleSet,
    systems: Sequence[System],
    metrics: tuple[Metric, ...],
    folder: Path,
    workers: int,
    recogniser: Recogniser | None = None,
    keep_audio: bool = False,
) -> Outcome:
    """Enhance and measure everything.

    Args:
        examples: noisy and clean clips.
        systems: to compare.
        metrics: as `require_metrics` gives them.
        folder: where rows are kept.
        workers: processes that measure, at least one.
        recogniser: counts word errors; None: nobody does.
        keep_audio: write what each system made of each example into `folder`/audio.

    Raises:
        ConfigurationError: two systems of one name, or no process. DataError: nothing to measure.
        OutputError: rows or clips cannot be kept.
    """
    names = [system.name for system in systems]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigurationError(f"two systems are called {', '.join(twice)}; name each once")
    inputs = _Inputs(examples, systems, folder, recogniser, keep_audio)
    measured = run(inputs, metrics, folder, workers)
    rows = [
        row | inputs.facts[row["file"]] | inputs.words.get((row["system"], row["file"]), {}) for row in measured.rows
    ]
    levels = list(_levels(examples, systems, RowStore(folder / LEVELS)))
    notes = [*examples.notes, *(system.about for system in systems if system.about)]
    if recogniser is not None:
        notes.append(recogniser.about)
    return Outcome(systems, metrics, rows, levels, inputs.failures, measured.versions, notes, measured.kept)


class _Estimate:
    """What a system makes of an example, made once and only when it is needed."""

    def __init__(self, system: System, example: Example) -> None:
        self.system, self.example = system, example

    @functools.cached_property
    def audio(self) -> Samples:
        """(samples,) as long as the example."""
        heard = self.example.clean if self.system.from_clean else self.example.noisy
        return self.system.process(heard)

    @property
    def is_made(self) -> bool:
        """Whether `audio` was asked for."""
        return "audio" in self.__dict__

    def source(self) -> Source:
        """For a process that measures; a light system runs there."""
        if self.system.light and not self.is_made:
            return _ToProcess(self.example.clean, self.example.noisy, self.system)
        return DecodedClip(self.example.clean, self.audio, None)


@dataclass(frozen=True, eq=False)
class _ToProcess:
    """A noisy clip and the light system that is to process it."""

    clean: Samples
    noisy: Samples
    system: System

    def open(self) -> Opened:
        """As in `Source`."""
        return Opened(Pair(self.clean, self.system.process(self.noisy), RATE))


@dataclass
class _Inputs:
    """The tasks of all examples and systems, for `reconstruction.run`.

    Attributes:
        facts: `clip`, `snr_db` and `noise` of an example, by its key.
        words: what was heard, by system and key.
    """

    examples: ExampleSet
    systems_of_speech: Sequence[System]
    folder: Path
    recogniser: Recogniser | None
    keep_audio: bool
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    words: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Open what an earlier run has heard."""
        self.systems = [TableRow(system.name, None, system.about) for system in self.systems_of_speech]
        self.failures = self.examples.failures
        self.total: int | None = self.examples.total * len(self.systems)
        self._heard = RowStore(self.folder / WORDS) if self.recogniser is not None else None

    def tasks(self) -> Iterator[Task]:
        """As in `reconstruction_inputs.Inputs`."""
        identities = [system.identity() for system in self.systems_of_speech]
        for example in self.examples.examples():
            self.facts[example.key] = {"clip": example.clip, "snr_db": example.snr_db, "noise": example.noise}
            digest = _digest([VERSION, _samples(example.noisy), _samples(example.clean)])
            for system, identity in zip(self.systems_of_speech, identities, strict=True):
                estimate, whole = _Estimate(system, example), ["enhancement", digest, *identity]
                self._keep(estimate)
                self._count(estimate, whole)
                yield Task(example.key, system.name, SPEECH, whole, estimate.source)

    def _keep(self, estimate: _Estimate) -> None:
        """Write the clip, also over that of an earlier run, which may have had another seed or model."""
        if not self.keep_audio:
            return
        path = self.folder / AUDIO / _file_name(estimate.system.name) / f"{estimate.example.key}.wav"
        try:
            audio = estimate.audio
        except Exception:  # the task asks again, and has the reason in its row
            return
        save_audio(path, audio, RATE, "FLOAT")

    def _count(self, estimate: _Estimate, identity: list[Any]) -> None:
        """Count word errors where the text is known."""
        example, key = estimate.example, (estimate.system.name, estimate.example.key)
        if self.recogniser is None or self._heard is None or example.text is None:
            return
        digest = _digest([identity, example.text, example.language, self.recogniser.identity()])
        if digest not in self._heard.rows:
            try:
                words = self.recogniser.words(estimate.audio, example.text, example.language)
            except Exception as error:  # of one clip, for which the others must not pay
                self.failures.setdefault(f"{key[1]} ({key[0]}), words", _reason(error))
                return
            self._heard.add(digest, asdict(words))
        self.words[key] = self._heard.rows[digest]


def _levels(examples: ExampleSet, systems: Sequence[System], store: RowStore) -> Iterator[Level]:
    """What systems leave of silence and of noise alone."""
    silence = np.zeros(int(SILENCE_SECONDS * RATE), np.float32)
    inputs = [(SILENCE, silence), *examples.without_speech()]
    for name, audio in tqdm(inputs, desc="without speech", unit="clip", delay=1, disable=None):
        for system in systems:
            if system.from_clean:  # it does not hear the noise
                continue
            digest = _digest([VERSION, _samples(audio), system.identity()])
            if digest not in store.rows:
                try:
                    store.add(digest, {"after": decibels(system.process(audio))})
                except Exception as error:  # of one clip, for which the others must not pay
                    yield Level(system.name, name, decibels(audio), None, _reason(error))
                    continue
            yield Level(system.name, name, decibels(audio), store.rows[digest]["after"])


def decibels(audio: Samples) -> float:
    """Root mean square of (samples,) in dB of full scale, not below `LOWEST_DB`."""
    power = float(np.mean(np.square(audio, dtype=np.float64)))
    return max(LOWEST_DB, round(10 * math.log10(max(power, 1e-30)), 2))


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in " -_." else "_" for letter in name).strip(". ") or "_"


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, DashengTokenizerError) else f"{type(error).__name__}: {error}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _samples(audio: Samples) -> str:
    return hashlib.sha256(audio.tobytes()).hexdigest()
