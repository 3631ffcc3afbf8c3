"""Captions of a generator's training data: embedded once, before the first step, and read from disk from then on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from tqdm import tqdm

from dasheng_tokenizer.errors import DataError, TextError
from dasheng_tokenizer.generation.latent_dataset import LatentDataset
from dasheng_tokenizer.generation.text_cache import TEXTS_AT_ONCE, CachedTextEncoder
from dasheng_tokenizer.generation.text_encoders import checked_texts, load_text_encoder
from dasheng_tokenizer.generation.training_configuration import GeneratorTrainingConfig

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def all_captions(dataset: LatentDataset) -> set[str]:
    """All captions of a data set, each once.

    Raises:
        DataError: one that cannot be encoded, or a clip without any.
    """
    found: set[str] = set()
    for index in range(len(dataset)):
        key, captions, _ = dataset.description(index)
        if not captions:
            raise DataError(f"{key} has no caption; encode the data without --keep-uncaptioned to train a generator")
        try:
            found.update(checked_texts(captions))
        except TextError as error:
            raise DataError(f"{key} has a caption that cannot be encoded: {error}; leave the clip out") from error
    return found


def embed_captions(fabric: Fabric, config: GeneratorTrainingConfig, captions: Sequence[str]) -> StoredTexts:
    """Put the embeddings of all captions into `text_cache`; the processes share the work.

    The encoder is let go afterwards: training has better uses for its memory.
    """
    cache = CachedTextEncoder(load_text_encoder(config.text_encoder, fabric.device), config.text_cache)
    mine = captions[fabric.global_rank :: fabric.world_size]
    shown = None if fabric.is_global_zero and len(mine) > TEXTS_AT_ONCE else True  # None: only on a terminal
    with tqdm(total=len(mine), desc="captions", unit=" texts", disable=shown) as bar:
        for start in range(0, len(mine), TEXTS_AT_ONCE):  # not all at once: they need not fit into memory
            bar.update(len(cache(mine[start : start + TEXTS_AT_ONCE])))
    fabric.barrier()
    return StoredTexts(cache.width, cache.identity, cache.max_tokens)


@dataclass(frozen=True)
class StoredTexts:
    """Stands for a text encoder whose embeddings are all on disk.

    Attributes:
        width, identity, max_tokens: of the encoder; see `TextEncoder`.
    """

    width: int
    identity: str
    max_tokens: int

    def __call__(self, texts: Sequence[str]) -> list[Tensor]:
        """Give nothing for no text.

        Raises:
            DataError: a text is asked for, so it went missing on disk.
        """
        if texts:
            raise DataError(
                f"the embedding of {texts[0][:60]!r} is no longer in the folder `text_cache`, or other processes "
                "write to a folder that this one does not see; start the training again, it goes on from its checkpoint"
            )
        return []
