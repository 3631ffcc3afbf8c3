"""What the training of an enhancer starts from, and what a checkpoint of it amounts to."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import torch

from dasheng_tokenizer.enhancement.denoiser import Denoiser, DenoiserConfig, DenoiserInfo
from dasheng_tokenizer.enhancement.latent_space import LatentStatistics, whitening
from dasheng_tokenizer.enhancement.training_configuration import EnhancementConfig
from dasheng_tokenizer.errors import CheckpointError, ConfigurationError
from dasheng_tokenizer.files import parse_json
from dasheng_tokenizer.tokenizer import DashengTokenizerModel
from dasheng_tokenizer.training.checkpoint_tensors import open_tensors

AVERAGE, MODULE = "average.denoiser.", "module.denoiser."
"""Prefixes of the averaged weights and of the rest in a checkpoint."""


def load_tokenizer(config: EnhancementConfig, device: torch.device | str = "cpu") -> DashengTokenizerModel:
    """The frozen tokenizer of a recipe, in eval mode.

    Raises:
        CheckpointError: it cannot be loaded.
        ConfigurationError: a part is wanted of a VAE, which has none.
    """
    tokenizer: DashengTokenizerModel = DashengTokenizerModel.from_pretrained(config.tokenizer)
    if tokenizer.config.is_vae and config.part != "unified":
        raise ConfigurationError(f"the tokenizer is a VAE, which has no {config.part} part: drop `part`")
    tokenizer.requires_grad_(False)
    return tokenizer.eval().to(device=device)  # type: ignore[call-arg, arg-type]


def new_denoiser(
    config: EnhancementConfig,
    tokenizer: DashengTokenizerModel,
    statistics: LatentStatistics | None,
    hours: float = 0.0,
) -> Denoiser:
    """A fresh denoiser for the latents of a run.

    Args:
        config: of the run.
        tokenizer: of the run.
        statistics: of the latents; None: those of a checkpoint will replace them.
        hours: of clean speech, for the record.

    Raises:
        ConfigurationError: sizes that contradict each other.
    """
    width = tokenizer.latent_dim
    info = DenoiserInfo(
        tokenizer_hash=tokenizer.weights_hash(),
        tokenizer=config.tokenizer,
        part=config.part,
        frame_rate=tokenizer.frame_rate,
        window_seconds=config.data.crop_samples / tokenizer.sampling_rate,
        provenance={"hours": round(hours, 4)},
    )
    sizes = DenoiserConfig(latent_dim=width, **asdict(config.denoiser))
    if statistics is None:
        return Denoiser(sizes, info, *(torch.full((width,), value) for value in (0.0, 1.0, 0.0, 1.0)))
    held = statistics
    denoiser = Denoiser(sizes, info, held.mean, held.std, held.input_mean, held.input_std)
    if config.whitening > 0 and sizes.block_width == width:
        # The first layer starts as a whitening: at random, it would show the blocks hardly more than loud directions.
        with torch.no_grad():
            denoiser.project_in.weight.copy_(whitening(held.input_correlation, config.whitening))
    return denoiser


def load_init(denoiser: Denoiser, folder: str) -> None:
    """Take weights and statistics of another denoiser.

    Raises:
        CheckpointError: it cannot be loaded.
        ConfigurationError: it is of another tokenizer, part or size.
    """
    other = Denoiser.from_pretrained(folder)
    wanted, found = (
        {"tokenizer": one.info.tokenizer_hash, "part": one.info.part, "sizes": one.config} for one in (denoiser, other)
    )
    if differing := [name for name, value in wanted.items() if found[name] != value]:
        raise ConfigurationError(f"init: {folder} has another {' and '.join(differing)}; name a denoiser like this one")
    denoiser.load_state_dict(other.state_dict())


def averaged_denoiser(config: EnhancementConfig, checkpoint: Path) -> Denoiser:
    """The denoiser that a run would end with if it ended at a checkpoint: its averaged weights, in eval mode.

    Args:
        config: of the run.
        checkpoint: such as `runs/enhancement/checkpoints/step-00002500`.

    Raises:
        CheckpointError: no checkpoint of a run with this recipe, or a damaged one; or the tokenizer cannot be loaded.
    """
    from safetensors import SafetensorError

    denoiser = new_denoiser(config, load_tokenizer(config), None)
    try:
        state = parse_json((checkpoint / "state.json").read_text(encoding="utf-8"), finite=False)
        tensors = open_tensors(checkpoint, state)
        held = {**tensors.state(MODULE), **tensors.state(AVERAGE)}
        progress = state["progress"]
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{checkpoint} is no checkpoint, or a damaged one ({error!r}); name another") from error
    wanted = {name: value.shape for name, value in denoiser.state_dict().items()}
    if {name: value.shape for name, value in held.items()} != wanted:
        raise CheckpointError(f"{checkpoint} is of another recipe; name the recipe and the settings of its run")
    denoiser.load_state_dict(held)
    facts = {"steps": progress["step"], "audio_hours_seen": round(progress["audio_seconds"] / 3600, 4)}
    denoiser.info = replace(denoiser.info, provenance={**denoiser.info.provenance, **facts})
    return denoiser.eval()
