"""How much silence after a short clip Whisper's encoder wants: linear probes on its features, without padding to 30 s.

    python benchmarks/silence_probe.py --corpus ../shared/corpus --encoder ../shared/teachers/whisper-tiny-encoder \
        --report docs/reports/silence.json

Mean of a clip's features (first 3 s) → standardised → logistic regression with C from the validation split → accuracy
on the test split, for two labels of the corpus.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from dasheng_tokenizer.checkpoints import load_semantic_weights, semantic_settings
from dasheng_tokenizer.configuration import DashengTokenizerConfig
from dasheng_tokenizer.spectral import with_context
from dasheng_tokenizer.tokenizer import DashengTokenizerModel
from dasheng_tokenizer.training.clips import Clip, read_clips
from report import Report, Table

SECONDS = (0.0, 1.0, 2.0, 5.0)
TASKS = {"drum": "sound", "letter": "speech"}
"""Label → domain of the shards that hold it; both have short clips."""
LONGEST = 48_000
STRENGTHS = (0.001, 0.003, 0.01, 0.03, 0.1)


def encoder_with(weights: str, seconds: float) -> DashengTokenizerModel:
    """The frozen encoder with so much silence; its decoder is not used."""
    settings = semantic_settings(weights)["semantic_encoder"]
    config = DashengTokenizerConfig(semantic_encoder={**settings, "silence_seconds": seconds}, decoder_depth=1)
    model = DashengTokenizerModel(config).eval()
    load_semantic_weights(model, weights)
    return model


def features(model: DashengTokenizerModel, clips: list[Clip]) -> np.ndarray:
    """Mean feature of each clip, (clips, D)."""
    rows = []
    for clip in tqdm(clips, unit="clip", leave=False):
        audio = torch.from_numpy(clip.audio[:LONGEST])[None]
        rows.append(model.encode_semantic(with_context(audio, model.num_tokens(audio.shape[1])))[0].mean(0).numpy())
    return np.stack(rows)


def accuracy(split: dict[str, tuple[np.ndarray, list[str]]]) -> float:
    """Test accuracy of the probe whose regularisation did best on the validation split."""

    def fit(strength: float) -> Any:
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=500))
        return probe.fit(*split["train"])

    best = max((fit(strength) for strength in STRENGTHS), key=lambda probe: probe.score(*split["valid"]))
    return float(best.score(*split["test"]))


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--report", type=Path, default=Path("docs/reports/silence.json"))
    parser.add_argument("--most", type=int, default=500, help="clips of a split at the most")
    arguments = parser.parse_args()
    rows: list[list[str | float | int]] = []
    for label, domain in TASKS.items():
        clips: dict[str, list[Clip]] = {}
        for split in ("train", "valid", "test"):
            found = read_clips([str(arguments.corpus / f"{domain}-{split}-*.tar")])
            clips[split] = [clip for clip in found if clip.labels.get("labels", {}).get(label)][: arguments.most]
        known = {clip.labels["labels"][label] for clip in clips["train"]}
        clips = {s: [c for c in held if c.labels["labels"][label] in known] for s, held in clips.items()}
        scores = []
        for seconds in SECONDS:
            model = encoder_with(arguments.encoder, seconds)
            split = {s: (features(model, held), [c.labels["labels"][label] for c in held]) for s, held in clips.items()}
            scores.append(f"{accuracy(split):.3f}")
        rows.append([label, "/".join(str(len(held)) for held in clips.values()), *scores])
    columns = ["label", "clips train/valid/test", *(f"{seconds:g} s" for seconds in SECONDS)]
    Report(
        title="Silence after short clips for Whisper's encoder",
        command=shlex.join(["python", "benchmarks/silence_probe.py", *sys.argv[1:]]),
        data=str(arguments.corpus),
        seed=0,
        tables=[Table("Accuracy of a linear probe by seconds of silence after the clip", columns, rows)],
        order=3,
    ).save(arguments.report)


if __name__ == "__main__":
    main()
