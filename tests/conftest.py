"""Tiny models with random weights, shared by the tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dasheng_tokenizer import DashengTokenizerConfig, DashengTokenizerModel
from dasheng_tokenizer.generation import Generator, GeneratorInfo, TextToAudioPipeline
from dasheng_tokenizer.generation.dit import DiTConfig
from dasheng_tokenizer.generation.text_encoders import load_text_encoder

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

GENERATOR_SIZES = DiTConfig(latent_dim=32, text_dim=16, width=32, depth=2, heads=2)
GENERATOR_SECONDS = 2.0


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


def new_generator(info: GeneratorInfo | None = None, seed: int = 0) -> Generator:
    """A tiny generator moved away from its start, where it answers zero whatever it is asked."""
    torch.manual_seed(seed)
    info = info or GeneratorInfo("no tokenizer")
    generator = Generator(GENERATOR_SIZES, info, torch.linspace(-1, 1, 32), torch.linspace(0.5, 2, 32)).eval()
    with torch.no_grad():
        for parameter in generator.dit.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return generator


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


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT that knows a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("text")
    words = ("[PAD]", "[UNK]", "a", "dog", "barks", "twice", "rain", "bell", "loud")
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "tiny"
    tiny().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def generator_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path, text_folder: Path) -> Path:
    info = GeneratorInfo(
        tokenizer_hash=DashengTokenizerModel.from_pretrained(tokenizer_folder).weights_hash(),
        tokenizer=str(tokenizer_folder),
        text_encoder=str(text_folder),
        text_identity=load_text_encoder(text_folder).identity,
        max_seconds=GENERATOR_SECONDS,
        typical_seconds=0.4,
        provenance={"name": "tiny"},
    )
    folder = tmp_path_factory.mktemp("generator") / "model"
    new_generator(info).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pipeline(generator_folder: Path) -> TextToAudioPipeline:
    return TextToAudioPipeline.from_pretrained(generator_folder, device="cpu")
