"""Batches of noisy and clean recordings for the training of an enhancer, and held-out ones for its validation.

The batch of any step is a pure function of (seed, step), so that a run resumes exactly and its loss does not depend on
the number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dasheng_tokenizer.enhancement.clip_store import ClipStore, prepare_clips
from dasheng_tokenizer.enhancement.mixtures import Mixture, Mixtures, Rooms, leveled
from dasheng_tokenizer.enhancement.rooms import aligned, prepare_rooms
from dasheng_tokenizer.enhancement.training_configuration import AudioSources, EnhancementConfig
from dasheng_tokenizer.errors import ConfigurationError, DataError
from dasheng_tokenizer.spectral import SAMPLING_RATE
from dasheng_tokenizer.training.data import local_slice

if TYPE_CHECKING:
    from lightning_fabric import Fabric

VALIDATION_SEED = 2**31
"""Of the held-out mixtures and their rooms, whatever the seed of the run, so that runs can be compared."""

VALIDATION_ROOMS = 20

MOST_UNEQUAL = SAMPLING_RATE // 50
"""Samples that the recordings of a pair may differ by in length, 20 ms."""


@dataclass(frozen=True, eq=False)
class EnhancementBatch:
    """Recordings of a step, (B, S) float32 at 16 kHz each."""

    noisy: Tensor
    clean: Tensor

    @property
    def clean_audio(self) -> Tensor:
        """What the spectral loss listens to."""
        return self.clean

    @property
    def seconds(self) -> float:
        """Of noisy audio."""
        return self.noisy.numel() / SAMPLING_RATE

    def split(self, parts: int) -> list[EnhancementBatch]:
        """Cut into equal parts for gradient accumulation."""
        pairs = zip(self.noisy.chunk(parts), self.clean.chunk(parts), strict=True)
        return [EnhancementBatch(noisy, clean) for noisy, clean in pairs]

    def to(self, device: torch.device) -> EnhancementBatch:
        """The batch on a device."""
        return EnhancementBatch(self.noisy.to(device), self.clean.to(device))


class Examples(Protocol):
    """An endless sequence of noisy recordings with their clean ones, each a function of its place."""

    def mixture(self, index: int) -> Mixture:
        """Of a place in the sequence."""
        ...


class Pairs:
    """Random crops of recordings that come as pairs; each pair is drawn in proportion to its length."""

    def __init__(
        self,
        clean: ClipStore,
        noisy: ClipStore,
        names: Sequence[str],
        samples: int,
        seed: int,
        gain_db: tuple[float, float],
    ) -> None:
        """Set up the sequence.

        Args:
            clean: the clean recordings.
            noisy: the noisy ones, under the same keys.
            names: keys of the pairs to draw from.
            samples: S of a crop; a shorter pair is followed by zeros.
            seed: of the sequence.
            gain_db: range of the change of loudness.

        Raises:
            DataError: no pairs, a key that one side lacks, or lengths that differ by more than 20 ms.
        """
        self.clean, self.noisy, self.samples, self.seed, self.gain_db = clean, noisy, samples, seed, gain_db
        sides = [{key: place for place, key in enumerate(store.keys)} for store in (clean, noisy)]
        if not names:
            raise DataError("there are no pairs to draw from; see data.paired, its held_out too")
        for name in names:
            if lacking := [side for side, held in zip(("clean", "noisy"), sides, strict=True) if name not in held]:
                raise DataError(f"data.paired: {name} has no {lacking[0]} recording; pairs are files of one name")
        self._pairs = [(name, sides[0][name], sides[1][name]) for name in names]
        for name, a, b in self._pairs:
            lengths = int(clean.num_samples[a]), int(noisy.num_samples[b])
            if abs(lengths[0] - lengths[1]) > MOST_UNEQUAL:
                raise DataError(f"data.paired: {name} has {lengths[0]} clean and {lengths[1]} noisy samples at 16 kHz")
        self._ends = np.cumsum([int(clean.num_samples[a]) for _, a, _ in self._pairs])

    def mixture(self, index: int) -> Mixture:
        """Crop of a place in the sequence, a function of (seed, index)."""
        rng = np.random.default_rng([self.seed, index])
        place = int(np.searchsorted(self._ends, rng.integers(self._ends[-1]), side="right"))
        name, a, b = self._pairs[place]
        spare = max(0, int(self.clean.num_samples[a]) - self.samples)
        start = int(rng.integers(spare + 1))
        pieces = (store.audio(clip, start, self.samples) for store, clip in ((self.noisy, b), (self.clean, a)))
        noisy, clean = (np.pad(piece, (0, self.samples - len(piece))) for piece in pieces)
        noisy, clean, gain = leveled(noisy, clean, rng.uniform(*self.gain_db))
        return Mixture(noisy, clean, None, "paired", {"clip": name, "gain_db": gain})


class RecordedRooms:
    """Room responses from recordings, whose channels were averaged; the loudest sample counts as the direct sound."""

    def __init__(self, store: ClipStore) -> None:
        """Args: the recordings."""
        self.store = store

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> np.ndarray:
        """One response."""
        return aligned(self.store.audio(index))


class EnhancementCrops:
    """Batches of an endless sequence of examples."""

    def __init__(self, examples: Examples, config: EnhancementConfig, rank: int = 0, world_size: int = 1) -> None:
        """Set up the batches.

        Args:
            examples: the sequence.
            config: `data.batch_size` and `data.workers` matter.
            rank: of this process.
            world_size: number of processes.

        Raises:
            ConfigurationError: the batch cannot be shared evenly, or a share not be cut into `accumulate` parts.
        """
        self.examples, self.config = examples, config
        self._slice = local_slice(config.data.batch_size, rank, world_size)
        if len(self._slice) % config.accumulate:
            raise ConfigurationError(
                f"the {len(self._slice)} mixtures of a process must be a multiple of accumulate, {config.accumulate}"
            )

    def batch(self, step: int) -> EnhancementBatch:
        """This rank's part of the batch of a step; the same however often and in which order it is asked."""
        first = step * self.config.data.batch_size
        held = [self.examples.mixture(first + place) for place in self._slice]
        noisy, clean = (np.stack([getattr(mixture, side) for mixture in held]) for side in ("noisy", "clean"))
        return EnhancementBatch(torch.from_numpy(noisy), torch.from_numpy(clean))

    def batches(self, first_step: int, last_step: int) -> Iterator[EnhancementBatch]:
        """This rank's batches of the steps `first_step` … `last_step` - 1."""
        steps = range(first_step, last_step)
        if not self.config.data.workers:
            return map(self.batch, steps)
        # A generator of its own: the run's random state stays as it is.
        loader = DataLoader(
            _Steps(self),
            batch_size=None,
            sampler=steps,
            num_workers=self.config.data.workers,
            generator=torch.Generator(),
        )
        return iter(loader)


class _Steps(Dataset[EnhancementBatch]):
    """Batches by their step, for the processes of a DataLoader."""

    def __init__(self, crops: EnhancementCrops) -> None:
        self.crops = crops

    def __getitem__(self, step: int) -> EnhancementBatch:
        return self.crops.batch(step)


@dataclass(frozen=True, eq=False)
class EnhancementData:
    """What a run learns from and is measured by; `valid` is None where nothing is held out."""

    train: EnhancementCrops
    valid: Examples | None
    hours: float


def open_data(fabric: Fabric, config: EnhancementConfig) -> EnhancementData:
    """Decode the audio of a recipe and simulate its rooms, as far as that was not done before.

    Raises:
        DataError: sources that are missing, or hold nothing usable.
        ConfigurationError: settings that do not fit the data.
        OutputError: the cache cannot be written.
        MissingExtraError: rooms are to be simulated, but pyroomacoustics is not installed.
    """
    train, valid, hours = _open_pairs(fabric, config) if config.data.is_paired else _open_mixtures(fabric, config)
    crops = EnhancementCrops(train, config, fabric.global_rank, fabric.world_size)
    return EnhancementData(crops, valid if config.validation_clips else None, hours)


def _open_mixtures(fabric: Fabric, config: EnhancementConfig) -> tuple[Examples, Examples | None, float]:
    data = config.data
    if not data.speech.train:
        raise DataError("data.speech.train names no speech; list shards, files or folders, or name data.paired")
    samples = data.crop_samples

    def opened(sources: AudioSources, split: str) -> ClipStore | None:
        paths = getattr(sources, split)
        return _clips(fabric, config, paths, sources.where) if paths else None

    speech, noise, music = (opened(sources, "train") for sources in (data.speech, data.noise, data.music))
    assert speech is not None
    rooms = _rooms(fabric, config, config.seed, config.mixture.rooms.count)
    train = Mixtures(config.mixture, samples, config.seed, speech, noise, music, rooms)
    held_out, noise, music = (opened(sources, "valid") for sources in (data.speech, data.noise, data.music))
    if held_out is None:
        return train, None, speech.hours
    rooms = _rooms(fabric, config, VALIDATION_SEED, min(config.mixture.rooms.count, VALIDATION_ROOMS))
    valid = Mixtures(config.mixture, samples, VALIDATION_SEED, held_out, noise, music, rooms)
    return train, valid, speech.hours


def _open_pairs(fabric: Fabric, config: EnhancementConfig) -> tuple[Examples, Examples | None, float]:
    paired, samples, gain_db = config.data.paired, config.data.crop_samples, config.mixture.gain_db
    clean, noisy = (_clips(fabric, config, paths, {}) for paths in (paired.clean, paired.noisy))
    names = sorted(set(clean.keys) | set(noisy.keys))
    held_out = [name for name in names if name.rpartition("/")[2].startswith(tuple(paired.held_out))]
    if paired.held_out and not held_out:
        raise DataError(f"data.paired.held_out: no name begins with any of {', '.join(paired.held_out)}")
    kept = sorted(set(names) - set(held_out))
    train = Pairs(clean, noisy, kept, samples, config.seed, gain_db)
    if not held_out:
        return train, None, clean.hours
    return train, Pairs(clean, noisy, held_out, samples, VALIDATION_SEED, (0.0, 0.0)), clean.hours


def _clips(fabric: Fabric, config: EnhancementConfig, paths: Sequence[str], where: dict[str, object]) -> ClipStore:
    return prepare_clips(paths, config.data.cache / "clips", where, fabric.global_rank, fabric.world_size)


def _rooms(fabric: Fabric, config: EnhancementConfig, seed: int, count: int) -> Rooms | None:
    """Rooms of a recipe; None where there is no reverberation. Simulated on one process, read by all."""
    if config.mixture.reverberation == 0:
        return None
    if config.data.rooms:
        return RecordedRooms(_clips(fabric, config, config.data.rooms, {}))
    wanted, folder = replace(config.mixture.rooms, count=count), config.data.cache
    if fabric.is_global_zero:
        prepare_rooms(wanted, seed, folder)
    fabric.barrier()
    return prepare_rooms(wanted, seed, folder, progress=False)
