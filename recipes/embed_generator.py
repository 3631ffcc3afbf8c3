"""Turns a generator into the one that ships inside the package: float16 weights and a model card.

python recipes/embed_generator.py GENERATOR [--report docs/reports/generator.json] [-o FOLDER]
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
from pathlib import Path

import torch
from embed_default import write_card

from dasheng_tokenizer.generation import Generator

CARD = Path(__file__).parent / "embedded_generator_card.md"


def embed(source: Path, target: Path, settings: str) -> None:
    """Write weights and configuration; the settings of the run go into its facts."""
    generator = Generator.from_pretrained(source)
    facts = {
        "name": "dasheng-tokenizer-generator",
        "date": datetime.date.today().isoformat(),
        "data": "train split of the corpus described in the model card",
        "recipe": f"recipes/generator.yaml {settings}".strip(),
        **{name: value for name, value in generator.info.provenance.items() if name != "validation"},
    }
    generator.info = dataclasses.replace(generator.info, provenance=facts)
    generator.save_pretrained(target, dtype=torch.float16)


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("generator", type=Path, help="folder of a generator, such as runs/generator/model")
    parser.add_argument("--settings", default="", help="KEY=VALUE pairs that the run was given beside the recipe")
    parser.add_argument("--report", type=Path, help="report whose figures go on the card")
    parser.add_argument("-o", "--output", type=Path, default=Path("src/dasheng_tokenizer/embedded/generator"))
    parser.add_argument("--card-only", action="store_true", help="keep the weights, renew the card")
    arguments = parser.parse_args()
    if not arguments.card_only:
        embed(arguments.generator, arguments.output, arguments.settings)
    facts = Generator.from_pretrained(arguments.output).info.provenance
    write_card(CARD, arguments.output, facts, arguments.report)


if __name__ == "__main__":
    main()
