"""Crops of data too large to cache: shards read in shuffled order, decoded on the fly, one crop for each clip.

The data is split into streams. In an epoch each stream reads its own shards (or, where there are fewer shards than
streams, its share of the clips of all shards), so that no clip comes twice. Every batch takes equally many crops of
each stream. The order hangs on (seed, epoch, stream) only; streams are dealt to processes and their workers, so with
`data.streams` set it does not hang on how many of those there are. A clip that cannot be decoded leaves its place to
silence, so that the order of others does not hang on it, and a resumed run can count past clips without decoding them.
"""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dasheng_tokenizer.errors import AudioError, AudioFileError, ConfigurationError, DataError
from dasheng_tokenizer.files import require_extra
from dasheng_tokenizer.spectral import SAMPLES_PER_TOKEN
from dasheng_tokenizer.training.clips import EncodedClip, Shard, SkipReport, encoded_clips, find_shards
from dasheng_tokenizer.training.data import Batch, DataConfig, local_slice
from dasheng_tokenizer.training.semantic_cache import crop_with_context

MOST_BROKEN = 100
"""Clips in a row that may fail to decode before the data is given up."""

_log = logging.getLogger(__name__)


class StreamedCrops:
    """Random crops read straight from the shards, without semantic embeddings.

    Attributes:
        report: clips that could not be used, as far as this process read them itself (`workers` 0).
    """

    def __init__(self, config: DataConfig, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        """Find the shards.

        Args:
            config: `train`, `batch_size`, `crop_seconds`, `gain_db`, `views`, `workers`, `streams` and `shuffle_clips`
                matter.
            seed: of the run.
            rank: of this process.
            world_size: number of processes.

        Raises:
            ConfigurationError: the batch cannot be shared evenly among processes or streams.
            DataError: no shards.
        """
        self.config, self.seed, self.report = config, seed, SkipReport()
        local_slice(config.batch_size, rank, world_size)
        self._num_streams = count_streams(config, world_size)
        self._share = config.batch_size // self._num_streams  # crops of a stream in each batch
        self._streams = local_slice(self._num_streams, rank, world_size)
        self._workers = _largest_divisor(len(self._streams), max(config.workers, 1))
        self._shards = find_shards(config.train)

    def batches(self, start_step: int, steps: int) -> Iterator[Batch]:
        """This rank's batches of `steps` steps from `start_step` on.

        Raises:
            DataError: no clips, or 100 in a row that cannot be decoded.
        """
        if self.config.workers == 0:
            parts = self.parts(0, 1, start_step)
        else:
            # Workers are asked in turn, and have equally many streams: parts come in the order of streams.
            loader = DataLoader(_Streams(self, start_step), batch_size=None, num_workers=self._workers)
            parts = iter(loader)
        for _ in range(steps):
            yield Batch(torch.cat(list(itertools.islice(parts, len(self._streams)))), None)

    def parts(self, worker: int, workers: int, start_step: int) -> Iterator[Tensor]:
        """Endless crops of a worker from a step on: for each step the (b, 512 + 640·N + 512) of each of its streams."""
        mine = self._streams[worker::workers]
        crops = [self._crops(stream, start_step * self._share) for stream in mine]
        for held in itertools.cycle(crops):
            yield torch.from_numpy(np.stack(list(itertools.islice(held, self._share))))

    def _crops(self, stream: int, skip: int) -> Iterator[npt.NDArray[np.float32]]:
        broken = 0
        for place, clip in itertools.islice(enumerate(self._clips(stream)), skip, None):
            rng = np.random.default_rng([self.seed, stream, place])
            try:
                audio = clip.decode().audio
                broken = 0
            except (AudioError, AudioFileError) as error:
                _log.warning("left out: %s (%s)", clip.key, error)
                self.report.add(clip.key, error)
                broken += 1
                if broken >= MOST_BROKEN:
                    raise DataError(f"{broken} clips in a row cannot be used; {self.report.summary()}") from error
                audio = np.zeros(SAMPLES_PER_TOKEN, dtype=np.float32)
            yield self._crop(audio, rng)

    def _crop(self, audio: npt.NDArray[np.float32], rng: np.random.Generator) -> npt.NDArray[np.float32]:
        """(512 + 640·N + 512,) from a random token border, at a random loudness that does not clip."""
        tokens = self.config.crop_tokens
        spare = -(-len(audio) // SAMPLES_PER_TOKEN) - tokens
        crop = crop_with_context(audio, int(rng.integers(max(spare, 0) + 1)), tokens)
        gain = 10 ** (rng.uniform(*self.config.gain_db) / 20) if self.config.views > 1 else 1.0
        peak = float(np.abs(audio).max())
        return (crop * np.float32(min(gain, 1 / peak) if peak > 0 else 1.0)).astype(np.float32)

    def _clips(self, stream: int) -> Iterator[EncodedClip]:
        """All clips of a stream, undecoded, epoch after epoch."""
        shuffle = require_extra("webdataset", "train").shuffle
        for epoch in itertools.count():
            held = self._epoch(stream, epoch)
            first = next(held, None)
            if first is None:
                raise DataError(f"no clips for stream {stream} of {self._num_streams}: set data.streams lower")
            rng = random.Random(f"{self.seed}/{epoch}/{stream}")
            size = self.config.shuffle_clips
            yield from shuffle(size, initial=size, rng=rng)(itertools.chain([first], held))

    def _epoch(self, stream: int, epoch: int) -> Iterator[EncodedClip]:
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self._shards))
        shards: list[Shard] = [self._shards[k] for k in order]
        whole = len(shards) >= self._num_streams
        if whole:
            shards = shards[stream :: self._num_streams]
        clips = (clip for shard in shards for clip in encoded_clips(shard, self.report))
        return clips if whole else itertools.islice(clips, stream, None, self._num_streams)


def count_streams(config: DataConfig, world_size: int) -> int:
    """`data.streams`, or one for each worker of each process, fewer where a batch cannot be shared among so many.

    Raises:
        ConfigurationError: `data.streams` is no multiple of the processes.
    """
    if config.streams is None:
        share = config.batch_size // world_size
        return world_size * _largest_divisor(share, max(config.workers, 1))
    if config.streams % world_size:
        raise ConfigurationError(
            f"data.streams {config.streams} must be a multiple of the {world_size} processes; a run that was begun "
            "with it goes on with any number that divides it"
        )
    return config.streams


def _largest_divisor(number: int, most: int) -> int:
    return max(divisor for divisor in range(1, min(number, most) + 1) if number % divisor == 0)


class _Streams(IterableDataset[Tensor]):
    """The streams of a process, dealt to the workers of a DataLoader, which takes from each in turn."""

    def __init__(self, crops: StreamedCrops, start_step: int) -> None:
        super().__init__()
        self.crops, self.start_step = crops, start_step

    def __iter__(self) -> Iterator[Tensor]:
        info = get_worker_info()
        assert info is not None
        return self.crops.parts(info.id, info.num_workers, self.start_step)
