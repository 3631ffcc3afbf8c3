"""The VAE baseline: the encoder and the bottleneck of a tokenizer with `latent_kind="vae"`.

audio (B,S) ─ log-mel ─ linear layer on 4 frames ─ norm ─ ConvNeXt blocks ─► mean and variance (B,T,C) ─► sample (B,T,C)

The patch layer and the kind of blocks are those of the tokenizer's acoustic layer and decoder; no frozen encoder takes
part. In training a token is drawn from its posterior, anywhere else it is the posterior's mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dasheng_tokenizer.configuration import DashengTokenizerConfig
from dasheng_tokenizer.decoder import ConvNeXtBlock
from dasheng_tokenizer.finite_context import FiniteContext
from dasheng_tokenizer.injection import AcousticFrontEnd
from dasheng_tokenizer.semantic_encoder import FRAMES_PER_TOKEN, linear_patches, token_mask
from dasheng_tokenizer.spectral import CONTEXT, SAMPLES_PER_TOKEN, Float32Conv2d, Float32LayerNorm

LOG_VARIANCE_RANGE = (-30.0, 20.0)
"""Outside it exp() helps nobody: the limits of latent diffusion's posterior (arXiv 2112.10752, its published code)."""

KERNEL_REACH = 3
"""Tokens on each side that a block's convolution over 7 tokens sees."""


class Posterior(NamedTuple):
    """A Gaussian with diagonal covariance for every token.

    Attributes:
        mean: (B, T, C).
        log_variance: (B, T, C).
    """

    mean: Tensor
    log_variance: Tensor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One draw, (B, T, C) float32, with gradients to mean and variance.

        Args:
            generator: source of the noise; None takes torch's own, which a run seeds and its checkpoints keep.
        """
        noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device)  # (B, T, C)
        return self.mean.float() + (0.5 * self.log_variance.float()).exp() * noise  # (B, T, C)

    def kl(self) -> Tensor:
        """KL divergence from the standard normal, (B, T) float32: nats per latent number, the mean over the C of it."""
        mean, log_variance = self.mean.float(), self.log_variance.float()
        return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean(-1)  # (B, T)


class VAEEncoder(nn.Module):
    """Audio → posterior of every token.

    Attributes:
        context_tokens: tokens on each side that a posterior can depend on.
    """

    def __init__(self, config: DashengTokenizerConfig) -> None:
        """Args: sizes."""
        super().__init__()
        width, depth = config.embed_dim, config.vae_depth
        self.front_end = AcousticFrontEnd(config.n_mels_patch, config.log_mel_floor)
        patch = (config.n_mels_patch, FRAMES_PER_TOKEN)
        self.patch_embed = Float32Conv2d(1, width, kernel_size=patch, stride=patch)
        self.norm = Float32LayerNorm(width, eps=1e-5)
        # Size and scale of the blocks as in the decoder.
        self.convnext = nn.ModuleList(
            ConvNeXtBlock(width, config.decoder_intermediate_size, gamma=1.0 / depth) for _ in range(depth)
        )
        self.final_layer_norm = Float32LayerNorm(width, eps=1e-6)
        self.moments = nn.Linear(width, 2 * config.vae_dim)

    @property
    def context_tokens(self) -> int:
        """See the class."""
        return KERNEL_REACH * len(self.convnext)

    def patches(self, context_audio: Tensor) -> Tensor:
        """Context audio (see `spectral`), (B, 512 + 640·T + 512) → the frames of each token, (B, T, width)."""
        length = (context_audio.shape[-1] - 2 * CONTEXT) // SAMPLES_PER_TOKEN
        log_mel = self.front_end(context_audio, FRAMES_PER_TOKEN * length)  # (B, n_mels, 4T)
        return self.norm(linear_patches(log_mel, self.patch_embed.weight, self.patch_embed.bias))  # (B, T, width)

    def posterior(self, patches: Tensor, hidden: Tensor | None = None) -> Posterior:
        """(B, T, width) patches → posterior; `hidden` (B, T, 1) bool is true for tokens past a clip's end.

        What is returned for hidden tokens is arbitrary; the others do not see them.
        """
        h = patches
        for block in self.convnext:
            # Zero, as the convolution's own padding is: a clip's end looks like the end of a tensor.
            h = block(h if hidden is None else h.masked_fill(hidden, 0.0))  # (B, T, width)
        mean, log_variance = self.moments(self.final_layer_norm(h).to(self.moments.weight.dtype)).chunk(
            2, dim=-1
        )  # (B, T, C) each
        return Posterior(mean, log_variance.clamp(*LOG_VARIANCE_RANGE))

    def forward(self, context_audio: Tensor, num_tokens: Tensor | None = None) -> Posterior:
        """Clips in a batch.

        Args:
            context_audio: (B, 512 + 640·T + 512) samples, zero past each clip's end.
            num_tokens: (B,) tokens of each clip, ≤ T; None: all are real.

        Returns:
            Posterior of (B, T, C); mean zero and variance one past each clip's tokens.
        """
        patches = self.patches(context_audio)  # (B, T, width)
        if num_tokens is None:
            return self.posterior(patches)
        hidden = ~token_mask(num_tokens, patches.shape[1])[..., None]  # (B, T, 1)
        mean, log_variance = self.posterior(patches, hidden)
        return Posterior(mean.masked_fill(hidden, 0.0), log_variance.masked_fill(hidden, 0.0))

    def mean_blocks(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """Means of a clip whose patches arrive in pieces, equal to those of the whole, at constant memory.

        Args:
            pieces: (B, any, width), one after the other.

        Yields:
            (B, any, C); a token comes once its `context_tokens` successors are here, or the clip's end is.
        """
        means = FiniteContext(lambda patches: self.posterior(patches).mean, self.context_tokens)
        for piece in pieces:
            if (ready := means.push(piece)) is not None:
                yield ready
        if (ready := means.finish()) is not None:
            yield ready
