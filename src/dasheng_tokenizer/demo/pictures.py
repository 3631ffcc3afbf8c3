"""Figures of the demo page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from dasheng_tokenizer.files import require_extra
from dasheng_tokenizer.reconstruction_report import RATE, decibels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dasheng_tokenizer.demo.workbench import Clip


def spectrograms(clips: Mapping[str, Clip]) -> Figure:
    """Spectrograms to 8 kHz under each other, on one scale of 80 dB. Args: clips by their titles."""
    figure, axes = _figure(len(clips), 2.4)
    images = [decibels(clip.at_16_khz) for clip in clips.values()]
    top = max(float(images[0].max()), -60.0)
    for axis, title, clip, image in zip(axes, clips, clips.values(), images, strict=True):
        shown = axis.imshow(
            image, cmap="magma", vmin=top - 80, vmax=top, extent=(0.0, clip.seconds, 0.0, RATE / 2000), **_LIKE_A_SCORE
        )
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_ylabel("kHz")
        figure.colorbar(shown, ax=axis, label="dB", pad=0.01)
    axes[-1].set_xlabel("seconds")
    return figure


def latent_picture(latents: Tensor, frame_rate: float) -> Figure:
    """The latent of one channel as a picture. Args: (T, D), and tokens a second."""
    values = latents.float().numpy()  # (T, D)
    spread = values.std(axis=0)
    order = np.argsort(-spread)  # most varied dimensions at the bottom, where the eye begins
    standard = (values - values.mean(axis=0)) / np.maximum(spread, 1e-6)
    figure, axes = _figure(1, 3.2)
    extent = (0.0, len(values) / frame_rate, 0.0, float(values.shape[1]))
    shown = axes[0].imshow(standard[:, order].T, cmap="RdBu_r", vmin=-3, vmax=3, extent=extent, **_LIKE_A_SCORE)
    axes[0].set_title(
        f"latent: {len(values)} tokens of {values.shape[1]} values, each less its mean", loc="left", fontsize=10
    )
    axes[0].set_ylabel("dimensions, by variance")
    axes[0].set_xlabel("seconds")
    figure.colorbar(shown, ax=axes[0], label="standard deviations", pad=0.01)
    return figure


def similarity_picture(similarities: Mapping[str, Tensor], frame_rate: float) -> Figure:
    """Similarity of each moment to each other, one square a part. Args: (T, T) by title, and tokens a second."""
    figures = require_extra("matplotlib.figure", "report")
    figure: Figure = figures.Figure(figsize=(3.4 * len(similarities), 3.6), layout="constrained")
    axes = figure.subplots(1, len(similarities), squeeze=False)[0]
    for axis, (title, values) in zip(axes, similarities.items(), strict=True):
        end = len(values) / frame_rate
        shown = axis.imshow(
            values.numpy(), cmap="viridis", vmin=-0.5, vmax=1, origin="lower", extent=(0.0, end, 0.0, end)
        )
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("seconds")
    figure.colorbar(shown, ax=list(axes), label="cosine", shrink=0.8)
    return figure


_LIKE_A_SCORE: dict[str, Any] = {"origin": "lower", "aspect": "auto", "interpolation": "nearest"}
"""Time to the right, low below."""


def _figure(rows: int, height: float) -> tuple[Figure, Any]:
    figures = require_extra("matplotlib.figure", "report")
    figure: Figure = figures.Figure(figsize=(10, height * rows + 0.3), layout="constrained")
    return figure, figure.subplots(rows, 1, squeeze=False)[:, 0]
