"""The command `encode-dataset`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dasheng_tokenizer.errors import ConfigurationError, one_line

ENGINES = ("local",)

EMBEDDED = "embedded"
"""How an index names the tokenizer that ships inside the package."""


def add_encode_dataset_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `encode-dataset` to the commands."""
    text = "captioned audio (tar shards, folders) → latents to train a generator on"
    command = commands.add_parser("encode-dataset", help=text, description=text)
    command.add_argument(
        "sources",
        nargs="+",
        metavar="SRC",
        help="tar shards, folders, audio files, globs or ranges; KEY.json beside each KEY.flac has its caption",
    )
    command.add_argument("destination", type=Path, metavar="DST", help="folder of the latents")
    command.add_argument(
        "--engine", choices=ENGINES, default="local", help="where it runs: local (default) is this process"
    )
    command.add_argument("--model", metavar="M", help="tokenizer folder or hub name (default: the embedded one)")
    command.add_argument(
        "--caption-key",
        default="caption",
        metavar="KEY",
        help="of the text, or list of texts, in KEY.json (default: caption)",
    )
    command.add_argument(
        "--max-seconds",
        type=float,
        default=30.0,
        metavar="S",
        help="longer clips are cut into windows of equal length, each with the clip's captions (default: 30)",
    )
    command.add_argument(
        "--shard-megabytes", type=float, default=64, metavar="N", help="largest file of latents, MiB (default: 64)"
    )
    command.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        default="float16",
        help="number type stored; the model computes in float32 (default: float16)",
    )
    command.add_argument(
        "--batch-seconds", type=float, default=120.0, metavar="S", help="audio encoded at once (default: 120)"
    )
    command.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    command.add_argument("--overwrite", action="store_true", help="replace what DST holds (default: go on with it)")


def run_encode_dataset(arguments: argparse.Namespace) -> int:
    """Run the command; returns 1 where clips were left out."""
    from dasheng_tokenizer.cli_audio import load_model
    from dasheng_tokenizer.generation.latent_folder import is_complete
    from dasheng_tokenizer.generation.latent_writer import encode_latents

    if arguments.destination.is_file():
        raise ConfigurationError(f"{arguments.destination} is a file; name the folder of the latents last")
    complete = not arguments.overwrite and is_complete(arguments.destination)
    index = encode_latents(
        arguments.sources,
        arguments.destination,
        load_model(arguments.model, arguments.device, None),
        source_name=arguments.model or EMBEDDED,
        captions=arguments.caption_key,
        max_seconds=arguments.max_seconds,
        shard_megabytes=arguments.shard_megabytes,
        dtype=arguments.dtype,
        batch_seconds=arguments.batch_seconds,
        overwrite=arguments.overwrite,
    )
    for name, reason in index.skipped.items():
        print(f"error: {one_line(f'{name}: {reason}')}", file=sys.stderr)
    if complete:
        print(f"{arguments.destination} is complete, nothing to do (--overwrite makes it anew)")
    print(
        f"{arguments.destination}: {index.clips} clips, {index.hours:.2f} hours, {index.tokens} tokens of width "
        f"{index.latent_dim} in {index.shards} shards; {len(index.skipped)} left out"
    )
    return 1 if index.skipped else 0
