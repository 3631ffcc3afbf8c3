"""Noisy speech to measure on: clean clips mixed with noise at fixed ratios, or recordings that come as pairs.

Everything is at 16 kHz, mono. Every mixture hangs on the seed, the names of the clips and the ratio alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dasheng_tokenizer.audio import READ_SUFFIXES
from dasheng_tokenizer.enhancement.clip_store import ClipStore, prepare_clips
from dasheng_tokenizer.enhancement.mixtures import leveled, mix
from dasheng_tokenizer.errors import ConfigurationError, DataError
from dasheng_tokenizer.training.clips import clip_label

RATE = 16_000

CLEAN = math.inf
"""Signal-to-noise ratio of clean speech as the input."""

SILENCE_SECONDS = 2.0
NOISE_SECONDS = 3.0
NOISE_CLIPS = 20
"""Inputs without speech: of silence, and of how many clips of noise alone."""

NOISE_NAMES = ("event", "subset")
"""Labels of which the first that a clip of noise has says, after its domain, what type of noise it is."""

UNKNOWN = "unknown"

Samples = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Example:
    """A noisy clip and its clean one, (samples,) each and of one length.

    Attributes:
        key: names it in tables.
        clip: names the clean clip; examples of one clip are not independent.
        noisy: what is to be enhanced.
        clean: what it should become.
        snr_db: signal-to-noise ratio in dB; infinite for clean speech as the input, None where it is not known.
        noise: type of the noise.
        text: what is said, where that is known.
        language: of the text, as `en`.
    """

    key: str
    clip: str
    noisy: Samples
    clean: Samples
    snr_db: float | None
    noise: str
    text: str | None = None
    language: str | None = None


class ExampleSet(Protocol):
    """Everything that is to be measured.

    Attributes:
        failures: inputs with which nothing can be done, with reasons; complete when all examples were drawn.
        total: number of examples.
        notes: how the examples were made.
    """

    failures: dict[str, str]
    total: int
    notes: list[str]

    def examples(self) -> Iterator[Example]:
        """All of them, in a fixed order."""

    def without_speech(self) -> Iterator[tuple[str, Samples]]:
        """Noise alone, by name."""


@dataclass
class MixtureSet:
    """Clean clips with noise at fixed ratios, and the clean clips themselves.

    A clip gets the same stretch of noise at every ratio, so that ratios compare. Where the sum would pass full scale,
    mixture and clean clip are made softer by the same factor.

    Args:
        sources: clean speech, as in `training.clips.find_shards`.
        noise_sources: the same of noise.
        snrs: signal-to-noise ratios in dB of active powers, see `enhancement.mixtures.mix`.
        cache: folder for decoded clips.
        seed: of the noise that each clip gets, and of the clips where there is a limit.
        where: labels that clean clips must have.
        noise_where: the same of noise.
        noise_label: label that names the type of noise; None: `domain`, and `event` or `subset` where a clip has it.
        limit: so many clean clips at most, drawn by the seed.

    Raises:
        ConfigurationError: no ratio, one that is not finite or comes twice, or a limit below one.
        DataError: no clip.
    """

    sources: Sequence[str]
    noise_sources: Sequence[str]
    snrs: Sequence[float]
    cache: Path
    seed: int = 0
    where: Mapping[str, Any] = field(default_factory=dict)
    noise_where: Mapping[str, Any] = field(default_factory=dict)
    noise_label: str | None = None
    limit: int | None = None
    failures: dict[str, str] = field(init=False, default_factory=dict)
    total: int = field(init=False)
    notes: list[str] = field(init=False)

    def __post_init__(self) -> None:
        """Decode the clips."""
        if not self.snrs or len(set(self.snrs)) < len(self.snrs) or not all(map(math.isfinite, self.snrs)):
            raise ConfigurationError(f"--snr {' '.join(map(str, self.snrs))}: give finite numbers of dB, each once")
        if self.limit is not None and self.limit < 1:
            raise ConfigurationError(f"--limit {self.limit}: at least one clip is needed")
        if self.seed < 0:
            raise ConfigurationError(f"--seed {self.seed}: must not be negative")
        self._speech = prepare_clips(self.sources, self.cache, self.where)
        self._noise = prepare_clips(self.noise_sources, self.cache, self.noise_where)
        for store in (self._speech, self._noise):
            self.failures |= store.skipped.skipped
        self._loud = [index for index in range(len(self._noise)) if self._noise.audio(index).any()]
        if not self._loud:
            raise DataError(f"{' '.join(self.noise_sources)}: every clip of noise is silent; name other sources")
        self._names = _unique_keys(self._speech)
        self._chosen = self._choose()
        self.total = len(self._chosen) * (len(self.snrs) + 1)
        ratios = ", ".join(f"{snr:g}" for snr in self.snrs)
        self.notes = [
            f"{len(self._chosen)} of {len(self._speech)} clean clips, each with one of {len(self._loud)} clips of "
            f"noise (from a random place, repeated where shorter) at {ratios} dB, ratio of the mean powers of frames "
            f"of 20 ms at most 40 dB below the loudest; seed {self.seed}; made softer as a whole where the sum would "
            "pass full scale."
        ]

    def examples(self) -> Iterator[Example]:
        """As in `ExampleSet`: of each clip all ratios, then the clean clip as the input."""
        for index in self._chosen:
            name, clean, labels = self._names[index], self._speech.audio(index), self._speech.labels[index]
            noise, kind = self._noise_for(name, clean.size)
            facts = {"text": clip_label(labels, "text"), "language": clip_label(labels, "language")}
            for snr in self.snrs:
                noisy, beside, _ = leveled(mix(clean, noise, snr), clean, 0.0)
                yield Example(f"{name} at {snr:g} dB", name, noisy, beside, float(snr), kind, **facts)
            yield Example(f"{name} clean", name, clean, clean, CLEAN, "none", **facts)

    def without_speech(self) -> Iterator[tuple[str, Samples]]:
        """As in `ExampleSet`: clips of noise at their own level, drawn by the seed."""
        drawn = np.random.default_rng([self.seed, 1]).permutation(self._loud)[:NOISE_CLIPS]
        for index in sorted(map(int, drawn)):
            yield self._noise.keys[index], np.resize(self._noise.audio(index), int(NOISE_SECONDS * RATE))

    def _choose(self) -> list[int]:
        """Places of the clips to measure on; which those are does not hang on the limit's being there."""
        order = sorted(range(len(self._speech)), key=lambda index: name_digest(f"{self.seed} {self._names[index]}"))
        return sorted(order[: self.limit])

    def _noise_for(self, name: str, samples: int) -> tuple[Samples, str]:
        """The noise that a clip gets: (samples,), and its type."""
        rng = np.random.default_rng([self.seed, int(name_digest(name)[:16], 16)])
        index = self._loud[int(rng.integers(len(self._loud)))]
        audio = self._noise.audio(index)
        stretch = np.resize(np.roll(audio, -int(rng.integers(audio.size))), samples)
        if not stretch.any():  # a pause of a longer clip, which has no ratio to anything
            stretch = np.resize(audio[int(np.argmax(audio != 0)) :], samples)
        return stretch, self._type(self._noise.labels[index])

    def _type(self, labels: Mapping[str, Any]) -> str:
        if self.noise_label is not None:
            return clip_label(labels, self.noise_label) or UNKNOWN
        more = next((found for name in NOISE_NAMES if (found := clip_label(labels, name))), None)
        return "/".join(part for part in (clip_label(labels, "domain"), more) if part) or UNKNOWN


def _unique_keys(store: ClipStore) -> list[str]:
    """Keys without the suffixes of audio files, those that come again with a number."""
    seen: dict[str, int] = {}
    names = []
    for key in store.keys:
        path = Path(key)
        name = path.with_suffix("").as_posix() if path.suffix.lower() in READ_SUFFIXES else key
        seen[name] = seen.get(name, 0) + 1
        names.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return names


def name_digest(text: str) -> str:
    """What draws hang on, so that a clip's do not hang on which others there are."""
    return hashlib.sha256(text.encode()).hexdigest()
