"""The command `evaluate enhancement`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dasheng_tokenizer.cli_evaluate import METRIC_NAMES
from dasheng_tokenizer.errors import ConfigurationError, one_line

if TYPE_CHECKING:
    from dasheng_tokenizer.evaluation.enhancement import Outcome
    from dasheng_tokenizer.evaluation.enhancement_inputs import ExampleSet
    from dasheng_tokenizer.evaluation.enhancement_systems import EnhancerSystem, System
    from dasheng_tokenizer.evaluation.enhancement_tables import Tables

RATIOS = (0.0, 5.0, 10.0)
"""In dB, where none are given."""

METRICS = ("pesq_wb", "stoi", "estoi", "si_sdr", "dnsmos", "visqol")

EMBEDDED, NO_ENHANCER = "embedded", "none"
"""What `--system` takes besides NAME=FOLDER."""


def add_enhancement_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `enhancement` to the commands of `evaluate`."""
    text = "how much noisy speech gains by enhancers, beside classical methods and what the tokenizer allows"
    command = commands.add_parser("enhancement", help=text, description=text)
    command.add_argument("sources", nargs="*", metavar="SOURCE", help="clean speech: folders, files, shards or globs")
    command.add_argument("--noise", nargs="+", default=[], metavar="SOURCE", help="noise to mix with it")
    command.add_argument("--snr", nargs="+", type=float, metavar="DB", help="signal-to-noise ratios (default: 0 5 10)")
    command.add_argument(
        "--where", action="append", default=[], metavar="KEY=VALUE", help="label that speech must have; may be repeated"
    )
    command.add_argument("--noise-where", action="append", default=[], metavar="KEY=VALUE", help="the same of noise")
    command.add_argument(
        "--noise-label", metavar="KEY", help="label with the type of noise (default: domain, with event or subset)"
    )
    command.add_argument(
        "--pairs", nargs=2, type=Path, metavar=("NOISY", "CLEAN"), help="folders of recordings, in place of SOURCE"
    )
    command.add_argument("--log", type=Path, metavar="FILE", help="of the pairs: lines NAME NOISE RATIO")
    command.add_argument("--texts", type=Path, metavar="FOLDER", help="of the pairs: NAME.txt with what is said")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of mixtures and intervals (default: 0)")
    command.add_argument("--limit", type=int, metavar="N", help="so many clean clips at most, drawn by the seed")
    command.add_argument(
        "--system",
        action="append",
        metavar="NAME=FOLDER",
        help=f"an enhancer; may be repeated; {EMBEDDED}: that of the package (default); {NO_ENHANCER}: no enhancer",
    )
    command.add_argument("--tokenizer", metavar="M", help="tokenizer of the enhancers (default: what each names)")
    command.add_argument(
        "--baseline", action="append", default=[], metavar="KIND", help="spectral-gate or rnnoise; may be repeated"
    )
    command.add_argument(
        "--metrics",
        default=",".join(METRICS),
        metavar="A,B",
        help=f"of {', '.join(METRIC_NAMES)}, or all (default: {','.join(METRICS)})",
    )
    command.add_argument("--wer", type=Path, metavar="FOLDER", help="Whisper model for faster-whisper; counts words")
    command.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes that measure (default: one a core)",
    )
    command.add_argument("--device", metavar="D", help="of the models: cpu, cuda, … (default: cuda where there is one)")
    command.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="folder for rows and tables")
    command.add_argument("--keep-audio", action="store_true", help="write what each system makes into OUT/audio, too")
    command.add_argument("--title", default="Enhancement", help="of the report (default: %(default)s)")
    command.add_argument(
        "--report", type=Path, metavar="JSON", help="write the summary here, and its picture beside it"
    )


def run_enhancement(arguments: argparse.Namespace) -> int:
    """Run the command; returns 1 where a clip could not be measured.

    Raises:
        ConfigurationError: options that contradict each other, an unknown metric or baseline, two systems of one name.
        DataError: no audio, or folders without pairs.
        CheckpointError: an enhancer, tokenizer or recogniser that cannot be loaded.
        MissingExtraError: a figure, a baseline or the picture needs a package that is not installed.
        OutputError: tables or picture cannot be written.
    """
    from dasheng_tokenizer.evaluation.enhancement import evaluate_enhancement
    from dasheng_tokenizer.evaluation.enhancement_tables import NAME, Tables
    from dasheng_tokenizer.evaluation.enhancement_words import Recogniser
    from dasheng_tokenizer.evaluation.metric_columns import require_metrics
    from dasheng_tokenizer.evaluation.reconstruction_tables import check_writable
    from dasheng_tokenizer.files import require_extra

    _check(arguments)
    wanted = [name.strip() for name in arguments.metrics.split(",") if name.strip()]
    metrics = require_metrics(METRIC_NAMES if wanted == ["all"] else wanted)
    require_extra("matplotlib.figure", "report")
    for path in (arguments.output / NAME, arguments.report):
        if path is not None:
            check_writable(path)
    systems = _systems(arguments)
    recogniser = Recogniser(arguments.wer, arguments.device or "cpu") if arguments.wer else None
    examples = _examples(arguments)
    outcome = evaluate_enhancement(
        examples, systems, metrics, arguments.output, arguments.workers, recogniser, arguments.keep_audio
    )
    _write(arguments, Tables(outcome, arguments.seed), examples)
    return _exit_code(outcome)


def _write(arguments: argparse.Namespace, tables: Tables, examples: ExampleSet) -> None:
    from dasheng_tokenizer.evaluation.enhancement_picture import draw
    from dasheng_tokenizer.evaluation.enhancement_tables import NAME

    sources = arguments.pairs or [*arguments.sources, "with", *arguments.noise]
    report = tables.report(
        title=arguments.title,
        command=shlex.join(["dasheng-tokenizer", *getattr(arguments, "command_line", sys.argv[1:])]),
        data=" ".join(map(str, sources)),
        seed=arguments.seed,
    )
    tables.save(arguments.output)
    picture = (arguments.report or arguments.output / NAME).with_suffix(".png")
    draw(picture, tables, examples, tables.outcome.systems)
    if arguments.report is not None:
        report.save(arguments.report)
    print(report.markdown())
    print(f"\npicture: {picture}")


def _exit_code(outcome: Outcome) -> int:
    for name, reason in outcome.failed():
        print(f"error: {one_line(f'{name}: {reason}')}", file=sys.stderr)
    return 1 if outcome.failed() else 0


def _check(arguments: argparse.Namespace) -> None:
    """Refuse options that contradict each other."""
    mixed = {
        "SOURCE": arguments.sources,
        "--noise": arguments.noise,
        "--snr": arguments.snr,
        "--where": arguments.where,
        "--noise-where": arguments.noise_where,
        "--noise-label": arguments.noise_label,
    }
    given = [name for name, value in mixed.items() if value]
    if arguments.pairs and given:
        raise ConfigurationError(f"--pairs measures recordings that exist: leave {', '.join(given)} out")
    if not arguments.pairs and (arguments.log or arguments.texts):
        raise ConfigurationError("--log and --texts belong to --pairs; labels of SOURCE come from its JSON files")
    if not arguments.pairs and not (arguments.sources and arguments.noise):
        raise ConfigurationError("nothing to measure: give clean speech and --noise, or --pairs NOISY CLEAN")


def _examples(arguments: argparse.Namespace) -> ExampleSet:
    from dasheng_tokenizer.evaluation.enhancement_inputs import MixtureSet
    from dasheng_tokenizer.evaluation.enhancement_pairs import PairSet

    if arguments.pairs:
        noisy, clean = arguments.pairs
        return PairSet(noisy, clean, arguments.log, arguments.texts, arguments.seed, arguments.limit)
    return MixtureSet(
        arguments.sources,
        arguments.noise,
        arguments.snr or RATIOS,
        arguments.output / "clips",
        arguments.seed,
        _labels("--where", arguments.where),
        _labels("--noise-where", arguments.noise_where),
        arguments.noise_label,
        arguments.limit,
    )


def _labels(option: str, items: list[str]) -> dict[str, list[str]]:
    """`KEY=VALUE` texts; of a key that comes again any of its values will do."""
    held: dict[str, list[str]] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not (key and equals):
            raise ConfigurationError(f"{option} {item}: write KEY=VALUE, as in domain=speech")
        held.setdefault(key, []).append(value)
    return held


def _systems(arguments: argparse.Namespace) -> list[System]:
    """The unprocessed clips, enhancers, baselines, ceilings, in this order."""
    from dasheng_tokenizer.cli_audio import load_model
    from dasheng_tokenizer.evaluation.enhancement_systems import Ceiling, Unprocessed, ceilings, parse_baseline

    baselines = [parse_baseline(text) for text in arguments.baseline]  # first, since a slip there is found at once
    enhancers = _enhancers(arguments)
    ceiling = ceilings(enhancers) if enhancers else [Ceiling(load_model(arguments.tokenizer, arguments.device, None))]
    return [Unprocessed(), *enhancers, *baselines, *ceiling]


def _enhancers(arguments: argparse.Namespace) -> list[EnhancerSystem]:
    named: list[tuple[str, str | None]] = []
    wanted = arguments.system or [EMBEDDED]
    if NO_ENHANCER in wanted and len(wanted) > 1:
        raise ConfigurationError(f"--system {NO_ENHANCER} leaves all enhancers out; give it alone")
    for text in wanted if wanted != [NO_ENHANCER] else []:
        name, equals, folder = text.partition("=")
        if text != EMBEDDED and not (name and folder):
            raise ConfigurationError(f"--system {text}: write NAME=FOLDER, {EMBEDDED} or {NO_ENHANCER}")
        named.append((name, folder) if equals else ("embedded enhancer", None))
    if not named:
        return []
    from dasheng_tokenizer.enhancement.enhancer import Enhancer
    from dasheng_tokenizer.evaluation.enhancement_systems import EnhancerSystem

    return [
        EnhancerSystem(Enhancer.from_pretrained(folder, arguments.tokenizer, arguments.device), name)
        for name, folder in named
    ]
