"""Validation figures of training runs side by side, from their logs.

python benchmarks/training_runs.py NAME=runs/default/log.jsonl … --report docs/reports/training_runs.json [--note TEXT]
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from dasheng_tokenizer.training.run_log import read_log
from report import Report, Table

FIGURES = {"audio_hours": "hours of audio seen", "mel": "mel distance", "pesq_wb": "PESQ-WB", "stoi": "STOI"}


def curve(name: str, log: Path, every: int) -> list[list[str | float | int]]:
    """A row for each validation whose step is a multiple of `every`, and for the last one."""
    records = [record for record in read_log(log) if record["kind"] == "validation"]
    last = records[-1]["step"] if records else 0
    return [
        [name, record["step"], *(round(record[key], 4) if key in record else "–" for key in FIGURES)]
        for record in records
        if record["step"] % every == 0 or record["step"] == last
    ]


def main() -> None:
    """Write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("logs", nargs="+", metavar="NAME=LOG")
    parser.add_argument("--every", type=int, default=1000, help="steps between rows")
    parser.add_argument("--title", default="Training runs compared")
    parser.add_argument("--note", action="append", default=[], help="a sentence for the report")
    parser.add_argument("--report", type=Path, required=True)
    options = parser.parse_args()
    rows = []
    for item in options.logs:
        name, separator, log = item.rpartition("=")
        if not (separator and Path(log).is_file()):
            parser.error(f"{item!r}: write NAME=LOG with a log that exists")
        rows += curve(name, Path(log), options.every)
    Report(
        title=options.title,
        command=shlex.join(["python", "benchmarks/training_runs.py", *sys.argv[1:]]),
        data="validation clips of each run, weights averaged over steps",
        seed=0,
        tables=[
            Table("Single runs; how much two seeds differ was not measured", ["run", "step", *FIGURES.values()], rows)
        ],
        notes=options.note,
        order=5,
    ).save(options.report)


if __name__ == "__main__":
    main()
