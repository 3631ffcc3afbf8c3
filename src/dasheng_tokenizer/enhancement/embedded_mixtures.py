"""A fixed number of mixtures, embedded once by the frozen tokenizer, for training in many epochs.

Embedding costs several times what a step of a small denoiser does, so that a mixture seen four times makes four times
the steps affordable. Layout of a cache: blocks of 128 mixtures, each a safetensors file that appears whole, with

    clean                   (128, T, D) float16, the latent of the clean recording
    semantic, acoustic      the same of both parts of the noisy one's; of a VAE `unified` in their place
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from dasheng_tokenizer.enhancement.training_configuration import EnhancementConfig
from dasheng_tokenizer.enhancement.training_data import Examples
from dasheng_tokenizer.errors import DataError
from dasheng_tokenizer.files import atomic_path
from dasheng_tokenizer.injection import Part
from dasheng_tokenizer.spectral import SAMPLING_RATE
from dasheng_tokenizer.tokenizer import DashengTokenizerModel
from dasheng_tokenizer.training.data import local_slice

BLOCK = 128
"""Mixtures a file."""

EMBEDDED_AT_ONCE = 8

_VERSION = 1

_PROBES = 8
"""Mixtures by whose sound a sequence is known."""


@dataclass(frozen=True, eq=False)
class EmbeddedBatch:
    """Latents of a step, (B, T, D) float32 each; `clean_audio` (B, S) where the loss listens to it."""

    noisy: Tensor
    clean: Tensor
    clean_audio: Tensor | None
    seconds: float

    def split(self, parts: int) -> list[EmbeddedBatch]:
        """Cut into equal parts for gradient accumulation."""
        audio = [None] * parts if self.clean_audio is None else self.clean_audio.chunk(parts)
        pieces = zip(self.noisy.chunk(parts), self.clean.chunk(parts), audio, strict=True)
        return [EmbeddedBatch(*piece, self.seconds / parts) for piece in pieces]

    def to(self, device: torch.device) -> EmbeddedBatch:
        """The batch on a device."""
        audio = None if self.clean_audio is None else self.clean_audio.to(device)
        return EmbeddedBatch(self.noisy.to(device), self.clean.to(device), audio, self.seconds)


class EmbeddedMixtures:
    """Read access to a cache of `prepare_embeddings`."""

    def __init__(self, folder: Path, count: int) -> None:
        """Args: the cache, and how many mixtures it holds."""
        self.folder, self.count = folder, count
        self._opened: dict[int, Any] = {}

    def __len__(self) -> int:
        return self.count

    def latents(self, index: int, part: Part) -> tuple[Tensor, Tensor]:
        """A part of the noisy recording's latent, and the clean one's latent, (T, D) float32 each.

        Raises:
            DataError: a block is missing or damaged.
        """
        number, row = divmod(index, BLOCK)
        try:
            if number not in self._opened:
                self._opened[number] = safe_open(_block_path(self.folder, number), "pt")
            block = self._opened[number]
            held = {name: block.get_slice(name)[row].float() for name in block.keys()}
        except (OSError, SafetensorError, IndexError) as error:
            raise DataError(f"{self.folder} is damaged ({error}); delete it, it is made again") from error
        if part == "unified" and "unified" not in held:
            return held["semantic"] + held["acoustic"], held["clean"]
        return held[part], held["clean"]


class EmbeddedCrops:
    """Batches of embedded mixtures, each mixture once an epoch, in an order that is a function of seed and epoch."""

    def __init__(
        self, held: EmbeddedMixtures, examples: Examples, config: EnhancementConfig, rank: int = 0, world_size: int = 1
    ) -> None:
        """Set up the batches.

        Args:
            held: the mixtures.
            examples: the sequence that they are of, for the sound of the clean recordings.
            config: of the run.
            rank: of this process.
            world_size: number of processes.

        Raises:
            ConfigurationError: the batch cannot be shared evenly.
        """
        self.held, self.examples, self.config = held, examples, config
        self._slice = local_slice(config.data.batch_size, rank, world_size)

    def batch(self, step: int) -> EmbeddedBatch:
        """This rank's part of the batch of a step; the same however often and in which order it is asked."""
        first = step * self.config.data.batch_size
        indices = [self._index(first + place) for place in self._slice]
        noisy, clean = zip(*(self.held.latents(index, self.config.part) for index in indices), strict=True)
        audio = None
        if self.config.loss_weights.spectral > 0:
            audio = torch.from_numpy(np.stack([self.examples.mixture(index).clean for index in indices]))
        seconds = len(indices) * self.config.data.crop_samples / SAMPLING_RATE
        return EmbeddedBatch(torch.stack(noisy), torch.stack(clean), audio, seconds)

    def batches(self, first_step: int, last_step: int) -> Iterator[EmbeddedBatch]:
        """This rank's batches of the steps `first_step` … `last_step` - 1."""
        return map(self.batch, range(first_step, last_step))

    def _index(self, place: int) -> int:
        epoch, position = divmod(place, len(self.held))
        return int(np.random.default_rng([self.config.seed, epoch]).permutation(len(self.held))[position])


@torch.no_grad()
def prepare_embeddings(
    tokenizer: DashengTokenizerModel,
    examples: Examples,
    count: int,
    folder: Path,
    rank: int = 0,
    world_size: int = 1,
) -> EmbeddedMixtures:
    """Embed the first `count` mixtures of a sequence, as far as that was not done before.

    A cache belongs to a tokenizer and to the sound of the mixtures; others get a folder of their own below `folder`.
    Several processes share the blocks among them, and each returns when all are there. One that is killed repeats at
    most one block.

    Raises:
        OutputError: the cache cannot be written.
    """
    place = folder / _identity(tokenizer, examples)
    blocks = [range(first, min(first + BLOCK, count)) for first in range(0, count, BLOCK)]
    todo = [number for number, block in enumerate(blocks) if not _is_there(place, number, len(block))]
    shown = None if rank == 0 and todo else True  # None: only on a terminal
    for number in tqdm(todo[rank::world_size], desc="embedding mixtures", unit=" blocks", disable=shown):
        with atomic_path(_block_path(place, number)) as path:
            save_file(_embed_block(tokenizer, examples, blocks[number]), path)
    while world_size > 1 and not all(_is_there(place, number, len(block)) for number, block in enumerate(blocks)):
        time.sleep(0.2)
    return EmbeddedMixtures(place, count)


def _embed_block(tokenizer: DashengTokenizerModel, examples: Examples, block: Sequence[int]) -> dict[str, Tensor]:
    pieces: dict[str, list[Tensor]] = {}
    for first in range(0, len(block), EMBEDDED_AT_ONCE):
        mixtures = [examples.mixture(index) for index in block[first : first + EMBEDDED_AT_ONCE]]
        noisy, clean = (
            torch.from_numpy(np.stack([getattr(mixture, side) for mixture in mixtures])).to(tokenizer.device)
            for side in ("noisy", "clean")
        )
        unified, semantic, acoustic, _ = tokenizer._encode_parts(noisy, None)
        parts = {"unified": unified} if semantic is None or acoustic is None else _both(semantic, acoustic)
        for name, value in {**parts, "clean": tokenizer.encode(clean)}.items():
            pieces.setdefault(name, []).append(value.half().cpu())
    return {name: torch.cat(held).contiguous() for name, held in pieces.items()}


def _both(semantic: Tensor, acoustic: Tensor) -> dict[str, Tensor]:
    return {"semantic": semantic, "acoustic": acoustic}


def _identity(tokenizer: DashengTokenizerModel, examples: Examples) -> str:
    """Of a cache: its tokenizer, and the sound of a few mixtures, which hangs on data, seed and all settings."""
    digest = hashlib.sha256(f"{_VERSION} {BLOCK} {tokenizer.weights_hash()}".encode())
    for index in range(_PROBES):
        mixture = examples.mixture(index)
        digest.update(mixture.noisy.tobytes() + mixture.clean.tobytes())
    return digest.hexdigest()[:20]


def _block_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"


def _is_there(folder: Path, number: int, rows: int) -> bool:
    """Whether a block is there with so many mixtures; a last one may be shorter than is wanted now."""
    try:
        with safe_open(_block_path(folder, number), "pt") as block:
            return bool(block.get_slice("clean").get_shape()[0] >= rows)
    except (OSError, SafetensorError):
        return False
