"""Tables of figures of enhancement: all noisy inputs, by ratio, by type of noise, clean input, input without speech."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dasheng_tokenizer.evaluation.enhancement import SILENCE, Outcome
from dasheng_tokenizer.evaluation.enhancement_inputs import CLEAN, UNKNOWN
from dasheng_tokenizer.evaluation.enhancement_systems import UNPROCESSED
from dasheng_tokenizer.evaluation.frechet import RESAMPLES, Estimate, bootstrap
from dasheng_tokenizer.evaluation.reconstruction import Row
from dasheng_tokenizer.evaluation.report import Report, Table
from dasheng_tokenizer.files import atomic_path, write_text

NAME, CSV_NAME = "enhancement.json", "enhancement.csv"

NOISY, CLEAN_INPUT, OTHER = "all noisy inputs", "clean speech as the input", "other types"

MOST_RATIOS = 8
BIN_DB = 5
"""With more different ratios than this, they are taken together in ranges of so many dB."""

MOST_TYPES = 12
"""Types of noise with a group of their own, the commonest; the others are one group."""

MOST_REASONS = 20

INTERVAL = (
    "mean [95 % interval by bootstrap over clean clips, all inputs of a clip together]; in brackets how many inputs "
    "have no figure; – where none has one"
)

DNSMOS = "DNSMOS P.835: judges a clip alone, 1 to 5; that of the clean clips is in the row of unprocessed clean speech."

Counts = tuple[float, float]
"""Sum of a figure over some inputs, and its weight: their number, or for WER their words."""


@dataclass(frozen=True)
class Figure:
    """A column: its name in rows, its heading, and how a row counts; None where it has no figure."""

    name: str
    heading: str
    counts: Callable[[Row], Counts | None]
    digits: int = 3


@dataclass(frozen=True)
class Mean:
    """Mean of a figure over the inputs of a group, of one system or as a difference to another.

    Attributes:
        group: of inputs.
        system: that made it.
        column: name of the figure.
        less: the system whose figure is taken off, input by input; None: none.
        estimate: mean and interval; None where there is no figure; ends equal to the mean where one clip is all.
        values: number of inputs with a figure.
        missing: number of those that should have one and have none.
    """

    group: str
    system: str
    column: str
    less: str | None
    estimate: Estimate | None
    values: int
    missing: int

    def text(self, digits: int) -> str:
        """For a table."""
        missing = f" ({self.missing} missing)" if self.missing and self.values else ""
        if self.estimate is None:
            return "–"
        sign = "+" if self.less is not None else ""
        numbers = [f"{value:{sign}.{digits}f}" for value in asdict(self.estimate).values()]
        spread = f" [{numbers[1]}, {numbers[2]}]" if self.estimate.low < self.estimate.high else ""
        return f"{numbers[0]}{spread}{missing}"


class Tables:
    """All tables of an outcome.

    Args:
        outcome: what was measured.
        seed: of the bootstrap.
        resamples: of the bootstrap.
    """

    def __init__(self, outcome: Outcome, seed: int = 0, resamples: int = RESAMPLES) -> None:
        self.outcome, self.seed, self.resamples = outcome, seed, resamples
        columns = [column for metric in outcome.metrics for column in metric.columns if column.applies("speech")]
        self.figures = [Figure(column.name, column.heading, _plain(column.name)) for column in columns]
        if any("words" in row for row in outcome.rows):
            self.figures.append(Figure("wer", "WER % ↓", _word_errors, 1))
        self.systems = [system.name for system in outcome.systems]
        self.ceilings = [system.name for system in outcome.systems if system.from_clean]
        self.by_ratio = _ratio_groups(outcome.rows)
        self.by_noise = _noise_groups(outcome.rows)
        self._rows: dict[str, dict[str, dict[str, Row]]] = {}  # group → system → file
        for row in outcome.rows:
            groups = [CLEAN_INPUT] if row["snr_db"] == CLEAN else [NOISY, self.by_ratio[row["file"]]]
            groups += [] if row["snr_db"] == CLEAN else [self.by_noise[row["file"]]]
            for group in groups:
                self._rows.setdefault(group, {}).setdefault(row["system"], {})[row["file"]] = row

    @property
    def ratios(self) -> list[str]:
        """Groups by ratio, the least first."""
        return list(dict.fromkeys(self.by_ratio.values()))

    @property
    def noises(self) -> list[str]:
        """Groups by type of noise, the commonest first."""
        return list(dict.fromkeys(self.by_noise.values()))

    def mean(self, group: str, system: str, figure: Figure, less: str | None = None) -> Mean:
        """Mean over a group, or mean difference over the inputs of it for which both systems have a figure."""
        rows, others = (self._rows.get(group, {}).get(name or "", {}) for name in (system, less))
        by_clip: dict[str, list[float]] = {}
        values = missing = 0
        for file, row in rows.items():
            other = others.get(file)
            counts = figure.counts(row)
            taken = (0.0, 0.0) if less is None else figure.counts(other) if other else None
            if counts is None or taken is None:
                missing += any(figure.name in held["missing"] for held in (row, other) if held)
                continue
            held = by_clip.setdefault(row["clip"], [0.0, 0.0])
            held[0] += counts[0] - taken[0]
            held[1] += counts[1]
            values += 1
        estimate = self._estimate(np.array(list(by_clip.values()))) if by_clip else None
        return Mean(group, system, figure.name, less, estimate, values, missing)

    def _estimate(self, held: np.ndarray) -> Estimate:
        sums, weights = held.T
        if len(held) == 1:
            value = float(sums[0] / weights[0])
            return Estimate(value, value, value)
        return bootstrap(
            lambda counts: float(counts @ sums / (counts @ weights)), [len(held)], self.resamples, self.seed
        )

    def tables(self) -> list[Table]:
        """All that have rows."""
        compared = [name for name in self.systems if name not in (UNPROCESSED, *self.ceilings)]
        made = []
        if NOISY in self._rows:
            made = [
                self._table(f"All noisy inputs: {INTERVAL}", [NOISY], self.systems),
                self._table("Difference to the unprocessed input", [NOISY, *self.ratios], compared, UNPROCESSED),
                self._table("By signal-to-noise ratio", self.ratios, self.systems),
            ]
            if len(self.noises) > 1:
                made.append(self._table("By type of noise", self.noises, self.systems))
        if CLEAN_INPUT in self._rows:
            made.append(self._table("Clean speech as the input", [CLEAN_INPUT], self.systems))
            made += [
                self._table(f"Clean speech as the input: difference to {ceiling}", [CLEAN_INPUT], compared, ceiling)
                for ceiling in self.ceilings
            ]
        return [table for table in [*made, self._level_table()] if table.rows]

    def _table(self, caption: str, groups: Sequence[str], systems: Sequence[str], less: str | None = None) -> Table:
        several = len(groups) > 1
        lines: list[list[str | float | int]] = []
        for group in groups:
            for system in systems:
                count = len(self._rows.get(group, {}).get(system, {}))
                cells = [self.mean(group, system, figure, less).text(figure.digits) for figure in self.figures]
                lines.append([*([group] if several else []), system, count, *cells])
        headings = [figure.heading for figure in self.figures]
        return Table(caption, [*(["input"] if several else []), "system", "inputs", *headings], lines)

    def _level_table(self) -> Table:
        """Levels of inputs without speech, before and after."""
        rows: list[list[str | float | int]] = []
        for system in dict.fromkeys(level.system for level in self.outcome.levels):
            held = [level for level in self.outcome.levels if level.system == system and level.after is not None]
            silence = [level.after for level in held if level.name == SILENCE]
            noise = [level for level in held if level.name != SILENCE]
            after = [f"{np.mean([level.after for level in noise]):.1f}" if noise else "–"]
            fall = [level.before - level.after for level in noise if level.after is not None]
            rows.append(
                [
                    system,
                    f"{silence[0]:.1f}" if silence else "–",
                    len(noise),
                    f"{np.mean([level.before for level in noise]):.1f}" if noise else "–",
                    *after,
                    f"{np.mean(fall):.1f} [{min(fall):.1f} … {max(fall):.1f}]" if fall else "–",
                ]
            )
        caption = "Input without speech: level in dB of full scale, root mean square; −100 is that or less"
        columns = ["system", "of silence", "clips of noise", "noise before", "noise after", "attenuation dB"]
        return Table(caption, [*columns[:-1], f"{columns[-1]}, mean [least … most]"], rows)

    def report(self, title: str, command: str, data: str, seed: int) -> Report:
        """The summary in the form of `docs/reports`."""
        return Report(title, command, data, seed, self.tables(), self.notes(), order=6)

    def notes(self) -> list[str]:
        """What a reader of the figures must know."""
        metrics = (DNSMOS if metric.name == "dnsmos" else metric.about for metric in self.outcome.metrics)
        notes = ["Figures at 16 kHz, one channel, against the clean clip.", *metrics]
        notes += self.outcome.notes
        if self.outcome.versions:
            held = ", ".join(f"{name} {value}" for name, value in self.outcome.versions.items())
            notes.append(f"Versions: {held}")
        return [*notes, *self._missing()]

    def _missing(self) -> Iterator[str]:
        """The reasons of missing figures with their counts, the commonest first."""
        reasons: Counter[str] = Counter()
        for row in self.outcome.rows:
            found = {"": row["error"]} if row["error"] else row["missing"]
            reasons.update(f"{row['system']}, {name}: {why}".replace(", :", ":") for name, why in found.items())
        for reason, count in reasons.most_common(MOST_REASONS):
            yield f"Missing for {count} {'input' if count == 1 else 'inputs'}: {reason}"
        if len(reasons) > MOST_REASONS:
            yield f"{len(reasons) - MOST_REASONS} more reasons of missing figures are in {NAME}."
        for name, reason in list(self.outcome.failures.items())[:MOST_REASONS]:
            yield f"Left out: {name}: {reason}"
        if len(self.outcome.failures) > MOST_REASONS:
            yield f"{len(self.outcome.failures) - MOST_REASONS} more inputs were left out; {NAME} names them."

    def save(self, folder: Path) -> None:
        """Write `enhancement.json` and `enhancement.csv`, each whole or not at all.

        Raises:
            OutputError: they cannot be written.
        """
        rows = [row | {"snr_db": "clean" if row["snr_db"] == CLEAN else row["snr_db"]} for row in self.outcome.rows]
        content = {
            "notes": self.notes(),
            "versions": self.outcome.versions,
            "systems": self.systems,
            "tables": [asdict(table) for table in self.tables()],
            "failures": self.outcome.failures,
            "levels": [asdict(level) for level in self.outcome.levels],
            "rows": rows,
        }
        with atomic_path(folder / NAME) as temporary:
            write_text(temporary, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        text = io.StringIO(newline="")
        facts = ["system", "file", "clip", "snr_db", "noise", "seconds"]
        figures = [column.name for metric in self.outcome.metrics for column in metric.columns]
        more = ["heard", "errors", "words"] if any("words" in row for row in rows) else []
        writer = csv.writer(text)
        writer.writerow([*facts, *figures, *more, "missing", "error"])
        for row in rows:
            missing = "; ".join(f"{name}: {reason}" for name, reason in row["missing"].items())
            writer.writerow([*(row.get(name) for name in (*facts, *figures, *more)), missing, row["error"]])
        with atomic_path(folder / CSV_NAME) as temporary:
            write_text(temporary, text.getvalue(), newline="")


def _plain(name: str) -> Callable[[Row], Counts | None]:
    return lambda row: None if row[name] is None else (row[name], 1.0)


def _word_errors(row: Row) -> Counts | None:
    return (100.0 * row["errors"], float(row["words"])) if row.get("words") else None


def _ratio_groups(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Group by file of noisy inputs, in the order of the ratios."""
    ratios = {row["file"]: row["snr_db"] for row in rows if row["snr_db"] != CLEAN}
    order = sorted(ratios, key=lambda file: math.inf if ratios[file] is None else ratios[file])
    several = len(set(ratios.values())) > MOST_RATIOS

    def name(ratio: float | None) -> str:
        if ratio is None:
            return f"{UNKNOWN} ratio"
        low = BIN_DB * math.floor(ratio / BIN_DB)
        return f"{low} to {low + BIN_DB} dB" if several else f"{ratio:g} dB"

    return {file: name(ratios[file]) for file in order}


def _noise_groups(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Group by file of noisy inputs, the commonest type first."""
    types = {row["file"]: row["noise"] for row in rows if row["snr_db"] != CLEAN}
    common = [name for name, _ in Counter(types.values()).most_common()]
    kept = common if len(common) <= MOST_TYPES else common[: MOST_TYPES - 1]
    place = {name: number for number, name in enumerate(kept)}
    order = sorted(types, key=lambda file: place.get(types[file], len(kept)))
    return {file: types[file] if types[file] in place else OTHER for file in order}
