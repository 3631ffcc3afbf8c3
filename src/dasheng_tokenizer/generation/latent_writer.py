"""Encoding a captioned corpus once; `latent_index` has the layout of the result.

A killed run repeats at most one shard, and gives the same bytes as one that was not: where shards end, which clips are
encoded together and what each shard notes as skipped hang only on what comes after the shard before. Memory holds one
shard of latents and a pool of audio, whatever the size of the corpus; a long clip is decoded whole, then cut.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from dasheng_tokenizer.errors import ConfigurationError, DataError, LatentError, OutputError
from dasheng_tokenizer.files import atomic_path
from dasheng_tokenizer.generation.latent_folder import MAX_SECONDS, EncodingOptions, claim, is_complete, whole_parts
from dasheng_tokenizer.generation.latent_index import (
    FORMAT,
    VERSION,
    LatentIndex,
    TokenStatistics,
    shard_stem,
    tensor_name,
    write_json,
)
from dasheng_tokenizer.generation.latent_sources import Position, Window, sources_digest, windows
from dasheng_tokenizer.spectral import SAMPLES_PER_TOKEN, SAMPLING_RATE
from dasheng_tokenizer.token_file import DTYPES
from dasheng_tokenizer.training.clips import SkipReport, find_shards

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


def encode_latents(
    sources: str | Path | Sequence[str | Path],
    destination: str | Path,
    model: LatentModel,
    *,
    source_name: str,
    captions: str = "caption",
    max_seconds: float = MAX_SECONDS,
    shard_megabytes: float = 64,
    dtype: str = "float16",
    batch_seconds: float = BATCH_SECONDS,
    overwrite: bool = False,
    progress: bool = True,
) -> LatentIndex:
    """Encode a captioned corpus, or go on with an encoding that was interrupted; a finished one is left as it is.

    Args:
        sources: tar shards, audio files, folders, globs or ranges; each clip `KEY.flac` (or another kind of audio) has
            its captions in `KEY.json`. See `training.clips.find_shards`.
        destination: folder of the result.
        model: tokenizer, in eval mode and on the device to compute on.
        source_name: what to load that tokenizer by again.
        captions: see `EncodingOptions`, as the next three.
        max_seconds: a longer clip becomes several items.
        shard_megabytes: largest file of latents.
        dtype: number type stored.
        batch_seconds: audio encoded at once, padding included. May change when a run goes on; rounding may differ then.
        overwrite: whether a data set of another model, other options or other sources, or a finished one, is replaced.
        progress: show a bar.

    Returns:
        The index; `skipped` has the clips that were left out, with reasons.

    Raises:
        ConfigurationError: options out of range.
        DataError: no sources, or no clip that can be used.
        ModelMismatchError: the folder holds latents of another model.
        OutputError: it holds those of other sources or options, or cannot be written.
    """
    options = EncodingOptions(captions, max_seconds, shard_megabytes, dtype)
    _check(options, model, batch_seconds)
    shards = find_shards([sources] if isinstance(sources, (str, Path)) else list(sources))
    folder = Path(destination)
    encoding = {
        "format": FORMAT,
        "version": VERSION,
        "model_hash": model.weights_hash(),
        "tokenizer": source_name,
        "latent_dim": model.latent_dim,
        "frame_rate": SAMPLING_RATE / SAMPLES_PER_TOKEN,
        "options": asdict(options),
        "sources": sources_digest(shards),
    }
    encoding = claim(folder, encoding, overwrite)
    if is_complete(folder):
        return LatentIndex.read(folder)
    parts = list(whole_parts(folder, model.latent_dim))
    report = SkipReport({name: why for part in parts for name, why in part["skipped"].items()})
    start = Position(*parts[-1]["next"]) if parts else Position(0, 0, 0)
    noted = len(report)  # entries that belong to shards before the one in the making
    done = sum(len(part["tokens"]) for part in parts)
    with tqdm(desc="encoding", unit=" clips", initial=done, disable=None if progress else True) as bar:
        writer: _ShardWriter | None = None
        for window in windows(shards, start, report, options.captions, options.max_tokens):
            if writer is not None and not writer.fits(window):
                parts.append(writer.close(report, noted))
                writer, noted = None, len(report)
            if writer is None:
                writer = _ShardWriter(folder / shard_stem(len(parts)), model, options, batch_seconds)
            writer.add(window, report)
            bar.update()
        if writer is not None:
            parts.append(writer.close(report, noted))
    return _finish(folder, encoding, parts, report)


class _ShardWriter:
    """One shard in the making.

    Audio waits in a pool until there is enough of it to form batches of like length. The pool is emptied at the end of
    a shard, so that a shard is the same whatever run it is written by.
    """

    def __init__(self, stem: Path, model: LatentModel, options: EncodingOptions, batch_seconds: float) -> None:
        self._stem, self._model, self._options, self._batch_seconds = stem, model, options, batch_seconds
        self._bytes = 0
        self._pool: list[Window] = []
        self._pooled = 0  # samples
        self._after = Position(0, 0, 0)
        self._tensors: list[Tensor] = []
        self._rows: list[str] = []
        self._samples = 0
        self._statistics = TokenStatistics.of(torch.zeros(0, model.latent_dim))

    def fits(self, window: Window) -> bool:
        return (
            self._bytes + self._options.item_bytes(window.tokens, self._model.latent_dim) <= self._options.shard_bytes
        )

    def add(self, window: Window, report: SkipReport) -> None:
        self._pool.append(window)
        self._bytes += self._options.item_bytes(window.tokens, self._model.latent_dim)
        self._after = window.after
        self._pooled += len(window.audio)
        if self._pooled >= BATCHES_PER_POOL * self._batch_seconds * SAMPLING_RATE:
            self._encode_pool(report)

    def close(self, report: SkipReport, noted: int) -> dict[str, Any]:
        """Write the three files, the one that says that the shard is whole at last; returns what that one holds.

        Of the report it holds what comes after the first `noted` entries.
        """
        self._encode_pool(report)
        tensors = {tensor_name(row): latents for row, latents in enumerate(self._tensors)}
        _save(tensors, self._stem.with_suffix(".safetensors"))
        with atomic_path(self._stem.with_suffix(".jsonl")) as temporary:
            temporary.write_text("".join(self._rows), encoding="utf-8", newline="\n")
        part = {
            "tokens": [len(latents) for latents in self._tensors],
            "samples": self._samples,
            "statistics": self._statistics.to_json(),
            "skipped": dict(list(report.skipped.items())[noted:]),
            "next": list(self._after),
        }
        write_json(self._stem.with_suffix(".json"), part)
        return part

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
            self._rows.append(json.dumps(row) + "\n")
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


def _check(options: EncodingOptions, model: LatentModel, batch_seconds: float) -> None:
    if not 0 < batch_seconds < float("inf"):
        raise ConfigurationError(f"a batch of {batch_seconds} seconds holds nothing; {BATCH_SECONDS:g} are usual")
    mode = getattr(getattr(model, "config", None), "length_mode", "exact")
    if mode != "exact":
        raise ConfigurationError(f'latent data sets are exact; load the model with length_mode="exact", not {mode!r}')
    least = options.item_bytes(options.max_tokens, model.latent_dim)
    if least > options.shard_bytes:
        raise ConfigurationError(
            f"an item of {options.max_seconds:g} s needs {(least + 1024) / 2**20:.2f} MiB, more than a shard of "
            f"{options.shard_megabytes:g} MiB; take larger shards or shorter items"
        )


def _finish(folder: Path, encoding: dict[str, Any], parts: Sequence[dict[str, Any]], report: SkipReport) -> LatentIndex:
    clips = sum(len(part["tokens"]) for part in parts)
    if not clips:
        raise DataError(f"none of the clips can be encoded; {report.summary()}" if report else "the sources are empty")
    statistics = TokenStatistics.of(torch.zeros(0, encoding["latent_dim"]))
    for part in parts:
        statistics = statistics.merge(TokenStatistics.from_json(part["statistics"]))
    index = LatentIndex(
        encoding["model_hash"],
        encoding["tokenizer"],
        encoding["latent_dim"],
        encoding["frame_rate"],
        statistics,
        clips,
        hours=sum(part["samples"] for part in parts) / SAMPLING_RATE / 3600,
        skipped=report.skipped,
        shards=len(parts),
        options=encoding["options"],
    )
    index.save(folder)
    return index


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a shard; one metadata entry only, since safetensors writes several in random order."""
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary, {"format": f"{FORMAT} {VERSION}"})
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))  # how its text ends where the system refused
            if number:
                raise OSError(int(number[1]), str(error)) from error  # atomic_path names it
            raise OutputError(f"cannot write {path}: {error}; check free space and permissions") from error
