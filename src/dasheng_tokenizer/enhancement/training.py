"""Training of an enhancer: regression from latents of noisy speech to those of the clean, the tokenizer frozen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from dasheng_tokenizer.enhancement.denoiser import Denoiser
from dasheng_tokenizer.enhancement.embedded_mixtures import EmbeddedBatch, EmbeddedCrops, prepare_embeddings
from dasheng_tokenizer.enhancement.latent_space import (
    LatentLoss,
    LatentStatistics,
    embed,
    latent_statistics,
    whitening,
)
from dasheng_tokenizer.enhancement.mixtures import Mixture
from dasheng_tokenizer.enhancement.training_configuration import EnhancementConfig
from dasheng_tokenizer.enhancement.training_data import EnhancementBatch, EnhancementCrops, EnhancementData, open_data
from dasheng_tokenizer.enhancement.training_model import load_init, load_tokenizer, new_denoiser
from dasheng_tokenizer.tokenizer import DashengTokenizerModel
from dasheng_tokenizer.training.configuration import to_plain
from dasheng_tokenizer.training.loop import StepResult, fit, is_finished, is_started, make_fabric, seed_everything
from dasheng_tokenizer.training.losses import MultiScaleMelLoss
from dasheng_tokenizer.training.optimization import (
    ExponentialMovingAverage,
    guarded_step,
    learning_rate,
    make_adamw,
    set_learning_rate,
)
from dasheng_tokenizer.training.run_log import RunLog
from dasheng_tokenizer.training.sharding import dealt, whole_state
from dasheng_tokenizer.training.validation import mean_rows, spectrogram_figure, speech_quality

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Row = dict[str, float]

Batch = EnhancementBatch | EmbeddedBatch


def train_enhancer(config: EnhancementConfig) -> Path:
    """Train an enhancer, or go on with a training that was interrupted; see `training.train`.

    Returns:
        The run folder. A finished run has the denoiser in its folder `model`.

    Raises:
        CheckpointError: the tokenizer cannot be loaded, or a checkpoint cannot be read.
        DataError, MissingExtraError: see `open_data`.
        ConfigurationError, OutputError: see `open_data`, `new_denoiser` and `training.loop.fit`.
    """
    fabric = make_fabric(config)
    if is_finished(config):
        fabric.print(f"{config.output} is finished; the enhancer: {config.output / 'model'}. More steps would go on.")
        return config.output
    tokenizer = load_tokenizer(config, fabric.device)
    data = open_data(fabric, config)
    seed_everything(config.seed)  # Alike on every rank: the same fresh weights.
    # A resumed run finds its statistics in its checkpoint.
    statistics = None
    if not is_started(config):
        statistics = latent_statistics(tokenizer, config.part, data.train.examples, config.statistics_crops)
    denoiser = new_denoiser(config, tokenizer, statistics, data.hours)
    if config.init is not None and not is_started(config):
        load_init(denoiser, config.init)
    task = EnhancementTask(fabric, config, tokenizer, denoiser, data, statistics)
    fit(fabric, task, config)
    return config.output


class EnhancementTask:
    """A denoiser as a `training.loop.Task`."""

    def __init__(
        self,
        fabric: Fabric,
        config: EnhancementConfig,
        tokenizer: DashengTokenizerModel,
        denoiser: Denoiser,
        data: EnhancementData,
        statistics: LatentStatistics | None = None,
    ) -> None:
        """Set a denoiser up for training.

        Args:
            fabric: launched.
            config: the recipe.
            tokenizer: frozen, on the device of the run.
            denoiser: with the weights to start from, the same on every rank.
            data: where batches and held-out mixtures come from.
            statistics: of the latents, for the loss; None: a checkpoint will bring what the loss needs.
        """
        self.fabric, self.config, self.tokenizer = fabric, config, tokenizer
        self.denoiser, self.data = denoiser.train(), data
        self.wrapped = fabric.setup_module(denoiser)
        optimizer = fabric.setup_optimizers(make_adamw(denoiser.named_parameters(), config.optimizer))
        self.optimizer = cast(torch.optim.Optimizer, optimizer)
        self.average = ExponentialMovingAverage(denoiser.named_parameters(), config.ema_decay)
        basis = torch.eye(denoiser.config.latent_dim)
        if statistics is not None:
            basis = whitening(statistics.correlation, config.whitening)
        self.latent_loss = LatentLoss(basis).to(fabric.device)
        self.modules: dict[str, nn.Module] = {"denoiser": denoiser, "latent_loss": self.latent_loss}
        self.optimizers = {"denoiser": self.optimizer}
        self.averages = {"denoiser": self.average}
        self.mel = MultiScaleMelLoss().to(fabric.device)
        self._noisy_rows: dict[int, Row] = {}
        self.crops: EnhancementCrops | EmbeddedCrops = data.train
        if count := config.data.embedded_mixtures:
            rank, world_size = fabric.global_rank, fabric.world_size
            examples, folder = data.train.examples, config.data.cache / "embedded"
            held = prepare_embeddings(tokenizer, examples, count, folder, rank, world_size)
            self.crops = EmbeddedCrops(held, examples, config, rank, world_size)

    def identity(self) -> dict[str, Any]:
        """Settings that a resumed run must share: shapes of weights, what they belong to, how batches are drawn."""
        plain = to_plain(self.config)
        data = {f"data.{name}": plain["data"][name] for name in ("crop_seconds", "batch_size")}
        mixture = {f"mixture.{name}": value for name, value in plain["mixture"].items()}
        data["data.embedded_mixtures"] = self.config.data.embedded_mixtures
        named = {
            name: plain[name] for name in ("init", "part", "loss_weights", "whitening", "statistics_crops", "seed")
        }
        sizes = {f"denoiser.{name}": value for name, value in asdict(self.denoiser.config).items()}
        return {**sizes, **data, **mixture, **named, "tokenizer": self.denoiser.info.tokenizer_hash}

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """This rank's batches of the steps to do."""
        return self.crops.batches(first_step, last_step)

    def audio_seconds(self, batch: Batch) -> float:
        """Seconds of noisy audio in a batch of this rank."""
        return batch.seconds

    def training_step(self, batch: Batch, step: int) -> StepResult:
        """Move the denoiser and its moving average."""
        config = self.config
        set_learning_rate(self.optimizer, learning_rate(config.optimizer, step, config.steps))
        parts: Sequence[Batch] = batch.split(config.accumulate)
        totals: dict[str, Tensor] = {}
        for index, part in enumerate(parts):
            # Gradients are averaged over the ranks at the last part only.
            with self.fabric.no_backward_sync(self.wrapped, enabled=index + 1 < len(parts)):
                losses = self.losses(part.to(self.fabric.device))
                self.fabric.backward(losses["loss"] / len(parts))
            for name, value in losses.items():
                totals[name] = totals.get(name, torch.zeros_like(value)) + value.detach() / len(parts)
        norm, applied = guarded_step(self.fabric, self.optimizer, totals["loss"], config.clip_grad_norm)
        if applied:
            self.average.update()
        return StepResult({**totals, "grad_norm": norm}, applied)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The terms of the loss that have a weight, and `loss`, their weighted sum, with gradients."""
        weights = self.config.loss_weights
        noisy, clean = self._embedded(batch)
        estimate = self.wrapped(noisy)  # (B, T, D)
        losses: dict[str, Tensor] = {}
        if weights.latent > 0:
            losses["latent"] = self._latent_loss(estimate, clean)
        if weights.spectral > 0:
            # Not `decode`: it refuses NaN, where training skips the step.
            losses["spectral"] = self.mel(self.tokenizer._decode(estimate.float()), batch.clean_audio)
        total = torch.stack([getattr(weights, name) * value for name, value in losses.items()]).sum()
        return {"loss": total, **losses}

    @torch.no_grad()
    def validate(self, step: int, log: RunLog) -> dict[str, float]:
        """Measure the averaged weights on held-out mixtures, always the same ones.

        Returns:
            Means: `latent`, the latent loss, over all and as `latent_KIND` for each kind of noise; `mel`, `pesq_wb` and
            `stoi` of the decoded audio against the clean; the same of the noisy recording as `…_noisy`; and
            `residual_db`, the level of what is left where nobody speaks. Empty without held-out data.
        """
        if self.data.valid is None:
            return {}
        rows: list[Row] = []
        self.denoiser.eval()
        with self.average.applied():
            rank, world_size = self.fabric.global_rank, self.fabric.world_size
            for place, counts in dealt(self.config.validation_clips, rank, world_size):
                mixture = self.data.valid.mixture(place)
                row, decoded = self._measure(mixture)
                if not counts:
                    continue
                if place not in self._noisy_rows:  # they never change
                    self._noisy_rows[place] = self._noisy_row(mixture)
                rows.append({**row, **self._noisy_rows[place]})
                if place < self.config.validation_samples:
                    _show(log, place, mixture, decoded, step, self.tokenizer.sampling_rate)
        self.denoiser.train()
        return mean_rows(self.fabric, rows)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the averaged weights as a `Denoiser` folder, `output/model`.

        Raises:
            OutputError: the folder cannot be written.
        """
        info = self.denoiser.info
        self.denoiser.info = replace(info, provenance={**info.provenance, **summary})
        with self.average.applied():
            state = whole_state(self.denoiser, keep=self.fabric.is_global_zero)
            if self.fabric.is_global_zero:
                self.denoiser.save_pretrained(self.config.output / "model", state=state)

    def _embedded(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the denoiser sees of the noisy recordings, and the latents of the clean ones, (B, T, D) each."""
        if isinstance(batch, EmbeddedBatch):
            return batch.noisy, batch.clean
        with self.fabric.autocast():
            if self.config.part == "unified":
                both = embed(self.tokenizer, torch.cat([batch.noisy, batch.clean]), "unified")
                noisy, clean = both.chunk(2)
                return noisy, clean
            noisy = embed(self.tokenizer, batch.noisy, self.config.part)
            return noisy, embed(self.tokenizer, batch.clean, "unified")

    def _latent_loss(self, estimate: Tensor, clean: Tensor) -> Tensor:
        """Distance of latents in the space of the loss, float32; see `LatentLoss`."""
        standardize = self.denoiser.standardize_target
        return self.latent_loss(standardize(estimate.float()), standardize(clean.float()))

    def _measure(self, mixture: Mixture) -> tuple[Row, np.ndarray]:
        """Figures of the enhanced recording, and its audio (S,)."""
        batch = _batch(mixture).to(self.fabric.device)
        noisy, clean = self._embedded(batch)
        with self.fabric.autocast():
            estimate = self.denoiser(noisy).float()  # (1, T, D)
            decoded = self.tokenizer.decode(estimate).float()  # (1, S)
        row = {"latent": float(self._latent_loss(estimate, clean)), **self._heard(mixture, decoded[0])}
        row[f"latent_{mixture.kind}"] = row["latent"]
        return row, decoded[0].cpu().numpy()

    def _noisy_row(self, mixture: Mixture) -> Row:
        batch = _batch(mixture).to(self.fabric.device)
        with self.fabric.autocast():
            noisy, clean = embed(self.tokenizer, torch.cat([batch.noisy, batch.clean]), "unified").chunk(2)
        row = {"latent": float(self._latent_loss(noisy, clean)), **self._heard(mixture, batch.noisy[0])}
        return {f"{name}_noisy": value for name, value in row.items()}

    def _heard(self, mixture: Mixture, audio: Tensor) -> Row:
        """Figures of audio (S,) against the clean speech, or its level where nobody speaks."""
        if not mixture.clean.any():
            return {"residual_db": float(10 * audio.square().mean().clamp(min=1e-12).log10())}
        clean = torch.from_numpy(mixture.clean).to(audio.device)
        row = {"mel": float(self.mel(audio[None], clean[None]))}
        return row | speech_quality(mixture.clean, audio.cpu().numpy(), self.tokenizer.sampling_rate)


def _batch(mixture: Mixture) -> EnhancementBatch:
    noisy, clean = (torch.from_numpy(side)[None] for side in (mixture.noisy, mixture.clean))
    return EnhancementBatch(noisy, clean)


def _show(log: RunLog, place: int, mixture: Mixture, decoded: np.ndarray, step: int, sampling_rate: int) -> None:
    """Audio and a spectrogram of one mixture; what never changes only once."""
    for name, audio in (("noisy", mixture.noisy), ("clean", mixture.clean)):
        log.audio(f"{name}/{place}", audio, 0, sampling_rate)
    log.audio(f"enhanced/{place}", decoded, step, sampling_rate)
    figure = spectrogram_figure(mixture.clean, decoded, sampling_rate)
    if figure is not None:
        log.figure(f"spectrogram/{place}", figure, step)
