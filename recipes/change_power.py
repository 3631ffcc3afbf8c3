"""Gives a trained tokenizer another acoustic layer, and what worked on its latents a start on the new ones.

    python recipes/change_power.py recipes/default.yaml --power 1 [--floor 3e-3] -o runs/started [--model FOLDER]
        [KEY=VALUE …]
    python recipes/change_power.py recipes/default.yaml --denoiser FOLDER --recipe recipes/enhancement.yaml
        --model OLD --to NEW -o runs/started-enhancer

The layer is computed as in a fresh run (docs/training.md). The decoder expects the latents of the old one: the linear
map that guesses them best from the new ones goes into the weights of its upsampler. The second form does the like for
the first and last layer of a denoiser. Go on from there:

    dasheng-tokenizer train --config recipes/default.yaml init=runs/started acoustic_start.kind=random …
    dasheng-tokenizer train --config recipes/enhancement.yaml init=runs/started-enhancer tokenizer=NEW …
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from dasheng_tokenizer import DashengTokenizerConfig, DashengTokenizerModel
from dasheng_tokenizer.enhancement import Denoiser
from dasheng_tokenizer.enhancement.latent_space import latent_statistics
from dasheng_tokenizer.enhancement.training_configuration import load_enhancement_recipe
from dasheng_tokenizer.enhancement.training_data import open_data as open_mixtures
from dasheng_tokenizer.enhancement.training_model import new_denoiser
from dasheng_tokenizer.errors import ConfigurationError
from dasheng_tokenizer.training.acoustic_start import start_acoustic_layer
from dasheng_tokenizer.training.configuration import TrainingConfig, load_recipe
from dasheng_tokenizer.training.loop import make_fabric
from dasheng_tokenizer.training.tokenizer_state import Crops, open_data

RIDGE = 1e-5
"""Of the mean square of a latent number, added to its square: keeps a map finite in directions that never move."""


@torch.no_grad()
def latents(
    one: DashengTokenizerModel, other: DashengTokenizerModel, data: Crops, tokens: int
) -> tuple[Tensor, Tensor]:
    """(n, D) latents of the first tokens of the data by two tokenizers on the same frozen encoder."""
    rows: list[tuple[Tensor, Tensor]] = []
    for batch in data.batches(0, tokens):
        features = one.encode_features(batch.audio) if batch.features is None else batch.features
        semantic = one.injection.semantic_norm(features.float())  # (B, N, D)
        pair = [(semantic + model.encode_acoustic(batch.audio)).flatten(0, 1) for model in (one, other)]
        rows.append((pair[0], pair[1]))
        if sum(len(held) for held, _ in rows) >= tokens:
            break
    return torch.cat([first for first, _ in rows]), torch.cat([second for _, second in rows])


def guess(wanted: Tensor, given: Tensor) -> Tensor:
    """(D, D) linear map from what is given to what is wanted, both (n, D), by least squares."""
    wanted, given = wanted.double(), given.double()
    squares = given.T @ given
    squares += RIDGE * float(squares.trace()) / len(squares) * torch.eye(len(squares), dtype=squares.dtype)
    return torch.linalg.solve(squares, given.T @ wanted).T.float()


def change_tokenizer(
    config: TrainingConfig, old: DashengTokenizerModel, power: float, floor: float | None = None
) -> DashengTokenizerModel:
    """The tokenizer with a new acoustic layer, and an upsampler that takes its latents for the old ones.

    Args:
        config: recipe whose training data the layer is computed from.
        old: stays as it is.
        power: see `AcousticStartConfig`.
        floor: see `DashengTokenizerConfig.log_mel_floor`; None keeps the old one.

    Raises:
        ConfigurationError: A power or floor out of range.
    """
    settings = old.config.to_dict() | ({} if floor is None else {"log_mel_floor": floor})
    new = DashengTokenizerModel(DashengTokenizerConfig.from_dict(settings)).eval()
    new.load_state_dict(old.state_dict())
    fabric = make_fabric(config)
    data = open_data(fabric, config, new)
    start = dataclasses.replace(config.acoustic_start, kind="water_filling", power=power)
    start_acoustic_layer(fabric, new, data, start)
    before, after = latents(old, new, data, start.tokens)
    weight = new.upsampler.weight  # (D, D, frames a token)
    weight.data = torch.einsum("ji,jok->iok", guess(before, after), weight.data)
    return new


@torch.no_grad()
def change_denoiser(
    config: TrainingConfig, recipe: Path, denoiser: Denoiser, old: DashengTokenizerModel, folder: str
) -> Denoiser:
    """The denoiser for the latents of the tokenizer in `folder`; what it adds is mapped as a difference of latents."""
    new = DashengTokenizerModel.from_pretrained(folder).eval()
    settings = load_enhancement_recipe(recipe, [f"tokenizer={folder}"])
    mixtures = open_mixtures(make_fabric(settings), settings)
    statistics = latent_statistics(new, settings.part, mixtures.train.examples, settings.statistics_crops)
    changed = new_denoiser(settings, new, statistics, mixtures.hours)
    own = {name: value for name, value in denoiser.state_dict().items() if "_mean" not in name and "_std" not in name}
    changed.load_state_dict(own, strict=False)
    before, after = latents(old, new, open_data(make_fabric(config), config, new), config.acoustic_start.tokens)
    back = guess(before, after)  # (D old, D new)
    first, last = changed.project_in, changed.project_out
    # Standardised new latents → new latents → old ones → standardised old ones, all before the old first layer.
    scaled = first.weight / denoiser.input_std  # (W, D old)
    first.bias += scaled @ (back @ changed.input_mean - denoiser.input_mean)
    first.weight.copy_(scaled @ back * changed.input_std)
    forth = guess(after - after.mean(0), before - before.mean(0))  # (D new, D old)
    scale = forth * denoiser.latent_std / changed.latent_std[:, None]  # (D new, D old), of standardised differences
    last.weight.copy_(scale @ last.weight)
    last.bias.copy_(scale @ last.bias)
    return changed


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="recipe of the tokenizer, whose data the statistics are taken of")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="in place of those of the recipe")
    parser.add_argument("--power", type=float, help="see acoustic_start.power of a recipe")
    parser.add_argument("--floor", type=float, help="see log_mel_floor of a tokenizer (default: as it is)")
    parser.add_argument("--model", help="folder of the old tokenizer (default: the embedded one)")
    parser.add_argument("--denoiser", help="folder of a denoiser for the latents of the old tokenizer")
    parser.add_argument("--recipe", type=Path, default=Path("recipes/enhancement.yaml"), help="of the denoiser")
    parser.add_argument("--to", help="folder of the new tokenizer, for --denoiser")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_intermixed_args()  # settings may stand at the end
    given = [value is not None for value in (arguments.power, arguments.denoiser, arguments.to)]
    if given not in ([True, False, False], [False, True, True]) or (arguments.floor is not None and arguments.denoiser):
        parser.error("give --power, with or without --floor, or --denoiser and --to")
    config = load_recipe(arguments.config, [*arguments.settings, "accelerator=cpu", "devices=1"])
    old = DashengTokenizerModel.from_pretrained(arguments.model).eval()
    if arguments.denoiser is None:
        try:
            changed = change_tokenizer(config, old, arguments.power, arguments.floor)
        except ConfigurationError as error:
            parser.error(str(error))
        changed.save_pretrained(arguments.output)
        return
    denoiser = Denoiser.from_pretrained(arguments.denoiser)
    change_denoiser(config, arguments.recipe, denoiser, old, arguments.to).save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
