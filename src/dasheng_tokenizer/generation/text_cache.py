"""Text embeddings kept in memory and on disk, so that each text is encoded once.

Layout. One file for each text, named by hashes of the encoder's identity and of the text:

    IDENTITY/ab/abcdef….safetensors   `embedding` (S, E) float32, and `sha256` (32,) uint8, the hash of identity, text
                                      and embedding

Files appear whole or not at all, so a killed process leaves none that is damaged and several may share a folder; one
that does not match its hash is written again.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from tqdm import tqdm

from dasheng_tokenizer.errors import OutputError
from dasheng_tokenizer.files import atomic_path
from dasheng_tokenizer.generation.text_encoders import TextEncoder, checked_texts

TEXTS_AT_ONCE = 256
"""Texts encoded before they are written: what a killed process loses at most."""


class CachedTextEncoder:
    """A text encoder that remembers; the same protocol as `TextEncoder`."""

    def __init__(
        self, encoder: TextEncoder, folder: str | Path | None = None, *, memory_megabytes: float = 256.0
    ) -> None:
        """Wrap an encoder.

        Args:
            encoder: that encodes what is not known yet.
            folder: of the disk cache, made when something is written; None for memory alone.
            memory_megabytes: most that is held in memory; what was not used for the longest time leaves first.
        """
        self.encoder = encoder
        self.folder = None if folder is None else Path(folder) / _digest(encoder.identity.encode())[:16]
        self._limit = memory_megabytes * 1e6
        self._memory: OrderedDict[str, Tensor] = OrderedDict()
        self._bytes = 0

    @property
    def width(self) -> int:
        """E, the size of an embedding."""
        return self.encoder.width

    @property
    def identity(self) -> str:
        """Of the encoder."""
        return self.encoder.identity

    @property
    def max_tokens(self) -> int:
        """Most tokens of a text that are read."""
        return self.encoder.max_tokens

    def __call__(self, texts: Sequence[str]) -> list[Tensor]:
        """Embeddings (S_i, E) float32 on the CPU; see `TextEncoder`. They belong to the caller, who may change them.

        A bar shows how many texts have been encoded where they are many.

        Raises:
            TextError: see `checked_texts`.
            OutputError: the disk cache cannot be written.
        """
        texts = checked_texts(texts)
        wanted = list(dict.fromkeys(texts))
        found = {text: known for text in wanted if (known := self._recall(text)) is not None}
        if any(len(known) >= self.max_tokens for known in found.values()):
            # The encoder's own warning came when the text was encoded, perhaps in another process long ago.
            warnings.warn(
                f"a text fills all {self.max_tokens} tokens that the text encoder reads; words beyond have no effect",
                UserWarning,
                stacklevel=2,
            )
        missing = [text for text in wanted if text not in found]
        many = len(missing) > TEXTS_AT_ONCE
        with tqdm(total=len(missing), desc="encoding text", unit=" texts", disable=None if many else True) as bar:
            for start in range(0, len(missing), TEXTS_AT_ONCE):
                group = missing[start : start + TEXTS_AT_ONCE]
                for text, embedding in zip(group, self.encoder(group), strict=True):
                    found[text] = embedding
                    self._remember(text, embedding)
                    self._write(text, embedding)
                bar.update(len(group))
        return [found[text].clone() for text in texts]

    def _recall(self, text: str) -> Tensor | None:
        """The embedding of a text if memory or disk has it."""
        if text in self._memory:
            self._memory.move_to_end(text)
            return self._memory[text]
        known = self._read(text)
        if known is not None:
            self._remember(text, known)
        return known

    def _remember(self, text: str, embedding: Tensor) -> None:
        self._memory[text] = embedding
        self._bytes += embedding.nbytes
        while self._bytes > self._limit:
            _, old = self._memory.popitem(last=False)
            self._bytes -= old.nbytes

    def _path(self, text: str) -> Path | None:
        name = _digest(text.encode())
        return None if self.folder is None else self.folder / name[:2] / f"{name}.safetensors"

    def _read(self, text: str) -> Tensor | None:
        """From disk; None where there is nothing, or nothing whole."""
        path = self._path(text)
        if path is None:
            return None
        try:
            held = load(path.read_bytes())  # not mapped into memory: another process may replace the file
            embedding, checksum = held["embedding"], held["sha256"]
        except (OSError, SafetensorError, KeyError, ValueError):
            return None
        # Of the right type before it is hashed, for which bfloat16 has no bytes in NumPy.
        if embedding.dtype != torch.float32 or embedding.ndim != 2 or embedding.shape[1] != self.width:
            return None
        return embedding if torch.equal(checksum, self._checksum(text, embedding)) else None

    def _write(self, text: str, embedding: Tensor) -> None:
        path = self._path(text)
        if path is None:
            return
        data = save({"embedding": embedding.contiguous(), "sha256": self._checksum(text, embedding)})
        try:
            with atomic_path(path) as temporary:
                temporary.write_bytes(data)
        except OutputError:
            if self._read(text) is None:  # else another process wrote the same at the same moment
                raise

    def _checksum(self, text: str, embedding: Tensor) -> Tensor:
        """(32,) uint8, so that neither a damaged nor a misplaced file passes."""
        digest = hashlib.sha256(f"{self.identity}\0{text}\0".encode() + embedding.numpy().tobytes()).digest()
        return torch.from_numpy(np.frombuffer(digest, np.uint8).copy())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
