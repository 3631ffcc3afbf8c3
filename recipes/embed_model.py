"""Turns a generator or an enhancer into the one that ships inside the package: float16 weights and a model card.

python recipes/embed_model.py generator runs/generator/model [--report docs/reports/generator.json] [-o FOLDER]
python recipes/embed_model.py enhancer runs/enhancement/model [--report docs/reports/enhancement.json] [-o FOLDER]
python recipes/embed_model.py generator src/dasheng_tokenizer/embedded/generator --tokenizer NEW --trained-with OLD

The third form hands an embedded model over to a tokenizer with a new decoder and the same latents. The tokenizer
itself: recipes/embed_default.py. A model may be trained before the decoder of its tokenizer is, on latents that are
final (`freeze_acoustic`): `--tokenizer` names the finished one, whose latents must be the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
from pathlib import Path

import torch
from embed_default import write_card

from dasheng_tokenizer import DashengTokenizerModel
from dasheng_tokenizer.enhancement import Denoiser
from dasheng_tokenizer.generation import Generator

MODELS: dict[str, type[Generator] | type[Denoiser]] = {"generator": Generator, "enhancer": Denoiser}
RECIPES = {"generator": "recipes/generator.yaml", "enhancer": "recipes/enhancement.yaml"}


MOST_DIFFERENT = 0.01
"""Relative distance of latents of one clip that rounding to float16 may make."""


def belong_to(model: Generator | Denoiser, finished: str, trained_with: str | None = None) -> None:
    """Hand a model over to a tokenizer whose latents are those that it was trained on."""
    first = trained_with or model.info.tokenizer
    audio = 0.1 * torch.randn(1, 48_000, generator=torch.Generator().manual_seed(0)).cumsum(1).sin()
    tokenizers = [DashengTokenizerModel.from_pretrained(name).eval() for name in (first, finished)]
    if tokenizers[0].weights_hash() != model.info.tokenizer_hash:
        raise SystemExit(f"{first} is not the tokenizer that this model was trained with")
    with torch.no_grad():
        trained, wanted = (tokenizer.encode(audio) for tokenizer in tokenizers)
    if trained.shape != wanted.shape or float((trained - wanted).norm() / trained.norm()) > MOST_DIFFERENT:
        raise SystemExit(f"{finished} has other latents than {first}; train the model on its own")
    facts = {"tokenizer": None, "tokenizer_hash": tokenizers[1].weights_hash()}
    model.info = dataclasses.replace(model.info, **facts)  # type: ignore[type-var]


def embed(model: Generator | Denoiser, kind: str, target: Path, settings: str) -> None:
    """Write weights and configuration; the settings of the run go into its facts."""
    facts = {
        "name": f"dasheng-tokenizer-{kind}",
        "date": datetime.date.today().isoformat(),
        "data": "train split of the corpus described in the model card",
        "recipe": f"{RECIPES[kind]} {settings}".strip(),
        **{name: value for name, value in model.info.provenance.items() if name != "validation"},
    }
    model.info = dataclasses.replace(model.info, provenance=facts)  # type: ignore[type-var]
    model.save_pretrained(target, dtype=torch.float16)


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=sorted(MODELS))
    parser.add_argument("model", type=Path, help="folder of the model, such as runs/generator/model")
    parser.add_argument("--settings", default="", help="KEY=VALUE pairs that the run was given beside the recipe")
    parser.add_argument("--clean-change", nargs=2, type=float, metavar="X", help="of an enhancer, see `DenoiserInfo`")
    parser.add_argument("--tokenizer", help="finished tokenizer with the same latents, such as the embedded default")
    parser.add_argument("--trained-with", help="tokenizer it was trained with, where its facts name no folder")
    parser.add_argument("--report", type=Path, help="report whose figures go on the card")
    parser.add_argument("-o", "--output", type=Path, help="default: the place in the package")
    parser.add_argument("--card-only", action="store_true", help="keep the weights, renew the card")
    arguments = parser.parse_args()
    target = arguments.output or Path("src/dasheng_tokenizer/embedded") / arguments.kind
    if not arguments.card_only:
        model = MODELS[arguments.kind].from_pretrained(arguments.model)
        if arguments.tokenizer is not None:
            belong_to(model, arguments.tokenizer, arguments.trained_with)
        if arguments.clean_change is not None and isinstance(model, Denoiser):
            model.info = dataclasses.replace(model.info, clean_change=tuple(arguments.clean_change))
        if arguments.trained_with is None:
            embed(model, arguments.kind, target, arguments.settings)
        else:  # its facts stay
            model.save_pretrained(target, dtype=torch.float16)
    card = Path(__file__).parent / f"embedded_{arguments.kind}_card.md"
    write_card(card, target, MODELS[arguments.kind].from_pretrained(target).info.provenance, arguments.report)


if __name__ == "__main__":
    main()
