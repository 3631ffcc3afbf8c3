"""Speech enhancement in one object: a denoiser and the tokenizer in whose latents it works.

noisy audio ─ tokenizer ─► latents (T, D) ─ denoiser ─► latents (T, D) ─ decoder ─► clean audio

A denoiser sees windows of the length that it was trained on. Half of a window is its own, a quarter on each side is
context that neighbours share, so that long audio needs constant memory and is the same in one piece and in blocks.
"""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dasheng_tokenizer.audio import AudioWriter
from dasheng_tokenizer.chunking import Latents, Progress, audio_blocks, compress, encode_file, model_name
from dasheng_tokenizer.enhancement.denoiser import Denoiser
from dasheng_tokenizer.errors import CheckpointError, ConfigurationError, LatentError, ModelMismatchError
from dasheng_tokenizer.semantic_encoder import token_mask
from dasheng_tokenizer.tokenizer import DashengTokenizerModel

WINDOWS = 16
"""Windows that run as one batch."""


class Enhancer:
    """Noisy speech → clean speech, of any rate, length and number of channels, each channel on its own.

        enhancer = Enhancer.from_pretrained()
        clean = enhancer.enhance(noisy, sampling_rate)

    What the tokenizer loses is lost here as well: nothing above 8 kHz is left, and clean speech does not come back
    sample by sample.

    Args:
        denoiser: stays on its device.
        tokenizer: that of the denoiser, on the same device.

    Raises:
        ModelMismatchError: the tokenizer is not the one that the denoiser was trained with.
        ConfigurationError: a denoiser of a part, for a tokenizer that has none.
    """

    def __init__(self, denoiser: Denoiser, tokenizer: DashengTokenizerModel) -> None:
        check_tokenizer(denoiser, tokenizer)
        self.denoiser, self.tokenizer = denoiser.eval(), tokenizer.eval()

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] | None = None,
        tokenizer: str | os.PathLike[str] | None = None,
        device: str | None = None,
    ) -> Enhancer:
        """Load both parts.

        Args:
            model: folder of a denoiser; None: the one that ships with the package.
            tokenizer: folder or hub name; None: the one that the denoiser names.
            device: as torch writes it; None: CUDA where there is one.

        Raises:
            CheckpointError: a part cannot be loaded.
            ModelMismatchError: the tokenizer does not belong to the denoiser.
            ConfigurationError: there is no such device.
        """
        from dasheng_tokenizer.cli_audio import load_model

        denoiser = Denoiser.from_pretrained(model)
        wanted = denoiser.info.tokenizer if tokenizer is None else os.fspath(tokenizer)
        try:
            codec = load_model(wanted, device, None)
        except CheckpointError as error:
            if tokenizer is not None:
                raise
            raise CheckpointError(
                f"the enhancer's tokenizer cannot be loaded: {error}. Name the folder where it is now (--tokenizer); "
                f"its weights hash is {denoiser.info.tokenizer_hash}"
            ) from error
        return cls(denoiser.to(codec.device), codec)

    def enhance(self, audio: npt.ArrayLike | Tensor, sampling_rate: int) -> Tensor:
        """Enhance audio in memory.

        Args:
            audio: (samples,) or (channels, samples), floating point at full scale 1 or integers at theirs.
            sampling_rate: of `audio`, in Hz, 8000 to 192000.

        Returns:
            (channels, samples) float32, as long as `audio` and at its rate.

        Raises:
            AudioError: empty, NaN or infinite, wrong rank, rate out of range.
            LatentError: the denoiser made NaN.
        """
        tokens = compress(self.tokenizer, audio, sampling_rate, self.denoiser.info.part)
        latents = DenoisedLatents(self.denoiser, tokens.latents)
        blocks = audio_blocks(self.tokenizer, latents, tokens.sampling_rate, tokens.num_samples)
        return torch.from_numpy(np.concatenate(list(blocks), axis=1))

    def enhance_file(
        self,
        source: str | os.PathLike[str],
        target: str | os.PathLike[str],
        progress: Progress | None = None,
        **writer: Any,
    ) -> None:
        """Enhance an audio file of any length at constant memory; the latents of the noisy audio wait on the disk.

        Args:
            source: anything soundfile reads, any rate and channels.
            target: audio file, which appears whole or not at all; its suffix says the format. One that exists is
                replaced.
            progress: called with seconds done and seconds in all.
            writer: more arguments of `AudioWriter`.

        Raises:
            AudioFileError: missing, not audio, damaged or truncated; AudioError: NaN or infinity, or rate out of range;
            LatentError: the denoiser made NaN; OutputError: the file cannot be written.
        """

        def half(before: float) -> Progress:
            return lambda done, total: progress(before * total + done / 2, total) if progress is not None else None

        with TemporaryDirectory() as scratch:
            kept = Path(scratch) / "noisy.tokens.safetensors"
            tokens = encode_file(self.tokenizer, Path(source), kept, None, half(0.0), self.denoiser.info.part)
            latents = DenoisedLatents(self.denoiser, tokens.latents)
            with AudioWriter(Path(target), tokens.sampling_rate, tokens.num_channels, **writer) as out:
                for block in audio_blocks(self.tokenizer, latents, tokens.sampling_rate, tokens.num_samples, half(0.5)):
                    out.write(block)


class DenoisedLatents:
    """Latents of noisy audio that are denoised where they are asked for: `latents[:, first:last]`.

    Args:
        denoiser: whose window is W tokens. Up to W tokens are one window. Of more, each run of ⌈W/2⌉ is computed in a
            window of its own with up to W/4 tokens of context on each side.
        latents: (channels, T, D) of the noisy audio.
    """

    def __init__(self, denoiser: Denoiser, latents: Latents) -> None:
        self.denoiser, self.latents = denoiser, latents
        self.shape = tuple(latents.shape)
        window = denoiser.info.window_tokens
        self.context = window // 4
        self.core = max(window - 2 * self.context, self.shape[1] if self.shape[1] <= window else 1)

    @torch.inference_mode()
    def __getitem__(self, index: tuple[slice, slice]) -> Tensor:
        """(channels, n, D) of a range of tokens, on the device of the denoiser."""
        first, last, _ = index[1].indices(self.shape[1])
        cores = range(first // self.core, -(-last // self.core))
        pieces = [self._run(cores[start : start + WINDOWS]) for start in range(0, len(cores), WINDOWS)]
        before = cores.start * self.core
        return torch.cat(pieces, dim=1)[:, first - before : last - before]  # (channels, n, D)

    def _run(self, cores: range) -> Tensor:
        """(channels, n, D): cores that follow each other, their windows as one batch."""
        length = self.shape[1]
        starts = [max(0, core * self.core - self.context) for core in cores]
        ends = [min(length, (core + 1) * self.core + self.context) for core in cores]
        held = self.latents[:, starts[0] : ends[-1]].to(self.denoiser.latent_mean)  # (channels, n, D)
        counts = [end - start for start, end in zip(starts, ends, strict=True)]
        batch = held.new_zeros(len(cores), held.shape[0], max(counts), held.shape[2])  # (W, channels, n, D)
        for place, (start, count) in enumerate(zip(starts, counts, strict=True)):
            batch[place, :, :count] = held[:, start - starts[0] : start - starts[0] + count]
        mask = token_mask(torch.tensor(counts, device=held.device), max(counts))  # (W, n)
        mask = mask[:, None].expand(-1, held.shape[0], -1)  # (W, channels, n)
        clean = self.denoiser(batch.flatten(0, 1), mask.flatten(0, 1)).unflatten(0, batch.shape[:2])
        if not bool(torch.isfinite(clean).all()):
            raise LatentError("the denoiser made NaN or infinity; run it as float32, or train it again")
        clean = self._unless_clean(batch, clean, mask)  # (W, channels, n, D)
        own = []
        for place, (core, start) in enumerate(zip(cores, starts, strict=True)):
            size = min(self.core, length - core * self.core)
            own.append(clean[place, :, core * self.core - start :][:, :size])
        return torch.cat(own, dim=1)

    def _unless_clean(self, noisy: Tensor, clean: Tensor, mask: Tensor) -> Tensor:
        """(W, channels, n, D): of windows that need no denoising what came in, by how little would change."""
        if self.denoiser.info.clean_change is None:
            return clean
        low, high = self.denoiser.info.clean_change
        change = ((clean - noisy) / self.denoiser.latent_std).square().mean(-1)  # (W, channels, n)
        change = change.masked_fill(~mask, 0.0).sum(-1) / mask.sum(-1)  # (W, channels)
        share = ((change - low) / (high - low)).clamp(0, 1)[..., None, None]
        return noisy + share * (clean - noisy)


def check_tokenizer(denoiser: Denoiser, tokenizer: DashengTokenizerModel) -> None:
    """Refuse a tokenizer that the denoiser was not trained with.

    Raises:
        ModelMismatchError: other weights. ConfigurationError: a denoiser of a part, for a tokenizer that has none.
    """
    if tokenizer.weights_hash() != denoiser.info.tokenizer_hash:
        wanted = denoiser.info.tokenizer or "the embedded default of its version"
        raise ModelMismatchError(
            f"the enhancer was trained with the tokenizer {wanted} (weights {denoiser.info.tokenizer_hash[:12]}), this "
            f"is {model_name(tokenizer)} (weights {tokenizer.weights_hash()[:12]}); give the former, or train an "
            "enhancer for this one"
        )
    if tokenizer.latent_dim != denoiser.config.latent_dim:
        raise ModelMismatchError(
            f"the enhancer's latents are {denoiser.config.latent_dim} wide, those of {model_name(tokenizer)} "
            f"{tokenizer.latent_dim}; its folder is damaged"
        )
    if tokenizer.config.is_vae and denoiser.info.part != "unified":
        raise ConfigurationError(f"the tokenizer is a VAE, which has no {denoiser.info.part} part; train another one")
