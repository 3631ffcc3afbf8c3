"""A wider decoder that starts with what a narrow one has learnt."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from dasheng_tokenizer import DashengTokenizerModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))
import widen_decoder

pytestmark = pytest.mark.usefixtures("one_thread")


def test_twice_the_width_computes_the_same(tiny_model: DashengTokenizerModel) -> None:
    config = tiny_model.config
    width, size = 2 * config.decoder_embed_dim, 2 * config.decoder_intermediate_size + 3
    wide = widen_decoder.widen(tiny_model, width, size).eval()
    latents = torch.randn(2, 9, tiny_model.latent_dim, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(wide.decode(latents), tiny_model.decode(latents), atol=1e-5, rtol=1e-4)
    assert wide.decoder.backbone.embed.weight.shape[0] == wide.config.decoder_embed_dim == width
    assert config.decoder_embed_dim * 2 == width  # the old model keeps its own configuration


def test_copies_can_part(tiny_model: DashengTokenizerModel) -> None:
    old = tiny_model.config.decoder_embed_dim
    wide = widen_decoder.widen(tiny_model, 2 * old, tiny_model.config.decoder_intermediate_size)
    latents = torch.randn(2, 9, tiny_model.latent_dim, generator=torch.Generator().manual_seed(0))
    wide.decode(latents).square().mean().backward()
    gradient = wide.decoder.backbone.embed.weight.grad
    assert gradient is not None
    first, second = gradient[:old], gradient[old:]
    # Under Adam gradients that differ by a factor alone would keep copies together.
    assert torch.cosine_similarity(first.flatten(1), second.flatten(1)).abs().min() < 0.9


def test_latents_and_other_weights_stay(tiny_model: DashengTokenizerModel) -> None:
    width = tiny_model.config.decoder_embed_dim + 5
    wide = widen_decoder.widen(tiny_model, width, tiny_model.config.decoder_intermediate_size)
    audio = torch.randn(1, 6400, generator=torch.Generator().manual_seed(0))
    assert torch.equal(wide.encode(audio), tiny_model.encode(audio))
    assert torch.isfinite(wide.decode(tiny_model.encode(audio))).all()


def test_a_seed_gives_the_same_decoder(tiny_model: DashengTokenizerModel) -> None:
    sizes = tiny_model.config.decoder_embed_dim + 5, tiny_model.config.decoder_intermediate_size + 3
    one, same, other = (widen_decoder.widen(tiny_model, *sizes, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    assert not all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_decoder_does_not_become_narrower(tiny_model: DashengTokenizerModel) -> None:
    config = tiny_model.config
    with pytest.raises(ValueError, match="only become wider"):
        widen_decoder.widen(tiny_model, config.decoder_embed_dim - 1, config.decoder_intermediate_size)
