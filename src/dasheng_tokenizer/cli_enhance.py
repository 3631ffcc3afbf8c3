"""The command `enhance`."""

from __future__ import annotations

import argparse
from pathlib import Path

from dasheng_tokenizer.audio_formats import WRITE_FORMATS
from dasheng_tokenizer.cli_audio import Progress, plan_jobs, run_jobs
from dasheng_tokenizer.cli_paths import ENHANCED, Job, is_audio


def add_enhance_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `enhance` to the commands."""
    text = f"noisy speech → clean speech (NAME{ENHANCED}.wav)"
    command = commands.add_parser("enhance", help=text, description=text)
    command.add_argument("inputs", nargs="+", type=Path, metavar="FILE_OR_FOLDER")
    command.add_argument(
        "-o", "--output", type=Path, metavar="OUT", help="folder, or file for one input (default: beside each input)"
    )
    command.add_argument("--model", metavar="ENHANCER", help="enhancer folder (default: the embedded one)")
    command.add_argument("--tokenizer", metavar="M", help="tokenizer folder or hub name (default: the enhancer's own)")
    command.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    command.add_argument("--format", choices=("wav", "flac"), default="wav", help="audio format (default: wav)")
    command.add_argument("--overwrite", action="store_true", help="replace existing outputs (default: keep them)")


def run_enhance(arguments: argparse.Namespace) -> int:
    """Run the command; returns 1 where an input could not be enhanced.

    Raises:
        ConfigurationError: one output file for several inputs, or no such device.
        CheckpointError, ModelMismatchError: see `Enhancer.from_pretrained`.
    """
    from dasheng_tokenizer.enhancement.enhancer import Enhancer

    work = plan_jobs(arguments, is_audio, "audio files", f"{ENHANCED}.{arguments.format}", WRITE_FORMATS)
    enhancer = Enhancer.from_pretrained(arguments.model, arguments.tokenizer, arguments.device) if work.jobs else None

    def action(job: Job, progress: Progress) -> str:
        assert enhancer is not None
        enhancer.enhance_file(job.source, job.target, progress)
        return ""

    return run_jobs(work, arguments.overwrite, action)
