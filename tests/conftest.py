"""Tiny models with random weights, shared by the tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dasheng_tokenizer import DashengTokenizerConfig, DashengTokenizerModel

SHARED = Path(__file__).resolve().parents[2] / "shared"

SIZES = {"decoder_embed_dim": 32, "decoder_depth": 2, "decoder_intermediate_size": 48}

WHISPER = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 64,
    "vocab_size": 60,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
}

WAVE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "conv_dim": [16] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}


def tiny(kind: str = "dasheng", **changes: object) -> DashengTokenizerModel:
    """A seeded tiny tokenizer on the given kind of semantic encoder, in eval mode."""
    torch.manual_seed(0)
    if kind == "dasheng":
        config = DashengTokenizerConfig(embed_dim=32, depth=2, num_heads=2, **SIZES, **changes)
    else:
        inner = WHISPER if kind == "whisper" else WAVE
        config = DashengTokenizerConfig(semantic_encoder={"kind": kind, "config": inner}, **SIZES, **changes)
    model = DashengTokenizerModel(config).eval()
    # Wider than the default initialisation, so that every input matters to every output and a mistake shows.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        if kind == "dasheng":
            norm = model.encoder.model.init_bn[1]
            norm.running_mean.fill_(-20.0)
            norm.running_var.fill_(300.0)
    return model


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads cost tiny models more than they bring, many times more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_config() -> DashengTokenizerConfig:
    return DashengTokenizerConfig(embed_dim=32, depth=2, num_heads=2, **SIZES)


@pytest.fixture
def tiny_model() -> DashengTokenizerModel:
    return tiny()


@pytest.fixture
def whisper_tiny_random() -> DashengTokenizerModel:
    return tiny("whisper")


@pytest.fixture
def shared() -> Path:
    """The team's folder of corpus and teachers; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("needs the folder ../shared with the corpus, which is not part of the project")
    return SHARED
