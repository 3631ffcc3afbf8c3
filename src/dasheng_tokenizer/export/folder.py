"""Writes the folder of an exported tokenizer: two graphs and a config.json that says how to use them."""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from dasheng_tokenizer.chunking import model_name
from dasheng_tokenizer.errors import ConfigurationError, OutputError
from dasheng_tokenizer.export.graphs import DecoderGraph, EncoderGraph
from dasheng_tokenizer.files import make_folder, output_error, require_extra
from dasheng_tokenizer.tokenizer import DashengTokenizerModel

Format = Literal["onnx", "torch"]

OPSET = 18
"""Of ONNX; the one that the exporter of PyTorch writes without conversion."""

EXTRA = "export"

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}

INLINE_BYTES = 1_800_000_000
"""Weights beyond this go into a file beside the graph: an ONNX file holds at most 2 GB."""

INPUTS = {"encoder": ["audio", "num_samples"], "decoder": ["latents", "num_tokens"]}
OUTPUTS = {"encoder": ["unified", "semantic", "num_tokens"], "decoder": ["audio"]}


def export_model(
    model: DashengTokenizerModel, folder: str | os.PathLike[str], format: Format = "onnx", quantize: str | None = None
) -> Path:
    """Write encoder, decoder and config.json into a new folder, which appears whole or not at all.

    Args:
        model: on the CPU; exported in float32.
        folder: must not exist, or be empty.
        format: `onnx`, or `torch` for programs of torch.export.
        quantize: `int8` stores the weights of the linear layers in 8 bits (ONNX only).

    Raises:
        ConfigurationError: int8 of another format than ONNX.
        ExportError: a model that has no graph, see `graphs`.
        MissingExtraError: the packages of the extra `export` are missing.
        OutputError: the folder is there already or cannot be written.
    """
    if quantize not in (None, "int8") or (quantize and format != "onnx"):
        raise ConfigurationError(f"quantize {quantize!r} does not go with format {format!r}; int8 goes with onnx")
    target = Path(folder)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise OutputError(f"{target} is there already; choose another folder, or remove it")
    if format == "onnx":
        for module in ("onnx", "onnxscript", *(["onnxruntime"] if quantize else [])):
            require_extra(module, EXTRA)
    graphs: dict[str, EncoderGraph | DecoderGraph] = {
        "encoder": EncoderGraph(model).eval(),
        "decoder": DecoderGraph(model).eval(),
    }
    make_folder(target.parent)
    # A fixed name, so that the next run removes what a killed one left.
    staging = target.parent / f".{target.name}.partial"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        for name, graph in graphs.items():
            _write_graph(name, graph, model.latent_dim, format, staging)
            if quantize:
                _quantize(staging / f"{name}.onnx", graph.spectral_width)
        text = json.dumps(_config(model, format, quantize), indent=2) + "\n"
        (staging / "config.json").write_text(text, encoding="utf-8")
        staging.replace(target)
    except OSError as error:
        raise output_error(target, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _write_graph(name: str, graph: nn.Module, width: int, format: Format, folder: Path) -> None:
    program = _program(name, graph, width)
    path = folder / f"{name}{SUFFIXES[format]}"
    if format == "torch":
        torch.export.save(program, path)
        return
    with _quiet():
        onnx_program: Any = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=INPUTS[name],
            output_names=OUTPUTS[name],
            verbose=False,
        )
    size = sum(tensor.numel() * tensor.element_size() for tensor in graph.state_dict().values())
    onnx_program.save(path, external_data=size > INLINE_BYTES)


def _program(name: str, graph: nn.Module, width: int) -> torch.export.ExportedProgram:
    """Traced with a batch and a length of any size, also 1."""
    from torch.fx.experimental import _config

    tracing: Any = _config  # its type stubs do not know `patch`

    count = torch.tensor([40_000, 30_000]) if name == "encoder" else torch.tensor([10, 7])
    example = 0.1 * torch.randn(2, 40_000) if name == "encoder" else torch.randn(2, 10, width)
    batch = length = torch.export.Dim.DYNAMIC
    with _quiet(), tracing.patch(backed_size_oblivious=True):  # else sizes of 0 and 1 are left out
        return torch.export.export(
            graph, (example, count), dynamic_shapes=({0: batch, 1: length}, {0: batch}), strict=False
        )


def _quantize(path: Path, spectral_width: int) -> None:
    """Weights of matrix products to 8 bits, one scale a column; convolutions and the acoustic layer stay float32.

    So do products with a dimension of `spectral_width`: spectra span more than 8 bits. With the inverse STFT in 8 bits
    speech lost 0.3 PESQ-WB and its mel distance doubled.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(path, load_external_data=False).graph
    spectral = {weight.name for weight in graph.initializer if spectral_width in weight.dims}
    kept = [node.name for node in graph.node if spectral & set(node.input)]
    aside = path.with_name(f"float-{path.name}")
    path.rename(aside)
    with _quiet():
        quantize_dynamic(
            aside,
            path,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=kept,
        )
    for left in (aside, Path(f"{aside}.data")):
        left.unlink(missing_ok=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters say about parts of their own and about packages that are not needed."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _config(model: DashengTokenizerModel, format: Format, quantize: str | None) -> dict[str, Any]:
    return {
        "format": format,
        **({"opset": OPSET} if format == "onnx" else {"torch": str(torch.__version__)}),
        "quantize": quantize,
        "model": model_name(model),
        "weights_hash": model.weights_hash(),
        "sampling_rate": model.sampling_rate,
        "samples_per_token": model.hop_length,
        "latent_dim": model.latent_dim,
        "window_tokens": model.semantic_encoder.window_tokens,
        **{
            part: {"file": f"{part}{SUFFIXES[format]}", "inputs": INPUTS[part], "outputs": OUTPUTS[part]}
            for part in INPUTS
        },
    }
