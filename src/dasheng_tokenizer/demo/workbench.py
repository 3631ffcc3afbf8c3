"""What the demo page does with a clip, without the page: audio in, audio, latents and figures out.

Nothing here writes to a disk, and nothing of a clip is kept, so that several visitors do not meet.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from dasheng_tokenizer.audio import Array, AudioReader, load_audio, resample
from dasheng_tokenizer.chunking import compress
from dasheng_tokenizer.errors import AudioError, CheckpointError, DashengTokenizerError, MissingExtraError
from dasheng_tokenizer.injection import Part
from dasheng_tokenizer.reconstruction_report import RATE, measure
from dasheng_tokenizer.token_file import AudioTokens
from dasheng_tokenizer.tokenizer import DashengTokenizerModel

if TYPE_CHECKING:
    from dasheng_tokenizer.enhancement import Enhancer
    from dasheng_tokenizer.generation.pipeline import AudioPipeline

MAX_SECONDS = 60.0
"""Longest clip, so that one visitor does not keep the others waiting. The command line takes any length."""

MAX_CHANNELS = 2


@dataclass(frozen=True, eq=False)
class Clip:
    """Audio of a visitor.

    Attributes:
        name: of the file.
        audio: (channels, samples) float32, full scale 1.
        sampling_rate: Hz.
    """

    name: str
    audio: Array
    sampling_rate: int

    @property
    def seconds(self) -> float:
        """Length."""
        return float(self.audio.shape[1] / self.sampling_rate)

    @property
    def at_16_khz(self) -> Array:
        """(channels, samples at 16 kHz): what the model hears of it."""
        return resample(self.audio, self.sampling_rate, RATE)


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """A clip that went through the tokenizer.

    Attributes:
        clip: as it came back, as long and as many channels as before.
        tokens: what was between.
        figures: see `reconstruction_report.measure`.
    """

    clip: Clip
    tokens: AudioTokens
    figures: dict[str, Any]


@dataclass(frozen=True, eq=False)
class GalleryClip:
    """A bundled clip to compare with: its mean embedding (D,) of each part."""

    name: str
    means: dict[Part, Tensor]


class Workbench:
    """The models behind the page, shared by all visitors: their weights do not change.

    Args:
        tokenizer: in eval mode.
        enhancer: None: the page enhances nothing.
        generator: None: the page generates nothing.
        max_seconds: longest clip.
    """

    def __init__(
        self,
        tokenizer: DashengTokenizerModel,
        enhancer: Enhancer | None = None,
        generator: AudioPipeline | None = None,
        max_seconds: float = MAX_SECONDS,
    ) -> None:
        self.tokenizer, self.enhancer, self.generator = tokenizer, enhancer, generator
        self.max_seconds = max_seconds
        self.missing: dict[str, str] = {}
        """Why the page lacks enhancement or generation, where it does."""
        self._gallery_lock = Lock()

    @classmethod
    def load(
        cls,
        tokenizer: str | os.PathLike[str] | None = None,
        enhancer: str | os.PathLike[str] | None = None,
        generator: str | os.PathLike[str] | None = None,
        device: str | None = None,
        max_seconds: float = MAX_SECONDS,
    ) -> Workbench:
        """Load the models. An embedded enhancer or generator that cannot be had is left out, see `missing`.

        Args:
            tokenizer: folder or hub name; None: the one that ships with the package.
            enhancer: folder; None: the same.
            generator: folder or hub name; None: the same.
            device: as torch writes it; None: CUDA where there is one.
            max_seconds: longest clip.

        Raises:
            CheckpointError: a model that was named cannot be loaded.
            MissingExtraError: what a model that was named needs is not installed.
            ModelMismatchError: a model that was named belongs to another tokenizer than its own.
            ConfigurationError: there is no such device.
        """
        from dasheng_tokenizer.cli_audio import load_model
        from dasheng_tokenizer.enhancement import Enhancer
        from dasheng_tokenizer.generation.loading import load_pipeline

        bench = cls(
            load_model(None if tokenizer is None else os.fspath(tokenizer), device, None), None, None, max_seconds
        )
        try:
            bench.enhancer = Enhancer.from_pretrained(enhancer, device=device)
        except (CheckpointError, MissingExtraError) as error:
            if enhancer is not None:
                raise
            bench.missing["enhancement"] = str(error)
        try:
            bench.generator = load_pipeline(generator, device=device)
        except (CheckpointError, MissingExtraError) as error:
            if generator is not None:
                raise
            bench.missing["generation"] = str(error)
        return bench

    @property
    def parts(self) -> tuple[Part, ...]:
        """Embeddings that the tokenizer has; a VAE has its latent alone."""
        return ("unified",) if self.tokenizer.config.is_vae else get_args(Part)

    def read(self, path: str | os.PathLike[str] | None) -> Clip:
        """The audio of a visitor.

        Raises:
            AudioError: there is none, it is longer than `max_seconds`, or has more than two channels; or NaN, or a rate
                out of range.
            AudioFileError: it cannot be read.
        """
        if path is None:
            raise AudioError("there is no clip yet: upload or record one, or choose an example")
        reader = AudioReader(path)  # reads the header alone
        if reader.duration > self.max_seconds:
            raise AudioError(
                f"this clip lasts {reader.duration:.0f} s; the page takes up to {self.max_seconds:g} s. Cut it, or use "
                "the command line, which takes any length"
            )
        if reader.num_channels > MAX_CHANNELS:
            raise AudioError(
                f"this clip has {reader.num_channels} channels; the page takes up to {MAX_CHANNELS}. Mix it down, or "
                "use the command line"
            )
        audio, rate = load_audio(path)
        return Clip(Path(path).name, audio, rate)

    def reconstruct(self, clip: Clip) -> Reconstruction:
        """Encode and decode."""
        tokens = self.tokenizer.compress(clip.audio, clip.sampling_rate)
        decoded = Clip(clip.name, self.tokenizer.decompress(tokens).numpy(), clip.sampling_rate)
        return Reconstruction(decoded, tokens, measure(clip.at_16_khz, decoded.at_16_khz))

    def embed(self, clip: Clip) -> dict[Part, Tensor]:
        """(T, D) float32 of each part, the mean over channels."""
        return {
            part: compress(self.tokenizer, clip.audio, clip.sampling_rate, part).latents.float().mean(0).cpu()
            for part in self.parts
        }

    def similarities(self, embeddings: dict[Part, Tensor]) -> dict[Part, Tensor]:
        """(T, T) cosine of each token with each other, less the clip's mean, for each part.

        Without the mean taken off, tokens of one clip would all look alike.
        """
        centred = {part: held - held.mean(0) for part, held in embeddings.items()}
        return {part: F.normalize(held, dim=-1) @ F.normalize(held, dim=-1).T for part, held in centred.items()}

    def nearest(self, embeddings: dict[Part, Tensor]) -> list[tuple[str, dict[Part, float]]]:
        """Bundled clips and their cosine similarity to a clip by each part, the nearest by the first part first.

        Mean embeddings are compared, less their mean over the bundled clips.
        """
        gallery = self.gallery
        means = {part: torch.stack([held.means[part] for held in gallery]) for part in self.parts}  # (clips, D)
        found: dict[Part, Tensor] = {}
        for part, held in means.items():
            centre = held.mean(0)
            found[part] = F.cosine_similarity(embeddings[part].mean(0) - centre, held - centre)  # (clips,)
        order = found[self.parts[0]].argsort(descending=True).tolist()
        return [(gallery[index].name, {part: float(found[part][index]) for part in self.parts}) for index in order]

    @property
    def gallery(self) -> Sequence[GalleryClip]:
        """The bundled clips, embedded when they are asked for first."""
        with self._gallery_lock:
            return self._gallery

    @cached_property
    def _gallery(self) -> Sequence[GalleryClip]:
        clips: list[GalleryClip] = []
        for path in bundled_clips():
            audio, rate = load_audio(path)
            embeddings = self.embed(Clip(path.name, audio, rate))
            clips.append(GalleryClip(path.stem, {part: held.mean(0) for part, held in embeddings.items()}))
        return clips

    def enhance(self, clip: Clip) -> Clip:
        """Noisy speech → clean speech.

        Raises:
            DashengTokenizerError: this page has no enhancer.
        """
        if self.enhancer is None:
            raise DashengTokenizerError(self.missing.get("enhancement", "this page has no enhancer"))
        return Clip(clip.name, self.enhancer.enhance(clip.audio, clip.sampling_rate).numpy(), clip.sampling_rate)

    def generate(self, text: str, seconds: float, steps: int, guidance: float, seed: int) -> Clip:
        """A clip for a text.

        Raises:
            TextError: an empty text, or a very long one.
            ConfigurationError: a setting out of range.
            DashengTokenizerError: this page has no generator.
        """
        if self.generator is None:
            raise DashengTokenizerError(self.missing.get("generation", "this page has no generator"))
        made = self.generator(text, seconds, steps=steps, guidance=guidance, seed=seed)[0]
        return Clip(text, made.audio[None], made.sampling_rate)


def bundled_clips() -> list[Path]:
    """All clips that ship with the package: the three of `make demo`, then those of the gallery."""
    root = Path(str(files("dasheng_tokenizer") / "embedded"))
    return [*sorted((root / "clips").glob("*.flac")), *sorted((root / "gallery").glob("*.flac"))]
