"""Statistics of the latents of clean speech, and the space in which errors of a denoiser are measured.

A latent has loud directions and quiet ones: in that of the embedded default a twentieth of the directions hold half of
the variance, while most of what the decoder needs for the fine structure of a spectrum lies in the quiet ones.
Dimensions of equal variance do not change that, for they are correlated. Whitening does.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dasheng_tokenizer.enhancement.training_data import Examples
from dasheng_tokenizer.injection import Part
from dasheng_tokenizer.spectral import with_context
from dasheng_tokenizer.tokenizer import DashengTokenizerModel

STATISTICS_BATCH = 16
"""Crops embedded at once for the statistics, so that they do not hang on the batch size of the run."""

QUIETEST = 1e-3
"""Least variance of a direction, in units of the mean one: what is quieter is not brought up to the others."""


class LatentStatistics(NamedTuple):
    """Of the latents of clean speech.

    Attributes:
        mean: (D,) of the latent that the decoder takes.
        std: (D,) of the same.
        correlation: (D, D) of its dimensions.
        input_mean: (D,) of the part that the denoiser sees.
        input_std: (D,) of the same.
        input_correlation: (D, D) of its dimensions.
    """

    mean: Tensor
    std: Tensor
    correlation: Tensor
    input_mean: Tensor
    input_std: Tensor
    input_correlation: Tensor


class LatentLoss(nn.Module):
    """Smooth L1 distance of standardised latents in a whitened space, float32.

    Quadratic as long as an error is below one standard deviation, as the squared error of an earlier paper of the same
    authors on enhancement in embeddings (arXiv 2506.11514); beyond it linear, since the latents of digital silence lie
    so far from those of speech that their squares would own the gradient.

    Args:
        basis: (D, D), see `whitening`.
    """

    basis: Tensor

    def __init__(self, basis: Tensor) -> None:
        super().__init__()
        self.register_buffer("basis", basis)

    def forward(self, estimate: Tensor, clean: Tensor) -> Tensor:
        """(B, T, D) standardised latents, twice → scalar."""
        return F.smooth_l1_loss(estimate.float() @ self.basis, clean.float() @ self.basis)


def whitening(correlation: Tensor, strength: float) -> Tensor:
    """Symmetric (D, D) matrix that brings directions of unlike variance closer together and keeps the mean variance.

    Args:
        correlation: (D, D) of standardised latents.
        strength: 0 leaves them as they are, 1 gives all directions one variance, 0.5 the square root of what it was.
    """
    variances, directions = torch.linalg.eigh(correlation.double())  # (D,), (D, D)
    variances = variances.clamp(min=QUIETEST * float(variances.mean()))
    matrix = directions * variances.pow(-strength / 2) @ directions.T  # (D, D)
    return (matrix * (variances.mean() / variances.pow(1 - strength).mean()).sqrt()).float()


@torch.no_grad()
def latent_statistics(tokenizer: DashengTokenizerModel, part: Part, examples: Examples, crops: int) -> LatentStatistics:
    """Statistics of the latents of clean speech.

    Args:
        tokenizer: whose latents.
        part: whose statistics are wanted too; those of `unified` are the latent's.
        examples: their first crops count.
        crops: how many.
    """
    size = tokenizer.latent_dim
    sums = torch.zeros(2, size, dtype=torch.float64)  # (latent and part, D)
    products = torch.zeros(2, size, size, dtype=torch.float64)
    count = 0
    for first in range(0, crops, STATISTICS_BATCH):
        places = range(first, min(first + STATISTICS_BATCH, crops))
        clean = torch.from_numpy(np.stack([examples.mixture(place).clean for place in places]))
        clean = clean.to(tokenizer.device)
        latent = embed(tokenizer, clean, "unified")
        for row, held in enumerate((latent, latent if part == "unified" else embed(tokenizer, clean, part))):
            tokens = held.flatten(0, 1).double().cpu()  # (B·T, D)
            sums[row] += tokens.sum(0)
            products[row] += tokens.T @ tokens
        count += latent.shape[0] * latent.shape[1]
    found: list[Tensor] = []
    for mean, product in zip(sums / count, products / count, strict=True):
        covariance = product - mean[:, None] * mean  # (D, D)
        std = covariance.diagonal().clamp(min=0.0).sqrt()  # (D,)
        scale = std.clamp(min=1e-3 * float(std.mean()))  # a dimension that never changes stays finite
        found += [mean.float(), std.float(), (covariance / (scale[:, None] * scale)).float()]
    return LatentStatistics(*found)


@torch.no_grad()
def embed(tokenizer: DashengTokenizerModel, audio: Tensor, part: Part) -> Tensor:
    """(B, S) at 16 kHz → (B, T, D) float32: the latent that the decoder takes (`unified`), or one part of it."""
    if part == "unified":
        return tokenizer.encode(audio).float()
    context = with_context(audio, tokenizer.num_tokens(audio.shape[-1]))  # (B, 512 + 640·T + 512)
    held = tokenizer.encode_semantic(context) if part == "semantic" else tokenizer.encode_acoustic(context)
    return held.float()
