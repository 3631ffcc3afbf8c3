"""The command `generate`."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from dasheng_tokenizer.audio_formats import WRITE_FORMATS
from dasheng_tokenizer.cli_generate_requests import END_OF_SEEDS, KEYS, PARTS, Request, read_requests
from dasheng_tokenizer.cli_paths import is_output_file
from dasheng_tokenizer.errors import ConfigurationError, DashengTokenizerError, TextError
from dasheng_tokenizer.files import make_folder

if TYPE_CHECKING:
    from dasheng_tokenizer.generation.pipeline import AudioPipeline

PART_HELP = {
    "speech": "who speaks, and how",
    "transcript": "the words that are spoken",
    "sfx": "sound effects",
    "music": "music",
    "ambience": "surroundings",
}


@dataclass(frozen=True, eq=False)
class Job:
    """A clip to make."""

    request: Request
    seed: int
    target: Path

    @property
    def row(self) -> dict[str, Any]:
        """Its line of `generated.jsonl`."""
        return self.request.row(self.target.name, self.seed)


@dataclass
class ClipList:
    """Keeps `generated.jsonl` of the folder of outputs: lines of these clips, as they appear, beside those of others.

    Args:
        folder: None: the output is one file, and nothing is listed.
        jobs: all that the command knows, in the order of the list.
    """

    folder: Path | None
    jobs: Sequence[Job]
    _there: set[Path] = field(init=False)

    def __post_init__(self) -> None:
        """List what is there already: a process that is killed leaves clips that are not listed yet.

        Raises:
            DataError: the list is damaged.
            OutputError: the list cannot be written.
        """
        self._there = {job.target for job in self.jobs if os.path.isfile(job.target)}
        self._write()

    def add(self, jobs: Iterable[Job]) -> None:
        """List clips that were made now.

        Raises:
            DataError, OutputError: as above.
        """
        self._there.update(job.target for job in jobs)
        self._write()

    def _write(self) -> None:
        if self.folder is None:
            return
        from dasheng_tokenizer.evaluation.generation_clips import MANIFEST, read_manifest, write_manifest

        # Read anew each time: another process may fill the same folder.
        held = read_manifest(self.folder) if os.path.exists(self.folder / MANIFEST) else {}
        own = {job.target.name for job in self.jobs}
        rows = {name: row for name, row in held.items() if name not in own}
        for job in self.jobs:
            if job.target in self._there:
                rows[job.target.name] = {**held.get(job.target.name, {}), **job.row}
        if rows != held:
            write_manifest(self.folder, rows.values())


def add_generate_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `generate` to the commands."""
    text = "texts → audio files (TEXT.seedN.wav)"
    command = commands.add_parser("generate", help=text, description=text)
    command.add_argument("texts", nargs="*", metavar="TEXT", help="what shall be heard")
    for name, about in PART_HELP.items():
        command.add_argument(f"--{name}", metavar="TEXT", help=f"{about}, of every TEXT (published sibling only)")
    command.add_argument(
        "--from-file",
        type=Path,
        metavar="FILE",
        help=f"one text a line, UTF-8; or FILE.jsonl, one JSON object a line with {', '.join(KEYS)}",
    )
    command.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="OUT",
        help="file for one clip, else folder, which gets a list of its clips (default: the current one, without list)",
    )
    command.add_argument("--seconds", type=float, metavar="S", help="length of a clip (default: the model's choice)")
    command.add_argument("--steps", type=int, default=25, metavar="N", help="of the sampler (default: 25)")
    command.add_argument(
        "--guidance",
        type=float,
        metavar="G",
        help="1 follows the text, above it exaggerates it, 0 ignores it (default: 3; published sibling: 5)",
    )
    command.add_argument(
        "--method",
        choices=("euler", "midpoint", "heun"),
        default="euler",
        help="the other two are finer and cost twice as much a step (default: euler)",
    )
    command.add_argument(
        "--seed", type=int, default=0, metavar="K", help="the same seed gives the same clip (default: 0)"
    )
    command.add_argument(
        "--count", type=int, default=1, metavar="N", help="clips a text, of seeds K, K+1, … (default: 1)"
    )
    command.add_argument(
        "--model", metavar="GENERATOR", help="generator folder or hub name (default: the embedded one)"
    )
    command.add_argument("--tokenizer", metavar="M", help="tokenizer folder or hub name (default: the generator's own)")
    command.add_argument("--text-encoder", metavar="T", help="text encoder folder or hub name (default: its own)")
    command.add_argument("--text-encoder-on-cpu", action="store_true", help="saves memory (published sibling only)")
    command.add_argument("--compile", action="store_true", help="with torch.compile (published sibling only)")
    command.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    command.add_argument("--batch-size", type=int, default=8, metavar="B", help="clips sampled at once (default: 8)")
    command.add_argument("--format", choices=("wav", "flac"), default="wav", help="audio format (default: wav)")
    command.add_argument("--overwrite", action="store_true", help="replace existing outputs (default: keep them)")


def run_generate(arguments: argparse.Namespace) -> int:
    """Run the command; returns 1 where a clip could not be made.

    Raises:
        ConfigurationError: settings out of range, or no text.
        TextError: the file of texts or requests cannot be read, has none, or a line is no request.
        DataError: the folder of the outputs has a damaged `generated.jsonl`.
        OutputError: the folder of the outputs cannot be made, or the list in it not be written.
        CheckpointError, ModelMismatchError, MissingExtraError: see `load_pipeline`.
    """
    folder = None if is_output_file(arguments.output, WRITE_FORMATS) else arguments.output or Path()
    jobs, failed = _plan(arguments, folder)
    listed = ClipList(None if arguments.output is None else folder, jobs)  # no list where no folder was named
    todo = []
    for job in jobs:
        if os.path.exists(job.target) and not arguments.overwrite:
            _say(f"{job.target} exists, kept (--overwrite makes it anew)")
        else:
            todo.append(job)
    done = 0
    if todo:
        from dasheng_tokenizer.generation.loading import load_pipeline

        make_folder(todo[0].target.parent)  # a slip there shows before the work and not after it
        pipeline = load_pipeline(
            arguments.model,
            arguments.tokenizer,
            arguments.text_encoder,
            arguments.device,
            offload_text_encoder=arguments.text_encoder_on_cpu,
            compiled=arguments.compile,
        )
        done = _generate(pipeline, _with_lengths(pipeline, todo, arguments.seconds), listed, arguments)
        failed += len(todo) - done
    if len(jobs) + failed > 1:
        _say(f"{done} done, {len(jobs) - len(todo)} kept, {failed} failed")
    return 1 if failed else 0


def _plan(arguments: argparse.Namespace, folder: Path | None) -> tuple[list[Job], int]:
    """What is to be made, equal requests once; those whose text cannot be used are named and counted."""
    from dasheng_tokenizer.generation.text_encoders import checked_texts

    _check(arguments)
    parts = {name: getattr(arguments, name) for name in PARTS if getattr(arguments, name) is not None}
    requests = [Request(text) for text in dict.fromkeys(text.strip() for text in arguments.texts)]
    if arguments.from_file is not None:
        requests += read_requests(arguments.from_file, arguments.count)
    requests = [replace(request, parts={**parts, **request.parts}) for request in requests]
    jobs: dict[str, Job] = {}
    bad: list[str] = []
    for request in requests:
        try:
            checked_texts([str(request.prompt)])
        except TextError as error:
            bad.append(f"error: {request.name}: {error}")
            continue
        first = arguments.seed if request.seed is None else request.seed
        for seed in range(first, first + arguments.count):
            name = f"{request.stem}.seed{seed}.{arguments.format}"
            jobs.setdefault(name, Job(request, seed, arguments.output if folder is None else folder / name))
    if folder is None and len(jobs) + len(bad) > 1:
        raise ConfigurationError(f"-o {arguments.output} is one file, but there are several clips; give a folder")
    for message in bad:
        _say(message, error=True)
    return list(jobs.values()), len(bad)


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what can be refused before anything is loaded."""
    if not arguments.texts and arguments.from_file is None:
        raise ConfigurationError("nothing to generate: give a text in quotes, or --from-file FILE with one a line")
    for name in ("count", "steps", "batch_size"):
        if getattr(arguments, name) < 1:
            raise ConfigurationError(f"--{name.replace('_', '-')} {getattr(arguments, name)} must be at least 1")
    if arguments.seed < 0 or arguments.seed + arguments.count > END_OF_SEEDS:
        raise ConfigurationError(f"--seed {arguments.seed} is outside 0 … 2⁶³ - 1")


def _with_lengths(
    pipeline: AudioPipeline, jobs: Sequence[Job], seconds: float | None
) -> list[tuple[Job, float | None]]:
    """The clips with the lengths asked for, longest first; lines that the generator cannot make are named.

    Clips of similar length share a batch, which saves padding; memory that does not suffice shows at once.

    Raises:
        ConfigurationError: the length for all clips is out of range.
    """
    found: list[tuple[Job, float | None]] = []
    for job in jobs:
        length = seconds if job.request.seconds is None else job.request.seconds
        try:
            pipeline.texts([job.request.prompt])
            if length is not None:
                pipeline.check_seconds(length)
        except (ConfigurationError, TextError) as error:
            if isinstance(error, ConfigurationError) and job.request.seconds is None:
                raise
            _say(f"error: {job.request.name}: {error}", error=True)
            continue
        found.append((job, length))
    return sorted(found, key=lambda pair: -(pair[1] or 0.0))


def _generate(
    pipeline: AudioPipeline, jobs: Sequence[tuple[Job, float | None]], listed: ClipList, arguments: argparse.Namespace
) -> int:
    """Make the clips batch by batch, so that what is done is on the disk; returns how many were made."""
    size, made = arguments.batch_size, 0
    batches = [jobs[start : start + size] for start in range(0, len(jobs), size)]
    with tqdm(total=len(batches) * arguments.steps, unit="step", leave=False, delay=1, disable=None) as bar:

        def step(done: int, total: int) -> None:
            bar.update()

        for batch in batches:
            try:
                clips = pipeline(
                    [job.request.prompt for job, _ in batch],
                    [seconds for _, seconds in batch],
                    steps=arguments.steps,
                    guidance=arguments.guidance,
                    method=arguments.method,
                    seed=[job.seed for job, _ in batch],
                    batch_size=size,
                    progress=step,
                )
            except ConfigurationError:  # of all batches alike
                raise
            except Exception as error:  # a fault of ours, or memory: shown in full, and the other clips still get done
                trace = "" if isinstance(error, DashengTokenizerError) else traceback.format_exc()
                for job, _ in batch:
                    _say(f"{trace}error: {job.target}: {error}", error=True)
                    trace = ""
                continue
            written = []
            for (job, _), clip in zip(batch, clips, strict=True):
                try:
                    clip.save(job.target, arguments.overwrite)
                except DashengTokenizerError as error:
                    _say(f"error: {error}", error=True)
                    continue
                _say(f"{job.request.text[:60]!r} → {job.target} ({clip.seconds:.2f} s, seed {clip.seed})")
                written.append(job)
            listed.add(written)
            made += len(written)
    return made


def _say(text: str, error: bool = False) -> None:
    tqdm.write(text, file=sys.stderr if error else sys.stdout)
