"""Training of the tokenizer: what one step does, in the order of the paper's objective.

A step decodes the unified embedding of a batch of crops, lets the discriminators learn to tell it from the original
(once the GAN has started), and then moves the acoustic layer, the upsampler and the decoder. The semantic encoder
never moves. A VAE, which has none, goes the same way with all of its encoder.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from dasheng_tokenizer.files import output_error
from dasheng_tokenizer.tokenizer import DashengTokenizerModel
from dasheng_tokenizer.training.configuration import TrainingConfig, to_plain
from dasheng_tokenizer.training.data import Batch
from dasheng_tokenizer.training.loop import StepResult
from dasheng_tokenizer.training.losses import (
    DiscriminatorOutput,
    MultiResolutionSTFTLoss,
    MultiScaleMelLoss,
    PhaseDerivativeLoss,
    SpectraPair,
    discriminator_loss,
    feature_matching_loss,
    generator_adversarial_loss,
    semantic_preservation_loss,
)
from dasheng_tokenizer.training.optimization import guarded_step, learning_rate, set_learning_rate
from dasheng_tokenizer.training.run_log import RunLog
from dasheng_tokenizer.training.sharding import is_sharded, whole_state
from dasheng_tokenizer.training.tokenizer_state import Crops, Generated, make_state, unwrapped

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.wrappers import _FabricModule

MODEL_IDENTITY = (
    "semantic_encoder",
    "embed_dim",
    "depth",
    "num_heads",
    "decoder_embed_dim",
    "decoder_depth",
    "decoder_intermediate_size",
    "istft_n_fft",
    "istft_hop",
    "n_mels_patch",
    "normalize_semantic",
)
"""Fields of the model's configuration that give its weights their shapes."""

VAE_IDENTITY = ("latent_kind", "vae_dim", "vae_depth")
"""More of them, in a VAE. Checkpoints of other models do not name them."""


class TokenizerTask:
    """The tokenizer as a `loop.Task`."""

    def __init__(self, fabric: Fabric, config: TrainingConfig, model: DashengTokenizerModel, data: Crops) -> None:
        """Set a model up for training.

        Args:
            fabric: launched.
            config: the recipe.
            model: with the weights to start from, the same on every rank.
            data: where batches come from.
        """
        self.fabric, self.config, self.data = fabric, config, data
        self.state = make_state(fabric, config, model)
        self.mel = MultiScaleMelLoss().to(fabric.device)
        self.stft = MultiResolutionSTFTLoss().to(fabric.device)
        self.phase = PhaseDerivativeLoss()
        self.modules: dict[str, nn.Module] = {"tokenizer": model}
        self.optimizers = {"tokenizer": self.state.generator_optimizer}
        self.averages = {"tokenizer": self.state.average}
        if self.state.discriminators is not None and self.state.discriminator_optimizer is not None:
            self.modules["discriminators"] = unwrapped(self.state.discriminators)
            self.optimizers["discriminators"] = self.state.discriminator_optimizer

    def identity(self) -> dict[str, Any]:
        """Settings that a resumed run must share: shapes of weights, and how crops are drawn. Data may move."""
        config = self.config
        model = self.state.model.config.to_dict()
        fields = MODEL_IDENTITY + (VAE_IDENTITY if self.state.model.config.is_vae else ())
        drawn = ("crop_seconds", "batch_size", "gain_db", "views", "seed", "streams")
        plain = to_plain(config.data)
        return {
            **{f"model.{name}": model[name] for name in fields},
            **{f"data.{name}": plain[name] for name in drawn},
            "seed": config.seed,
            "latent": config.latent,
        }

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """This rank's batches of the steps to do."""
        return iter(self.data.batches(first_step, last_step - first_step))

    def audio_seconds(self, batch: Batch) -> float:
        """Seconds of target audio in a batch."""
        return batch.target.numel() / self.state.model.sampling_rate

    def training_step(self, batch: Batch, step: int) -> StepResult:
        """Discriminators first, then the generator, on the same decoded audio."""
        parts = split_batch(batch.to(self.fabric.device, non_blocking=True), self.config.accumulate)
        adversarial = self.state.discriminators is not None and step >= self.config.gan_start_step
        # A batch in one part is decoded once for both; in several, keeping all graphs would undo what splitting saves.
        generated = self._generate(parts[0]) if len(parts) == 1 else None
        losses: dict[str, Tensor] = {}
        applied = True
        if adversarial:
            result = self.discriminator_step(parts, generated, step)
            losses, applied = result.losses, result.applied
        result = self.generator_step(parts, generated, step, adversarial)
        return StepResult({**losses, **result.losses}, applied and result.applied)

    def discriminator_step(self, parts: Sequence[Batch], generated: Generated | None, step: int) -> StepResult:
        """Teach the discriminators to tell original from decoded audio.

        Args:
            parts: the batch, cut for gradient accumulation.
            generated: what the generator gave for the only part, or None to decode here.
            step: from 0.
        """
        state, config = self.state, self.config
        assert state.discriminators is not None and state.discriminator_optimizer is not None
        optimizer = state.discriminator_optimizer
        start = config.gan_start_step
        set_learning_rate(optimizer, learning_rate(config.discriminator.optimizer, step - start, config.steps - start))
        total = torch.zeros((), device=self.fabric.device)
        for index, part in enumerate(parts):
            with torch.no_grad():
                audio = (generated or self._generate(part)).audio.detach()
            with self._accumulating(state.discriminators, index, parts):
                # One pass over both halves: DDP allows one forward for each backward.
                outputs = state.discriminators(torch.cat([part.target, audio]))
                loss = discriminator_loss(*split_outputs(outputs, len(audio))) / len(parts)
                self.fabric.backward(loss)
            total += loss.detach()
        norm, applied = guarded_step(self.fabric, optimizer, total, config.clip_grad_norm)
        return StepResult({"discriminator": total, "discriminator_grad_norm": norm}, applied)

    def generator_step(
        self, parts: Sequence[Batch], generated: Generated | None, step: int, adversarial: bool
    ) -> StepResult:
        """Move the acoustic layer, the upsampler and the decoder, and their moving average.

        Args:
            parts: the batch, cut for gradient accumulation.
            generated: what the generator gave for the only part, with its graph, or None to decode here.
            step: from 0.
            adversarial: whether the GAN has started.
        """
        state, config = self.state, self.config
        set_learning_rate(state.generator_optimizer, learning_rate(config.optimizer, step, config.steps))
        sums: dict[str, Tensor] = {}
        for index, part in enumerate(parts):
            with self._accumulating(state.generator, index, parts):
                losses = self.generator_losses(part, generated or self._generate(part), adversarial)
                self.fabric.backward(losses["loss"] / len(parts))
            for name, value in losses.items():
                value = value.detach() / len(parts)
                sums[name] = sums[name] + value if name in sums else value
        if adversarial and state.discriminator_optimizer is not None:
            state.discriminator_optimizer.zero_grad(set_to_none=True)  # see `_judge`
        norm, applied = guarded_step(self.fabric, state.generator_optimizer, sums["loss"], config.clip_grad_norm)
        if applied:
            state.average.update()
        return StepResult({**sums, "grad_norm": norm}, applied)

    def generator_losses(self, part: Batch, generated: Generated, adversarial: bool) -> dict[str, Tensor]:
        """Terms of the objective, unweighted, and their weighted sum as `loss`."""
        weights = self.config.loss_weights
        audio = generated.audio
        spectra = SpectraPair(audio, part.target)  # shared by both spectral losses
        losses: dict[str, Tensor] = {}
        if weights.mel:
            losses["mel"] = self.mel.from_spectra(spectra)
        if weights.stft:
            losses["stft"] = self.stft.from_spectra(spectra)
        if weights.phase:
            losses["phase"] = self.phase(audio, part.target)
        acoustic, semantic = generated.acoustic, generated.semantic
        if weights.semantic and self.config.latent != "semantic" and acoustic is not None and semantic is not None:
            losses["semantic"] = semantic_preservation_loss(acoustic, semantic)
        if weights.kl and generated.posterior is not None:
            losses["kl"] = generated.posterior.kl().mean()
        if adversarial:
            real, fake = self._judge(part.target, audio)
            if weights.adversarial:
                losses["adversarial"] = generator_adversarial_loss(fake)
            if weights.feature_matching:
                losses["feature_matching"] = feature_matching_loss(real, fake)
        total = torch.stack([getattr(weights, name) * value for name, value in losses.items()]).sum()
        return {**losses, "loss": total}

    def validate(self, step: int, log: RunLog) -> dict[str, float]:
        """Decode held-out clips with the averaged weights; see `training.validation`."""
        from dasheng_tokenizer.training.validation import validate

        with self.state.average.applied():
            return validate(self.fabric, unwrapped(self.state.generator), self.config, step, log)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the averaged weights as a `save_pretrained` folder, `output/model`.

        Raises:
            OutputError: the folder cannot be written.
        """
        model = self.state.model
        latent = model.config.latent_kind if model.config.is_vae else self.config.latent
        model.config.provenance = {**model.config.provenance, "latent": latent, **summary}
        with self.state.average.applied():
            state = whole_state(model, keep=self.fabric.is_global_zero)
            if self.fabric.is_global_zero:
                save_model(model, self.config.output / "model", state)

    def _generate(self, part: Batch) -> Generated:
        return self.state.generator(part.audio, part.features)

    def _judge(self, target: Tensor, audio: Tensor) -> tuple[list[DiscriminatorOutput], list[DiscriminatorOutput]]:
        """Outputs for real and decoded audio, with gradients to the audio only.

        Past the DDP wrapper: these gradients are the generator's, which are averaged there.
        """
        assert self.state.discriminators is not None
        module = unwrapped(self.state.discriminators)
        # Sharded weights do not heed this; their gradients are thrown away after the backward pass.
        module.requires_grad_(is_sharded(module))
        try:
            with self.fabric.autocast():
                with torch.no_grad():
                    real = module(target)
                return real, module(audio)
        finally:
            module.requires_grad_(True)

    def _accumulating(self, module: nn.Module, index: int, parts: Sequence[Batch]) -> Any:
        """Gradients are averaged over the ranks at the last part only."""
        last = index == len(parts) - 1
        return nullcontext() if last else self.fabric.no_backward_sync(cast("_FabricModule", module))


def split_batch(batch: Batch, parts: int) -> list[Batch]:
    """Cut a batch into equal parts for gradient accumulation."""
    if parts == 1:
        return [batch]
    size = len(batch.audio) // parts
    return [
        Batch(
            batch.audio[start : start + size],
            None if batch.features is None else batch.features[start : start + size],
        )
        for start in range(0, parts * size, size)
    ]


def split_outputs(
    outputs: Sequence[DiscriminatorOutput], size: int
) -> tuple[list[DiscriminatorOutput], list[DiscriminatorOutput]]:
    """Separate the outputs of a batch whose first `size` items are real and the others decoded."""
    real = [DiscriminatorOutput(o.logits[:size], [f[:size] for f in o.features]) for o in outputs]
    fake = [DiscriminatorOutput(o.logits[size:], [f[size:] for f in o.features]) for o in outputs]
    return real, fake


def save_model(model: DashengTokenizerModel, folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """Write a `save_pretrained` folder, whole or not at all; one that is there is replaced.

    Args:
        model: to write.
        folder: where to.
        state: weights to write, where those in memory are sharded; None: those in memory.

    Raises:
        OutputError: the folder cannot be written.
    """
    temporary = folder.with_name(f".{folder.name}-{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary, state_dict=state)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise output_error(folder, error) from error
