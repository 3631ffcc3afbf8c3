"""The encoder of the tokenizer: a frozen semantic encoder, and the one linear acoustic layer injected into it."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from dasheng_tokenizer.configuration import PUBLISHED_FLOOR, DashengTokenizerConfig
from dasheng_tokenizer.semantic_encoder import (
    FRAMES_PER_TOKEN,
    FeatureNorm,
    build_semantic_encoder,
    linear_patches,
)
from dasheng_tokenizer.spectral import CONTEXT, SAMPLES_PER_TOKEN, Float32Conv2d, Float32LayerNorm, MelSpectrogram

Part = Literal["unified", "semantic", "acoustic"]
"""The sum of both branches, which the decoder takes, or one of them."""


class AcousticFrontEnd(nn.Module):
    """Mel magnitude spectrogram of the acoustic layer, in natural logarithm; less than `floor` counts as `floor`."""

    def __init__(self, n_mels: int, floor: float = PUBLISHED_FLOOR) -> None:
        super().__init__()
        self.floor = floor
        self.mel_spec = MelSpectrogram(n_fft=1024, n_mels=n_mels, power=1.0)

    def forward(self, context_audio: Tensor, num_frames: int) -> Tensor:
        """Context audio (see `spectral`) → (B, n_mels, num_frames)."""
        return self.mel_spec(context_audio, num_frames).clamp(min=self.floor).log()  # (B, n_mels, num_frames)


class InjectionEncoder(nn.Module):
    """Both branches: `model` is the frozen semantic encoder, the rest is the acoustic layer that is injected."""

    def __init__(self, config: DashengTokenizerConfig) -> None:
        super().__init__()
        self.model = build_semantic_encoder(config)
        # The identity has no weights: the published layout stays as it is.
        self.semantic_norm = FeatureNorm(config.embed_dim) if config.normalize_semantic else nn.Identity()
        self.front_end = AcousticFrontEnd(config.n_mels_patch, config.log_mel_floor)
        patch = (config.n_mels_patch, FRAMES_PER_TOKEN)
        self.patch_embed = Float32Conv2d(1, config.embed_dim, kernel_size=patch, stride=patch)
        self.norm = Float32LayerNorm(config.embed_dim, eps=1e-5)

    def acoustic(self, context_audio: Tensor) -> Tensor:
        """(B, CONTEXT + 640·T + CONTEXT) → (B, T, D) float32."""
        length = (context_audio.shape[-1] - 2 * CONTEXT) // SAMPLES_PER_TOKEN
        log_mel = self.front_end(context_audio, FRAMES_PER_TOKEN * length)  # (B, n_mels, 4T)
        return self.norm(linear_patches(log_mel, self.patch_embed.weight, self.patch_embed.bias))  # (B, T, D)
