"""The command `generate`."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
import traceback
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from dasheng_tokenizer.audio import WRITE_FORMATS
from dasheng_tokenizer.cli_paths import is_output_file
from dasheng_tokenizer.errors import ConfigurationError, DashengTokenizerError, TextError
from dasheng_tokenizer.files import make_folder

if TYPE_CHECKING:
    from dasheng_tokenizer.generation.pipeline import TextToAudioPipeline

_NAME = 40
"""Characters of the text that the name of its file keeps."""


@dataclass(frozen=True)
class Job:
    """A clip to make."""

    text: str
    seed: int
    target: Path


def add_generate_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `generate` to the commands."""
    text = "texts → audio files (TEXT.seedN.wav)"
    command = commands.add_parser("generate", help=text, description=text)
    command.add_argument("texts", nargs="*", metavar="TEXT", help="what shall be heard")
    command.add_argument(
        "--from-file", type=Path, metavar="FILE", help="one text a line, UTF-8; empty lines are left out"
    )
    command.add_argument(
        "-o", "--output", type=Path, metavar="OUT", help="file for one clip, else folder (default: the current one)"
    )
    command.add_argument(
        "--seconds", type=float, metavar="S", help="length of a clip (default: the model's typical one)"
    )
    command.add_argument("--steps", type=int, default=25, metavar="N", help="of the sampler (default: 25)")
    command.add_argument(
        "--guidance",
        type=float,
        default=3.0,
        metavar="G",
        help="1 follows the text, above it exaggerates it, 0 ignores it (default: 3)",
    )
    command.add_argument(
        "--method", choices=("euler", "midpoint"), default="euler", help="midpoint is finer and costs twice as much"
    )
    command.add_argument(
        "--seed", type=int, default=0, metavar="K", help="the same seed gives the same clip (default: 0)"
    )
    command.add_argument(
        "--count", type=int, default=1, metavar="N", help="clips a text, of seeds K, K+1, … (default: 1)"
    )
    command.add_argument("--model", metavar="GENERATOR", help="generator folder (default: the embedded one)")
    command.add_argument("--tokenizer", metavar="M", help="tokenizer folder or hub name (default: the generator's own)")
    command.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    command.add_argument("--batch-size", type=int, default=8, metavar="B", help="clips sampled at once (default: 8)")
    command.add_argument("--format", choices=("wav", "flac"), default="wav", help="audio format (default: wav)")
    command.add_argument("--overwrite", action="store_true", help="replace existing outputs (default: keep them)")


def run_generate(arguments: argparse.Namespace) -> int:
    """Run the command; returns 1 where a clip could not be made.

    Raises:
        ConfigurationError: settings out of range, or no text.
        TextError: the file of texts cannot be read or has none.
        OutputError: the folder of the outputs cannot be made.
        CheckpointError, ModelMismatchError, MissingExtraError: see `TextToAudioPipeline.from_pretrained`.
    """
    jobs, failed = _plan(arguments)
    todo = []
    for job in jobs:
        if os.path.exists(job.target) and not arguments.overwrite:
            _say(f"{job.target} exists, kept (--overwrite makes it anew)")
        else:
            todo.append(job)
    done = 0
    if todo:
        from dasheng_tokenizer.generation.pipeline import TextToAudioPipeline

        make_folder(todo[0].target.parent)  # a slip there shows before the work and not after it
        pipeline = TextToAudioPipeline.from_pretrained(arguments.model, arguments.tokenizer, device=arguments.device)
        done = _generate(pipeline, todo, arguments)
        failed += len(todo) - done
    if len(jobs) + failed > 1:
        _say(f"{done} done, {len(jobs) - len(todo)} kept, {failed} failed")
    return 1 if failed else 0


def _plan(arguments: argparse.Namespace) -> tuple[list[Job], int]:
    """What is to be made; texts that cannot be used are named and counted."""
    from dasheng_tokenizer.generation.text_encoders import checked_texts

    _check(arguments)
    texts = [text.strip() for text in arguments.texts]
    if arguments.from_file is not None:
        texts += read_texts(arguments.from_file)
    texts = list(dict.fromkeys(texts))  # the same text and seed would give the same clip
    single = is_output_file(arguments.output, WRITE_FORMATS)
    if single and len(texts) * arguments.count > 1:
        raise ConfigurationError(f"-o {arguments.output} is one file, but there are several clips; give a folder")
    jobs, failed = [], 0
    for text in texts:
        try:
            checked_texts([text])
        except TextError as error:
            _say(f"error: {text[:_NAME]!r}: {error}", error=True)
            failed += 1
            continue
        for seed in range(arguments.seed, arguments.seed + arguments.count):
            name = f"{file_name(text)}.seed{seed}.{arguments.format}"
            jobs.append(Job(text, seed, arguments.output if single else (arguments.output or Path()) / name))
    return jobs, failed


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what can be refused before anything is loaded."""
    if not arguments.texts and arguments.from_file is None:
        raise ConfigurationError("nothing to generate: give a text in quotes, or --from-file FILE with one a line")
    for name in ("count", "steps", "batch_size"):
        if getattr(arguments, name) < 1:
            raise ConfigurationError(f"--{name.replace('_', '-')} {getattr(arguments, name)} must be at least 1")
    if arguments.seed < 0 or arguments.seed + arguments.count > 2**63:
        raise ConfigurationError(f"--seed {arguments.seed} is outside 0 … 2⁶³ - 1")


def read_texts(path: Path) -> list[str]:
    """Lines of a UTF-8 file, without blanks at both ends and without empty ones.

    Raises:
        TextError: it cannot be read, is no UTF-8, or has no text.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is no UTF-8 text ({error}); save it as UTF-8, one text a line") from error
    except OSError as error:
        raise TextError(f"{path} cannot be read ({error.strerror}); check the path") from error
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise TextError(f"{path} holds no text; write one a line")
    return texts


def file_name(text: str) -> str:
    """A short name, safe on every file system, that no other text has.

    A hash is added where the words alone do not give the text back: capitals, punctuation, or a long text. It depends
    on the text alone, so that a run that was stopped finds what it has made.
    """
    words = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFC", text.casefold())).strip("-")
    short = words if len(words) <= _NAME else words[:_NAME].rpartition("-")[0] or words[:_NAME]
    if short and short.replace("-", " ") == text:
        return short
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{short}.{digest}" if short else digest


def _generate(pipeline: TextToAudioPipeline, jobs: Sequence[Job], arguments: argparse.Namespace) -> int:
    """Make the clips batch by batch, so that what is done is on the disk; returns how many were made."""
    size, made = arguments.batch_size, 0
    batches = [jobs[start : start + size] for start in range(0, len(jobs), size)]
    with tqdm(total=len(batches) * arguments.steps, unit="step", leave=False, delay=1, disable=None) as bar:

        def step(done: int, total: int) -> None:
            bar.update()

        for batch in batches:
            try:
                clips = pipeline(
                    [job.text for job in batch],
                    arguments.seconds,
                    steps=arguments.steps,
                    guidance=arguments.guidance,
                    method=arguments.method,
                    seed=[job.seed for job in batch],
                    batch_size=size,
                    progress=step,
                )
            except ConfigurationError:  # of all batches alike
                raise
            except Exception as error:  # a fault of ours, or memory: shown in full, and the other clips still get done
                trace = "" if isinstance(error, DashengTokenizerError) else traceback.format_exc()
                for job in batch:
                    _say(f"{trace}error: {job.target}: {error}", error=True)
                    trace = ""
                continue
            for job, clip in zip(batch, clips, strict=True):
                try:
                    clip.save(job.target, arguments.overwrite)
                except DashengTokenizerError as error:
                    _say(f"error: {error}", error=True)
                    continue
                _say(f"{job.text[:60]!r} → {job.target} ({clip.seconds:.2f} s, seed {clip.seed})")
                made += 1
    return made


def _say(text: str, error: bool = False) -> None:
    tqdm.write(text, file=sys.stderr if error else sys.stdout)
