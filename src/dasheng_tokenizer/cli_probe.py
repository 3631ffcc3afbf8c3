"""The command `evaluate probe`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dasheng_tokenizer.errors import ConfigurationError, DataError

if TYPE_CHECKING:
    from dasheng_tokenizer.evaluation.probe import ProbeScore, SuiteTask
    from dasheng_tokenizer.evaluation.probe_kinds import Companions
    from dasheng_tokenizer.evaluation.representations import Embedder

REPRESENTATIONS = ("unified", "semantic", "acoustic", "log-mel")


def add_probe_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `probe` to the commands of `evaluate`."""
    text = "linear evaluation of frozen representations on a suite of tasks"
    command = commands.add_parser("probe", help=text, description=text)
    command.add_argument("--suite", choices=("corpus", "xares"), required=True, help="which tasks")
    command.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder that holds the suite's data")
    command.add_argument("--tasks", metavar="A,B", help="names of tasks (default: all)")
    command.add_argument("--model", metavar="M", help="tokenizer folder or hub name (default: the embedded one)")
    command.add_argument(
        "--representations",
        default=",".join(REPRESENTATIONS),
        metavar="A,B",
        help=f"of {', '.join(REPRESENTATIONS)} (default: all)",
    )
    command.add_argument(
        "--encoder",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="a frozen encoder of transformers or a Dasheng encoder, too; may be repeated",
    )
    command.add_argument("--text-encoder", metavar="DIR", help="frozen text encoder of transformers, for retrieval")
    command.add_argument("--language-model", metavar="DIR", help="frozen causal language model, for speech recognition")
    command.add_argument("--seeds", default="0,1,2", metavar="0,1,2", help="seeds of the heads (default: three)")
    command.add_argument(
        "--protocol",
        choices=("validation", "xares"),
        default="validation",
        help="what the epoch is chosen on (default: validation); xares: as that package, for some tasks on test data",
    )
    command.add_argument(
        "--cache",
        type=Path,
        default=Path("runs/embeddings"),
        metavar="DIR",
        help="kept embeddings (default: %(default)s)",
    )
    command.add_argument("--device", metavar="D", help="cpu, cuda, … (default: cuda where there is one)")
    command.add_argument("--title", default="Linear evaluation", help="of the report (default: %(default)s)")
    command.add_argument("--report", type=Path, metavar="JSON", help="write the report here, and FILE.md, FILE.png")


def run_probe(arguments: argparse.Namespace) -> int:
    """Run the command; returns 1 where a task could not be done."""
    from dasheng_tokenizer.evaluation.embedding_store import EmbeddingStore
    from dasheng_tokenizer.evaluation.probe import probe_task

    seeds = _seeds(arguments.seeds)
    suite, failed = _suite(arguments)
    embedders = list(_embedders(arguments))
    companions = _companions(arguments)
    store = EmbeddingStore(arguments.cache)
    scores: list[ProbeScore] = []
    for suite_task in suite:
        for label, embedder in embedders:
            name = suite_task.task.name
            try:
                found = probe_task(suite_task, embedder, store, seeds, companions)
            except DataError as error:
                failed[name] = str(error)
                print(f"{name}: {error}", file=sys.stderr)
                break
            for score in found:
                score.representation = label or score.representation
                print(f"{name}, {score.representation}: {100 * score.mean:.1f} ± {100 * score.std:.1f}", flush=True)
            scores += found
    if not scores:
        raise DataError("no task could be done: " + "; ".join(f"{name}: {why}" for name, why in failed.items()))
    _write(arguments, scores, seeds, failed)
    return 1 if failed else 0


def _suite(arguments: argparse.Namespace) -> tuple[list[SuiteTask], dict[str, str]]:
    """Tasks of the suite that are wanted, and those that cannot be done, with reasons."""
    failed: dict[str, str] = {}
    if arguments.suite == "corpus":
        from dasheng_tokenizer.evaluation.corpus_suite import CorpusSuite

        suite = CorpusSuite(arguments.data).suite()
    else:
        from dasheng_tokenizer.evaluation.xares_suite import xares_suite

        suite, failed = xares_suite(arguments.data, arguments.protocol == "xares")
        for name, reason in failed.items():
            print(f"{name}: {reason}", file=sys.stderr)
    if arguments.tasks is None:
        return suite, failed
    wanted = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    known = {item.task.name: item for item in suite}
    for name in wanted:
        if name not in known and name not in failed:
            raise ConfigurationError(f"unknown task {name!r}; the suite has {', '.join([*known, *failed])}")
    return [known[name] for name in wanted if name in known], {n: r for n, r in failed.items() if n in wanted}


def _embedders(arguments: argparse.Namespace) -> Iterator[tuple[str, Embedder]]:
    """Embedders with the name that their representation gets in the report; empty for its own."""
    from dasheng_tokenizer.cli_audio import load_model
    from dasheng_tokenizer.evaluation.representations import LogMelEmbedder, TokenizerEmbedder, encoder_embedder

    wanted = [name.strip() for name in arguments.representations.split(",") if name.strip()]
    for name in wanted:
        if name not in REPRESENTATIONS:
            raise ConfigurationError(f"unknown representation {name!r}; choose from {', '.join(REPRESENTATIONS)}")
    pairs = [item.partition("=") for item in arguments.encoder]
    if bad := [item for item, pair in zip(arguments.encoder, pairs, strict=True) if not (pair[0] and pair[2])]:
        raise ConfigurationError(f"--encoder {bad[0]}: write NAME=FOLDER")
    if of_model := [name for name in wanted if name != "log-mel"]:
        yield "", TokenizerEmbedder(load_model(arguments.model, arguments.device, None), of_model)
    if "log-mel" in wanted:
        yield "", LogMelEmbedder()
    for name, _, folder in pairs:
        yield name, encoder_embedder(folder)


def _companions(arguments: argparse.Namespace) -> Companions:
    from dasheng_tokenizer.evaluation.asr import LanguageModel
    from dasheng_tokenizer.evaluation.probe_kinds import Companions
    from dasheng_tokenizer.evaluation.retrieval import SentenceEncoder

    return Companions(
        SentenceEncoder(arguments.text_encoder) if arguments.text_encoder else None,
        LanguageModel(arguments.language_model) if arguments.language_model else None,
    )


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigurationError(f"--seeds {text}: write whole numbers with commas between them") from None
    if len(set(seeds)) != len(seeds):
        raise ConfigurationError(f"--seeds {text}: each seed once; the same seed gives the same score")
    return seeds


def _write(arguments: argparse.Namespace, scores: list[ProbeScore], seeds: list[int], failed: dict[str, str]) -> None:
    from dasheng_tokenizer.evaluation import probe_report as reports
    from dasheng_tokenizer.evaluation.report import Report
    from dasheng_tokenizer.files import atomic_path

    held = reports.by_representation(scores)
    spread = f"percent, mean ± standard deviation over {len(seeds)} seeds of the head"
    tables = [
        reports.average_table(held, f"Averages over tasks ({spread})"),
        reports.score_table(held, f"Scores ({spread})"),
        reports.knn_table(held, "Ten nearest neighbours, percent"),
        reports.extra_table(held, "Further figures, percent"),
    ]
    chosen = "validation data" if arguments.protocol == "validation" else "the data that the original package uses"
    notes = [
        f"The epoch of a head is chosen on {chosen}.",
        *reports.injection_sentences(held),
        *reports.notes_of(held),
        *(f"{name} was not done: {reason}." for name, reason in failed.items()),
    ]
    if light := sorted({score.task for score in scores if not score.weight}):
        notes.append(f"Left out of the averages, too few test clips: {', '.join(light)}.")
    report = Report(
        title=arguments.title,
        command="dasheng-tokenizer " + shlex.join(arguments.command_line),
        data=f"suite {arguments.suite}, {arguments.data.name}",
        seed=seeds[0],
        tables=[table for table in tables if table.rows],
        notes=notes,
        order=3,
    )
    print(report.markdown())
    if arguments.report:
        picture = arguments.report.with_suffix(".png")
        text = arguments.report.with_suffix(".md")
        reports.draw_bars(held, picture)
        with atomic_path(text) as temporary:
            temporary.write_text(report.markdown() + "\n", encoding="utf-8")
        report.save(arguments.report)
        print(f"report: {arguments.report} and {text}, picture: {picture}")
