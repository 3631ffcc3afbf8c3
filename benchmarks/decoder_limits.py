"""What keeps reconstructed speech from the original: the latents, the decoder's magnitudes, or its phases.

    python benchmarks/decoder_limits.py --train '../shared/corpus/speech-train-*.tar' \
        --data '../shared/corpus/speech-test-*.tar' --report docs/reports/decoder_limits.json \
        [--model FOLDER] [--clips 60] [--title TEXT]

The log-mel spectrogram of the acoustic layer is inverted by Griffin and Lim's method as it is, and as a linear map
reads it off the latents: the difference is what the latents lose for a linear reader. Magnitudes and phases of original
and reconstruction are then put together crosswise.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import librosa
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dasheng_tokenizer import DashengTokenizerModel
from dasheng_tokenizer.errors import AudioError
from dasheng_tokenizer.evaluation import metrics
from dasheng_tokenizer.evaluation.codecs import griffin_lim
from dasheng_tokenizer.spectral import SAMPLES_PER_TOKEN, with_context
from dasheng_tokenizer.training.clips import read_clips
from report import Report, Table

Samples = npt.NDArray[np.float32]
RATE, HOP = 16_000, 160
COARSE = 640  # window of the decoder
FRAMES = 4  # log-mel frames a token
RIDGE = 1e-5  # of the mean square of an input
ITERATIONS = 60
METRICS = {"PESQ-WB ↑": metrics.pesq_wb, "STOI ↑": metrics.stoi, "mel ↓": metrics.mel_distance}


def every(data: list[str], clips: int) -> list[Samples]:
    """Clips of at least a second, spread over the data."""
    long = [clip.audio for clip in read_clips(data) if clip.audio.size >= RATE]
    return long[:: max(1, len(long) // clips)][:clips]


def log_mel(model: DashengTokenizerModel, audio: Samples, tokens: int) -> Tensor:
    """(samples,) → (bands, 4·tokens)."""
    return model.injection.front_end(with_context(torch.from_numpy(audio)[None], tokens), FRAMES * tokens)[0]


def with_neighbours(latents: Tensor) -> Tensor:
    """(T, D) → (T, 3·D + 1): the tokens before and after, and a one."""
    padded = F.pad(latents, (0, 0, 1, 1))
    return torch.cat([padded[:-2], latents, padded[2:], torch.ones(len(latents), 1)], dim=1).double()


def readout(model: DashengTokenizerModel, clips: list[Samples]) -> Tensor:
    """(3·D + 1, bands·4) least-squares map from latents to log-mel patches."""
    given, wanted = [], []
    for audio in tqdm(clips, desc="fitting", unit="clip"):
        latents = model.encode(torch.from_numpy(audio)[None])[0]
        given.append(with_neighbours(latents))
        patches = log_mel(model, audio, len(latents)).unflatten(-1, (-1, FRAMES))  # (bands, T, 4)
        wanted.append(patches.transpose(0, 1).flatten(1).double())
    inputs, outputs = torch.cat(given), torch.cat(wanted)
    squares = inputs.T @ inputs
    squares += RIDGE * float(squares.trace()) / len(squares) * torch.eye(len(squares), dtype=squares.dtype)
    return torch.linalg.solve(squares, inputs.T @ outputs)


def heard(mel: Tensor) -> Samples:
    """(bands, frames) log-mel → samples."""
    return griffin_lim(mel.numpy(), ITERATIONS)


def crossed(magnitude_of: Samples, phase_of: Samples) -> Samples:
    """Magnitudes of one signal with the phases of another: (samples,) each → (samples,) of the second."""
    one, other = (librosa.stft(audio, n_fft=COARSE, hop_length=HOP) for audio in (magnitude_of, phase_of))
    turned = np.abs(one) * np.exp(1j * np.angle(other))
    audio: Samples = librosa.istft(turned, n_fft=COARSE, hop_length=HOP, length=len(phase_of)).astype(np.float32)
    return audio


def variants(model: DashengTokenizerModel, matrix: Tensor, audio: Samples) -> Iterator[tuple[str, Samples]]:
    """Everything that is compared with the clip."""
    latents = model.encode(torch.from_numpy(audio)[None])[0]
    decoded = model.decode(latents[None], audio.size)[0].numpy()
    padded = F.pad(torch.from_numpy(audio), (0, len(latents) * SAMPLES_PER_TOKEN - audio.size)).numpy()
    read = (with_neighbours(latents) @ matrix).float().unflatten(1, (-1, FRAMES)).transpose(0, 1).flatten(1)
    yield "reconstruction", decoded
    yield "Griffin-Lim on the log-mel spectrogram", heard(log_mel(model, padded, len(latents)))
    yield "Griffin-Lim on what a linear map reads off the latents", heard(read)
    yield "Griffin-Lim on the log-mel spectrogram of the reconstruction", heard(log_mel(model, decoded, len(latents)))
    yield "magnitudes of the original, phases of the reconstruction", crossed(audio, decoded)
    yield "magnitudes of the reconstruction, phases of the original", crossed(decoded, audio)


@torch.inference_mode()
def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs="+", required=True, help="speech that the linear map is fitted to")
    parser.add_argument("--data", nargs="+", required=True, help="speech that is measured")
    parser.add_argument("--model", help="tokenizer folder (default: the embedded one)")
    parser.add_argument("--clips", type=int, default=60)
    parser.add_argument("--title", default="What keeps reconstructed speech from the original")
    parser.add_argument("--report", type=Path, required=True)
    options = parser.parse_args()
    model = DashengTokenizerModel.from_pretrained(options.model).eval()
    matrix = readout(model, every(options.train, 4 * options.clips))
    found: dict[str, list[list[float]]] = defaultdict(list)
    left_out = 0
    for audio in tqdm(every(options.data, options.clips), desc="measuring", unit="clip"):
        try:
            rows = {
                name: [measure(audio, other[: audio.size]) for measure in METRICS.values()]
                for name, other in variants(model, matrix, audio)
            }
        except AudioError:  # a metric without a figure, such as PESQ without an utterance
            left_out += 1
            continue
        for name, row in rows.items():
            found[name].append(row)
    table = [[name, *(f"{value:.3f}" for value in np.mean(rows, axis=0))] for name, rows in found.items()]
    count = len(next(iter(found.values())))
    Report(
        title=options.title,
        command=shlex.join(["python", "benchmarks/decoder_limits.py", *sys.argv[1:]]),
        data=f"{count} clips of {' '.join(options.data)} of a second and more, {left_out} more had no figure",
        seed=0,
        tables=[Table("Means", ["signal", *METRICS], table)],
        notes=[
            "The linear map sees a token and its two neighbours. Crosswise spectra have 640 samples every 160, as the "
            "decoder's. The overlap of frames mends part of the worse half by the better one, so both are bounds.",
        ],
        order=4,
    ).save(options.report)


if __name__ == "__main__":
    main()
