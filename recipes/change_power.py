"""Gives a trained tokenizer an acoustic layer of another power, and its decoder a start on the new latents.

    python recipes/change_power.py recipes/default.yaml --power 1 -o runs/started [--model FOLDER] [KEY=VALUE …]

The layer is computed as in a fresh run (docs/training.md). The decoder expects the latents of the old one: the linear
map that guesses them best from the new ones goes into the weights of its upsampler. Go on from there:

    dasheng-tokenizer train --config recipes/default.yaml init=runs/started acoustic_start.kind=random …
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from dasheng_tokenizer import DashengTokenizerModel
from dasheng_tokenizer.training.acoustic_start import start_acoustic_layer
from dasheng_tokenizer.training.configuration import load_recipe
from dasheng_tokenizer.training.loop import make_fabric
from dasheng_tokenizer.training.tokenizer_state import Crops, open_data

RIDGE = 1e-5
"""Of the mean square of a latent number, added to its square: keeps the map finite in directions that never move."""


@torch.no_grad()
def guess(old: DashengTokenizerModel, new: DashengTokenizerModel, data: Crops, tokens: int) -> Tensor:
    """(D, D) linear map from the new latents to the old ones, least squares over the first tokens of the data."""
    dim = new.latent_dim
    squares, products = torch.zeros(dim, dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64)
    seen = 0
    for batch in data.batches(0, tokens):
        features = new.encode_features(batch.audio) if batch.features is None else batch.features
        semantic = new.injection.semantic_norm(features.float())  # (B, N, D)
        before, after = ((semantic + m.encode_acoustic(batch.audio)).flatten(0, 1).double() for m in (old, new))
        squares += after.T @ after
        products += before.T @ after
        seen += len(after)
        if seen >= tokens:
            break
    squares += RIDGE * float(squares.trace()) / dim * torch.eye(dim, dtype=torch.float64)
    return torch.linalg.solve(squares, products.T).T.float()  # (D old, D new)


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="whose data the statistics are taken of")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="in place of those of the recipe")
    parser.add_argument("--power", type=float, required=True, help="see acoustic_start.power of a recipe")
    parser.add_argument("--model", help="folder of a tokenizer (default: the embedded one)")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    config = load_recipe(arguments.recipe, [*arguments.settings, "accelerator=cpu", "devices=1"])
    old = DashengTokenizerModel.from_pretrained(arguments.model).eval()
    new = copy.deepcopy(old)
    fabric = make_fabric(config)
    data = open_data(fabric, config, new)
    start = dataclasses.replace(config.acoustic_start, kind="water_filling", power=arguments.power)
    start_acoustic_layer(fabric, new, data, start)
    change = guess(old, new, data, start.tokens)
    weight = new.upsampler.weight  # (D, D, frames a token)
    weight.data = torch.einsum("ji,jok->iok", change, weight.data)
    new.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
