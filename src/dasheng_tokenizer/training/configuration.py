"""Recipes: typed settings of a training run, read from YAML, changed by `key=value` on the command line.

`LoopConfig` holds what every training in this package needs (it is the base of later recipes too); `TrainingConfig`
adds what the tokenizer needs. A key that no setting has is an error that names the nearest one, so that a typing slip
never trains silently with a default. Relative paths in a recipe are taken from the current directory, like those on a
command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from dasheng_tokenizer.configuration import DashengTokenizerConfig
from dasheng_tokenizer.errors import ConfigurationError
from dasheng_tokenizer.training.acoustic_start import AcousticStartConfig
from dasheng_tokenizer.training.data import DataConfig
from dasheng_tokenizer.training.plain_yaml import parse_yaml

Config = TypeVar("Config")
Latent = Literal["unified", "semantic", "acoustic"]


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay.

    Attributes:
        lr: peak learning rate.
        betas: decay of the first and second moment.
        weight_decay: decoupled decay of matrices and kernels; norms, biases and layer scales are never decayed.
        warmup_steps: optimizer steps of linear warm-up from zero.
        final_fraction: learning rate at the last step, as a fraction of `lr`.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.8, 0.99)
    weight_decay: float = 0.01
    warmup_steps: int = 500
    final_fraction: float = 0.01

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        _require(self.lr > 0, f"optimizer.lr must be above 0, not {self.lr}")
        _require(all(0 <= beta < 1 for beta in self.betas), f"optimizer.betas must lie in [0, 1), not {self.betas}")
        _require(self.weight_decay >= 0, f"optimizer.weight_decay must not be negative, not {self.weight_decay}")
        _require(self.warmup_steps >= 0, f"optimizer.warmup_steps must not be negative, not {self.warmup_steps}")
        _require(0 <= self.final_fraction <= 1, f"optimizer.final_fraction is in [0, 1], not {self.final_fraction}")


@dataclass(frozen=True)
class LossWeights:
    """Weights of the terms of the generator's loss; a weight of 0 leaves the term uncomputed.

    The defaults are those a later paper gives for this architecture; the STFT and phase terms are ours and off by
    default.

    Attributes:
        mel: 7-scale mel distance.
        stft: multi-resolution STFT distance.
        phase: distance of the phase's derivatives in time and frequency.
        semantic: semantic preservation, the distance of the acoustic embedding to the semantic one; not for a VAE.
        kl: Kullback-Leibler divergence, for a VAE only; see docs/training.md for where 0.25 comes from.
        adversarial: hinge answer of the discriminators.
        feature_matching: distance of the discriminators' features.
    """

    mel: float = 45.0
    stft: float = 0.0
    phase: float = 0.0
    semantic: float = 45.0
    kl: float = 0.25
    adversarial: float = 1.0
    feature_matching: float = 1.0

    def __post_init__(self) -> None:
        """Refuse negative weights and a loss without a reconstruction term."""
        for name, value in dataclasses.asdict(self).items():
            _require(value >= 0, f"loss_weights.{name} must not be negative, not {value}")
        _require(self.mel + self.stft > 0, "loss_weights.mel and loss_weights.stft are both 0: nothing to reconstruct")


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Which discriminators judge the decoded audio, and how they learn.

    Attributes:
        multi_frequency: use the multi-frequency discriminator (spectra at several resolutions).
        multi_period: use the multi-period discriminator (waveform folded at prime periods).
        multi_frequency_options: arguments of `MultiFrequencyDiscriminator`.
        multi_period_options: arguments of `MultiPeriodDiscriminator`.
        optimizer: its own AdamW; the warm-up counts from `gan_start_step`.
    """

    multi_frequency: bool = True
    multi_period: bool = False
    multi_frequency_options: dict[str, Any] = field(default_factory=dict)
    multi_period_options: dict[str, Any] = field(default_factory=dict)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=2e-4, weight_decay=0.0))


@dataclass(frozen=True)
class LoopConfig:
    """What every training run needs, whatever it trains.

    Attributes:
        output: run folder: checkpoints, `log.jsonl`, TensorBoard events, and `model` when finished.
        seed: of the weights, the crops and everything drawn at random.
        steps: optimizer steps of the whole run.
        optimizer: of the trained model.
        ema_decay: of the exponential moving average of the weights that is validated and kept; 0 keeps the last
            weights.
        clip_grad_norm: largest gradient norm; larger gradients are scaled down to it.
        accumulate: micro-batches that a batch is cut into; the step sees their mean gradient.
        precision: `32-true`, or `bf16-mixed` (weights float32, matrix products bfloat16).
        checkpoint_every: steps between checkpoints.
        keep_checkpoints: newest checkpoints kept.
        validate_every: steps between validations; 0 validates at the end only.
        log_every: steps between log lines.
        accelerator, devices, num_nodes: as in `lightning_fabric.Fabric`.
        strategy: `auto` or `ddp` (or another kind of it that Fabric knows): every process holds the whole model;
            `fsdp`: each holds its share of weights, gradients, optimizer states and averages.
    """

    output: Path = Path("runs/tokenizer")
    seed: int = 0
    steps: int = 100_000
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema_decay: float = 0.999
    clip_grad_norm: float = 1.0
    accumulate: int = 1
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    validate_every: int = 2000
    log_every: int = 50
    accelerator: str = "auto"
    devices: int | str = "auto"
    num_nodes: int = 1
    strategy: str = "auto"

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        for name in ("steps", "accumulate", "checkpoint_every", "keep_checkpoints", "log_every", "num_nodes"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        _require(self.validate_every >= 0, f"validate_every must not be negative, not {self.validate_every}")
        _require(0 <= self.ema_decay < 1, f"ema_decay must lie in [0, 1), not {self.ema_decay}")
        _require(self.clip_grad_norm > 0, f"clip_grad_norm must be above 0, not {self.clip_grad_norm}")
        known = self.strategy in ("auto", "fsdp") or self.strategy.startswith("ddp")
        _require(known, f"strategy must be 'auto', 'fsdp' or a kind of 'ddp', not {self.strategy!r}")


@dataclass(frozen=True)
class TrainingConfig(LoopConfig):
    """A recipe of the tokenizer.

    Attributes:
        kind: says that a recipe is one of these; another kind has other settings.
        model: arguments of `DashengTokenizerConfig`; those of the semantic encoder come from `semantic_weights`.
        init: folder of a tokenizer to start from; its configuration is used and `model` must be empty.
        semantic_weights: folder or safetensors file with the weights of the frozen semantic encoder.
        acoustic_start: how the acoustic layer starts; see `acoustic_start`.
        freeze_acoustic: keep the acoustic layer as it is, so that the latents do not change: only the decoder learns.
        data: shards or folders of audio, crops, batch size.
        loss_weights: weights of the loss terms.
        gan_start_step: first step that trains discriminators; at `steps` or later there are none.
        discriminator: which discriminators, and how they learn.
        latent: what the decoder gets: `unified`, or one part of it for ablations and baselines. A VAE has no parts.
        validation_clips: clips decoded at a validation, spread over the domains.
        validation_samples: of these, clips whose audio and spectrogram go to TensorBoard.
    """

    kind: Literal["tokenizer"] = "tokenizer"
    model: dict[str, Any] = field(default_factory=dict)
    init: Path | None = None
    semantic_weights: Path | None = None
    acoustic_start: AcousticStartConfig = field(default_factory=AcousticStartConfig)
    freeze_acoustic: bool = False
    data: DataConfig = field(default_factory=DataConfig)
    loss_weights: LossWeights = field(default_factory=LossWeights)
    gan_start_step: int = 0
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    latent: Latent = "unified"
    validation_clips: int = 32
    validation_samples: int = 4

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other."""
        super().__post_init__()
        _require(self.gan_start_step >= 0, f"gan_start_step must not be negative, not {self.gan_start_step}")
        _require(not (self.init and self.model), "`init` brings its own configuration: drop `model` or `init`")
        _require(not (self.init and self.semantic_weights), "`init` brings its own encoder: drop `semantic_weights`")
        started = self.acoustic_start.kind != "random"
        _require(not (self.init and started), "`init` brings its own acoustic layer: drop `acoustic_start` or `init`")
        if self.model.get("latent_kind") == "vae":
            frozen = started or self.freeze_acoustic
            _require(not frozen, "a VAE has no acoustic layer: drop `acoustic_start` and `freeze_acoustic`")
            some = self.semantic_weights is not None
            _require(not some, "a VAE (model.latent_kind) has no semantic encoder: drop `semantic_weights`")
            _require(self.latent == "unified", "a VAE (model.latent_kind) has no parts to decode: drop `latent`")
        if self.uses_gan:
            some = self.discriminator.multi_frequency or self.discriminator.multi_period
            _require(some, "the GAN needs discriminator.multi_frequency or multi_period, but both are off")

    @property
    def uses_gan(self) -> bool:
        """Whether any step of this run trains discriminators."""
        weights = self.loss_weights
        return self.gan_start_step < self.steps and weights.adversarial + weights.feature_matching > 0


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> TrainingConfig:
    """Read a recipe of the tokenizer.

    Args:
        path: YAML file.
        overrides: `key=value` each, keys dotted (`data.batch_size=8`), values in YAML (`optimizer.betas=[0.9, 0.95]`).

    Raises:
        ConfigurationError: no such file, no YAML, an unknown key, a value of a wrong type or out of range.
    """
    config = build_config(TrainingConfig, read_settings(path, overrides), name=str(path))
    # `DashengTokenizerConfig` keeps unknown arguments, as all configurations of transformers do; a recipe must not.
    known = [key for key in inspect.signature(DashengTokenizerConfig).parameters if key != "kwargs"]
    check_keys(config.model, known, "model.", str(path))
    return config


def read_settings(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML mapping and apply `key=value` overrides.

    Raises:
        ConfigurationError: no such file, no YAML mapping, or an override that is no `key=value`.
    """
    try:
        settings = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot read the recipe ({error.strerror}); name a YAML file") from error
    except ValueError as error:  # UnicodeDecodeError is one too
        raise ConfigurationError(f"{path}: not a YAML file: {error}") from error
    settings = {} if settings is None else settings
    if not isinstance(settings, dict):
        raise ConfigurationError(f"{path}: a recipe is a mapping of settings, not a {type(settings).__name__}")
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not all(key.split(".")):
            raise ConfigurationError(f"{override!r}: write overrides as key=value, for example data.batch_size=8")
        try:
            value = parse_yaml(text)
        except ValueError as error:
            raise ConfigurationError(f"{override!r}: the value is not valid YAML: {error}") from error
        _assign(settings, key.split("."), value, override)
    return settings


def build_config(kind: type[Config], settings: Mapping[str, Any], name: str = "recipe") -> Config:
    """Make a settings dataclass from a mapping, nested ones included.

    Args:
        kind: the dataclass.
        settings: its fields.
        name: where the settings come from, for error messages.

    Raises:
        ConfigurationError: an unknown key (the nearest known one is named), a value of a wrong type or out of range.
    """
    return typing.cast(Config, _build(kind, settings, name, ""))


def to_plain(value: Any) -> Any:
    """Turn a settings dataclass into the mappings, lists and scalars that YAML and JSON hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: to_plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def check_keys(settings: Mapping[str, Any], known: Sequence[str], prefix: str, name: str = "recipe") -> None:
    """Raise a ConfigurationError that names the nearest known key for the first key that is unknown."""
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.4)
            hint = f"did you mean {prefix + near[0]!r}?" if near else f"known are: {', '.join(sorted(known))}"
            raise ConfigurationError(f"{name}: unknown key {prefix + str(key)!r}; {hint}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigurationError(message)


def _assign(settings: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        if settings.get(key) is None:
            settings[key] = {}
        settings = settings[key]
        if not isinstance(settings, dict):
            raise ConfigurationError(f"{override!r}: {key!r} holds a value, not a group of settings")
    settings[keys[-1]] = value


def _build(kind: type, settings: Any, name: str, prefix: str) -> Any:
    if settings is None:
        settings = {}
    if not isinstance(settings, Mapping):
        raise ConfigurationError(f"{name}: {prefix.rstrip('.')!r} is a group of settings, not {settings!r}")
    hints = typing.get_type_hints(kind)
    known = [item.name for item in dataclasses.fields(kind)]
    check_keys(settings, known, prefix, name)
    values = {key: _convert(hints[key], value, name, prefix + key) for key, value in settings.items()}
    try:
        return kind(**values)
    except ConfigurationError as error:
        raise ConfigurationError(f"{name}: {error}") from error


def _convert(hint: Any, value: Any, name: str, key: str) -> Any:
    """Check a value against a type hint; widen int to float, list to tuple, str to Path."""
    wrong = ConfigurationError(f"{name}: {key!r} must be {getattr(hint, '__name__', hint)}, not {value!r}")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, name, key + ".")
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, name, key, wrong)
    if origin is Literal:
        if value not in arguments:
            raise ConfigurationError(f"{name}: {key!r} must be one of {', '.join(map(repr, arguments))}, not {value!r}")
        return value
    if origin in (list, tuple):
        return _convert_sequence(origin, arguments, value, name, key, wrong)
    if origin is dict or hint is dict:
        if not isinstance(value, Mapping):
            raise wrong
        item = arguments[1] if arguments else Any
        return {str(part): _convert(item, held, name, f"{key}.{part}") for part, held in value.items()}
    return _convert_scalar(hint, value, wrong)


def _convert_union(arguments: tuple[Any, ...], value: Any, name: str, key: str, wrong: ConfigurationError) -> Any:
    if value is None and type(None) in arguments:
        return None
    for argument in arguments:
        if argument is not type(None):
            try:
                return _convert(argument, value, name, key)
            except ConfigurationError as error:
                # An error deeper inside a nested group says more than "none of these kinds".
                wrong = error
    raise wrong


def _convert_sequence(
    origin: Any, arguments: tuple[Any, ...], value: Any, name: str, key: str, wrong: ConfigurationError
) -> Any:
    if not isinstance(value, (list, tuple)):
        raise wrong
    if origin is tuple and not (len(arguments) == 2 and arguments[1] is Ellipsis):
        if len(value) != len(arguments):
            raise wrong
        return tuple(
            _convert(argument, item, name, f"{key}[{i}]")
            for i, (argument, item) in enumerate(zip(arguments, value, strict=True))
        )
    return origin(_convert(arguments[0], item, name, f"{key}[{i}]") for i, item in enumerate(value))


def _convert_scalar(hint: Any, value: Any, wrong: ConfigurationError) -> Any:
    if hint is Path and isinstance(value, (str, Path)):
        return Path(value)
    if hint is float and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads `1e-3` (no point) as text.
        except (TypeError, ValueError):
            raise wrong from None
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise wrong
