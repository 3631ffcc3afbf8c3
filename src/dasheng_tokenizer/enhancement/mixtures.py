"""Noisy speech made of clean speech and noise, with the clean speech beside it; the same for a (seed, index) forever.

Arrays are (S,) float32 at 16 kHz and full scale 1.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dasheng_tokenizer.enhancement.clip_store import ClipStore
from dasheng_tokenizer.enhancement.degradations import MAX_COMPRESSION, TELEPHONE, band_limit, clip, code
from dasheng_tokenizer.enhancement.mixture_configuration import KINDS, Kind, MixtureConfig
from dasheng_tokenizer.enhancement.rooms import reverberate
from dasheng_tokenizer.errors import AudioError, ConfigurationError
from dasheng_tokenizer.spectral import SAMPLING_RATE
from dasheng_tokenizer.training.clips import clip_label

Samples = npt.NDArray[np.float32]

ACTIVE_FRAME = SAMPLING_RATE // 50
"""Samples of a frame of 20 ms."""

ACTIVE_RANGE_DB = 40.0
"""A frame counts as active down to so much below the loudest one."""

FADE = SAMPLING_RATE // 200
"""Samples over which pieces of noise fade in and out where they meet, 5 ms."""

SLOPE_DB = (-6.0, 0.0)
"""Range of the slope of coloured noise, dB per octave: brown to white."""

SPEECH, KIND, NOISE, ROOM, LEVEL, DAMAGE = range(6)
"""Last words of the seeds of what is drawn, so that one setting changes no other draw."""


class Rooms(Protocol):
    """Room responses as `rooms.aligned` gives them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Samples: ...


@dataclass(frozen=True, eq=False)
class Mixture:
    """A noisy recording and what it should have been.

    Attributes:
        noisy: (S,).
        clean: (S,) in time with it and as loud as the speech in it; with early reflections where there is a room.
        snr_db: before band limits, clipping and codecs; infinite without noise, None where it is not known.
        kind: of the noise, or `paired` for recordings that came as pairs.
        facts: what else was done, by name.
    """

    noisy: Samples
    clean: Samples
    snr_db: float | None
    kind: str
    facts: dict[str, Any]


def active_power(audio: Samples) -> float:
    """Mean power of the frames of 20 ms that are at most 40 dB below the loudest; 0 of silence.

    Pauses, however long, do not count, so that a word in a minute of silence is as loud as the word.

    Args:
        audio: (S,); the last frame is filled with zeros.
    """
    padded = np.pad(np.asarray(audio, dtype=np.float64), (0, -len(audio) % ACTIVE_FRAME))
    frames = np.square(padded).reshape(-1, ACTIVE_FRAME).mean(1)
    if not frames.size or not frames.max() > 0:
        return 0.0
    return float(frames[frames >= frames.max() * 10 ** (-ACTIVE_RANGE_DB / 10)].mean())


def mix(clean: Samples, noise: Samples, snr_db: float) -> Samples:
    """Add noise at a signal-to-noise ratio of active powers (`active_power`).

    Where either is silent there is no such ratio: the two are added as they are. The sum may pass full scale.

    Args:
        clean: (S,).
        noise: (S,), scaled as needed.
        snr_db: in dB.

    Returns:
        (S,) float32.

    Raises:
        AudioError: lengths that differ, or a ratio that is not finite.
    """
    if clean.ndim != 1 or clean.shape != noise.shape:
        raise AudioError(f"speech and noise must be two (samples,) of one length, not {clean.shape} and {noise.shape}")
    if not math.isfinite(snr_db):
        raise AudioError(f"the signal-to-noise ratio must be finite, not {snr_db} dB")
    signal, disturbance = active_power(clean), active_power(noise)
    gain = math.sqrt(signal / disturbance / 10 ** (snr_db / 10)) if signal > 0 and disturbance > 0 else 1.0
    return (clean + gain * noise.astype(np.float64)).astype(np.float32)


def colored_noise(rng: np.random.Generator, samples: int, slope_db: float) -> Samples:
    """(samples,) Gaussian noise whose spectrum falls by `-slope_db` per octave above 50 Hz, of power 1."""
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    hertz = np.maximum(np.fft.rfftfreq(samples, 1 / SAMPLING_RATE), 50.0)
    shaped = np.fft.irfft(spectrum * (hertz / 50.0) ** (slope_db / (20 * math.log10(2))), samples)
    return (shaped / np.sqrt(np.mean(np.square(shaped)))).astype(np.float32)


def leveled(noisy: Samples, clean: Samples, gain_db: float) -> tuple[Samples, Samples, float]:
    """Both at another loudness, less of it where one would pass full scale; and the change in dB."""
    peak = float(max(np.abs(noisy).max(initial=0.0), np.abs(clean).max(initial=0.0), 1e-9))
    gain = min(10 ** (gain_db / 20), 1 / peak)
    return noisy * np.float32(gain), clean * np.float32(gain), 20 * math.log10(gain)


class Mixtures:
    """An endless sequence of mixtures of one length."""

    def __init__(
        self,
        config: MixtureConfig,
        samples: int,
        seed: int,
        speech: ClipStore,
        noise: ClipStore | None = None,
        music: ClipStore | None = None,
        rooms: Rooms | None = None,
    ) -> None:
        """Set up the sequence.

        Args:
            config: how speech is spoilt.
            samples: S of every mixture.
            seed: of the sequence.
            speech: clean speech; its label `speaker`, where there is one, keeps lines to one voice and babble to
                others.
            noise: for the kind `noise`.
            music: for the kind `music`.
            rooms: for reverberation.

        Raises:
            ConfigurationError: a kind of noise or reverberation without anything to draw from.
        """
        self.config, self.samples, self.seed = config, samples, seed
        self.speech, self.noise, self.music, self.rooms = speech, noise, music, rooms
        for kind, held in (("noise", noise), ("music", music)):
            if config.uses(kind) and held is None:  # type: ignore[arg-type]
                raise ConfigurationError(f"data.{kind} names nothing; name some, or set mixture.kinds.{kind} to 0")
        if config.reverberation > 0 and not rooms:
            raise ConfigurationError("there are no rooms; set mixture.reverberation to 0")
        weights = np.array([config.kinds.get(kind, 0.0) for kind in KINDS])
        self._bounds = np.cumsum(weights / weights.sum())
        speakers = [clip_label(labels, "speaker") for labels in speech.labels]
        self._speakers: Sequence[str | None] = speakers
        lines: dict[str, list[int]] = defaultdict(list)
        for index, speaker in enumerate(speakers):
            if speaker is not None:
                lines[speaker].append(index)
        self._lines: Mapping[str, npt.NDArray[np.int64]] = {name: np.array(held) for name, held in lines.items()}

    def mixture(self, index: int) -> Mixture:
        """Mixture of a place in the sequence, a function of (seed, index)."""
        config, facts = self.config, dict[str, Any]()
        rng = self._rng(index, SPEECH)
        target = int(self.speech.at(int(rng.integers(self.speech.total)))[0])
        dry = self._line(rng, target, facts)
        wet, clean = self._in_room(dry, self._rng(index, ROOM), facts)
        kind, snr_db, silent = self._plan(self._rng(index, KIND))
        noisy = wet
        if kind != "none":
            noise = self._noise(kind, self._rng(index, NOISE), self._speakers[target], target)
            noisy = mix(wet, noise, snr_db)
        if silent:
            noisy, clean = noisy - wet, np.zeros_like(clean)
            facts["no_speech"] = True
        level = self._rng(index, LEVEL)
        noisy, clean, facts["gain_db"] = leveled(noisy, clean, level.uniform(*config.gain_db))
        noisy = self._damaged(noisy, self._rng(index, DAMAGE), facts)
        return Mixture(noisy, clean, math.inf if kind == "none" else snr_db, kind, facts)

    def _rng(self, index: int, what: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, index, what])

    def _plan(self, rng: np.random.Generator) -> tuple[Kind, float, bool]:
        """Kind of the noise, signal-to-noise ratio, and whether nobody speaks."""
        place, ratio, silent = rng.random(), rng.uniform(*self.config.snr_db), rng.random() < self.config.no_speech
        kind = KINDS[min(int(np.searchsorted(self._bounds, place, side="right")), len(KINDS) - 1)]
        return kind, float(ratio), silent

    def _line(self, rng: np.random.Generator, first: int, facts: dict[str, Any]) -> Samples:
        """Speech of one voice that fills the mixture, from anywhere in the clip `first`."""
        same = self._lines.get(self._speakers[first] or "")
        facts["clip"] = self.speech.keys[first]

        def following() -> int:
            return int(rng.integers(len(self.speech)) if same is None else rng.choice(same))

        start = int(rng.integers(self.speech.num_samples[first]))
        return self._joined(self.speech, rng, first, start, following, pauses=True)

    def _joined(
        self,
        store: ClipStore,
        rng: np.random.Generator,
        first: int,
        start: int,
        following: Callable[[], int],
        pauses: bool,
    ) -> Samples:
        """Clips one after the other until the mixture is full."""
        whole = np.zeros(self.samples, dtype=np.float32)
        place, number = 0, first
        while place < self.samples:
            piece = store.audio(number, start, self.samples - place)
            if not pauses:
                piece = _faded(piece)
            whole[place : place + len(piece)] = piece
            place += len(piece)
            if pauses:
                place += int(rng.uniform(*self.config.pause_seconds) * SAMPLING_RATE)
            number, start = following(), 0
        return whole

    def _in_room(self, dry: Samples, rng: np.random.Generator, facts: dict[str, Any]) -> tuple[Samples, Samples]:
        if self.rooms is None or rng.random() >= self.config.reverberation:
            return dry, dry
        facts["room"] = int(rng.integers(len(self.rooms)))
        return reverberate(dry, self.rooms[facts["room"]])

    def _noise(self, kind: Kind, rng: np.random.Generator, speaker: str | None, target: int) -> Samples:
        if kind == "colored":
            return colored_noise(rng, self.samples, rng.uniform(*SLOPE_DB))
        if kind == "babble":
            return self._babble(rng, speaker, target)
        store = self.noise if kind == "noise" else self.music
        assert store is not None
        first, start = store.at(int(rng.integers(store.total)))
        return self._joined(store, rng, first, start, lambda: store.at(int(rng.integers(store.total)))[0], pauses=False)

    def _babble(self, rng: np.random.Generator, speaker: str | None, target: int) -> Samples:
        """Several voices, each as loud as the others, none of them the target's as far as that is known."""
        low, high = self.config.babble_voices
        together = np.zeros(self.samples, dtype=np.float32)
        for _ in range(int(rng.integers(low, high + 1))):
            voice = self._line(rng, self._other(rng, speaker, target), {})
            power = active_power(voice)
            together += voice / np.float32(math.sqrt(power)) if power > 0 else 0.0
        return together

    def _other(self, rng: np.random.Generator, speaker: str | None, target: int) -> int:
        for _ in range(32):  # a corpus of one speaker has no other
            other = int(rng.integers(len(self.speech)))
            if other != target and (speaker is None or self._speakers[other] != speaker):
                break
        return other

    def _damaged(self, noisy: Samples, rng: np.random.Generator, facts: dict[str, Any]) -> Samples:
        """Narrow band, clipping and codec, in the order of a recording chain."""
        config = self.config
        band, edge, clipped, depth, coded, compression = rng.random(6)
        codec = config.codecs[int(rng.integers(len(config.codecs)))] if config.codecs else None
        if band < config.telephone:
            noisy, facts["band_hertz"] = band_limit(noisy, *TELEPHONE), TELEPHONE
        elif band < config.telephone + config.band_limit:
            high = _within(config.band_hertz, edge)
            noisy, facts["band_hertz"] = band_limit(noisy, 0.0, high), (0.0, high)
        if clipped < config.clipping:
            facts["clipping_db"] = _within(config.clipping_db, depth)
            noisy = clip(noisy, facts["clipping_db"])
        if coded < config.codec and codec is not None:
            facts["codec"] = codec
            noisy = code(noisy, codec, compression * MAX_COMPRESSION)  # type: ignore[arg-type]
        return noisy


def _within(limits: tuple[float, float], share: float) -> float:
    return float(limits[0] + share * (limits[1] - limits[0]))


def _faded(piece: Samples) -> Samples:
    """A piece that starts and ends at zero, or half of it if it is shorter than both fades."""
    length = min(FADE, len(piece) // 2)
    ramp = np.linspace(0.0, 1.0, length, endpoint=False, dtype=np.float32)
    piece = piece.copy()
    piece[:length] *= ramp
    piece[len(piece) - length :] *= ramp[::-1]
    return piece
