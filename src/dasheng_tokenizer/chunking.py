"""Encoding and decoding of any length at constant memory, equal to doing it whole.

Encoding: windows of the semantic encoder do not see each other, so a block needs only `CONTEXT` samples of audio on
each side for its mel frames. The Dasheng front end also needs the loudest band of the whole clip, hence a cheap first
pass. The tokens of a VAE see a finite number of neighbours, which are held back for them.
Decoding: an output sample depends on a finite number of latents on each side (`VocosDecoder.context_frames`), so blocks
with that many neighbours give what the whole gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dasheng_tokenizer.ahead import ahead
from dasheng_tokenizer.audio import (
    Array,
    AudioReader,
    AudioWriter,
    StreamingResampler,
    check_rate,
    fit_length,
    resampled_length,
    to_audio_array,
)
from dasheng_tokenizer.errors import ConfigurationError, ModelMismatchError
from dasheng_tokenizer.finite_context import ContextBlocks
from dasheng_tokenizer.injection import Part
from dasheng_tokenizer.input_checks import check_latents
from dasheng_tokenizer.semantic_encoder import FRAMES_PER_TOKEN
from dasheng_tokenizer.spectral import SAMPLES_PER_TOKEN, SAMPLING_RATE
from dasheng_tokenizer.token_file import AudioTokens
from dasheng_tokenizer.token_stream import TokenReader, token_writer
from dasheng_tokenizer.vae import VAEEncoder

if TYPE_CHECKING:
    from dasheng_tokenizer.tokenizer import DashengTokenizerModel

Progress = Callable[[float, float], None]
"""Called with seconds done and seconds in all."""

BLOCK_TOKENS = 750
"""Tokens a block of decoding, and of encoding with a VAE (30 s): large enough that the neighbours computed twice cost
under 10 %."""


class Latents(Protocol):
    """Latents (channels, T, D), in memory or made when they are asked for: a tensor, `StoredLatents`, …"""

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, T, D)."""
        ...

    def __getitem__(self, index: tuple[slice, slice], /) -> Tensor:
        """(channels, n, D) of a range of tokens, `latents[:, first:last]`."""
        ...


# ---------------------------------------------------------------------- 16 kHz blocks ↔ latents


def context_blocks(blocks: Iterable[Array], block_tokens: int) -> Iterator[tuple[Tensor, int]]:
    """Cuts a clip that arrives in pieces into blocks of tokens with context audio (see `spectral`).

    Args:
        blocks: (channels, any) pieces at 16 kHz.
        block_tokens: tokens a block; the last has fewer.

    Yields:
        (channels, CONTEXT + 640·N + CONTEXT) samples and N.
    """
    cutter = ContextBlocks(block_tokens)
    for block in blocks:
        yield from cutter.push(block)
    yield from cutter.finish()


def clip_level(model: DashengTokenizerModel, blocks: Iterable[Array]) -> Tensor | None:
    """First pass: the level of each channel of the whole clip, (channels,); None where the encoder needs none."""
    encoder = model.semantic_encoder
    if not encoder.needs_level:
        return None
    level = None
    for audio, size in context_blocks(blocks, encoder.window_tokens):
        frames = torch.full((len(audio),), FRAMES_PER_TOKEN * size, device=model.device)
        piece = encoder.level(audio.to(model.device), frames)
        level = piece if level is None else torch.maximum(level, piece)
    return level


@torch.inference_mode()
def encode_blocks(
    model: DashengTokenizerModel, blocks: Callable[[], Iterable[Array]], part: Part = "unified"
) -> Iterator[Tensor]:
    """Latents of a clip at 16 kHz, window by window: yields (channels, N, D) on the CPU.

    Args:
        model: the tokenizer, in `length_mode="exact"`.
        blocks: called for each pass over the clip; gives (channels, any) pieces.
        part: the latent that the decoder takes, or one of the two parts of its sum, which a VAE does not have.
    """
    if model.config.length_mode != "exact":
        raise ConfigurationError('block-wise encoding is exact; load the model with length_mode="exact"')
    if part == "unified" and isinstance(encoder := model.encoder, VAEEncoder):
        pieces = (encoder.patches(audio.to(model.device)) for audio, _ in context_blocks(blocks(), BLOCK_TOKENS))
        yield from (latents.cpu() for latents in encoder.mean_blocks(pieces))
        return
    level = clip_level(model, blocks())
    semantic_encoder = model.semantic_encoder
    block_tokens = semantic_encoder.windows_at_once(model.device) * semantic_encoder.window_tokens
    for audio, size in context_blocks(blocks(), block_tokens):
        tokens = torch.full((len(audio),), size, device=model.device)
        unified, semantic, acoustic = model._encode_context(audio.to(model.device), tokens, level)
        yield {"unified": unified, "semantic": semantic, "acoustic": acoustic}[part].cpu()


@torch.inference_mode()
def decode_blocks(model: DashengTokenizerModel, latents: Latents, block_tokens: int = BLOCK_TOKENS) -> Iterator[Array]:
    """(channels, T, D) latents → (channels, 640·N) pieces at 16 kHz."""
    context = -(-model.decoder.context_frames // model.config.upsample_tokens)
    total = latents.shape[1]
    for start in range(0, total, block_tokens):
        end = min(start + block_tokens, total)
        first, last = max(0, start - context), min(total, end + context)
        piece = latents[:, first:last]
        check_latents(piece, model.latent_dim)
        audio = model._decode(piece.to(model.device))
        yield audio[:, (start - first) * SAMPLES_PER_TOKEN : (end - first) * SAMPLES_PER_TOKEN].float().cpu().numpy()


# ---------------------------------------------------------------------- any rate: arrays and files


def _at_16k(blocks: Iterable[Array], rate: int, channels: int) -> Iterator[Array]:
    if rate == SAMPLING_RATE:
        yield from blocks
        return
    resampler = StreamingResampler(rate, SAMPLING_RATE, channels)
    previous: Array | None = None
    for block in blocks:
        if previous is not None:
            yield resampler.process(previous)
        previous = block
    if previous is not None:
        yield resampler.process(previous, last=True)


def _latent_blocks(
    model: DashengTokenizerModel,
    blocks: Callable[[], Iterable[Array]],
    shape: tuple[int, int],
    rate: int,
    progress: Progress | None,
    part: Part = "unified",
) -> Iterator[Tensor]:
    """Latents (channels, N, D) of pieces at any rate that sum up to `shape`, (channels, samples)."""
    channels, samples = shape
    seconds = samples / rate
    done = 0.0
    for latents in encode_blocks(model, lambda: ahead(_at_16k(blocks(), rate, channels)), part):
        yield latents
        done += latents.shape[1] / model.frame_rate
        if progress is not None:
            progress(min(done, seconds), seconds)


def _fields(model: DashengTokenizerModel, shape: tuple[int, int], rate: int) -> dict[str, Any]:
    """The fields of `AudioTokens` besides the latents."""
    return {
        "sampling_rate": rate,
        "num_samples": shape[1],
        "num_channels": shape[0],
        "frame_rate": model.frame_rate,
        "model_name": model_name(model),
        "weights_hash": model.weights_hash(),
    }


def audio_blocks(
    model: DashengTokenizerModel,
    latents: Latents,
    sampling_rate: int,
    num_samples: int,
    progress: Progress | None = None,
) -> Iterator[Array]:
    """Decode to any rate and length.

    Args:
        model: the tokenizer.
        latents: (channels, T, D).
        sampling_rate: of the audio, in Hz.
        num_samples: of the audio at that rate.
        progress: called with seconds done and seconds in all.

    Yields:
        (channels, any) pieces that sum up to `num_samples`.
    """
    at_16k = resampled_length(num_samples, sampling_rate, SAMPLING_RATE)
    seconds = num_samples / sampling_rate
    resampler = None
    if sampling_rate != SAMPLING_RATE:
        resampler = StreamingResampler(SAMPLING_RATE, sampling_rate, latents.shape[0])
    read = written = 0
    for block in decode_blocks(model, latents):
        block = block[:, : at_16k - read]
        read += block.shape[1]
        if resampler is not None:
            block = resampler.process(block, last=read == at_16k)
        block = block[:, : num_samples - written]
        if read == at_16k:  # ceil() of both rates can leave the last sample or two open
            block = fit_length(block, num_samples - written)
        written += block.shape[1]
        yield block
        if progress is not None:
            progress(min(read / SAMPLING_RATE, seconds), seconds)


def model_name(model: DashengTokenizerModel) -> str:
    """How token files name the model: by its name in `provenance`, or the last part of where it was loaded from."""
    path = str(model.config.provenance.get("name") or model.config.name_or_path or "unnamed")
    return Path(path).name if Path(path).is_dir() else path


def check_model(model: DashengTokenizerModel, tokens: AudioTokens | TokenReader, force: bool = False) -> None:
    """Refuses tokens of other weights.

    Raises:
        ModelMismatchError: naming both models; of another latent width even with `force`.
    """
    if not force and tokens.weights_hash != model.weights_hash():
        raise ModelMismatchError(
            f"the tokens were made by {tokens.model_name} (weights {tokens.weights_hash[:12]}), this model is "
            f"{model_name(model)} (weights {model.weights_hash()[:12]}); load the former, or use force to decode anyway"
        )
    if tokens.latents.shape[-1] != model.latent_dim:
        raise ModelMismatchError(
            f"the tokens of {tokens.model_name} are {tokens.latents.shape[-1]} wide, {model_name(model)} takes "
            f"{model.latent_dim}; no force can mend that"
        )


def compress(
    model: DashengTokenizerModel, audio: npt.ArrayLike | Tensor, sampling_rate: int, part: Part = "unified"
) -> AudioTokens:
    """See `DashengTokenizerModel.compress`; `part` as in `encode_blocks`."""
    array = to_audio_array(audio)
    rate = check_rate(sampling_rate)
    shape = (array.shape[0], array.shape[1])
    latents = torch.cat(list(_latent_blocks(model, lambda: [array], shape, rate, None, part)), dim=1)
    return AudioTokens(latents=latents.clone(), **_fields(model, shape, rate))  # clone: out of inference mode


def decompress(model: DashengTokenizerModel, tokens: AudioTokens, force: bool = False) -> Tensor:
    """See `DashengTokenizerModel.decompress`."""
    check_model(model, tokens, force)
    blocks = audio_blocks(model, tokens.latents, tokens.sampling_rate, tokens.num_samples)
    return torch.from_numpy(np.concatenate(list(blocks), axis=1))


def encode_file(
    model: DashengTokenizerModel,
    source: str | Path,
    target: str | Path,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    part: Part = "unified",
) -> TokenReader:
    """An audio file of any length → a token file that appears whole or not at all, at constant memory.

    Args:
        model: the tokenizer.
        source: anything soundfile reads, any rate and channels.
        target: token file; one that exists is replaced.
        dtype: stored number type; None is the model's.
        progress: called with seconds done and seconds in all.
        part: what is stored; the decoder takes `unified` alone.

    Raises:
        AudioFileError: missing, not audio, damaged or truncated; AudioError: NaN or infinity, or a rate out of range;
        OutputError: the token file cannot be written.
    """
    reader = AudioReader(source)
    rate = check_rate(reader.sampling_rate)
    shape = (reader.num_channels, reader.num_samples)
    length = -(-resampled_length(reader.num_samples, rate, SAMPLING_RATE) // SAMPLES_PER_TOKEN)
    size = (reader.num_channels, length, model.latent_dim)
    with token_writer(target, size, dtype or model.dtype, **_fields(model, shape, rate)) as out:
        for block in _latent_blocks(model, reader.blocks, shape, rate, progress, part):
            out.write(block)
    return TokenReader(target)


def decode_file(
    model: DashengTokenizerModel,
    tokens: AudioTokens | TokenReader,
    target: str | Path,
    progress: Progress | None = None,
    force: bool = False,
    **writer: Any,
) -> None:
    """Tokens → an audio file that appears whole or not at all; constant memory with a `TokenReader`.

    Args:
        model: the tokenizer that made the tokens.
        tokens: in memory or on disk.
        target: audio file; its suffix says the format.
        progress: called with seconds done and seconds in all.
        force: decode tokens of other weights too.
        writer: more arguments of `AudioWriter`.

    Raises:
        ModelMismatchError: as `decompress`; OutputError: the file cannot be written.
    """
    check_model(model, tokens, force)
    with AudioWriter(target, tokens.sampling_rate, tokens.num_channels, **writer) as out:
        blocks = audio_blocks(model, tokens.latents, tokens.sampling_rate, tokens.num_samples, progress)
        for block in ahead(blocks, count=1):  # the model computes while the file is written
            out.write(block)
