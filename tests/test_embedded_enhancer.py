"""The enhancer that ships inside the package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
from safetensors import safe_open

from dasheng_tokenizer import DashengTokenizerModel, load_audio
from dasheng_tokenizer.checkpoints import embedded_default
from dasheng_tokenizer.cli import main
from dasheng_tokenizer.enhancement import Enhancer, mix
from dasheng_tokenizer.enhancement.denoiser import embedded_denoiser
from dasheng_tokenizer.evaluation.metrics import mel_distance, stoi

pytestmark = pytest.mark.usefixtures("one_thread")

RATE = 16_000
CLIPS = embedded_default().parent / "clips"


@pytest.fixture(scope="module")
def enhancer() -> Enhancer:
    return Enhancer.from_pretrained(device="cpu")


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    audio, rate = load_audio(CLIPS / "speech.flac")
    assert rate == RATE
    return audio[0, : 4 * RATE]


def level(audio: np.ndarray) -> float:
    return float(10 * np.log10(np.mean(np.square(audio)) + 1e-12))


def enhanced(enhancer: Enhancer, audio: np.ndarray, rate: int = RATE) -> np.ndarray:
    return enhancer.enhance(audio, rate)[0].numpy()


def test_it_is_small_documented_and_float16_on_disk(enhancer: Enhancer) -> None:
    folder = embedded_denoiser()
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 12 * 2**20
    card = (folder / "README.md").read_text()
    assert "{{" not in card and "Apache-2.0" in card
    provenance = enhancer.denoiser.info.provenance
    assert provenance["audio_hours_seen"] > 0 and provenance["hardware"] and str(provenance["steps"]) in card
    with safe_open(folder / "model.safetensors", "pt") as weights:
        kinds = {weights.get_slice(name).get_dtype() for name in weights.keys() if name.startswith("blocks.")}
    assert kinds == {"F16"}


def test_it_belongs_to_the_embedded_default(enhancer: Enhancer) -> None:
    assert enhancer.denoiser.info.tokenizer is None and enhancer.denoiser.info.part == "unified"
    assert enhancer.denoiser.info.tokenizer_hash == DashengTokenizerModel.from_pretrained().weights_hash()


def hiss(samples: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(samples).astype(np.float32)


def effects(samples: int) -> np.ndarray:
    audio, _ = load_audio(CLIPS / "sound.flac")
    return np.resize(audio[0], samples)


@pytest.mark.parametrize("kind", [hiss, effects])
def test_it_takes_noise_away(enhancer: Enhancer, speech: np.ndarray, kind) -> None:  # type: ignore[no-untyped-def]
    noisy = mix(speech, kind(len(speech)), 0.0)
    ours = enhanced(enhancer, noisy)
    assert mel_distance(speech, ours) < 0.8 * mel_distance(speech, noisy)


def test_it_does_not_beat_silence_into_noise(enhancer: Enhancer) -> None:
    assert level(enhanced(enhancer, np.zeros(3 * RATE, dtype=np.float32))) < -60


def test_noise_alone_gets_softer(enhancer: Enhancer) -> None:
    noise = 0.1 * hiss(3 * RATE)
    assert level(enhanced(enhancer, noise)) < level(noise) - 10


def test_clean_speech_loses_what_the_tokenizer_loses(enhancer: Enhancer, speech: np.ndarray) -> None:
    tokens = enhancer.tokenizer.compress(speech, RATE)
    ceiling = enhancer.tokenizer.decompress(tokens)[0].numpy()
    ours = enhanced(enhancer, speech)
    assert stoi(speech, ours) > stoi(speech, ceiling) - 0.002
    assert mel_distance(speech, ours) < 1.01 * mel_distance(speech, ceiling)


def test_the_command_needs_no_model(speech: np.ndarray, tmp_path: Path) -> None:
    """A telephone recording of two channels."""
    noisy = mix(speech, hiss(len(speech)), 5.0)[::2]
    soundfile.write(tmp_path / "call.wav", np.stack([noisy, 0.5 * noisy], axis=1), 8_000)
    assert main(["enhance", str(tmp_path / "call.wav"), "-o", str(tmp_path / "clean.wav"), "--device", "cpu"]) == 0
    held = soundfile.info(tmp_path / "clean.wav")
    assert (held.frames, held.channels, held.samplerate) == (len(noisy), 2, 8_000)
