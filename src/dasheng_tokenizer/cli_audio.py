"""The commands on audio files and token files: encode, decode, reconstruct."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TextIO

from tqdm import tqdm

from dasheng_tokenizer.audio_formats import WRITE_FORMATS
from dasheng_tokenizer.cli_paths import (
    DECODED,
    RECONSTRUCTED,
    TOKEN_SUFFIX,
    Job,
    Plan,
    is_audio,
    is_output_file,
    is_tokens,
    plan,
)
from dasheng_tokenizer.errors import ConfigurationError, DashengTokenizerError, MissingExtraError, one_line
from dasheng_tokenizer.files import atomic_path, require_extra

if TYPE_CHECKING:
    import torch

    from dasheng_tokenizer.tokenizer import DashengTokenizerModel

Progress = Callable[[float, float], None]
TOKEN_SUFFIXES = (".safetensors",)


def load_model(name: str | None, device: str | None, dtype: str | None) -> DashengTokenizerModel:
    """Load a model for inference.

    Args:
        name: Folder or hub name; None is the embedded default.
        device: As torch writes it; None takes CUDA where there is one.
        dtype: float32, float16 or bfloat16; None is float32.

    Raises:
        CheckpointError: the model cannot be loaded.
        ConfigurationError: there is no such device.
    """
    import torch
    from transformers.utils import logging

    from dasheng_tokenizer.tokenizer import DashengTokenizerModel

    logging.disable_progress_bar()  # loading takes less than a second per GB
    chosen = chosen_device(device)
    kwargs = {"dtype": getattr(torch, dtype or "float32")}
    model: DashengTokenizerModel = DashengTokenizerModel.from_pretrained(*([name] if name else []), **kwargs)
    model.to(device=chosen)  # type: ignore[call-arg]
    return model.eval()


def chosen_device(name: str | None) -> torch.device:
    """The device of that name; None takes CUDA where there is one.

    Raises:
        ConfigurationError: there is no such device.
    """
    import torch

    chosen = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=chosen).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError(f"device {chosen!r} cannot be used ({reason}); give --device cpu or cuda") from error


@contextmanager
def progress_bar(name: str) -> Iterator[Progress]:
    """Progress within one file, in seconds of audio; seen only when it takes longer than a second."""
    with tqdm(desc=name[-40:], unit="s", leave=False, delay=1, disable=None) as bar:

        def show(done: float, total: float) -> None:
            bar.total = round(total, 1)
            bar.update(round(done, 1) - bar.n)

        yield show


def run_jobs(work: Plan, overwrite: bool, action: Callable[[Job, Progress], str]) -> int:
    """Do what can be done, name what cannot.

    An existing output is complete, since outputs appear whole; it is kept unless `overwrite`, so that a run that was
    killed goes on where it was.

    Returns:
        0, or 1 when an input failed.
    """
    failed = [(name, reason) for name, reason in work.failures]
    for name, reason in failed:
        _say(f"error: {one_line(f'{name}: {reason}')}", sys.stderr)
    done = skipped = 0
    several = len(work.jobs) > 1
    for job in tqdm(work.jobs, unit="file", delay=1, disable=None if several else True):
        if os.path.exists(job.target) and not overwrite:
            _say(f"{job.target} exists, kept (--overwrite makes it anew)")
            skipped += 1
            continue
        try:
            with progress_bar(job.source.name) as progress:
                note = action(job, progress)
            _say(f"{job.source} → {job.target}{note}")
            done += 1
        except DashengTokenizerError as error:
            failed.append((str(job.source), str(error)))
            _say(f"error: {one_line(_named(job.source, str(error)))}", sys.stderr)
        except Exception as error:  # a fault of ours, or memory: shown in full, and the other files still get done
            failed.append((str(job.source), repr(error)))
            _say(f"{traceback.format_exc()}error: {job.source}: {type(error).__name__}: {error}", sys.stderr)
    if done + skipped + len(failed) > 1:
        _say(f"{done} done, {skipped} kept, {len(failed)} failed")
    return 1 if failed else 0


def _named(source: Path, message: str) -> str:
    return message if str(source) in message else f"{source}: {message}"


def _say(text: str, stream: TextIO | None = None) -> None:
    tqdm.write(text, file=stream or sys.stdout)


def encode(arguments: argparse.Namespace) -> int:
    """Audio files → token files."""
    import torch

    from dasheng_tokenizer.chunking import encode_file

    work = plan_jobs(arguments, is_audio, "audio files", TOKEN_SUFFIX, TOKEN_SUFFIXES)
    model = load_model(arguments.model, arguments.device, arguments.dtype) if work.jobs else None
    stored = getattr(torch, arguments.token_dtype) if arguments.token_dtype else None

    def action(job: Job, progress: Progress) -> str:
        assert model is not None
        tokens = encode_file(model, job.source, job.target, stored, progress)
        return f" ({tokens.duration:.2f} s, {tokens.num_channels} × {tokens.num_tokens} tokens)"

    return run_jobs(work, arguments.overwrite, action)


def decode(arguments: argparse.Namespace) -> int:
    """Token files → audio files."""
    from dasheng_tokenizer.chunking import decode_file
    from dasheng_tokenizer.token_stream import TokenReader

    suffix = f"{DECODED}.{arguments.format}"
    work = plan_jobs(arguments, is_tokens, f"token files (*{TOKEN_SUFFIX})", suffix, WRITE_FORMATS)
    model = load_model(arguments.model, arguments.device, arguments.dtype) if work.jobs else None

    def action(job: Job, progress: Progress) -> str:
        assert model is not None
        tokens = TokenReader(job.source)
        decode_file(model, tokens, job.target, progress, arguments.force)
        return f" ({tokens.duration:.2f} s, {tokens.sampling_rate} Hz)"

    return run_jobs(work, arguments.overwrite, action)


def reconstruct(arguments: argparse.Namespace) -> int:
    """Audio files → reconstructions with pictures and figures."""
    from dasheng_tokenizer.chunking import decode_file, encode_file
    from dasheng_tokenizer.reconstruction_report import Report, draw, measure, read_start

    suffix = f"{RECONSTRUCTED}.{arguments.format}"
    work = plan_jobs(arguments, is_audio, "audio files", suffix, WRITE_FORMATS)
    report = Report.open(_report_folder(arguments)) if work.jobs else None
    pictures = _can_draw()
    model = load_model(arguments.model, arguments.device, arguments.dtype) if work.jobs else None

    def action(job: Job, progress: Progress) -> str:
        assert model is not None and report is not None
        # The audio takes its name last: where it exists, picture and figures do too.
        with TemporaryDirectory() as scratch, atomic_path(job.target) as unfinished:
            kept = Path(scratch) / TOKEN_SUFFIX
            tokens = encode_file(model, job.source, kept, None, lambda done, total: progress(done / 2, total))
            decode_file(model, tokens, unfinished, lambda done, total: progress((done + total) / 2, total))
            original, decoded = read_start(job.source), read_start(unfinished)
            row = {
                "file": str(job.source),
                "reconstruction": str(job.target),
                "model": tokens.model_name,
                "weights_hash": tokens.weights_hash,
                "seconds": round(tokens.duration, 3),
                "sampling_rate": tokens.sampling_rate,
                "channels": tokens.num_channels,
                "tokens": tokens.num_tokens,
            } | measure(original, decoded)
            if pictures:
                draw(job.target.with_suffix(".png"), original, decoded, job.source.name)
            report.add(row)
        return ""

    code = run_jobs(work, arguments.overwrite, action)
    if report is not None and report.rows:
        _say(f"\n{report.table()}\n\n{report.folder / 'metrics.json'}, {report.folder / 'metrics.csv'}")
    return code


def _can_draw() -> bool:
    try:
        require_extra("matplotlib.figure", "report")
    except MissingExtraError as error:
        _say(f"warning: no pictures: {error}", sys.stderr)
        return False
    return True


def plan_jobs(
    arguments: argparse.Namespace, accepts: Callable[[Path], bool], kind: str, suffix: str, suffixes: Iterable[str]
) -> Plan:
    """See `cli_paths.plan`.

    Raises:
        ConfigurationError: one output file for several inputs.
    """
    output = arguments.output
    if is_output_file(output, suffixes) and (len(arguments.inputs) > 1 or Path(arguments.inputs[0]).is_dir()):
        raise ConfigurationError(f"-o {output} is one file, but there are several inputs; give a folder")
    return plan(arguments.inputs, output, accepts, kind, suffix, suffixes)


def _report_folder(arguments: argparse.Namespace) -> Path:
    """Where the table goes: the output folder, or the first folder given, or that of the first file."""
    place = arguments.output if arguments.output is not None else Path(arguments.inputs[0])
    return place.parent if is_output_file(place, WRITE_FORMATS) or place.is_file() else place
