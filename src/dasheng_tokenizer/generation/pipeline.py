"""Text to audio in one object: text encoder, generator and tokenizer that belong together."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from dasheng_tokenizer.audio import Array, save_audio
from dasheng_tokenizer.chunking import decode_blocks, model_name
from dasheng_tokenizer.errors import CheckpointError, ConfigurationError, ModelMismatchError, TextError
from dasheng_tokenizer.generation.flow_matching import Method, Progress
from dasheng_tokenizer.generation.generator import GUIDANCE, Generator
from dasheng_tokenizer.generation.sampling import STEPS, SWAY
from dasheng_tokenizer.generation.scene_prompt import ScenePrompt
from dasheng_tokenizer.generation.text_cache import CachedTextEncoder
from dasheng_tokenizer.generation.text_encoders import TextEncoder, checked_texts, load_text_encoder
from dasheng_tokenizer.tokenizer import DashengTokenizerModel

BATCH_SIZE = 8
"""Clips sampled at once."""

Value = TypeVar("Value")


@dataclass(frozen=True, eq=False)
class GeneratedAudio:
    """A generated clip.

    Attributes:
        audio: (S,) float32 samples, full scale 1; may pass it a little.
        sampling_rate: Hz.
        text: what was asked for.
        seed: of the noise.
        seconds: length asked for; S is that times the sampling rate, rounded.
    """

    audio: Array
    sampling_rate: int
    text: str
    seed: int
    seconds: float

    def save(self, path: str | os.PathLike[str], overwrite: bool = True) -> None:
        """Write an audio file; see `save_audio`."""
        save_audio(path, self.audio, self.sampling_rate, overwrite=overwrite)


class AudioPipeline(ABC):
    """What all generators share: lists of prompts in batches, seeds, lengths, and the way back to audio.

    Attributes:
        guidance: where none is asked for.
        max_seconds: longest clip it makes.
    """

    guidance: float
    max_seconds: float
    tokenizer: DashengTokenizerModel

    @abstractmethod
    def texts(self, prompts: Sequence[str | ScenePrompt]) -> list[str]:
        """What the text encoder reads for each prompt.

        Raises:
            TextError: a prompt that cannot be used.
        """

    @abstractmethod
    def _encode(self, texts: Sequence[str]) -> list[Tensor]:
        """(S_i, E) embeddings."""

    @abstractmethod
    def _num_samples(self, embeddings: Sequence[Tensor], seconds: Sequence[float | None]) -> list[int]:
        """Samples of each clip, by what was asked for, or by what the generator thinks right."""

    @abstractmethod
    def _sample(self, embeddings: Sequence[Tensor], num_tokens: Sequence[int], **settings: Any) -> list[Tensor]:
        """(T_i, C) latents; see `Generator.sample`."""

    def __call__(
        self,
        texts: str | ScenePrompt | Sequence[str | ScenePrompt],
        seconds: float | Sequence[float | None] | None = None,
        *,
        steps: int = STEPS,
        guidance: float | None = None,
        method: Method = "euler",
        sway: float = SWAY,
        seed: int | Sequence[int] = 0,
        batch_size: int = BATCH_SIZE,
        progress: Progress | None = None,
    ) -> list[GeneratedAudio]:
        """Generate one clip a text. It depends on its text, length, seed and the settings, not on the other clips.

        Args:
            texts: one or several; in the language of the text encoder, English for the default one.
            seconds: length of all clips, or of each; None: the one that the generator thinks right.
            steps: of the sampler.
            guidance: 1 follows the text, above it exaggerates it, 0 ignores it (unconditional); None: the generator's
                default, `self.guidance`.
            method: "euler", or "midpoint" or "heun" at twice the cost a step.
            sway: see `flow_matching.timestep_schedule`.
            seed: of the noise of all clips, or of each. The same text and seed give the same clip.
            batch_size: clips sampled at once; bounds the memory.
            progress: called with steps done and steps in all.

        Raises:
            TextError: an empty text, one of more than 10,000 characters, or no string.
            ConfigurationError: a setting out of range.
            LatentError: the sampler ended in NaN.
        """
        prompts = self.texts([texts] if isinstance(texts, (str, ScenePrompt)) else texts)
        lengths = _for_each(seconds, len(prompts), "seconds")
        seeds = _for_each(seed, len(prompts), "seeds")
        for length in lengths:
            if length is not None:
                self.check_seconds(length)
        if batch_size < 1:
            raise ConfigurationError(f"batch size {batch_size} must be at least 1")
        batches = [range(start, min(start + batch_size, len(prompts))) for start in range(0, len(prompts), batch_size)]
        clips: list[GeneratedAudio] = []
        for number, batch in enumerate(batches):

            def show(done: int, total: int, before: int = number * steps) -> None:
                if progress is not None:
                    progress(before + done, total * len(batches))

            embeddings = self._encode([prompts[index] for index in batch])
            counts = self._num_samples(embeddings, [lengths[index] for index in batch])
            latents = self._sample(
                embeddings,
                [-(-count // self.tokenizer.hop_length) for count in counts],
                seeds=[seeds[index] for index in batch],
                steps=steps,
                guidance=self.guidance if guidance is None else guidance,
                method=method,
                sway=sway,
                progress=show,
            )
            rate = int(self.tokenizer.sampling_rate)
            for index, count, clip in zip(batch, counts, latents, strict=True):
                length = lengths[index]
                made = count / rate if length is None else length
                clips.append(GeneratedAudio(self._decode(clip, count), rate, prompts[index], seeds[index], made))
        return clips

    def check_seconds(self, seconds: float) -> None:
        """Refuse a length that the generator cannot make.

        Raises:
            ConfigurationError: saying what it can.
        """
        if not 0 < seconds <= self.max_seconds:
            raise ConfigurationError(
                f"{seconds:g} seconds: this generator makes clips above 0 and up to {self.max_seconds:g} seconds"
            )

    def samples_of(self, seconds: float) -> int:
        """Samples of a clip, at least one."""
        return max(1, round(seconds * self.tokenizer.sampling_rate))

    def _decode(self, latents: Tensor, num_samples: int) -> Array:
        """(T, C) → (num_samples,); block by block, so that long clips take no more memory than short ones."""
        pieces = list(decode_blocks(self.tokenizer, latents[None]))
        return np.concatenate(pieces, axis=1)[0, :num_samples]


class TextToAudioPipeline(AudioPipeline):
    """Texts → audio.

        pipeline = TextToAudioPipeline.from_pretrained("runs/generator/model")
        for clip in pipeline(["a dog barks twice", "rain on a tin roof"], seconds=5, seed=1):
            clip.save(f"{clip.text}.wav")

    Args:
        generator: stays on its device.
        tokenizer: that of the generator; stays on its device.
        text_encoder: that of the generator.

    Raises:
        ModelMismatchError: the tokenizer or the text encoder is not the one that the generator was trained with.
    """

    guidance = GUIDANCE

    def __init__(self, generator: Generator, tokenizer: DashengTokenizerModel, text_encoder: TextEncoder) -> None:
        check_tokenizer(generator, tokenizer)
        check_text_encoder(generator, text_encoder)
        self.generator, self.tokenizer, self.text_encoder = generator, tokenizer, text_encoder
        self.max_seconds = generator.info.max_seconds

    @classmethod
    def from_pretrained(
        cls,
        generator: str | os.PathLike[str] | None = None,
        tokenizer: str | os.PathLike[str] | None = None,
        text_encoder: str | os.PathLike[str] | None = None,
        device: str | None = None,
    ) -> TextToAudioPipeline:
        """Load all three parts.

        Args:
            generator: folder or hub name; None: the one that ships with the package.
            tokenizer: folder or hub name; None: the one that the generator names.
            text_encoder: folder or hub name; None: the one that the generator names.
            device: as torch writes it; None: CUDA where there is one.

        Raises:
            CheckpointError: a part cannot be loaded.
            ModelMismatchError: tokenizer or text encoder do not belong to the generator.
            ConfigurationError: there is no such device.
            MissingExtraError: the text encoder needs the extra `generate`.
        """
        from dasheng_tokenizer.cli_audio import load_model

        model = Generator.from_pretrained(generator)
        wanted = model.info.tokenizer if tokenizer is None else os.fspath(tokenizer)
        try:
            codec = load_model(wanted, device, None)
        except CheckpointError as error:
            if tokenizer is not None:
                raise
            raise CheckpointError(
                f"the generator's tokenizer cannot be loaded: {error}. Name the folder where it is now (--tokenizer); "
                f"its weights hash is {model.info.tokenizer_hash}"
            ) from error
        check_tokenizer(model, codec)  # before more time is spent
        words = model.info.text_encoder if text_encoder is None else os.fspath(text_encoder)
        encoder = load_text_encoder(words, codec.device)
        return cls(model.to(codec.device), codec, CachedTextEncoder(encoder))

    def texts(self, prompts: Sequence[str | ScenePrompt]) -> list[str]:
        """The texts themselves.

        Raises:
            TextError: see `checked_texts`; or a prompt in parts, which this generator was not trained with.
        """
        plain = [
            prompt.caption if isinstance(prompt, ScenePrompt) and not prompt.parts else prompt for prompt in prompts
        ]
        if any(isinstance(prompt, ScenePrompt) for prompt in plain):
            raise TextError(
                "this generator reads one text; speech, transcript, sfx, music and ambience are parts of a prompt for "
                "the published sibling generator alone. Say all in the caption"
            )
        return checked_texts([prompt for prompt in plain if not isinstance(prompt, ScenePrompt)])

    def _encode(self, texts: Sequence[str]) -> list[Tensor]:
        return self.text_encoder(texts)

    def _num_samples(self, embeddings: Sequence[Tensor], seconds: Sequence[float | None]) -> list[int]:
        typical = self.generator.info.default_seconds
        return [self.samples_of(typical if length is None else length) for length in seconds]

    def _sample(self, embeddings: Sequence[Tensor], num_tokens: Sequence[int], **settings: Any) -> list[Tensor]:
        return self.generator.sample(embeddings, num_tokens, **settings)


def check_tokenizer(generator: Generator, tokenizer: DashengTokenizerModel) -> None:
    """Refuse a tokenizer other than the generator's.

    Raises:
        ModelMismatchError: saying which one is needed.
    """
    info, found = generator.info, tokenizer.weights_hash()
    if found != info.tokenizer_hash:
        raise ModelMismatchError(
            f"this generator makes latents of the tokenizer {info.tokenizer or 'embedded in the package'} (weights "
            f"{info.tokenizer_hash[:12]}…), but {model_name(tokenizer)} (weights {found[:12]}…) was given; name the "
            "right one (--tokenizer), or train a generator on latents of this one"
        )


def check_text_encoder(generator: Generator, text_encoder: TextEncoder) -> None:
    """Refuse a text encoder other than the generator's.

    Raises:
        ModelMismatchError: saying which one is needed.
    """
    info, width = generator.info, generator.dit.config.text_dim
    if text_encoder.identity != info.text_identity or text_encoder.width != width:
        raise ModelMismatchError(
            f"this generator was trained with the text encoder {info.text_encoder or 'that is the default'} (width "
            f"{width}, identity {info.text_identity[:12]}…), but one of width {text_encoder.width} and identity "
            f"{text_encoder.identity[:12]}… was given; name the right one"
        )


def _for_each(value: Value | Sequence[Value], count: int, what: str) -> list[Value]:
    """One value for all, or one each."""
    if isinstance(value, Sequence):
        if len(value) != count:
            raise ConfigurationError(f"{len(value)} {what} for {count} texts; give one for all, or one for each")
        return list(value)
    return [value] * count
