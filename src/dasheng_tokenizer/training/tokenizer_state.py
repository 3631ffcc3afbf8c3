"""What a training of the tokenizer holds: generator, discriminators, optimizers, moving average, and its data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from dasheng_tokenizer.errors import ConfigurationError
from dasheng_tokenizer.tokenizer import DashengTokenizerModel
from dasheng_tokenizer.training.configuration import DiscriminatorConfig, Latent, TrainingConfig
from dasheng_tokenizer.training.data import Batch
from dasheng_tokenizer.training.discriminators import MultiFrequencyDiscriminator, MultiPeriodDiscriminator
from dasheng_tokenizer.training.losses import DiscriminatorOutput
from dasheng_tokenizer.training.optimization import ExponentialMovingAverage, make_adamw
from dasheng_tokenizer.vae import Posterior, VAEEncoder

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class Generated(NamedTuple):
    """What the generator makes of a batch.

    Attributes:
        audio: (B, 640·N) decoded.
        acoustic: (B, N, D); None in a VAE.
        semantic: (B, N, D); None in a VAE.
        posterior: of (B, N, C) latents, of a VAE only.
    """

    audio: Tensor
    acoustic: Tensor | None = None
    semantic: Tensor | None = None
    posterior: Posterior | None = None


class Crops(Protocol):
    """Where batches come from: `CachedCrops`, `StreamedCrops`, or anything that gives them."""

    def batches(self, start_step: int, steps: int) -> Iterator[Batch]:
        """This rank's batches of `steps` steps from `start_step` on."""
        ...


class Generator(nn.Module):
    """Encode and decode as one forward, so that DDP sees the whole of it."""

    def __init__(self, model: DashengTokenizerModel, latent: Latent) -> None:
        """Wrap a model; `latent` says which embedding the decoder gets."""
        super().__init__()
        self.model = model
        self.latent = latent

    def forward(self, audio: Tensor, features: Tensor | None) -> Generated:
        """Context audio (B, 512 + 640·N + 512), cached features of the frozen encoder (B, N, D) or None.

        A VAE decodes a draw from its posterior, in eval mode the mean.
        """
        # Not `model.decode`: it refuses NaN, where training skips the step.
        if isinstance(self.model.encoder, VAEEncoder):
            posterior: Posterior = self.model.encoder(audio)
            drawn = posterior.sample() if self.training else posterior.mean  # (B, N, C)
            return Generated(self.model._decode(drawn), posterior=posterior)
        if features is None:
            features = self.model.encode_features(audio)  # (B, N, D)
        semantic = self.model.injection.semantic_norm(features)  # (B, N, D)
        acoustic = self.model.encode_acoustic(audio)  # (B, N, D)
        latent = select_latent(self.latent, semantic, acoustic)  # (B, N, D)
        return Generated(self.model._decode(latent), acoustic, semantic)


class Discriminators(nn.Module):
    """All discriminators of a recipe as one module."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        """Build those that the recipe names."""
        super().__init__()
        self.members = nn.ModuleList()
        if config.multi_frequency:
            self.members.append(MultiFrequencyDiscriminator(**config.multi_frequency_options))
        if config.multi_period:
            self.members.append(MultiPeriodDiscriminator(**config.multi_period_options))

    def forward(self, audio: Tensor) -> list[DiscriminatorOutput]:
        """(B, S) samples → one output for each part of each discriminator."""
        return [output for member in self.members for output in member(audio)]


@dataclass
class TrainingState:
    """What a step changes. `generator` and `discriminators` are as Fabric wrapped them; discriminators may be None."""

    model: DashengTokenizerModel
    generator: nn.Module
    generator_optimizer: torch.optim.Optimizer
    average: ExponentialMovingAverage
    discriminators: nn.Module | None = None
    discriminator_optimizer: torch.optim.Optimizer | None = None


def remove_injection(model: DashengTokenizerModel) -> None:
    """Make the acoustic embedding 0 for good, so that unified = semantic, in the saved model too."""
    with torch.no_grad():
        for parameter in model.injection.norm.parameters():
            parameter.zero_()
    for module in (model.injection.patch_embed, model.injection.norm):
        module.requires_grad_(False)


def make_state(fabric: Fabric, config: TrainingConfig, model: DashengTokenizerModel) -> TrainingState:
    """Move a model to the devices of the run; build optimizers, moving average and discriminators.

    Raises:
        ConfigurationError: a part of the embedding is to be decoded that the model does not have.
    """
    if model.config.is_vae and config.latent != "unified":
        raise ConfigurationError(f"the model of `init` is a VAE, which has no {config.latent} part: drop `latent`")
    if config.latent == "semantic":
        remove_injection(model)
    model.train()
    generator = fabric.setup_module(Generator(model, config.latent))
    wrapped = fabric.setup_optimizers(make_adamw(model.named_parameters(), config.optimizer))
    optimizer = cast(torch.optim.Optimizer, wrapped)
    average = ExponentialMovingAverage(model.named_parameters(), config.ema_decay)
    state = TrainingState(model, generator, optimizer, average)
    if config.uses_gan:
        discriminators = Discriminators(config.discriminator)
        kind = config.discriminator.optimizer
        state.discriminators = fabric.setup_module(discriminators)
        wrapped = fabric.setup_optimizers(make_adamw(discriminators.named_parameters(), kind))
        state.discriminator_optimizer = cast(torch.optim.Optimizer, wrapped)
    return state


def open_data(fabric: Fabric, config: TrainingConfig, model: DashengTokenizerModel) -> Crops:
    """Open the data of a recipe; with `data.cache`, embed all clips first, as far as that was not done before.

    For a VAE, which has no frozen features, the cache holds decoded audio alone.

    Raises:
        DataError: no usable audio, or a cache of another model.
        OutputError: the cache cannot be written.
    """
    from dasheng_tokenizer.training.data import CachedCrops, prepare_cache
    from dasheng_tokenizer.training.streaming import StreamedCrops

    rank, world_size = fabric.global_rank, fabric.world_size
    if config.data.cache is None:
        return StreamedCrops(config.data, config.seed, rank, world_size)
    model.to(device=fabric.device)  # type: ignore[call-arg, arg-type]
    embedding = None if model.config.is_vae else model
    cache = prepare_cache(embedding, config.data, progress=rank == 0, rank=rank, world_size=world_size)
    return CachedCrops(cache, config.data, config.seed, rank, world_size)


def select_latent(latent: Latent, semantic: Tensor, acoustic: Tensor) -> Tensor:
    """What the decoder gets, (B, N, D): the unified embedding, or one part of it for an ablation."""
    return {"unified": semantic + acoustic, "semantic": semantic, "acoustic": acoustic}[latent]


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that Fabric wrapped."""
    inner: nn.Module = module.module  # type: ignore[assignment]
    return inner
