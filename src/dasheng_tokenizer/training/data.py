"""Batches of crops for training, and whole clips for validation.

`CachedCrops` reads a prepared cache: the batch of any step is a pure function of (seed, step), so that a run resumes
exactly and does not depend on the number of processes. `StreamedCrops` reads shards that are too large for that.
"""

from __future__ import annotations

import hashlib
import heapq
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dasheng_tokenizer.errors import AudioError, AudioFileError, ConfigurationError, DataError
from dasheng_tokenizer.spectral import CONTEXT, SAMPLES_PER_TOKEN, SAMPLING_RATE
from dasheng_tokenizer.training.clips import EncodedClip, SkipReport, encoded_clips, find_shards, read_clips
from dasheng_tokenizer.training.semantic_cache import (
    FULL_SCALE,
    MAX_TOKENS,
    SemanticCache,
    crop_with_context,
    prepare_cache,
)

__all__ = [
    "Batch",
    "CachedCrops",
    "DataConfig",
    "SemanticCache",
    "ValidationClip",
    "prepare_cache",
    "read_clips",
    "validation_clips",
]

Item = TypeVar("Item")

PREFETCHED = 4
"""Batches that the background thread keeps ready."""


@dataclass(frozen=True)
class DataConfig:
    """What to train on and how it is cut.

    Attributes:
        train: tar shards, audio files, folders, globs or ranges in braces; see `clips.find_shards`.
        valid: the same, held out.
        crop_seconds: length of a crop, a multiple of 0.04 (one token).
        batch_size: crops a step, over all processes together.
        gain_db: range that the loudness of a crop is changed by; less is used where a crop would clip.
        views: loudnesses that each clip is cached at, the original among them; 1 switches the change off.
        cache: folder of cached audio and semantic embeddings (for a VAE audio alone); None streams the data and
            computes the embeddings online.
        workers: 0 loads each batch when it is asked for. With a cache, anything else loads ahead in one thread;
            without, it is the most decoding processes of each training process.
        seed: of the loudness views. Crops and their order hang on the seed of the run.
        shuffle_clips: streamed clips among which the next is drawn, in each stream.
        streams: parts that streamed data is read in at once. The order of the data hangs on their number, not on that
            of processes and workers; it must be a multiple of the processes and divide `batch_size`. None: as many as
            there are workers in all processes together.
    """

    train: list[str] = field(default_factory=list)
    valid: list[str] = field(default_factory=list)
    crop_seconds: float = 1.0
    batch_size: int = 16
    gain_db: tuple[float, float] = (-12.0, 6.0)
    views: int = 2
    cache: str | None = None
    workers: int = 0
    seed: int = 0
    shuffle_clips: int = 1000
    streams: int | None = None

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        tokens = self.crop_seconds * SAMPLING_RATE / SAMPLES_PER_TOKEN
        if abs(tokens - round(tokens)) > 1e-6 or not 1 <= round(tokens) <= MAX_TOKENS:
            raise ConfigurationError(f"data.crop_seconds must be a multiple of 0.04 up to 30, not {self.crop_seconds}")
        for name in ("batch_size", "views", "shuffle_clips"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"data.{name} must be at least 1, not {getattr(self, name)}")
        if self.workers < 0 or self.seed < 0:
            raise ConfigurationError(f"data.workers and data.seed must not be negative: {self.workers}, {self.seed}")
        if self.streams is not None and (self.streams < 1 or self.batch_size % self.streams):
            raise ConfigurationError(
                f"data.batch_size {self.batch_size} must be a multiple of data.streams, not {self.streams}"
            )
        if self.gain_db[0] > self.gain_db[1]:
            raise ConfigurationError(f"data.gain_db is (lowest, highest), not {self.gain_db}")

    @property
    def crop_tokens(self) -> int:
        """Tokens of a crop, N."""
        return round(self.crop_seconds * SAMPLING_RATE / SAMPLES_PER_TOKEN)


@dataclass(frozen=True, eq=False)
class Batch:
    """Crops with their context.

    Attributes:
        audio: (B, 512 + 640·N + 512) float32, loudness changed already.
        features: (B, N, D) float32 frozen embeddings at that loudness, or None where they are not cached.
    """

    audio: Tensor
    features: Tensor | None

    @property
    def target(self) -> Tensor:
        """What the decoder should give back, (B, 640·N)."""
        return self.audio[:, CONTEXT:-CONTEXT]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on a device."""
        features = None if self.features is None else self.features.to(device, non_blocking=non_blocking)
        return Batch(self.audio.to(device, non_blocking=non_blocking), features)


class CachedCrops:
    """Random crops of cached clips.

    An epoch visits each clip once for every crop length it holds, rounded up, in an order that hangs on (seed, epoch).
    Start (at a token border) and loudness view of a crop hang on (seed, epoch, place in the epoch). The batch of a
    step is cut out of that endless sequence, and each rank takes its slice of the batch.
    """

    def __init__(
        self, cache: SemanticCache, config: DataConfig, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        """Set up the sequence.

        Args:
            cache: from `prepare_cache` with the same config.
            config: `batch_size`, `crop_seconds` and `workers` matter.
            seed: of the run.
            rank: of this process.
            world_size: number of processes.

        Raises:
            ConfigurationError: the batch cannot be shared evenly.
        """
        self.cache, self.config, self.seed = cache, config, seed
        self._slice = local_slice(config.batch_size, rank, world_size)
        visits = np.maximum(1, -(-cache.num_samples // (config.crop_tokens * SAMPLES_PER_TOKEN)))
        self._visits = np.repeat(np.arange(len(cache)), visits)  # clip of each place of an unshuffled epoch
        self._order: tuple[int, npt.NDArray[Any]] = (-1, self._visits)

    @property
    def steps_per_epoch(self) -> float:
        """Steps until every clip was visited."""
        return len(self._visits) / self.config.batch_size

    def crops_for_step(self, step: int) -> Batch:
        """This rank's part of the batch of a step; the same however often and in which order it is asked."""
        first = step * self.config.batch_size
        places = range(first + self._slice.start, first + self._slice.stop)
        crops = [self._crop(*divmod(place, len(self._visits))) for place in places]
        audio = torch.from_numpy(np.stack([crop[0] for crop in crops]))  # (b, 512 + 640·N + 512)
        if self.cache.dim == 0:  # of audio alone
            return Batch(audio, None)
        features = torch.from_numpy(np.stack([crop[1] for crop in crops])).float()  # (b, N, D)
        return Batch(audio, features)

    def batches(self, start_step: int, steps: int) -> Iterator[Batch]:
        """This rank's batches of `steps` steps from `start_step` on."""
        batches = (self.crops_for_step(step) for step in range(start_step, start_step + steps))
        return load_ahead(batches) if self.config.workers else batches

    def _crop(self, epoch: int, place: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float16]]:
        clip = int(self._epoch_order(epoch)[place])
        rng = np.random.default_rng([self.seed, epoch, place])
        tokens = self.config.crop_tokens
        start = int(rng.integers(self.cache.num_tokens[clip] - tokens + 1))
        view = int(rng.integers(self.cache.views))
        context = crop_with_context(self.cache.audio(clip), start, tokens)
        gain = self.cache.gains[clip, view] / np.float32(FULL_SCALE)
        return context.astype(np.float32) * gain, self.cache.semantic(clip, view)[start : start + tokens]

    def _epoch_order(self, epoch: int) -> npt.NDArray[Any]:
        order = self._order  # read once: another thread may replace it
        if order[0] != epoch:
            order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self._visits)
            self._order = order
        return order[1]


@dataclass(frozen=True, eq=False)
class ValidationClip:
    """A whole held-out clip: `audio` (samples,) float32 at 16 kHz; `domain` as labelled, or `audio`."""

    key: str
    domain: str
    audio: npt.NDArray[np.float32]


def validation_clips(config: DataConfig, count: int, seed: int = 0) -> list[ValidationClip]:
    """A fixed choice of held-out clips, spread evenly over the domains.

    Only the chosen ones are decoded. Which they are hangs on their keys and the seed, not on their order.

    Args:
        config: `valid` matters; without it there are none.
        count: how many, if there are as many.
        seed: of the choice.

    Raises:
        DataError: sources that match nothing, or no clip that can be decoded.
    """
    if not config.valid or count < 1:
        return []
    report = SkipReport()
    chosen: dict[str, list[tuple[int, str, EncodedClip]]] = {}
    for clip in (clip for shard in find_shards(config.valid) for clip in encoded_clips(shard, report)):
        heap = chosen.setdefault(clip.domain, [])
        drawn = int(hashlib.sha256(f"{seed}/{clip.key}".encode()).hexdigest()[:15], 16)
        # The smallest draws stay: a heap of negatives lets go of the largest. Equal keys go by arrival.
        item = (-drawn, f"{clip.key}/{len(heap)}", clip)
        if not any(held[0] == -drawn for held in heap):
            (heapq.heappush if len(heap) < count else heapq.heappushpop)(heap, item)
    queues = {domain: [clip for _, _, clip in sorted(heap, reverse=True)] for domain, heap in sorted(chosen.items())}
    clips: list[ValidationClip] = []
    while len(clips) < count and any(queues.values()):
        for domain, waiting in queues.items():
            if len(clips) < count and (decoded := _first_decodable(waiting, report)):
                clips.append(ValidationClip(decoded.key, domain, decoded.audio))
    if not clips:
        raise DataError(f"none of the clips under data.valid can be used; {report.summary()}")
    return sorted(clips, key=lambda clip: (clip.domain, clip.key))


def local_slice(batch_size: int, rank: int, world_size: int) -> range:
    """Places of a batch that a rank takes.

    Raises:
        ConfigurationError: the batch cannot be shared evenly.
    """
    if batch_size % world_size:
        raise ConfigurationError(f"data.batch_size {batch_size} must be a multiple of the {world_size} processes")
    share = batch_size // world_size
    return range(rank * share, (rank + 1) * share)


def _first_decodable(waiting: list[EncodedClip], report: SkipReport) -> Any:
    while waiting:
        clip = waiting.pop(0)
        try:
            return clip.decode()
        except (AudioError, AudioFileError) as error:
            report.add(clip.key, error)
    return None


def load_ahead(batches: Iterator[Item]) -> Iterator[Item]:
    """Run an iterator ahead in a thread; its errors come out here, and the thread ends when this one is closed."""
    ready: queue.Queue[Item | Exception | None] = queue.Queue(PREFETCHED)
    closed = threading.Event()

    def put(item: Item | Exception | None) -> bool:
        while not closed.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            for batch in batches:
                if not put(batch):
                    return
            put(None)
        except Exception as error:
            put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        closed.set()
        thread.join()
