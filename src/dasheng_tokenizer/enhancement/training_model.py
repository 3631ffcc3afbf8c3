"""What the training of an enhancer starts from, and what a checkpoint of it amounts to."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dasheng_tokenizer.enhancement.denoiser import Denoiser, DenoiserConfig, DenoiserInfo
from dasheng_tokenizer.enhancement.training_configuration import EnhancementConfig
from dasheng_tokenizer.enhancement.training_data import Examples
from dasheng_tokenizer.errors import CheckpointError, ConfigurationError
from dasheng_tokenizer.injection import Part
from dasheng_tokenizer.spectral import with_context
from dasheng_tokenizer.tokenizer import DashengTokenizerModel

AVERAGE, MODULE = "average.denoiser.", "module.denoiser."
"""Prefixes of the averaged weights and of the rest in a checkpoint."""

STATISTICS_BATCH = 16
"""Crops embedded at once for the statistics, so that they do not hang on the batch size of the run."""


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
    config: EnhancementConfig, tokenizer: DashengTokenizerModel, examples: Examples | None, hours: float = 0.0
) -> Denoiser:
    """A fresh denoiser for the latents of a run.

    Args:
        config: of the run.
        tokenizer: of the run.
        examples: that the statistics of the latents are taken from; None: those of a checkpoint will replace them.
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
    statistics = tuple(torch.full((width,), value) for value in (0.0, 1.0, 0.0, 1.0))
    if examples is not None:
        statistics = latent_statistics(tokenizer, config.part, examples, config.statistics_crops)
    sizes = DenoiserConfig(latent_dim=width, **asdict(config.denoiser))
    return Denoiser(sizes, info, *statistics)


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


@torch.no_grad()
def latent_statistics(
    tokenizer: DashengTokenizerModel, part: Part, examples: Examples, crops: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics of the latents of clean speech, each (D,): mean and standard deviation of the latent, then of a part.

    Args:
        tokenizer: whose latents.
        part: whose statistics are wanted too; those of `unified` are the latent's.
        examples: their first crops count.
        crops: how many.
    """
    sums = torch.zeros(2, 2, tokenizer.latent_dim, dtype=torch.float64)  # (latent and part, sums of x and x², D)
    count = 0
    for first in range(0, crops, STATISTICS_BATCH):
        places = range(first, min(first + STATISTICS_BATCH, crops))
        clean = torch.from_numpy(np.stack([examples.mixture(place).clean for place in places]))
        clean = clean.to(tokenizer.device)
        latent = embed(tokenizer, clean, "unified")
        for row, held in enumerate((latent, latent if part == "unified" else embed(tokenizer, clean, part))):
            tokens = held.flatten(0, 1).double().cpu()  # (B·T, D)
            sums[row] += torch.stack([tokens.sum(0), tokens.square().sum(0)])
        count += latent.shape[0] * latent.shape[1]
    mean = sums[:, 0] / count  # (2, D)
    std = (sums[:, 1] / count - mean.square()).clamp(min=0.0).sqrt()
    return mean[0].float(), std[0].float(), mean[1].float(), std[1].float()


@torch.no_grad()
def embed(tokenizer: DashengTokenizerModel, audio: Tensor, part: Part) -> Tensor:
    """(B, S) at 16 kHz → (B, T, D) float32: the latent that the decoder takes (`unified`), or one part of it."""
    if part == "unified":
        return tokenizer.encode(audio).float()
    context = with_context(audio, tokenizer.num_tokens(audio.shape[-1]))  # (B, 512 + 640·T + 512)
    held = tokenizer.encode_semantic(context) if part == "semantic" else tokenizer.encode_acoustic(context)
    return held.float()


def averaged_denoiser(config: EnhancementConfig, checkpoint: Path) -> Denoiser:
    """The denoiser that a run would end with if it ended at a checkpoint: its averaged weights, in eval mode.

    Args:
        config: of the run.
        checkpoint: such as `runs/enhancement/checkpoints/step-00002500`.

    Raises:
        CheckpointError: no checkpoint of a run with this recipe, or a damaged one; or the tokenizer cannot be loaded.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    denoiser = new_denoiser(config, load_tokenizer(config), None)
    try:
        progress = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["progress"]
        tensors = load_file(checkpoint / "tensors.safetensors")
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{checkpoint} is no checkpoint, or a damaged one ({error!r}); name another") from error
    held = {name.removeprefix(MODULE): value for name, value in tensors.items() if name.startswith(MODULE)}
    held |= {name.removeprefix(AVERAGE): value for name, value in tensors.items() if name.startswith(AVERAGE)}
    wanted = {name: value.shape for name, value in denoiser.state_dict().items()}
    if {name: value.shape for name, value in held.items()} != wanted:
        raise CheckpointError(f"{checkpoint} is of another recipe; name the recipe and the settings of its run")
    denoiser.load_state_dict(held)
    facts = {"steps": progress["step"], "audio_hours_seen": round(progress["audio_seconds"] / 3600, 4)}
    denoiser.info = replace(denoiser.info, provenance={**denoiser.info.provenance, **facts})
    return denoiser.eval()
