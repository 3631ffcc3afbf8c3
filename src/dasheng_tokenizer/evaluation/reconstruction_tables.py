"""Tables of reconstruction figures: file by file, and means with their intervals by domain."""

from __future__ import annotations

import csv
import io
import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dasheng_tokenizer.errors import OutputError
from dasheng_tokenizer.evaluation.metric_columns import SPEECH, Column
from dasheng_tokenizer.evaluation.model_metrics import EXTRA
from dasheng_tokenizer.evaluation.reconstruction import Outcome, Row
from dasheng_tokenizer.evaluation.reconstruction_inputs import LENGTH_TOLERANCE
from dasheng_tokenizer.evaluation.report import Report, Table
from dasheng_tokenizer.files import atomic_path, make_folder, output_error, require_extra, write_text

NAME = "reconstruction.json"
CSV_NAME = "reconstruction.csv"
ALL = "all domains"
MOST_REASONS = 20
INTERVAL = "mean ± 95 % interval of the mean (Student's t); in brackets the number of values, and of missing ones"


@dataclass(frozen=True)
class Mean:
    """Mean of one column over the clips of one system and domain.

    Attributes:
        mean: None where there is no value.
        interval: half the width of the 95 % interval of the mean by Student's t; None for fewer than two values.
        values: number of clips with a value.
        missing: number of clips that should have a value and have none.
    """

    system: str
    domain: str
    column: str
    mean: float | None
    interval: float | None
    values: int
    missing: int

    def __str__(self) -> str:
        """For a table."""
        count = f"({self.values}, {self.missing} missing)" if self.missing else f"({self.values})"
        if self.mean is None:
            return f"– {count}" if self.missing else "–"
        spread = "" if self.interval is None else f" ± {self.interval:.3f}"
        return f"{self.mean:.3f}{spread} {count}"


def mean_of(rows: Sequence[Row], system: str, domain: str, column: str) -> Mean:
    """Mean and interval over rows.

    Raises:
        MissingExtraError: scipy is not installed.
    """
    values = [row[column] for row in rows if row[column] is not None]
    missing = sum(column in row["missing"] for row in rows)
    mean = float(np.mean(values)) if values else None
    interval = None
    if len(values) > 1:
        quantile = float(require_extra("scipy.stats", EXTRA).t.ppf(0.975, len(values) - 1))
        interval = quantile * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Mean(system, domain, column, mean, interval, len(values), missing)


class Tables:
    """All tables of an outcome."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.columns: list[Column] = [column for metric in outcome.metrics for column in metric.columns]
        found = sorted({row["domain"] for row in outcome.rows})
        self.domains = [*found, ALL] if len(found) > 1 else found

    def means(self) -> list[Mean]:
        """Of each domain, system and column."""
        return [
            mean_of(self._rows(domain, system.name), system.name, domain, column.name)
            for domain in self.domains
            for system in self.outcome.systems
            for column in self.columns
        ]

    def save(self, folder: Path) -> None:
        """Write `reconstruction.json` and `reconstruction.csv`, each whole or not at all.

        Raises:
            OutputError: they cannot be written.
        """
        content = {
            "about": INTERVAL,
            "notes": self.notes(),
            "versions": self.outcome.versions,
            "systems": [vars(system) for system in self.outcome.systems],
            "means": [vars(mean) for mean in self.means()],
            "failures": self.outcome.failures,
            "files": self.outcome.rows,
        }
        with atomic_path(folder / NAME) as temporary:
            write_text(temporary, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        text = io.StringIO(newline="")
        figures = [column.name for column in self.columns]
        writer = csv.writer(text)
        writer.writerow(["system", "file", "domain", "seconds", "bits", "cut_samples", *figures, "missing", "error"])
        for row in self.outcome.rows:
            missing = "; ".join(f"{name}: {reason}" for name, reason in row["missing"].items())
            facts = [row[name] for name in ("system", "file", "domain", "seconds", "bits", "cut_samples", *figures)]
            writer.writerow([*facts, missing, row["error"]])
        with atomic_path(folder / CSV_NAME) as temporary:
            write_text(temporary, text.getvalue(), newline="")

    def report(self, title: str, command: str, data: str) -> Report:
        """The summary in the form of `docs/reports`: one table a domain, then one of all together."""
        return Report(title, command, data, seed=0, tables=list(map(self._table, self.domains)), notes=self.notes())

    def notes(self) -> list[str]:
        """What a reader of the figures must know."""
        rows, metrics = self.outcome.rows, self.outcome.metrics
        notes = [f"{INTERVAL[0].upper()}{INTERVAL[1:]}. Figures at 16 kHz, one channel.", *(m.about for m in metrics)]
        notes += [system.about for system in self.outcome.systems if system.about]
        if self.outcome.versions:
            notes.append("Versions: " + ", ".join(f"{name} {value}" for name, value in self.outcome.versions.items()))
        if any(c.domains == "speech" for c in self.columns) and all(row["domain"] != SPEECH for row in rows):
            notes.append("No clip has the domain speech, so figures of speech are absent; --domain speech sets it.")
        cut = sum(bool(row["cut_samples"]) for row in rows)
        if cut:
            limit = f"{1000 * LENGTH_TOLERANCE:g} ms"
            notes.append(f"{cut} pairs differ in length by at most {limit}; the longer file was cut.")
        return [*notes, *self._missing()]

    def _missing(self) -> Iterator[str]:
        """The reasons of missing figures with their counts, the commonest first."""
        reasons: Counter[str] = Counter()
        for row in self.outcome.rows:
            if row["error"]:
                reasons[f"{row['system']}: {row['error']}"] += 1
                continue
            reasons.update(f"{row['system']}, {name}: {reason}" for name, reason in row["missing"].items())
        for reason, count in reasons.most_common(MOST_REASONS):
            yield f"Missing for {count} {'clip' if count == 1 else 'clips'}: {reason}"
        if len(reasons) > MOST_REASONS:
            yield f"{len(reasons) - MOST_REASONS} more reasons of missing figures are in {NAME}."
        for name, reason in list(self.outcome.failures.items())[:MOST_REASONS]:
            yield f"Left out: {name}: {reason}"
        if len(self.outcome.failures) > MOST_REASONS:
            yield f"{len(self.outcome.failures) - MOST_REASONS} more inputs were left out; {NAME} names them."

    def _rows(self, domain: str, system: str) -> list[Row]:
        return [row for row in self.outcome.rows if row["system"] == system and domain in (ALL, row["domain"])]

    def _table(self, domain: str) -> Table:
        shown = [column for column in self.columns if domain == ALL or column.applies(domain)]
        lines: list[list[str | float | int]] = []
        for system in self.outcome.systems:
            rows = self._rows(domain, system.name)
            rate = "–" if system.frame_rate is None else f"{system.frame_rate:g}"
            cells = [str(mean_of(rows, system.name, domain, column.name)) for column in shown]
            lines.append([system.name, len(rows), _kbits(rows), rate, *cells])
        headings = [column.heading for column in shown]
        return Table(domain, ["system", "clips", "kbit/s", "frames/s", *headings], lines)


def _kbits(rows: Sequence[Row]) -> str:
    """Bits of all clips over their seconds."""
    coded: list[dict[str, Any]] = [row for row in rows if row["bits"] is not None]
    seconds = sum(row["seconds"] for row in coded)
    return f"{sum(row['bits'] for row in coded) / seconds / 1000:.2f}" if seconds else "–"


def check_writable(path: Path) -> None:
    """See before a long run that a file can be written at its end.

    Raises:
        OutputError: a folder has its name, or its folder cannot be made or written to.
    """
    if path.is_dir():
        raise OutputError(f"cannot write {path}: a folder of that name is in the way; choose another name")
    make_folder(path.parent)
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise output_error(path, error) from error
