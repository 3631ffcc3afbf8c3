"""A layer of Whisper's encoder that sums its branches in float32; modules and keys are those of transformers."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoderLayer

from dasheng_tokenizer.spectral import Float32LayerNorm


class WhisperLayer(WhisperEncoderLayer):  # type: ignore[misc]  # transformers has no types
    """See `Float32LayerNorm` for why. Without dropout: the encoder is frozen."""

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__(config)
        self.self_attn_layer_norm = Float32LayerNorm(config.d_model)
        self.final_layer_norm = Float32LayerNorm(config.d_model)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, **_: Any) -> Tensor:
        """(B, N, D) → (B, N, D) float32; the mask, (B, 1, N, N), is true for keys that may be seen."""
        dtype = self.fc1.weight.dtype
        normed = self.self_attn_layer_norm(hidden_states).to(dtype)  # (B, N, D)
        h = hidden_states + self.self_attn(normed, attention_mask=attention_mask)[0]  # (B, N, D)
        inner = self.activation_fn(self.fc1(self.final_layer_norm(h).to(dtype)))  # (B, N, 4D)
        return h + self.fc2(inner)  # (B, N, D)
