"""Live audio: tokens and reconstruction as soon as they are determined, equal to those of the whole recording.

    model.set_encoder_window(1.0)
    with model.streaming(sampling_rate=48_000) as stream:
        for block in microphone:  # of any size
            latents, audio = stream.push(block)
        latents, audio = stream.finish()

What is to wait for: the tokens of a window of the semantic encoder see each other, so they come together, when the
window is full; the tokens of a VAE and the samples of the decoder see a few tokens on each side.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dasheng_tokenizer.chunking import BLOCK_TOKENS
from dasheng_tokenizer.errors import AudioError, ConfigurationError
from dasheng_tokenizer.finite_context import ContextBlocks, FiniteContext
from dasheng_tokenizer.input_checks import check_latents
from dasheng_tokenizer.samples import (
    Array,
    StreamingResampler,
    check_rate,
    fit_length,
    resampled_length,
    to_audio_array,
)
from dasheng_tokenizer.spectral import CONTEXT, SAMPLES_PER_TOKEN, SAMPLING_RATE
from dasheng_tokenizer.vae import VAEEncoder

if TYPE_CHECKING:
    from dasheng_tokenizer.tokenizer import DashengTokenizerModel

FULL_SCALE_LEVEL = 128.0**2
"""Power of a full-scale sine in the Dasheng front end: half the amplitude times the sum of its 512-point Hann window.

The `level` of an endless stream, whose loudest band cannot be known: the floor then lies at the least loud place that
any recording could put it for a pure tone, 120 dB below.
"""


class StreamOutput(NamedTuple):
    """What a piece of a stream has determined.

    Attributes:
        latents: (channels, N, D) next tokens, N ≥ 0.
        audio: (channels, M) float32 next samples of the reconstruction at the stream's rate, M ≥ 0.
    """

    latents: Tensor
    audio: Tensor


class EncoderStream:
    """Audio in pieces → latents in pieces; together those of `compress` of the whole.

    Args:
        model: the tokenizer, in `length_mode="exact"`.
        sampling_rate: of the audio, in Hz, 8000 to 192000.
        num_channels: each is a stream of its own.
        level: loudest mel power of the whole recording, for encoders whose floor hangs on it (`needs_level`).

    Attributes:
        num_samples: samples a channel pushed so far.

    Raises:
        AudioError: rate out of range or no channel.
        ConfigurationError: another length mode.
    """

    def __init__(
        self, model: DashengTokenizerModel, sampling_rate: int, num_channels: int = 1, level: float = FULL_SCALE_LEVEL
    ) -> None:
        if model.config.length_mode != "exact":
            raise ConfigurationError('streaming is exact; load the model with length_mode="exact"')
        if num_channels < 1:
            raise AudioError(f"a stream of {num_channels} channels was asked for; it needs at least one")
        self.model, self.num_channels, self.num_samples = model, num_channels, 0
        self._resampler = StreamingResampler(check_rate(sampling_rate), SAMPLING_RATE, num_channels)
        self._means: FiniteContext | None = None
        if isinstance(encoder := model.encoder, VAEEncoder):
            self._blocks = ContextBlocks(BLOCK_TOKENS, wait=False)
            self._means = FiniteContext(lambda patches: encoder.posterior(patches).mean, encoder.context_tokens)
        else:
            self._blocks = ContextBlocks(model.semantic_encoder.window_tokens)
        self._level = torch.full((num_channels,), level, device=model.device)
        self._finished = False

    @torch.inference_mode()
    def push(self, block: npt.ArrayLike | Tensor) -> Tensor:
        """(samples,) or (channels, samples) of any kind that `compress` takes, also none → (channels, N, D), N ≥ 0.

        Raises:
            AudioError: NaN or infinity, another number of channels, or the stream has ended.
        """
        if self._finished:
            raise AudioError("a block was pushed after the end; open a new stream")
        if np.size(block) == 0:
            return self._join([])
        audio = to_audio_array(block)
        if audio.shape[0] != self.num_channels:
            raise AudioError(f"a block has {audio.shape[0]} channels, the stream has {self.num_channels}")
        self.num_samples += audio.shape[1]
        return self._join(self._encode(*part) for part in self._blocks.push(self._resampler.process(audio)))

    @torch.inference_mode()
    def finish(self) -> Tensor:
        """The tokens that are left, (channels, N, D).

        Raises:
            AudioError: nothing was pushed, or the stream has ended before.
        """
        if self._finished or self.num_samples == 0:
            raise AudioError("the stream has ended already" if self._finished else "the stream ends without a sample")
        self._finished = True
        rest = self._resampler.process(np.zeros((self.num_channels, 0), dtype=np.float32), last=True)
        parts = [self._encode(*part) for part in (*self._blocks.push(rest), *self._blocks.finish())]
        if self._means is not None:
            parts.append(self._means.finish())
        return self._join(parts)

    def _encode(self, context_audio: Tensor, size: int) -> Tensor | None:
        audio = context_audio.to(self.model.device)
        if self._means is not None:
            assert isinstance(self.model.encoder, VAEEncoder)
            return self._means.push(self.model.encoder.patches(audio))
        tokens = torch.full((self.num_channels,), size, device=audio.device)
        return self.model._encode_context(audio, tokens, self._level)[0]  # (channels, N, D)

    def _join(self, parts: Iterable[Tensor | None]) -> Tensor:
        none = torch.zeros(self.num_channels, 0, self.model.latent_dim, dtype=self.model.dtype)
        return torch.cat([none, *(part.cpu() for part in parts if part is not None)], dim=1)


class DecoderStream:
    """Latents in pieces → audio in pieces; together that of `decompress` of the whole.

    Args:
        model: the tokenizer.
        sampling_rate: of the audio, in Hz, 8000 to 192000.
        num_channels: of the latents and of the audio.
    """

    def __init__(self, model: DashengTokenizerModel, sampling_rate: int, num_channels: int = 1) -> None:
        self.model, self.num_channels = model, num_channels
        self.sampling_rate = check_rate(sampling_rate)
        self._decoder = FiniteContext(model._decode, decoder_context(model), SAMPLES_PER_TOKEN)
        self._resampler = StreamingResampler(SAMPLING_RATE, sampling_rate, num_channels)
        self._tokens = self._at_16k = self._given = 0

    @torch.inference_mode()
    def push(self, latents: Tensor) -> Tensor:
        """(channels, N, D), N ≥ 0 → (channels, M) float32 samples whose tokens are all here, M ≥ 0.

        Raises:
            LatentError: wrong rank, width or number of channels, NaN or infinity.
        """
        if latents.ndim == 3 and latents.shape[1] == 0:
            return torch.zeros(self.num_channels, 0)
        check_latents(latents, self.model.latent_dim)
        self._tokens += latents.shape[1]
        audio = self._decoder.push(latents.to(self.model.device))
        if audio is None:
            return torch.zeros(self.num_channels, 0)
        self._at_16k += audio.shape[1]
        return self._give(self._resampler.process(audio.float().cpu().numpy()))

    @torch.inference_mode()
    def finish(self, num_samples: int | None = None) -> Tensor:
        """The samples that are left, (channels, M), so that there are `num_samples` in all; None: to the last token.

        Raises:
            AudioError: nothing was pushed, or the tokens do not hold that many samples.
        """
        full = resampled_length(self._tokens * SAMPLES_PER_TOKEN, SAMPLING_RATE, self.sampling_rate)
        wanted = full if num_samples is None else num_samples
        if not max(1, self._given) <= wanted <= full:
            raise AudioError(f"num_samples {wanted}: {self._given} samples were given already, the tokens hold {full}")
        at_16k = resampled_length(wanted, self.sampling_rate, SAMPLING_RATE)
        audio = self._decoder.finish()
        rest = np.zeros((self.num_channels, 0), dtype=np.float32) if audio is None else audio.float().cpu().numpy()
        rest = self._resampler.process(rest[:, : max(0, at_16k - self._at_16k)], last=True)
        return self._give(fit_length(rest, wanted - self._given))

    def _give(self, audio: Array) -> Tensor:
        self._given += audio.shape[1]
        return torch.from_numpy(np.ascontiguousarray(audio))


class TokenizerStream:
    """Audio in pieces → tokens and reconstruction in pieces. Made by `DashengTokenizerModel.streaming`.

    A context manager: leaving it frees what the stream holds. Several streams of one model do not disturb each other.

    Attributes:
        encoder: the first half alone, for a sender of tokens.
        decoder: the second half alone, for a receiver of tokens; None without `reconstruct`.
    """

    def __init__(
        self,
        model: DashengTokenizerModel,
        sampling_rate: int = SAMPLING_RATE,
        num_channels: int = 1,
        level: float = FULL_SCALE_LEVEL,
        reconstruct: bool = True,
    ) -> None:
        self.encoder: EncoderStream | None = EncoderStream(model, sampling_rate, num_channels, level)
        self.decoder = DecoderStream(model, sampling_rate, num_channels) if reconstruct else None
        self._none = torch.zeros(num_channels, 0)

    def push(self, block: npt.ArrayLike | Tensor) -> StreamOutput:
        """Audio as `EncoderStream.push` → what it determines.

        Raises:
            AudioError: as `EncoderStream.push`.
        """
        latents = self._open().push(block)
        return StreamOutput(latents, self._none if self.decoder is None else self.decoder.push(latents))

    def finish(self) -> StreamOutput:
        """What is left, after which the reconstruction is as long as what was pushed.

        Raises:
            AudioError: nothing was pushed, or the stream has ended before.
        """
        encoder = self._open()
        latents = encoder.finish()
        if self.decoder is None:
            return StreamOutput(latents, self._none)
        audio = self.decoder.push(latents)
        return StreamOutput(latents, torch.cat([audio, self.decoder.finish(encoder.num_samples)], dim=1))

    def __enter__(self) -> TokenizerStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.encoder = self.decoder = None

    def _open(self) -> EncoderStream:
        if self.encoder is None:
            raise AudioError("the stream was left (`with`); open a new one")
        return self.encoder


def decoder_context(model: DashengTokenizerModel) -> int:
    """Tokens on each side that a sample of the reconstruction depends on."""
    return -(-model.decoder.context_frames // model.config.upsample_tokens)


def streaming_latency(model: DashengTokenizerModel) -> tuple[float, float]:
    """Seconds from a sample's arrival to its token, and to its reconstruction, at most: what the model has to wait for.

    Computing time and, at other rates than 16 kHz, the two resamplers come on top.
    """
    if isinstance(encoder := model.encoder, VAEEncoder):
        tokens = 1 + encoder.context_tokens
    else:
        tokens = model.semantic_encoder.window_tokens
    samples = tokens * SAMPLES_PER_TOKEN + CONTEXT
    return samples / SAMPLING_RATE, (samples + decoder_context(model) * SAMPLES_PER_TOKEN) / SAMPLING_RATE
