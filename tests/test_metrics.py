"""Metrics: equal clips, worse clips, and clips for which a figure is not defined."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch

from dasheng_tokenizer.errors import AudioError
from dasheng_tokenizer.evaluation import metrics


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
