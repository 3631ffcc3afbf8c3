"""Training of an enhancer: which batches it sees, that it learns, resumes exactly, and what it refuses."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file

from dasheng_tokenizer import DashengTokenizerModel
from dasheng_tokenizer.cli import main
from dasheng_tokenizer.enhancement.denoiser import Denoiser, DenoiserConfig, DenoiserInfo
from dasheng_tokenizer.enhancement.latent_space import LatentLoss, embed, latent_statistics, whitening
from dasheng_tokenizer.enhancement.training import EnhancementTask, train_enhancer
from dasheng_tokenizer.enhancement.training_configuration import EnhancementConfig
from dasheng_tokenizer.enhancement.training_data import EnhancementBatch, EnhancementCrops, Pairs, open_data
from dasheng_tokenizer.enhancement.training_model import (
    averaged_denoiser,
    load_tokenizer,
    new_denoiser,
)
from dasheng_tokenizer.errors import CheckpointError, ConfigurationError, DataError
from dasheng_tokenizer.training import load_any_recipe, loop, train
from dasheng_tokenizer.training.configuration import build_config, to_plain
from dasheng_tokenizer.training.loop import fit, make_fabric, seed_everything
from dasheng_tokenizer.training.run_checkpoint import list_checkpoints
from dasheng_tokenizer.training.run_log import read_log
from test_vae import tiny_vae

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
SHIPPED = ("enhancement.yaml", "enhancement_valentini.yaml", "enhancement_dns.yaml")
RATE = 16_000

QUIET: dict[str, Any] = {
    **{name: 0.0 for name in ("no_speech", "reverberation", "band_limit", "telephone", "clipping", "codec")},
    "kinds": {"noise": 3.0, "none": 1.0},
    "snr_db": [-5.0, 5.0],
    "gain_db": [-3.0, 0.0],
}
SMALL: dict[str, Any] = {"lr": 3e-3, "betas": [0.9, 0.99], "warmup_steps": 2}


def voice(seed: int, seconds: float) -> np.ndarray:
    """A hum with overtones that comes and goes."""
    rng = np.random.default_rng(seed)
    moment = np.arange(round(seconds * RATE)) / RATE
    pitch = rng.uniform(100, 300)
    hum = sum(np.sin(2 * np.pi * pitch * k * moment + k) / k for k in range(1, 6))
    return (0.15 * hum * (0.55 + 0.45 * np.sin(2 * np.pi * 3 * moment))).astype(np.float32)


def hiss(seed: int, seconds: float) -> np.ndarray:
    return (0.2 * np.random.default_rng(seed).standard_normal(round(seconds * RATE))).astype(np.float32)


def write(path: Path, audio: np.ndarray, labels: Mapping[str, Any] | None = None, rate: int = RATE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, audio, rate, subtype="PCM_16")
    if labels is not None:
        path.with_suffix(".json").write_text(json.dumps(labels))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"))


def write_clips(folder: Path) -> Path:
    """Speech and noise of two splits, told apart by their labels alone."""
    for split, seed in (("train", 0), ("valid", 100)):
        for index in range(6):
            write(folder / split / f"speech-{index}.wav", voice(seed + index, 0.6 + 0.2 * index), {"domain": "speech"})
            write(folder / split / f"noise-{index}.wav", hiss(seed + index, 0.5 + 0.2 * index), {"domain": "sound"})
    return folder


@pytest.fixture
def settings(clips: Path, tokenizer_folder: Path, tmp_path: Path) -> dict[str, Any]:
    return small_run(clips, tokenizer_folder, tmp_path)


def small_run(clips: Path, tokenizer_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings of a run of six steps."""
    sources = {"train": [str(clips / "train")], "valid": [str(clips / "valid")]}
    return {
        "kind": "enhancement",
        "output": str(tmp_path / "run"),
        "steps": 6,
        "tokenizer": str(tokenizer_folder),
        "denoiser": {"depth": 1, "heads": 2},
        "data": {
            "speech": {**sources, "where": {"domain": "speech"}},
            "noise": {**sources, "where": {"domain": "sound"}},
            "cache": str(tmp_path / "cache"),
            "crop_seconds": 0.4,
            "batch_size": 4,
        },
        "mixture": QUIET,
        "optimizer": SMALL,
        "ema_decay": 0.9,
        "log_every": 1,
        "validate_every": 0,
        "accelerator": "cpu",
        "statistics_crops": 24,
        "validation_clips": 3,
        "validation_samples": 1,
    }


def make_config(settings: dict[str, Any], **changes: Any) -> EnhancementConfig:
    """Settings with some replaced; those of a group are replaced one by one."""
    values = dict(settings)
    for name, value in changes.items():
        values[name] = {**values[name], **value} if isinstance(values.get(name), dict) else value
    return build_config(EnhancementConfig, values)


def make_task(config: EnhancementConfig) -> EnhancementTask:
    fabric = make_fabric(config)
    tokenizer = load_tokenizer(config)
    data = open_data(fabric, config)
    seed_everything(config.seed)
    statistics = latent_statistics(tokenizer, config.part, data.train.examples, config.statistics_crops)
    return EnhancementTask(fabric, config, tokenizer, new_denoiser(config, tokenizer, statistics), data, statistics)


def shaken(task: EnhancementTask) -> EnhancementTask:
    """A fresh denoiser changes nothing, which would hide mistakes."""
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in task.denoiser.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=source))
    return task


def same(a: EnhancementBatch, b: EnhancementBatch) -> bool:
    return torch.equal(a.noisy, b.noisy) and torch.equal(a.clean, b.clean)


# ---------------------------------------------------------------------- batches


def test_a_batch_is_a_function_of_the_step(settings: dict[str, Any]) -> None:
    config = make_config(settings)
    crops = open_data(make_fabric(config), config).train
    plain = list(crops.batches(0, 4))
    assert plain[0].noisy.shape == plain[0].clean.shape == (4, 6400)
    ahead = EnhancementCrops(crops.examples, make_config(settings, data={"workers": 2}))
    before = torch.get_rng_state()
    assert all(same(a, b) for a, b in zip(plain[1:], ahead.batches(1, 4), strict=True))
    assert torch.equal(before, torch.get_rng_state())
    assert not any(same(a, b) for a, b in zip(plain[1:], plain[:-1], strict=True))
    other = make_config(settings, seed=1)
    assert not same(open_data(make_fabric(other), other).train.batch(0), plain[0])


def test_ranks_share_the_batch(settings: dict[str, Any]) -> None:
    config = make_config(settings)
    crops = open_data(make_fabric(config), config).train
    whole = crops.batch(7)
    parts = [EnhancementCrops(crops.examples, config, rank, 2).batch(7) for rank in range(2)]
    assert torch.equal(torch.cat([part.noisy for part in parts]), whole.noisy)
    assert torch.equal(torch.cat([part.clean for part in parts]), whole.clean)
    with pytest.raises(ConfigurationError, match="multiple of the 3 processes"):
        EnhancementCrops(crops.examples, config, 0, 3)
    with pytest.raises(ConfigurationError, match="accumulate"):
        EnhancementCrops(crops.examples, make_config(settings, accumulate=4), 0, 2)


def test_speech_and_noise_are_told_apart_by_their_labels(settings: dict[str, Any]) -> None:
    config = make_config(settings)
    data = open_data(make_fabric(config), config)
    train: Any = data.train.examples
    assert {key.partition("-")[0] for key in train.speech.keys} == {"speech"}
    assert {key.partition("-")[0] for key in train.noise.keys} == {"noise"}
    assert data.hours == pytest.approx(sum(0.6 + 0.2 * index for index in range(6)) / 3600)
    noise = data.train.examples.mixture(0)
    assert noise.kind in ("noise", "none")
    cached = list((config.data.cache / "clips").glob("*.audio"))
    assert len(cached) == 2  # train and valid; speech and noise share a part


# ---------------------------------------------------------------------- pairs


def write_pairs(folder: Path, rate: int = RATE, names: tuple[str, ...] = ("p1_1", "p1_2", "p2_1")) -> dict[str, Any]:
    """Folders in the layout of the database of Valentini-Botinhao: files of one name, here with a known difference."""
    for number, name in enumerate(names):
        clean = voice(number, 0.7 + 0.1 * number)
        noisy = clean + 0.5 * hiss(number, len(clean) / RATE)[: len(clean)]
        repeat = rate // RATE
        write(folder / "clean_trainset_28spk_wav" / f"{name}.wav", np.repeat(clean, repeat), rate=rate)
        write(folder / "noisy_trainset_28spk_wav" / f"{name}.wav", np.repeat(noisy, repeat), rate=rate)
    return {side: [str(folder / f"{side}_trainset_28spk_wav")] for side in ("clean", "noisy")}


def test_pairs_are_cropped_alike_and_some_held_out(settings: dict[str, Any], tmp_path: Path) -> None:
    paired = {**write_pairs(tmp_path / "valentini"), "held_out": ["p2_"]}
    config = make_config(settings, data={"paired": paired, "speech": {}, "noise": {}})
    data = open_data(make_fabric(config), config)
    names = {data.train.examples.mixture(index).facts["clip"] for index in range(30)}
    assert names == {"p1_1.wav", "p1_2.wav"}
    assert data.valid is not None and data.valid.mixture(0).facts["clip"] == "p2_1.wav"
    for index in range(4):
        mixture = data.train.examples.mixture(index)
        added = mixture.noisy - mixture.clean
        gain = 10 ** (mixture.facts["gain_db"] / 20)
        assert np.std(added) == pytest.approx(0.1 * gain, rel=0.05)  # and nothing of the voice
        assert abs(np.corrcoef(added, mixture.clean)[0, 1]) < 0.1
        again = data.train.examples.mixture(index)
        assert np.array_equal(again.noisy, mixture.noisy) and mixture.kind == "paired" and mixture.snr_db is None
    long = make_config(settings, data={"paired": paired, "speech": {}, "noise": {}, "crop_seconds": 1.2})
    mixture = open_data(make_fabric(long), long).train.examples.mixture(0)
    assert mixture.noisy.shape == (19_200,) and not mixture.noisy[13_000:].any() and mixture.noisy[:11_000].any()


def test_pairs_that_do_not_fit_are_named(settings: dict[str, Any], tmp_path: Path) -> None:
    paired = write_pairs(tmp_path / "a")
    noisy = tmp_path / "a" / "noisy_trainset_28spk_wav"

    def opened(**changes: Any) -> Pairs:
        config = make_config(settings, data={"paired": {**paired, **changes}, "speech": {}, "noise": {}})
        examples = open_data(make_fabric(config), config).train.examples
        assert isinstance(examples, Pairs)
        return examples

    with pytest.raises(DataError, match="held_out: no name begins with any of q"):
        opened(held_out=["q"])
    with pytest.raises(DataError, match="no pairs"):
        opened(held_out=["p"])
    write(noisy / "p2_1.wav", hiss(0, 0.5))
    with pytest.raises(DataError, match=r"p2_1\.wav has 14400 clean and 8000 noisy"):
        opened()
    (noisy / "p2_1.wav").unlink()
    with pytest.raises(DataError, match=r"p2_1\.wav has no noisy recording"):
        opened()
    with pytest.raises(ConfigurationError, match="both, clean and noisy"):
        make_config(settings, data={"paired": {"clean": ["x"]}, "speech": {}})
    with pytest.raises(ConfigurationError, match=r"drop data\.paired or data\.speech"):
        make_config(settings, data={"paired": paired})


# ---------------------------------------------------------------------- embeddings and the objective


def test_parts_add_up_to_the_latent(tiny_model: DashengTokenizerModel) -> None:
    audio = 0.1 * torch.randn(2, 6400, generator=torch.Generator().manual_seed(0))
    semantic, acoustic, unified = (embed(tiny_model, audio, part) for part in ("semantic", "acoustic", "unified"))
    torch.testing.assert_close(semantic + acoustic, unified)
    torch.testing.assert_close(unified, tiny_model.encode(audio).detach())
    assert not unified.requires_grad and unified.shape == (2, 10, 32)


def test_statistics_are_those_of_the_clean_latents(settings: dict[str, Any]) -> None:
    config = make_config(settings, part="semantic")
    tokenizer, examples = load_tokenizer(config), open_data(make_fabric(config), config).train.examples
    found = latent_statistics(tokenizer, "semantic", examples, 20)
    clean = torch.from_numpy(np.stack([examples.mixture(place).clean for place in range(20)]))
    for part, measured in (("unified", found[:3]), ("semantic", found[3:])):
        tokens = embed(tokenizer, clean, part).flatten(0, 1)
        torch.testing.assert_close(measured[0], tokens.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(measured[1], tokens.std(0, correction=0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(measured[2], torch.corrcoef(tokens.T), rtol=0, atol=1e-3)
    first = latent_statistics(tokenizer, "unified", examples, 4)
    assert torch.equal(first.mean, first.input_mean) and not torch.equal(first.mean, found.mean)


def test_whitening_brings_directions_together_and_keeps_the_mean_variance() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(4000, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    tokens = tokens / tokens.std(0)
    correlation = torch.corrcoef(tokens.T)
    before = torch.linalg.eigvalsh(correlation)
    for strength in (0.0, 0.5, 1.0):
        matrix = whitening(correlation.float(), strength).double()
        after = torch.linalg.eigvalsh(matrix.T @ correlation @ matrix)
        torch.testing.assert_close(
            after / after.mean(), before ** (1 - strength) / (before ** (1 - strength)).mean(), rtol=1e-3, atol=1e-3
        )
        assert float(after.mean()) == pytest.approx(float(before.mean()), rel=1e-3)
    still = torch.block_diag(correlation, torch.zeros(1, 1, dtype=torch.float64))  # a dimension that never changes
    assert torch.isfinite(whitening(still.float(), 1.0)).all()


def test_the_loss_hears_quiet_directions_by_the_whitening(settings: dict[str, Any]) -> None:
    clean = torch.zeros(1, 1, 2)
    loud, quiet = torch.tensor([[[0.5, 0.5]]]), torch.tensor([[[0.5, -0.5]]])
    correlation = torch.tensor([[1.0, 0.98], [0.98, 1.0]])
    plain, white = (LatentLoss(whitening(correlation, strength)) for strength in (0.0, 1.0))
    assert float(plain(loud, clean)) == pytest.approx(float(plain(quiet, clean)))
    assert float(white(quiet, clean)) > 5 * float(white(loud, clean))
    task = make_task(make_config(settings, whitening=1.0))
    assert torch.equal(task.latent_loss.basis, task.denoiser.project_in.weight)  # of the whole latent both see one
    assert not torch.equal(
        make_task(make_config(settings, whitening=0.0)).denoiser.project_in.weight, task.latent_loss.basis
    )


def test_a_fresh_denoiser_scores_as_the_noisy_latent(settings: dict[str, Any]) -> None:
    task = make_task(make_config(settings, whitening=0.0))
    batch = task.data.train.batch(0)
    noisy, clean = (
        task.denoiser.standardize_target(task.tokenizer.encode(side)) for side in (batch.noisy, batch.clean)
    )
    expected = F.smooth_l1_loss(noisy, clean)
    losses = task.losses(batch)
    torch.testing.assert_close(losses["latent"], expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(losses["latent"], losses["loss"]) and set(losses) == {"loss", "latent"}


def test_the_spectral_term_is_heard_through_the_decoder(settings: dict[str, Any]) -> None:
    task = make_task(make_config(settings, loss_weights={"latent": 2.0, "spectral": 3.0}))
    batch = task.data.train.batch(0)
    losses = task.losses(batch)
    decoded = task.tokenizer.decode(task.tokenizer.encode(batch.noisy))
    torch.testing.assert_close(losses["spectral"], task.mel(decoded, batch.clean), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(losses["loss"], 2 * losses["latent"] + 3 * losses["spectral"])
    alone = make_task(make_config(settings, loss_weights={"latent": 0.0, "spectral": 1.0}))
    losses = alone.losses(batch)
    assert set(losses) == {"loss", "spectral"}
    losses["loss"].backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in alone.denoiser.parameters())
    assert all(p.grad is None for p in alone.tokenizer.parameters())


def test_accumulated_parts_equal_the_whole_batch(settings: dict[str, Any]) -> None:
    tasks = [shaken(make_task(make_config(settings, accumulate=parts))) for parts in (1, 2)]
    for step in range(2):
        results = [task.training_step(task.data.train.batch(step), step) for task in tasks]
        for name in ("loss", "latent", "grad_norm"):
            torch.testing.assert_close(results[1].losses[name], results[0].losses[name], rtol=1e-4, atol=1e-5)


def test_a_step_without_a_finite_gradient_is_skipped(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(make_config(settings))
    before = [parameter.clone() for parameter in task.denoiser.parameters()]
    with monkeypatch.context() as patch:
        patch.setattr(task, "_latent_loss", lambda estimate, clean: (estimate - clean).mean() * float("nan"))
        assert not task.training_step(task.data.train.batch(0), 0).applied
    assert all(torch.equal(a, b) for a, b in zip(before, task.denoiser.parameters(), strict=True))
    assert task.training_step(task.data.train.batch(1), 1).applied


def test_mixed_precision_gives_nearly_the_same_step(settings: dict[str, Any]) -> None:
    results = []
    for precision in ("32-true", "bf16-mixed"):
        task = shaken(make_task(make_config(settings, precision=precision)))
        results.append(task.training_step(task.data.train.batch(0), 0).losses)
        assert all(parameter.dtype == torch.float32 for parameter in task.denoiser.parameters())
    assert float(results[1]["loss"]) == pytest.approx(float(results[0]["loss"]), rel=0.05)


# ---------------------------------------------------------------------- whole runs


def test_it_learns_to_denoise_and_leaves_the_tokenizer_alone(settings: dict[str, Any], tokenizer_folder: Path) -> None:
    config = make_config(settings, steps=120, log_every=10)
    before = DashengTokenizerModel.from_pretrained(tokenizer_folder).weights_hash()
    task = make_task(config)
    assert fit(task.fabric, task, config)
    assert task.tokenizer.weights_hash() == before
    measured = json.loads((config.output / "summary.json").read_text())["validation"]
    assert measured["latent"] < 0.6 * measured["latent_noisy"]
    assert measured["latent_noise"] < 0.6 * measured["latent_noisy"]
    denoiser = Denoiser.from_pretrained(config.output / "model")
    assert task.data.valid is not None
    mixture = task.data.valid.mixture(1)
    noisy, clean = (
        embed(task.tokenizer, torch.from_numpy(side)[None], "unified") for side in (mixture.noisy, mixture.clean)
    )
    standardize = denoiser.standardize_target
    with torch.no_grad():
        errors = [F.smooth_l1_loss(standardize(held), standardize(clean)) for held in (denoiser(noisy), noisy)]
    assert mixture.kind == "noise" and errors[0] < 0.6 * errors[1]


@pytest.mark.parametrize("part", ["semantic", "acoustic"])
def test_a_part_of_the_latent_can_be_the_input(settings: dict[str, Any], part: str) -> None:
    config = make_config(settings, part=part, steps=40, log_every=5)
    folder = train_enhancer(config)
    losses = [record["loss"] for record in read_log(folder / "log.jsonl", "train")]
    assert np.mean(losses[-2:]) < 0.9 * losses[0]
    info = Denoiser.from_pretrained(folder / "model").info
    assert info.part == part


def test_a_vae_can_be_the_tokenizer(settings: dict[str, Any], tmp_path: Path) -> None:
    tiny_vae().save_pretrained(tmp_path / "vae")
    config = make_config(settings, tokenizer=str(tmp_path / "vae"), steps=2)
    denoiser = Denoiser.from_pretrained(train_enhancer(config) / "model")
    assert denoiser.config.latent_dim == 8
    with pytest.raises(ConfigurationError, match="VAE.*semantic part"):
        train_enhancer(make_config(settings, tokenizer=str(tmp_path / "vae"), part="semantic"))


def test_the_result_says_what_it_belongs_to(settings: dict[str, Any], tokenizer_folder: Path) -> None:
    config = make_config(settings, steps=2)
    info = Denoiser.from_pretrained(train_enhancer(config) / "model").info
    assert info.tokenizer_hash == DashengTokenizerModel.from_pretrained(tokenizer_folder).weights_hash()
    assert (info.tokenizer, info.part, info.frame_rate) == (str(tokenizer_folder), "unified", 25.0)
    assert info.window_seconds == 0.4 and info.provenance["steps"] == 2


def test_the_average_is_what_is_kept_and_any_checkpoint_can_be_taken(settings: dict[str, Any]) -> None:
    config = make_config(settings, steps=4, checkpoint_every=2, keep_checkpoints=2)
    task = make_task(config)
    assert fit(task.fabric, task, config)
    saved = load_file(config.output / "model" / "model.safetensors")
    averaged = task.average.state_dict()
    assert all(torch.equal(saved[name], value) for name, value in averaged.items())
    assert any(not torch.equal(saved[name], value) for name, value in task.denoiser.named_parameters())
    middle, last = list_checkpoints(config.output / "checkpoints")
    exported = averaged_denoiser(config, last).state_dict()
    assert exported.keys() == saved.keys() and all(torch.equal(exported[name], saved[name]) for name in saved)
    earlier = averaged_denoiser(config, middle)
    assert earlier.info.provenance["steps"] == 2
    assert any(not torch.equal(value, saved[name]) for name, value in earlier.state_dict().items())
    with pytest.raises(CheckpointError, match="another recipe"):
        averaged_denoiser(make_config(settings, denoiser={"depth": 2}), last)
    (last / "tensors.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="damaged"):
        averaged_denoiser(config, last)


def test_validation_hangs_on_the_weights_alone(settings: dict[str, Any]) -> None:
    tasks = [shaken(make_task(make_config(settings, seed=seed))) for seed in (0, 1)]
    for task in tasks:
        task.denoiser.load_state_dict(tasks[0].denoiser.state_dict())
        task.latent_loss.load_state_dict(tasks[0].latent_loss.state_dict())
        task.average.values = [parameter.detach().clone() for parameter in task.denoiser.parameters()]
    log: Any = loop.RunLog(Path("nowhere"), 0, active=False)
    metrics = [task.validate(0, log) for task in (tasks[0], tasks[0], tasks[1])]
    assert metrics[0] == metrics[1] == metrics[2]
    assert {"latent", "latent_noisy", "mel", "mel_noisy"} <= set(metrics[0])
    assert tasks[0].denoiser.training
    without = make_task(make_config(settings, validation_clips=0))
    assert without.validate(0, log) == {}


def test_validation_tells_what_is_left_where_nobody_speaks(settings: dict[str, Any]) -> None:
    silent = make_task(make_config(settings, mixture={"no_speech": 1.0, "kinds": {"noise": 1.0}}))
    log: Any = loop.RunLog(Path("nowhere"), 0, active=False)
    metrics = silent.validate(0, log)
    assert set(metrics) == {"latent", "latent_noise", "latent_noisy", "residual_db", "residual_db_noisy"}
    assert silent.data.valid is not None
    levels = [10 * np.log10(np.square(silent.data.valid.mixture(place).noisy).mean()) for place in range(3)]
    assert metrics["residual_db_noisy"] == pytest.approx(np.mean(levels), abs=0.01)


def test_a_stopped_run_resumes_to_the_same_weights(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_config(settings)
    train_enhancer(whole)
    config = make_config(settings, output=str(whole.output.with_name("stopped")))
    task = make_task(config)
    original = task.training_step

    def interrupted(batch: EnhancementBatch, step: int) -> Any:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(batch, step)

    task.training_step = interrupted  # type: ignore[method-assign]
    assert not fit(task.fabric, task, config)
    torch.manual_seed(99)

    def forbidden(*_: object) -> None:
        raise AssertionError("statistics taken again")

    monkeypatch.setattr("dasheng_tokenizer.enhancement.training.latent_statistics", forbidden)
    train_enhancer(config)
    saved = [load_file(run.output / "model" / "model.safetensors") for run in (whole, config)]
    assert all(torch.equal(saved[1][name], value) for name, value in saved[0].items())
    logs = [[(r["step"], r["loss"]) for r in read_log(run.output / "log.jsonl", "train")] for run in (whole, config)]
    assert logs[0] == logs[1]


def test_a_finished_run_says_so(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(settings, steps=1)
    train_enhancer(config)
    capsys.readouterr()
    train_enhancer(config)
    assert "is finished" in capsys.readouterr().out


# ---------------------------------------------------------------------- refusals


def test_settings_of_another_run_are_refused(settings: dict[str, Any]) -> None:
    train_enhancer(make_config(settings, steps=1))
    for changes, named in (
        ({"part": "acoustic"}, "part"),
        ({"mixture": {"snr_db": [0.0, 5.0]}}, "mixture.snr_db"),
        ({"denoiser": {"depth": 2}}, "denoiser.depth"),
        ({"data": {"batch_size": 2}}, "data.batch_size"),
    ):
        with pytest.raises(ConfigurationError, match=f"another run.*{named}"):
            train_enhancer(make_config(settings, steps=2, **changes))


def test_unusable_data_is_refused_by_name(settings: dict[str, Any], clips: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.speech\.train names no speech"):
        train_enhancer(make_config(settings, data={"speech": {}}))
    with pytest.raises(DataError, match="nowhere"):
        train_enhancer(make_config(settings, data={"speech": {"train": ["nowhere"]}}))
    with pytest.raises(DataError, match=r"none of 12 clips has.*opera"):
        train_enhancer(
            make_config(settings, data={"speech": {"train": [str(clips / "train")], "where": {"domain": "opera"}}})
        )
    with pytest.raises(ConfigurationError, match=r"data\.music names nothing"):
        train_enhancer(make_config(settings, mixture={"kinds": {"music": 1.0}}))
    with pytest.raises(CheckpointError, match="nowhere"):
        train_enhancer(make_config(settings, tokenizer=str(tmp_path / "nowhere")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {crop_second: 5}", "'data.crop_seconds'"),
        ("data: {speech: {trian: [a]}}", "'data.speech.train'"),
        ("mixture: {snr: [0, 5]}", "'mixture.snr_db'"),
        ("mixture: {rooms: {counts: 5}}", "'mixture.rooms.count'"),
        ("mixture: {reverberation: 2}", "mixture.reverberation"),
        ("mixture: {kinds: {rain: 1}}", "'rain'"),
        ("denoiser: {dept: 4}", "'denoiser.depth'"),
        ("part: both", "'unified', 'semantic', 'acoustic'"),
        ("loss_weights: {latent: 0}", "loss_weights.latent"),
        ("loss_weights: {mel: 1}", "unknown key 'loss_weights.mel'"),
        ("data: {crop_seconds: 0.5}", "data.crop_seconds"),
        ("data: {crop_seconds: .nan}", "data.crop_seconds"),
        ("data: {batch_size: 0}", "data.batch_size"),
        ("data: {workers: -1}", "data.workers"),
        ("data: {batch_size: 5}\naccumulate: 2", "accumulate"),
        ("data: {speech: {train: [a], valid: [b]}, noise: {train: [c]}}", "data.noise.valid"),
        ("statistics_crops: 0", "statistics_crops"),
        ("whitening: 1.5", "whitening"),
        ("validation_clips: -1", "validation_clips"),
        ("seed: -1", "seed"),
        ("steps: 0", "steps"),
    ],
)
def test_wrong_recipes_are_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"kind: enhancement\n{text}\n")
    with pytest.raises(ConfigurationError) as error:
        load_any_recipe(path)
    assert message in str(error.value) and str(path) in str(error.value)


def test_the_kind_decides_what_is_trained(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("steps: 5\n")
    assert isinstance(load_any_recipe(path, ["kind=enhancement"]), EnhancementConfig)
    with pytest.raises(ConfigurationError, match="'generator' or 'enhancement', not 'denoiser'"):
        load_any_recipe(path, ["kind=denoiser"])


def test_training_imports_no_enhancement_before_a_recipe_asks_for_it() -> None:
    for file in sorted(Path(loop.__file__).parent.glob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:  # of the module, not of its functions
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.startswith("dasheng_tokenizer.enhancement") for name in names), file.name


# ---------------------------------------------------------------------- shipped recipes


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_survive_a_round_trip(name: str) -> None:
    config = load_any_recipe(RECIPES / name)
    assert isinstance(config, EnhancementConfig)
    assert build_config(EnhancementConfig, yaml.safe_load(yaml.safe_dump(to_plain(config)))) == config


@pytest.mark.parametrize(("name", "width", "millions"), [(SHIPPED[0], 384, 5.6), *((n, 1280, 80) for n in SHIPPED[1:])])
def test_shipped_denoisers_are_of_the_size_that_is_told(name: str, width: int, millions: float) -> None:
    config = load_any_recipe(RECIPES / name)
    assert isinstance(config, EnhancementConfig)
    sizes = DenoiserConfig(latent_dim=width, depth=config.denoiser.depth, heads=config.denoiser.heads)
    denoiser = Denoiser(sizes, DenoiserInfo("none", window_seconds=1.0), *[torch.zeros(width), torch.ones(width)] * 2)
    assert sum(p.numel() for p in denoiser.parameters()) / 1e6 == pytest.approx(millions, rel=0.05)


def write_corpus(folder: Path) -> None:
    """Shards named and labelled as the corpus of recipes/enhancement.yaml."""
    import tarfile

    made = folder / "made"
    for split, seed in (("train", 0), ("valid", 50)):
        for domain, sound in (("speech", voice), ("sound", hiss), ("music", voice), ("instrument", voice)):
            path = folder / "shared" / "corpus" / f"{domain}-{split}-000.tar"
            path.parent.mkdir(parents=True, exist_ok=True)
            with tarfile.open(path, "w") as archive:
                for index in range(3):
                    stem = made / f"{domain}-{split}-{index:05}"
                    write(stem.with_suffix(".flac"), sound(seed + index, 0.8), {"domain": domain})
                    for suffix in (".flac", ".json"):
                        archive.add(stem.with_suffix(suffix), stem.name + suffix)


def write_valentini(folder: Path) -> None:
    names = ("p226_001", "p227_001", "p227_002", "p287_001")
    write_pairs(folder / "data" / "valentini", 48_000, names)


def write_dns(folder: Path) -> None:
    for root, seed in (("datasets", 0), ("held_out", 10)):
        for index in range(3):
            write(folder / "data" / "dns" / root / "clean" / "read" / f"book_{index}.wav", voice(seed + index, 1.5))
            write(folder / "data" / "dns" / root / "noise" / f"fan_{index}.wav", hiss(seed + index, 0.9))
    response = hiss(0, 0.3) * np.exp(-np.arange(4800) / 800).astype(np.float32)
    response[:200], response[200] = 0, 0.9
    rooms = folder / "data" / "dns" / "datasets" / "impulse_responses"
    write(rooms / "SLR26" / "small.wav", response)
    write(rooms / "SLR28" / "pair.wav", np.stack([response, 0.5 * response], axis=1))


@pytest.mark.parametrize(
    ("name", "layout", "kinds"),
    [(SHIPPED[0], write_corpus, None), (SHIPPED[1], write_valentini, "paired"), (SHIPPED[2], write_dns, "noise")],
    ids=["corpus", "valentini", "dns"],
)
def test_shipped_recipes_run_on_data_of_their_layout(
    name: str, layout: Any, kinds: str | None, tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real recipe, its paths and layout, with a tiny tokenizer and few steps."""
    layout(tmp_path)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work" if name == SHIPPED[0] else tmp_path)
    overrides = [
        "output=run", f"tokenizer={tokenizer_folder}", "steps=2", "data.crop_seconds=0.8", "data.batch_size=2",
        "data.workers=0", "denoiser.depth=1", "denoiser.heads=2", "statistics_crops=2", "validation_clips=2",
        "accelerator=cpu", "devices=1", "strategy=auto", "precision=32-true", "log_every=1",
    ]  # fmt: skip
    if name == SHIPPED[0]:  # simulating rooms is tested with the rooms
        overrides += ["mixture.reverberation=0", "mixture.codecs=[ulaw]"]
    assert main(["train", "--config", str(RECIPES / name), *overrides]) == 0
    denoiser = Denoiser.from_pretrained("run/model")
    assert denoiser.info.tokenizer == str(tokenizer_folder) and denoiser.info.window_seconds == 0.8
    summary = json.loads(Path("run/summary.json").read_text())
    assert {"latent", "latent_noisy"} <= set(summary["validation"])
    if kinds is not None:
        assert f"latent_{kinds}" in summary["validation"]


# ---------------------------------------------------------------------- processes


def write_recipe(folder: Path, settings: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(to_plain(make_config(settings))))
    return path


def command(recipe: Path, overrides: list[str]) -> list[str]:
    script = recipe.parent / "run_training.py"
    script.write_text("import sys; from dasheng_tokenizer.training import train; train(sys.argv[1], sys.argv[2:])")
    return [str(script), str(recipe), *overrides]


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(settings: dict[str, Any], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, settings)
    changes = ["steps=60", "checkpoint_every=5", "data.workers=1"]
    whole = train(recipe, [*changes, f"output={tmp_path / 'whole'}"])
    overrides = [*changes, f"output={tmp_path / 'killed'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, *command(recipe, overrides)], env=environment)
    while not list_checkpoints(tmp_path / "killed" / "checkpoints") and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list_checkpoints(tmp_path / "killed" / "checkpoints")
    assert not (tmp_path / "killed" / "summary.json").exists()
    killed = train(recipe, overrides)
    assert [record["step"] for record in read_log(killed / "log.jsonl", "train")] == list(range(1, 61))
    a, b = (load_file(folder / "model" / "model.safetensors") for folder in (whole, killed))
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_processes_give_the_loss_curve_of_one(settings: dict[str, Any], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, settings)
    one = train(recipe, [f"output={tmp_path / 'one'}"])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    two = tmp_path / "two"
    overrides = [f"output={two}", f"data.cache={tmp_path / 'cache-of-two'}"]
    subprocess.run([*launcher, *command(recipe, overrides)], env=environment, check=True)
    for kind in ("train", "validation"):
        curves = [read_log(folder / "log.jsonl", kind) for folder in (one, two)]
        assert len(curves[0]) == len(curves[1]) > 0
        for a, b in zip(*curves, strict=True):
            name = "loss" if kind == "train" else "latent"
            assert b[name] == pytest.approx(a[name], rel=1e-3)
            assert b["audio_hours"] == pytest.approx(a["audio_hours"])
