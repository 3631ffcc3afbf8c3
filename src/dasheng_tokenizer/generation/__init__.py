"""Generation: text to latents by flow matching, and the data that it learns from.

The names below are imported when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dasheng_tokenizer.generation.dit import DiffusionTransformer, DiTConfig
    from dasheng_tokenizer.generation.generator import Generator, GeneratorInfo
    from dasheng_tokenizer.generation.latent_dataset import LatentDataset
    from dasheng_tokenizer.generation.pipeline import GeneratedAudio, TextToAudioPipeline
    from dasheng_tokenizer.generation.text_cache import CachedTextEncoder
    from dasheng_tokenizer.generation.text_encoders import load_text_encoder

_HOME = {
    "CachedTextEncoder": "text_cache",
    "DiTConfig": "dit",
    "DiffusionTransformer": "dit",
    "GeneratedAudio": "pipeline",
    "Generator": "generator",
    "GeneratorInfo": "generator",
    "LatentDataset": "latent_dataset",
    "TextToAudioPipeline": "pipeline",
    "load_text_encoder": "text_encoders",
}

__all__ = [
    "CachedTextEncoder",
    "DiTConfig",
    "DiffusionTransformer",
    "GeneratedAudio",
    "Generator",
    "GeneratorInfo",
    "LatentDataset",
    "TextToAudioPipeline",
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
