"""Seconds of a training step of the embedded default's size: as it would plainly be written, and as it is.

    python benchmarks/training_step.py --report docs/reports/training_step.json [--config recipes/default.yaml]

Plainly: the frozen encoder runs in every step, each loss makes its own spectra, and the inverse STFT is a matrix
product. As it is: frozen embeddings come from a cache, the losses share spectra, and a CPU takes the FFT. One thread;
processor time.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from dasheng_tokenizer import DashengTokenizerModel
from dasheng_tokenizer.spectral import CONTEXT, SAMPLES_PER_TOKEN
from dasheng_tokenizer.training import tokenizer_task
from dasheng_tokenizer.training.configuration import TrainingConfig, load_recipe
from dasheng_tokenizer.training.data import Batch
from dasheng_tokenizer.training.loop import make_fabric
from dasheng_tokenizer.training.losses import SpectraPair
from dasheng_tokenizer.training.tokenizer_state import Generated
from dasheng_tokenizer.training.tokenizer_task import TokenizerTask
from report import Report, Table

STEPS = 5


class OwnSpectra(SpectraPair):
    """Spectra that are made anew for whoever asks."""

    def __call__(self, n_fft: int) -> tuple[Tensor, Tensor]:
        """As `SpectraPair`."""
        self._cache.clear()
        return super().__call__(n_fft)


class PlainTask(TokenizerTask):
    """A step whose losses share nothing."""

    def generator_losses(self, part: Batch, generated: Generated, adversarial: bool) -> dict[str, Tensor]:
        """As `TokenizerTask`."""
        with mock.patch.object(tokenizer_task, "SpectraPair", OwnSpectra):
            return super().generator_losses(part, generated, adversarial)


class NoData:
    """The task gets its batches by hand."""

    def batches(self, start_step: int, steps: int) -> object:
        """Never called."""
        raise AssertionError


def median_step(config: TrainingConfig, plain: bool, adversarial: bool) -> float:
    """Processor seconds of a step, the median of several after one to warm up."""
    torch.manual_seed(0)
    config = dataclasses.replace(config, gan_start_step=0 if adversarial else config.steps)
    model = DashengTokenizerModel.from_pretrained()
    model.freeze_acoustic_layer()
    model.decoder.head.istft.use_fft = False if plain else None
    fabric = make_fabric(config)
    task = (PlainTask if plain else TokenizerTask)(fabric, config, model, NoData())  # type: ignore[arg-type]
    tokens = round(config.data.crop_seconds * model.frame_rate)
    audio = 0.1 * torch.randn(config.data.batch_size, 2 * CONTEXT + SAMPLES_PER_TOKEN * tokens)
    features = None if plain else model.encode_features(audio)
    times = []
    for step in range(STEPS + 1):
        start = time.process_time()
        task.training_step(Batch(audio, features), step)
        times.append(time.process_time() - start)
    return statistics.median(times[1:])


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, default=Path("docs/reports/training_step.json"))
    parser.add_argument("--config", type=Path, default=Path("recipes/default.yaml"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = load_recipe(options.config)
    recipe = dataclasses.replace(recipe, accelerator="cpu", devices=1)
    rows: list[list[str | float | int]] = []
    for adversarial in (False, True):
        first = None
        for name, plain, precision in (
            ("plainly written", True, "32-true"),
            ("as it is", False, "32-true"),
            ("as it is", False, "bf16-mixed"),
        ):
            config = dataclasses.replace(recipe, precision=precision)
            seconds = median_step(config, plain, adversarial)
            first = first or seconds
            rows.append([
                "spectral and adversarial" if adversarial else "spectral", name, precision, f"{seconds:.2f}",
                f"{first / seconds:.2f}",
            ])  # fmt: skip
    Report(
        title="A training step",
        command=shlex.join(["python", "benchmarks/training_step.py", *sys.argv[1:]]),
        data=f"noise, {recipe.data.batch_size} crops of {recipe.data.crop_seconds:g} s, the embedded default's model",
        seed=0,
        tables=[
            Table(
                "Processor seconds of a step, one thread",
                ["losses", "step", "precision", "seconds", "times as fast"],
                rows,
            )
        ],
        order=2,
    ).save(options.report)


if __name__ == "__main__":
    main()
