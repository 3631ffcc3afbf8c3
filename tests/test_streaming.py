"""Live audio: whatever the blocks are, tokens and reconstruction are those of the whole recording, and come in time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dasheng_tokenizer import DashengTokenizerConfig, DashengTokenizerModel, load_audio, save_audio
from dasheng_tokenizer.checkpoints import embedded_default
from dasheng_tokenizer.chunking import clip_level
from dasheng_tokenizer.errors import AudioError, ConfigurationError, LatentError
from dasheng_tokenizer.streaming import DecoderStream, EncoderStream, streaming_latency

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[1]
Audio = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def embedded() -> DashengTokenizerModel:
    return DashengTokenizerModel.from_pretrained().eval()


def make(kind: str) -> DashengTokenizerModel:
    """A tiny model whose window is half a second, or which is a VAE."""
    sizes = {"embed_dim": 32, "decoder_embed_dim": 24, "decoder_depth": 2, "decoder_intermediate_size": 48}
    whisper = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    parts = {
        "dasheng": {"depth": 1, "num_heads": 2},
        "whisper": {"semantic_encoder": {"kind": "whisper", "config": whisper, "silence_seconds": 0.2}},
        "vae": {"latent_kind": "vae", "vae_dim": 8, "vae_depth": 2},
    }
    torch.manual_seed(1)
    model = DashengTokenizerModel(DashengTokenizerConfig(**sizes, **parts[kind])).eval()
    if kind != "vae":
        model.set_encoder_window(0.48)
    return model


@pytest.fixture(scope="module", params=["dasheng", "whisper", "vae"])
def tiny(request: pytest.FixtureRequest) -> DashengTokenizerModel:
    return make(request.param)


def noise(samples: int, channels: int = 1) -> Audio:
    return 0.2 * np.random.default_rng(samples).standard_normal((channels, samples)).astype(np.float32)


def whole(model: DashengTokenizerModel, audio: Audio, rate: int) -> tuple[Tensor, Tensor]:
    tokens = model.compress(audio, rate)
    return tokens.latents, model.decompress(tokens)


def level_of(model: DashengTokenizerModel, audio: Audio) -> float | None:
    if model.config.is_vae or not model.semantic_encoder.needs_level:
        return None
    level = clip_level(model, [audio])
    assert level is not None
    return float(level)


@given(samples=st.integers(1, 40_000), seed=st.integers(0, 10_000))
@settings(max_examples=12, deadline=None)
def test_any_blocks_give_what_the_whole_gives(tiny: DashengTokenizerModel, samples: int, seed: int) -> None:
    audio, rng = noise(samples), np.random.default_rng(seed)
    latents, reconstruction = whole(tiny, audio, 16_000)
    outputs = []
    with tiny.streaming(level=level_of(tiny, audio)) as stream:
        start = 0
        while start < samples:
            size = int(rng.integers(0, 3000))
            outputs.append(stream.push(audio[:, start : start + size]))
            start += size
        outputs.append(stream.finish())
    streamed = torch.cat([output.latents for output in outputs], dim=1)
    assert streamed.shape == latents.shape
    torch.testing.assert_close(streamed, latents, atol=1e-5, rtol=1e-5)
    heard = torch.cat([output.audio for output in outputs], dim=1)
    assert heard.shape == audio.shape
    torch.testing.assert_close(heard, reconstruction, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rate", [8_000, 44_100])
def test_stereo_at_any_rate(rate: int) -> None:
    model, audio = make("whisper"), noise(2 * rate + 17, channels=2)
    latents, reconstruction = whole(model, audio, rate)
    with model.streaming(sampling_rate=rate, num_channels=2) as stream:
        outputs = [stream.push(torch.from_numpy(block)) for block in np.array_split(audio, 37, axis=1)]
        outputs.append(stream.finish())
    torch.testing.assert_close(torch.cat([o.latents for o in outputs], dim=1), latents, atol=1e-4, rtol=1e-4)
    heard = torch.cat([o.audio for o in outputs], dim=1)
    assert heard.shape == audio.shape
    torch.testing.assert_close(heard, reconstruction, atol=1e-4, rtol=1e-4)


def test_the_embedded_default(embedded: DashengTokenizerModel) -> None:
    (clip, *_) = sorted((embedded_default().parent / "clips").glob("*.flac"))
    audio, rate = load_audio(clip)
    embedded.set_encoder_window(1.0)
    try:
        latents, reconstruction = whole(embedded, audio, rate)
        with embedded.streaming(rate, len(audio)) as stream:
            outputs = [stream.push(block) for block in np.array_split(audio, 50, axis=1)] + [stream.finish()]
    finally:
        embedded.set_encoder_window(30.0)
    streamed = torch.cat([output.latents for output in outputs], dim=1)
    assert (streamed - latents).norm() < 1e-3 * latents.norm()
    heard = torch.cat([output.audio for output in outputs], dim=1)
    assert heard.shape == audio.shape
    assert float((heard - reconstruction).abs().max()) < 1e-3


def test_nothing_comes_later_than_the_latency_says(tiny: DashengTokenizerModel) -> None:
    """And something comes just then: the figure is not only a bound."""
    to_token, to_audio = streaming_latency(tiny)
    pushed = tokens = heard = 0
    late_token = late_audio = 0.0
    with tiny.streaming() as stream:
        for block in np.array_split(noise(64_000), 400, axis=1):  # of 10 ms
            output = stream.push(block)
            pushed += block.shape[1]
            tokens += output.latents.shape[1]
            heard += output.audio.shape[1]
            late_token = max(late_token, (pushed - tokens * 640) / 16_000)  # age of the oldest without a token
            late_audio = max(late_audio, (pushed - heard) / 16_000)
    assert to_token - 0.01 <= late_token < to_token
    assert to_audio - 0.01 <= late_audio < to_audio


def test_a_sender_and_a_receiver() -> None:
    model, audio = make("whisper"), noise(20_000)
    sender, receiver = EncoderStream(model, 16_000), DecoderStream(model, 16_000)
    heard = [receiver.push(sender.push(block)) for block in np.array_split(audio, 9, axis=1)]
    heard += [receiver.push(sender.finish()), receiver.finish(20_000)]
    torch.testing.assert_close(torch.cat(heard, dim=1), whole(model, audio, 16_000)[1], atol=1e-5, rtol=1e-5)


def test_several_streams_of_one_model_do_not_meet() -> None:
    model, clips = make("whisper"), [noise(9_000), noise(9_001)]
    with model.streaming(reconstruct=False) as first, model.streaming(reconstruct=False) as second:
        parts: list[list[Tensor]] = [[], []]
        for start in range(0, 10_000, 700):
            for index, stream in enumerate((first, second)):
                parts[index].append(stream.push(clips[index][:, start : start + 700]).latents)
        for index, stream in enumerate((first, second)):
            last = stream.finish()
            assert last.audio.shape == (1, 0)
            streamed = torch.cat([*parts[index], last.latents], dim=1)
            torch.testing.assert_close(streamed, model.compress(clips[index], 16_000).latents, atol=1e-5, rtol=1e-5)


def test_memory_does_not_grow_with_the_stream() -> None:
    model = make("whisper")
    with model.streaming() as stream:
        for index in range(200):
            stream.push(noise(1600))
            assert stream.encoder is not None and stream.decoder is not None
            assert stream.encoder._blocks._held < 0.48 * 16_000 + 1600 + 2 * 512
            held = stream.decoder._decoder._held
            assert held is None or held.shape[1] <= 12 + 2 * 7, index


def test_bad_input_is_named() -> None:
    model = make("whisper")
    with model.streaming(num_channels=2) as stream:
        with pytest.raises(AudioError, match="a block has 1 channels, the stream has 2"):
            stream.push(noise(100))
        with pytest.raises(AudioError, match="NaN or infinite"):
            stream.push(np.full((2, 5), np.nan))
        with pytest.raises(AudioError, match="ends without a sample"):
            stream.finish()
        stream.push(noise(100, 2))
        stream.finish()
        with pytest.raises(AudioError, match="open a new stream"):
            stream.push(noise(100, 2))
        with pytest.raises(AudioError, match="ended already"):
            stream.finish()
    with pytest.raises(AudioError, match="open a new one"):
        stream.push(noise(100, 2))
    with pytest.raises(AudioError, match="at least one"):
        model.streaming(num_channels=0)
    with pytest.raises(AudioError, match="8000 to 192000"):
        model.streaming(sampling_rate=4_000)
    with pytest.raises(LatentError, match="the latent width"):
        DecoderStream(model, 16_000).push(torch.zeros(1, 3, 7))
    with pytest.raises(AudioError, match="num_samples"):
        DecoderStream(model, 16_000).finish()
    for seconds in (0.0, 0.05, 31.0, -1.0):
        with pytest.raises(ConfigurationError, match=r"multiple of 0\.04 s up to 30 s"):
            model.set_encoder_window(seconds)
    with pytest.raises(ConfigurationError, match="vae"):
        make("vae").set_encoder_window(1.0)
    published = DashengTokenizerConfig(embed_dim=32, depth=1, num_heads=2, decoder_depth=1, length_mode="published")
    with pytest.raises(ConfigurationError, match="length_mode"):
        DashengTokenizerModel(published).streaming()


def test_a_set_window_is_that_of_a_configured_one() -> None:
    """Where there is no silence after a window, which reaches as far as the largest window does."""
    model = make("whisper")
    settings_ = {**model.config.semantic_encoder, "window_seconds": 0.48, "silence_seconds": 0.0}
    configured = DashengTokenizerModel(
        DashengTokenizerConfig(**{**model.config.to_diff_dict(), "semantic_encoder": settings_})
    ).eval()
    configured.load_state_dict(model.state_dict())
    model.semantic_encoder.silence_tokens = 0
    audio = torch.from_numpy(noise(30_000))
    torch.testing.assert_close(model.encode(audio), configured.encode(audio))


def test_the_example_like_a_microphone(tmp_path: Path) -> None:
    source, target = tmp_path / "in.wav", tmp_path / "out.wav"
    save_audio(source, noise(24_000), 16_000)
    command = [sys.executable, str(ROOT / "examples" / "stream_microphone.py"), str(source), str(target)]
    done = subprocess.run([*command, "--window", "0.4", "--fast"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["tokens"] == 38 and summary["seconds"] == 1.5
    assert load_audio(target)[0].shape == (1, 24_000)
