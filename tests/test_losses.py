"""Spectral losses against torch.stft and numerical gradients; edge cases; GAN losses against their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dasheng_tokenizer.errors import AudioError, ConfigurationError
from dasheng_tokenizer.training.losses import (
    DiscriminatorOutput,
    MultiResolutionSTFTLoss,
    MultiScaleMelLoss,
    PhaseDerivativeLoss,
    SpectraPair,
    discriminator_loss,
    feature_matching_loss,
    generator_adversarial_loss,
    mel_filters,
    semantic_preservation_loss,
    stft_magnitude,
)

SPECTRAL = [MultiScaleMelLoss, MultiResolutionSTFTLoss, PhaseDerivativeLoss]


def noise(*shape: int, seed: int = 0, level: float = 0.1) -> Tensor:
    return level * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n_fft", [32, 512, 2048])
@pytest.mark.parametrize("samples", [4000, 4096, 1025])
def test_magnitude_equals_torch_stft(n_fft: int, samples: int) -> None:
    audio = noise(2, samples)
    window = torch.hann_window(n_fft)
    expected = torch.stft(audio, n_fft, n_fft // 4, window=window, return_complex=True).abs().transpose(1, 2)
    torch.testing.assert_close(stft_magnitude(audio, n_fft), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("n_fft", [32, 256])
def test_written_gradient_equals_autograd(n_fft: int) -> None:
    weight = noise(2, 1 + 4000 // (n_fft // 4), n_fft // 2 + 1, seed=3)
    ours = noise(2, 4000).requires_grad_()
    theirs = noise(2, 4000).requires_grad_()
    (stft_magnitude(ours, n_fft) * weight).sum().backward()
    spectrum = torch.stft(theirs, n_fft, n_fft // 4, window=torch.hann_window(n_fft), return_complex=True)
    (spectrum.abs().transpose(1, 2) * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", SPECTRAL)
@pytest.mark.parametrize("samples", [1, 100, 4000])
def test_identity_costs_nothing(kind: type, samples: int) -> None:
    audio = noise(2, samples)
    assert kind()(audio, audio.clone()).item() == pytest.approx(0.0, abs=1e-6)
    other = kind()(audio, noise(2, samples, seed=1)).item()
    assert other > 0.0 or (samples == 1 and kind is PhaseDerivativeLoss)  # single clicks differ in nothing but size


@pytest.mark.parametrize("kind", SPECTRAL)
def test_silence_against_silence(kind: type) -> None:
    audio = torch.zeros(2, 4000, requires_grad=True)
    loss = kind()(audio, torch.zeros(2, 4000))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(audio.grad, torch.zeros(2, 4000))


@pytest.mark.parametrize("kind", SPECTRAL)
def test_gradient_is_finite_beside_silence(kind: type) -> None:
    target = noise(2, 4000)
    target[0] = 0.0
    audio = noise(2, 4000, seed=1)
    audio[1, :2000] = 0.0
    audio.requires_grad_()
    loss = kind()(audio, target)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(audio.grad).all()
    # Silence has a magnitude to come down to, and no phase.
    assert (audio.grad[0].abs().sum() > 0) == (kind is not PhaseDerivativeLoss)


@pytest.mark.parametrize("kind", SPECTRAL)
def test_loss_falls_when_a_waveform_is_optimised(kind: type) -> None:
    target = torch.sin(torch.arange(4000) * 0.2)[None] * 0.3 + noise(1, 4000, seed=1, level=0.01)
    audio = noise(1, 4000).requires_grad_()
    loss_of = kind()
    optimizer = torch.optim.Adam([audio], lr=0.01)
    losses = []
    for _ in range(40):
        loss = loss_of(audio, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]


@pytest.mark.parametrize("kind", SPECTRAL)
def test_mean_over_halves_is_the_loss_of_the_batch(kind: type) -> None:
    audio, target = noise(4, 4000), noise(4, 4000, seed=1)
    target[0] *= 50  # a loud item must not hide the others
    whole = kind()(audio, target)
    halves = (kind()(audio[:2], target[:2]) + kind()(audio[2:], target[2:])) / 2
    torch.testing.assert_close(whole, halves)


def test_shared_spectra_give_the_same_losses_and_gradients() -> None:
    mel, stft = MultiScaleMelLoss(), MultiResolutionSTFTLoss()
    target = noise(2, 4000, seed=1)
    shared, apart = noise(2, 4000).requires_grad_(), noise(2, 4000).requires_grad_()
    spectra = SpectraPair(shared, target)
    (mel.from_spectra(spectra) + stft.from_spectra(spectra)).backward()
    (mel(apart, target) + stft(apart, target)).backward()
    torch.testing.assert_close(shared.grad, apart.grad)


def test_autocast_changes_nothing() -> None:
    audio, target = noise(2, 4000), noise(2, 4000, seed=1)
    expected = MultiScaleMelLoss()(audio, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = MultiScaleMelLoss()(audio, target)
    assert cast.dtype == torch.float32 and torch.equal(cast, expected)


def test_single_scale_follows_the_formula() -> None:
    audio, target = noise(1, 4000), noise(1, 4000, seed=1)
    logs = []
    for wave in (audio, target):
        window = torch.hann_window(512)
        magnitude = torch.stft(wave, 512, 128, window=window, return_complex=True).abs()
        logs.append((mel_filters(512, 80).T @ magnitude).clamp(min=1e-5).log10())
    loss = MultiScaleMelLoss(windows=(512,), bands=(80,))(audio, target)
    torch.testing.assert_close(loss, (logs[0] - logs[1]).abs().mean(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("n_fft", "bands"), [(32, 5), (32, 16), (64, 32), (64, 10), (512, 128), (2048, 320)])
def test_no_mel_filter_is_empty(n_fft: int, bands: int) -> None:
    filters = mel_filters(n_fft, bands)
    assert filters.shape == (n_fft // 2 + 1, bands)
    assert (filters.amax(0) > 0).all()
    assert (filters.argmax(0).diff() >= 0).all()  # in order of frequency


def test_phase_loss_hears_steps_and_not_phases() -> None:
    loss = PhaseDerivativeLoss()
    time = torch.arange(64000) / 16000
    tone = torch.sin(2 * torch.pi * 440 * time)[None]
    turned = torch.cos(2 * torch.pi * 440 * time)[None]
    higher = torch.sin(2 * torch.pi * 455 * time)[None]
    assert loss(turned, tone) < 0.25 * loss(higher, tone)
    # Twice as loud is the same phase; upside down is too.
    assert loss(-2 * tone, tone) < 0.01


def test_phase_loss_of_unrelated_noise() -> None:
    # Below 1: the window alone makes neighbouring bins differ by about half a turn.
    assert PhaseDerivativeLoss()(noise(4, 16000), noise(4, 16000, seed=1)).item() == pytest.approx(0.66, abs=0.02)


def test_wrong_settings_and_shapes_are_refused() -> None:
    with pytest.raises(ConfigurationError):
        MultiScaleMelLoss(windows=(32, 64), bands=(5,))
    with pytest.raises(ConfigurationError):
        MultiResolutionSTFTLoss(windows=(510,))
    with pytest.raises(ConfigurationError):
        PhaseDerivativeLoss(window=510)
    with pytest.raises(AudioError):
        MultiScaleMelLoss()(noise(2, 100), noise(2, 101))
    with pytest.raises(AudioError):
        PhaseDerivativeLoss()(noise(2, 100), noise(2, 101))


def test_semantic_preservation_pulls_only_the_acoustic_side() -> None:
    acoustic = noise(2, 3, 4).requires_grad_()
    semantic = noise(2, 3, 4, seed=1).requires_grad_()
    loss = semantic_preservation_loss(acoustic, semantic)
    loss.backward()
    torch.testing.assert_close(loss, (acoustic - semantic).square().mean())
    assert semantic.grad is None and acoustic.grad.abs().sum() > 0


def test_semantic_preservation_counts_only_masked_tokens() -> None:
    acoustic, semantic = noise(2, 3, 4), noise(2, 3, 4, seed=1)
    acoustic[1, 2] = float("nan")  # padding may hold anything
    mask = torch.tensor([[True, True, True], [True, True, False]])
    expected = (acoustic - semantic)[mask].square().mean()
    torch.testing.assert_close(semantic_preservation_loss(acoustic, semantic, mask), expected)
    assert semantic_preservation_loss(acoustic, semantic, torch.zeros_like(mask)).item() == 0.0


def outputs(*logits: float) -> list[DiscriminatorOutput]:
    return [DiscriminatorOutput(torch.full((2, 3), value), [torch.full((2, 4), value)]) for value in logits]


def test_hinge_losses() -> None:
    assert discriminator_loss(outputs(1.5, 2.0), outputs(-1.0, -3.0)).item() == 0.0  # beyond the margins
    assert discriminator_loss(outputs(0.0), outputs(0.5)).item() == 2.5
    assert discriminator_loss(outputs(0.0, 1.0), outputs(0.5, -1.0)).item() == 1.25  # mean over discriminators
    assert generator_adversarial_loss(outputs(-1.0, 1.0)).item() == 1.0


def test_feature_matching_pulls_only_the_fake_side() -> None:
    real, fake = noise(2, 4).requires_grad_(), noise(2, 4, seed=1).requires_grad_()
    logits = torch.zeros(2, 1)
    loss = feature_matching_loss([DiscriminatorOutput(logits, [real])], [DiscriminatorOutput(logits, [fake])])
    loss.backward()
    torch.testing.assert_close(loss, (real - fake).abs().mean())
    assert real.grad is None and fake.grad.abs().sum() > 0
