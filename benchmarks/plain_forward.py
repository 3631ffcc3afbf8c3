"""The published forward pass, written down plainly: what a straightforward reading of the layout costs.

Float32, attention as two matrix products and a softmax, the whole batch at once, complex inverse STFT, no masks, the dB
floor over the whole batch. It is the yardstick of `throughput.py`, and a test holds it against the golden tensors.
Arguments named `w` are the weights by their published keys; numbers are those of the published layout.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]
WINDOW_FRAMES = 1008


def spectrogram(audio: Tensor, n_fft: int, window: Tensor) -> Tensor:
    """(B, S) → (B, n_fft/2 + 1, 1 + S // 160) complex."""
    return torch.stft(audio, n_fft, 160, window=window, center=True, pad_mode="reflect", return_complex=True)


def encode(w: Weights, audio: Tensor, num_heads: int = 16) -> Tensor:
    """(B, S > 512) samples at 16 kHz → (B, T, D) unified embedding, T = ⌊(⌊S/160⌋ + 1)/4⌋."""
    semantic, acoustic = encode_semantic(w, audio, num_heads), encode_acoustic(w, audio)
    return semantic[:, : acoustic.shape[1]] + acoustic  # (B, T, D)


def encode_semantic(w: Weights, audio: Tensor, num_heads: int) -> Tensor:
    """(B, S) → (B, T or T + 1, D)."""
    front = "encoder.model.front_end.0"
    power = spectrogram(audio, 512, w[f"{front}.spectrogram.window"]).abs().pow(2)  # (B, 257, frames)
    mel = w[f"{front}.mel_scale.fb"].T @ power  # (B, 64, frames)
    decibel = 10 * mel.clamp(min=1e-10).log10()
    decibel = torch.maximum(decibel, decibel.max() - 120)
    parts = decibel.split(WINDOW_FRAMES, dim=-1)
    return torch.cat([encode_window(w, part, num_heads) for part in parts if part.shape[-1] >= 4], dim=1)


def encode_window(w: Weights, decibel: Tensor, num_heads: int) -> Tensor:
    """(B, 64, ≤ 1008 frames) → (B, N, D)."""
    m = "encoder.model"
    bn = [w[f"{m}.init_bn.1.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
    x = F.batch_norm(decibel, *bn)
    x = F.conv2d(x[:, None], w[f"{m}.patch_embed.proj.weight"], w[f"{m}.patch_embed.proj.bias"], stride=(64, 4))
    x = x + w[f"{m}.time_pos_embed"][:, :, :, : x.shape[-1]] + w[f"{m}.freq_pos_embed"]  # (B, D, 1, N)
    x = x.flatten(2).transpose(1, 2)  # (B, N, D)
    depth = 1 + max(int(key.split(".")[3]) for key in w if key.startswith(f"{m}.blocks."))
    for block in (f"{m}.blocks.{number}" for number in range(depth)):
        x = x + attention(w, f"{block}.attn", layer_norm(w, f"{block}.norm1", x, 1e-6), num_heads)
        hidden = F.gelu(linear(w, f"{block}.mlp.fc1", layer_norm(w, f"{block}.norm2", x, 1e-6)))
        x = x + linear(w, f"{block}.mlp.fc2", hidden)
    return layer_norm(w, f"{m}.norm", x, 1e-6)  # (B, N, D)


def attention(w: Weights, name: str, x: Tensor, num_heads: int) -> Tensor:
    """(B, N, D) → (B, N, D)."""
    qkv = linear(w, f"{name}.qkv", x).unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k, v = qkv  # (B, heads, N, D / heads) each
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5  # (B, heads, N, N)
    return linear(w, f"{name}.proj", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def encode_acoustic(w: Weights, audio: Tensor) -> Tensor:
    """(B, S) → (B, T, D)."""
    front = "encoder.front_end.mel_spec"
    magnitude = spectrogram(audio, 1024, w[f"{front}.spectrogram.window"]).abs()  # (B, 513, frames)
    log_mel = (w[f"{front}.mel_scale.fb"].T @ magnitude).clamp(min=1e-7).log()  # (B, 128, frames)
    x = F.conv2d(log_mel[:, None], w["encoder.patch_embed.weight"], w["encoder.patch_embed.bias"], stride=(128, 4))
    return layer_norm(w, "encoder.norm", x.flatten(2).transpose(1, 2), 1e-5)  # (B, T, D)


def decode(w: Weights, latents: Tensor) -> Tensor:
    """(B, T, D) → (B, 640·T) samples."""
    x = F.conv_transpose1d(latents.transpose(1, 2), w["upsampler.weight"], w["upsampler.bias"], stride=2)  # (B, D, 2T)
    b = "decoder.backbone"
    x = F.conv1d(x, w[f"{b}.embed.weight"], w[f"{b}.embed.bias"], padding=3).transpose(1, 2)
    x = layer_norm(w, f"{b}.norm", x, 1e-6)  # (B, 2T, width)
    depth = 1 + max(int(key.split(".")[3]) for key in w if key.startswith(f"{b}.convnext."))
    for block in (f"{b}.convnext.{number}" for number in range(depth)):
        kernel, bias = w[f"{block}.dwconv.weight"], w[f"{block}.dwconv.bias"]
        h = F.conv1d(x.transpose(1, 2), kernel, bias, padding=3, groups=len(kernel)).transpose(1, 2)
        h = F.gelu(linear(w, f"{block}.pwconv1", layer_norm(w, f"{block}.norm", h, 1e-6)))
        x = x + w[f"{block}.gamma"] * linear(w, f"{block}.pwconv2", h)
    x = linear(w, "decoder.head.out", layer_norm(w, f"{b}.final_layer_norm", x, 1e-6))  # (B, 2T, n_fft + 2)
    log_magnitude, phase = x.transpose(1, 2).chunk(2, dim=1)  # (B, n_fft/2 + 1, 2T) each
    magnitude = log_magnitude.exp().clamp(max=100)
    return inverse_stft(magnitude * (phase.cos() + 1j * phase.sin()), w["decoder.head.istft.window"])


def inverse_stft(spectrum: Tensor, window: Tensor, hop: int = 320) -> Tensor:
    """(B, n_fft/2 + 1, frames) complex → (B, 320·frames) samples."""
    n_fft, frames = len(window), spectrum.shape[-1]
    trim, length = (n_fft - hop) // 2, (frames - 1) * hop + n_fft
    pieces = torch.fft.irfft(spectrum, n_fft, dim=1, norm="backward") * window[:, None]  # (B, n_fft, frames)
    audio = F.fold(pieces, (1, length), (1, n_fft), stride=(1, hop))[:, 0, 0]
    weight = window.square()[None, :, None].expand(1, n_fft, frames)
    envelope = F.fold(weight, (1, length), (1, n_fft), stride=(1, hop))[:, 0, 0]
    return (audio / envelope)[:, trim:-trim]


def layer_norm(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    """Over the last dimension."""
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    """Over the last dimension."""
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])
