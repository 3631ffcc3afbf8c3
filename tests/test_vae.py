"""The VAE baseline: its posterior, the model's promises kept, its training, and a recipe that mirrors the default."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from transformers import AutoModel

from conftest import SIZES, tiny
from dasheng_tokenizer import AudioTokens, DashengTokenizerConfig, DashengTokenizerModel, chunking
from dasheng_tokenizer.checkpoints import load_semantic_weights
from dasheng_tokenizer.chunking import decode_blocks, encode_blocks
from dasheng_tokenizer.cli import main
from dasheng_tokenizer.errors import ConfigurationError, LatentError, ModelMismatchError
from dasheng_tokenizer.evaluation.representations import TokenizerEmbedder
from dasheng_tokenizer.evaluation.xares_encoder import DashengTokenizerEncoder
from dasheng_tokenizer.training import train
from dasheng_tokenizer.training.configuration import LossWeights, OptimizerConfig, TrainingConfig, load_recipe, to_plain
from dasheng_tokenizer.training.data import Batch, CachedCrops, DataConfig, prepare_cache
from dasheng_tokenizer.training.feature_statistics import set_feature_statistics
from dasheng_tokenizer.training.loop import fit, make_fabric
from dasheng_tokenizer.training.run_log import read_log
from dasheng_tokenizer.training.tokenizer_task import TokenizerTask
from dasheng_tokenizer.vae import Posterior, VAEEncoder

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPES = Path(__file__).resolve().parents[1] / "recipes"

VAE: dict[str, Any] = {"latent_kind": "vae", "vae_dim": 8, "vae_depth": 2, "embed_dim": 24, **SIZES}


def tiny_vae(**changes: Any) -> DashengTokenizerModel:
    """Seeded, in eval mode, and with weights wide enough that every input matters to every output."""
    torch.manual_seed(0)
    model = DashengTokenizerModel(DashengTokenizerConfig(**{**VAE, **changes})).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


MODEL = tiny_vae()


def noise(*shape: int, seed: int = 0, scale: float = 0.1) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_posterior(seed: int = 0) -> Posterior:
    return Posterior(noise(2, 5, 3, seed=seed, scale=2.0), noise(2, 5, 3, seed=seed + 1, scale=2.0))


# ---------------------------------------------------------------------- posterior


def test_divergence_is_that_of_torch() -> None:
    posterior = random_posterior()
    normal = Normal(posterior.mean, (0.5 * posterior.log_variance).exp())
    expected = kl_divergence(normal, Normal(0.0, 1.0)).mean(-1)
    torch.testing.assert_close(posterior.kl(), expected)
    assert not Posterior(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)).kl().any()


def test_draws_are_seeded_and_have_the_moments_they_should() -> None:
    posterior = random_posterior()
    first, again, other = (posterior.sample(torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.manual_seed(3)
    default = posterior.sample()
    torch.manual_seed(3)
    assert torch.equal(posterior.sample(), default)
    many = Posterior(torch.full((1, 40_000, 1), 2.0), torch.full((1, 40_000, 1), -1.0))
    std, mean = torch.std_mean(many.sample(torch.Generator().manual_seed(0)))
    assert mean == pytest.approx(2.0, abs=0.01) and std == pytest.approx(np.exp(-0.5), abs=0.01)


def test_gradients_reach_mean_and_variance() -> None:
    posterior = Posterior(*(part.requires_grad_() for part in random_posterior()))
    posterior.sample().sum().backward()
    assert torch.equal(posterior.mean.grad, torch.ones(2, 5, 3))
    assert posterior.log_variance.grad.abs().min() > 0


# ---------------------------------------------------------------------- the model's promises


@given(samples=st.integers(1, 12_000))
@settings(max_examples=25, deadline=None)
@torch.no_grad()
def test_every_length_is_restored(samples: int) -> None:
    audio = noise(1, samples, seed=samples)
    out = MODEL(audio)
    assert out.audio.shape == audio.shape
    assert out.unified.shape == (1, -(-samples // 640), 8) == (1, out.unified.shape[1], MODEL.latent_dim)
    assert out.semantic is None and out.acoustic is None
    assert torch.equal(MODEL.encode(audio), out.unified)
    assert MODEL.decode(out.unified, num_samples=samples).shape == audio.shape


@given(data=st.data())
@settings(max_examples=10, deadline=None)
@torch.no_grad()
def test_batch_invariance(data: st.DataObject) -> None:
    """A clip alone, or padded with garbage under the mask beside clips of any length: the same."""
    lengths = data.draw(st.lists(st.integers(1, 12_000), min_size=2, max_size=4))
    audio = noise(len(lengths), max(lengths) + data.draw(st.integers(0, 1500)), seed=sum(lengths))
    mask = torch.arange(audio.shape[1]) < torch.tensor(lengths)[:, None]
    together = MODEL(audio, mask)
    for item, length in enumerate(lengths):
        alone = MODEL(audio[item : item + 1, :length])
        tokens = alone.unified.shape[1]
        assert int(together.token_mask[item].sum()) == tokens
        torch.testing.assert_close(together.unified[item, :tokens], alone.unified[0], rtol=0, atol=1e-5)
        assert not together.unified[item, tokens:].any()
        torch.testing.assert_close(together.audio[item, :length], alone.audio[0], rtol=0, atol=1e-5)
        assert not together.audio[item, length:].any()


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("block", [1, 7, 40])
@torch.no_grad()
def test_blocks_equal_the_whole(depth: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks shorter than the context, and longer; pieces of any size."""
    monkeypatch.setattr(chunking, "BLOCK_TOKENS", block)
    model = tiny_vae(vae_depth=depth)
    for samples in (1, 640 * block, 640 * 90 + 77):
        audio = noise(2, samples)
        whole = model.encode(audio)
        pieces = [piece.numpy() for piece in audio.split(7_000, dim=1)]
        blocks = torch.cat(list(encode_blocks(model, lambda p=pieces: p)), dim=1)
        torch.testing.assert_close(blocks, whole, rtol=0, atol=1e-5)
    joined = np.concatenate(list(decode_blocks(model, whole, 37)), axis=1)
    torch.testing.assert_close(torch.from_numpy(joined), model.decode(whole), rtol=0, atol=1e-5)


@torch.no_grad()
def test_encoder_context_is_what_it_says() -> None:
    encoder = MODEL.encoder
    assert isinstance(encoder, VAEEncoder)
    patches = noise(1, 60, 24, scale=1.0)
    changed = patches.clone()
    changed[:, 30] += 1.0
    touched = (encoder.posterior(changed).mean - encoder.posterior(patches).mean).abs()[0].amax(-1).nonzero()
    assert (int(touched.min()), int(touched.max())) == (30 - encoder.context_tokens, 30 + encoder.context_tokens)


@torch.no_grad()
def test_encode_is_the_mean_in_training_too() -> None:
    model = tiny_vae()
    audio = noise(1, 9_000)
    expected = model.encode(audio)
    assert torch.equal(model.train().encode(audio), expected)
    assert torch.isfinite(model(torch.zeros(1, 5_000)).audio).all()


def test_every_parameter_learns() -> None:
    model = tiny_vae()
    posterior = model.encoder(noise(2, 1024 + 640 * 8))
    (model._decode(posterior.sample()).square().mean() + posterior.kl().mean()).backward()
    assert [name for name, _ in model.trainable_parameters()] == [name for name, _ in model.named_parameters()]
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    audio = noise(2, 20_000)
    expected = MODEL.encode(audio)
    MODEL.save_pretrained(tmp_path)
    model = DashengTokenizerModel.from_pretrained(tmp_path, dtype=dtype).eval()
    encoded = model.encode(audio)
    assert encoded.dtype == dtype and model.decode(encoded).dtype == torch.float32
    assert (encoded.float() - expected).norm() / expected.norm() < 0.02


def test_tokens_of_any_rate_and_channels_through_a_file(tmp_path: Path) -> None:
    audio = noise(2, 30_001).numpy()
    tokens = MODEL.compress(audio, sampling_rate=44_100)
    assert tokens.latents.shape == (2, 18, 8)
    tokens.save(tmp_path / "a.tokens.safetensors")
    loaded = AudioTokens.load(tmp_path / "a.tokens.safetensors")
    assert MODEL.decompress(loaded).shape == audio.shape
    with pytest.raises(ModelMismatchError, match="force"):
        tiny_vae(vae_depth=1).decompress(loaded)
    with pytest.raises(ModelMismatchError, match="no force can mend"):
        tiny().decompress(loaded, force=True)
    with pytest.raises(LatentError, match="8"):
        MODEL.decode(torch.zeros(1, 3, 24))


def test_round_trip_of_a_folder_and_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    MODEL.save_pretrained(folder)
    loaded = AutoModel.from_pretrained(folder).eval()
    assert isinstance(loaded.encoder, VAEEncoder) and loaded.config.semantic_encoder == {}
    assert {key: getattr(loaded.config, key) for key in VAE} == VAE
    assert loaded.weights_hash() == MODEL.weights_hash()
    with torch.no_grad():
        assert torch.equal(loaded.encode(noise(1, 4_000)), MODEL.encode(noise(1, 4_000)))
    assert main(["info", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "25 a second, 8 wide" in shown and re.search(r"^semantic encoder +none$", shown, re.M)
    soundfile.write(tmp_path / "a.wav", noise(5_000).numpy(), 16_000)
    assert main(["reconstruct", str(tmp_path / "a.wav"), "-o", str(tmp_path / "b.wav"), "--model", str(folder)]) == 0
    assert soundfile.info(tmp_path / "b.wav").frames == 5_000


# ---------------------------------------------------------------------- what it must leave alone, what it has not


def test_other_models_keep_their_keys_and_old_configurations_load(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    assert not [key for key in load_file(tmp_path / "model.safetensors") if "projection" in key or "moments" in key]
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({key: held for key, held in fields.items() if "vae" not in key and "latent" not in key}))
    loaded = DashengTokenizerModel.from_pretrained(tmp_path)
    assert loaded.config.latent_kind == "unified" and loaded.weights_hash() == model.weights_hash()
    assert not any(name.startswith("model.vae") or name == "model.latent_kind" for name in make_task({}).identity())
    assert make_task(VAE).identity()["model.vae_dim"] == 8


@pytest.mark.parametrize(
    "ask",
    [
        lambda model: model.semantic_encoder,
        lambda model: model.encode_features(noise(1, 1664)),
        lambda model: model.encode_semantic(noise(1, 1664)),
        lambda model: model.encode_acoustic(noise(1, 1664)),
        lambda model: load_semantic_weights(model, "nowhere"),
        lambda model: set_feature_statistics(None, model, None),
        lambda model: TokenizerEmbedder(model, ["unified", "semantic"]),
    ],
)
def test_what_asks_for_semantic_parts_is_told(ask: Callable[[DashengTokenizerModel], Any]) -> None:
    with pytest.raises(ConfigurationError, match="no semantic or acoustic|this tokenizer has unified$"):
        ask(MODEL)


def test_its_latent_is_probed_as_unified(tmp_path: Path) -> None:
    clips = [noise(5_000, seed=1).numpy(), noise(900, seed=2).numpy()]
    embedder = TokenizerEmbedder(MODEL)
    assert embedder.names == ("unified",)
    for clip, found in zip(clips, embedder(clips), strict=True):
        with torch.no_grad():
            expected = MODEL.encode(torch.from_numpy(clip)[None])[0]
        torch.testing.assert_close(found["unified"], expected, rtol=0, atol=1e-5)
    MODEL.save_pretrained(tmp_path)
    encoder = DashengTokenizerEncoder(tmp_path)
    assert encoder(noise(1, 5_000)).shape == (1, 8, encoder.output_dim) == (1, 8, 8)
    with pytest.raises(ConfigurationError, match="this tokenizer has unified$"):
        DashengTokenizerEncoder(tmp_path, "acoustic")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"latent_kind": "vq"}, "'vq' is not one of unified, vae"),
        ({**VAE, "vae_dim": 0}, "vae_dim 0"),
        ({**VAE, "vae_depth": -1}, "vae_depth -1"),
        ({**VAE, "embed_dim": -3}, "embed_dim -3"),
        ({**VAE, "semantic_encoder": {"kind": "dasheng"}}, "no semantic encoder"),
        ({**VAE, "normalize_semantic": True}, "no semantic encoder"),
        ({**VAE, "length_mode": "published"}, "exact"),
    ],
)
def test_contradicting_configurations(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        DashengTokenizerConfig(**fields)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("semantic_weights=weights", "drop `semantic_weights`"),
        ("latent=semantic", "drop `latent`"),
        ("loss_weights.kl=-1", "loss_weights.kl"),
        ("model.vae_width=3", "unknown key 'model.vae_width'"),
    ],
)
def test_wrong_recipes_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load_recipe(RECIPES / "vae.yaml", [override])


# ---------------------------------------------------------------------- training


class Tones:
    """Batches of noisy harmonic tones, a function of the step alone."""

    def batches(self, first_step: int, steps: int) -> Iterator[Batch]:
        for step in range(first_step, first_step + steps):
            generator = torch.Generator().manual_seed(step % 4)
            times = torch.arange(640 * 8 + 1024) / 16_000
            pitch = 200 + 600 * torch.rand(4, 1, generator=generator)
            audio = sum(torch.sin(2 * torch.pi * k * pitch * times) / k for k in (1, 2, 3))
            yield Batch(0.2 * audio + 0.005 * torch.randn(audio.shape, generator=generator), None)


def make_task(model: dict[str, Any], output: Path = Path("unused"), **changes: Any) -> TokenizerTask:
    values: dict[str, Any] = {
        "output": output,
        "model": model or {"embed_dim": 32, "depth": 1, "num_heads": 2, **SIZES},
        "steps": 10,
        "optimizer": OptimizerConfig(lr=2e-3, warmup_steps=3),
        "loss_weights": LossWeights(mel=5.0, stft=1.0, kl=0.05),
        "gan_start_step": 10**6,
        "ema_decay": 0.9,
        "clip_grad_norm": 10.0,
        "log_every": 1,
        "checkpoint_every": 1000,
        "validate_every": 0,
        "accelerator": "cpu",
    }
    config = TrainingConfig(**{**values, **changes})
    torch.manual_seed(config.seed)
    return TokenizerTask(
        make_fabric(config), config, DashengTokenizerModel(DashengTokenizerConfig(**config.model)), Tones()
    )


def test_a_tiny_run_learns(tmp_path: Path) -> None:
    task = make_task(VAE, tmp_path, steps=40)
    assert fit(task.fabric, task, task.config)
    records = read_log(tmp_path / "log.jsonl", "train")
    first, last = (np.mean([record["mel"] for record in part]) for part in (records[:4], records[-4:]))
    assert last < 0.75 * first
    assert all(record["kl"] > 0 and "semantic" not in record for record in records)
    record = records[0]
    assert record["loss"] == pytest.approx(5 * record["mel"] + record["stft"] + 0.05 * record["kl"], rel=1e-4)
    saved = DashengTokenizerModel.from_pretrained(tmp_path / "model")
    assert saved.config.provenance["latent"] == "vae" and saved.latent_dim == 8


def test_the_divergence_falls_where_it_weighs_most(tmp_path: Path) -> None:
    ends = []
    for weight in (0.0, 20.0):
        task = make_task(VAE, tmp_path, loss_weights=LossWeights(mel=5.0, kl=weight))
        for step, batch in enumerate(Tones().batches(0, 12)):
            result = task.training_step(batch, step)
            assert ("kl" in result.losses) == (weight > 0)
        with torch.no_grad():
            ends.append(float(task._generate(batch).posterior.kl().mean()))
    assert ends[1] < 0.5 * ends[0]


def test_a_step_decodes_a_draw(tmp_path: Path) -> None:
    task = make_task(VAE, tmp_path)
    batch = next(Tones().batches(0, 1))
    with torch.no_grad():
        torch.manual_seed(5)
        first = task._generate(batch)
        other = task._generate(batch)
        torch.manual_seed(5)
        again = task._generate(batch)
    assert torch.equal(first.audio, again.audio) and not torch.equal(first.audio, other.audio)
    assert torch.equal(first.posterior.mean, other.posterior.mean)


def test_resume_is_exact(tmp_path: Path) -> None:
    """With a GAN and two parts a batch: every draw of the rest of the run is what it would have been."""
    changes: dict[str, Any] = {"gan_start_step": 3, "accumulate": 2, "steps": 8}
    whole = make_task(VAE, tmp_path / "a", **changes)
    torch.manual_seed(7)
    assert fit(whole.fabric, whole, whole.config)
    task = make_task(VAE, tmp_path / "b", **changes)
    original = task.training_step

    def interrupted(batch: Batch, step: int) -> Any:
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(batch, step)

    task.training_step = interrupted  # type: ignore[method-assign]
    torch.manual_seed(7)
    assert not fit(task.fabric, task, task.config)
    resumed = make_task(VAE, tmp_path / "b", **changes)
    torch.manual_seed(99)
    assert fit(resumed.fabric, resumed, resumed.config)
    saved = [load_file(tmp_path / name / "model" / "model.safetensors") for name in "ab"]
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])


def test_a_vae_has_no_part_to_decode(tmp_path: Path) -> None:
    MODEL.save_pretrained(tmp_path)
    config = TrainingConfig(output=tmp_path / "run", init=tmp_path, latent="acoustic", accelerator="cpu")
    with pytest.raises(ConfigurationError, match="no acoustic part"):
        TokenizerTask(make_fabric(config), config, DashengTokenizerModel.from_pretrained(tmp_path), Tones())


@pytest.fixture
def corpus(tmp_path: Path) -> list[str]:
    """Overrides that point a recipe at a few short clips."""
    rng = np.random.default_rng(0)
    for split in ("train", "valid"):
        folder = tmp_path / split
        folder.mkdir()
        for index in range(4):
            times = np.arange(12_000 + 1000 * index) / 16_000
            tone = 0.3 * np.sin(2 * np.pi * (150 + 40 * index) * times) + 0.01 * rng.standard_normal(len(times))
            soundfile.write(folder / f"{index}.wav", tone.astype(np.float32), 16_000)
    return [f"data.train=[{tmp_path / 'train'}]", f"data.valid=[{tmp_path / 'valid'}]"]


def tiny_overrides(tmp_path: Path, corpus: list[str]) -> list[str]:
    return [
        *corpus, "model={latent_kind: vae, vae_dim: 8, vae_depth: 1, embed_dim: 24, decoder_embed_dim: 32, "
        "decoder_depth: 1, decoder_intermediate_size: 48}", "steps=2", "gan_start_step=1", "data.batch_size=4",
        "data.crop_seconds=0.32", "discriminator.multi_frequency_options.channels=4", "validation_clips=2",
        "accelerator=cpu", "log_every=1", f"data.cache={tmp_path / 'cache'}",
    ]  # fmt: skip


def test_a_whole_run_of_the_recipe(tmp_path: Path, corpus: list[str]) -> None:
    folder = train(RECIPES / "vae.yaml", [*tiny_overrides(tmp_path, corpus), f"output={tmp_path / 'run'}"])
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["validation"]["kl"] > 0 and summary["validation"]["mel"] > 0
    assert [("adversarial" in record, "kl" in record) for record in read_log(folder / "log.jsonl", "train")] == [
        (False, True),
        (True, True),
    ]
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.semantic")) == 0


@pytest.mark.slow
def test_two_processes(tmp_path: Path, corpus: list[str]) -> None:
    code = "import sys; from dasheng_tokenizer.training import train; train(sys.argv[1], sys.argv[2:])"
    (tmp_path / "run_training.py").write_text(code)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    overrides = [*tiny_overrides(tmp_path, corpus), f"output={tmp_path / 'run'}"]
    words = [*launcher, str(tmp_path / "run_training.py"), str(RECIPES / "vae.yaml"), *overrides]
    subprocess.run(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    records = read_log(tmp_path / "run" / "log.jsonl", "train")
    assert [record["step"] for record in records] == [1, 2]
    assert "2 x CPU" in json.loads((tmp_path / "run" / "summary.json").read_text())["hardware"]


def test_crops_are_those_of_a_run_with_an_encoder(tmp_path: Path, corpus: list[str]) -> None:
    config = DataConfig(train=[str(tmp_path / "train")], crop_seconds=0.32, batch_size=3, cache=str(tmp_path / "cache"))
    alone, beside = (CachedCrops(prepare_cache(model, config, progress=False), config) for model in (None, tiny()))
    assert alone.cache.folder != beside.cache.folder
    for step in range(6):
        batch, other = alone.crops_for_step(step), beside.crops_for_step(step)
        assert torch.equal(batch.audio, other.audio)
        assert batch.features is None and other.features is not None


# ---------------------------------------------------------------------- recipe


def test_recipe_mirrors_the_default() -> None:
    default, vae = (to_plain(load_recipe(RECIPES / f"{name}.yaml")) for name in ("default", "vae"))
    assert {key for key in default if default[key] != vae[key]} == {
        "output",
        "semantic_weights",
        "acoustic_start",
        "freeze_acoustic",
        "model",
        "loss_weights",
    }
    weights = default["loss_weights"]
    assert vae["loss_weights"] == {**weights, "semantic": LossWeights().semantic, "kl": 0.25}
    assert default["model"].items() <= vae["model"].items()


def test_recipe_states_its_parameters() -> None:
    """Those of the default recipe, whose Whisper tiny encoder is 384 wide, are counted in a model of its sizes."""
    whisper = {"d_model": 384, "encoder_layers": 4, "encoder_attention_heads": 6, "encoder_ffn_dim": 1536}
    default, vae = (load_recipe(RECIPES / f"{name}.yaml") for name in ("default", "vae"))
    with torch.device("meta"):
        unified = DashengTokenizerModel(
            DashengTokenizerConfig(semantic_encoder={"kind": "whisper", "config": whisper}, **default.model)
        )
        model = DashengTokenizerModel(DashengTokenizerConfig(**vae.model))
    if default.freeze_acoustic:
        unified.freeze_acoustic_layer()

    def count(parameters: Any) -> int:
        return sum(parameter.numel() for parameter in parameters)

    def row(name: str) -> list[int]:
        line = re.search(rf"^#   {name} .*$", (RECIPES / "vae.yaml").read_text(), re.M)
        assert line is not None, name
        return [int(number.replace(",", "")) for number in re.findall(r"\b(?:[1-9][\d,]{4,}|0)\b", line[0])]

    heads = [count([*held.upsampler.parameters(), *held.decoder.parameters()]) for held in (unified, model)]
    frozen = count(unified.semantic_encoder.parameters())
    trained = [count(held for _, held in net.trainable_parameters()) for net in (unified, model)]
    blocks = count(model.encoder.convnext.parameters())
    injected = count(unified.encoder.parameters()) - frozen
    assert row("encoder") == [injected, count(model.encoder.parameters()), blocks]
    assert row("latent to upsampler") == [0, count(model.latent_projection.parameters())]
    assert row("upsampler and decoder") == heads and heads[0] == heads[1]
    assert row("trained in all") == trained
    assert row("frozen") == [frozen, 0]
