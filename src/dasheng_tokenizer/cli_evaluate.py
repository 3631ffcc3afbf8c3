"""The command `evaluate reconstruction`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dasheng_tokenizer.errors import ConfigurationError, one_line

if TYPE_CHECKING:
    from dasheng_tokenizer.evaluation.codecs import Codec
    from dasheng_tokenizer.evaluation.reconstruction_inputs import Inputs

METRIC_NAMES = (
    "pesq_wb",
    "pesq_nb",
    "stoi",
    "estoi",
    "si_sdr",
    "mel",
    "lsd",
    "dnsmos",
    "visqol",
    "speaker_similarity",
    "f0",
)
DEFAULT_METRICS = ("pesq_wb", "stoi", "estoi", "si_sdr", "mel", "lsd")
"""Those that are quick and need no neural network."""


def add_reconstruction_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `reconstruction` to the commands of `evaluate`."""
    text = "how close reconstructions are to their originals, file by file and on average"
    command = commands.add_parser("reconstruction", help=text, description=text)
    command.add_argument("sources", nargs="*", metavar="SOURCE", help="folders, audio files, tar shards or globs")
    command.add_argument("--reference", type=Path, metavar="FOLDER", help="originals, in place of SOURCE and models")
    command.add_argument(
        "--estimate",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="reconstructions of the originals, of the same names; may be repeated",
    )
    command.add_argument(
        "--model", action="append", metavar="M", help="model folder or hub name (default: the embedded one)"
    )
    command.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="KIND[:N]=FOLDER",
        help="a codec of transformers from a local folder: encodec (N kbit/s), dac or mimi (N codebooks)",
    )
    command.add_argument(
        "--floor",
        action="append",
        default=[],
        metavar="KIND",
        help="without weights: opus:KBITS, griffin-lim, original",
    )
    command.add_argument(
        "--metrics",
        default=",".join(DEFAULT_METRICS),
        metavar="A,B",
        help=f"of {', '.join(METRIC_NAMES)}, or all (default: {','.join(DEFAULT_METRICS)})",
    )
    command.add_argument("--domain", metavar="NAME", help="domain of all clips (default: label, or top folder)")
    command.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes that measure (default: one a core)",
    )
    command.add_argument("--device", metavar="D", help="of the models: cpu, cuda, … (default: cuda where there is one)")
    command.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="folder for the tables")
    command.add_argument("--title", default="Reconstruction", help="of the report (default: %(default)s)")
    command.add_argument("--report", type=Path, metavar="JSON", help="write the summary here, for docs/make_results.py")


def run_reconstruction(arguments: argparse.Namespace) -> int:
    """Run the command; returns 1 where a clip could not be measured.

    Raises:
        ConfigurationError: options that contradict each other, an unknown metric, peer or floor.
        DataError: no audio.
        MissingExtraError: a metric needs a package that is not installed.
        OutputError: the tables cannot be written.
    """
    from dasheng_tokenizer.evaluation import reconstruction, reconstruction_tables
    from dasheng_tokenizer.evaluation.metric_columns import require_metrics

    _check(arguments)
    metrics = require_metrics(_metrics(arguments.metrics))
    for path in (arguments.output / reconstruction_tables.NAME, arguments.report):
        if path is not None:
            reconstruction_tables.check_writable(path)
    outcome = reconstruction.run(_inputs(arguments), metrics, arguments.output, arguments.workers)
    tables = reconstruction_tables.Tables(outcome)
    report = tables.report(
        title=arguments.title,
        command=shlex.join(["dasheng-tokenizer", *getattr(arguments, "command_line", sys.argv[1:])]),
        data=" ".join(map(str, arguments.sources or [arguments.reference, *arguments.estimate])),
    )
    tables.save(arguments.output)
    if arguments.report is not None:
        report.save(arguments.report)
    print(report.markdown())
    for name, reason in outcome.failed():
        print(f"error: {one_line(f'{name}: {reason}')}", file=sys.stderr)
    return 1 if outcome.failed() else 0


def _check(arguments: argparse.Namespace) -> None:
    """Refuse options that contradict each other."""
    pairs = arguments.reference is not None
    if pairs != bool(arguments.estimate):
        raise ConfigurationError("--reference and --estimate belong together: give the folders of both")
    if pairs and (arguments.sources or arguments.model or arguments.peer or arguments.floor):
        raise ConfigurationError("--reference measures files that exist: leave SOURCE, --model, --peer and --floor out")
    if not pairs and not arguments.sources:
        raise ConfigurationError("nothing to measure: give folders, files or shards, or --reference and --estimate")


def _metrics(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    return list(METRIC_NAMES) if names == ["all"] else names


def _inputs(arguments: argparse.Namespace) -> Inputs:
    from dasheng_tokenizer.evaluation.reconstruction_inputs import ClipInputs, PairInputs

    if arguments.reference is not None:
        return PairInputs(arguments.reference, arguments.estimate, arguments.domain)
    return ClipInputs(arguments.sources, _codecs(arguments), arguments.domain)


def _codecs(arguments: argparse.Namespace) -> list[Codec]:
    """Ours, peers, floors, in this order."""
    from dasheng_tokenizer.cli_audio import load_model
    from dasheng_tokenizer.evaluation.codecs import Tokenizer, parse_floor
    from dasheng_tokenizer.evaluation.peers import parse_peer

    floors = [parse_floor(text) for text in arguments.floor]  # first, since a slip there is found at once
    models = [(name, load_model(name, arguments.device, None)) for name in arguments.model or [None]]
    device = str(next(models[0][1].parameters()).device)
    ours = [Tokenizer(model, "embedded default" if name is None else Path(name).name) for name, model in models]
    return [*ours, *(parse_peer(text, device) for text in arguments.peer), *floors]
