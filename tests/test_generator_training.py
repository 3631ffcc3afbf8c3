"""Training of a generator: which batches it sees, that it learns, resumes exactly, and what it refuses."""

from __future__ import annotations

import ast
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from conftest import tiny
from dasheng_tokenizer.cli import main
from dasheng_tokenizer.errors import (
    CheckpointError,
    ConfigurationError,
    DashengTokenizerError,
    DataError,
    ModelMismatchError,
)
from dasheng_tokenizer.generation import training_data
from dasheng_tokenizer.generation.dit import DiffusionTransformer
from dasheng_tokenizer.generation.generator import Generator
from dasheng_tokenizer.generation.latent_dataset import LatentDataset
from dasheng_tokenizer.generation.text_encoders import load_text_encoder
from dasheng_tokenizer.generation.training import (
    GeneratorTask,
    averaged_generator,
    draw_noise,
    new_generator,
    train_generator,
)
from dasheng_tokenizer.generation.training_configuration import (
    DiTSettings,
    GeneratorTrainingConfig,
    LatentDataConfig,
    load_generator_recipe,
)
from dasheng_tokenizer.generation.training_data import LatentBatch, LatentCrops, open_data
from dasheng_tokenizer.scale.encode import encode_latents
from dasheng_tokenizer.training import load_any_recipe, loop, train
from dasheng_tokenizer.training.configuration import OptimizerConfig, TrainingConfig, build_config, to_plain
from dasheng_tokenizer.training.loop import fit, make_fabric, seed_everything
from dasheng_tokenizer.training.run_checkpoint import list_checkpoints
from dasheng_tokenizer.training.run_log import read_log
from test_text_encoders import save_tokenizer
from test_vae import tiny_vae

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
SHIPPED = ("generator.yaml", "tta_audiocaps.yaml", "ttm_musiccaps.yaml")
RATE, WIDTH = 16_000, 4
WORDS = ("a", "low", "high", "hum", "whistle", "one", "two", "more")
CLIPS = 12


class StandIn:
    """A tokenizer whose latents are the loudness of a token, in four quantities."""

    def __init__(self, name: str = "stand-in") -> None:
        self.name, self.latent_dim = name, WIDTH

    def encode(self, audio: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        audio = torch.nn.functional.pad(audio, (0, -audio.shape[1] % 640))
        power = audio.unflatten(1, (-1, 640)).square().mean(-1)  # (B, T)
        return torch.stack([power, 3 * power + 1, -power, power.sqrt()], dim=-1)

    def weights_hash(self) -> str:
        return f"{self.name:x<64}"


def write_clips(folder: Path, seed: int) -> Path:
    """Clips of 8 to 30 tokens: quiet ones called low, loud ones called high, half of each of another domain."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for index in range(CLIPS):
        loud = index % 3 == 0
        samples = 640 * (8 + 2 * index) - 100
        audio = (0.5 if loud else 0.1) * (1 + 0.1 * rng.standard_normal(samples))
        soundfile.write(folder / f"{index:02}.wav", audio.astype(np.float32), RATE, subtype="FLOAT")
        captions = ["a high whistle", "high"] if loud else ["a low hum", "low", "low hum"]
        labels = {"caption": captions, "domain": "sound" if index % 2 else "speech"}
        (folder / f"{index:02}.json").write_text(json.dumps(labels))
    return folder


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    for split, seed in (("train", 0), ("valid", 1)):
        source = write_clips(folder / "audio" / split, seed)
        encode_latents(source, folder / split, StandIn(), source_name="stand-in", dtype="float32", progress=False)
    return folder


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text encoder of the T5 family, of width 8."""
    return save_text_encoder(tmp_path_factory.mktemp("text"), WORDS)


def save_text_encoder(folder: Path, words: Sequence[str]) -> Path:
    from transformers import T5Config, T5EncoderModel

    size = save_tokenizer(folder, words)
    torch.manual_seed(0)
    T5EncoderModel(
        T5Config(vocab_size=size, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, pad_token_id=1)
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def settings(latents: Path, text_folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "output": tmp_path / "run",
        "steps": 10,
        "optimizer": OptimizerConfig(lr=3e-3, betas=(0.9, 0.99), warmup_steps=2),
        "ema_decay": 0.9,
        "log_every": 1,
        "validate_every": 0,
        "accelerator": "cpu",
        "data": {"folder": latents, "train": ["train"], "valid": ["valid"], "crop_seconds": 0.8, "batch_size": 6},
        "dit": DiTSettings(width=16, depth=2, heads=2),
        "text_encoder": str(text_folder),
        "text_cache": tmp_path / "text",
        "validation_clips": 4,
    }


def make_config(
    settings: dict[str, Any], data: dict[str, Any] | None = None, **changes: Any
) -> GeneratorTrainingConfig:
    values = {**settings, **changes}
    return GeneratorTrainingConfig(**{**values, "data": LatentDataConfig(**{**values["data"], **(data or {})})})


def make_task(config: GeneratorTrainingConfig) -> GeneratorTask:
    fabric = make_fabric(config)
    data = open_data(fabric, config)
    seed_everything(config.seed)
    return GeneratorTask(fabric, config, new_generator(config, data), data)


def shaken(task: GeneratorTask, scale: float = 0.2) -> GeneratorTask:
    """A fresh transformer answers zero to everything, which would hide every mistake."""
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in task.generator.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=source))
    return task


class Numbered:
    """A text encoder whose embeddings tell the text apart by their length."""

    width, identity, max_tokens = 8, "numbered", 10

    def __call__(self, texts: Sequence[str]) -> list[Tensor]:
        return [torch.ones(len(text.split()), 8) for text in texts]


def make_crops(latents: Path, config: GeneratorTrainingConfig, rank: int = 0, world_size: int = 1) -> LatentCrops:
    return LatentCrops(LatentDataset(latents / "train"), Numbered(), config, rank, world_size)


def same(a: LatentBatch, b: LatentBatch) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in a.__dataclass_fields__)


# ---------------------------------------------------------------------- batches


def test_a_batch_is_a_function_of_the_step(latents: Path, settings: dict[str, Any]) -> None:
    config = make_config(settings)
    crops = make_crops(latents, config)
    ahead = list(crops.batches(0, 5))  # in a thread
    plain = list(make_crops(latents, make_config(settings, {"load_ahead": False})).batches(3, 5))
    assert len(ahead) == 5
    assert all(same(a, b) for a, b in zip(ahead[3:], plain, strict=True))
    assert same(make_crops(latents, config).batch(4), ahead[4])
    assert not same(make_crops(latents, make_config(settings, seed=1)).batch(4), ahead[4])
    assert len({float(moment) for batch in ahead for moment in batch.times}) == 30
    assert len({int(seed) for batch in ahead for seed in batch.noise_seeds}) == 30


def test_ranks_share_the_batch(latents: Path, settings: dict[str, Any]) -> None:
    config = make_config(settings)
    whole = make_crops(latents, config).batch(7)
    for rank in range(3):
        part, rows = make_crops(latents, config, rank, 3).batch(7), slice(2 * rank, 2 * rank + 2)
        tokens = part.latents.shape[1]
        assert torch.equal(part.latents, whole.latents[rows, :tokens])
        for name in ("num_tokens", "dropped", "times", "noise_seeds"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[rows])
    with pytest.raises(ConfigurationError, match="multiple of the 4 processes"):
        make_crops(latents, config, 0, 4)
    with pytest.raises(ConfigurationError, match="accumulate"):
        make_crops(latents, make_config(settings, accumulate=3), 0, 3)


def test_an_epoch_visits_every_clip_once_and_epochs_differ(latents: Path, settings: dict[str, Any]) -> None:
    crops = make_crops(latents, make_config(settings))
    epochs = [[crops._visited(place) for place in range(start, start + CLIPS)] for start in (0, CLIPS, 2 * CLIPS)]
    assert all(sorted(epoch) == list(range(CLIPS)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_short_clips_are_whole_and_long_ones_cropped_anywhere(latents: Path, settings: dict[str, Any]) -> None:
    config = make_config(settings)
    crops = make_crops(latents, config)
    wholes = [crops.dataset[index].latents for index in range(CLIPS)]
    starts: dict[int, set[int]] = {index: set() for index in range(CLIPS)}
    for place in range(30 * CLIPS):
        clip, whole = crops._clip(place).latents, wholes[crops._visited(place)]
        assert len(clip) == min(len(whole), 20)  # 0.8 s
        found = [start for start in range(len(whole) - len(clip) + 1) if torch.equal(whole[start:][: len(clip)], clip)]
        assert found
        starts[crops._visited(place)].update(found)
    longest = max(range(CLIPS), key=lambda index: len(wholes[index]))
    assert starts[longest] >= {0, len(wholes[longest]) - 20}
    assert all(starts[index] == {0} for index in range(CLIPS) if len(wholes[index]) <= 20)


def test_lengths_vary_where_asked(latents: Path, settings: dict[str, Any]) -> None:
    crops = make_crops(latents, make_config(settings, {"min_crop_seconds": 0.4}))
    lengths: dict[int, set[int]] = {}
    for place in range(40 * CLIPS):
        clip = crops._visited(place)
        lengths.setdefault(min(int(crops.dataset.num_tokens[clip]), 20), set()).add(len(crops._clip(place).latents))
    assert lengths[8] == {8}  # shorter than the least
    assert lengths[20] == set(range(10, 21))


def test_every_caption_is_drawn_and_texts_are_dropped_at_their_rate(latents: Path, settings: dict[str, Any]) -> None:
    crops = make_crops(latents, make_config(settings, text_dropout=0.25))
    drawn = [crops._clip(place).caption for place in range(1200)]
    counts = Counter(drawn)
    share = counts.pop(None) / 1200
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 1200) ** 0.5
    assert set(counts) == {"a high whistle", "high", "a low hum", "low", "low hum"}
    assert 0.7 < counts["high"] / counts["a high whistle"] < 1.4
    never = make_crops(latents, make_config(settings, text_dropout=0.0))
    assert all(never._clip(place).caption is not None for place in range(100))


def test_the_text_of_a_batch_is_that_of_its_clips(latents: Path, settings: dict[str, Any]) -> None:
    crops = make_crops(latents, make_config(settings, text_dropout=0.5))
    batch = crops.batch(2)
    clips = [crops._clip(place) for place in range(12, 18)]
    assert {clip.caption is None for clip in clips} == {True, False}
    lengths = [1 if clip.caption is None else len(clip.caption.split()) for clip in clips]
    assert batch.text_mask.sum(1).tolist() == lengths
    assert batch.dropped.tolist() == [clip.caption is None for clip in clips]
    assert torch.equal(batch.text.any(-1), batch.text_mask & ~batch.dropped[:, None])
    assert torch.equal(batch.token_mask.sum(1), batch.num_tokens)


def test_balance_shows_every_group_equally_often(latents: Path, settings: dict[str, Any]) -> None:
    config = make_config(settings, {"balance": "domain"})
    crops = make_crops(latents, config)
    crops._groups = [np.arange(2), np.arange(2, CLIPS)]  # uneven
    visits = Counter(crops._visited(place) for place in range(40))
    assert [visits[clip] for clip in range(CLIPS)] == [10, 10] + [2] * 10
    rounds = [{crops._visited(place) < 2 for place in (start, start + 1)} for start in range(0, 40, 2)]
    assert all(both == {True, False} for both in rounds)
    first = [crops._visited(place) < 2 for place in range(0, 40, 2)]
    assert len(set(first)) == 2  # no fixed order within a round
    by_label = make_crops(latents, config)._groups
    assert [clips.tolist() for clips in by_label] == [list(range(1, CLIPS, 2)), list(range(0, CLIPS, 2))]
    with pytest.raises(ConfigurationError, match="'genre'.*domain"):
        make_crops(latents, make_config(settings, {"balance": "genre"}))


def test_evened_groups_show_their_classes_equally_often(latents: Path, settings: dict[str, Any]) -> None:
    class Labels:
        """Events of twelve clips, two of which have none."""

        events = ("dog",) * 6 + ("bell",) * 3 + ("rain",) + (None,) * 2

        def description(self, index: int) -> tuple[str, list[str], dict[str, Any]]:
            return "", [], {"domain": "sound", "labels": {"event": self.events[index]}}

    dataset: Any = Labels()
    epoch = training_data._evened(dataset, np.arange(12), "event")
    visits = Counter(dataset.events[clip] for clip in epoch)
    assert visits == {"dog": 6, "bell": 6, "rain": 6, None: 6}
    assert set(Counter(epoch.tolist()).values()) == {1, 2, 6, 3}
    assert training_data._evened(dataset, np.arange(6, 9), "event").tolist() == [6, 7, 8]
    evened = make_crops(latents, make_config(settings, {"balance": "domain", "evened": {"sound": "domain"}}))
    plain = make_crops(latents, make_config(settings, {"balance": "domain"}))
    assert [evened._visited(place) for place in range(50)] == [plain._visited(place) for place in range(50)]
    for evened_by, message in (({"sound": "colour"}, "data.evened: no clip"), ({"light": "domain"}, "'light'")):
        with pytest.raises(ConfigurationError, match=message):
            make_crops(latents, make_config(settings, {"balance": "domain", "evened": evened_by}))
    with pytest.raises(ConfigurationError, match=r"data\.evened is of"):
        make_config(settings, {"evened": {"sound": "event"}})


def test_shares_show_groups_in_proportion(latents: Path, settings: dict[str, Any]) -> None:
    config = make_config(settings, {"balance": "domain", "shares": {"speech": 3}})
    crops = make_crops(latents, config)
    names = [crops.dataset.description(index)[2]["domain"] for index in range(CLIPS)]
    each = {name: names.count(name) for name in set(names)}
    visits = Counter(crops._visited(place) for place in range(4 * CLIPS))
    assert {name: sum(visits[clip] for clip in range(CLIPS) if names[clip] == name) for name in each} == {
        "speech": 3 * CLIPS,
        "sound": CLIPS,
    }
    # An epoch shows each clip of a group once: no clip more often than another.
    assert len({visits[clip] for clip in range(CLIPS) if names[clip] == "speech"}) == 1
    for shares, message in (({"middle": 2}, "'middle'.*sound, speech"), ({"speech": 0}, "at least 1")):
        with pytest.raises(ConfigurationError, match=message):
            make_crops(latents, make_config(settings, {"balance": "domain", "shares": shares}))
    with pytest.raises(ConfigurationError, match=r"name that label"):
        make_config(settings, {"shares": {"speech": 2}})


def test_crops_below_a_token_are_refused(latents: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"at least 0\.04"):
        make_crops(latents, make_config(settings, {"crop_seconds": 0.03}))


# ---------------------------------------------------------------------- the objective


def test_noise_of_a_clip_hangs_on_its_seed_and_length_alone() -> None:
    device = torch.device("cpu")
    noise = draw_noise(torch.tensor([3, 5]), torch.tensor([7, 2**62]), 6, device)
    assert not noise[0, 3:].any()
    assert torch.equal(noise[0, :3], draw_noise(torch.tensor([3]), torch.tensor([7]), 6, device)[0])
    many = draw_noise(torch.tensor([4000]), torch.tensor([5]), 6, device)
    assert abs(float(many.mean())) < 0.03 and abs(float(many.std()) - 1) < 0.03


def test_padding_does_not_change_the_loss(settings: dict[str, Any]) -> None:
    task = shaken(make_task(make_config(settings, text_dropout=0.5)))
    batch = task.data.train.batch(0)
    assert len(set(batch.num_tokens.tolist())) > 2 and batch.dropped.any() and not batch.dropped.all()
    with torch.no_grad():
        together = task.objective(*task._arguments(batch))
        alone = [task.objective(*task._arguments(batch._take(torch.tensor([row])))) for row in range(6)]
    torch.testing.assert_close(together, torch.stack(alone).mean(), rtol=1e-5, atol=1e-6)
    assert max(alone) > 1.05 * min(alone)


def test_dropped_texts_become_the_learned_null_text(settings: dict[str, Any]) -> None:
    task = shaken(make_task(make_config(settings)))
    latents, noise, times, mask, text, text_mask, _ = task._arguments(task.data.train.batch(0))
    one = text_mask.clone()
    one[:, 1:] = False
    everyone, no_one = torch.ones(6, dtype=torch.bool), torch.zeros(6, dtype=torch.bool)
    null = task.generator.dit.null_text

    def loss(words: Tensor, dropped: Tensor) -> Tensor:
        return task.objective(latents, noise, times, mask, words, one, dropped)

    assert torch.equal(loss(text, everyone), loss(torch.randn_like(text), everyone))
    as_text = null.detach().expand(6, text.shape[1], -1)
    torch.testing.assert_close(loss(text, everyone), loss(as_text, no_one))
    assert not torch.isclose(loss(text, everyone), loss(text, no_one))
    (gradient,) = torch.autograd.grad(loss(text, everyone), null)
    assert gradient.abs().sum() > 0
    (gradient,) = torch.autograd.grad(loss(text, no_one), null)  # there, for DDP, but zero
    assert gradient.abs().sum() == 0


def test_accumulated_parts_equal_the_whole_batch(settings: dict[str, Any]) -> None:
    tasks = [shaken(make_task(make_config(settings, accumulate=parts))) for parts in (1, 3)]
    for step in range(3):
        results = [task.training_step(task.data.train.batch(step), step) for task in tasks]
        for name in ("loss", "grad_norm"):
            torch.testing.assert_close(results[1].losses[name], results[0].losses[name], rtol=1e-4, atol=1e-5)
    parts = tasks[1].data.train.batch(0).split(3)
    assert [len(part.times) for part in parts] == [2, 2, 2]
    assert [part.latents.shape[1] for part in parts] == [int(part.num_tokens.max()) for part in parts]


def test_a_non_finite_batch_is_skipped(settings: dict[str, Any]) -> None:
    task = make_task(make_config(settings))
    before = [parameter.clone() for parameter in task.generator.parameters()]
    batch = task.data.train.batch(0)
    batch.latents[2, 3, 1] = float("nan")
    assert not task.training_step(batch, 0).applied
    assert all(torch.equal(a, b) for a, b in zip(before, task.generator.parameters(), strict=True))
    assert task.training_step(task.data.train.batch(1), 1).applied


def test_mixed_precision_and_checkpointing_give_nearly_the_same_step(settings: dict[str, Any]) -> None:
    exact = shaken(make_task(make_config(settings)), 0.1)
    expected = exact.training_step(exact.data.train.batch(0), 0).losses
    for changes, tolerance in (({"precision": "bf16-mixed"}, 0.03), ({"gradient_checkpointing": True}, 1e-5)):
        task = shaken(make_task(make_config(settings, **changes)), 0.1)
        result = task.training_step(task.data.train.batch(0), 0)
        assert result.applied
        assert all(parameter.dtype == torch.float32 for parameter in task.generator.parameters())
        for name in ("loss", "grad_norm"):
            assert float(result.losses[name]) == pytest.approx(float(expected[name]), rel=tolerance)


# ---------------------------------------------------------------------- whole runs


def test_it_learns_what_the_text_says(settings: dict[str, Any], text_folder: Path) -> None:
    config = make_config(settings, steps=150)
    folder = train_generator(config)
    records = read_log(folder / "log.jsonl", "train")
    first, last = (np.mean([record["loss"] for record in part]) for part in (records[:5], records[-20:]))
    assert last < 0.6 * first  # a fresh one answers zero, and scores 2: the variances of data and noise
    assert json.loads((folder / "summary.json").read_text())["validation"]["loss"] < 0.6 * first
    generator = Generator.from_pretrained(folder / "model")
    text = load_text_encoder(text_folder)(["low", "high"])
    quiet, loud = generator.sample(text, [12, 12], seeds=[0, 0], steps=8, guidance=1.0)
    # Of the loudness, which is 0.1 and 0.5 in the data.
    assert abs(float(quiet[:, 3].mean()) - 0.1) < 0.08
    assert abs(float(loud[:, 3].mean()) - 0.5) < 0.08


def test_the_result_says_what_it_belongs_to(settings: dict[str, Any], text_folder: Path, latents: Path) -> None:
    config = make_config(settings, steps=2)
    generator = Generator.from_pretrained(train_generator(config) / "model")
    info, index = generator.info, LatentDataset(latents / "train").index
    assert (info.tokenizer_hash, info.tokenizer) == (StandIn().weights_hash(), "stand-in")
    assert (info.text_encoder, info.text_identity) == (str(text_folder), load_text_encoder(text_folder).identity)
    assert (info.frame_rate, info.max_seconds, info.typical_seconds) == (25.0, 0.8, 0.76)
    assert info.provenance["steps"] == 2 and info.provenance["clips"] == CLIPS
    assert torch.equal(generator.latent_mean, index.mean) and torch.equal(generator.latent_std, index.std)


def test_the_average_is_what_is_kept(settings: dict[str, Any]) -> None:
    config = make_config(settings, steps=4)
    task = make_task(config)
    assert fit(task.fabric, task, config)
    saved = load_file(config.output / "model" / "model.safetensors")
    for name, value in task.average.state_dict().items():
        assert torch.equal(saved[name], value)
    moved = [name for name, value in task.generator.named_parameters() if not torch.equal(saved[name], value)]
    assert moved


def test_a_run_starts_from_another_generator_with_statistics_of_its_own(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    first = Generator.from_pretrained(train_generator(make_config(settings, steps=2)) / "model")
    started = str(settings["output"] / "model")
    other = str(encoded(tmp_path, "other"))
    changes = {"init": started, "output": tmp_path / "second", "optimizer": OptimizerConfig(lr=1e-12, weight_decay=0.0)}
    second = Generator.from_pretrained(
        train_generator(make_config(settings, {"train": [other], "valid": []}, steps=1, **changes)) / "model"
    )
    for name, value in first.dit.state_dict().items():
        torch.testing.assert_close(second.dit.state_dict()[name], value, rtol=0, atol=1e-9)
    assert second.info.tokenizer == "other" and not torch.equal(first.latent_mean, second.latent_mean)
    wider = make_config(settings, init=started, output=tmp_path / "third", dit=DiTSettings(width=32, depth=2, heads=2))
    with pytest.raises(ConfigurationError, match="init: .* has another sizes"):
        train_generator(wider)


def test_any_checkpoint_can_be_taken_as_the_result(settings: dict[str, Any]) -> None:
    config = make_config(settings, steps=4, checkpoint_every=2, keep_checkpoints=2)
    folder = train_generator(config)
    middle, last = list_checkpoints(folder / "checkpoints")
    result = Generator.from_pretrained(folder / "model").state_dict()
    exported = averaged_generator(config, last)
    assert all(torch.equal(value, result[name]) for name, value in exported.state_dict().items())
    earlier = averaged_generator(config, middle)
    assert earlier.info.provenance["steps"] == 2
    assert any(not torch.equal(value, result[name]) for name, value in earlier.state_dict().items())
    with pytest.raises(CheckpointError, match="another recipe"):
        averaged_generator(make_config(settings, dit=DiTSettings(width=24, heads=2)), last)
    (last / "tensors.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="damaged"):
        averaged_generator(config, last)


def test_validation_is_deterministic_and_by_domain(settings: dict[str, Any]) -> None:
    tasks = [shaken(make_task(make_config(settings, seed=seed, data={"batch_size": 6 - seed}))) for seed in (0, 1)]
    for task in tasks:  # the figure hangs on the weights, not on the run
        task.generator.load_state_dict(tasks[0].generator.state_dict())
        task.average.values = [parameter.detach().clone() for parameter in task.generator.parameters()]
    metrics = [task.validate(0, None) for task in (tasks[0], tasks[0], tasks[1])]  # type: ignore[arg-type]
    assert metrics[0] == metrics[1] == metrics[2]
    assert set(metrics[0]) == {"loss", "loss_sound", "loss_speech"}
    assert metrics[0]["loss"] == pytest.approx((metrics[0]["loss_sound"] + metrics[0]["loss_speech"]) / 2, abs=2e-5)
    assert tasks[0].generator.training
    without = make_task(make_config(settings, data={"valid": []}))
    assert without.validate(0, None) == {}  # type: ignore[arg-type]


def test_a_stopped_run_resumes_to_the_same_weights(settings: dict[str, Any]) -> None:
    whole = make_config(settings)
    train_generator(whole)
    config = make_config(settings, output=whole.output.with_name("stopped"))
    task = make_task(config)
    original = task.training_step

    def interrupted(batch: LatentBatch, step: int) -> Any:
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(batch, step)

    task.training_step = interrupted  # type: ignore[method-assign]
    assert not fit(task.fabric, task, config)
    assert not (config.output / "summary.json").exists()
    torch.manual_seed(99)
    train_generator(config)
    saved = [load_file(run.output / "model" / "model.safetensors") for run in (whole, config)]
    assert all(torch.equal(saved[1][name], value) for name, value in saved[0].items())
    logs = [[(r["step"], r["loss"]) for r in read_log(run.output / "log.jsonl", "train")] for run in (whole, config)]
    assert logs[0] == logs[1]


def test_a_finished_run_says_so(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(settings, steps=2)
    train_generator(config)
    capsys.readouterr()
    train_generator(config)
    assert "is finished" in capsys.readouterr().out


def test_texts_are_embedded_once(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(settings, steps=2)
    train_generator(config)
    from dasheng_tokenizer.generation import text_encoders

    def forbidden(*_: object) -> None:
        raise AssertionError("encoded again")

    embed = text_encoders.TransformersTextEncoder.__call__
    monkeypatch.setattr(text_encoders.TransformersTextEncoder, "__call__", forbidden)
    train_generator(make_config(settings, steps=4))
    monkeypatch.setattr(text_encoders.TransformersTextEncoder, "__call__", embed)
    crops = open_data(make_fabric(config), config).train
    for file in config.text_cache.rglob("*.safetensors"):
        file.unlink()
    with pytest.raises(DataError, match="start the training again"):
        crops.batch(0)


# ---------------------------------------------------------------------- refusals


def encoded(folder: Path, name: str, caption: str = "low") -> Path:
    source = folder / f"audio-{name}"
    source.mkdir()
    soundfile.write(source / "clip.wav", 0.1 * np.random.default_rng(0).standard_normal(9600), RATE)
    (source / "clip.json").write_text(json.dumps({"caption": caption}))
    encode_latents(source, folder / name, StandIn(name), source_name=name, progress=False)
    return folder / name


def test_latents_of_another_model_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    other = str(encoded(tmp_path, "other"))
    for data in ({"train": ["train", other]}, {"valid": [other]}):
        with pytest.raises(ModelMismatchError, match="stand-in"):
            train_generator(make_config(settings, data))
    train_generator(make_config(settings, steps=2))
    with pytest.raises(ConfigurationError, match="another run.*tokenizer"):
        train_generator(make_config(settings, {"train": [other], "valid": []}, steps=3))


def test_settings_of_another_run_are_refused(settings: dict[str, Any]) -> None:
    train_generator(make_config(settings, steps=2))
    for changes, named in (({"text_dropout": 0.2}, "text_dropout"), ({"dit": DiTSettings(width=32)}, "dit.width")):
        with pytest.raises(ConfigurationError, match=f"another run.*{named}"):
            train_generator(make_config(settings, steps=3, **changes))


def test_unusable_data_is_refused_by_name(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.train"):
        train_generator(make_config(settings, {"train": []}))
    with pytest.raises(DataError, match="nowhere.*encode-dataset"):
        train_generator(make_config(settings, {"train": ["nowhere"]}))
    long = str(encoded(tmp_path, "long", "low " * 3000))
    with pytest.raises(DataError, match="clip.wav has a caption.*11999 characters"):
        train_generator(make_config(settings, {"train": [long], "valid": []}))
    with pytest.raises(ConfigurationError, match="below the latent's 4"):
        train_generator(make_config(settings, dit=DiTSettings(width=2, heads=1)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {crop_second: 5}", "'data.crop_seconds'"),
        ("text_dropot: 0", "'text_dropout'"),
        ("dit: {with: 64}", "'dit.width'"),
        ("dit: {size: huge}", "'tiny', 'small'"),
        ("loss_weights: {mel: 1}", "unknown key 'loss_weights'"),
        ("timesteps: normal", "'logit_normal'"),
        ("text_dropout: 1", "text_dropout"),
        ("timestep_std: 0", "timestep_std"),
        ("data: {crop_seconds: 0}", "data.crop_seconds"),
        ("data: {crop_seconds: .nan}", "data.crop_seconds"),
        ("data: {min_crop_seconds: 11}", "data.min_crop_seconds"),
        ("data: {batch_size: 0}", "data.batch_size"),
        ("data: {batch_size: 5}\naccumulate: 2", "accumulate"),
        ("seed: -1", "seed"),
        ("validation_clips: -1", "validation_clips"),
        ("steps: 0", "steps"),
    ],
)
def test_wrong_recipes_are_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"kind: generator\n{text}\n")
    with pytest.raises(ConfigurationError) as error:
        load_any_recipe(path)
    assert message in str(error.value) and str(path) in str(error.value)


def test_the_kind_decides_what_is_trained(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("steps: 5\n")
    assert isinstance(load_any_recipe(path), TrainingConfig)
    assert isinstance(load_any_recipe(path, ["kind=tokenizer"]), TrainingConfig)
    assert isinstance(load_any_recipe(path, ["kind=generator"]), GeneratorTrainingConfig)
    for kind in ("singer", "[generator]", "null"):
        with pytest.raises(ConfigurationError, match="'tokenizer'.*'generator'"):
            train(path, [f"kind={kind}"])
    with pytest.raises(DashengTokenizerError, match="kind"):
        load_generator_recipe(path, ["kind=tokenizer"])


def test_training_imports_no_task_before_a_recipe_asks_for_it() -> None:
    for file in sorted(Path(loop.__file__).parent.glob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:  # of the module, not of its functions
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.startswith("dasheng_tokenizer.generation") for name in names), file.name


# ---------------------------------------------------------------------- shipped recipes


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_survive_a_round_trip(name: str) -> None:
    config = load_any_recipe(RECIPES / name)
    assert isinstance(config, GeneratorTrainingConfig)
    assert build_config(GeneratorTrainingConfig, yaml.safe_load(yaml.safe_dump(to_plain(config)))) == config


@pytest.mark.parametrize(
    ("name", "latent_dim", "text_dim", "millions"),
    [
        ("generator.yaml", 384, 384, 9.3),
        ("generator.yaml", 128, 384, 9.1),
        *((n, 1280, 1024, 1075) for n in SHIPPED[1:]),
    ],
)
def test_shipped_transformers_are_of_the_size_that_is_told(
    name: str, latent_dim: int, text_dim: int, millions: float
) -> None:
    with torch.device("meta"):
        dit = DiffusionTransformer(load_generator_recipe(RECIPES / name).dit.config(latent_dim, text_dim))
    assert dit.num_parameters / 1e6 == pytest.approx(millions, rel=0.01)


def write_shard(path: Path, lists: bool, domains: Sequence[str]) -> None:
    """A shard as the recipes lay data out: KEY.flac and KEY.json, one caption or a list of them, domains in turn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(str(path)))
    with tarfile.open(path, "w") as tar:
        for index in range(3):
            audio = io.BytesIO()
            soundfile.write(audio, 0.1 * rng.standard_normal(22050 + 3000 * index), 22050, format="FLAC")
            caption: Any = ["a low hum", "one more hum"] if lists else "a high whistle"
            domain = domains[index % len(domains)]
            labels = json.dumps({"caption": caption, "domain": domain, "event": f"event {index}"}).encode()
            for suffix, data in ((".flac", audio.getvalue()), (".json", labels)):
                member = tarfile.TarInfo(f"x{index}_{30 * index}{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize(
    ("name", "data"),
    [("generator.yaml", "corpus"), ("tta_audiocaps.yaml", "audiocaps"), ("ttm_musiccaps.yaml", "musiccaps")],
)
def test_dry_run_of_a_shipped_recipe(
    name: str, data: str, tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    width = 8 if data == "corpus" else 32
    (tiny_vae() if data == "corpus" else tiny()).save_pretrained("model")
    domains = {"corpus": ("instrument", "sound"), "audiocaps": ("sound",), "musiccaps": ("music",)}[data]
    for split in ("train", "valid"):
        write_shard(Path("data", f"{split}-000000.tar"), lists=split == "valid", domains=domains)
        destination = f"latents/{split}"
        assert main(["encode-dataset", f"data/{split}-*.tar", destination, "--model", "model", "--device", "cpu"]) == 0
    overrides = [
        "output=run", "steps=2", "data.folder=latents", "data.crop_seconds=0.6", "data.batch_size=2", "accumulate=1",
        f"text_encoder={text_folder}", "text_cache=text", "dit.width=32", "dit.depth=2", "dit.heads=2",
        "accelerator=cpu", "devices=1", "strategy=auto", "precision=32-true", "validation_clips=2",
    ]  # fmt: skip
    assert main(["train", "--config", str(RECIPES / name), *overrides]) == 0
    generator = Generator.from_pretrained("run/model")
    assert generator.dit.config.latent_dim == width and generator.info.tokenizer == "model"
    (clip,) = generator.sample(load_text_encoder(text_folder)(["a low hum"]), [5], seeds=[3], steps=2)
    assert clip.shape == (5, width)
    summary = json.loads(Path("run/summary.json").read_text())
    assert set(summary["validation"]) == {"loss", *(f"loss_{domain}" for domain in domains)}


# ---------------------------------------------------------------------- processes


def write_recipe(folder: Path, settings: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(to_plain(make_config(settings, log_every=1))))
    return path


def command(recipe: Path, overrides: list[str]) -> list[str]:
    script = recipe.parent / "run_training.py"
    script.write_text("import sys; from dasheng_tokenizer.training import train; train(sys.argv[1], sys.argv[2:])")
    return [str(script), str(recipe), *overrides]


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(settings: dict[str, Any], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, settings)
    changes = ["steps=200", "checkpoint_every=5"]
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
    assert [record["step"] for record in read_log(killed / "log.jsonl", "train")] == list(range(1, 201))
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
    subprocess.run(
        [*launcher, *command(recipe, [f"output={two}", "text_cache=" + str(tmp_path / "t")])],
        env=environment,
        check=True,
    )
    for kind in ("train", "validation"):
        curves = [read_log(folder / "log.jsonl", kind) for folder in (one, two)]
        assert len(curves[0]) == len(curves[1]) > 0
        for a, b in zip(*curves, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)
            assert b["audio_hours"] == pytest.approx(a["audio_hours"], rel=0.25)  # of rank 0, doubled
