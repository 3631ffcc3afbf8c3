"""Recipes of a generator (`kind: generator`); `training.configuration` says how recipes are read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dasheng_tokenizer.errors import ConfigurationError
from dasheng_tokenizer.generation.dit import DiTConfig, Size
from dasheng_tokenizer.generation.flow_matching import TimestepDistribution
from dasheng_tokenizer.training.configuration import LoopConfig, build_config, read_settings


@dataclass(frozen=True)
class LatentDataConfig:
    """What a generator learns from, and how it is cut.

    Attributes:
        folder: that the folders of `train` and `valid` are in; another tokenizer's latents are one setting away.
        train: folders that `encode-dataset` made, all with the same tokenizer.
        valid: the same, held out.
        crop_seconds: longest piece of a clip; longer clips are cropped at random places, shorter ones come whole.
        min_crop_seconds: None: every piece is as long as the clip and `crop_seconds` allow. Else its length is drawn
            between this and that, so that a corpus of clips of one length teaches other lengths too.
        batch_size: clips a step, over all processes together.
        balance: name of a label, such as `domain`: every value of it is seen equally often. None: every clip is.
        shares: how often values of `balance` are seen in proportion to the others, such as {sound: 2}; 1 where absent.
        evened: for values of `balance`, another label whose values are seen equally often among their clips, such as
            {sound: event}.
        load_ahead: read the next batches in a thread while the step is computed.
    """

    folder: Path = Path()
    train: list[str] = field(default_factory=list)
    valid: list[str] = field(default_factory=list)
    crop_seconds: float = 10.0
    min_crop_seconds: float | None = None
    batch_size: int = 16
    balance: str | None = None
    shares: dict[str, int] = field(default_factory=dict)
    evened: dict[str, str] = field(default_factory=dict)
    load_ahead: bool = True

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if not 0 < self.crop_seconds < math.inf:
            raise ConfigurationError(f"data.crop_seconds must be above 0 and finite, not {self.crop_seconds}")
        if self.min_crop_seconds is not None and not 0 < self.min_crop_seconds <= self.crop_seconds:
            raise ConfigurationError(
                f"data.min_crop_seconds must be above 0 and at most data.crop_seconds, {self.crop_seconds}, not "
                f"{self.min_crop_seconds}"
            )
        if self.batch_size < 1:
            raise ConfigurationError(f"data.batch_size must be at least 1, not {self.batch_size}")
        if self.shares and self.balance is None:
            raise ConfigurationError("data.shares are of the values of data.balance; name that label, too")
        if self.evened and self.balance is None:
            raise ConfigurationError("data.evened is of the values of data.balance; name that label, too")
        if few := [name for name, share in self.shares.items() if share < 1]:
            raise ConfigurationError(f"data.shares.{few[0]} must be at least 1, not {self.shares[few[0]]}")

    def paths(self, names: Sequence[str]) -> list[Path]:
        """Folders of `train` or `valid`."""
        return [self.folder / name for name in names]


@dataclass(frozen=True)
class DiTSettings:
    """Size of the transformer: a preset, and what shall differ from it. Latent and text give the other dimensions.

    Attributes:
        size: see `DiTConfig.preset`.
        width, depth, heads, mlp_ratio: see `DiTConfig`; None: as the preset has it.
        long_skips: see `DiTConfig`.
    """

    size: Size = "tiny"
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    mlp_ratio: float | None = None
    long_skips: bool = False

    def config(self, latent_dim: int, text_dim: int) -> DiTConfig:
        """Sizes for latents of width C and text embeddings of width E.

        Raises:
            ConfigurationError: sizes that contradict each other, or a transformer narrower than the latent.
        """
        wanted = {name: getattr(self, name) for name in ("width", "depth", "heads", "mlp_ratio")}
        changes = {name: value for name, value in wanted.items() if value is not None}
        return DiTConfig.preset(self.size, latent_dim, text_dim, long_skips=self.long_skips, **changes)


@dataclass(frozen=True)
class GeneratorTrainingConfig(LoopConfig):
    """A recipe of a generator.

    Attributes:
        kind: says that a recipe is one of these.
        output: run folder.
        init: folder of a generator to start from, of the same sizes and text encoder. Its tokenizer may be another:
            mean and standard deviation of the latents are those of the data. None: fresh weights.
        data: latents, crops, batch size.
        dit: size of the transformer.
        text_encoder: folder or hub name of the frozen text encoder; None: the default one.
        text_cache: folder of text embeddings, each computed once; every process must see it.
        text_dropout: share of clips that are shown without their text, which guidance needs.
        timesteps: distribution of the times that are trained at.
        timestep_mean, timestep_std: of the normal number behind `logit_normal`.
        gradient_checkpointing: less memory for about a third more time.
        validation_clips: held-out clips measured at a validation, spread over the domains.
    """

    kind: Literal["generator"] = "generator"
    output: Path = Path("runs/generator")
    init: str | None = None
    data: LatentDataConfig = field(default_factory=LatentDataConfig)
    dit: DiTSettings = field(default_factory=DiTSettings)
    text_encoder: str | None = None
    text_cache: Path = Path("runs/text")
    text_dropout: float = 0.1
    timesteps: TimestepDistribution = "logit_normal"
    timestep_mean: float = 0.0
    timestep_std: float = 1.0
    gradient_checkpointing: bool = False
    validation_clips: int = 64

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        super().__post_init__()
        if self.seed < 0:
            raise ConfigurationError(f"seed must not be negative, not {self.seed}")
        if not 0 <= self.text_dropout < 1:
            raise ConfigurationError(f"text_dropout must lie in [0, 1), not {self.text_dropout}")
        if not (math.isfinite(self.timestep_mean) and 0 < self.timestep_std < math.inf):
            raise ConfigurationError(
                f"timestep_mean must be finite and timestep_std above 0, not {self.timestep_mean}, {self.timestep_std}"
            )
        if self.validation_clips < 0:
            raise ConfigurationError(f"validation_clips must not be negative, not {self.validation_clips}")
        if self.data.batch_size % self.accumulate:
            raise ConfigurationError(
                f"data.batch_size {self.data.batch_size} must be a multiple of accumulate, {self.accumulate}"
            )


def load_generator_recipe(path: str | Path, overrides: Sequence[str] = ()) -> GeneratorTrainingConfig:
    """Read a recipe of a generator; see `training.configuration.load_recipe`.

    Raises:
        ConfigurationError: no such file, no YAML, an unknown key, a value of a wrong type or out of range.
    """
    return build_config(GeneratorTrainingConfig, read_settings(path, overrides), name=str(path))
