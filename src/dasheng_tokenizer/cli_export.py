"""The command `export`."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_export_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `export` to the commands."""
    text = "encoder and decoder as graphs that run without this package"
    command = commands.add_parser("export", help=text, description=text)
    command.add_argument("--format", choices=("onnx", "torch"), default="onnx", help="default: onnx")
    command.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="new folder")
    command.add_argument("--model", metavar="M", help="model folder or hub name (default: the embedded one)")
    command.add_argument("--quantize", choices=("int8",), help="weights of linear layers in 8 bits (onnx only)")


def run_export(arguments: argparse.Namespace) -> int:
    """Export, and say what was written.

    Raises:
        CheckpointError, ConfigurationError, ExportError, MissingExtraError, OutputError: see `export_model`.
    """
    from dasheng_tokenizer.cli_audio import load_model
    from dasheng_tokenizer.export import export_model

    folder = export_model(
        load_model(arguments.model, "cpu", None), arguments.output, arguments.format, arguments.quantize
    )
    for path in sorted(folder.iterdir()):
        print(f"{path}  {path.stat().st_size / 1e6:.1f} MB")
    return 0
