"""Generators and the pipeline: what a clip depends on, what is refused, whole outputs."""

from __future__ import annotations

import errno
import importlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import dasheng_tokenizer.generation as generation
from conftest import GENERATOR_SECONDS, GENERATOR_SIZES, new_generator, tiny
from dasheng_tokenizer import weights_folder
from dasheng_tokenizer.errors import (
    CheckpointError,
    ConfigurationError,
    LatentError,
    ModelMismatchError,
    OutputError,
    TextError,
)
from dasheng_tokenizer.generation import generator as generator_module
from dasheng_tokenizer.generation.generator import Generator, GeneratorInfo
from dasheng_tokenizer.generation.pipeline import TextToAudioPipeline
from dasheng_tokenizer.weights_folder import CONFIG, WEIGHTS

pytestmark = pytest.mark.usefixtures("one_thread")

FAST = {"steps": 2, "seconds": 0.2}


def embeddings(*lengths: int, seed: int = 0) -> list[Tensor]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(length, 16, generator=source) for length in lengths]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    new_generator().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# ---------------------------------------------------------------------- sampling


def test_a_clip_does_not_depend_on_its_batch() -> None:
    generator = new_generator()
    text, lengths, seeds = embeddings(5, 1, 3), [9, 4, 6], [7, 8, 9]
    together = generator.sample(text, lengths, seeds=seeds, steps=4)
    turned = generator.sample(text[::-1], lengths[::-1], seeds=seeds[::-1], steps=4)[::-1]
    for index, length in enumerate(lengths):
        alone = generator.sample([text[index]], [length], seeds=[seeds[index]], steps=4)[0]
        assert alone.shape == (length, 32)
        assert torch.allclose(together[index], alone, rtol=0, atol=1e-4)
        assert torch.allclose(turned[index], alone, rtol=0, atol=1e-4)


def test_a_clip_depends_on_text_seed_and_settings() -> None:
    generator = new_generator()
    one, other = embeddings(3, 3)
    base = generator.sample([one], [6], seeds=[1], steps=3)[0]
    assert torch.equal(base, generator.sample([one], [6], seeds=[1], steps=3)[0])
    for text, changes in (
        (other, {}),
        (one, {"seeds": [2]}),
        (one, {"guidance": 2.0}),
        (one, {"steps": 4}),
        (one, {"method": "midpoint"}),
        (one, {"sway": 0.0}),
    ):
        changed = generator.sample([text], [6], **{"seeds": [1], "steps": 3, **changes})[0]
        assert not torch.allclose(changed, base, atol=1e-3), changes


def test_the_global_random_state_plays_no_part_and_is_left_alone() -> None:
    generator = new_generator()
    torch.manual_seed(1)
    first, after = generator.sample(embeddings(2), [5], seeds=[0], steps=1)[0], torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))
    assert torch.equal(first, generator.sample(embeddings(2), [5], seeds=[0], steps=1)[0])


def test_an_untrained_generator_gives_noise_in_the_scale_of_the_latents() -> None:
    """Its velocity is zero, so the state stays standard normal noise."""
    mean, std = torch.linspace(-5, 5, 32), torch.linspace(0.1, 3, 32)
    generator = Generator(GENERATOR_SIZES, GeneratorInfo("no tokenizer"), mean, std)
    clip = generator.sample(embeddings(2), [2000], seeds=[0], steps=1)[0]
    assert torch.allclose(clip.mean(0), mean, atol=0.3)
    assert torch.allclose(clip.std(0), std, rtol=0.08)
    standard = generator.standardize(clip)
    assert float(standard.mean()) == pytest.approx(0, abs=0.02)
    assert float(standard.std()) == pytest.approx(1, abs=0.02)
    assert torch.allclose(generator.restore(standard), clip, atol=1e-4)


@pytest.mark.parametrize(("guidance", "rows"), [(0.0, 2), (1.0, 2), (3.0, 4)])
@pytest.mark.parametrize(("method", "times"), [("euler", 1), ("midpoint", 2)])
def test_cost_of_guidance_and_method(guidance: float, rows: int, method: str, times: int) -> None:
    generator, seen = new_generator(), []
    generator.dit.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    generator.sample(embeddings(2, 3), [4, 5], seeds=[0, 1], steps=3, guidance=guidance, method=method)
    assert seen == [rows] * 3 * times


def test_guidance_zero_is_blind_to_the_text_and_three_goes_beyond_one() -> None:
    generator = new_generator()
    one, other = embeddings(3, 5)

    def step(text: Tensor, guidance: float) -> Tensor:
        return generator.sample([text], [6], seeds=[1], steps=1, guidance=guidance)[0]

    assert torch.allclose(step(one, 0), step(other, 0), rtol=0, atol=1e-5)
    assert not torch.allclose(step(one, 1), step(one, 0), atol=1e-3)
    extrapolated = step(one, 0) + 3 * (step(one, 1) - step(one, 0))  # exact for a single step
    assert torch.allclose(step(one, 3), extrapolated, rtol=0, atol=1e-4)


def test_the_state_stays_float32_where_the_transformer_is_bfloat16(saved: Path) -> None:
    exact = Generator.from_pretrained(saved).sample(embeddings(3), [8], seeds=[0], steps=4)[0]
    half = Generator.from_pretrained(saved, dtype=torch.bfloat16)
    assert half.dit.latent_in.weight.dtype == torch.bfloat16 and half.latent_std.dtype == torch.float32
    rough = half.sample(embeddings(3), [8], seeds=[0], steps=4)[0]
    assert rough.dtype == torch.float32
    assert 1e-6 < float((rough - exact).abs().mean() / exact.abs().mean()) < 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "at least 1"),
        ({"guidance": -1.0}, "guidance"),
        ({"guidance": math.nan}, "guidance"),
        ({"method": "leap"}, "euler, midpoint"),
        ({"sway": 3.0}, "sway"),
        ({"seeds": [-1]}, "seed"),
        ({"seeds": [2**63]}, "seed"),
        ({"seeds": [1, 2]}, "2 seeds"),
    ],
)
def test_settings_of_sampling_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        new_generator().sample(embeddings(2), [4], **{"seeds": [0], "steps": 1, **changes})


def test_a_clip_needs_a_token_and_no_clip_gives_none() -> None:
    with pytest.raises(ConfigurationError, match="at least one"):
        new_generator().sample(embeddings(2), [0], seeds=[0])
    assert new_generator().sample([], [], seeds=[]) == []


def test_a_result_that_is_not_finite_is_an_error() -> None:
    generator = new_generator()
    with torch.no_grad():
        generator.dit.latent_out.weight.fill_(1e38)
    with pytest.raises(LatentError, match="lower the guidance"):
        generator.sample(embeddings(2), [4], seeds=[0], steps=3)


# ---------------------------------------------------------------------- statistics and facts


def test_a_dimension_that_never_changes_is_not_divided_by_zero() -> None:
    std = torch.ones(32)
    std[3] = 0
    generator = Generator(GENERATOR_SIZES, GeneratorInfo("no tokenizer"), torch.zeros(32), std)
    assert bool(torch.isfinite(generator.standardize(torch.zeros(1, 32))).all())
    assert 0 < generator.latent_std[3] < 0.01


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        (torch.zeros(31), torch.ones(31)),
        (torch.full((32,), math.nan), torch.ones(32)),
        (torch.zeros(32), torch.full((32,), math.inf)),
        (torch.zeros(32), torch.zeros(32)),
        (torch.zeros(32), -torch.ones(32)),
    ],
)
def test_statistics_that_cannot_be_are_refused(mean: Tensor, std: Tensor) -> None:
    with pytest.raises(ConfigurationError, match="standard deviation"):
        Generator(GENERATOR_SIZES, GeneratorInfo("no tokenizer"), mean, std)


@pytest.mark.parametrize(
    "changes", [{"max_seconds": 0}, {"max_seconds": math.inf}, {"frame_rate": 0}, {"typical_seconds": 11}]
)
def test_lengths_that_cannot_be_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match="must be above 0"):
        GeneratorInfo("no tokenizer", **changes)


# ---------------------------------------------------------------------- on disk


def test_saved_and_loaded_is_the_same(generator_folder: Path, tmp_path: Path) -> None:
    first = Generator.from_pretrained(generator_folder)
    assert first.info.provenance == {"name": "tiny"} and first.info.default_seconds == 0.4
    assert not first.training
    first.save_pretrained(tmp_path / "again")
    again = Generator.from_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).stat().st_mode == (tmp_path / "again" / CONFIG).stat().st_mode
    assert again.info == first.info and again.dit.config == first.dit.config
    one, two = (g.sample(embeddings(3), [5], seeds=[4], steps=2)[0] for g in (first, again))
    assert torch.equal(one, two)
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (generator_folder / WEIGHTS).read_bytes()


def test_a_loaded_generator_can_be_trained(saved: Path) -> None:
    generator = Generator.from_pretrained(saved).train()
    text, mask = generator.dit.unconditional(2)
    generator.dit(torch.randn(2, 3, 32), torch.rand(2), text, mask).square().mean().backward()
    assert all(parameter.grad is not None for parameter in generator.dit.parameters())


def test_half_precision_on_disk_keeps_the_statistics(tmp_path: Path) -> None:
    generator = new_generator()
    generator.save_pretrained(tmp_path, torch.float16)
    state = load_file(tmp_path / WEIGHTS)
    assert {name: t.dtype for name, t in state.items() if t.dtype != torch.float16} == {
        "latent_mean": torch.float32,
        "latent_std": torch.float32,
    }
    loaded = Generator.from_pretrained(tmp_path)
    assert loaded.dit.latent_in.weight.dtype == torch.float32
    assert torch.equal(loaded.latent_std, generator.latent_std)


def rewrite(folder: Path, state: dict[str, Tensor]) -> None:
    """Weights put in place of others, with the mark that they belong to the configuration."""
    digest = json.loads((folder / CONFIG).read_text())["weights"]
    save_file(state, folder / WEIGHTS, metadata={"weights": digest})


@pytest.mark.parametrize("key", ["dit.latent_in.weight", "latent_mean"])
def test_missing_weights_are_refused(saved: Path, key: str) -> None:
    state = load_file(saved / WEIGHTS)
    del state[key]
    rewrite(saved, state)
    with pytest.raises(CheckpointError, match=key):
        Generator.from_pretrained(saved)


def test_unknown_misshapen_and_nan_weights_are_refused(saved: Path) -> None:
    state = load_file(saved / WEIGHTS)
    name = "dit.latent_in.weight"
    for changes, message in (
        ({"dit.more": torch.ones(1)}, "1 weights unknown, for example dit.more"),
        ({name: state[name][:-1].clone()}, f"1 weights misshapen, for example {name}"),
        ({name: torch.full_like(state[name], math.nan)}, f"{name} holds NaN"),
        ({"latent_std": torch.full((32,), math.nan)}, "finite"),
    ):
        rewrite(saved, {**state, **changes})
        with pytest.raises(CheckpointError, match=message):
            Generator.from_pretrained(saved)
    rewrite(saved, state)
    Generator.from_pretrained(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "dashengtokenizer"}, "name the folder of a generator"),
        ({"version": 2}, "version 2"),
        ({"dit": {"width": 32}}, "damaged or incomplete"),
        ({"info": {"tokenizer_hash": "x", "colour": "red"}}, "colour"),
        ({"info": {"tokenizer_hash": "x", "max_seconds": "long"}}, "damaged or incomplete"),
        ({"weights": "0"}, "does not belong"),
    ],
)
def test_configurations_of_another_kind_or_version_are_refused(
    saved: Path, changes: dict[str, Any], message: str
) -> None:
    config = json.loads((saved / CONFIG).read_text())
    (saved / CONFIG).write_text(json.dumps(config | changes))
    with pytest.raises(CheckpointError, match=message):
        Generator.from_pretrained(saved)


def test_folders_that_are_no_generator_are_refused(saved: Path, tmp_path: Path, tokenizer_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        Generator.from_pretrained(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="dashengtokenizer-generator"):
        Generator.from_pretrained(tokenizer_folder)
    whole = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        Generator.from_pretrained(saved)
    (saved / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="missing"):
        Generator.from_pretrained(saved)
    (saved / CONFIG).write_text("[1]")
    with pytest.raises(CheckpointError, match="of kind None"):
        Generator.from_pretrained(saved)
    (saved / CONFIG).write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        Generator.from_pretrained(saved)


def test_a_save_that_fails_leaves_the_old_generator(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Generator.from_pretrained(saved).dit.latent_in.weight

    def full_disk(state: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(weights_folder, "save_file", full_disk)
    with pytest.raises(OutputError, match="disk is full"):
        new_generator(seed=1).save_pretrained(saved)
    assert torch.equal(Generator.from_pretrained(saved).dit.latent_in.weight, before)
    assert sorted(path.name for path in saved.iterdir()) == [CONFIG, WEIGHTS]


def test_a_pair_of_two_saves_is_refused(saved: Path, tmp_path: Path) -> None:
    """What a process leaves that is killed between the two renamings."""
    new_generator(seed=1).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / WEIGHTS, saved / WEIGHTS)
    with pytest.raises(CheckpointError, match="cut off"):
        Generator.from_pretrained(saved)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    generator = new_generator()
    with torch.no_grad():
        generator.dit.latent_in.weight[0, 0] = 1e6  # too large for float16
    generator.save_pretrained(tmp_path / "exact")
    with pytest.raises(CheckpointError, match="cannot be saved: dit.latent_in.weight"):
        generator.save_pretrained(tmp_path / "half", torch.float16)
    assert not (tmp_path / "half").exists()


def test_without_a_generator_in_the_package_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator_module, "embedded_generator", lambda: tmp_path / "generator")
    with pytest.raises(CheckpointError, match="ships no trained generator.*--model.*train"):
        Generator.from_pretrained()


# ---------------------------------------------------------------------- pipeline


def test_clips_have_the_length_asked_for(pipeline: TextToAudioPipeline) -> None:
    seconds = [0.1, 0.3333, 1e-6, 0.04]
    clips = pipeline(["a dog", "rain", "a loud bell", "a"], seconds, steps=1)
    assert [len(clip.audio) for clip in clips] == [1600, 5333, 1, 640]
    assert [clip.text for clip in clips] == ["a dog", "rain", "a loud bell", "a"]
    for clip in clips:
        assert clip.sampling_rate == 16000 and clip.audio.dtype == np.float32
        assert bool(np.isfinite(clip.audio).all())
    assert len(pipeline("rain", steps=1)[0].audio) == 6400  # typical_seconds
    assert pipeline([]) == []


def test_a_clip_is_the_same_alone_and_in_any_batch(pipeline: TextToAudioPipeline) -> None:
    texts, seconds, seeds = ["a dog barks twice", "rain", "a loud bell"], [0.5, 0.2, 0.4], [3, 4, 5]
    together = pipeline(texts, seconds, seed=seeds, steps=3)
    in_twos = pipeline(texts, seconds, seed=seeds, steps=3, batch_size=2)
    for index, clip in enumerate(together):
        alone = pipeline(texts[index], seconds[index], seed=seeds[index], steps=3)[0]
        assert np.abs(alone.audio).max() > 0
        for other in (clip, in_twos[index]):
            assert np.allclose(other.audio, alone.audio, rtol=0, atol=1e-4 * np.abs(alone.audio).max())


def test_guidance_zero_ignores_the_text_and_seeds_matter(pipeline: TextToAudioPipeline) -> None:
    free = pipeline(["a dog barks", "rain"], guidance=0, **FAST)
    assert np.allclose(free[0].audio, free[1].audio, atol=1e-4)
    asked = pipeline(["a dog barks", "rain", "rain"], seed=[1, 1, 2], **FAST)
    assert not np.allclose(asked[0].audio, asked[1].audio, atol=1e-3)
    assert not np.allclose(asked[1].audio, asked[2].audio, atol=1e-3)


def test_progress_counts_the_steps_of_all_batches(pipeline: TextToAudioPipeline) -> None:
    shown: list[tuple[int, int]] = []
    pipeline(["a", "dog", "rain"], 0.1, steps=2, batch_size=2, progress=lambda *done: shown.append(done))
    assert shown == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("seconds", [0, -1, 1000, GENERATOR_SECONDS + 0.01, math.nan, math.inf, [0.1, 0]])
def test_lengths_out_of_range_are_refused_with_the_limit(pipeline: TextToAudioPipeline, seconds: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"above 0 and up to {GENERATOR_SECONDS:g} seconds"):
        pipeline(["a dog", "rain"], seconds)


def test_texts_and_settings_that_cannot_be_are_refused(pipeline: TextToAudioPipeline) -> None:
    with pytest.raises(TextError, match="empty"):
        pipeline(["a dog", " \n"], **FAST)
    with pytest.raises(TextError, match="10001 characters"):
        pipeline("a" * 10_001, **FAST)
    with pytest.raises(ConfigurationError, match="3 seeds for 2 texts"):
        pipeline(["a", "dog"], seed=[1, 2, 3], **FAST)
    with pytest.raises(ConfigurationError, match="1 seconds for 2 texts"):
        pipeline(["a", "dog"], [0.1], steps=1)
    with pytest.raises(ConfigurationError, match="batch size 0"):
        pipeline("a", batch_size=0, **FAST)
    with pytest.raises(ConfigurationError, match="at least 1"):
        pipeline("a", 0.1, steps=0)


def test_another_tokenizer_or_text_encoder_is_refused(pipeline: TextToAudioPipeline, generator_folder: Path) -> None:
    needed = pipeline.generator.info.tokenizer
    with pytest.raises(ModelMismatchError, match=f"{needed}.*{pipeline.generator.info.tokenizer_hash[:12]}"):
        TextToAudioPipeline(pipeline.generator, tiny("whisper"), pipeline.text_encoder)

    class Other:
        width, identity, max_tokens = 16, "another", 9

        def __call__(self, texts: Any) -> list[Tensor]:
            return []

    with pytest.raises(ModelMismatchError, match="identity another"):
        TextToAudioPipeline(pipeline.generator, pipeline.tokenizer, Other())


def test_a_tokenizer_that_has_moved_is_named_with_its_hash(tmp_path: Path, tokenizer_folder: Path) -> None:
    info = GeneratorInfo("0123456789abcdef", str(tmp_path / "gone"))
    new_generator(info).save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match="--tokenizer.*0123456789abcdef"):
        TextToAudioPipeline.from_pretrained(tmp_path / "model", device="cpu")
    with pytest.raises(ModelMismatchError):
        TextToAudioPipeline.from_pretrained(tmp_path / "model", tokenizer_folder, device="cpu")
    with pytest.raises(ConfigurationError, match="device"):
        TextToAudioPipeline.from_pretrained(tmp_path / "model", tokenizer_folder, device="abacus")


# ---------------------------------------------------------------------- package


def test_public_names_are_imported_on_first_use() -> None:
    fresh = importlib.util.module_from_spec(importlib.util.find_spec("dasheng_tokenizer.generation"))
    fresh.__spec__.loader.exec_module(fresh)
    assert not set(generation.__all__) & set(vars(fresh))
    assert set(generation.__all__) <= set(dir(fresh))
    for name in generation.__all__:
        assert getattr(fresh, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing"):
        fresh.nothing  # noqa: B018
