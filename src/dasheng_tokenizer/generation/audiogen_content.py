"""From text to condition in the published sibling generator: content adapter and predictors of duration.

B clips, S text tokens. Masks are true for real tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dasheng_tokenizer.generation.audiogen_configuration import AudioGenConfig

DURATION_NORM_EPS = 1e-12
"""Of the layer norms between the convolutions, as published."""


class DurationPredictor(nn.Module):
    """Log duration of every text token.

    The published code computes it and throws it away for text to audio, where only the duration of the whole matters.
    Here it runs on request alone (`AudioGen.token_frames`).
    """

    conv: Sequence[nn.Sequential]

    def __init__(self, config: AudioGenConfig) -> None:
        super().__init__()
        widths = [config.content_dim] + [config.duration_predictor_filter_channels] * config.duration_predictor_n_layers
        # The layout numbers padding, convolution, ReLU and norm; the first and the third have no weights.
        self.conv = nn.ModuleList(  # type: ignore[assignment]  # for mypy it holds any modules
            nn.Sequential(
                nn.ConstantPad1d(1, 0.0),
                nn.Conv1d(before, after, kernel_size=3),
                nn.ReLU(),
                nn.LayerNorm(after, eps=DURATION_NORM_EPS),
            )
            for before, after in zip(widths[:-1], widths[1:], strict=True)
        )
        self.linear = nn.Linear(widths[-1], 1)

    def forward(self, x: Tensor, text_mask: Tensor) -> Tensor:
        """(B, S, content width), (B, S) → (B, S) log durations, zero at padding."""
        real = text_mask[..., None]  # (B, S, 1)
        x = x.masked_fill(~real, 0.0)
        for layer in self.conv:
            h = layer[:3](x.transpose(1, 2)).transpose(1, 2)  # (B, S, filters)
            x = layer[3](h).masked_fill(~real, 0.0)
        return self.linear(x)[..., 0].masked_fill(~text_mask, 0.0)


class ContentAdapter(nn.Module):
    """Text that has looked at a stored instruction, and how long the audio shall be."""

    def __init__(self, config: AudioGenConfig) -> None:
        super().__init__()
        width = config.content_dim
        self.attn = nn.MultiheadAttention(width, config.adapter_num_heads, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.content_proj = nn.Conv1d(width, width, kernel_size=1)
        self.duration_predictor = DurationPredictor(config)
        # The layout numbers a dropout, too, which has no weights.
        self.global_duration_mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Identity(), nn.Linear(width, 1))

    def instructed(self, text: Tensor, text_mask: Tensor, instruction: Tensor) -> Tensor:
        """(B, S, width) text and (1, I, width) instruction → (B, S, width), of which all else is made."""
        instruction = instruction.expand(len(text), -1, -1)  # (B, I, width)
        seen, _ = self.attn(text, instruction, instruction, need_weights=False)  # (B, S, width)
        return self.norm(seen * text_mask[..., None].to(seen.dtype) + text)

    def content(self, x: Tensor) -> Tensor:
        """(B, S, width) from `instructed` → (B, S, width) for the backbone's cross-attention."""
        return self.content_proj(x.transpose(1, 2)).transpose(1, 2)

    def log_duration(self, x: Tensor, text_mask: Tensor) -> Tensor:
        """(B, S, width) from `instructed` → (B,) float32, natural logarithm of the seconds plus the offset."""
        real = text_mask[..., None]  # (B, S, 1)
        mean = x.masked_fill(~real, 0.0).sum(1) / real.sum(1)  # (B, width)
        return self.global_duration_mlp(mean)[..., 0].float()

    def token_log_durations(self, x: Tensor, text_mask: Tensor) -> Tensor:
        """(B, S, width) from `instructed` → (B, S) float32 log durations of the text tokens."""
        return self.duration_predictor(x, text_mask).float()


def frames_of_tokens(log_durations: Tensor, text_mask: Tensor, unit_seconds: float, frame_rate: float) -> Tensor:
    """(B, S) log durations → (B, S) int64 latent tokens of each text token, by the published rounding."""
    units = torch.ceil(torch.exp(log_durations) * text_mask) - 1  # (B, S)
    return torch.round(units * unit_seconds * frame_rate).long().masked_fill(~text_mask, 0)
