"""The training loop on a tiny model: it learns, resumes exactly, is the same on two processes, and survives NaN."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from torch import Tensor

from dasheng_tokenizer import DashengTokenizerConfig, DashengTokenizerModel
from dasheng_tokenizer.errors import CheckpointError, ConfigurationError, OutputError
from dasheng_tokenizer.training import loop, train
from dasheng_tokenizer.training.configuration import (
    DiscriminatorConfig,
    LossWeights,
    OptimizerConfig,
    TrainingConfig,
)
from dasheng_tokenizer.training.data import Batch
from dasheng_tokenizer.training.feature_statistics import set_feature_statistics
from dasheng_tokenizer.training.loop import Progress, fit, make_fabric
from dasheng_tokenizer.training.losses import MultiScaleMelLoss
from dasheng_tokenizer.training.optimization import ExponentialMovingAverage, learning_rate
from dasheng_tokenizer.training.run_checkpoint import list_checkpoints, save_checkpoint
from dasheng_tokenizer.training.run_log import read_log, truncate_log
from dasheng_tokenizer.training.tokenizer_task import TokenizerTask

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {
    "embed_dim": 32,
    "depth": 1,
    "num_heads": 2,
    "decoder_embed_dim": 32,
    "decoder_depth": 2,
    "decoder_intermediate_size": 48,
}

# Without the STFT loss: its logarithm makes the gradient hang on the last bits of near-silent bins, which would blur
# the comparison of runs.
RECIPE = f"""
model: {json.dumps({**SIZES, "normalize_semantic": True})}
loss_weights: {{mel: 5, stft: 0, semantic: 0.1, adversarial: 1, feature_matching: 1}}
gan_start_step: 4
discriminator: {{multi_frequency_options: {{channels: 4}}, optimizer: {{lr: 1e-3, warmup_steps: 2}}}}
optimizer: {{lr: 2e-3, warmup_steps: 3}}
ema_decay: 0.9
clip_grad_norm: 10
steps: 30
log_every: 1
checkpoint_every: 4
validate_every: 0
validation_clips: 2
validation_samples: 1
accelerator: cpu
data: {{batch_size: 4, crop_seconds: 0.32}}
"""


class MemoryData:
    """Batches of noisy harmonic tones, a function of the step alone; chosen steps hold a NaN."""

    def __init__(self, broken: tuple[int, ...] = (), size: int = 4, tokens: int = 8) -> None:
        self.broken, self.size, self.tokens = broken, size, tokens

    def batch(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(step % 4)
        samples = 640 * self.tokens + 1024
        time_axis = torch.arange(samples) / 16000
        pitch = 200 + 600 * torch.rand(self.size, 1, generator=generator)
        audio = sum(torch.sin(2 * torch.pi * k * pitch * time_axis) / k for k in (1, 2, 3))
        audio = 0.2 * audio + 0.005 * torch.randn(self.size, samples, generator=generator)
        if step in self.broken:
            audio[1, 700] = float("nan")
        return Batch(audio, None)

    def batches(self, first_step: int, steps: int) -> Iterator[Batch]:
        return (self.batch(step) for step in range(first_step, first_step + steps))


def settings(output: Path, **changes: Any) -> TrainingConfig:
    values: dict[str, Any] = {
        "output": output,
        "model": SIZES,
        "steps": 12,
        "optimizer": OptimizerConfig(lr=2e-3, warmup_steps=3),
        "loss_weights": LossWeights(mel=5.0, stft=1.0, semantic=0.1),
        "gan_start_step": 10**6,
        "discriminator": DiscriminatorConfig(
            multi_frequency_options={"channels": 4},
            optimizer=OptimizerConfig(lr=1e-3, warmup_steps=0, weight_decay=0.0),
        ),
        "ema_decay": 0.9,
        "clip_grad_norm": 10.0,
        "log_every": 1,
        "checkpoint_every": 1000,
        "validate_every": 0,
        "accelerator": "cpu",
    }
    return TrainingConfig(**{**values, **changes})


def make_task(config: TrainingConfig, data: MemoryData | None = None) -> TokenizerTask:
    torch.manual_seed(config.seed)
    model = DashengTokenizerModel(DashengTokenizerConfig(**config.model))
    return TokenizerTask(make_fabric(config), config, model, data or MemoryData())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_latents_are_those_of_the_encoder_in_every_precision(tmp_path: Path, precision: str) -> None:
    """Rounded audio has noise in bands that hold nothing, and a decoder that learns from it knows no empty bands."""
    task = make_task(settings(tmp_path, precision=precision))
    batch = MemoryData().batch(0)
    with torch.no_grad():
        generated = task._generate(batch)
        model = task.state.model
        torch.testing.assert_close(generated.acoustic, model.encode_acoustic(batch.audio), rtol=0, atol=1e-5)
    assert generated.audio.dtype == torch.float32


def weights(task: TokenizerTask) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in task.state.model.named_parameters()}


def run(config: TrainingConfig, data: MemoryData | None = None) -> TokenizerTask:
    task = make_task(config, data)
    assert fit(task.fabric, task, config)
    return task


@pytest.fixture
def corpus(tmp_path: Path) -> list[str]:
    return write_corpus(tmp_path)


def write_corpus(tmp_path: Path) -> list[str]:
    """A few short clips, and overrides that point a recipe at them."""
    rng = np.random.default_rng(0)
    for split in ("train", "valid"):
        folder = tmp_path / split / "speech"
        folder.mkdir(parents=True)
        for index in range(6):
            times = np.arange(16000 + 1000 * index) / 16000
            tone = 0.3 * np.sin(2 * np.pi * (150 + 40 * index) * times) + 0.01 * rng.standard_normal(len(times))
            soundfile.write(folder / f"{index}.wav", tone.astype(np.float32), 16000)
    return [f"data.train=[{tmp_path / 'train'}]", f"data.valid=[{tmp_path / 'valid'}]"]


def write_recipe(folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def command(recipe: Path, overrides: list[str]) -> list[str]:
    code = "import sys; from dasheng_tokenizer.training import train; train(sys.argv[1], sys.argv[2:])"
    script = recipe.parent / "run_training.py"
    script.write_text(code)
    return [str(script), str(recipe), *overrides]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


# ---------------------------------------------------------------------- learning


def test_generator_learns_and_semantic_encoder_stays(tmp_path: Path) -> None:
    config = settings(tmp_path, steps=40)
    before = weights(make_task(config))
    task = run(config)
    records = read_log(tmp_path / "log.jsonl", "train")
    first, last = (np.mean([record["mel"] for record in part]) for part in (records[:4], records[-4:]))
    assert last < 0.75 * first
    assert records[-1]["semantic"] < records[0]["semantic"]
    after = weights(task)
    semantic = [name for name in before if name.startswith("encoder.model.")]
    assert semantic
    assert all(torch.equal(before[name], after[name]) for name in semantic)
    assert not task.state.model.semantic_encoder.training
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(before) - set(semantic)
    # What the loss says is what the decoded audio shows, through the saved folder and the public interface.
    saved = DashengTokenizerModel.from_pretrained(tmp_path / "model")
    target = MemoryData().batch(0).target
    with torch.no_grad():
        assert MultiScaleMelLoss()(saved(target).audio, target) < 0.9 * first


def test_discriminator_learns_to_tell_decoded_from_real(tmp_path: Path) -> None:
    discriminator = DiscriminatorConfig(
        multi_frequency_options={"channels": 8}, optimizer=OptimizerConfig(lr=3e-3, warmup_steps=0, weight_decay=0.0)
    )
    task = make_task(settings(tmp_path, steps=1000, gan_start_step=0, discriminator=discriminator))
    data = MemoryData()
    losses = []
    for step in range(30):
        part = data.batch(step)
        with torch.no_grad():
            generated = task._generate(part)  # a generator that stands still
        losses.append(float(task.discriminator_step([part], generated, step).losses["discriminator"]))
    assert losses[0] > 1.5  # the hinge loss of one that cannot tell is 2
    assert losses[-1] < 0.7 * losses[0]


def test_adversarial_terms_move_the_generator_but_not_the_discriminators(tmp_path: Path) -> None:
    task = make_task(settings(tmp_path, gan_start_step=0))
    part = MemoryData().batch(0)
    losses = task.generator_losses(part, task._generate(part), adversarial=True)
    (losses["adversarial"] + losses["feature_matching"]).backward()
    assert all(parameter.grad is None for parameter in task.modules["discriminators"].parameters())
    assert all(parameter.requires_grad for parameter in task.modules["discriminators"].parameters())
    gradients = [parameter.grad for _, parameter in task.state.model.trainable_parameters()]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


def test_before_the_gan_starts_discriminators_stand_still(tmp_path: Path) -> None:
    task = make_task(settings(tmp_path, gan_start_step=3))
    before = [parameter.clone() for parameter in task.modules["discriminators"].parameters()]
    for step in range(4):
        result = task.training_step(MemoryData().batch(step), step)
        moved = any(
            not torch.equal(a, b) for a, b in zip(before, task.modules["discriminators"].parameters(), strict=True)
        )
        assert ("discriminator" in result.losses) == ("adversarial" in result.losses) == moved == (step == 3)


def test_baseline_decodes_the_semantic_embedding_alone(tmp_path: Path) -> None:
    task = run(settings(tmp_path, steps=3, latent="semantic"))
    saved = DashengTokenizerModel.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        out = saved(MemoryData().batch(0).target)
    assert torch.equal(out.unified, out.semantic)
    assert "semantic" not in read_log(tmp_path / "log.jsonl", "train")[0]
    assert task.state.model.encoder.patch_embed.weight.grad is None


def test_feature_statistics_are_those_of_the_first_crops(tmp_path: Path) -> None:
    config = settings(tmp_path)
    torch.manual_seed(0)
    model = DashengTokenizerModel(DashengTokenizerConfig(**SIZES, normalize_semantic=True)).eval()
    fabric, data = make_fabric(config), MemoryData()
    first = torch.cat([data.batch(step).audio for step in range(3)])  # 12 crops of 8 tokens
    raw = model.encode_features(first).flatten(0, 1)
    set_feature_statistics(fabric, model, data, tokens=3 * 4 * 8)
    std, mean = torch.std_mean(raw, dim=0, correction=0)
    torch.testing.assert_close(model.encoder.semantic_norm.mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.encoder.semantic_norm.std, std, rtol=1e-3, atol=1e-5)
    normal = model.encode_semantic(first).flatten(0, 1)
    assert normal.mean(0).abs().max() < 1e-3 and (normal.std(0) - 1).abs().max() < 1e-2
    with pytest.raises(ConfigurationError, match="normalize_semantic: true"):
        set_feature_statistics(fabric, DashengTokenizerModel(DashengTokenizerConfig(**SIZES)), data)


def test_feature_statistics_survive_other_data_and_a_new_start(tmp_path: Path, corpus: list[str]) -> None:
    recipe = write_recipe(tmp_path)
    train(recipe, [*corpus, "steps=4", f"output={tmp_path / 'run'}"])
    before = DashengTokenizerModel.from_pretrained(tmp_path / "run" / "model").encoder.semantic_norm
    assert before.std.min() > 0 and not torch.equal(before.mean, torch.zeros_like(before.mean))
    other = tmp_path / "other"
    other.mkdir()
    soundfile.write(other / "quiet.wav", 1e-3 * np.random.default_rng(5).standard_normal(32000), 16000)
    runs = (["steps=5", f"output={tmp_path / 'run'}"], ["model={}", f"init={tmp_path / 'run/model'}", "steps=1"])
    for changes in runs:
        folder = train(recipe, [f"data.train=[{other}]", f"output={tmp_path / 'new'}", *changes])
        after = DashengTokenizerModel.from_pretrained(folder / "model").encoder.semantic_norm
        assert torch.equal(after.mean, before.mean) and torch.equal(after.std, before.std)


def test_accumulated_parts_equal_the_whole_batch(tmp_path: Path) -> None:
    mel_only = LossWeights(mel=5.0, semantic=0.1)
    whole = make_task(settings(tmp_path, gan_start_step=1, loss_weights=mel_only))
    parts = make_task(settings(tmp_path, gan_start_step=1, loss_weights=mel_only, accumulate=2))
    parts.modules["discriminators"].load_state_dict(whole.modules["discriminators"].state_dict())
    for step in range(3):
        results = [task.training_step(MemoryData().batch(step), step) for task in (whole, parts)]
        assert list(results[0].losses) == list(results[1].losses)
        for name, value in results[0].losses.items():
            torch.testing.assert_close(results[1].losses[name], value, rtol=2e-4, atol=2e-4)


# ---------------------------------------------------------------------- safety


def test_non_finite_batch_is_skipped_and_counted(tmp_path: Path) -> None:
    config = settings(tmp_path, gan_start_step=0)
    task = make_task(config, MemoryData(broken=(2,)))
    for step in range(2):
        assert task.training_step(task.data.batch(step), step).applied
    before, average = weights(task), [value.clone() for value in task.state.average.values]
    discriminators = [parameter.clone() for parameter in task.modules["discriminators"].parameters()]
    assert not task.training_step(task.data.batch(2), 2).applied
    assert all(torch.equal(before[name], value) for name, value in weights(task).items())
    assert all(torch.equal(a, b) for a, b in zip(average, task.state.average.values, strict=True))
    assert all(
        torch.equal(a, b) for a, b in zip(discriminators, task.modules["discriminators"].parameters(), strict=True)
    )
    assert task.training_step(task.data.batch(3), 3).applied
    run(settings(tmp_path / "whole"), MemoryData(broken=(2, 7)))
    records = read_log(tmp_path / "whole" / "log.jsonl", "train")
    assert [record["skipped"] for record in records][1:4] == [0, 1, 1]
    assert records[-1]["skipped"] == 2
    assert "loss" not in records[2]
    assert json.loads((tmp_path / "whole" / "summary.json").read_text())["skipped_steps"] == 2


def test_a_run_that_never_learns_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "MAX_SKIPPED_IN_A_ROW", 5)
    config = settings(tmp_path)
    task = make_task(config, MemoryData(broken=tuple(range(2, 12))))
    with pytest.raises(ConfigurationError, match="5 steps in a row.*step 6"):
        fit(task.fabric, task, config)


def test_moving_average_is_exact() -> None:
    layer = torch.nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    average = ExponentialMovingAverage(layer.named_parameters(), decay=0.9)
    expected = layer.weight.detach().clone().double()
    for update in range(120):
        with torch.no_grad():
            layer.weight.add_(torch.randn(2, 3))
        average.update()
        decay = min(0.9, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * layer.weight.detach().double()
    assert list(average.state_dict()) == ["weight"]
    torch.testing.assert_close(average.state_dict()["weight"].double(), expected, rtol=1e-5, atol=1e-5)
    current = layer.weight.detach().clone()
    with pytest.raises(KeyError), average.applied():
        assert torch.equal(layer.weight, average.values[0])
        raise KeyError
    assert torch.equal(layer.weight, current)


def test_learning_rate_schedule() -> None:
    config = OptimizerConfig(lr=2.0, warmup_steps=4, final_fraction=0.1)
    rates = [learning_rate(config, step, 24) for step in range(25)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[14] == pytest.approx(0.5 * (2.0 + 0.2))  # half of the cosine
    assert rates[24] == pytest.approx(0.2)
    assert all(a >= b for a, b in zip(rates[4:], rates[5:], strict=False))


# ---------------------------------------------------------------------- checkpoints


def test_resume_in_another_process_state_is_exact(tmp_path: Path) -> None:
    whole = run(settings(tmp_path / "a", gan_start_step=3))
    half = settings(tmp_path / "b", gan_start_step=3)
    task = make_task(half)
    original = task.training_step

    def interrupted(batch: Batch, step: int) -> Any:
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(batch, step)

    task.training_step = interrupted  # type: ignore[method-assign]
    assert not fit(task.fabric, task, half)
    assert [path.name for path in list_checkpoints(tmp_path / "b" / "checkpoints")] == ["step-00000006"]
    torch.manual_seed(99)
    resumed = run(half)
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(resumed)[name], value, rtol=0, atol=0)
    logs = [
        [(record["step"], record.get("loss")) for record in read_log(tmp_path / name / "log.jsonl", "train")]
        for name in "ab"
    ]
    assert logs[0] == logs[1]
    saved = [load_file(tmp_path / name / "model" / "model.safetensors") for name in "ab"]
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])


def test_gan_can_be_added_to_a_finished_run(tmp_path: Path) -> None:
    run(settings(tmp_path, steps=4))
    task = make_task(settings(tmp_path, steps=8, gan_start_step=4))
    assert fit(task.fabric, task, task.config)
    records = read_log(tmp_path / "log.jsonl", "train")
    assert [record["step"] for record in records] == list(range(1, 9))
    assert ["adversarial" in record for record in records] == [False] * 4 + [True] * 4


def test_only_whole_checkpoints_and_only_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(settings(tmp_path))
    task.training_step(task.data.batch(0), 0)
    for step in (1, 2, 3):
        save_checkpoint(task.fabric, tmp_path, task, Progress(step=step), keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="free some space"):
        save_checkpoint(task.fabric, tmp_path, task, Progress(step=4), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


def test_foreign_and_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    run(settings(tmp_path, steps=2))
    other = settings(tmp_path, steps=4, model={**SIZES, "decoder_depth": 3})
    task = make_task(other)
    with pytest.raises(ConfigurationError, match="another run.*decoder_depth"):
        fit(task.fabric, task, other)
    newest = list_checkpoints(tmp_path / "checkpoints")[-1]
    (newest / "tensors.safetensors").write_bytes(b"rubbish")
    config = settings(tmp_path, steps=4)
    task = make_task(config)
    with pytest.raises(CheckpointError, match="damaged"):
        fit(task.fabric, task, config)


def test_log_forgets_what_is_done_again(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    lines = [json.dumps({"kind": "train", "step": step}) + "\n" for step in range(1, 6)]
    path.write_text("".join(lines) + '{"kind": "tr')
    truncate_log(path, 3)
    assert [record["step"] for record in read_log(path)] == [1, 2, 3]


# ---------------------------------------------------------------------- whole runs, in processes of their own


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_weights(tmp_path: Path, corpus: list[str]) -> None:
    recipe = write_recipe(tmp_path)
    whole = train(recipe, [*corpus, f"output={tmp_path / 'whole'}", f"data.cache={tmp_path / 'cache'}"])
    overrides = [*corpus, f"output={tmp_path / 'killed'}", f"data.cache={tmp_path / 'cache'}"]
    process = subprocess.Popen([sys.executable, *command(recipe, overrides)], env=environment())
    while not list_checkpoints(tmp_path / "killed" / "checkpoints") and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list_checkpoints(tmp_path / "killed" / "checkpoints")
    assert not (tmp_path / "killed" / "summary.json").exists()
    killed = train(recipe, overrides)
    records = read_log(killed / "log.jsonl", "train")
    assert [record["step"] for record in records] == list(range(1, 31))
    a, b = (load_file(folder / "model" / "model.safetensors") for folder in (whole, killed))
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_processes_give_the_loss_curve_of_one(tmp_path: Path, corpus: list[str]) -> None:
    recipe = write_recipe(tmp_path)
    changes = [*corpus, "steps=8", f"data.cache={tmp_path / 'cache'}"]
    one = train(recipe, [*changes, f"output={tmp_path / 'one'}"])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    two = tmp_path / "two"
    subprocess.run([*launcher, *command(recipe, [*changes, f"output={two}"])], env=environment(), check=True)
    curves = [read_log(folder / "log.jsonl", "train") for folder in (one, two)]
    assert [record["step"] for record in curves[1]] == list(range(1, 9))
    for a, b in zip(*curves, strict=True):
        for name in set(a) & {"loss", "mel", "stft", "semantic", "adversarial", "discriminator", "grad_norm"}:
            tolerance = 2e-2 if name == "grad_norm" else 2e-3
            assert b[name] == pytest.approx(a[name], rel=tolerance, abs=1e-4), (a["step"], name)
        assert a["audio_hours"] == b["audio_hours"]
    saved = [load_file(folder / "model" / "model.safetensors") for folder in (one, two)]
    for name, value in saved[0].items():
        # Adam turns gradients that are zero but for rounding into whole steps, so single weights may differ more.
        difference = (saved[1][name].float() - value.float()).norm()
        assert difference <= 1e-2 * value.float().norm() + 1e-4, name


def test_finished_run_says_so(tmp_path: Path, corpus: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path)
    overrides = [*corpus, f"output={tmp_path / 'run'}", "steps=2"]
    folder = train(recipe, overrides)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["validation"]["mel"] > 0
    assert list((folder / "tensorboard").iterdir())
    before = (folder / "model" / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    train(recipe, overrides)
    assert "is finished" in capsys.readouterr().out
    assert (folder / "model" / "model.safetensors").stat().st_mtime_ns == before
