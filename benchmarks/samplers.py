"""Samplers of flow matching at equal cost: how far each ends from where very many steps end.

    python benchmarks/samplers.py --report docs/reports/samplers.json [--model GENERATOR]

Euler asks for one velocity a step, midpoint and Heun for two, so they are compared by velocities and not by steps. The
embedded generator answers some captions with several seeds; the far end is midpoint with 200 steps from the same noise.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dasheng_tokenizer.evaluation.metrics import mel_distance
from dasheng_tokenizer.generation.flow_matching import Method
from dasheng_tokenizer.generation.pipeline import TextToAudioPipeline
from report import Report, Table

CAPTIONS = (
    "a flute playing a single note, C4",
    "an acoustic grand piano playing a single note, D#3",
    "a single snare drum hit",
    "the sound of footsteps",
)
SEEDS, SECONDS, GUIDANCE = 2, 1.5, 3.0
VELOCITIES = (8, 16, 32, 50)
METHODS: dict[Method, int] = {"euler": 1, "midpoint": 2, "heun": 2}
"""Velocities a step."""
SWAYS = (0.0, -1.0)
MANY_STEPS = 200


def draw(pipeline: TextToAudioPipeline, method: Method, steps: int, sway: float) -> list[Tensor]:
    """Latents of every caption and seed."""
    texts = [caption for caption in CAPTIONS for _ in range(SEEDS)]
    seeds = [seed for _ in CAPTIONS for seed in range(SEEDS)]
    tokens = -(-pipeline.samples_of(SECONDS) // pipeline.tokenizer.hop_length)
    return pipeline.generator.sample(
        pipeline.text_encoder(texts),
        [tokens] * len(texts),
        seeds=seeds,
        steps=steps,
        guidance=GUIDANCE,
        method=method,
        sway=sway,
    )


def audio_of(pipeline: TextToAudioPipeline, latents: list[Tensor]) -> list[np.ndarray]:
    """Decoded clips."""
    with torch.inference_mode():
        return list(pipeline.tokenizer.decode(torch.stack(latents)).numpy())


def main() -> None:
    """Compare and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="generator folder (default: the embedded one)")
    parser.add_argument("--report", type=Path, default=Path("docs/reports/samplers.json"))
    options = parser.parse_args()
    pipeline = TextToAudioPipeline.from_pretrained(options.model)
    end = draw(pipeline, "midpoint", MANY_STEPS, -1.0)
    heard = audio_of(pipeline, end)
    scale = pipeline.generator.latent_std
    rows: list[list[str | float | int]] = []
    for velocities in VELOCITIES:
        for method, each in METHODS.items():
            for sway in SWAYS:
                found = draw(pipeline, method, velocities // each, sway)
                apart = [
                    float(((a - b) / scale).norm() / ((b - pipeline.generator.latent_mean) / scale).norm())
                    for a, b in zip(found, end, strict=True)
                ]
                mel = [mel_distance(b, a) for a, b in zip(audio_of(pipeline, found), heard, strict=True)]
                row = [velocities, method, velocities // each, sway, np.mean(apart), np.mean(mel)]
                rows.append([item if isinstance(item, (int, str)) else round(float(item), 3) for item in row])
                print(rows[-1], flush=True)
    Report(
        title="Samplers at equal cost",
        command="python benchmarks/samplers.py",
        data=f"{len(CAPTIONS)} captions, {SEEDS} seeds each, {SECONDS} s, guidance {GUIDANCE:g}, embedded generator",
        seed=0,
        tables=[
            Table(
                f"Distance from midpoint with {MANY_STEPS} steps",
                ["velocities", "method", "steps", "sway", "latents, relative", "mel distance of the audio"],
                rows,
            )
        ],
        notes=["Latents standardised; 0 is the same clip. Which of two clips sounds better this does not say."],
        order=7,
    ).save(options.report)


if __name__ == "__main__":
    main()
