"""Behaviour of the model: exact lengths, batch invariance, blocks = whole, precision, bad input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModel

import dasheng_tokenizer
from conftest import tiny
from dasheng_tokenizer import DashengTokenizerConfig, DashengTokenizerModel
from dasheng_tokenizer.chunking import decode_blocks, encode_blocks
from dasheng_tokenizer.errors import AudioError, CheckpointError, ConfigurationError, LatentError, MaskError
from dasheng_tokenizer.errors import ModelMismatchError as Mismatch

KINDS = ["dasheng", "whisper", "wavlm", "hubert", "wav2vec2"]
MODELS = {kind: tiny(kind) for kind in KINDS}


def noise(*shape: int, seed: int = 0, scale: float = 0.1) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(samples=st.integers(1, 20_000))
@settings(max_examples=40, deadline=None)
@torch.no_grad()
def test_every_length_is_restored(samples: int) -> None:
    model = MODELS["dasheng"]
    audio = noise(1, samples, seed=samples)
    out = model(audio)
    assert out.audio.shape == audio.shape
    assert out.unified.shape == (1, -(-samples // 640), model.latent_dim)
    assert torch.equal(model.encode(audio), out.unified)
    assert model.decode(out.unified, num_samples=samples).shape == audio.shape
    assert model.decode(out.unified).shape[1] == 640 * out.unified.shape[1]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=8, deadline=None)
@torch.no_grad()
def test_batch_invariance(kind: str, data: st.DataObject) -> None:
    """A clip alone, padded, with garbage under the mask, beside clips of any length and loudness: the same."""
    model = MODELS[kind]
    lengths = data.draw(st.lists(st.integers(1, 9_000), min_size=2, max_size=4))
    scales = data.draw(st.lists(st.sampled_from([1e-4, 0.1, 1.0]), min_size=len(lengths), max_size=len(lengths)))
    audio = noise(len(lengths), max(lengths) + data.draw(st.integers(0, 1500)), seed=sum(lengths))
    audio = audio * torch.tensor(scales)[:, None]
    mask = torch.arange(audio.shape[1]) < torch.tensor(lengths)[:, None]
    together = model(audio, mask)
    for item, length in enumerate(lengths):
        alone = model(audio[item : item + 1, :length])
        tokens = alone.unified.shape[1]
        assert int(together.token_mask[item].sum()) == tokens
        for name in ("semantic", "acoustic", "unified"):
            torch.testing.assert_close(together[name][item, :tokens], alone[name][0], rtol=0, atol=1e-5)
            assert not together[name][item, tokens:].any()
        torch.testing.assert_close(together.audio[item, :length], alone.audio[0], rtol=0, atol=1e-5)
        assert not together.audio[item, length:].any()


@torch.no_grad()
def test_batch_invariance_over_windows() -> None:
    """Clips that end in different windows of the semantic encoder (10.08 s)."""
    model, lengths = MODELS["dasheng"], [330_000, 161_280, 170_000, 5_000]
    audio = noise(4, max(lengths))
    audio[0] *= 30
    out = model(audio, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])
    for item, length in enumerate(lengths):
        alone = model.encode(audio[item : item + 1, :length])[0]
        torch.testing.assert_close(out.unified[item, : len(alone)], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["dasheng", "whisper", "hubert"])
@torch.no_grad()
def test_blocks_equal_the_whole(kind: str) -> None:
    model = MODELS[kind]
    samples = 16_000 * 64 + 77
    audio = noise(2, samples)
    audio[:, 16_000 * 40 :] *= 20  # the loudest part comes late: a floor per block would show
    whole = model.encode(audio)
    pieces = [p.numpy() for p in audio.split([1, 5, 100_000, samples - 100_006], dim=1)]
    blocks = torch.cat(list(encode_blocks(model, lambda: pieces)), dim=1)
    torch.testing.assert_close(blocks, whole, rtol=0, atol=1e-5)
    decoded = model.decode(whole)
    for size in (37, 750):
        joined = np.concatenate(list(decode_blocks(model, whole, size)), axis=1)
        torch.testing.assert_close(torch.from_numpy(joined), decoded, rtol=0, atol=1e-5)


@torch.no_grad()
def test_decoder_context_is_what_it_says() -> None:
    """A latent `context` tokens away changes nothing, one within does: the bound is right and not wasteful."""
    model = MODELS["dasheng"]
    latents = noise(1, 80, model.latent_dim, scale=1.0)
    changed = latents.clone()
    changed[:, 40] += 1.0
    difference = (model.decode(changed) - model.decode(latents)).abs()[0]
    context = -(-model.decoder.context_frames // 2)
    touched = difference.nonzero()
    assert int(touched.min()) >= 640 * (40 - context)
    assert int(touched.max()) < 640 * (41 + context)
    assert int(touched.min()) < 640 * (42 - context)


@given(
    rate=st.sampled_from([8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000, 192_000]),
    channels=st.integers(1, 3),
    samples=st.integers(1, 30_000),
)
@settings(max_examples=30, deadline=None)
def test_compress_restores_length_rate_and_channels(rate: int, channels: int, samples: int) -> None:
    model = MODELS["dasheng"]
    audio = noise(channels, samples, seed=samples).numpy()
    tokens = model.compress(audio, sampling_rate=rate)
    restored = model.decompress(tokens)
    assert restored.shape == audio.shape
    assert restored.dtype == torch.float32
    assert tokens.sampling_rate == rate
    assert torch.isfinite(restored).all()


def test_compress_takes_integers_and_mono() -> None:
    model = MODELS["dasheng"]
    audio = (noise(5_000).numpy() * 32768).astype(np.int16)
    tokens = model.compress(audio, sampling_rate=16_000)
    floating = model.compress(audio.astype(np.float32) / 32768, sampling_rate=16_000)
    assert torch.equal(tokens.latents, floating.latents)
    assert model.decompress(tokens).shape == (1, 5_000)


def test_tokens_of_another_model_are_refused() -> None:
    model, other = MODELS["dasheng"], tiny()
    with torch.no_grad():
        other.upsampler.bias += 0.1
    tokens = model.compress(noise(3_000).numpy(), sampling_rate=16_000)
    with pytest.raises(Mismatch, match="force"):
        other.decompress(tokens)
    assert other.decompress(tokens, force=True).shape == (1, 3_000)


def test_gradients_reach_the_acoustic_layer_but_not_the_frozen_encoder() -> None:
    model = tiny().train()
    assert not model.semantic_encoder.training
    model(noise(2, 4_000)).audio.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (not name.startswith("encoder.model.")), name
    assert model.encoder.patch_embed.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["dasheng", "whisper"])
@torch.no_grad()
def test_half_precision_keeps_spectra_and_sums_in_float32(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    reference = MODELS[kind]
    reference.save_pretrained(tmp_path)
    audio = noise(2, 20_000)
    expected = reference.encode(audio)
    cast = tiny(kind).to(dtype)
    loaded = DashengTokenizerModel.from_pretrained(tmp_path, dtype=dtype).eval()
    for model in (cast, loaded):
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            spectral = any(
                part in name for part in ("spectrogram", "mel_scale", "init_bn", "patch_embed", "norm", "head.")
            )
            if tensor.is_floating_point():
                assert tensor.dtype == (torch.float32 if spectral else dtype), name
        assert model.dtype == dtype
        encoded = model.encode(audio)
        assert encoded.dtype == dtype
        assert (encoded.float() - expected).norm() / expected.norm() < 0.01
        assert model.decode(encoded).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_tokens_of_a_model_in_half_precision_are_of_the_same_model(dtype: torch.dtype, tmp_path: Path) -> None:
    exact = MODELS["dasheng"]
    exact.save_pretrained(tmp_path)
    audio = noise(1, 5_000).numpy()
    for half in (
        DashengTokenizerModel.from_pretrained(tmp_path, dtype=dtype),
        AutoModel.from_pretrained(tmp_path, dtype=str(dtype).split(".")[1]),
    ):
        assert half.dtype == dtype
        tokens = half.eval().compress(audio, 16_000)
        assert tokens.weights_hash == exact.weights_hash() and tokens.dtype == dtype
        assert exact.decompress(tokens).shape == audio.shape
    moved = tiny()
    assert moved.weights_hash() == moved.to(dtype).weights_hash() == exact.weights_hash()
    moved.upsampler.bias.add_(1)
    assert moved.weights_hash() != exact.weights_hash()
    identified = tiny()
    identified.weights_hash()
    identified.to_empty(device="cpu")
    identified.load_state_dict({name: tensor + 1 for name, tensor in exact.state_dict().items()})
    assert identified.weights_hash() != exact.weights_hash()


def test_auto_classes_and_round_trip(tmp_path: Path) -> None:
    model = MODELS["whisper"]
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), DashengTokenizerConfig)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, DashengTokenizerModel)
    assert loaded.weights_hash() == model.weights_hash()
    trained = {name for name, _ in loaded.trainable_parameters()}
    assert trained == {name for name, _ in loaded.named_parameters() if not name.startswith("encoder.model.")}
    with torch.no_grad():
        assert torch.equal(loaded.encode(noise(1, 4_000)), model.encode(noise(1, 4_000)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_sample_is_refused_with_its_place(value: float) -> None:
    audio = noise(3, 2_000)
    audio[1, 777] = value
    with pytest.raises(AudioError, match="clip 1 at sample 777"):
        MODELS["dasheng"].encode(audio)


@pytest.mark.parametrize(
    "audio",
    [torch.zeros(16_000), torch.zeros(1, 0), torch.zeros(0, 100), torch.zeros(1, 1, 9), torch.zeros(1, 9).int()],
)
def test_audio_of_wrong_shape_or_type(audio: torch.Tensor) -> None:
    with pytest.raises(AudioError, match="ndarray.*torch.from_numpy.*compress"):
        MODELS["dasheng"].encode(audio.numpy())
    with pytest.raises(AudioError):
        MODELS["dasheng"].encode(audio)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 99, dtype=torch.bool), "shape"),
        (torch.arange(100)[None].repeat(2, 1) >= 50, "on the left"),
        ((torch.arange(100)[None].repeat(2, 1) % 7) != 3, "in the middle"),
        (torch.zeros(2, 100, dtype=torch.bool), "every sample"),
        (torch.full((2, 100), 2), "0 and 1"),
    ],
)
def test_bad_masks(mask: torch.Tensor, message: str) -> None:
    with pytest.raises(MaskError, match=message):
        MODELS["dasheng"].encode(noise(2, 100), padding_mask=mask)


def test_bad_latents() -> None:
    model = MODELS["dasheng"]
    for latents in (
        torch.zeros(1, 3),
        torch.zeros(1, 0, 32),
        torch.zeros(1, 3, 31),
        torch.full((1, 3, 32), float("nan")),
    ):
        with pytest.raises(LatentError):
            model.decode(latents)
    with pytest.raises(LatentError, match="num_samples"):
        model.decode(torch.zeros(1, 3, 32), num_samples=3 * 640 + 1)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_silence_is_no_error(kind: str) -> None:
    out = MODELS[kind](torch.zeros(2, 5_000))
    assert torch.isfinite(out.unified).all()
    assert torch.isfinite(out.audio).all()


@torch.no_grad()
def test_what_lies_below_the_floor_is_all_the_same(tmp_path: Path) -> None:
    model = tiny(log_mel_floor=3e-3)
    loud, faint = noise(1, 5_000), noise(1, 5_000, scale=1e-7)
    assert torch.equal(model.encode_acoustic(torch.zeros(1, 5_000)), model.encode_acoustic(faint))
    published = tiny()
    published.load_state_dict(model.state_dict())
    assert model.weights_hash() != published.weights_hash()  # other latents, though not by a weight
    torch.testing.assert_close(model.encode_acoustic(loud), published.encode_acoustic(loud))
    assert not torch.allclose(model.encode_acoustic(faint), published.encode_acoustic(faint), atol=1e-2)
    model.save_pretrained(tmp_path)
    again = DashengTokenizerModel.from_pretrained(tmp_path)
    torch.testing.assert_close(again.encode_acoustic(faint), model.encode_acoustic(faint))


def test_published_mode_says_what_it_cannot_do() -> None:
    model = tiny(length_mode="published")
    with pytest.raises(AudioError, match="exact"):
        model.encode(noise(1, 512))
    assert model.encode(noise(1, 513)).shape[1] == 1
    with pytest.raises(ConfigurationError, match="exact"):
        model.compress(noise(9_000).numpy(), sampling_rate=16_000)


@pytest.mark.parametrize(
    "fields",
    [
        {"semantic_encoder": {"kind": "mfcc"}},
        {"semantic_encoder": {"kind": "whisper"}},
        {"semantic_encoder": {"kind": "whisper", "config": {"d_model": 8}}, "embed_dim": 9},
        {"length_mode": "roughly"},
        {"istft_hop": 300},
        {"istft_n_fft": 1000},
        {"log_mel_floor": 0},
        {"log_mel_floor": "low"},
        {"log_mel_floor": float("nan")},
        {"embed_dim": 30, "num_heads": 4},
    ],
)
def test_contradicting_configurations(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        DashengTokenizerConfig(**fields)


def test_unknown_model_names_and_broken_folders(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="embedded default"):
        DashengTokenizerModel.from_pretrained(str(tmp_path / "nothing"))
    with pytest.raises(CheckpointError, match="folder"):
        DashengTokenizerModel.from_pretrained("nobody/no-such-tokenizer", local_files_only=True)
    from safetensors.torch import load_file, save_file

    model = MODELS["dasheng"]
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    state = load_file(weights)
    for broken, message in (
        ({k: v for k, v in state.items() if k != "upsampler.bias"}, "missing keys: upsampler.bias"),
        ({**state, "quantizer.codebook": torch.zeros(2)}, "unexpected keys: quantizer.codebook"),
        ({**state, "upsampler.bias": torch.zeros(3)}, "upsampler.bias"),
    ):
        save_file(broken, weights, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            DashengTokenizerModel.from_pretrained(tmp_path)
    weights.write_bytes(weights.read_bytes()[:5_000])
    with pytest.raises(CheckpointError):
        DashengTokenizerModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError):
        DashengTokenizerModel.from_pretrained(tmp_path)


def test_public_names() -> None:
    for name in dasheng_tokenizer.__all__:
        assert getattr(dasheng_tokenizer, name) is not None
    model = MODELS["dasheng"]
    assert (model.sampling_rate, model.hop_length, model.frame_rate, model.latent_dim) == (16_000, 640, 25.0, 32)
