"""The command `dasheng-tokenizer`.

Exit codes: 0 done; 1 some inputs failed, each named with its reason, the rest done; 2 wrong usage; 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from dasheng_tokenizer.cli_completion import add_completion_option
from dasheng_tokenizer.cli_demo import add_demo_command, run_demo
from dasheng_tokenizer.cli_encode_dataset import add_encode_dataset_command, run_encode_dataset
from dasheng_tokenizer.cli_enhance import add_enhance_command, run_enhance
from dasheng_tokenizer.cli_enhancement import add_enhancement_command, run_enhancement
from dasheng_tokenizer.cli_evaluate import add_reconstruction_command, run_reconstruction
from dasheng_tokenizer.cli_export import add_export_command, run_export
from dasheng_tokenizer.cli_generate import add_generate_command, run_generate
from dasheng_tokenizer.cli_generation import add_generation_command, run_generation
from dasheng_tokenizer.cli_probe import add_probe_command, run_probe
from dasheng_tokenizer.errors import ConfigurationError, DashengTokenizerError, one_line

_DTYPES = ("float32", "float16", "bfloat16")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="dasheng-tokenizer",
        description="Continuous audio tokens: 25 vectors a second, and back to audio.",
        epilog="exit codes: 0 done, 1 some inputs failed, 2 wrong usage",
    )
    add_completion_option(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    encode = _audio_command(commands, "encode", "audio files → token files (NAME.tokens.safetensors)")
    encode.add_argument("--token-dtype", choices=_DTYPES, help="number type stored (default: that of the model)")
    decode = _audio_command(commands, "decode", "token files → audio files (NAME.decoded.wav)")
    decode.add_argument("--force", action="store_true", help="decode tokens of another model all the same")
    reconstruct = _audio_command(
        commands, "reconstruct", "audio files → NAME.reconstructed.wav, NAME.reconstructed.png and a metrics table"
    )
    for command in (decode, reconstruct):
        command.add_argument("--format", choices=("wav", "flac"), default="wav", help="audio format (default: wav)")
    add_generate_command(commands)
    add_enhance_command(commands)
    info = commands.add_parser("info", help="sizes, rates, provenance, hash of a model; header of a token file")
    info.add_argument("name", nargs="?", metavar="MODEL", help="folder, hub name or token file (default: embedded)")
    train = commands.add_parser("train", help="train a tokenizer by a recipe")
    train.add_argument("--config", required=True, type=Path, help="recipe in YAML")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the recipe")
    add_encode_dataset_command(commands)
    evaluate = commands.add_parser(
        "evaluate", help="measure reconstruction, generation or enhancement, or probe a representation"
    )
    kinds = evaluate.add_subparsers(dest="kind", required=True, metavar="KIND")
    add_reconstruction_command(kinds)
    add_probe_command(kinds)
    add_generation_command(kinds)
    add_enhancement_command(kinds)
    add_export_command(commands)
    add_demo_command(commands)
    return parser


def _audio_command(commands: argparse._SubParsersAction, name: str, text: str) -> argparse.ArgumentParser:  # type: ignore[type-arg]
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.add_argument("inputs", nargs="+", type=Path, metavar="FILE_OR_FOLDER")
    command.add_argument(
        "-o", "--output", type=Path, metavar="OUT", help="folder, or file for one input (default: beside each input)"
    )
    command.add_argument("--model", metavar="M", help="model folder or hub name (default: the embedded one)")
    command.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    command.add_argument("--dtype", choices=_DTYPES, metavar="T", help="arithmetic of the model (default: float32)")
    command.add_argument("--overwrite", action="store_true", help="replace existing outputs (default: keep them)")
    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    # Threads that spin while they wait for one another make 2 threads slower than 1 where another process holds a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        arguments = build_parser().parse_args(argv)
        arguments.command_line = list(sys.argv[1:] if argv is None else argv)  # for the record of a report
    except SystemExit as stop:  # of argparse: help (0) or wrong usage (2)
        return int(stop.code or 0)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        warnings.filterwarnings("always", module="dasheng_tokenizer")
        try:
            return _run(arguments)
        except ConfigurationError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except DashengTokenizerError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except BrokenPipeError:  # whoever read our output, such as `head`, has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except KeyboardInterrupt:
            print("interrupted; no output is half-written, the same command goes on from here", file=sys.stderr)
            return 130


def _run(arguments: argparse.Namespace) -> int:
    """Import what the command needs, and no more, so that `--help` is fast."""
    if arguments.command == "train":
        from dasheng_tokenizer.training import train

        for override in arguments.overrides:
            if "=" not in override:
                raise ConfigurationError(f"{override!r} is no setting; write key=value")
        train(arguments.config, arguments.overrides)
        return 0
    if arguments.command == "info":
        from dasheng_tokenizer.cli_info import info

        print(info(arguments.name))
        return 0
    if arguments.command == "encode-dataset":
        return run_encode_dataset(arguments)
    if arguments.command == "export":
        return run_export(arguments)
    if arguments.command == "evaluate":
        kinds = {
            "probe": run_probe,
            "generation": run_generation,
            "enhancement": run_enhancement,
            "reconstruction": run_reconstruction,
        }
        return kinds[arguments.kind](arguments)
    from dasheng_tokenizer import cli_audio

    own = {"generate": run_generate, "enhance": run_enhance, "demo": run_demo}
    run = own[arguments.command] if arguments.command in own else getattr(cli_audio, arguments.command)
    if threading.current_thread() is threading.main_thread():
        previous = signal.signal(signal.SIGTERM, _interrupt)  # so that a terminated run tidies up as after Ctrl-C
        try:
            return int(run(arguments))
        finally:
            signal.signal(signal.SIGTERM, previous)
    return int(run(arguments))


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: str | None = None,
) -> None:
    print(f"warning: {one_line(str(message))}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
