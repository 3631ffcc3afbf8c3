"""The model that ships inside the package, on the bundled clips."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from dasheng_tokenizer import AudioTokens, DashengTokenizerModel, load_audio
from dasheng_tokenizer.audio import resample
from dasheng_tokenizer.checkpoints import embedded_default
from dasheng_tokenizer.evaluation.metrics import mel_distance, stoi
from dasheng_tokenizer.training import train

CLIPS = embedded_default().parent / "clips"


@pytest.fixture(scope="module")
def model() -> DashengTokenizerModel:
    return DashengTokenizerModel.from_pretrained().eval()


@pytest.fixture(scope="module")
def clips() -> dict[str, torch.Tensor]:
    return {path.stem: torch.from_numpy(load_audio(path)[0][0]) for path in sorted(CLIPS.glob("*.flac"))}


def test_it_is_small_documented_and_float16_on_disk() -> None:
    folder = embedded_default()
    files = list(folder.iterdir())
    assert sum(path.stat().st_size for path in files) < 50 * 2**20
    assert all(path.stat().st_size <= 30 * 2**20 for path in files)
    card = (folder / "README.md").read_text()
    assert "{{" not in card
    assert "MIT" in card and "Apache-2.0" in card
    provenance = json.loads((folder / "config.json").read_text())["provenance"]
    assert provenance["audio_hours_seen"] > 0 and provenance["hardware"]
    stored = set()  # of matrices; norms are kept as they run, in float32
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as weights:
            slices = {key: weights.get_slice(key) for key in weights.keys() if ".blocks" in key or "layers" in key}
            stored |= {held.get_dtype() for held in slices.values() if len(held.get_shape()) > 1}
    assert stored == {"F16"}


def test_loaded_as_float32_for_inference(model: DashengTokenizerModel) -> None:
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
    assert (model.latent_dim, model.frame_rate) == (384, 25.0)


@torch.inference_mode()
def test_batch_invariance_on_real_audio(model: DashengTokenizerModel, clips: dict[str, torch.Tensor]) -> None:
    audio = [*clips.values(), clips["music"][:700] * 0.01, clips["sound"][:20_001]]
    batch = torch.nn.utils.rnn.pad_sequence(audio, batch_first=True)
    lengths = torch.tensor([len(clip) for clip in audio])
    together = model(batch, torch.arange(batch.shape[1]) < lengths[:, None])
    for item, clip in enumerate(audio):
        alone = model(clip[None])
        tokens = alone.unified.shape[1]
        # Relative, too: these latents reach 11.
        torch.testing.assert_close(together.unified[item, :tokens], alone.unified[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(together.audio[item, : len(clip)], alone.audio[0], rtol=0, atol=1e-5)


def test_reconstruction_resembles_the_original(model: DashengTokenizerModel, clips: dict[str, torch.Tensor]) -> None:
    """Far from what noise or another clip would give; the real figures are in docs/results.md."""
    decoded = {name: model.decompress(model.compress(clip.numpy(), 16_000))[0].numpy() for name, clip in clips.items()}
    assert stoi(clips["speech"].numpy(), decoded["speech"]) > 0.85
    for name, clip in clips.items():
        own = mel_distance(clip.numpy(), decoded[name])
        assert own < 0.25
        for other in decoded.keys() - {name}:
            length = min(len(clip), len(decoded[other]))
            assert own < 0.7 * mel_distance(clip.numpy()[:length], decoded[other][:length])


@torch.inference_mode()
def test_silence_decodes_to_silence(model: DashengTokenizerModel) -> None:
    for samples in (1, 700, 80_000):
        assert model(torch.zeros(1, samples)).audio.abs().max() < 1e-3  # -60 dBFS


@pytest.mark.parametrize(("rate", "most"), [(8000, 1.5), (16_000, 1.5), (22_050, 2.5)])
def test_what_has_empty_bands_is_not_lost(
    rate: int, most: float, model: DashengTokenizerModel, clips: dict[str, torch.Tensor]
) -> None:
    """At 8 kHz the fourth version made it 25 dB softer, the fifth up to 9 dB."""
    for name, clip in clips.items():
        given = resample(clip.numpy()[None], 16_000, rate)
        decoded = model.decompress(model.compress(given, rate)).numpy()
        difference = 10 * np.log10(np.mean(decoded**2) / np.mean(given**2))
        assert abs(difference) < most, (name, difference)  # dB


@torch.inference_mode()
def test_no_offset_comes_in(model: DashengTokenizerModel, clips: dict[str, torch.Tensor]) -> None:
    for clip in clips.values():
        assert abs(float(model(clip[None]).audio.mean() - clip.mean())) < 1e-3  # -60 dBFS


def test_no_click_where_windows_of_the_encoder_meet(
    model: DashengTokenizerModel, clips: dict[str, torch.Tensor]
) -> None:
    """Three windows of 30 s. A click is a jump of the slope, against what the original does there."""
    clip = torch.cat([clips["music"], clips["sound"], clips["speech"]])
    audio = clip.repeat(1 + 1_040_000 // len(clip))[:1_040_000]  # 65 s
    decoded = model.decompress(model.compress(audio.numpy(), 16_000))[0]
    jumps = (decoded.diff(n=2) - audio.diff(n=2)).abs()
    peaks = jumps[: len(jumps) // 640 * 640].unflatten(0, (-1, 640)).amax(1)  # of every token
    border = 30 * 25
    at_borders = torch.cat([peaks[k * border - 2 : k * border + 2] for k in (1, 2)])
    assert at_borders.max() < peaks.quantile(0.99)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_token_files_of_every_type(
    dtype: torch.dtype, model: DashengTokenizerModel, clips: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    clip = clips["speech"].numpy()[:48_000]
    exact = model.decompress(model.compress(clip, 16_000))[0]
    model.compress(clip, 16_000).to(dtype).save(tmp_path / "x.tokens.safetensors")
    loaded = model.decompress(AudioTokens.load(tmp_path / "x.tokens.safetensors"))[0]
    assert loaded.shape == exact.shape
    assert mel_distance(exact.numpy(), loaded.numpy()) < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_half_precision(dtype: torch.dtype, model: DashengTokenizerModel, clips: dict[str, torch.Tensor]) -> None:
    half = DashengTokenizerModel.from_pretrained(dtype=dtype).eval()
    clip = clips["speech"][None, :48_000]
    expected, found = model(clip), half(clip)
    assert (found.unified.float() - expected.unified).norm() / expected.unified.norm() < 0.05
    assert mel_distance(expected.audio[0].numpy(), found.audio[0].numpy()) < 0.1


@pytest.mark.usefixtures("one_thread")
def test_the_recipe_for_fine_tuning_trains_its_decoder_and_leaves_the_latents(
    tmp_path: Path, model: DashengTokenizerModel, clips: dict[str, torch.Tensor]
) -> None:
    recipe = Path(__file__).resolve().parents[1] / "recipes" / "finetune.yaml"
    overrides = [
        f"init={embedded_default()}", f"output={tmp_path / 'run'}", f"data.train=[{CLIPS}]", f"data.valid=[{CLIPS}]",
        f"data.cache={tmp_path / 'cache'}", "data.batch_size=2", "steps=3", "optimizer.warmup_steps=1",
        "accelerator=cpu",
    ]  # fmt: skip
    train(recipe, overrides)
    tuned = DashengTokenizerModel.from_pretrained(tmp_path / "run" / "model").eval()
    speech = clips["speech"][None, :20_000]
    with torch.inference_mode():
        torch.testing.assert_close(tuned.encode(speech), model.encode(speech), rtol=0, atol=1e-3)
        latents = model.encode(speech)
        assert (tuned.decode(latents) - model.decode(latents)).abs().max() > 1e-3
    assert tuned.weights_hash() != model.weights_hash()
