"""The command `evaluate generation`."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dasheng_tokenizer.errors import ConfigurationError, one_line

if TYPE_CHECKING:
    from dasheng_tokenizer.evaluation.generation_sets import Outcome

RESAMPLES = 200
"""As `evaluation.frechet.RESAMPLES`; here, so that `--help` is fast."""


def add_generation_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `generation` to the commands of `evaluate`."""
    text = "how close generated clips are to real ones, and whether they are what was asked for"
    command = commands.add_parser("generation", help=text, description=text)
    command.add_argument(
        "generated", nargs="+", metavar="GENERATED", help="folder, tar shard or glob; each a row of the tables"
    )
    command.add_argument(
        "--reference", nargs="+", required=True, metavar="REAL", help="real clips, all of them one set"
    )
    command.add_argument(
        "--embedding",
        action="append",
        metavar="NAME[=PATH]",
        help="semantic, log-mel, or NAME=PATH of a tokenizer, an encoder or CLAP model of transformers, or an ONNX "
        "file; may be repeated (default: semantic and log-mel)",
    )
    command.add_argument(
        "--clap", metavar="FOLDER", help="CLAP model of transformers: one more embedding, and text score"
    )
    command.add_argument(
        "--classifier-data", nargs="+", default=[], metavar="REAL", help="real labelled clips that train the probes"
    )
    command.add_argument(
        "--label",
        action="append",
        default=[],
        metavar="NAME",
        help="label that a probe must recognise; may be repeated",
    )
    command.add_argument("--pitch", metavar="NAME", help="label with the MIDI note asked for; compares it with F0")
    command.add_argument(
        "--resamples", type=int, default=RESAMPLES, metavar="N", help=f"of the bootstrap (default: {RESAMPLES})"
    )
    command.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of bootstrap, sub-sets and probes (default: 0)"
    )
    command.add_argument(
        "--cache",
        type=Path,
        default=Path("runs/embeddings"),
        metavar="DIR",
        help="kept embeddings (default: %(default)s)",
    )
    command.add_argument("--device", metavar="D", help="cpu, cuda, … (default: cuda where there is one)")
    command.add_argument("--title", default="Generation", help="of the report (default: %(default)s)")
    command.add_argument("--report", type=Path, metavar="JSON", help="write the report here")


def run_generation(arguments: argparse.Namespace) -> int:
    """Run the command; returns 1 where a clip could not be used.

    Raises:
        ConfigurationError: options that contradict each other, an unknown embedding, two sets of one name.
        DataError: no clips, or a broken list of generated ones.
        CheckpointError: a model that cannot be loaded.
        MissingExtraError: a figure needs a package that is not installed.
        OutputError: the report or the embeddings cannot be written.
    """
    from dasheng_tokenizer.evaluation.generation import METHOD
    from dasheng_tokenizer.evaluation.reconstruction_tables import check_writable
    from dasheng_tokenizer.evaluation.report import Report

    if arguments.report is not None:
        check_writable(arguments.report)
    outcome = _outcome(arguments)
    report = Report(
        title=arguments.title,
        command="dasheng-tokenizer " + shlex.join(getattr(arguments, "command_line", sys.argv[1:])),
        data=f"{' '.join(arguments.generated)} against {' '.join(arguments.reference)}",
        seed=arguments.seed,
        tables=outcome.tables,
        notes=[*METHOD, *outcome.notes],
        order=5,
    )
    print(report.markdown())
    if arguments.report is not None:
        report.save(arguments.report)
    for name, reason in outcome.failed:
        print(f"error: {one_line(f'{name}: {reason}')}", file=sys.stderr)
    return 1 if outcome.failed else 0


def _outcome(arguments: argparse.Namespace) -> Outcome:
    from dasheng_tokenizer.evaluation.clip_embedders import DEFAULT_EMBEDDINGS, ClapEmbedder, load_embedding
    from dasheng_tokenizer.evaluation.embedding_store import EmbeddingStore
    from dasheng_tokenizer.evaluation.generation import Questions, evaluate_generation
    from dasheng_tokenizer.evaluation.generation_clips import ClipSet

    if bool(arguments.label) != bool(arguments.classifier_data):
        raise ConfigurationError("--label and --classifier-data belong together: name the labels and real clips")
    names = _names(arguments.generated)
    wanted = arguments.embedding or DEFAULT_EMBEDDINGS
    embedders = [load_embedding(text, arguments.device) for text in wanted]
    clap = ClapEmbedder(arguments.clap, arguments.device) if arguments.clap else None
    real = ClipSet("reference", arguments.reference)
    systems = [ClipSet(name, [source]) for name, source in zip(names, arguments.generated, strict=True)]
    questions = Questions(
        labels=arguments.label,
        classifier=ClipSet("classifier data", arguments.classifier_data) if arguments.classifier_data else None,
        pitch=arguments.pitch,
        clap=clap,
        resamples=arguments.resamples,
        seed=arguments.seed,
    )
    return evaluate_generation(systems, real, embedders, EmbeddingStore(arguments.cache), questions)


def _names(sources: list[str]) -> list[str]:
    """The last part of each path, or the whole where two are equal."""
    short = [Path(source).name or source for source in sources]
    return short if len(set(short)) == len(short) else sources
