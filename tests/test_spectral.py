"""Front ends and inverse STFT against torch's complex forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dasheng_tokenizer.decoder import ISTFTHead
from dasheng_tokenizer.spectral import CONTEXT, InverseSTFT, MelSpectrogram, with_context


def spectrum(frames: int, n_fft: int) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.complex(*torch.randn(2, 3, frames, n_fft // 2 + 1, generator=generator))


def complex_form(s: Tensor, n_fft: int, hop: int) -> Tensor:
    """Vocos' "same" padding with complex numbers and fold, in float64."""
    window = torch.hann_window(n_fft, dtype=torch.float64)
    frames = torch.fft.irfft(s.to(torch.complex128), n=n_fft, dim=-1) * window
    length = (s.shape[1] - 1) * hop + n_fft

    def fold(x: Tensor) -> Tensor:
        return torch.nn.functional.fold(x.transpose(1, 2), (1, length), (1, n_fft), stride=(1, hop))[:, 0, 0]

    trim = (n_fft - hop) // 2
    return (fold(frames) / fold(window.square().expand_as(frames)))[:, trim:-trim]


@pytest.mark.parametrize("use_fft", [False, True])
@pytest.mark.parametrize("frames", [1, 2, 50])
@pytest.mark.parametrize(("n_fft", "hop"), [(1280, 320), (16, 4)])
def test_inverse_equals_the_complex_form(use_fft: bool, frames: int, n_fft: int, hop: int) -> None:
    istft = InverseSTFT(n_fft, hop)
    istft.use_fft = use_fft
    s = spectrum(frames, n_fft)
    expected = complex_form(s, n_fft, hop)
    found = istft(s.real, s.imag)
    assert found.shape == (3, frames * hop)
    assert (found - expected).norm() / expected.norm() < 1e-6


@pytest.mark.parametrize("n_fft, hop", [(1280, 320), (640, 160), (16, 4)])
def test_frames_that_block_dc_sum_to_zero(n_fft: int, hop: int) -> None:
    torch.manual_seed(0)
    published, head = (ISTFTHead(8, n_fft, hop, block_dc) for block_dc in (False, True))
    head.load_state_dict(published.state_dict())
    h = torch.randn(2, 30, 8)
    real, imaginary = head.spectrum(h)
    assert torch.equal(real[..., 1:], published.spectrum(h)[0][..., 1:])  # no other bin changes
    frames = head.istft._frames(real, imaginary) * head.istft.window
    assert frames.sum(-1).abs().max() < 1e-5 * frames.abs().sum(-1).max()
    assert not torch.equal(head(h), published(h))


def test_both_forms_have_the_same_gradient() -> None:
    istft, gradients = InverseSTFT(1280, 320), []
    for use_fft in (False, True):
        istft.use_fft = use_fft
        real = spectrum(9, 1280).real.clone().requires_grad_()
        istft(real, real.detach() * 0.3).square().sum().backward()
        gradients.append(real.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_onnx_export_with_dynamic_length(tmp_path) -> None:  # noqa: ANN001
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    istft = InverseSTFT(1280, 320).eval()
    example = spectrum(20, 1280)
    path = tmp_path / "istft.onnx"
    batch, frames = torch.export.Dim("batch"), torch.export.Dim("frames", min=2)
    shapes = {"real": {0: batch, 1: frames}, "imaginary": {0: batch, 1: frames}}
    program = torch.onnx.export(istft, (example.real, example.imag), dynamo=True, dynamic_shapes=shapes, verbose=False)
    program.save(path)
    session = runtime.InferenceSession(path)
    for length in (2, 7, 133):
        s = spectrum(length, 1280)
        inputs = dict(zip((i.name for i in session.get_inputs()), (s.real.numpy(), s.imag.numpy()), strict=True))
        (found,) = session.run(None, inputs)
        torch.testing.assert_close(torch.from_numpy(found), istft(s.real, s.imag), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("n_fft", "power"), [(512, 2.0), (1024, 1.0), (400, 2.0)])
def test_mel_equals_the_centred_stft(n_fft: int, power: float) -> None:
    """The left end mirrors as torch.stft does; with silence at the right end, the rest equals it too."""
    audio = torch.randn(2, 6400, generator=torch.Generator().manual_seed(0))
    front_end = MelSpectrogram(n_fft, 40, power)
    window = torch.hann_window(n_fft)
    extended = torch.nn.functional.pad(audio, (0, n_fft))
    stft = torch.stft(extended, n_fft, 160, window=window, center=True, return_complex=True).abs() ** power
    expected = front_end.mel_scale.fb.T @ stft[..., :40]
    found = front_end(with_context(audio, 10), 40)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_context_of_clips_too_short_to_mirror() -> None:
    audio = torch.tensor([[1.0, 2.0, 3.0]])
    context = with_context(audio, 1)
    assert context.shape == (1, 640 + 2 * CONTEXT)
    assert context[0, CONTEXT - 2 : CONTEXT + 4].tolist() == [3.0, 2.0, 1.0, 2.0, 3.0, 0.0]
    assert not context[0, : CONTEXT - 2].any()


def test_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple"):
        InverseSTFT(1000, 320)
    with pytest.raises(ValueError, match="context"):
        MelSpectrogram(2048, 40, 1.0)
