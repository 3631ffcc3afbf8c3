"""Generation: text to latents by flow matching, and the data that it learns from.

The names below are imported when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dasheng_tokenizer.generation.audiogen import AudioGen
    from dasheng_tokenizer.generation.audiogen_configuration import AudioGenConfig
    from dasheng_tokenizer.generation.dit import DiffusionTransformer, DiTConfig
    from dasheng_tokenizer.generation.generator import Generator, GeneratorInfo
    from dasheng_tokenizer.generation.latent_dataset import LatentDataset
    from dasheng_tokenizer.generation.loading import load_pipeline
    from dasheng_tokenizer.generation.pipeline import GeneratedAudio, TextToAudioPipeline
    from dasheng_tokenizer.generation.scene_pipeline import ScenePipeline
    from dasheng_tokenizer.generation.scene_prompt import ScenePrompt
    from dasheng_tokenizer.generation.text_cache import CachedTextEncoder
    from dasheng_tokenizer.generation.text_encoders import load_text_encoder

_HOME = {
    "AudioGen": "audiogen",
    "AudioGenConfig": "audiogen_configuration",
    "CachedTextEncoder": "text_cache",
    "DiTConfig": "dit",
    "DiffusionTransformer": "dit",
    "GeneratedAudio": "pipeline",
    "Generator": "generator",
    "GeneratorInfo": "generator",
    "LatentDataset": "latent_dataset",
    "ScenePipeline": "scene_pipeline",
    "ScenePrompt": "scene_prompt",
    "TextToAudioPipeline": "pipeline",
    "load_pipeline": "loading",
    "load_text_encoder": "text_encoders",
}

__all__ = [
    "AudioGen",
    "AudioGenConfig",
    "CachedTextEncoder",
    "DiTConfig",
    "DiffusionTransformer",
    "GeneratedAudio",
    "Generator",
    "GeneratorInfo",
    "LatentDataset",
    "ScenePipeline",
    "ScenePrompt",
    "TextToAudioPipeline",
    "load_pipeline",
    "load_text_encoder",
]


def __getattr__(name: str) -> Any:
    """Import a public name from the module that has it."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    """Public names too, for completion."""
    return sorted({*globals(), *__all__})
