"""What `reconstruct` tells about a reconstruction: figures, a table of them, and a picture of both spectrograms.

Figures and pictures are at 16 kHz, the rate of the model, over the first minute, so that memory does not grow with the
length of the file.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dasheng_tokenizer.audio import Array, AudioReader, resample
from dasheng_tokenizer.errors import AudioError, MissingExtraError, OutputError
from dasheng_tokenizer.evaluation.metrics import magnitude_spectrogram, mel_distance, pesq_wb, si_sdr, stoi
from dasheng_tokenizer.files import atomic_path, parse_json, require_extra, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RATE = 16_000
MEASURED_SECONDS = 60
METRICS = ("mel_distance", "si_sdr", "pesq_wb", "stoi")
_COLUMNS = ("file", "seconds", *METRICS)
_TITLES = {"mel_distance": "mel distance ↓", "si_sdr": "SI-SDR dB ↑", "pesq_wb": "PESQ-WB ↑", "stoi": "STOI ↑"}
_ABOUT = (
    f"Metrics at {RATE} Hz over the first {MEASURED_SECONDS} s of each file, averaged over channels. mel_distance: "
    "7-scale mel distance, smaller is better; si_sdr: dB; pesq_wb: ITU-T P.862.2; stoi: Taal 2011. null: see `missing`."
)


def read_start(path: str | Path, seconds: float = MEASURED_SECONDS) -> Array:
    """Read the beginning of a file at 16 kHz: (channels, samples).

    Raises:
        AudioFileError: it cannot be read; AudioError: NaN, or a rate out of range.
    """
    reader = AudioReader(path)
    wanted = min(reader.num_samples, round(seconds * reader.sampling_rate))
    blocks = reader.blocks()
    parts, held = [], 0
    while held < wanted:
        parts.append(next(blocks))
        held += parts[-1].shape[1]
    return resample(np.concatenate(parts, axis=1)[:, :wanted], reader.sampling_rate, RATE)


def measure(original: Array, decoded: Array) -> dict[str, Any]:
    """All metrics of two clips at 16 kHz, (channels, samples) each.

    Returns:
        Per metric the mean over channels, or None; `measured_seconds`; and `missing`: why a metric has no figure, or
        which channel is left out of it.
    """
    length = min(original.shape[1], decoded.shape[1])
    metrics: dict[str, Callable[..., float]] = {
        "mel_distance": mel_distance,
        "si_sdr": si_sdr,
        "pesq_wb": pesq_wb,
        "stoi": stoi,
    }
    row: dict[str, Any] = {"measured_seconds": round(length / RATE, 3)}
    missing: dict[str, str] = {}
    for name, metric in metrics.items():
        values = []
        for channel, (first, second) in enumerate(zip(original[:, :length], decoded[:, :length], strict=True)):
            try:
                values.append(metric(first, second))
            except (AudioError, MissingExtraError) as error:
                missing[name] = str(error) if len(original) == 1 else f"channel {channel}: {error}"
        row[name] = round(float(np.mean(values)), 4) if values else None
    return row | {"missing": missing}


class Report:
    """The table of a folder: `metrics.json` and `metrics.csv`, written anew after each file."""

    def __init__(self, folder: Path, rows: dict[str, dict[str, Any]]) -> None:
        self.folder = folder
        self.rows = rows  # by file

    @classmethod
    def open(cls, folder: str | Path) -> Report:
        """Go on with the table of an earlier run, or start one.

        Raises:
            OutputError: a `metrics.json` of another kind is in the way.
        """
        path = Path(folder) / "metrics.json"
        if not path.exists():
            return cls(Path(folder), {})
        try:
            rows = parse_json(path.read_text(encoding="utf-8"), finite=False)["files"]
            if not all(_is_figure(row.get(name)) for row in rows for name in METRICS):
                raise ValueError("a figure is no number")
            return cls(Path(folder), {str(row["file"]): row for row in rows})
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise OutputError(f"{path} is no table of this command; move it away or give another -o") from error

    def add(self, row: dict[str, Any]) -> None:
        """Add or replace the row of a file and write the tables.

        Raises:
            OutputError: they cannot be written.
        """
        self.rows[row["file"]] = row
        rows = list(self.rows.values())
        content = {"about": _ABOUT, "mean": self.means(), "files": rows}
        with atomic_path(self.folder / "metrics.json") as temporary:
            write_text(temporary, json.dumps(content, indent=1, ensure_ascii=False))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, [key for key in row if key != "missing"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        with atomic_path(self.folder / "metrics.csv") as temporary:
            write_text(temporary, text.getvalue(), newline="")

    def means(self) -> dict[str, float | None]:
        """Mean of each metric over the files that have it."""
        held = {name: [row[name] for row in self.rows.values() if row.get(name) is not None] for name in METRICS}
        return {name: round(float(np.mean(values)), 4) if values else None for name, values in held.items()}

    def table(self) -> str:
        """Text with one line a file, a line of means, and the reasons of missing figures."""
        rows = [[_cell(row.get(column)) for column in _COLUMNS] for row in self.rows.values()]
        if len(rows) > 1:
            rows.append(["mean", "", *(_cell(value) for value in self.means().values())])
        lines = [["file", "seconds", *_TITLES.values()], *rows]
        widths = [max(len(line[index]) for line in lines) for index in range(len(_COLUMNS))]
        text = [
            "  ".join(cell.rjust(width) if index else cell.ljust(width) for index, (cell, width) in enumerate(pairs))
            for pairs in (list(zip(line, widths, strict=True)) for line in lines)
        ]
        reasons = {f"{name}: {why}" for row in self.rows.values() for name, why in row.get("missing", {}).items()}
        return "\n".join(text + [f"no figure for {reason}" for reason in sorted(reasons)])


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def decibels(audio: Array) -> npt.NDArray[np.float64]:
    """Mixed to one channel, 1024-sample windows every 256: (513, frames) in dB of full scale, floor −100."""
    spectrum = magnitude_spectrogram(audio.mean(axis=0), 1024, 256) / 256  # a full-scale sine has magnitude 256
    return 20 * np.log10(np.maximum(spectrum.T, 1e-5))


def picture(original: Array, decoded: Array, title: str) -> Figure:
    """Spectrograms of two clips at 16 kHz: original above, reconstruction below it, their difference third.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figures = require_extra("matplotlib.figure", "report")
    agg = require_extra("matplotlib.backends.backend_agg", "report")
    length = min(original.shape[1], decoded.shape[1])
    first, second = decibels(original[:, :length]), decibels(decoded[:, :length])
    figure: Figure = figures.Figure(figsize=(10, 8), layout="constrained")
    agg.FigureCanvasAgg(figure)  # its own canvas: no window system, no state shared with the caller's figures
    axes = figure.subplots(3, 1, sharex=True, sharey=True)
    top = max(float(first.max()), -60.0)
    first, second = np.maximum(first, top - 80), np.maximum(second, top - 80)  # differences of what is seen alone
    extent = (0.0, length / RATE, 0.0, RATE / 2000)
    common = {"origin": "lower", "aspect": "auto", "extent": extent, "interpolation": "nearest"}
    panels = (
        ("original", first, {"vmin": top - 80, "vmax": top, "cmap": "magma"}),
        ("reconstruction", second, {"vmin": top - 80, "vmax": top, "cmap": "magma"}),
        ("difference: reconstruction − original", second - first, {"vmin": -30, "vmax": 30, "cmap": "RdBu_r"}),
    )
    for axis, (name, values, style) in zip(axes, panels, strict=True):
        image = axis.imshow(values, **common, **style)
        axis.set_title(name, loc="left", fontsize=10)
        axis.set_ylabel("kHz")
        figure.colorbar(image, ax=axis, label="dB", pad=0.01)
    axes[-1].set_xlabel("seconds")
    # A dollar sign would start a formula, and fonts know no halves of characters.
    figure.suptitle(title.encode(errors="replace").decode().replace("$", r"\$"))
    return figure


def draw(path: Path, original: Array, decoded: Array, title: str) -> None:
    """Write the picture as PNG.

    Raises:
        MissingExtraError: matplotlib is not installed; OutputError: the file cannot be written.
    """
    figure = picture(original, decoded, title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _is_figure(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
