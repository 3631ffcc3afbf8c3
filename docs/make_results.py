"""Makes `docs/results.md` from the reports in `docs/reports`, so that no figure on it is typed by hand.

    python docs/make_results.py            # write results.md
    python docs/make_results.py --check    # exit 1 when results.md is not what the reports give

A report is a JSON object. `title`, `command`, `data`, `hardware`, `seed`, `date` say where its figures come from;
`tables` is a list of {"caption", "columns", "rows"}. Optional: `notes` (texts), `pictures` (paths relative to `docs`)
and `order` (a number; reports go by it, then by file name). A picture NAME.png beside NAME.json is shown, too.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
FACTS = ("command", "data", "hardware", "seed", "date")
OPTIONAL: dict[str, Any] = {"notes": [], "pictures": [], "order": 0}
TABLE_KEYS = {"caption", "columns", "rows"}

HEAD = """# Results

This page is made by `docs/make_results.py` from the files in `docs/reports`; do not edit it. Each section names the
command that makes its figures again.
"""

EMPTY = "\nThere are no reports yet.\n"


class ReportError(ValueError):
    """A report that cannot be shown; the message names the file and what is wrong with it."""


def read_report(path: Path, docs: Path) -> dict[str, Any]:
    """Read one report and check it.

    Args:
        path: JSON file.
        docs: folder that the paths of pictures are relative to.

    Raises:
        ReportError: no JSON, a key missing, unknown or of a wrong type, a row of wrong length, an absent picture.
    """
    name = path.name
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(f"{name}: cannot be read as JSON ({error})") from error
    _require(isinstance(report, dict), f"{name}: a report is a JSON object")
    wanted = {"title", "tables", *FACTS}
    missing, unknown = sorted(wanted - report.keys()), sorted(report.keys() - wanted - OPTIONAL.keys())
    _require(not missing, f"{name}: missing {', '.join(missing)}")
    _require(not unknown, f"{name}: unknown key {', '.join(unknown)}")
    report = {**OPTIONAL, **report}
    _require(isinstance(report["title"], str) and bool(report["title"]), f"{name}: title must be a text")
    for key in FACTS:
        _require(isinstance(report[key], (str, int)) and report[key] != "", f"{name}: {key} must be a text or a number")
    for key in ("notes", "pictures"):
        texts = report[key]
        good = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
        _require(good, f"{name}: {key} must be a list of texts")
    order = report["order"]
    _require(isinstance(order, (int, float)) and math.isfinite(order), f"{name}: order must be a finite number")
    _require(isinstance(report["tables"], list), f"{name}: tables must be a list")
    for number, table in enumerate(report["tables"], start=1):
        _check_table(table, f"{name}: table {number}")
    beside = path.with_suffix(".png")
    if beside.is_file():
        report["pictures"] = [*report["pictures"], beside.relative_to(docs).as_posix()]
    for picture in report["pictures"]:
        _require((docs / picture).is_file(), f"{name}: there is no picture {picture}")
    return report


def read_reports(docs: Path = DOCS) -> list[dict[str, Any]]:
    """All reports of `docs/reports`, by `order`, then by file name.

    Raises:
        ReportError: as `read_report`.
    """
    paths = sorted((docs / "reports").glob("*.json"))
    return sorted((read_report(path, docs) for path in paths), key=lambda report: report["order"])  # stable


def results_page(reports: Sequence[Mapping[str, Any]]) -> str:
    """The Markdown of the results page."""
    return HEAD + ("\n" + "\n".join(map(_section, reports)) if reports else EMPTY)


def main(arguments: Sequence[str] | None = None, docs: Path = DOCS) -> int:
    """Write the page, or check it. Returns the exit code: 1 for a broken report or a page that is out of date."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the page is out of date")
    options = parser.parse_args(arguments)
    page = docs / "results.md"
    try:
        text = results_page(read_reports(docs))
    except ReportError as error:
        print(f"error: {docs / 'reports'}: {error}", file=sys.stderr)
        return 1
    if not options.check:
        from dasheng_tokenizer.files import atomic_path  # here: a check needs no torch, which the package imports

        with atomic_path(page) as temporary:
            temporary.write_text(text, encoding="utf-8")
    elif not page.is_file() or page.read_text(encoding="utf-8") != text:
        print(f"error: {page} is out of date; run: python docs/make_results.py", file=sys.stderr)
        return 1
    return 0


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ReportError(message)


def _check_table(table: Any, name: str) -> None:
    _require(isinstance(table, dict) and set(table) == TABLE_KEYS, f"{name} must have caption, columns and rows alone")
    columns, rows = table["columns"], table["rows"]
    _require(isinstance(table["caption"], str), f"{name}: caption must be a text")
    good = isinstance(columns, list) and bool(columns) and all(isinstance(column, str) for column in columns)
    _require(good, f"{name}: columns must be a list of texts")
    _require(isinstance(rows, list), f"{name}: rows must be a list")
    for number, row in enumerate(rows, start=1):
        _require(isinstance(row, list), f"{name}, row {number} must be a list")
        _require(len(row) == len(columns), f"{name}, row {number} has {len(row)} cells for {len(columns)} columns")
        for cell in row:
            plain = cell is None or isinstance(cell, (str, int, float))
            _require(plain, f"{name}, row {number}: {cell!r} is no text, number or null")
            finite = not isinstance(cell, float) or math.isfinite(cell)
            _require(finite, f"{name}, row {number}: {cell} is not finite; write null where there is no figure")


def _section(report: Mapping[str, Any]) -> str:
    lines = [f"## {_line(report['title'])}", "", f"- command: `{_line(report['command'])}`"]
    lines += [f"- {key}: {_line(report[key])}" for key in FACTS[1:]] + [""]
    for table in report["tables"]:
        lines += [*_table(table), ""]
    lines += [f"![{Path(picture).stem}]({picture})\n" for picture in report["pictures"]]
    if report["notes"]:
        lines += [*(f"- {_line(note)}" for note in report["notes"]), ""]
    return "\n".join(lines)


def _table(table: Mapping[str, Any]) -> list[str]:
    rows: list[list[Any]] = table["rows"]
    columns: list[str] = table["columns"]
    # The first column holds names as a rule; the others are aligned right as soon as they hold a number.
    numeric = [any(isinstance(row[k], (int, float)) for row in rows) for k in range(len(columns))]
    rule = ["---:" if right else "---" for right in numeric]
    body = [columns, rule, *([_cell(cell) for cell in row] for row in rows)]
    caption = [f"**{_line(table['caption'])}**", ""] if table["caption"] else []
    cells = [[cell.replace("|", r"\|") for cell in map(_line, line)] for line in body]
    return caption + [f"| {' | '.join(line)} |" for line in cells]


def _cell(value: Any) -> str:
    """Rounding is the report's business; six digits only keep float noise out."""
    if value is None:
        return "–"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _line(value: Any) -> str:
    return " ".join(str(value).split())


if __name__ == "__main__":
    sys.exit(main())
