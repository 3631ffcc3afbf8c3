"""Scenes to audio with the published sibling generator: text encoder, generator and tokenizer in one object."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from dasheng_tokenizer.chunking import model_name
from dasheng_tokenizer.errors import CheckpointError, ModelMismatchError, TextError
from dasheng_tokenizer.generation.audiogen import GUIDANCE, MAX_SECONDS, AudioGen
from dasheng_tokenizer.generation.pipeline import AudioPipeline
from dasheng_tokenizer.generation.scene_prompt import ScenePrompt
from dasheng_tokenizer.generation.text_encoders import CountingTextEncoder, checked_texts, load_text_encoder
from dasheng_tokenizer.tokenizer import DashengTokenizerModel

Part = TypeVar("Part")


class ScenePipeline(AudioPipeline):
    """Captions, or prompts in parts, → audio. Without a length asked for, the model decides.

        pipeline = ScenePipeline.from_pretrained()
        scene = ScenePrompt("a woman greets a crowd", transcript="Good evening, everyone", music="soft piano")
        pipeline(scene, seed=1)[0].save("evening.wav")

    Args:
        generator: stays on its device.
        tokenizer: whose latents it makes; stays on its device.
        text_encoder: that the generator was trained with; may be on another device.

    Raises:
        ModelMismatchError: the tokenizer or the text encoder cannot belong to the generator.
    """

    guidance = GUIDANCE
    max_seconds = MAX_SECONDS

    def __init__(
        self, generator: AudioGen, tokenizer: DashengTokenizerModel, text_encoder: CountingTextEncoder
    ) -> None:
        config = generator.config
        found = (tokenizer.latent_dim, int(tokenizer.sampling_rate), tokenizer.hop_length)
        if found != (config.latent_dim, config.sample_rate, config.downsampling_ratio):
            raise ModelMismatchError(
                f"this generator makes latents of {config.latent_dim} numbers, one each {config.downsampling_ratio} "
                f"samples at {config.sample_rate} Hz, but {model_name(tokenizer)} has {found[0]} numbers, one each "
                f"{found[2]} samples at {found[1]} Hz; name the tokenizer that "
                f"belongs to it (--tokenizer), {config.tokenizer_name}"
            )
        if text_encoder.width != config.text_dim:
            raise ModelMismatchError(
                f"this generator reads text embeddings of width {config.text_dim}, but the text encoder gives "
                f"{text_encoder.width}; name the one that belongs to it, {config.text_encoder_name}"
            )
        self.generator, self.tokenizer, self.text_encoder = generator, tokenizer, text_encoder

    @classmethod
    def from_pretrained(
        cls,
        generator: str | os.PathLike[str] | None = None,
        tokenizer: str | os.PathLike[str] | None = None,
        text_encoder: str | os.PathLike[str] | None = None,
        device: str | None = None,
        *,
        dtype: torch.dtype | None = None,
        offload_text_encoder: bool = False,
        compiled: bool = False,
    ) -> ScenePipeline:
        """Load all three parts.

        Args:
            generator: folder or hub name; None: the authors' on the hub.
            tokenizer: folder or hub name; None: the one that the generator names.
            text_encoder: folder or hub name, such as that of a multilingual mT5 with a generator trained on it; None:
                the one that the generator names.
            device: as torch writes it; None: CUDA where there is one.
            dtype: of the generator's arithmetic; None: bfloat16 on CUDA, else float32.
            offload_text_encoder: leave the text encoder on the CPU: slower by the time of one short pass a prompt, and
                1.4 GB less on the device.
            compiled: compile the backbone with `torch.compile` at its first use.

        Raises:
            CheckpointError: a part cannot be loaded.
            ModelMismatchError: tokenizer or text encoder cannot belong to the generator.
            ConfigurationError: there is no such device.
            MissingExtraError: the text encoder needs the extra `generate`.
        """
        from dasheng_tokenizer.cli_audio import chosen_device, load_model

        place = chosen_device(device)
        numbers = (torch.bfloat16 if place.type == "cuda" else torch.float32) if dtype is None else dtype
        model = AudioGen.from_pretrained(generator, device=place, dtype=numbers)
        config = model.config
        codec = _named("tokenizer", tokenizer, config.tokenizer_name, lambda name: load_model(name, str(place), None))
        words_on = torch.device("cpu") if offload_text_encoder else place
        words = _named(
            "text encoder", text_encoder, config.text_encoder_name, lambda name: load_text_encoder(name, words_on)
        )
        if compiled:
            model.backbone.compile(dynamic=True)
        return cls(model, codec, words)

    def texts(self, prompts: Sequence[str | ScenePrompt]) -> list[str]:
        """The composed prompts.

        Raises:
            TextError: see `ScenePrompt` and `checked_texts`; or more tokens than the generator was trained with.
        """
        found = checked_texts([str(ScenePrompt.of(prompt)) for prompt in prompts])
        limit = min(self.generator.config.tokenizer_max_length, self.text_encoder.max_tokens)
        for text in found:
            if (count := self.text_encoder.count_tokens(text)) > limit:
                raise TextError(
                    f"the prompt has {count} tokens, and the generator reads {limit}; shorten it: {text[:60]!r}"
                )
        return found

    def _encode(self, texts: Sequence[str]) -> list[Tensor]:
        return self.text_encoder(texts)

    def _num_samples(self, embeddings: Sequence[Tensor], seconds: Sequence[float | None]) -> list[int]:
        predicted = self.generator.num_tokens(embeddings) if None in seconds else [0] * len(seconds)
        return [
            count * self.tokenizer.hop_length if length is None else self.samples_of(length)
            for count, length in zip(predicted, seconds, strict=True)
        ]

    def _sample(self, embeddings: Sequence[Tensor], num_tokens: Sequence[int], **settings: Any) -> list[Tensor]:
        return self.generator.sample(embeddings, num_tokens, **settings)


def _named(part: str, given: str | os.PathLike[str] | None, own: str, load: Callable[[str], Part]) -> Part:
    """Load a part by the name that was given or by the generator's own."""
    try:
        return load(own if given is None else os.fspath(given))
    except CheckpointError as error:
        if given is not None:
            raise
        raise CheckpointError(
            f"the generator's {part} cannot be loaded: {error}. Name the folder where it is "
            f"(--{part.replace(' ', '-')})"
        ) from error
