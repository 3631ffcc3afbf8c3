"""The pipeline that belongs to a generator, whichever of the two kinds it is."""

from __future__ import annotations

import os

from dasheng_tokenizer.files import parse_json
from dasheng_tokenizer.generation.audiogen_configuration import MODEL_TYPE
from dasheng_tokenizer.generation.generator import KIND
from dasheng_tokenizer.generation.pipeline import AudioPipeline, TextToAudioPipeline
from dasheng_tokenizer.generation.scene_pipeline import ScenePipeline
from dasheng_tokenizer.weights_folder import CONFIG, model_folder


def load_pipeline(
    generator: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    text_encoder: str | os.PathLike[str] | None = None,
    device: str | None = None,
    *,
    offload_text_encoder: bool = False,
    compiled: bool = False,
) -> AudioPipeline:
    """A pipeline for a generator of this package or for the published sibling, by what its config.json says.

    Args:
        generator: folder or hub name; None: the one that ships with the package.
        tokenizer: folder or hub name; None: the one that the generator names.
        text_encoder: folder or hub name; None: the one that the generator names.
        device: as torch writes it; None: CUDA where there is one.
        offload_text_encoder: see `ScenePipeline.from_pretrained`; generators of this package are small and have no
            use for it.
        compiled: the same.

    Raises:
        CheckpointError, ModelMismatchError, ConfigurationError, MissingExtraError: see the two pipelines.
    """
    folder = None if generator is None else model_folder(generator, KIND)
    if folder is not None and _model_type(folder) == MODEL_TYPE:
        return ScenePipeline.from_pretrained(
            folder, tokenizer, text_encoder, device, offload_text_encoder=offload_text_encoder, compiled=compiled
        )
    return TextToAudioPipeline.from_pretrained(folder, tokenizer, text_encoder, device)


def _model_type(folder: os.PathLike[str]) -> str | None:
    """None where there is nothing to be read; loading will say why."""
    try:
        with open(os.path.join(folder, CONFIG), encoding="utf-8") as file:
            told = parse_json(file.read())
    except (OSError, ValueError):
        return None
    return told.get("model_type") if isinstance(told, dict) else None
