"""Altered copies of real clips, from which a judge of generated clips learns what does not make the class.

A probe that is taught by a few hundred clips of a few kits and packages learns their loudness, their room, their
microphone and the traces of what they were stored with. Copies of another speed, level, colour, length and noise floor,
some of them through the tokenizer, which every generated clip has been through, take that away. No generated clip is
looked at.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from dasheng_tokenizer import DashengTokenizerModel, save_audio
from dasheng_tokenizer.audio import resample
from dasheng_tokenizer.evaluation.generation_clips import MANIFEST, write_manifest
from dasheng_tokenizer.spectral import SAMPLING_RATE
from dasheng_tokenizer.training.clips import read_clips

Samples = npt.NDArray[np.float32]

LABELS = ("drum", "event")

PEAK = 0.7


def write_copies(source: Path, folder: Path, copies: int, tokenizer: DashengTokenizerModel) -> None:
    """Copies of the labelled clips of a shard, with their labels, unless they are there."""
    if (folder / MANIFEST).is_file():
        return
    rows = []
    for number, clip in enumerate(read_clips([source])):
        inner = clip.labels.get("labels") or {}
        labels = {name: inner[name] for name in LABELS if inner.get(name)}
        for copy in range(copies if labels else 0):
            name = f"{number:04d}.{copy}.flac"
            audio = altered(clip.audio, np.random.default_rng([number, copy]), tokenizer)
            save_audio(folder / name, audio, SAMPLING_RATE)
            rows.append({"file": name, "labels": labels})
    write_manifest(folder, rows)


def altered(audio: Samples, rng: np.random.Generator, tokenizer: DashengTokenizerModel) -> Samples:
    """Another recording of the same thing, as far as filters can make one."""
    audio = resample(audio, round(SAMPLING_RATE * float(np.exp(rng.uniform(-0.13, 0.13)))), SAMPLING_RATE)
    audio = _coloured(audio, rng)
    if rng.random() < 0.4:  # decays faster or slower
        audio = audio * np.exp(-rng.uniform(-3, 6) * np.arange(len(audio)) / SAMPLING_RATE)
    if rng.random() < 0.5:
        audio = np.pad(audio, (round(rng.uniform(0, 0.08) * SAMPLING_RATE), round(rng.uniform(0, 0.3) * SAMPLING_RATE)))
    audio = audio * (PEAK / max(1e-6, float(np.abs(audio).max()))) * 10 ** (rng.uniform(-14, 2) / 20)
    if rng.random() < 0.6:
        floor = float(np.abs(audio).max()) * 10 ** (-rng.uniform(45, 75) / 20)
        audio = audio + floor * rng.standard_normal(len(audio))
    audio = np.clip(audio, -1, 1).astype(np.float32)
    if rng.random() < 0.6:
        with torch.inference_mode():
            audio = tokenizer(torch.from_numpy(audio)[None]).audio[0].numpy()
    return np.clip(audio, -1, 1).astype(np.float32)


def _coloured(audio: Samples, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Through a filter of random tilt with two wide bumps, some without the top octave."""
    spectrum, frequency = np.fft.rfft(audio, 2 * len(audio)), np.fft.rfftfreq(2 * len(audio), 1 / SAMPLING_RATE)
    octave = np.log2(np.maximum(frequency, 60) / 1000)
    gain_db = rng.normal(0, 1.5) * octave
    for _ in range(2):
        bump = np.exp(-0.5 * ((octave - rng.uniform(-4, 3)) / rng.uniform(0.4, 1.2)) ** 2)
        gain_db = gain_db + rng.normal(0, 5) * bump
    if rng.random() < 0.25:
        gain_db = gain_db - 40 * np.maximum(np.log2(np.maximum(frequency, 1) / rng.uniform(3500, 7500)), 0)
    return np.fft.irfft(spectrum * 10 ** (gain_db / 20))[: len(audio)]
