"""Water-filling of the acoustic layer: what theory promises, through the layer norm, whole and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor

from dasheng_tokenizer import DashengTokenizerModel
from dasheng_tokenizer.errors import ConfigurationError, DataError
from dasheng_tokenizer.spectral import with_context
from dasheng_tokenizer.training import train
from dasheng_tokenizer.training.acoustic_start import AcousticStartConfig, start_acoustic_layer, water_filling
from dasheng_tokenizer.training.configuration import build_config
from dasheng_tokenizer.training.loop import make_fabric
from test_training_loop import MemoryData, TrainingConfig, settings

pytestmark = pytest.mark.usefixtures("one_thread")

D, K, N = 24, 40, 6000


def gaussian(size: int, fall: float, seed: int) -> Tensor:
    """(N, size) rows whose principal components have standard deviations of 3, 3·fall, …, in random directions."""
    source = torch.Generator().manual_seed(seed)
    turned = torch.linalg.qr(torch.randn(size, size, generator=source, dtype=torch.float64))[0]
    scales = 3 * fall ** torch.arange(size, dtype=torch.float64)
    return torch.randn(N, size, generator=source, dtype=torch.float64) * scales @ turned.T


PATCHES, SEMANTIC = gaussian(K, 0.8, 1), gaussian(D, 0.75, 2)


def coded(power: float, offset: float) -> Tensor:
    """(N, D) acoustic embeddings of the patches, through the layer norm."""
    weight, constant, gain = water_filling(torch.cov(PATCHES.T), torch.cov(SEMANTIC.T), power, offset)
    acoustic = F.layer_norm(PATCHES @ weight.T + constant, (D,)) * gain
    return acoustic - acoustic.mean(0)


def linear_error(seen: Tensor) -> float:
    """Mean squared error of the best linear estimate of the patches, summed over their dimensions."""
    seen, wanted = seen - seen.mean(0), PATCHES - PATCHES.mean(0)
    solution = torch.linalg.lstsq(seen, wanted).solution
    return float((seen @ solution - wanted).square().sum(1).mean())


def bound(noise: Tensor, variance: Tensor, power: float) -> float:
    """Error of the best linear code of a power into channels with such noise, water-filled by trying many levels."""
    count = len(noise)
    levels = torch.logspace(-12, 3, 4000, dtype=torch.float64)
    shares = ((variance[:count] * noise / levels[:, None]).sqrt() - noise).clamp(min=0.0)
    best = shares[(shares.sum(1) - power).abs().argmin()]
    return float((variance[:count] * noise / (noise + best)).sum() + variance[count:].sum())


@pytest.mark.parametrize("power", [0.2, 1.0, 4.0])
def test_its_error_is_that_of_theory(power: float) -> None:
    acoustic = coded(power, offset=300.0)
    allowed = power * float(torch.cov(SEMANTIC.T).trace())
    assert float(acoustic.var(0).sum()) == pytest.approx(allowed, rel=0.02)
    noise = torch.linalg.eigvalsh(torch.cov(SEMANTIC.T))  # ascending
    variance = torch.linalg.eigvalsh(torch.cov(PATCHES.T)).flip(0)
    # Two directions go to the constant and to what the norm takes out: at worst, the two quietest.
    limits = [bound(noise[lost:], variance, allowed) for lost in (0, 2)]
    assert 0.99 * limits[0] < linear_error(SEMANTIC + acoustic) < 1.02 * limits[1]


def test_it_beats_a_random_layer_by_far_and_more_power_helps() -> None:
    source = torch.Generator().manual_seed(3)
    random = F.layer_norm(PATCHES @ torch.randn(K, D, generator=source, dtype=torch.float64), (D,))
    random = random * (float(coded(1.0, 5.0).var(0).sum()) / float(random.var(0).sum())) ** 0.5
    errors = [linear_error(SEMANTIC + acoustic) for acoustic in (random, *(coded(power, 5.0) for power in (0.5, 1, 2)))]
    assert errors[2] < 0.25 * errors[0] and errors[1] > errors[2] > errors[3]


def test_the_constant_is_what_makes_the_layer_norm_linear() -> None:
    assert linear_error(coded(1.0, 10.0)) < 0.5 * linear_error(coded(1.0, 0.0))


def test_what_is_loud_in_the_semantic_embedding_stays_semantic() -> None:
    loudest = torch.linalg.eigh(torch.cov(SEMANTIC.T))[1][:, -2:]
    acoustic = coded(0.5, 20.0)
    assert float((acoustic @ loudest).square().mean()) < 1e-3 * float((SEMANTIC @ loudest).square().mean())


# ---------------------------------------------------------------------- a model


def patches_and_latents(model: DashengTokenizerModel, steps: int = 4) -> tuple[Tensor, Tensor]:
    audio = torch.cat([MemoryData().batch(step).audio for step in range(steps)])
    log_mel = model.injection.front_end(audio, 32)
    patches = log_mel.unflatten(-1, (-1, 4)).transpose(1, 2).flatten(2).flatten(0, 1)
    latents = model.encode_semantic(audio) + model.encode_acoustic(audio)
    return patches.detach(), latents.detach().flatten(0, 1)


def test_a_model_gets_a_layer_that_tells_more_of_the_spectrogram(tmp_path: Path, tiny_model: Any) -> None:
    def error() -> float:
        patches, latents = (rows.double() - rows.double().mean(0) for rows in patches_and_latents(tiny_model))
        return float((latents @ torch.linalg.lstsq(latents, patches).solution - patches).square().mean())

    before = error()
    fabric = make_fabric(settings(tmp_path))
    start_acoustic_layer(fabric, tiny_model, MemoryData(), AcousticStartConfig("water_filling", tokens=128))
    assert error() < 0.6 * before
    audio = torch.cat([MemoryData().batch(step).audio for step in range(4)])
    acoustic = tiny_model.encode_acoustic(audio).detach().flatten(0, 1)
    semantic = tiny_model.encode_semantic(audio).flatten(0, 1)
    assert acoustic.mean(0).abs().max() < 1e-3 * acoustic.norm(dim=1).mean()
    assert float(acoustic.var(0).sum()) == pytest.approx(2 * float(semantic.var(0).sum()), rel=0.15)


def test_silent_or_little_data_is_refused(tmp_path: Path, tiny_model: Any) -> None:
    fabric, start = make_fabric(settings(tmp_path)), AcousticStartConfig("water_filling", tokens=16)
    with pytest.raises(DataError, match="more tokens than the latent"):
        start_acoustic_layer(fabric, tiny_model, MemoryData(size=1, tokens=4), start)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"acoustic_start": {"power": 0.0}}, "power 0.0"),
        ({"acoustic_start": {"offset": -1.0}}, "offset -1.0"),
        ({"acoustic_start": {"tokens": 0}}, "tokens 0"),
        ({"acoustic_start": {"kind": "water_filling"}, "init": "somewhere"}, "brings its own acoustic layer"),
        ({"freeze_acoustic": True, "model": {"latent_kind": "vae"}}, "a VAE has no acoustic layer"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build_config(TrainingConfig, changes)


RECIPE = """
model: {embed_dim: 32, depth: 1, num_heads: 2, decoder_embed_dim: 32, decoder_depth: 1, decoder_intermediate_size: 48}
acoustic_start: {kind: water_filling, tokens: 200}
freeze_acoustic: true
loss_weights: {mel: 5.0, semantic: 0.0}
gan_start_step: 100
optimizer: {lr: 2.0e-3, warmup_steps: 1}
checkpoint_every: 2
validate_every: 0
validation_clips: 0
accelerator: cpu
data: {batch_size: 4, crop_seconds: 0.32}
"""


def test_a_run_keeps_a_frozen_layer_and_finds_it_again(tmp_path: Path) -> None:
    """Also where the data has changed since: a resumed run takes the layer from its checkpoint."""
    for name, seed in (("first", 0), ("second", 1)):
        (tmp_path / name).mkdir()
        rng = np.random.default_rng(seed)
        for index in range(6):
            audio = 0.1 * np.cumsum(rng.standard_normal(16_000)) / 50 + 0.05 * rng.standard_normal(16_000)
            soundfile.write(tmp_path / name / f"{index}.wav", np.clip(audio, -1, 1), 16_000)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    held = []
    for steps, name in ((2, "first"), (4, "second")):
        data = [
            f"data.train=[{tmp_path / name}]",
            f"data.valid=[{tmp_path / name}]",
            f"data.cache={tmp_path / 'cache'}",
        ]
        run = train(recipe, [*data, f"steps={steps}", f"output={tmp_path / 'run'}"])
        held.append(DashengTokenizerModel.from_pretrained(run / "model"))
    for layer in ("patch_embed", "norm"):
        first, second = (getattr(model.encoder, layer).state_dict() for model in held)
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(held[0].upsampler.weight, held[1].upsampler.weight)
    audio = torch.randn(1, 6400) * 0.1
    parts = held[1].encode_acoustic(with_context(audio, 10))
    assert torch.isfinite(parts).all()
