"""Training of a generator by flow matching, on the latents of any tokenizer, by the loop that trains tokenizers too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from dasheng_tokenizer.cli_encode_dataset import EMBEDDED
from dasheng_tokenizer.errors import CheckpointError, ConfigurationError
from dasheng_tokenizer.files import parse_json
from dasheng_tokenizer.generation.flow_matching import flow_matching_loss
from dasheng_tokenizer.generation.generator import Generator, GeneratorInfo
from dasheng_tokenizer.generation.text_encoders import pad_text
from dasheng_tokenizer.generation.training_configuration import GeneratorTrainingConfig
from dasheng_tokenizer.generation.training_data import GeneratorData, LatentBatch, open_data
from dasheng_tokenizer.training.checkpoint_tensors import open_tensors
from dasheng_tokenizer.training.configuration import to_plain
from dasheng_tokenizer.training.loop import StepResult, fit, is_finished, is_started, make_fabric, seed_everything
from dasheng_tokenizer.training.optimization import (
    ExponentialMovingAverage,
    guarded_step,
    learning_rate,
    make_adamw,
    set_learning_rate,
)
from dasheng_tokenizer.training.run_log import RunLog
from dasheng_tokenizer.training.sharding import dealt, whole_state
from dasheng_tokenizer.training.validation import mean_rows

if TYPE_CHECKING:
    from lightning_fabric import Fabric

AVERAGE = "average.generator."
"""Prefix of the averaged weights in a checkpoint."""

VALIDATION_TIMES = 8
"""Times that a held-out clip is measured at: the middles of so many equal parts of [0, 1]."""


def train_generator(config: GeneratorTrainingConfig) -> Path:
    """Train a generator, or go on with a training that was interrupted; see `training.train`.

    Returns:
        The run folder. A finished run has the generator in its folder `model`.

    Raises:
        DataError, ModelMismatchError: see `open_data`.
        ConfigurationError, CheckpointError, OutputError: see `open_data`, `new_generator` and `training.loop.fit`.
        MissingExtraError: the extra `train` or `generate` is not installed.
    """
    fabric = make_fabric(config)
    if is_finished(config):
        fabric.print(f"{config.output} is finished; the generator: {config.output / 'model'}. More steps would go on.")
        return config.output
    data = open_data(fabric, config)
    seed_everything(config.seed)  # Alike on every rank: the same fresh weights.
    generator = new_generator(config, data)
    if config.init is not None and not is_started(config):
        load_init(generator, config.init)
    task = GeneratorTask(fabric, config, generator, data)
    fit(fabric, task, config)
    return config.output


def new_generator(config: GeneratorTrainingConfig, data: GeneratorData) -> Generator:
    """A fresh generator for the latents and texts of a run.

    Raises:
        ConfigurationError: sizes that contradict each other or the latents.
    """
    dataset = data.train.dataset
    index = dataset.index
    # What was never longer in training is not promised.
    lengths = np.minimum(dataset.num_tokens, data.train.crop_tokens) / index.frame_rate
    info = GeneratorInfo(
        tokenizer_hash=index.model_hash,
        tokenizer=None if index.tokenizer == EMBEDDED else index.tokenizer,
        text_encoder=config.text_encoder,
        text_identity=data.text_identity,
        frame_rate=index.frame_rate,
        max_seconds=round(float(lengths.max()), 6),
        typical_seconds=round(float(np.median(lengths)), 6),
        provenance={"clips": index.clips, "hours": round(index.hours, 4), "text_dropout": config.text_dropout},
    )
    generator = Generator(config.dit.config(index.latent_dim, data.text_width), info, index.mean, index.std)
    generator.dit.gradient_checkpointing = config.gradient_checkpointing
    return generator


def load_init(generator: Generator, folder: str) -> None:
    """Take the transformer of another generator; the statistics of the latents stay those of the run's data.

    Raises:
        CheckpointError: it cannot be loaded.
        ConfigurationError: it is of another size, or knows another text encoder.
    """
    other = Generator.from_pretrained(folder)
    wanted, found = ({"sizes": one.dit.config, "text encoder": one.info.text_identity} for one in (generator, other))
    if differing := [name for name, value in wanted.items() if found[name] != value]:
        raise ConfigurationError(
            f"init: {folder} has another {' and '.join(differing)}; name a generator like this one"
        )
    generator.dit.load_state_dict(other.dit.state_dict())


def averaged_generator(config: GeneratorTrainingConfig, checkpoint: Path) -> Generator:
    """The generator that a run would end with if it ended at a checkpoint: its averaged weights, in eval mode.

    Args:
        config: of the run.
        checkpoint: such as `runs/generator/checkpoints/step-00002500`.

    Raises:
        CheckpointError: no checkpoint of a run with this recipe, or a damaged one.
        DataError, ModelMismatchError, ConfigurationError, OutputError: see `open_data`.
    """
    from safetensors import SafetensorError

    generator = new_generator(config, open_data(make_fabric(config), config))
    try:
        state = parse_json((checkpoint / "state.json").read_text(encoding="utf-8"), finite=False)
        held = open_tensors(checkpoint, state).state(AVERAGE)
        progress = state["progress"]
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{checkpoint} is no checkpoint, or a damaged one ({error!r}); name another") from error
    wanted = {name: parameter.shape for name, parameter in generator.named_parameters()}
    if {name: value.shape for name, value in held.items()} != wanted:
        raise CheckpointError(f"{checkpoint} is of another recipe; name the recipe and the settings of its run")
    generator.load_state_dict(held, strict=False)
    facts = {"steps": progress["step"], "audio_hours_seen": round(progress["audio_seconds"] / 3600, 4)}
    generator.info = replace(generator.info, provenance={**generator.info.provenance, **facts})
    return generator.eval()


class Objective(nn.Module):
    """Standardise, forget some texts, and compare velocities as one forward, so that DDP sees the whole of it."""

    def __init__(self, generator: Generator) -> None:
        """Wrap a generator."""
        super().__init__()
        self.generator = generator

    def forward(
        self,
        latents: Tensor,
        noise: Tensor,
        times: Tensor,
        token_mask: Tensor,
        text: Tensor,
        text_mask: Tensor,
        dropped: Tensor,
    ) -> Tensor:
        """Flow-matching loss, a scalar.

        Args:
            latents: (B, T, C) as the tokenizer gives them.
            noise: (B, T, C) standard normal.
            times: (B,).
            token_mask: (B, T) bool.
            text: (B, S, E).
            text_mask: (B, S) bool; of a clip in `dropped`, one token alone.
            dropped: (B,) bool, clips that get the learned text for "no text" instead of theirs.
        """
        dit = self.generator.dit
        nothing = dit.unconditional(1)[0]  # (1, 1, E)
        text = torch.where(dropped[:, None, None], nothing, text)  # (B, S, E)
        return flow_matching_loss(
            lambda x, t: dit(x, t, text, text_mask, token_mask),
            self.generator.standardize(latents),  # (B, T, C)
            noise,
            times,
            token_mask,
        )


class GeneratorTask:
    """A generator as a `training.loop.Task`."""

    def __init__(
        self, fabric: Fabric, config: GeneratorTrainingConfig, generator: Generator, data: GeneratorData
    ) -> None:
        """Set a generator up for training.

        Args:
            fabric: launched.
            config: the recipe.
            generator: with the weights to start from, the same on every rank.
            data: where batches and held-out clips come from.
        """
        self.fabric, self.config, self.generator, self.data = fabric, config, generator.train(), data
        self.objective = Objective(generator)
        self.wrapped = fabric.setup_module(self.objective)
        optimizer = fabric.setup_optimizers(make_adamw(generator.named_parameters(), config.optimizer))
        self.optimizer = cast(torch.optim.Optimizer, optimizer)
        self.average = ExponentialMovingAverage(generator.named_parameters(), config.ema_decay)
        self.modules: dict[str, nn.Module] = {"generator": generator}
        self.optimizers = {"generator": self.optimizer}
        self.averages = {"generator": self.average}

    def identity(self) -> dict[str, Any]:
        """Settings that a resumed run must share: shapes of weights, what they belong to, how batches are drawn."""
        config, info = self.config, self.generator.info
        drawn = ("crop_seconds", "min_crop_seconds", "batch_size", "balance", "shares")
        plain = to_plain(config)
        return {
            **{f"dit.{name}": value for name, value in asdict(self.generator.dit.config).items()},
            **{f"data.{name}": plain["data"][name] for name in drawn},
            **{name: plain[name] for name in ("text_dropout", "timesteps", "timestep_mean", "timestep_std", "seed")},
            **({} if plain["init"] is None else {"init": plain["init"]}),
            "tokenizer": info.tokenizer_hash,
            "text_encoder": info.text_identity,
        }

    def batches(self, first_step: int, last_step: int) -> Iterator[LatentBatch]:
        """This rank's batches of the steps to do."""
        return self.data.train.batches(first_step, last_step)

    def audio_seconds(self, batch: LatentBatch) -> float:
        """Seconds of audio behind the latents of a batch of this rank, without padding.

        The loop takes the other ranks' for equal, which they are on average only.
        """
        return float(batch.num_tokens.sum()) / self.generator.info.frame_rate

    def training_step(self, batch: LatentBatch, step: int) -> StepResult:
        """Move the transformer and its moving average."""
        config = self.config
        set_learning_rate(self.optimizer, learning_rate(config.optimizer, step, config.steps))
        parts = batch.split(config.accumulate)
        total = torch.zeros((), device=self.fabric.device)
        for index, part in enumerate(parts):
            # Gradients are averaged over the ranks at the last part only.
            with self.fabric.no_backward_sync(self.wrapped, enabled=index + 1 < len(parts)):
                loss = self.wrapped(*self._arguments(part)) / len(parts)
                self.fabric.backward(loss)
            total += loss.detach()
        norm, applied = guarded_step(self.fabric, self.optimizer, total, config.clip_grad_norm)
        if applied:
            self.average.update()
        return StepResult({"loss": total, "grad_norm": norm}, applied)

    @torch.no_grad()
    def validate(self, step: int, log: RunLog) -> dict[str, float]:
        """Flow-matching loss of the averaged weights on held-out clips with their texts, at fixed times and noise.

        Returns:
            `loss`, the mean over clips, and `loss_DOMAIN` for each domain; empty without held-out latents.
        """
        clips = self.data.valid
        if clips is None:
            return {}
        rows: list[dict[str, float]] = []
        self.generator.eval()
        with self.average.applied():
            for place, counts in dealt(len(clips), self.fabric.global_rank, self.fabric.world_size):
                clip = clips[place]
                loss = self._held_out_loss(clip.latents, clips.texts([clip.caption])[0], place)
                if counts:
                    rows.append({"loss": loss, f"loss_{clip.domain}": loss})
        self.generator.train()
        return mean_rows(self.fabric, rows)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the averaged weights as a `Generator` folder, `output/model`.

        Raises:
            OutputError: the folder cannot be written.
        """
        info = self.generator.info
        self.generator.info = replace(info, provenance={**info.provenance, **summary})
        with self.average.applied():
            state = whole_state(self.generator, keep=self.fabric.is_global_zero)
            if self.fabric.is_global_zero:
                self.generator.save_pretrained(self.config.output / "model", state=state)

    def _arguments(self, part: LatentBatch) -> list[Tensor]:
        """What the objective takes, on the device of the run."""
        noise = draw_noise(part.num_tokens, part.noise_seeds, part.latents.shape[-1], self.fabric.device)
        on_cpu = (part.times, part.token_mask, part.text, part.text_mask, part.dropped)
        held = [tensor.to(self.fabric.device, non_blocking=True) for tensor in (part.latents, *on_cpu)]
        return [held[0], noise, *held[1:]]

    def _held_out_loss(self, latents: Tensor, text: Tensor, seed: int) -> float:
        """Mean over the times of the loss of a clip, (T, C) with its text (S, E)."""
        count, device = VALIDATION_TIMES, self.fabric.device
        source = torch.Generator().manual_seed(seed)  # on the CPU: every device sees the same noise
        noise = torch.randn(count, *latents.shape, generator=source)  # (times, T, C)
        times = (torch.arange(count) + 0.5) / count
        words, word_mask = pad_text([text] * count)  # (times, S, E), (times, S)
        mask, dropped = torch.ones(count, len(latents), dtype=torch.bool), torch.zeros(count, dtype=torch.bool)
        arguments = (latents.expand(count, -1, -1), noise, times, mask, words, word_mask, dropped)
        with self.fabric.autocast():
            return float(self.objective(*(argument.to(device) for argument in arguments)))


def draw_noise(num_tokens: Tensor, seeds: Tensor, width: int, device: torch.device) -> Tensor:
    """(B, T, width) standard normal, zeros after the end of a clip. That of a clip hangs on its seed and length alone.

    Drawn on the device, where large noise costs less; the same seed gives other noise on another kind of device.
    """
    clips = []
    for count, seed in zip(num_tokens.tolist(), seeds.tolist(), strict=True):
        source = torch.Generator(device).manual_seed(seed)
        clips.append(torch.randn(count, width, generator=source, device=device))
    return nn.utils.rnn.pad_sequence(clips, batch_first=True)
