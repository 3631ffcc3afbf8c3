"""DashengTokenizer: one continuous latent stream, 25 vectors a second, for understanding and generation of audio.

Importing the package registers the model with the Auto classes of transformers, so that
`AutoModel.from_pretrained(...)` loads published and own checkpoints without remote code.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoFeatureExtractor, AutoModel

from dasheng_tokenizer.audio import load_audio, save_audio
from dasheng_tokenizer.configuration import DashengTokenizerConfig
from dasheng_tokenizer.errors import DashengTokenizerError
from dasheng_tokenizer.feature_extraction import DashengTokenizerFeatureExtractor
from dasheng_tokenizer.token_file import AudioTokens
from dasheng_tokenizer.tokenizer import DashengTokenizerModel, DashengTokenizerOutput

__version__ = "0.1.0"

__all__ = [
    "AudioTokens",
    "DashengTokenizerConfig",
    "DashengTokenizerError",
    "DashengTokenizerFeatureExtractor",
    "DashengTokenizerModel",
    "DashengTokenizerOutput",
    "load_audio",
    "save_audio",
]

AutoConfig.register(DashengTokenizerConfig.model_type, DashengTokenizerConfig, exist_ok=True)
AutoModel.register(DashengTokenizerConfig, DashengTokenizerModel, exist_ok=True)
AutoFeatureExtractor.register(DashengTokenizerConfig, DashengTokenizerFeatureExtractor, exist_ok=True)
