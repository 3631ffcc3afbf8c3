"""Recipes of an enhancer (`kind: enhancement`); `training.configuration` says how recipes are read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dasheng_tokenizer.enhancement.mixture_configuration import MixtureConfig
from dasheng_tokenizer.errors import ConfigurationError
from dasheng_tokenizer.injection import Part
from dasheng_tokenizer.spectral import SAMPLES_PER_TOKEN, SAMPLING_RATE
from dasheng_tokenizer.training.configuration import LoopConfig, build_config, read_settings


@dataclass(frozen=True)
class AudioSources:
    """Audio of one kind.

    Attributes:
        train: tar shards, audio files, folders, globs or ranges in braces; see `training.clips.find_shards`.
        valid: the same, held out.
        where: labels that a clip must have, such as {domain: speech}; see `clip_store.matches`.
    """

    train: list[str] = field(default_factory=list)
    valid: list[str] = field(default_factory=list)
    where: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PairedSources:
    """Recordings that come as pairs of files of one name, in folders of their own.

    Attributes:
        clean: sources of the clean ones.
        noisy: sources of the noisy ones.
        held_out: beginnings of the names, such as those of speakers, that are for validation and not for training.
    """

    clean: list[str] = field(default_factory=list)
    noisy: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class EnhancementDataConfig:
    """What an enhancer learns from, and how it is cut.

    Attributes:
        speech: clean speech to make mixtures of.
        noise: noise of any kind.
        music: music.
        paired: noisy and clean recordings, in place of the three above.
        rooms: recorded room responses; empty: rooms are simulated where `mixture.reverberation` asks for any.
        cache: folder of decoded audio (16 kHz, int16) and simulated rooms; on a disk that all processes see.
        crop_seconds: length of a mixture, a multiple of 0.04 (one token).
        batch_size: mixtures a step, over all processes together.
        workers: processes that make mixtures ahead; 0: each batch is made when it is asked for.
        embedded_mixtures: so many mixtures are embedded once and shown again in every epoch, see `embedded_mixtures`;
            0: fresh ones at every step.
    """

    speech: AudioSources = field(default_factory=AudioSources)
    noise: AudioSources = field(default_factory=AudioSources)
    music: AudioSources = field(default_factory=AudioSources)
    paired: PairedSources = field(default_factory=PairedSources)
    rooms: list[str] = field(default_factory=list)
    cache: Path = Path("runs/enhancement-cache")
    crop_seconds: float = 2.56
    batch_size: int = 16
    workers: int = 0
    embedded_mixtures: int = 0

    def __post_init__(self) -> None:
        """Refuse values out of range and sources that exclude each other."""
        tokens = self.crop_seconds * SAMPLING_RATE / SAMPLES_PER_TOKEN
        if not math.isfinite(tokens) or abs(tokens - round(tokens)) > 1e-6 or round(tokens) < 1:
            raise ConfigurationError(f"data.crop_seconds must be a multiple of 0.04, not {self.crop_seconds}")
        if self.batch_size < 1 or self.workers < 0:
            raise ConfigurationError(
                f"data.batch_size must be at least 1 and data.workers not negative: {self.batch_size}, {self.workers}"
            )
        if self.embedded_mixtures < 0:
            raise ConfigurationError(f"data.embedded_mixtures must not be negative, not {self.embedded_mixtures}")
        if bool(self.paired.clean) != bool(self.paired.noisy):
            raise ConfigurationError("data.paired needs both, clean and noisy")
        if self.is_paired and self.speech.train:
            raise ConfigurationError("data.paired brings its own speech: drop data.paired or data.speech")
        for name in ("noise", "music"):
            sources: AudioSources = getattr(self, name)
            if self.speech.valid and sources.train and not sources.valid:
                raise ConfigurationError(f"data.{name}.valid is empty, but speech is held out: hold out {name}, too")

    @property
    def is_paired(self) -> bool:
        """Whether noisy and clean recordings come as pairs."""
        return bool(self.paired.clean)

    @property
    def crop_samples(self) -> int:
        """Samples of a mixture, S."""
        return round(self.crop_seconds * SAMPLING_RATE / SAMPLES_PER_TOKEN) * SAMPLES_PER_TOKEN


@dataclass(frozen=True)
class DenoiserSettings:
    """Size of the denoiser, see `DenoiserConfig`.

    Attributes:
        depth: transformer blocks.
        heads: attention heads; the width must be a multiple of them.
        width: of the blocks; None: the latent's.
    """

    depth: int = 3
    heads: int = 6
    width: int | None = None


@dataclass(frozen=True)
class EnhancementLossWeights:
    """Weights of the terms of the loss; a weight of 0 leaves the term uncomputed.

    Attributes:
        latent: smooth L1 distance of the standardised latents.
        spectral: multi-scale mel distance of the decoded latent to the clean audio, through the frozen decoder.
    """

    latent: float = 1.0
    spectral: float = 0.0

    def __post_init__(self) -> None:
        """Refuse negative weights and a loss without any term."""
        if min(self.latent, self.spectral) < 0 or self.latent + self.spectral <= 0:
            raise ConfigurationError(
                f"loss_weights.latent and loss_weights.spectral must not be negative, nor both 0: {self.latent}, "
                f"{self.spectral}"
            )


@dataclass(frozen=True)
class EnhancementConfig(LoopConfig):
    """A recipe of an enhancer.

    Attributes:
        kind: says that a recipe is one of these.
        output: run folder.
        tokenizer: folder or hub name of the frozen tokenizer; None: the embedded default.
        init: folder of a denoiser to start from, of the same tokenizer, part and size; None: fresh weights.
        part: what of the noisy recording the denoiser sees; of a VAE always its latent, `unified`.
        denoiser: its size.
        data: speech and noise, crops, batch size.
        mixture: how speech is spoilt. Of pairs only `gain_db` counts.
        loss_weights: weights of the loss terms.
        whitening: how far the loss, and the start of the denoiser's first layer, bring loud and quiet directions of the
            latent together: 0, not at all, to 1, all alike; see `latent_space`.
        statistics_crops: crops of the training data that the statistics of the latents are taken from.
        validation_clips: held-out mixtures that a validation decodes.
        validation_samples: of these, mixtures whose audio and spectrograms go to TensorBoard.
    """

    kind: Literal["enhancement"] = "enhancement"
    output: Path = Path("runs/enhancement")
    tokenizer: str | None = None
    init: str | None = None
    part: Part = "unified"
    denoiser: DenoiserSettings = field(default_factory=DenoiserSettings)
    data: EnhancementDataConfig = field(default_factory=EnhancementDataConfig)
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    loss_weights: EnhancementLossWeights = field(default_factory=EnhancementLossWeights)
    whitening: float = 0.5
    statistics_crops: int = 512
    validation_clips: int = 32
    validation_samples: int = 4

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other."""
        super().__post_init__()
        if self.seed < 0:
            raise ConfigurationError(f"seed must not be negative, not {self.seed}")
        for name in ("validation_clips", "validation_samples"):
            if getattr(self, name) < 0:
                raise ConfigurationError(f"{name} must not be negative, not {getattr(self, name)}")
        if not 0 <= self.whitening <= 1:
            raise ConfigurationError(f"whitening must lie between 0 and 1, not {self.whitening}")
        if self.statistics_crops < 1:
            raise ConfigurationError(f"statistics_crops must be at least 1, not {self.statistics_crops}")
        if self.data.batch_size % self.accumulate:
            raise ConfigurationError(
                f"data.batch_size {self.data.batch_size} must be a multiple of accumulate, {self.accumulate}"
            )


def load_enhancement_recipe(path: str | Path, overrides: Sequence[str] = ()) -> EnhancementConfig:
    """Read a recipe of an enhancer; see `training.configuration.load_recipe`.

    Raises:
        ConfigurationError: no such file, no YAML, an unknown key, a value of a wrong type or out of range.
    """
    return build_config(EnhancementConfig, read_settings(path, overrides), name=str(path))
