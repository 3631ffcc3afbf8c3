"""A tokenizer as an encoder for the original package xares 0.1.3, which is given this file's path.

The package takes the one class of the module whose name ends in `Encoder`, builds it without arguments, and keeps
embeddings and scores in folders named by the class alone. So each object here gets a class of its own, whose name holds
the representation and a hash of the weights: what was kept for another model is never taken for this one.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from dasheng_tokenizer.errors import ConfigurationError
from dasheng_tokenizer.evaluation.representations import (
    TOKENIZER_REPRESENTATIONS,
    check_representation,
    tokenizer_representations,
)
from dasheng_tokenizer.spectral import SAMPLES_PER_TOKEN, SAMPLING_RATE
from dasheng_tokenizer.tokenizer import DashengTokenizerModel

MODEL_VARIABLE = "DASHENG_TOKENIZER_MODEL"
REPRESENTATION_VARIABLE = "DASHENG_TOKENIZER_REPRESENTATION"


class DashengTokenizerEncoder(nn.Module):
    """Unified, semantic or acoustic embedding: (B, S) samples → (B, ⌈S/640⌉, D).

    Attributes:
        sampling_rate: of the samples, in Hz.
        hop_size_in_ms: of the tokens.
        output_dim: D.
        representation: which embedding.
    """

    sampling_rate = SAMPLING_RATE
    hop_size_in_ms = SAMPLES_PER_TOKEN * 1000 // SAMPLING_RATE

    def __init__(self, model: str | Path | None = None, representation: str | None = None) -> None:
        """Load the tokenizer.

        Args:
            model: folder or hub name; None takes that of the variable DASHENG_TOKENIZER_MODEL, and without it the
                embedded default.
            representation: unified, semantic or acoustic; None takes that of the variable
                DASHENG_TOKENIZER_REPRESENTATION, and without it unified.

        Raises:
            CheckpointError: no such model.
            ConfigurationError: no such representation.
        """
        super().__init__()
        name = representation or os.environ.get(REPRESENTATION_VARIABLE) or TOKENIZER_REPRESENTATIONS[0]
        if name not in TOKENIZER_REPRESENTATIONS:
            raise ConfigurationError(
                f"unknown representation {name!r}; set {REPRESENTATION_VARIABLE} to one of "
                f"{', '.join(TOKENIZER_REPRESENTATIONS)}"
            )
        self.representation = name
        self.model = DashengTokenizerModel.from_pretrained(model or os.environ.get(MODEL_VARIABLE)).eval()
        self.model.requires_grad_(False)
        check_representation(name, tokenizer_representations(self.model))
        self.output_dim = self.model.latent_dim
        self.__class__ = type(self._class_name(), (type(self),), {"__doc__": type(self).__doc__})

    @torch.no_grad()
    def forward(self, audio: Tensor) -> Tensor:
        """(B, S) samples at 16 kHz, all taken as real → (B, ⌈S/640⌉, D) float32; up to ten minutes and beyond.

        Raises:
            AudioError: wrong rank, no samples, NaN or infinity.
        """
        parts = dict(zip(TOKENIZER_REPRESENTATIONS, self.model._encode_parts(audio, None), strict=False))
        found = parts[self.representation]  # (B, T, D)
        assert found is not None  # was checked when this was built
        return found.float()

    def _class_name(self) -> str:
        identity = f"{self.model.weights_hash()} {self.model.config.length_mode}"
        digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
        return f"DashengTokenizer{self.representation.capitalize()}{digest}Encoder"
