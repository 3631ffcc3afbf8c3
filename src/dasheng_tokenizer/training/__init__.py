"""Training of the tokenizer: recipes, data, losses, discriminators, and the loop that other trainings share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dasheng_tokenizer.errors import ConfigurationError

if TYPE_CHECKING:
    from dasheng_tokenizer.enhancement.training_configuration import EnhancementConfig
    from dasheng_tokenizer.generation.training_configuration import GeneratorTrainingConfig
    from dasheng_tokenizer.tokenizer import DashengTokenizerModel
    from dasheng_tokenizer.training.configuration import TrainingConfig

__all__ = ["build_model", "load_any_recipe", "train"]


def train(recipe: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Train what a recipe is for (tokenizer, generator, enhancer), or go on with a training that was interrupted.

    Started again on the same `output` folder, a run resumes from its newest checkpoint; a finished one says so and does
    nothing. SIGTERM and Ctrl-C write a checkpoint and return. Under `torchrun` all processes call this alike.

    Args:
        recipe: YAML file; for its keys see `training.configuration.TrainingConfig`, with `kind: generator`
            `generation.training_configuration.GeneratorTrainingConfig`, with `kind: enhancement`
            `enhancement.training_configuration.EnhancementConfig`.
        overrides: `key=value` each, keys dotted, for example `data.batch_size=8`.

    Returns:
        The run folder. A finished run has its `save_pretrained` folder `model` and `summary.json` in it.

    Raises:
        ConfigurationError: an unknown key, settings that contradict each other, or a run folder of another run.
        DataError: no usable audio or latents.
        ModelMismatchError: latents of different models.
        CheckpointError: weights or a checkpoint that cannot be read.
        OutputError: the run folder cannot be written.
        MissingExtraError: the extra `train` is not installed, or for a generator `generate`, for an enhancer `enhance`.
    """
    from dasheng_tokenizer.generation.training_configuration import GeneratorTrainingConfig
    from dasheng_tokenizer.training.configuration import TrainingConfig

    config = load_any_recipe(recipe, overrides)
    if isinstance(config, TrainingConfig):
        return _train_tokenizer(config)
    if isinstance(config, GeneratorTrainingConfig):
        from dasheng_tokenizer.generation.training import train_generator

        return train_generator(config)
    from dasheng_tokenizer.enhancement.training import train_enhancer

    return train_enhancer(config)


def load_any_recipe(
    recipe: str | Path, overrides: Sequence[str] = ()
) -> TrainingConfig | GeneratorTrainingConfig | EnhancementConfig:
    """Read a recipe; its key `kind` says of what, without it of a tokenizer.

    Raises:
        ConfigurationError: an unknown kind, and what `training.configuration.load_recipe` raises.
    """
    from dasheng_tokenizer.enhancement.training_configuration import load_enhancement_recipe
    from dasheng_tokenizer.generation.training_configuration import load_generator_recipe
    from dasheng_tokenizer.training.configuration import load_recipe, read_settings

    kind = read_settings(recipe, overrides).get("kind", "tokenizer")
    if kind == "tokenizer":
        return load_recipe(recipe, overrides)
    if kind == "generator":
        return load_generator_recipe(recipe, overrides)
    if kind == "enhancement":
        return load_enhancement_recipe(recipe, overrides)
    raise ConfigurationError(
        f"{recipe}: kind is 'tokenizer' (without this key too), 'generator' or 'enhancement', not {kind!r}"
    )


def _train_tokenizer(config: TrainingConfig) -> Path:
    from dasheng_tokenizer.training.acoustic_start import start_acoustic_layer
    from dasheng_tokenizer.training.feature_statistics import set_feature_statistics
    from dasheng_tokenizer.training.loop import fit, is_finished, is_started, make_fabric, seed_everything
    from dasheng_tokenizer.training.run_checkpoint import keep_in_checkpoints
    from dasheng_tokenizer.training.tokenizer_state import open_data
    from dasheng_tokenizer.training.tokenizer_task import TokenizerTask

    fabric = make_fabric(config)
    if is_finished(config):
        fabric.print(f"{config.output} is finished; the model: {config.output / 'model'}. More steps would go on.")
        return config.output
    seed_everything(config.seed)  # Alike on every rank: the same fresh weights.
    model = build_model(config)
    data = open_data(fabric, config, model)
    # A model of `init` keeps its statistics, and a resumed run finds them in its checkpoint.
    if model.config.normalize_semantic and config.init is None and not is_started(config):
        set_feature_statistics(fabric, model, data)
    if config.acoustic_start.kind == "water_filling" and not is_started(config):
        start_acoustic_layer(fabric, model, data, config.acoustic_start)
    if config.freeze_acoustic:
        model.freeze_acoustic_layer()
        for layer in (model.injection.patch_embed, model.injection.norm):
            keep_in_checkpoints(layer)
    task = TokenizerTask(fabric, config, model, data)
    seed_everything(config.seed, fabric.global_rank + 1)
    fit(fabric, task, config)
    return config.output


def build_model(config: TrainingConfig) -> DashengTokenizerModel:
    """Build the model that a recipe starts from: `init`, or fresh weights on the frozen encoder of `semantic_weights`.

    A VAE has all its weights fresh.

    Raises:
        CheckpointError: weights that are missing or do not fit.
        ConfigurationError: settings that `DashengTokenizerConfig` refuses.
    """
    from dasheng_tokenizer.checkpoints import new_tokenizer
    from dasheng_tokenizer.configuration import DashengTokenizerConfig
    from dasheng_tokenizer.tokenizer import DashengTokenizerModel

    if config.init is not None:
        return DashengTokenizerModel.from_pretrained(config.init)
    if config.semantic_weights is not None:
        model: DashengTokenizerModel = new_tokenizer(config.semantic_weights, **config.model)
        return model
    return DashengTokenizerModel(DashengTokenizerConfig(**config.model))
