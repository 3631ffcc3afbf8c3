"""Encoding one unit of work to shards; `generation.latent_index` has their layout.

A killed unit repeats at most one shard, and gives the same bytes as one that was not: where shards end, which clips are
encoded together and what each shard notes as skipped hang only on what comes after the shard before. Memory holds one
shard of latents and three pools of audio, whatever the size of the unit; a long clip is decoded whole, then cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dasheng_tokenizer.ahead import ahead
from dasheng_tokenizer.errors import LatentError
from dasheng_tokenizer.generation.latent_index import TokenStatistics, write_json
from dasheng_tokenizer.scale.folder import is_done, part_name, whole_parts
from dasheng_tokenizer.scale.options import EncodingOptions
from dasheng_tokenizer.scale.shard_formats import WRITERS
from dasheng_tokenizer.scale.units import Unit
from dasheng_tokenizer.scale.windows import Position, Window, windows
from dasheng_tokenizer.spectral import SAMPLES_PER_TOKEN, SAMPLING_RATE
from dasheng_tokenizer.token_file import DTYPES
from dasheng_tokenizer.training.clips import SkipReport

BATCH_SECONDS = 120.0
"""Audio, padding included, that is encoded at once."""

BATCHES_PER_POOL = 8
"""Batches' worth of audio among which clips of like length are put together."""


class LatentModel(Protocol):
    """What is needed of a tokenizer, whatever its latent."""

    @property
    def latent_dim(self) -> int:
        """C."""

    def encode(self, audio: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """(B, S) samples at 16 kHz, (B, S) bool → (B, ⌈S/640⌉, C)."""

    def weights_hash(self) -> str:
        """SHA-256 of the weights, in hex."""


@dataclass(frozen=True)
class EncodingJob:
    """All that a worker is told, besides the model.

    Attributes:
        folder: of the latents, absolute.
        units: of work, all of them.
        options: what is stored.
        batch_seconds: audio encoded at once, padding included.
        model_hash: of the model that must be used.
        latent_dim: of that model.
        mark: `fingerprint` of the encoding, noted in every shard.
    """

    folder: Path
    units: tuple[Unit, ...]
    options: EncodingOptions
    batch_seconds: float
    model_hash: str
    latent_dim: int
    mark: str

    def parts(self, number: int) -> list[dict[str, Any]]:
        """Notes of the shards of a unit that are whole."""
        return whole_parts(self.folder, number, self.options.format, self.mark, self.latent_dim)


def encode_unit(job: EncodingJob, number: int, model: LatentModel, advance: Callable[[int], None]) -> None:
    """Encode a unit, or go on with one that was interrupted.

    Args:
        job: what to do.
        number: of the unit.
        model: in eval mode and on the device to compute on.
        advance: is told how many items were added whenever a shard is whole.

    Raises:
        DataError: a storage does not answer.
        LatentError: the model gives latents of another shape than it should.
        OutputError: a shard cannot be written.
    """
    unit, options = job.units[number], job.options
    parts = job.parts(number)
    if is_done(parts):
        return
    report = SkipReport({name: why for part in parts for name, why in part["skipped"].items()})
    start = Position(*parts[-1]["next"]) if parts else Position(0, 0)
    noted, count = len(report), len(parts)  # entries that belong to shards before the one in the making
    writer = _ShardWriter(job.folder / part_name(number, count), model, job)
    reading = SkipReport(dict(report.skipped))
    found = windows(unit, start, reading, options.captions, options.keep_uncaptioned, options.max_tokens)
    pool_samples = BATCHES_PER_POOL * job.batch_seconds * SAMPLING_RATE
    # Audio is read and resampled while the model computes. What reading notes is handed over with the next window: a
    # shard must hold no note of what comes after it.
    with closing(ahead(_pools(found, reading, pool_samples), 1)) as pools:
        for pool in pools:
            for window, notes in pool:
                report.skipped.update(notes)
                if window is None:
                    break
                if not writer.fits(window):
                    advance(writer.close(report, noted, last=False))
                    noted, count = len(report), count + 1
                    writer = _ShardWriter(job.folder / part_name(number, count), model, job)
                writer.add(window, report)
    advance(writer.close(report, noted, last=True))


def _pools(
    found: Iterator[Window], report: SkipReport, samples: float
) -> Iterator[list[tuple[Window | None, dict[str, str]]]]:
    """Windows in groups of that much audio, each with what `report` noted since the one before; None is the end."""
    pool: list[tuple[Window | None, dict[str, str]]] = []
    held, seen = 0, len(report)
    for window in chain(found, [None]):
        pool.append((window, dict(islice(report.skipped.items(), seen, None))))
        seen = len(report)
        held += len(window.audio) if window is not None else 0
        if held >= samples or window is None:
            yield pool
            pool, held = [], 0


class _ShardWriter:
    """One shard in the making.

    Audio waits in a pool until there is enough of it to form batches of like length. The pool is emptied at the end of
    a shard, so that a shard is the same whatever run it is written by.
    """

    def __init__(self, stem: Path, model: LatentModel, job: EncodingJob) -> None:
        self._stem, self._model, self._options = stem, model, job.options
        self._batch_seconds, self._mark = job.batch_seconds, job.mark
        self._bytes = 0
        self._pool: list[Window] = []
        self._pooled = 0  # samples
        self._after = Position(0, 0)
        self._tensors: list[Tensor] = []
        self._rows: list[dict[str, Any]] = []
        self._samples = 0
        self._statistics = TokenStatistics.of(torch.zeros(0, model.latent_dim))

    def fits(self, window: Window) -> bool:
        return not self._bytes or (
            self._bytes + self._options.item_bytes(window.tokens, self._model.latent_dim) <= self._options.shard_bytes
        )

    def add(self, window: Window, report: SkipReport) -> None:
        self._pool.append(window)
        self._bytes += self._options.item_bytes(window.tokens, self._model.latent_dim)
        self._after = window.after
        self._pooled += len(window.audio)
        if self._pooled >= BATCHES_PER_POOL * self._batch_seconds * SAMPLING_RATE:
            self._encode_pool(report)

    def close(self, report: SkipReport, noted: int, last: bool) -> int:
        """Write the files, the one that says that the shard is whole at last; returns the number of items.

        Of the report it notes what comes after the first `noted` entries; of the last shard, that nothing follows.
        """
        self._encode_pool(report)
        WRITERS[self._options.format](self._stem, self._rows, self._tensors)
        part = {
            "encoding": self._mark,
            "tokens": [len(latents) for latents in self._tensors],
            "samples": self._samples,
            "statistics": self._statistics.to_json(),
            "skipped": dict(list(report.skipped.items())[noted:]),
            "next": None if last else list(self._after),
        }
        write_json(self._stem.with_suffix(".json"), part)
        return len(self._tensors)

    def _encode_pool(self, report: SkipReport) -> None:
        pool, self._pool, self._pooled = self._pool, [], 0
        found: dict[int, Tensor] = {}
        for batch in _batches([len(window.audio) for window in pool], self._batch_seconds * SAMPLING_RATE):
            latents = encode_batch(self._model, [pool[place].audio for place in batch])
            found.update(zip(batch, latents, strict=True))
        for place, window in enumerate(pool):
            stored = found[place].to(DTYPES[self._options.dtype])  # (T, C)
            if not bool(torch.isfinite(stored).all()):
                report.add(window.name, f"its latents are not finite as {self._options.dtype}")
                continue
            row = {"key": window.key, "captions": window.captions, "labels": window.labels}
            self._tensors.append(stored)
            self._rows.append(row)
            self._samples += len(window.audio)
            self._statistics = self._statistics.merge(TokenStatistics.of(stored))


@torch.inference_mode()
def encode_batch(model: LatentModel, clips: Sequence[np.ndarray[Any, np.dtype[np.float32]]]) -> list[Tensor]:
    """Latents of clips (samples,) at 16 kHz, padded to the longest: for each (T, C) on the CPU.

    Raises:
        LatentError: the model gives another number of tokens, or another width, than it should.
    """
    lengths = torch.tensor([len(clip) for clip in clips])
    audio = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(clip) for clip in clips], batch_first=True)  # (B, S)
    mask = torch.arange(audio.shape[1]) < lengths[:, None]  # (B, S)
    device = getattr(model, "device", torch.device("cpu"))
    latents = model.encode(audio.to(device), mask.to(device)).cpu()  # (B, T, C)
    tokens = (-(-lengths // SAMPLES_PER_TOKEN)).tolist()
    if latents.shape != (expected := (len(clips), max(tokens), model.latent_dim)):
        raise LatentError(f"the model gives latents of shape {tuple(latents.shape)} instead of {expected}")
    return [item[:count].clone() for item, count in zip(latents, tokens, strict=True)]


def _batches(lengths: Sequence[int], most: float) -> Iterator[list[int]]:
    """Places of clips of like length, shortest first, at most `most` padded samples together; a longer one alone."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[place] > most:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch
