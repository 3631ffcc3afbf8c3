"""How much an enhancer would change clean and noisy speech: what `clean_change` of its configuration is chosen by.

    python benchmarks/clean_change.py --speech '../shared/corpus/speech-valid-*.tar' \
        --noise '../shared/corpus/sound-valid-*.tar' --report docs/reports/clean_change.json [--model FOLDER]

Speech that needs nothing should lie below the first number of `clean_change`, speech in noise above the second.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from dasheng_tokenizer.enhancement import Enhancer
from dasheng_tokenizer.spectral import SAMPLING_RATE
from dasheng_tokenizer.training.clips import read_clips
from report import Report, Table

Samples = npt.NDArray[np.float32]
SNRS = (None, 30, 20, 10, 0)  # dB
SHORTEST, LONGEST = 1.0, 5.0  # seconds: one window of an enhancer
FAINTEST = 1e-6  # mean square of noise; what is softer cannot be brought to a level
PERCENTILES = (10, 25, 50, 75, 90)


def mixed(speech: Samples, noise: Samples, snr: float, draw: np.random.Generator) -> Samples:
    """Speech with a random piece of the noise, `snr` dB below it."""
    while True:
        start = int(draw.integers(len(noise) - len(speech)))
        piece = noise[start : start + len(speech)]
        if (power := float(np.mean(piece**2))) > FAINTEST:
            return speech + piece * np.float32((np.mean(speech**2) / power) ** 0.5 * 10 ** (-snr / 20))


@torch.inference_mode()
def change(enhancer: Enhancer, audio: Samples) -> float:
    """Mean squared change of a clip by the denoiser alone, in standard deviations of clean latents."""
    latents = enhancer.tokenizer.encode(torch.from_numpy(audio)[None])  # (1, T, D)
    changed = enhancer.denoiser(latents) - latents
    return float((changed / enhancer.denoiser.latent_std).square().mean())


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speech", nargs="+", required=True)
    parser.add_argument("--noise", nargs="+", required=True)
    parser.add_argument("--model", help="enhancer folder (default: the embedded one)")
    parser.add_argument("--clips", type=int, default=40)
    parser.add_argument("--report", type=Path, required=True)
    options = parser.parse_args()
    enhancer = Enhancer.from_pretrained(options.model)
    fitting = [
        clip.audio for clip in read_clips(options.speech) if SHORTEST <= len(clip.audio) / SAMPLING_RATE <= LONGEST
    ]
    clips = fitting[:: max(1, len(fitting) // options.clips)][: options.clips]
    noise = np.concatenate([clip.audio for clip in read_clips(options.noise)])
    draw = np.random.default_rng(0)
    rows = []
    for snr in tqdm(SNRS, unit="level"):
        given = clips if snr is None else [mixed(clip, noise, snr, draw) for clip in clips]
        found = np.percentile([change(enhancer, audio) for audio in given], PERCENTILES)
        rows.append(["as recorded" if snr is None else f"{snr} dB", *(f"{value:.3f}" for value in found)])
    Report(
        title="What an enhancer would change",
        command=shlex.join(["python", "benchmarks/clean_change.py", *sys.argv[1:]]),
        data=f"{len(clips)} clips of {' '.join(options.speech)} in noise of {' '.join(options.noise)}",
        seed=0,
        tables=[
            Table(
                "Mean squared change of the latents, in standard deviations of clean ones: percentiles over clips",
                ["signal to noise", *map(str, PERCENTILES)],
                rows,
            )
        ],
        notes=[f"`clean_change` of this enhancer: {enhancer.denoiser.info.clean_change}."],
        order=6,
    ).save(options.report)


if __name__ == "__main__":
    main()
