"""The published sibling generator: a structured prompt → latents of the published tokenizer, and their length.

Its weights and their layout are the authors' (`mispeech/Dasheng-AudioGen`, 2.2 B parameters); here they run on current
libraries. What hangs on the prompt alone is computed once a prompt, what hangs on the times alone once for all steps,
both halves of the guidance run as one batch, and no velocity is asked for that changes nothing.

B clips, T tokens, C latent width, S text tokens, E text width.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dasheng_tokenizer.errors import ConfigurationError, TextError
from dasheng_tokenizer.generation.audiogen_backbone import AudioGenBackbone
from dasheng_tokenizer.generation.audiogen_configuration import AudioGenConfig
from dasheng_tokenizer.generation.audiogen_content import ContentAdapter, frames_of_tokens
from dasheng_tokenizer.generation.dit_blocks import TIME_SCALE
from dasheng_tokenizer.generation.flow_matching import Method, Progress, Velocity, evaluation_times, timestep_schedule
from dasheng_tokenizer.generation.sampling import STEPS, SWAY, clip_mask, sample_clips
from dasheng_tokenizer.generation.text_encoders import pad_text

GUIDANCE = 5.0
"""Published default."""

MAX_SECONDS = 120.0
"""Longest clip made. The model itself knows no limit, and no memory is without."""


class AudioGen(nn.Module):
    """Text embeddings → latents and lengths.

    A clip depends on its prompt, length and seed, not on the clips beside it.

    Args:
        config: sizes.
        published_time: cut the time, on its scale of 0 … 1000, to a whole number, as the published sampler does and the
            model has therefore been judged with. False: as it is.
        published_padding: let a clip that is shorter than the longest of its batch see what lies after its end, as
            published.
    """

    instruction_embedding: Tensor
    instruction_lengths: Tensor

    def __init__(self, config: AudioGenConfig, *, published_time: bool = True, published_padding: bool = False) -> None:
        super().__init__()
        self.config = config
        self.published_time = published_time
        self.published_padding = published_padding
        # Nested as in the published layout.
        projection = nn.Linear(config.text_dim, config.content_dim)
        self.content_encoder = nn.ModuleDict({"text_encoder": nn.ModuleDict({"proj": projection})})
        self.content_adapter = ContentAdapter(config)
        self.backbone = AudioGenBackbone(config)
        self.dummy_param = nn.Parameter(torch.zeros(0))  # so published; holds nothing
        self.dummy_nta_embed = nn.Parameter(torch.zeros(config.content_dim))  # of time-aligned tasks; held, not used
        self.dummy_ta_embed = nn.Parameter(torch.zeros(config.content_dim))
        instruction = torch.zeros(1, config.instruction_seq_len, config.task_instruction_dim)
        self.register_buffer("instruction_embedding", instruction)
        self.register_buffer("instruction_lengths", torch.full((1,), config.instruction_seq_len))

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str] | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> AudioGen:
        """Load published weights, one tensor at a time, in eval mode.

        Args:
            name: folder of config.json and *.safetensors (one file, or shards with their index), or hub name; None: the
                authors' on the hub.
            device: to run on.
            dtype: of the arithmetic; None: that of the files.
            options: as of the class.

        Raises:
            CheckpointError: not there, of another kind or layout, damaged, or with weights that are NaN or infinite.
        """
        from dasheng_tokenizer.generation.audiogen_weights import load_audiogen

        return load_audiogen(cls, name, torch.device(device), dtype, options)

    @property
    def num_parameters(self) -> int:
        """Count of all weights."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic."""
        return self.dummy_ta_embed.dtype

    # ------------------------------------------------------------------ prompt

    @torch.no_grad()
    def instructed(self, text: Tensor, text_mask: Tensor) -> Tensor:
        """(B, S, E) text embeddings and (B, S) mask → (B, S, content width), of which content and lengths are made.

        Raises:
            ConfigurationError: embeddings of another rank or width.
        """
        if text.ndim != 3 or text.shape[-1] != self.config.text_dim:
            raise ConfigurationError(
                f"text embeddings have shape {tuple(text.shape)}; expected (batch, tokens, {self.config.text_dim}), as "
                f"of {self.config.text_encoder_name}"
            )
        projected = self.content_encoder.get_submodule("text_encoder.proj")(
            text.to(self.dtype)
        )  # (B, S, content width)
        instruction = self.instruction_embedding[:, : int(self.instruction_lengths[0])]
        return self.content_adapter.instructed(projected, text_mask, instruction)

    @torch.no_grad()
    def log_durations(self, text: Sequence[Tensor]) -> Tensor:
        """(S_i, E) embeddings, one a clip → (B,) float32: ln(seconds + `duration_offset`) that the model predicts."""
        padded, mask = self._padded(text)
        return self.content_adapter.log_duration(self.instructed(padded, mask), mask)

    def num_tokens(self, text: Sequence[Tensor]) -> list[int]:
        """Length that the model predicts for each prompt, at least one token.

        Raises:
            TextError: it predicts a length that is not finite or beyond `MAX_SECONDS`.
        """
        counts = []
        for number, value in enumerate(self.log_durations(text).tolist()):
            seconds = math.exp(min(value, 700.0)) - self.config.duration_offset  # NaN stays NaN
            if not seconds <= MAX_SECONDS:
                raise TextError(
                    f"the model predicts {seconds:.3g} seconds for prompt {number}; at most {MAX_SECONDS:g} are made. "
                    "Ask for a length (seconds), or tell the scene in other words"
                )
            counts.append(max(1, round(seconds * self.config.frame_rate)))
        return counts

    @torch.no_grad()
    def token_frames(self, text: Sequence[Tensor]) -> list[Tensor]:
        """(S_i,) int64 latent tokens that the model gives to each text token; text to audio has no use for them."""
        padded, mask = self._padded(text)
        log_durations = self.content_adapter.token_log_durations(self.instructed(padded, mask), mask)
        frames = frames_of_tokens(log_durations, mask, self.config.frame_resolution, self.config.frame_rate)
        return [row[: len(item)] for row, item in zip(frames, text, strict=True)]

    def _padded(self, text: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        padded, mask = pad_text(text)
        return padded.to(self.dummy_ta_embed.device), mask.to(self.dummy_ta_embed.device)

    # ------------------------------------------------------------------ sampling

    @torch.no_grad()
    def sample(
        self,
        text: Sequence[Tensor],
        num_tokens: Sequence[int],
        *,
        seeds: Sequence[int],
        steps: int = STEPS,
        guidance: float = GUIDANCE,
        method: Method = "euler",
        sway: float = SWAY,
        progress: Progress | None = None,
    ) -> list[Tensor]:
        """Draw one clip a prompt.

        Args:
            text: (S_i, E) embeddings of real text tokens, one a clip.
            num_tokens: length T_i of each clip.
            seeds: of the noise of each clip; not that of the published code, which draws the batch as a whole.
            steps, method, sway, progress: see `flow_matching`.
            guidance: 1 follows the text, above it exaggerates it, 0 ignores it.

        Returns:
            (T_i, C) latents each, float32.

        Raises:
            ConfigurationError: settings out of range, or lists of different length.
            LatentError: the result is not finite.
        """
        device = self.dummy_ta_embed.device
        mask = clip_mask(num_tokens, device)  # (B, T)
        return sample_clips(
            lambda conditional: self.velocity(text, mask, conditional, timestep_schedule(steps, sway), method),
            len(text),
            num_tokens,
            seeds,
            self.config.latent_dim,
            device,
            steps=steps,
            guidance=guidance,
            method=method,
            sway=sway,
            progress=progress,
        )

    @torch.no_grad()
    def velocity(
        self,
        text: Sequence[Tensor],
        token_mask: Tensor,
        conditional: tuple[bool, ...],
        times: Tensor,
        method: Method = "euler",
    ) -> Velocity:
        """Velocity of the batch repeated for each flag, with its prompts or without, in `flow_matching`'s direction.

        Args:
            text: (S_i, E) embeddings, one a clip.
            token_mask: (B, T) bool.
            conditional: see `flow_matching.guided`.
            times: (N + 1,) at which it will be asked for by `integrate`; it answers at no others.
            method: of `integrate`.
        """
        padded, mask = self._padded(text)
        content = self.content_adapter.content(self.instructed(padded, mask))  # (B, S, content width)
        aligned = self.dummy_ta_embed.expand(len(content), -1)  # (B, content width)
        # Without condition both are zeros, under the same mask: the biases that follow remain.
        context = self.backbone.encode_context(
            torch.cat([content if flag else torch.zeros_like(content) for flag in conditional]),
            mask.repeat(len(conditional), 1),
            torch.cat([aligned if flag else torch.zeros_like(aligned) for flag in conditional]),
        )
        tokens = None if bool(token_mask.all()) else token_mask.repeat(len(conditional), 1)
        asked = evaluation_times(times, method).float()
        order = torch.unique(asked)  # (M,), ascending
        modulation = self.backbone.modulation(self._position(order.to(padded.device)))
        order = order.to(padded.device)

        def towards_data(x: Tensor, t: Tensor) -> Tensor:
            # The nearest time that was prepared: arithmetic of another order moves a time by a rounding.
            row = torch.bucketize(t, (order[:-1] + order[1:]) / 2)  # (B,)
            return -self.backbone(x, modulation.at(row), context, tokens, self.published_padding)

        return towards_data

    def _position(self, t: Tensor) -> Tensor:
        """(N,) times, 0 = noise, → the model's scale of 1000 = noise … 0."""
        position = TIME_SCALE * (1 - t.double())
        # A thousandth above, so that what is meant as a whole number is not cut to the one below by a rounding.
        return (torch.trunc(position + 1e-3) if self.published_time else position).float()
