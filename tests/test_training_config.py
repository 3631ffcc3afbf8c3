"""Recipes: what they refuse, what they mean, and that the shipped ones hold together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from dasheng_tokenizer import DashengTokenizerConfig, DashengTokenizerModel
from dasheng_tokenizer.errors import ConfigurationError
from dasheng_tokenizer.training.configuration import TrainingConfig, build_config, load_recipe, to_plain
from dasheng_tokenizer.training.tokenizer_state import Discriminators

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(("name", "uses_gan"), [("default.yaml", False), ("vae.yaml", False), ("published.yaml", True)])
def test_shipped_recipes_parse_and_survive_a_round_trip(name: str, uses_gan: bool) -> None:
    config = load_recipe(RECIPES / name)
    again = build_config(TrainingConfig, yaml.safe_load(yaml.safe_dump(to_plain(config))))
    assert again == config
    assert config.uses_gan is uses_gan


def test_published_recipe_is_the_published_architecture() -> None:
    config = load_recipe(RECIPES / "published.yaml")
    with torch.device("meta"):
        model = DashengTokenizerModel(DashengTokenizerConfig(**config.model))
        discriminators = Discriminators(config.discriminator)
    # Totals of tests/fixtures/published-layout/KEYS.md.
    assert sum(parameter.numel() for parameter in model.parameters()) == 804_920_450
    assert sum(parameter.numel() for _, parameter in model.trainable_parameters()) == 804_920_450 - 630_333_568
    assert sum(parameter.numel() for parameter in discriminators.parameters()) > 1_000_000


def test_overrides_reach_nested_settings(tmp_path: Path) -> None:
    path = write(tmp_path, "steps: 5\n")
    overrides = ["data.batch_size=3", "optimizer.lr=1e-4", "optimizer.betas=[0.5, 0.9]", "output=runs/x"]
    config = load_recipe(path, [*overrides, "model.depth=4", "model.log_mel_floor=3e-3"])
    assert (config.steps, config.data.batch_size, config.optimizer.lr) == (5, 3, 1e-4)
    assert config.optimizer.betas == (0.5, 0.9)
    assert config.output == Path("runs/x")
    assert config.model == {"depth": 4, "log_mel_floor": 0.003}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step: 5", "'steps'"),
        ("data: {batchsize: 5}", "'data.batch_size'"),
        ("optimizer: {learning_rte: 1}", "unknown key 'optimizer.learning_rte'"),
        ("model: {decoder_dpth: 5}", "'model.decoder_depth'"),
        ("steps: many", "'steps' must be int"),
        ("steps: true", "'steps' must be int"),
        ("steps: 0", "at least 1"),
        ("optimizer: {lr: -1}", "above 0"),
        ("optimizer: {betas: [0.5]}", "'optimizer.betas'"),
        ("precision: fp8", "'32-true', 'bf16-mixed'"),
        ("latent: both", "'unified'"),
        ("strategy: zero", "ddp"),
        ("loss_weights: {mel: 0}", "nothing to reconstruct"),
        ("discriminator: {multi_frequency: false}", "both are off"),
        ("init: a\nsemantic_weights: b", "drop `semantic_weights`"),
        ("optimizer: 3", "group of settings"),
        ("- a", "mapping"),
        ("a: [", "not a YAML file"),
    ],
)
def test_wrong_recipes_are_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigurationError) as error:
        load_recipe(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("override", ["steps", "=5", "steps.x=1", ".=1", "steps=[", "stepz=3"])
def test_wrong_overrides_are_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigurationError):
        load_recipe(write(tmp_path, "steps: 5"), [override])


def test_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="nowhere.yaml"):
        load_recipe(tmp_path / "nowhere.yaml")
