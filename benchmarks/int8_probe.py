"""What linear probes lose when the encoder runs in int8: the embedded default against its export, task by task.

dasheng-tokenizer export --format onnx --quantize int8 -o runs/exported-int8
python benchmarks/int8_probe.py --export runs/exported-int8 --data ../shared/corpus
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dasheng_tokenizer import DashengTokenizerModel
from dasheng_tokenizer.evaluation.corpus_suite import CorpusSuite
from dasheng_tokenizer.evaluation.embedding_store import EmbeddingStore
from dasheng_tokenizer.evaluation.probe import probe_task
from dasheng_tokenizer.evaluation.representations import Samples, TokenizerEmbedder
from report import Report, Table

NAMES = ("unified", "semantic")


class ExportedEmbedder:
    """Unified and semantic embedding of an exported encoder, by onnxruntime, one clip after the other."""

    names: tuple[str, ...] = NAMES

    def __init__(self, folder: Path) -> None:
        import onnxruntime

        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        path = folder / config["encoder"]["file"]
        self.seconds_per_frame = 0.04
        self.identity = f"exported {path.stat().st_size} {config}"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def __call__(self, clips: Sequence[Samples]) -> list[dict[str, Tensor]]:
        """See `Embedder`."""
        found = []
        for clip in clips:
            feed = {"audio": clip[None], "num_samples": np.array([len(clip)])}
            unified, semantic, _ = self._session.run(None, feed)
            found.append({"unified": torch.from_numpy(unified[0]), "semantic": torch.from_numpy(semantic[0])})
        return found


def main() -> None:
    """Probe both and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", type=Path, required=True, help="folder of the int8 export")
    parser.add_argument("--data", type=Path, required=True, help="the corpus, with its tasks.json")
    parser.add_argument("--tasks", help="names with commas between them (default: all that need no other model)")
    parser.add_argument("--cache", type=Path, default=Path("runs/embeddings"))
    parser.add_argument("--report", type=Path, default=Path("docs/reports/int8_probe.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    wanted = options.tasks.split(",") if options.tasks else None
    suite = [item for item in CorpusSuite(options.data).suite() if wanted is None or item.task.name in wanted]
    exact = TokenizerEmbedder(
        DashengTokenizerModel.from_pretrained()
    )  # all parts: what `evaluate probe` has kept is used
    store = EmbeddingStore(options.cache)
    rows: list[list[str | float | int]] = []
    changes: dict[str, list[float]] = {name: [] for name in NAMES}
    for item in suite:
        scores = [{score.representation: score for score in probe_task(item, e, store)} for e in (exact, int8(options))]
        tiny = "" if item.task.weight else " (not averaged)"
        row: list[str | float | int] = [item.task.name + tiny, item.task.metric]
        for name in NAMES:
            before, after = (100 * side[name].mean for side in scores)
            if item.task.weight:
                changes[name].append(after - before)
            row += [f"{before:.1f} ± {100 * scores[0][name].std:.1f}", f"{after:.1f}", f"{after - before:+.1f}"]
        print(row, flush=True)
        rows.append(row)
    mean = [f"{statistics.fmean(changes[name]):+.2f}" for name in NAMES]
    rows.append([f"mean of {len(changes[NAMES[0]])} tasks", "–", "–", "–", mean[0], "–", "–", mean[1]])
    Report(
        title="Probes of the int8 encoder",
        command=shlex.join(["python", "benchmarks/int8_probe.py", *sys.argv[1:]]),
        data=f"suite corpus, {options.data.name}",
        seed=0,
        tables=[
            Table(
                "Percent, mean over 3 seeds of the head (± standard deviation, float32), and the change by int8",
                ["task", "metric", "unified", "int8", "change", "semantic", "int8 ", "change "],
                rows,
            )
        ],
        notes=["Not averaged: tasks with few clips, which one clip moves by points, and with weak labels."],
        order=3,
    ).save(options.report)


def int8(options: argparse.Namespace) -> ExportedEmbedder:
    """The export; a session is cheap and is not shared between tasks."""
    return ExportedEmbedder(options.export)


if __name__ == "__main__":
    main()
