"""DashengTokenizer: one continuous latent stream, 25 vectors a second, for understanding and generation of audio.

After `import dasheng_tokenizer`, `AutoModel.from_pretrained(...)` of transformers loads published and own checkpoints
without remote code (`auto_classes`). The names below are imported when they are first used, so that importing the
package, and the help of the command line, take no time.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dasheng_tokenizer.auto_classes import register_when_imported

if TYPE_CHECKING:
    from dasheng_tokenizer.audio import load_audio, save_audio
    from dasheng_tokenizer.configuration import DashengTokenizerConfig
    from dasheng_tokenizer.errors import DashengTokenizerError
    from dasheng_tokenizer.feature_extraction import DashengTokenizerFeatureExtractor
    from dasheng_tokenizer.feature_pipeline import AudioFeatureExtractionPipeline
    from dasheng_tokenizer.token_file import AudioTokens
    from dasheng_tokenizer.tokenizer import DashengTokenizerModel, DashengTokenizerOutput

__version__ = "0.1.0"

_HOME = {
    "AudioFeatureExtractionPipeline": "feature_pipeline",
    "AudioTokens": "token_file",
    "DashengTokenizerConfig": "configuration",
    "DashengTokenizerError": "errors",
    "DashengTokenizerFeatureExtractor": "feature_extraction",
    "DashengTokenizerModel": "tokenizer",
    "DashengTokenizerOutput": "tokenizer",
    "load_audio": "audio",
    "save_audio": "audio",
}

__all__ = [
    "AudioFeatureExtractionPipeline",
    "AudioTokens",
    "DashengTokenizerConfig",
    "DashengTokenizerError",
    "DashengTokenizerFeatureExtractor",
    "DashengTokenizerModel",
    "DashengTokenizerOutput",
    "load_audio",
    "save_audio",
]


def __getattr__(name: str) -> Any:
    """Import a public name from the module that has it."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    """Public names too, for completion."""
    return sorted({*globals(), *__all__})


register_when_imported()
