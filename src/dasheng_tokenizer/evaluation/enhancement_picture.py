"""The picture of an evaluation of enhancement: figures by ratio, and spectrograms of some clips."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dasheng_tokenizer.evaluation.enhancement_inputs import RATE, Example, ExampleSet
from dasheng_tokenizer.evaluation.enhancement_systems import UNPROCESSED, System
from dasheng_tokenizer.evaluation.enhancement_tables import Figure, Tables
from dasheng_tokenizer.evaluation.metrics import magnitude_spectrogram
from dasheng_tokenizer.files import atomic_path, make_folder, require_extra

SHOWN = 3
"""Clips with spectrograms."""

SHOWN_SECONDS = 4.0
WINDOW, HOP = 512, 128
"""Of the spectrograms: seconds from the beginning; samples at 16 kHz."""

RANGE_DB = 80.0

CURVES = ("pesq_wb", "dnsmos_ovr", "stoi")
"""Figures that have a curve, as far as they were measured; without any of them the first two that were."""

Samples = npt.NDArray[np.float32]


def draw(path: Path, tables: Tables, examples: ExampleSet, systems: Sequence[System]) -> None:
    """Draw it: above a curve a system for some figures, below the input, what systems made of it, and the clean clip.

    Args:
        path: of the PNG.
        tables: of the evaluation.
        examples: that were measured; some are shown.
        systems: that were compared.

    Raises:
        OutputError: the file cannot be written. MissingExtraError: matplotlib is not installed.
    """
    figure_module = require_extra("matplotlib.figure", "report")
    shown = _shown(tables, examples)
    curves = [figure for name in CURVES for figure in tables.figures if figure.name == name] or tables.figures[:2]
    figure = figure_module.Figure(figsize=(11, 3.6 + 2.0 * len(shown)), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[3.6, max(2.0 * len(shown), 0.1)])
    for axes, chosen in zip(np.atleast_1d(above.subplots(1, len(curves))), curves, strict=True):
        _curve(axes, tables, chosen)
    handles, labels = above.axes[0].get_legend_handles_labels()
    above.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    heard = [system for system in systems if not system.from_clean]
    if shown:
        grid = below.subplots(len(shown), len(heard) + 1, sharey=True, squeeze=False)
        for row, example in zip(grid, shown, strict=True):
            clips = {system.name: system.process(example.noisy) for system in heard} | {"clean": example.clean}
            for axes, (name, audio) in zip(row, clips.items(), strict=True):
                _spectrogram(axes, audio, name if example is shown[0] else "", example.clean)
            row[0].set_ylabel(f"{example.key}\n{example.noise}\nkHz", fontsize="x-small")
    make_folder(path.parent)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _shown(tables: Tables, examples: ExampleSet) -> list[Example]:
    """Some examples that all systems could process, spread over the ratios, of different clips."""
    broken = {row["file"] for row in tables.outcome.rows if row["error"]}
    files = [file for file in tables.by_ratio if file not in broken]
    clips = {row["file"]: row["clip"] for row in tables.outcome.rows}
    seconds = {row["file"]: row["seconds"] or 0.0 for row in tables.outcome.rows}
    chosen: list[str] = []
    for ratio in [tables.ratios[index] for index in _spread(len(tables.ratios))]:
        used = {clips[file] for file in chosen}
        found = [file for file in files if tables.by_ratio[file] == ratio and clips[file] not in used]
        if found:
            chosen.append(max(found, key=lambda file: min(seconds[file], SHOWN_SECONDS)))  # of equals the first
    held = {example.key: example for example in examples.examples() if example.key in chosen}
    return [held[key] for key in chosen]


def _spread(count: int) -> list[int]:
    """Places spread over so many, the first and the last among them."""
    return sorted(set(np.linspace(0, count - 1, min(SHOWN, count)).round().astype(int).tolist()))


def _curve(axes: Any, tables: Tables, figure: Figure) -> None:
    """A line a system over the groups of ratios, its intervals as whiskers."""
    places = range(len(tables.ratios))
    for number, system in enumerate(tables.systems):
        means = [tables.mean(group, system, figure).estimate for group in tables.ratios]
        points = [(place, mean) for place, mean in zip(places, means, strict=True) if mean is not None]
        if not points:
            continue
        values = [mean.value for _, mean in points]
        spread = [[mean.value - mean.low for _, mean in points], [mean.high - mean.value for _, mean in points]]
        style = {"linestyle": "--"} if system in tables.ceilings else {"marker": "o", "markersize": 4}
        if system == UNPROCESSED:
            style["color"] = "0.4"
        moved = [place + 0.03 * (number - len(tables.systems) / 2) for place, _ in points]
        axes.errorbar(moved, values, np.abs(spread), label=system, capsize=2, linewidth=1.2, **style)
    axes.set_xticks(list(places), tables.ratios)
    axes.set_title(figure.heading, fontsize="medium")
    axes.tick_params(labelsize="small")
    axes.grid(alpha=0.3)


def _spectrogram(axes: Any, audio: Samples, title: str, reference: Samples) -> None:
    """Levels in dB below the loudest bin of the clean clip."""
    cut = slice(int(SHOWN_SECONDS * RATE))
    magnitude, clean = (magnitude_spectrogram(clip[cut], WINDOW, HOP) for clip in (audio, reference))
    loudest = max(float(clean.max()), 1e-9)
    levels = 20 * np.log10(np.maximum(magnitude.T / loudest, 1e-9))
    extent = (0, audio[cut].size / RATE, 0, RATE / 2000)
    axes.imshow(levels, origin="lower", aspect="auto", extent=extent, vmin=-RANGE_DB, vmax=0, cmap="magma")
    axes.set_title(title, fontsize="x-small")
    axes.tick_params(labelsize="x-small")
