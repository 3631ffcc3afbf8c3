"""Configuration of the published sibling generator, with its published field names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dasheng_tokenizer.errors import ConfigurationError

MODEL_TYPE = "dasheng_audiogen"
"""`model_type` of its config.json."""

PUBLISHED_GENERATOR = "mispeech/Dasheng-AudioGen"
"""Hub name of the authors' weights."""

_ONLY = {
    "use_zero_instruction": False,
    "dit_patch_size": 1,
    "dit_input_type": "1d",
    "dit_qk_norm": "layernorm",
    "dit_norm_layer": "layernorm",
    "dit_act_layer": "geglu",
    "dit_context_norm": True,
    "dit_time_fusion": "ada",
    "dit_ta_context_fusion": "add",
    "dit_ta_context_norm": True,
    "dit_context_fusion": "cross",
    "dit_context_pe_method": "none",
    "dit_pe_method": "none",
    "dit_rope_mode": "shared",
    "duration_predictor_kernel_size": 3,
    "special_tokens": [],
}
"""Choices of the published code with one published value; the others are not built."""

_TWINS = {"dit_in_chans": "latent_dim", "dit_out_chans": "latent_dim", "dit_context_dim": "content_dim"}
"""Entries that say a size a second time."""


@dataclass(frozen=True)
class AudioGenConfig:
    """Sizes; the defaults are the published ones.

    Attributes:
        latent_dim: width C of the latents.
        content_dim: width of the text after the content adapter.
        text_dim: width of the text encoder's output.
        instruction_seq_len: rows of the stored instruction that the content adapter attends to.
        task_instruction_dim: their width.
        adapter_num_heads: heads of that attention.
        duration_predictor_filter_channels: width of the predictor of durations a text token.
        duration_predictor_n_layers: its layers.
        dit_embed_dim: width of the transformer.
        dit_depth: blocks with a long skip, both halves together; there is one more in the middle.
        dit_num_heads: attention heads.
        dit_mlp_ratio: hidden width of the perceptron over `dit_embed_dim`.
        dit_ta_context_dim: width of the time-aligned condition.
        sample_rate: Hz.
        downsampling_ratio: samples a token.
        duration_offset: subtracted from the exponential of the predicted log duration, in seconds.
        frame_resolution: seconds a unit of the durations a text token.
        tokenizer_max_length: most tokens of a prompt.
        text_encoder_name: hub name of the text encoder.
        tokenizer_name: hub name of the tokenizer whose latents it makes.

    Raises:
        ConfigurationError: sizes that contradict each other.
    """

    latent_dim: int = 1280
    content_dim: int = 1024
    text_dim: int = 1024
    instruction_seq_len: int = 14
    task_instruction_dim: int = 1024
    adapter_num_heads: int = 16
    duration_predictor_filter_channels: int = 512
    duration_predictor_n_layers: int = 5
    dit_embed_dim: int = 1536
    dit_depth: int = 32
    dit_num_heads: int = 24
    dit_mlp_ratio: float = 4.0
    dit_ta_context_dim: int = 1024
    sample_rate: int = 16_000
    downsampling_ratio: int = 640
    duration_offset: float = 1.0
    frame_resolution: float = 0.005
    tokenizer_max_length: int = 512
    text_encoder_name: str = "google/flan-t5-large"
    tokenizer_name: str = "mispeech/dashengtokenizer"

    def __post_init__(self) -> None:
        """Refuse sizes that contradict each other."""
        for name, kind in (("int", int), ("float", (int, float)), ("str", str)):
            for field in dataclasses.fields(self):
                value = getattr(self, field.name)
                if field.type == name and (not isinstance(value, kind) or isinstance(value, bool)):
                    raise ConfigurationError(f"{field.name} is {value!r}; it must be of type {name}")
                if field.type == name and name != "str" and field.name != "duration_offset" and not value > 0:
                    raise ConfigurationError(f"{field.name} is {value!r}; it must be above 0")
        if self.dit_depth % 2:
            raise ConfigurationError(f"dit_depth {self.dit_depth} must be even: long skips join two halves")
        if self.dit_embed_dim % self.dit_num_heads or self.dit_embed_dim // self.dit_num_heads % 2:
            raise ConfigurationError(
                f"dit_embed_dim {self.dit_embed_dim} over {self.dit_num_heads} heads gives no even number of channels "
                "a head, which rotary positions need"
            )
        if self.task_instruction_dim != self.content_dim or self.content_dim % self.adapter_num_heads:
            raise ConfigurationError(
                f"task_instruction_dim {self.task_instruction_dim} must be content_dim, {self.content_dim}, and a "
                f"multiple of adapter_num_heads, {self.adapter_num_heads}"
            )
        if self.dit_ta_context_dim != self.content_dim:
            raise ConfigurationError(
                f"dit_ta_context_dim {self.dit_ta_context_dim} must be content_dim, {self.content_dim}: one learned "
                "vector stands for both"
            )

    @classmethod
    def from_published(cls, told: Mapping[str, Any]) -> AudioGenConfig:
        """From the entries of a published config.json; those that say nothing about the computation are left out.

        Raises:
            ConfigurationError: a choice that is not built, an entry of a wrong type, or sizes that contradict each
                other.
        """
        for name, value in _ONLY.items():
            if name in told and told[name] != value:
                raise ConfigurationError(f"{name} is {told[name]!r}; only {value!r}, the published choice, is built")
        for name, twin in _TWINS.items():
            if name in told and told[name] != told.get(twin, told[name]):
                raise ConfigurationError(f"{name} is {told[name]!r}, but {twin} is {told[twin]!r}; they must agree")
        known = {field.name for field in dataclasses.fields(cls)}
        fields = {name: value for name, value in told.items() if name in known}
        fields.setdefault("text_dim", fields.get("content_dim", cls.content_dim))
        return cls(**fields)

    @property
    def frame_rate(self) -> float:
        """Tokens a second."""
        return self.sample_rate / self.downsampling_ratio
