"""What is exported: encoder and decoder of a tokenizer as pure functions of tensors, for any batch and any length.

Nothing in them hangs on the values of the data, and a clip gives the same alone and padded in any batch.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from dasheng_tokenizer.errors import ExportError
from dasheng_tokenizer.semantic_encoder import FRAMES_PER_TOKEN, SemanticEncoder, token_mask
from dasheng_tokenizer.spectral import CONTEXT, SAMPLES_PER_TOKEN, MelSpectrogram, with_context
from dasheng_tokenizer.tokenizer import DashengTokenizerModel

EXPORTED_KINDS = ("dasheng", "whisper")
"""Semantic encoders with a graph; wave encoders sort clips by their lengths, which no graph can."""


class MatrixMelSpectrogram(nn.Module):
    """`MelSpectrogram` by real matrix products: no complex type, no FFT of an odd size.

    The transform of n = r·c points (1024 = 32·32, 400 = 20·20) is one of r points over every c-th sample, then one of c
    points for each of the r results: an eighth of the operations of a product with all n cosines and sines. It is
    computed in float64. In speech the lowest band can lie 90 dB below the loudest; float32 then leaves its logarithm,
    which the acoustic layer amplifies, only three digits.
    """

    window: Tensor
    first: Tensor
    second: Tensor
    bank: Tensor

    def __init__(self, original: MelSpectrogram) -> None:
        super().__init__()
        size = original.n_fft
        self.n_fft, self.hop_length, self.power = size, original.hop_length, original.power
        self.rows = next(rows for rows in range(math.isqrt(size), 0, -1) if size % rows == 0)  # r
        self.columns = size // self.rows  # c
        row, column = torch.arange(self.rows), torch.arange(self.columns)
        bins = row[:, None] + self.rows * torch.arange(self.columns // 2 + 1)  # (r, c/2 + 1), those of 0 to n/2
        # With sample c·i + j and bin k of row k mod r, exp(-2πi·(c·i + j)·k/n) falls into a factor of i and one of j.
        first = _rotation(torch.outer(row, row), self.rows)  # (r, r)
        second = _rotation(column[:, None] * bins[:, None], size)  # (r, c, c/2 + 1)
        self.register_buffer("window", original.spectrogram.window.double().cpu())  # (n,)
        self.register_buffer("first", torch.cat([first.real, first.imag]))  # (2r, r)
        columns = torch.cat([second, 1j * second], dim=1)  # of the real parts and of the imaginary parts
        self.register_buffer("second", torch.cat([columns.real, columns.imag], dim=2))  # (r, 2c, c + 2)
        self.register_buffer("bank", original.mel_scale.fb.detach().clone().cpu())  # (n/2 + 1, n_mels)

    def forward(self, context_audio: Tensor, num_frames: int) -> Tensor:
        """See `MelSpectrogram.forward`."""
        first, pieces = CONTEXT - self.n_fft // 2, -(-self.n_fft // self.hop_length)
        audio = context_audio[:, first : first + (num_frames + pieces - 1) * self.hop_length]
        hops = audio.unflatten(1, (-1, self.hop_length))  # (B, frames + pieces - 1, hop)
        frames = torch.cat([hops[:, k : k + num_frames] for k in range(pieces)], dim=-1)[..., : self.n_fft]
        frames = frames.double() * self.window  # (B, frames, n)
        parts = self.first @ frames.unflatten(-1, (self.rows, self.columns))  # (B, frames, 2r, c)
        rows = parts.unflatten(2, (2, self.rows)).permute(0, 3, 1, 2, 4).flatten(3)  # (B, r, frames, 2c)
        real, imaginary = (rows @ self.second).chunk(2, dim=-1)  # (B, r, frames, c/2 + 1) each
        power = (real.square() + imaginary.square()).float().permute(0, 3, 1, 2).flatten(1, 2)  # (B, ≥ bins, frames)
        power = power[:, : self.n_fft // 2 + 1]  # past them lie mirror images
        return self.bank.T @ (power.sqrt() if self.power == 1.0 else power)  # (B, n_mels, frames)


def _rotation(turns: Tensor, period: int) -> Tensor:
    """exp(-2πi·turns / period), complex128; whole turns are taken off first, which keeps it exact for any period."""
    angles = -2 * math.pi * (turns % period).double() / period
    return torch.polar(torch.ones_like(angles), angles)


class EncoderGraph(nn.Module):
    """16 kHz audio of any length → latents; windows of the semantic encoder are cut inside.

    Raises:
        ExportError: a model that has no such graph.
    """

    def __init__(self, model: DashengTokenizerModel) -> None:
        super().__init__()
        check_exportable(model)
        self.encoder = copy.deepcopy(model.injection).float().eval().requires_grad_(False)
        _replace_spectrograms(self.encoder)

    @property
    def spectral_width(self) -> int:
        """Inputs of Dasheng's layer on spectra, 64 bands and 4 frames; other encoders begin with convolutions."""
        return 64 * FRAMES_PER_TOKEN if self.encoder.model.needs_level else 0

    def forward(self, audio: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode.

        Args:
            audio: (B, S) float32 samples at 16 kHz, full scale 1. What lies past `num_samples` is not read.
            num_samples: (B,) int64, real samples of each clip, 1 to S.

        Returns:
            unified and semantic embedding, each (B, T, D) and zero past each clip's end, T = ⌈S/640⌉; number of
            tokens of each clip, (B,) int64.
        """
        audio = audio.masked_fill(~token_mask(num_samples, audio.shape[1]), 0.0)
        length = (audio.shape[1] + SAMPLES_PER_TOKEN - 1) // SAMPLES_PER_TOKEN  # T
        num_tokens = (num_samples + SAMPLES_PER_TOKEN - 1) // SAMPLES_PER_TOKEN  # (B,)
        # A fixed surplus instead of an exact one: no branch on whether something is missing.
        context_audio = with_context(nn.functional.pad(audio, (0, SAMPLES_PER_TOKEN + CONTEXT)), length)
        real = token_mask(num_tokens, length)[..., None]  # (B, T, 1)
        semantic = self.encoder.semantic_norm(self._semantic(context_audio, num_tokens, length))  # (B, T, D)
        semantic = semantic.masked_fill(~real, 0.0)
        acoustic = self.encoder.acoustic(context_audio).masked_fill(~real, 0.0)  # (B, T, D)
        return semantic + acoustic, semantic, num_tokens

    def _semantic(self, context_audio: Tensor, num_tokens: Tensor, length: int) -> Tensor:
        """The frozen encoder on windows of equal size: (B, CONTEXT + 640·T + CONTEXT) → (B, T, D)."""
        net: SemanticEncoder = self.encoder.model
        level = net.level(context_audio, FRAMES_PER_TOKEN * num_tokens) if net.needs_level else None
        size = torch.sym_min(length, net.window_tokens)
        count = (length + size - 1) // size
        span = size * SAMPLES_PER_TOKEN
        padded = nn.functional.pad(context_audio, (0, count * span - length * SAMPLES_PER_TOKEN))
        starts = span * torch.arange(count, device=padded.device)  # (count,)
        places = starts[:, None] + torch.arange(span + 2 * CONTEXT, device=padded.device)
        windows = padded[:, places].flatten(0, 1)  # (B·count, CONTEXT + span + CONTEXT)
        first = size * torch.arange(count, device=padded.device)  # (count,)
        # A window past a clip's end counts as one token, so that attention has something to see; it is hidden later.
        present = torch.minimum((num_tokens[:, None] - first).clamp(min=1), first.new_full((1,), 1) * size).flatten()
        levels = None if level is None else (level[:, None] + torch.zeros_like(first, dtype=level.dtype)).flatten()
        tokens = net.encode_window(windows, present, levels)  # (B·count, size, D)
        return tokens.reshape(num_tokens.shape[0], count * size, net.output_dim)[:, :length]  # (B, T, D)


class DecoderGraph(nn.Module):
    """Latents of any number → 16 kHz audio, each clip of a batch as if it were alone."""

    def __init__(self, model: DashengTokenizerModel) -> None:
        super().__init__()
        self.projection = copy.deepcopy(model.latent_projection)
        self.upsampler = copy.deepcopy(model.upsampler)
        self.decoder = copy.deepcopy(model.decoder)
        self.float().eval().requires_grad_(False)

    @property
    def spectral_width(self) -> int:
        """Outputs of the head, and inputs of the inverse STFT."""
        return self.decoder.head.istft.n_fft + 2

    def forward(self, latents: Tensor, num_tokens: Tensor) -> Tensor:
        """Decode.

        Args:
            latents: (B, T, D) float32. What lies past `num_tokens` is not read.
            num_tokens: (B,) int64, tokens of each clip, 1 to T.

        Returns:
            (B, 640·T) float32 samples at 16 kHz, zero past each clip's end.
        """
        step = self.upsampler.kernel_size[0]
        hidden = ~token_mask(num_tokens * step, latents.shape[1] * step)[..., None]  # (B, frames, 1)
        latents = latents.masked_fill(~token_mask(num_tokens, latents.shape[1])[..., None], 0.0)
        x = self.upsampler(self.projection(latents).transpose(1, 2)).transpose(1, 2)  # (B, frames, D)
        backbone = self.decoder.backbone
        # Zeros before each convolution are what a clip finds past the end of its own tensor.
        x = x.masked_fill(hidden, 0.0).transpose(1, 2)
        h = backbone.norm(backbone.embed(x).transpose(1, 2))  # (B, frames, width)
        for block in backbone.convnext:
            h = block(h.masked_fill(hidden, 0.0))  # (B, frames, width)
        real, imaginary = self.decoder.head.spectrum(backbone.final_layer_norm(h))  # (B, frames, n_fft/2 + 1) each
        return self._overlap(real, imaginary, hidden)  # (B, 640·T)

    def _overlap(self, real: Tensor, imaginary: Tensor, hidden: Tensor) -> Tensor:
        """`InverseSTFT` whose sum of windows, too, leaves out what is hidden: → (B, samples)."""
        istft = self.decoder.head.istft
        trim = (istft.n_fft - istft.hop_length) // 2
        frames = torch.cat([real, imaginary], dim=-1) @ istft.basis * istft.window  # (B, frames, n_fft)
        audio = istft.overlap_add(frames.masked_fill(hidden, 0.0))[:, trim:-trim]
        squared = istft.window.square() * torch.ones_like(frames[..., :1])  # (B, frames, n_fft)
        envelope = istft.overlap_add(squared.masked_fill(hidden, 0.0))[:, trim:-trim]
        past = hidden.expand(-1, -1, istft.hop_length).flatten(1)  # (B, samples)
        return (audio / envelope.masked_fill(past, 1.0)).masked_fill(past, 0.0)


def check_exportable(model: DashengTokenizerModel) -> None:
    """Refuses models without a graph.

    Raises:
        ExportError: a VAE, a wave encoder, or the published length mode.
    """
    kind = "vae" if model.config.is_vae else model.config.semantic_encoder["kind"]
    if kind not in EXPORTED_KINDS:
        raise ExportError(
            f"a model with an encoder of kind {kind!r} has no graph; those of kind {', '.join(EXPORTED_KINDS)} do"
        )
    if model.config.length_mode != "exact":
        raise ExportError('length_mode="published" has no graph; set length_mode to "exact" in the config.json')


def _replace_spectrograms(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, MelSpectrogram):
            setattr(module, name, MatrixMelSpectrogram(child))
        else:
            _replace_spectrograms(child)
