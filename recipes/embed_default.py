"""Turns a finished run into the model that ships inside the package: float16 weights, small files, a model card.

python recipes/embed_default.py RUN [--report docs/reports/quality.json] [-o FOLDER]
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from dasheng_tokenizer import DashengTokenizerModel

CARD = Path(__file__).parent / "embedded_default_card.md"
LARGEST_FILE = "29MB"
"""No file of the package is larger than 30 MiB."""


def markdown(table: dict[str, Any]) -> str:
    """A table of a report in Markdown."""
    rows = [table["columns"], ["---"] * len(table["columns"]), *table["rows"]]
    return f"{table['caption']}:\n\n" + "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def embed(run: Path, target: Path) -> None:
    """Write weights and configuration."""
    model = DashengTokenizerModel.from_pretrained(run / "model")
    summary = json.loads((run / "summary.json").read_text())
    summary.pop("validation", None)
    model.config.provenance = {
        "name": "dasheng-tokenizer-default",
        "date": datetime.date.today().isoformat(),
        "semantic_encoder": "OpenAI Whisper tiny encoder, frozen (MIT)",
        "data": "train split of the corpus described in the model card",
        "recipe": "recipes/default.yaml",
        **summary,
    }
    shutil.rmtree(target, ignore_errors=True)
    model.to(torch.float16).save_pretrained(target, max_shard_size=LARGEST_FILE)


def write_card(text: Path, target: Path, provenance: dict[str, Any], report: Path | None) -> None:
    """A model card: its text with the facts of a run and the tables of the report in their places."""
    facts = "\n".join(f"| {name} | {value} |" for name, value in provenance.items())
    figures = "Not measured yet."
    if report is not None:
        content = json.loads(report.read_text())
        parts = [*map(markdown, content["tables"]), *content["notes"], f"Command: `{content['command']}`"]
        figures = "\n\n".join(parts)
    card = text.read_text().replace("{{facts}}", facts).replace("{{figures}}", figures)
    (target / "README.md").write_text(card)


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--report", type=Path, help="report whose figures go on the card")
    parser.add_argument("-o", "--output", type=Path, default=Path("src/dasheng_tokenizer/embedded/default"))
    parser.add_argument("--card-only", action="store_true", help="keep the weights, renew the card")
    arguments = parser.parse_args()
    if not arguments.card_only:
        embed(arguments.run, arguments.output)
    config = json.loads((arguments.output / "config.json").read_text())
    write_card(CARD, arguments.output, config["provenance"], arguments.report)


if __name__ == "__main__":
    main()
