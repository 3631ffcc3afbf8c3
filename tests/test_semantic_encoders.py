"""Frozen encoders: loading published weights, equality with their originals, 25 Hz, always in eval mode."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    HubertConfig,
    HubertModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from conftest import SIZES, WAVE, WHISPER, tiny
from dasheng_tokenizer import DashengTokenizerConfig, DashengTokenizerModel
from dasheng_tokenizer.checkpoints import load_semantic_weights, new_tokenizer, semantic_settings
from dasheng_tokenizer.errors import CheckpointError, ConfigurationError
from dasheng_tokenizer.spectral import MelSpectrogram, with_context

WAVES = {"wavlm": (WavLMConfig, WavLMModel), "hubert": (HubertConfig, HubertModel)}
WAVES["wav2vec2"] = (Wav2Vec2Config, Wav2Vec2Model)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["dasheng", "whisper", "wavlm", "hubert", "wav2vec2"])
@torch.no_grad()
def test_25_tokens_a_second_and_always_eval(kind: str) -> None:
    model = tiny(kind).train()
    assert not any(module.training for module in model.semantic_encoder.modules())
    assert not any(parameter.requires_grad for parameter in model.semantic_encoder.parameters())
    audio = noise(1, 16_000 * 3)
    first, second = model.encode(audio), model.encode(audio)
    assert first.shape == (1, 75, 32)
    assert torch.equal(first, second)  # no dropout, no layer drop, no time masking


# ---------------------------------------------------------------------- Whisper


@torch.no_grad()
def test_whisper_equals_transformers_on_30_seconds(tmp_path: Path) -> None:
    """On a full window nothing is shortened, so features and encoder must agree with the originals."""
    torch.manual_seed(0)
    original = WhisperEncoder(WhisperConfig(**WHISPER)).eval()
    original.save_pretrained(tmp_path)
    model = new_tokenizer(tmp_path, **SIZES).eval()
    audio = noise(480_000)
    features = WhisperFeatureExtractor(feature_size=80)(audio.numpy(), sampling_rate=16_000, return_tensors="pt")
    mel = model.semantic_encoder.log_mel(with_context(audio[None], 750), torch.tensor([750]))
    # The extractor mirrors at the right end where we go on with silence; the last frames alone may differ.
    torch.testing.assert_close(mel[..., :-2], features.input_features[..., :-2], rtol=0, atol=2e-4)
    expected = original(features.input_features).last_hidden_state.unflatten(1, (-1, 2)).mean(2)
    found = model.encode_semantic(with_context(audio[None], 750))
    assert (found - expected)[:, :-2].norm() / expected.norm() < 1e-3


@torch.no_grad()
def test_whisper_from_a_whole_model_and_its_silence(tmp_path: Path) -> None:
    """Weights are found under `model.encoder.` too; silence after a clip is what the settings say."""
    whole = WhisperForConditionalGeneration(WhisperConfig(**WHISPER)).eval()
    whole.save_pretrained(tmp_path)
    settings = semantic_settings(tmp_path)["semantic_encoder"]
    model = new_tokenizer(tmp_path, **SIZES).eval()
    state = model.semantic_encoder.encoder.state_dict()
    assert torch.equal(state["layers.1.fc2.weight"], whole.model.encoder.layers[1].fc2.weight)
    without = DashengTokenizerModel(
        DashengTokenizerConfig(semantic_encoder={**settings, "silence_seconds": 0.0}, **SIZES)
    ).eval()
    load_semantic_weights(without, tmp_path)
    audio = noise(1, 12_800)
    extended = torch.cat([audio, torch.zeros(1, 32_000)], dim=1)
    by_hand = without.encode_semantic(with_context(extended, 70))[:, :20]
    torch.testing.assert_close(model.encode_semantic(with_context(audio, 20)), by_hand, rtol=0, atol=1e-6)
    assert not torch.allclose(without.encode_semantic(with_context(audio, 20)), by_hand, atol=1e-3)


def test_whisper_window_beyond_its_positions() -> None:
    settings = {"kind": "whisper", "config": WHISPER, "window_seconds": 31.0}
    with pytest.raises(ConfigurationError, match="positions"):
        DashengTokenizerModel(DashengTokenizerConfig(semantic_encoder=settings, **SIZES))


# ---------------------------------------------------------------------- WavLM, HuBERT, wav2vec2


@pytest.mark.parametrize("kind", WAVES)
@pytest.mark.parametrize("norm", ["group", "layer"])
@torch.no_grad()
def test_wave_encoders_equal_transformers(kind: str, norm: str, tmp_path: Path) -> None:
    config_class, model_class = WAVES[kind]
    torch.manual_seed(0)
    config = config_class(**WAVE, feat_extract_norm=norm, do_stable_layer_norm=norm == "layer")
    original = model_class(config).eval()
    original.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"do_normalize": false}')
    model = new_tokenizer(tmp_path, **SIZES).eval()
    assert model.config.semantic_encoder["normalize"] is False
    assert model.config.semantic_encoder["kind"] == kind
    audio = noise(1, 16_000)
    context = with_context(audio, 25)
    expected = original(context[:, 512 - 40 : -512 + 40]).last_hidden_state.unflatten(1, (-1, 2)).mean(2)
    found = model.encode_semantic(context)
    assert found.shape == (1, 25, 32)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_wave_normalisation_hides_level() -> None:
    model = tiny("wavlm")
    audio = noise(1, 16_000)
    quiet, loud = (model.encode_semantic(with_context(audio * gain, 25)) for gain in (0.2, 5.0))
    torch.testing.assert_close(quiet, loud, rtol=0, atol=1e-3)


# ---------------------------------------------------------------------- Dasheng in the layouts of its publications


def native() -> tuple[DashengTokenizerModel, dict[str, Tensor]]:
    model = tiny()
    return model, {key: tensor.clone() for key, tensor in model.semantic_encoder.state_dict().items()}


def single_file(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, "outputlayer.0.weight": torch.zeros(3), "outputlayer.0.bias": torch.zeros(3)}


def hub_folder(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"encoder.{key}": tensor for key, tensor in single_file(state).items() if "front_end" not in key}


def midashenglm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {
        "front_end.0.spectrogram.window": "front_end.spectrogram_window",
        "front_end.0.mel_scale.fb": "front_end.melscale_fbanks",
    }
    renamed = {names.get(k, k.replace("init_bn.1.", "init_bn.")): v for k, v in state.items()}
    for block in (0, 1):  # layer scales, undone in the projections, so that the whole is unchanged
        for scale, target in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
            gamma = 0.5 + torch.rand(32)
            renamed[f"blocks.{block}.{scale}.gamma"] = gamma
            for name in ("weight", "bias"):
                tensor = renamed[f"blocks.{block}.{target}.{name}"]
                renamed[f"blocks.{block}.{target}.{name}"] = tensor / (gamma[:, None] if name == "weight" else gamma)
    audio_encoder = {f"audio_encoder.{key}": tensor for key, tensor in renamed.items()}
    return {**audio_encoder, "decoder.model.embed_tokens.weight": torch.zeros(2, 2)}


@pytest.mark.parametrize("layout", [single_file, hub_folder, midashenglm])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@torch.no_grad()
def test_published_dasheng_weights(
    layout: Callable[[dict[str, Tensor]], dict[str, Tensor]], suffix: str, tmp_path: Path
) -> None:
    model, state = native()
    path = tmp_path / f"dasheng{suffix}"
    if suffix == ".pt":
        torch.save({"model": layout(state), "config": {"depth": 2}}, path)
    else:
        save_file({k: v.contiguous() for k, v in layout(state).items()}, path)
    settings = semantic_settings(path)
    assert (settings["embed_dim"], settings["depth"]) == (32, 2)
    fresh = new_tokenizer(path, num_heads=2, **SIZES).eval()
    context = with_context(noise(2, 20_000), 32)
    expected, found = (m.encode_semantic(context) for m in (model, fresh))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_foreign_and_incomplete_encoder_weights(tmp_path: Path) -> None:
    model, state = native()
    path = tmp_path / "weights.safetensors"
    for broken, message in (
        (
            {k: v for k, v in state.items() if k != "blocks.1.attn.qkv.bias"},
            "missing, for example blocks.1.attn.qkv.bias",
        ),
        ({**state, "blocks.2.norm1.weight": torch.ones(32)}, "unknown, for example blocks.2.norm1.weight"),
        ({**state, "norm.weight": torch.ones(31)}, "another shape"),
        ({"resnet.weight": torch.ones(2)}, "not weights of a Dasheng encoder"),
    ):
        save_file(broken, path)
        with pytest.raises(CheckpointError, match=message):
            load_semantic_weights(model, path)
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_semantic_weights(model, path)
    with pytest.raises(CheckpointError, match="no weights found"):
        load_semantic_weights(model, tmp_path / "absent")


class PickledCode:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code of a stranger ran",)


def test_pickled_code_does_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": PickledCode()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        semantic_settings(tmp_path / "evil.pt")
    assert "stranger" not in capsys.readouterr().out


def stand_in_for_torchaudio() -> types.ModuleType:
    """The two transforms the peer uses, for machines where torchaudio has no build that matches torch."""

    class Mel(nn.Module):
        def __init__(self, n_fft: int, n_mels: int, hop_length: int, **_: object) -> None:
            super().__init__()
            ours = MelSpectrogram(n_fft, n_mels, power=2.0)
            self.n_fft, self.hop = n_fft, hop_length
            self.spectrogram, self.mel_scale = ours.spectrogram, ours.mel_scale

        def forward(self, x: Tensor) -> Tensor:
            window = self.spectrogram.window
            stft = torch.stft(x, self.n_fft, self.hop, window=window, center=True, return_complex=True)
            return self.mel_scale.fb.T @ stft.abs().square()

    class Decibel(nn.Module):
        def __init__(self, top_db: float) -> None:
            super().__init__()
            self.top_db = top_db

        def forward(self, x: Tensor) -> Tensor:
            decibel = 10 * x.clamp(min=1e-10).log10()
            return decibel.maximum(decibel.max() - self.top_db)

    transforms = types.ModuleType("torchaudio.transforms")
    transforms.MelSpectrogram, transforms.AmplitudeToDB = Mel, Decibel  # type: ignore[attr-defined]
    torchaudio = types.ModuleType("torchaudio")
    torchaudio.transforms = transforms  # type: ignore[attr-defined]
    return torchaudio


@torch.no_grad()
def test_native_encoder_equals_the_package_of_its_authors(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("einops", reason="the peer package `dasheng` needs einops")
    try:
        import torchaudio  # noqa: F401
    except ImportError:
        module = stand_in_for_torchaudio()
        monkeypatch.setitem(sys.modules, "torchaudio", module)
        monkeypatch.setitem(sys.modules, "torchaudio.transforms", module.transforms)
    peer_module = pytest.importorskip("dasheng.pretrained.pretrained", reason="the peer package `dasheng` is absent")
    model, state = native()
    peer = peer_module.Dasheng(embed_dim=32, depth=2, num_heads=2).eval()
    peer.load_state_dict(state, strict=False)
    ours = DashengTokenizerModel(
        model.config.__class__(**{**model.config.to_dict(), "length_mode": "published"})
    ).eval()
    ours.load_state_dict(model.state_dict())
    audio = noise(1, 16_000 * 12)
    expected = peer(audio)
    found = ours(audio).semantic
    torch.testing.assert_close(found, expected[:, : found.shape[1]], rtol=0, atol=3e-5)


@pytest.mark.parametrize("kind", ["dasheng", "whisper", "hubert"])
def test_normalised_features(kind: str, tmp_path: Path) -> None:
    plain, model = tiny(kind), tiny(kind, normalize_semantic=True)
    mean, std = torch.linspace(-5, 5, 32), torch.linspace(0.3, 6, 32)
    std[3] = 1e-7  # a dimension that says nothing is centred only
    model.encoder.semantic_norm.set_statistics(mean, std)
    audio = 0.1 * torch.randn(2, 9000, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(9000) < torch.tensor([[9000], [4000]])
    raw, found = plain(audio, mask), model(audio, mask)
    expected = (raw.semantic - mean) / torch.where(std > 1e-4, std, 1.0)
    torch.testing.assert_close(found.semantic, expected * found.token_mask[..., None], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.acoustic, raw.acoustic, rtol=0, atol=0)
    alone = model.encode(audio[1:, :4000])
    torch.testing.assert_close(found.unified[1:, : alone.shape[1]], alone, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(type(model).from_pretrained(tmp_path).encode(audio), model.encode(audio), rtol=0, atol=0)
    assert model.half().encoder.semantic_norm.mean.dtype == torch.float32
    assert not any("semantic_norm" in key for key in plain.state_dict())
