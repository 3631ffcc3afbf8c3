"""A tokenizer and a denoiser that go on after the acoustic layer got another power."""

from __future__ import annotations

import copy
import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dasheng_tokenizer import DashengTokenizerModel
from dasheng_tokenizer.enhancement.denoiser import Denoiser, DenoiserConfig, DenoiserInfo
from dasheng_tokenizer.enhancement.latent_space import LatentStatistics
from dasheng_tokenizer.training.acoustic_start import AcousticStartConfig
from test_training_loop import MemoryData, settings

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))
import change_power

pytestmark = pytest.mark.usefixtures("one_thread")


def latents(model: DashengTokenizerModel, audio: Tensor) -> Tensor:
    return (model.encode_semantic(audio) + model.encode_acoustic(audio)).detach()  # (B, N, D)


def test_the_decoder_takes_the_new_latents_for_the_old_ones(tiny_model: DashengTokenizerModel) -> None:
    new = copy.deepcopy(tiny_model)
    with torch.no_grad():
        new.injection.norm.weight.mul_(3.0)
        new.injection.norm.bias.mul_(3.0)
    data = MemoryData()
    before, after = change_power.latents(tiny_model, new, data, 200)
    first = latents(new, data.batch(0).audio).flatten(0, 1)
    assert len(before) >= 200 and torch.equal(after[: len(first)], first)
    assert not torch.allclose(before, after, atol=0.1)
    guessed = after @ change_power.guess(before, after).T
    assert float((guessed - before).norm() / before.norm()) < 0.3 * float((after - before).norm() / before.norm())


def test_a_layer_with_a_floor_leaves_the_old_tokenizer_as_it_is(
    tiny_model: DashengTokenizerModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(change_power, "open_data", lambda *_: MemoryData())
    old = copy.deepcopy(tiny_model)
    config = dataclasses.replace(settings(tmp_path), acoustic_start=AcousticStartConfig(tokens=400))
    new = change_power.change_tokenizer(config, tiny_model, power=1.0, floor=0.03)
    assert new.config.log_mel_floor == 0.03 and tiny_model.config.log_mel_floor == 1e-7
    silence = torch.zeros(1, 1024 + 640 * 8)
    assert torch.equal(new.encode_acoustic(silence), new.encode_acoustic(silence + 1e-6))
    for name, value in old.state_dict().items():
        assert torch.equal(value, tiny_model.state_dict()[name]), name
        if name.startswith("decoder."):
            assert torch.equal(value, new.state_dict()[name]), name
    # The new decoder gives of the new latents about what the old one gave of the old ones.
    audio = MemoryData().batch(0).audio
    before = old.decode(latents(old, audio))
    mapped, unmapped = (decoder.decode(latents(new, audio)).detach() - before.detach() for decoder in (new, old))
    assert float(mapped.norm()) < 0.5 * float(unmapped.norm())


def test_a_denoiser_that_adds_nothing_still_adds_nothing_and_differences_are_mapped(
    tiny_model: DashengTokenizerModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dim = tiny_model.latent_dim
    tiny_model.save_pretrained(tmp_path / "new")
    facts = DenoiserInfo(tiny_model.weights_hash(), "old", "unified", window_seconds=0.64)
    mean, std = torch.linspace(-1, 1, dim), torch.linspace(0.5, 2, dim)
    old = Denoiser(DenoiserConfig(dim, depth=1, heads=2), facts, mean, std, mean, std)
    own = LatentStatistics(mean + 1, 2 * std, torch.eye(dim), mean + 1, 2 * std, torch.eye(dim))
    monkeypatch.setattr(change_power, "latent_statistics", lambda *_: own)
    monkeypatch.setattr(change_power, "open_mixtures", lambda *_: StandIn())
    monkeypatch.setattr(change_power, "open_data", lambda *_: MemoryData())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("kind: enhancement\ndenoiser: {depth: 1, heads: 2}\n")
    config = dataclasses.replace(settings(tmp_path), acoustic_start=AcousticStartConfig(tokens=400))
    arguments = (config, recipe, old, tiny_model, str(tmp_path / "new"))
    seen = torch.randn(1, 12, dim, generator=torch.Generator().manual_seed(0))
    same = change_power.change_denoiser(*arguments).eval()
    torch.testing.assert_close(same(seen), seen, atol=1e-4, rtol=0)
    with torch.no_grad():
        old.project_out.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    changed = change_power.change_denoiser(*arguments).eval()
    # The latents are the same here, and so must be what is added to those that occur, whatever the statistics.
    occurring = latents(tiny_model, MemoryData().batch(0).audio)
    wanted, found = (one.eval()(occurring).detach() - occurring for one in (old, changed))
    assert float((found - wanted).norm() / wanted.norm()) < 0.1
    assert changed.info.tokenizer == str(tmp_path / "new")


class StandIn:
    """In place of mixtures; only what is asked for."""

    hours = 1.0
    train = type("Train", (), {"examples": None})
