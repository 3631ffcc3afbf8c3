"""Feeds damaged inputs through every reader and command.

    PYTHONPATH=tests python -m fuzz --count 10000 --seconds 900 --seed 0 --report docs/reports/fuzz.json

Exit code 1 where something was found; its input is kept in `--keep`. `--first N --count 1` runs input N alone.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from dasheng_tokenizer.evaluation.report import Report, Table
from fuzz.runner import HANG, Outcome, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="inputs (default: 10000)")
    parser.add_argument("--seconds", type=float, default=900.0, help="most time (default: 900)")
    parser.add_argument("--seed", type=int, default=0, help="of the damage (default: 0)")
    parser.add_argument("--first", type=int, default=0, help="number of the first input, to go on or to repeat one")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"), help="where inputs with findings are kept")
    parser.add_argument("--report", type=Path, metavar="JSON", help="write the figures here, for docs/make_results.py")
    arguments = parser.parse_args()
    began, outcome = time.monotonic(), Outcome()
    with tempfile.TemporaryDirectory() as root, tqdm(total=arguments.count, unit="input", disable=None) as bar:
        steps = run(
            Path(root), arguments.seed, arguments.first, arguments.count, arguments.seconds, arguments.keep.resolve()
        )
        found = 0
        for outcome in steps:
            bar.update()
            for finding in outcome.findings[found:]:
                last = finding["problem"].strip().splitlines()[-1][:200]
                tqdm.write(f"{finding['index']} ({finding['kind']}): {last}")
            found = len(outcome.findings)
    done, spent = sum(outcome.counts.values()), time.monotonic() - began
    print(f"{done} inputs in {spent:.0f} s, {len(outcome.findings)} findings, growth {outcome.growth:.0f} MiB")
    if arguments.report:
        report(arguments.seed, outcome, spent).save(arguments.report)
    return 1 if outcome.findings else 0


def report(seed: int, outcome: Outcome, spent: float) -> Report:
    bad = [finding["kind"] for finding in outcome.findings]
    rows: list[list[str | int | float]] = [[kind, n, bad.count(kind)] for kind, n in sorted(outcome.counts.items())]
    rows.append(["all", sum(outcome.counts.values()), len(bad)])
    return Report(
        title="Damaged inputs",
        command=shlex.join(["PYTHONPATH=tests", "python", "-m", "fuzz", *sys.argv[1:]]),
        data="small valid inputs made on the spot, damaged at random",
        seed=seed,
        tables=[Table("Inputs that led to something that must not happen", ["kind", "inputs", "findings"], rows)],
        notes=[
            "What must not happen: an exception or exit code that is not foreseen, a message of several lines, a "
            f"crash, more than {HANG:g} s for one input, a half-written output, a temporary file that stays, or a GiB "
            "of memory.",
            f"{spent:.0f} s in all, {outcome.slowest:.1f} s for the slowest input; the process grew by "
            f"{outcome.growth:.0f} MiB at most while it read one.",
        ],
        order=9,
    )


if __name__ == "__main__":
    sys.exit(main())
