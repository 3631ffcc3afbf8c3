"""Discriminators: batch invariance, learning, gradients to the audio."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dasheng_tokenizer.errors import ConfigurationError
from dasheng_tokenizer.training.discriminators import MultiFrequencyDiscriminator, MultiPeriodDiscriminator
from dasheng_tokenizer.training.losses import discriminator_loss, generator_adversarial_loss

SAMPLES = 4000


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "frequency":
        return MultiFrequencyDiscriminator(channels=8)
    return MultiPeriodDiscriminator(channels=(8, 16, 16))


def sines(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    frequency = 0.02 + 0.6 * torch.rand(count, 1, generator=generator)
    phase = 6.28 * torch.rand(count, 1, generator=generator)
    return 0.3 * torch.sin(frequency * torch.arange(SAMPLES) + phase)


def noise(count: int, seed: int) -> Tensor:
    return 0.2 * torch.randn(count, SAMPLES, generator=torch.Generator().manual_seed(seed))


both = pytest.mark.parametrize("kind", ["frequency", "period"])


@both
def test_one_output_for_each_part(kind: str) -> None:
    discriminator = build(kind)
    outputs = discriminator(noise(2, 0))
    assert len(outputs) == (3 if kind == "frequency" else 5)
    for output in outputs:
        assert output.logits.shape[:2] == (2, 1) and output.logits.numel() > 2
        assert len(output.features) == 4 and all(feature.shape[0] == 2 for feature in output.features)


@both
def test_an_item_is_judged_the_same_in_any_batch(kind: str) -> None:
    discriminator = build(kind)
    quiet, loud = sines(1, 0), 3 * noise(2, 1)
    alone, batched = discriminator(quiet), discriminator(torch.cat([loud, quiet]))
    for one, many in zip(alone, batched, strict=True):
        torch.testing.assert_close(one.logits[0], many.logits[2], atol=1e-5, rtol=1e-4)
        for feature, features in zip(one.features, many.features, strict=True):
            torch.testing.assert_close(feature[0], features[2], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "limit"), [("frequency", 0.2), ("period", 1.2)])  # a coin scores 2
def test_learns_to_tell_sines_from_noise(kind: str, limit: float) -> None:
    discriminator = build(kind)
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=5e-3, betas=(0.8, 0.99))
    for step in range(80):
        loss = discriminator_loss(discriminator(sines(4, step)), discriminator(noise(4, step)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        real, fake = discriminator(sines(8, 1000)), discriminator(noise(8, 1000))  # never seen
    assert discriminator_loss(real, fake).item() < limit
    mean = [torch.stack([o.logits.mean((1, 2, 3)) for o in side]).mean(0) for side in (real, fake)]
    assert mean[0].min() > mean[1].max()


@both
def test_gradient_reaches_audio_even_from_silence(kind: str) -> None:
    discriminator = build(kind)
    audio = torch.cat([noise(1, 0), torch.zeros(1, SAMPLES)]).requires_grad_()
    generator_adversarial_loss(discriminator(audio)).backward()
    assert torch.isfinite(audio.grad).all() and audio.grad[0].abs().sum() > 0


def test_lengths_that_fit_no_period_or_hop() -> None:
    for samples in (1, 641, 3001):
        for kind in ("frequency", "period"):
            assert all(torch.isfinite(output.logits).all() for output in build(kind)(noise(1, 0)[:, :samples]))


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ConfigurationError):
        MultiFrequencyDiscriminator(hops=())
    with pytest.raises(ConfigurationError):
        MultiPeriodDiscriminator(periods=(2, 0))
