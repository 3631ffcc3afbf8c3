"""Reports: the JSON form from which `docs/make_results.py` makes the results page, and tables in Markdown."""

from __future__ import annotations

import datetime
import json
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dasheng_tokenizer.files import atomic_path, make_folder, write_text


@dataclass
class Table:
    """A caption, column names and rows of cells."""

    caption: str
    columns: list[str]
    rows: list[list[str | float | int]]

    def markdown(self) -> str:
        """The table in Markdown, its caption in bold above it."""
        numeric = [any(isinstance(row[index], (int, float)) for row in self.rows) for index in range(len(self.columns))]
        rule = ["---:" if right else "---" for right in numeric]
        lines = [self.columns, rule, *(list(map(_cell, row)) for row in self.rows)]
        caption = f"**{self.caption}**\n\n" if self.caption else ""
        return caption + "\n".join(f"| {' | '.join(map(_escape, line))} |" for line in lines)


@dataclass
class Report:
    """Figures and everything needed to make them again."""

    title: str
    command: str
    data: str
    seed: int
    tables: list[Table]
    notes: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    order: int = 0
    hardware: str = ""
    date: str = ""

    def save(self, path: Path) -> None:
        """Write the report, with hardware and date of now where they are not given.

        Raises:
            OutputError: it cannot be written.
        """
        self.hardware = self.hardware or hardware()
        self.date = self.date or datetime.date.today().isoformat()
        make_folder(path.parent)
        with atomic_path(path) as temporary:
            write_text(temporary, json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")

    def markdown(self) -> str:
        """Title, tables and notes in Markdown."""
        tables = [table.markdown() for table in self.tables]
        notes = "\n".join(f"- {note}" for note in self.notes)
        return "\n\n".join([f"## {self.title}", *tables, *([notes] if notes else [])])


def hardware() -> str:
    """Processor, cores and torch build of this machine."""
    import torch

    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads{gpu}, torch {torch.__version__}"


def _cell(value: str | float | int) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _escape(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")
