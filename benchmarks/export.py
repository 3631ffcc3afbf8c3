"""Exported graphs of the embedded default: sizes, speed beside eager PyTorch, and what int8 costs in quality.

    python benchmarks/export.py --data '../shared/corpus/*-test-*.tar' --report docs/reports/export.json

Speed is time of one core, summed over rounds in which the kinds take turns, so that other work on the machine falls on
all alike.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from tqdm import tqdm

from dasheng_tokenizer import DashengTokenizerModel
from dasheng_tokenizer.evaluation import metrics
from dasheng_tokenizer.export import export_model
from report import Report, Table, hardware
from streaming import clips_of_each_domain

Samples = npt.NDArray[np.float32]
Arrays = tuple[npt.NDArray[Any], ...]
Call = Callable[..., Arrays]
KINDS = {
    "onnxruntime": ("onnx", None),
    "onnxruntime, int8": ("onnx", "int8"),
    "torch.export": ("torch", None),
}
SECONDS = 10


class Graphs:
    """Encoder and decoder as functions of arrays, from whichever runtime."""

    def __init__(self, encoder: Call, decoder: Call) -> None:
        self.encoder, self.decoder = encoder, decoder

    def reconstruct(self, encoded_by: Graphs, audio: Samples) -> Samples:
        """This decoder on the latents of that encoder."""
        unified, _, tokens = encoded_by.encoder(audio[None], np.array([len(audio)]))
        return self.decoder(unified, tokens)[0][0, : len(audio)]  # type: ignore[no-any-return]


def eager(model: DashengTokenizerModel) -> Graphs:
    """The model itself."""

    @torch.inference_mode()
    def encode(audio: Samples, num_samples: npt.NDArray[np.int64]) -> Arrays:
        unified, semantic, _, tokens = model._encode_parts(torch.from_numpy(audio), None)
        assert semantic is not None
        return unified.numpy(), semantic.numpy(), tokens.numpy()

    @torch.inference_mode()
    def decode(latents: Samples, num_tokens: npt.NDArray[np.int64]) -> Arrays:
        return (model.decode(torch.from_numpy(latents)).numpy(),)

    return Graphs(encode, decode)


def onnx_graphs(folder: Path) -> Graphs:
    """The ONNX files of a folder on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1

    def call(name: str) -> Call:
        session = onnxruntime.InferenceSession(folder / f"{name}.onnx", options, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]
        return lambda *arrays: tuple(session.run(None, dict(zip(names, arrays, strict=True))))

    return Graphs(call("encoder"), call("decoder"))


def torch_graphs(folder: Path) -> Graphs:
    """The programs of a folder."""

    def call(name: str) -> Call:
        program = torch.export.load(folder / f"{name}.pt2").module(check_guards=False)

        @torch.inference_mode()
        def run(*arrays: npt.NDArray[Any]) -> Arrays:
            found = program(*map(torch.from_numpy, arrays))
            return tuple(part.numpy() for part in (found if isinstance(found, tuple) else (found,)))

        return run

    return Graphs(call("encoder"), call("decoder"))


def speed_table(graphs: dict[str, Graphs], sizes: dict[str, tuple[float, float]], audio: Samples, rounds: int) -> Table:
    """Size of the files, time of a core and ratio to eager, for encoder and decoder."""
    spent: dict[tuple[str, str], float] = defaultdict(float)
    for turn in tqdm(range(rounds + 1), desc="speed", unit="round"):
        for kind, graph in graphs.items():
            began = time.process_time()
            unified, _, tokens = graph.encoder(audio[None], np.array([len(audio)]))
            between = time.process_time()
            graph.decoder(unified, tokens)
            if turn:  # the first warms up
                spent[kind, "encoder"] += between - began
                spent[kind, "decoder"] += time.process_time() - between
    rows: list[list[str | float | int]] = []
    for kind in graphs:
        row: list[str | float | int] = [kind]
        for place, part in enumerate(("encoder", "decoder")):
            row += [
                f"{sizes[kind][place]:.1f}",
                f"{1000 * spent[kind, part] / rounds:.0f}",
                f"{spent['PyTorch, eager', part] / spent[kind, part]:.2f}",
            ]
        rows.append(row)
    columns = [f"{part} {what}" for part in ("encoder", "decoder") for what in ("MB", "ms", "times as fast")]
    return Table(f"{SECONDS} s of speech, one thread, {rounds} rounds", ["kind", *columns], rows)


def quality_table(graphs: dict[str, Graphs], clips: dict[str, list[Samples]]) -> Table:
    """Reconstruction by pairs of encoder and decoder, with the cosine of the semantic embedding to that of eager."""
    whole, small = graphs["onnxruntime"], graphs["onnxruntime, int8"]
    pairs = {"PyTorch, eager": (graphs["PyTorch, eager"],) * 2, "onnxruntime": (whole, whole)}
    pairs |= {"int8 encoder": (small, whole), "int8 decoder": (whole, small), "int8 both": (small, small)}
    rows: list[list[str | float | int]] = []
    exact = {id(audio): _semantic(graphs["PyTorch, eager"], audio) for part in clips.values() for audio in part}
    for name, (encoder, decoder) in tqdm(pairs.items(), desc="quality", unit="pair"):
        pesq, stoi, cosine, distance = [], [], [], defaultdict(list)
        for domain, members in clips.items():
            for audio in members:
                heard = decoder.reconstruct(encoder, audio)
                a, b = exact[id(audio)], _semantic(encoder, audio)
                cosine.append((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))
                distance[domain].append(metrics.mel_distance(audio, heard))
                if domain == "speech":
                    pesq.append(metrics.pesq_wb(audio, heard))
                    stoi.append(metrics.stoi(audio, heard))
        mel = [f"{np.mean(distance[domain]):.4f}" for domain in clips]
        rows.append([
            name, f"{np.mean(np.concatenate(cosine)):.5f}", f"{np.mean(pesq):.3f}", f"{np.mean(stoi):.4f}", *mel,
        ])  # fmt: skip
    columns = ["encoder and decoder", "cosine semantic", "PESQ-WB", "STOI", *(f"mel {domain}" for domain in clips)]
    return Table(f"Reconstruction, {len(next(iter(clips.values())))} clips a domain", columns, rows)


def _semantic(graphs: Graphs, audio: Samples) -> Samples:
    return graphs.encoder(audio[None], np.array([len(audio)]))[1][0]  # type: ignore[no-any-return]


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="shards or folders of the test split")
    parser.add_argument("--clips", type=int, default=25, help="of each domain (default: 25)")
    parser.add_argument("--rounds", type=int, default=15, help="of the speed (default: 15)")
    parser.add_argument("--report", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    clips = clips_of_each_domain(arguments.data, arguments.clips)
    model = DashengTokenizerModel.from_pretrained().eval()
    graphs, sizes = {"PyTorch, eager": eager(model)}, {"PyTorch, eager": (0.0, 0.0)}
    with tempfile.TemporaryDirectory() as folder:
        for number, (kind, (form, quantize)) in enumerate(tqdm(KINDS.items(), desc="export")):
            made = export_model(model, Path(folder) / str(number), form, quantize)  # type: ignore[arg-type]
            graphs[kind] = onnx_graphs(made) if form == "onnx" else torch_graphs(made)
            encoder, decoder = (next(made.glob(f"{part}.*")).stat().st_size / 1e6 for part in ("encoder", "decoder"))
            sizes[kind] = encoder, decoder
    parts = (model.encoder, torch.nn.ModuleList([model.upsampler, model.decoder]))
    sizes["PyTorch, eager"] = tuple(  # type: ignore[assignment]
        sum(p.numel() * 4 for p in part.parameters()) / 1e6 for part in parts
    )
    speech = np.concatenate(clips["speech"])
    Report(
        title="Export",
        command=shlex.join(["python", "benchmarks/export.py", *sys.argv[1:]]),
        data=" ".join(arguments.data),
        seed=0,
        tables=[
            speed_table(graphs, sizes, np.resize(speech, SECONDS * 16_000), arguments.rounds),
            quality_table(graphs, clips),
        ],
        notes=[
            f"Time of one core on {hardware()}, kinds in turns; other work on the machine slows all alike. Size of "
            "PyTorch: parameters in float32. The graphs hold the bases of their Fourier transforms too.",
            "Cosine: of each semantic embedding to that of PyTorch, mean over all tokens.",
        ],
        order=3,
    ).save(arguments.report)


if __name__ == "__main__":
    main()
