"""What of the latent helps enhancement: denoisers trained equally long on several latents, measured on one test set.

python benchmarks/enhancement_parts.py recipes/enhancement.yaml --runs runs/parts --report docs/reports/NAME.json
    --common steps=1000 --variant unified part=unified --variant semantic part=semantic …
    --evaluate CORPUS/speech-test-*.tar --noise CORPUS/sound-test-*.tar --limit 100

`--evaluate` hands all that follows to `dasheng-tokenizer evaluate enhancement`, so it comes last. Stopped and started
again, it goes on: runs resume, measured rows are kept.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from pathlib import Path

from dasheng_tokenizer.cli import main as command
from dasheng_tokenizer.enhancement import Denoiser
from dasheng_tokenizer.training import train
from dasheng_tokenizer.training.run_log import read_log
from report import Report, Table

FIGURES = {"audio_hours": "hours seen", "mel": "mel distance", "pesq_wb": "PESQ-WB", "stoi": "STOI", "latent": "loss"}


def variant_row(name: str, run: Path) -> list[str | float | int]:
    """Size of a denoiser, and its last validation."""
    validation = [record for record in read_log(run / "log.jsonl") if record["kind"] == "validation"][-1]
    millions = Denoiser.from_pretrained(run / "model").num_parameters / 1e6
    figures = [round(validation[key], 3) if key in validation else "–" for key in FIGURES]
    return [name, round(millions, 2), validation["step"], *figures]


def main() -> None:
    """Train, measure, write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--variant", nargs="+", action="append", required=True, metavar="NAME KEY=VALUE")
    parser.add_argument("--common", nargs="*", default=[], metavar="KEY=VALUE", help="settings of all variants")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs, one folder a variant")
    parser.add_argument("--title", default="What of the latent helps enhancement")
    parser.add_argument("--note", action="append", default=[], help="a sentence for the report")
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--evaluate", nargs=argparse.REMAINDER, required=True, metavar="ARGUMENT")
    options = parser.parse_args()
    rows: list[list[str | float | int]] = []
    systems: list[str] = []
    for name, *settings in options.variant:
        run = options.runs / re.sub(r"[^\w.=-]+", "-", name)
        train(options.recipe, [*options.common, *settings, f"output={run}"])
        rows.append(variant_row(name, run))
        systems += ["--system", f"{name}={run / 'model'}"]
    place = ["-o", str(options.runs / "evaluation"), "--title", options.title, "--report", str(options.report)]
    code = command(["evaluate", "enhancement", *options.evaluate, *systems, *place])
    if code == 2 or not options.report.is_file():
        sys.exit(code)
    measured = json.loads(options.report.read_text(encoding="utf-8"))
    trained = Table(
        "Training, and the last validation: mixtures of validation clips as in training",
        ["system", "million parameters", "steps", *FIGURES.values()],
        rows,
    )
    tables = [Table(**table) for table in measured["tables"]]
    Report(
        title=options.title,
        command=shlex.join(["python", *sys.argv]),
        data=measured["data"],
        seed=measured["seed"],
        tables=[trained, *tables],
        notes=[*options.note, *measured["notes"]],
        order=measured["order"],
    ).save(options.report)
    sys.exit(code)


if __name__ == "__main__":
    main()
