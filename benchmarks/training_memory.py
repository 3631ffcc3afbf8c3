"""Memory that weights and their training take on each GPU at published sizes, by DDP and by FSDP: arithmetic, no GPU.

    python benchmarks/training_memory.py --report docs/reports/training_memory.json

Counts parameters of the models without making them, and of every unit of the sharding. Activations are not counted;
they are the same either way.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from dasheng_tokenizer import DashengTokenizerConfig, DashengTokenizerModel
from dasheng_tokenizer.generation.dit import DiffusionTransformer
from dasheng_tokenizer.generation.training_configuration import load_generator_recipe
from dasheng_tokenizer.training.configuration import load_recipe
from dasheng_tokenizer.training.sharding import wrap_units
from dasheng_tokenizer.training.tokenizer_state import Discriminators
from report import Report, Table

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
PROCESSES = (1, 2, 4, 8, 16)
LATENT, TEXT = 1280, 1024
"""Widths of the published latent and of flan-t5-large."""
FLOAT32 = 4
TRAINED = 5 * FLOAT32
"""Bytes of a trained parameter with a moving average: weight, gradient, two moments of Adam, average."""
GATHERED = 2
"""Units that are whole at once: the one that computes and the next, which is on its way."""


def count(module: nn.Module, trained: bool | None = None) -> int:
    """Parameters: trained, frozen, or all."""
    chosen = (p for p in module.parameters() if trained is None or p.requires_grad == trained)
    return sum(parameter.numel() for parameter in chosen)


def gigabytes(modules: Sequence[nn.Module], averaged: Sequence[nn.Module], processes: int, sharded: bool) -> float:
    """Of one process, in 10^9 bytes.

    Args:
        modules: of the run.
        averaged: those of them with a moving average.
        processes: among which a sharded run shares everything.
        sharded: FSDP, else DDP.
    """
    held = sum(
        count(module, False) * FLOAT32 + count(module, True) * (TRAINED - (0 if module in averaged else FLOAT32))
        for module in modules
    )
    if not sharded:
        return held / 1e9
    largest = 0
    for module in modules:
        units = wrap_units(module)
        # A block's own share is without the units inside it.
        inside = {id(p) for unit in units for p in unit.parameters()}
        rest = sum(p.numel() for p in module.parameters() if id(p) not in inside)
        # What is gathered has a gradient of its size before that is summed; the root stays for the whole pass.
        most = max((count(unit) + count(unit, True) for unit in units), default=0)
        largest = max(largest, GATHERED * most + 2 * rest)
    return (held / processes + largest * FLOAT32) / 1e9


def main() -> None:
    """Count, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    recipe = load_recipe(RECIPES / "published.yaml")
    dit = load_generator_recipe(RECIPES / "tta_audiocaps.yaml").dit
    with torch.device("meta"):
        tokenizer = DashengTokenizerModel(DashengTokenizerConfig(**recipe.model))
        discriminators = Discriminators(recipe.discriminator)
        generator = DiffusionTransformer(dit.config(LATENT, TEXT))
    runs = {
        "tokenizer with discriminators (published.yaml)": ([tokenizer, discriminators], [tokenizer]),
        "generator, large (tta_audiocaps.yaml)": ([generator], [generator]),
    }
    rows: list[list[str | float | int]] = []
    for name, (modules, averaged) in runs.items():
        counts = [round(sum(count(module, trained) for module in modules) / 1e6, 1) for trained in (False, True)]
        ddp = round(gigabytes(modules, averaged, 1, sharded=False), 2)
        shares = [round(gigabytes(modules, averaged, number, sharded=True), 2) for number in PROCESSES[1:]]
        rows.append([name, *counts, ddp, *shares])
    columns = ["run", "frozen, M", "trained, M", "DDP", *(f"FSDP, {number} GPUs" for number in PROCESSES[1:])]
    report = Report(
        title="Memory of training at published sizes",
        command=shlex.join(["python", *sys.argv]),
        data="recipes/published.yaml, recipes/tta_audiocaps.yaml",
        seed=0,
        hardware="none: arithmetic",
        tables=[Table("GB (10^9 bytes) on each GPU, without activations", columns, rows)],
        notes=[
            "A trained parameter takes 20 bytes with a moving average (weight, gradient, two moments, average; "
            "discriminators, which have none, 16), a frozen one 4. FSDP divides all of it, and adds two of the largest "
            "blocks whole with their gradients, and what belongs to no block. With bf16-mixed, copies of the trained "
            "matrices in bfloat16 wait for the backward pass either way, 2 bytes each, unless gradient_checkpointing "
            "is on. Not measured on GPUs."
        ],
        order=9,
    )
    print(report.markdown())
    if arguments.report is not None:
        report.save(arguments.report)


if __name__ == "__main__":
    main()
