"""Metrics: equal clips, worse clips, and clips for which a figure is not defined."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from dasheng_tokenizer.audio import load_audio
from dasheng_tokenizer.errors import AudioError
from dasheng_tokenizer.evaluation import metrics, model_metrics

CLIPS = Path(metrics.__file__).parents[1] / "embedded" / "clips"


def tone() -> np.ndarray:
    return 0.3 * np.sin(2 * np.pi * 220 * np.arange(16000) / 16000)


def test_metrics_know_equal_worse_and_undefined() -> None:
    noise = np.random.default_rng(0).standard_normal(16000) * 0.01
    clean = tone() * (1 + np.sin(np.arange(16000) / 800))
    assert metrics.mel_distance(clean, clean) == 0 and metrics.si_sdr(clean, clean) == 120
    assert metrics.mel_distance(noise * 0, noise * 0) == 0
    assert 0 < metrics.mel_distance(clean, clean + noise) < metrics.mel_distance(clean, clean + 5 * noise)
    expected = 10 * np.log10(np.sum(clean**2) / np.sum(noise**2))
    assert metrics.si_sdr(clean, 3 * (clean + noise)) == pytest.approx(expected, abs=0.1)
    # Doubling adds log10(2) wherever the level is above the floor, whatever the window and the filters.
    loud = np.random.default_rng(1).standard_normal(16000)
    assert metrics.mel_distance(loud, 2 * loud) == pytest.approx(np.log10(2), abs=1e-6)
    pairs = ((clean[:100], clean), (clean * np.nan, clean), (clean[None], clean[None]), (clean[:0], clean[:0]))
    for bad, other in pairs:
        with pytest.raises(AudioError):
            metrics.mel_distance(bad, other)
    for metric in (metrics.si_sdr, metrics.pesq_wb, metrics.stoi):
        with pytest.raises(AudioError):
            metric(noise * 0, clean)
        with pytest.raises(AudioError):
            metric(clean[:1], clean[:1])


def test_mel_distance_is_that_of_the_training_loss() -> None:
    losses: ModuleType = pytest.importorskip("dasheng_tokenizer.training.losses")
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal(9000) * 0.1, rng.standard_normal(9000) * 0.2
    loss = losses.MultiScaleMelLoss()(torch.tensor(second)[None].float(), torch.tensor(first)[None].float())
    assert metrics.mel_distance(first, second) == pytest.approx(float(loss), abs=1e-5)


def test_perceptual_metrics_of_equal_clips() -> None:
    rng = np.random.default_rng(0)
    envelope = np.repeat(rng.random(40) > 0.4, 800) * 1.0
    speech_like = envelope * rng.standard_normal(32000) * 0.1
    pytest.importorskip("pesq")
    assert metrics.pesq_wb(speech_like, speech_like) == pytest.approx(4.644, abs=1e-3)
    with pytest.raises(AudioError, match="16000"):
        metrics.pesq_wb(speech_like, speech_like, 8000)
    pytest.importorskip("pystoi")
    assert metrics.stoi(speech_like, speech_like) == pytest.approx(1.0, abs=1e-6)


def test_narrow_band_pesq_and_estoi_are_those_of_their_libraries() -> None:
    pesq, pystoi = pytest.importorskip("pesq"), pytest.importorskip("pystoi")
    rng = np.random.default_rng(0)
    clean = np.repeat(rng.random(40) > 0.4, 800) * rng.standard_normal(32000) * 0.1
    other = clean + 0.02 * rng.standard_normal(32000)
    assert metrics.pesq_nb(clean, clean) == pytest.approx(4.549, abs=1e-3)
    floats = clean.astype(np.float32), other.astype(np.float32)
    assert metrics.pesq_nb(clean, other) == pytest.approx(pesq.pesq(16000, *floats, "nb"))
    assert metrics.estoi(clean, clean) == pytest.approx(1.0, abs=1e-6)
    assert metrics.estoi(clean, other) == pytest.approx(pystoi.stoi(clean, other, 16000, extended=True), abs=1e-6)
    assert metrics.estoi(clean, other) != pytest.approx(metrics.stoi(clean, other), abs=1e-3)
    with pytest.raises(AudioError, match="8000 and 16000"):
        metrics.pesq_nb(clean, clean, 44100)
    for metric in (metrics.stoi, metrics.estoi, metrics.pesq_nb):
        for first, second in ((clean, 0 * clean), (0 * clean, clean)):
            with pytest.raises(AudioError, match="silence"):
                metric(first, second)


def test_log_spectral_distance_by_its_definition() -> None:
    loud = np.random.default_rng(1).standard_normal(16000)
    assert metrics.log_spectral_distance(loud, loud) == 0
    assert metrics.log_spectral_distance(0 * loud, 0 * loud) == 0
    # Ten times the amplitude are 20 dB in every bin of every frame.
    assert metrics.log_spectral_distance(loud, 10 * loud) == pytest.approx(20, abs=1e-6)
    # A full-scale sine at a bin has 0 dB there: against silence, 100 dB in that bin and 94 in its two neighbours.
    sine = np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000)
    spectrum = 10 * np.log10((metrics.magnitude_spectrogram(sine, 1024, 256)[30] / 256) ** 2)
    assert spectrum[64] == pytest.approx(0, abs=1e-6) and spectrum[[63, 65]] == pytest.approx(-6.02, abs=0.01)
    assert metrics.log_spectral_distance(sine, 0 * sine) >= np.sqrt((100**2 + 2 * 94**2) / 513)


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    return load_audio(CLIPS / "speech.flac")[0][0, 8000:40000].copy()


def test_dnsmos_is_that_of_speechmos() -> None:
    package = pytest.importorskip("speechmos.dnsmos")
    speech = load_audio(CLIPS / "speech.flac")[0][0]
    expected = package.run(speech, 16000)
    for scale, key in (("sig", "sig_mos"), ("bak", "bak_mos"), ("ovr", "ovrl_mos")):
        assert model_metrics.dnsmos(speech, scale) == pytest.approx(expected[key], abs=1e-4)
    # Noise that goes beyond full scale is clipped; the library itself refuses it.
    noise = np.random.default_rng(0).standard_normal(speech.size).astype(np.float32)
    assert model_metrics.dnsmos(speech + 0.5 * noise, "bak") < expected["bak_mos"] - 0.5
    for bad, reason in ((0 * speech, "silence"), (speech[:7999], "half a second")):
        with pytest.raises(AudioError, match=reason):
            model_metrics.dnsmos(bad, "ovr")


@pytest.mark.slow  # compiles once for each installation
def test_visqol_is_that_of_its_package(speech: np.ndarray) -> None:
    package = pytest.importorskip("visqol")
    noise = (0.01 * np.random.default_rng(0).standard_normal(speech.size)).astype(np.float32)
    for mode, rate in (("speech", 16000), ("audio", 48000)):
        first, second = (np.repeat(audio, rate // 16000) for audio in (speech, speech + noise))
        api = package.VisqolApi()
        api.create(mode=mode)
        expected = api.measure_from_arrays(first.astype(float), second.astype(float), rate).moslqo
        assert model_metrics.visqol(first, second, mode) == pytest.approx(expected, abs=1e-6)
        assert model_metrics.visqol(first, first, mode) > expected
        for bad, reason in ((0 * first, "silence"), (first[:1000], "ViSQOL gives no figure")):
            with pytest.raises(AudioError, match=reason):
                model_metrics.visqol(bad, bad, mode)


def test_speaker_similarity_is_that_of_resemblyzer(speech: np.ndarray) -> None:
    package = pytest.importorskip("resemblyzer")
    assert model_metrics.speaker_similarity(speech, speech) == pytest.approx(1, abs=1e-5)
    other = np.interp(np.arange(0, speech.size, 1.4), np.arange(speech.size), speech).astype(
        np.float32
    )  # a higher voice
    other = np.pad(other, (0, speech.size - other.size))
    encoder = package.VoiceEncoder("cpu", verbose=False)
    first, second = (encoder.embed_utterance(package.preprocess_wav(audio)) for audio in (speech, other))
    found = model_metrics.speaker_similarity(speech, other)
    assert found == pytest.approx(float(first @ second), abs=1e-5) and found < 0.9
    with pytest.raises(AudioError, match="silence"):
        model_metrics.speaker_similarity(speech, 0 * speech)
    with pytest.raises(AudioError, match="less than 0.1 s"):
        model_metrics.speaker_similarity(speech[:800], speech[:800])


@pytest.mark.slow  # compiles once for each installation
def test_f0_error_of_known_pitches() -> None:
    pytest.importorskip("librosa")
    time = np.arange(16000) / 16000

    def voice(pitch: float) -> np.ndarray:
        return sum(0.1 * np.sin(2 * np.pi * pitch * k * time) / k for k in range(1, 9)).astype(np.float32)

    low, high = voice(150), voice(150 * 2 ** (1 / 12))
    assert model_metrics.f0_cents(low, low) == 0 and model_metrics.voicing_error(low, low) == 0
    assert model_metrics.f0_cents(low, high) == pytest.approx(100, abs=15)
    half = np.where(time < 0.5, low, 0).astype(np.float32)
    assert model_metrics.voicing_error(low, half) == pytest.approx(0.5, abs=0.1)
    assert model_metrics.f0_cents(low, half) == pytest.approx(0, abs=15)
    with pytest.raises(AudioError, match="voiced in both"):
        model_metrics.f0_cents(low, 0 * low)
    with pytest.raises(AudioError, match="no voiced frame"):
        model_metrics.voicing_error(0 * low, low)
