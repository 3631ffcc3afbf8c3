"""The JSON form of a report, from which `docs/make_results.py` makes the results page."""

from __future__ import annotations

import datetime
import json
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dasheng_tokenizer.files import atomic_path, make_folder


@dataclass
class Table:
    """A caption, column names and rows of cells."""

    caption: str
    columns: list[str]
    rows: list[list[str | float | int]]


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
        """Write the report, with hardware and date of now where they are not given."""
        self.hardware = self.hardware or hardware()
        self.date = self.date or datetime.date.today().isoformat()
        make_folder(path.parent)
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


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
