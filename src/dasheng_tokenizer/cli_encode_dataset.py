"""The command `encode-dataset`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dasheng_tokenizer.errors import ConfigurationError, one_line

if TYPE_CHECKING:
    from dasheng_tokenizer.scale.encode import Engine
    from dasheng_tokenizer.tokenizer import DashengTokenizerModel

ENGINES = ("local", "ray")
FORMATS = ("safetensors", "webdataset", "parquet")

EMBEDDED = "embedded"
"""How an index names the tokenizer that ships inside the package."""


def add_encode_dataset_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `encode-dataset` to the commands."""
    text = "audio, with captions or without → latents in shards, on one machine or a cluster"
    command = commands.add_parser("encode-dataset", help=text, description=text)
    command.add_argument(
        "sources",
        nargs="+",
        metavar="SRC",
        help="tar shards, folders, audio files, globs, ranges, manifests (.jsonl, .parquet), or URLs of these; "
        "KEY.json beside each KEY.flac, or the row of the manifest, has its caption",
    )
    command.add_argument("destination", type=Path, metavar="DST", help="folder of the latents")
    _add_engine_options(command)
    command.add_argument("--model", metavar="M", help="tokenizer folder or hub name (default: the embedded one)")
    command.add_argument(
        "--caption-key",
        default="caption",
        metavar="KEY",
        help="of the text, or list of texts, in KEY.json or the manifest (default: caption)",
    )
    command.add_argument(
        "--keep-uncaptioned", action="store_true", help="keep clips without a caption; no generator learns from these"
    )
    command.add_argument(
        "--path-key", metavar="KEY", help="column of the audio in a manifest (default: path, audio, audio_filepath, …)"
    )
    command.add_argument(
        "--max-seconds",
        type=float,
        default=30.0,
        metavar="S",
        help="longer clips are cut into windows of equal length, each with the clip's captions (default: 30)",
    )
    command.add_argument(
        "--format", choices=FORMATS, default="safetensors", help="kind of shards (default: safetensors)"
    )
    command.add_argument(
        "--shard-megabytes", type=float, default=64, metavar="N", help="largest file of latents, MiB (default: 64)"
    )
    command.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        default="float16",
        help="number type stored (default: float16)",
    )
    command.add_argument(
        "--model-dtype",
        choices=("float16", "bfloat16", "float32"),
        default="float32",
        help="arithmetic of the model (default: float32)",
    )
    command.add_argument(
        "--batch-seconds", type=float, default=120.0, metavar="S", help="audio encoded at once (default: 120)"
    )
    command.add_argument(
        "--clips-per-unit",
        type=int,
        default=512,
        metavar="N",
        help="files, or rows, that a worker encodes at a time; a tar shard is one unit of work (default: 512)",
    )
    command.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    command.add_argument("--overwrite", action="store_true", help="replace what DST holds (default: go on with it)")


def _add_engine_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--engine", choices=ENGINES, default="local", help="where it runs: local (default) is this machine"
    )
    command.add_argument(
        "--workers", type=int, metavar="N", help="processes, one model each (default: one for each GPU, or one)"
    )
    command.add_argument(
        "--ray-address", metavar="A", help="of a Ray cluster (default: RAY_ADDRESS, or Ray on this machine)"
    )
    command.add_argument(
        "--cpus-per-worker", type=int, metavar="N", help="threads of each (default: cores divided by workers; Ray: 1)"
    )
    command.add_argument(
        "--gpus-per-worker", type=float, default=1, metavar="X", help="share of a GPU, with Ray (default: 1)"
    )
    command.add_argument(
        "--shard-index", type=int, default=0, metavar="I", help="of this run among --shard-count (default: 0)"
    )
    command.add_argument(
        "--shard-count", type=int, default=1, metavar="N", help="runs that share the work and DST (default: 1)"
    )


def run_encode_dataset(arguments: argparse.Namespace) -> int:
    """Run the command; returns 1 where clips were left out."""
    from dasheng_tokenizer.scale.encode import Share, encode_dataset
    from dasheng_tokenizer.scale.folder import is_complete
    from dasheng_tokenizer.scale.options import EncodingOptions

    if arguments.destination.is_file():
        raise ConfigurationError(f"{arguments.destination} is a file; name the folder of the latents last")
    options = EncodingOptions(
        captions=arguments.caption_key,
        max_seconds=arguments.max_seconds,
        shard_megabytes=arguments.shard_megabytes,
        dtype=arguments.dtype,
        format=arguments.format,
        keep_uncaptioned=arguments.keep_uncaptioned,
        clips_per_unit=arguments.clips_per_unit,
        path_key=arguments.path_key,
        arithmetic=arguments.model_dtype,
    )
    share = Share(arguments.shard_index, arguments.shard_count)
    complete = not arguments.overwrite and is_complete(arguments.destination)
    engine, model = _engine(arguments)
    outcome = encode_dataset(
        arguments.sources,
        arguments.destination,
        engine,
        model,
        options,
        source_name=arguments.model or EMBEDDED,
        batch_seconds=arguments.batch_seconds,
        share=share,
        overwrite=arguments.overwrite,
    )
    for name, reason in outcome.skipped.items():
        print(f"error: {one_line(f'{name}: {reason}')}", file=sys.stderr)
    if complete:
        print(f"{arguments.destination} is complete, nothing to do (--overwrite makes it anew)")
    if outcome.index is None:
        print(f"share {share.index} of {share.count} is done, {outcome.units} units of work; others are not yet")
    else:
        index = outcome.index
        print(
            f"{arguments.destination}: {index.clips} clips, {index.hours:.2f} hours, {index.tokens} tokens of width "
            f"{index.latent_dim} in {index.shards} shards; {len(index.skipped)} left out"
        )
    return 1 if outcome.skipped else 0


def _engine(arguments: argparse.Namespace) -> tuple[Engine, DashengTokenizerModel]:
    """The engine, and the model that it uses; in this process, or to know its width and hash."""
    import torch

    from dasheng_tokenizer.cli_audio import load_model
    from dasheng_tokenizer.scale.encode import ThisProcess
    from dasheng_tokenizer.scale.local_engine import LocalProcesses
    from dasheng_tokenizer.scale.ray_engine import RayActors

    name, workers = arguments.model, arguments.workers
    if name and os.path.exists(name):
        name = os.path.abspath(name)  # workers of Ray run in other folders
    if arguments.engine == "ray":
        cores = arguments.cpus_per_worker or 1
        actors = RayActors(workers, name, arguments.ray_address, arguments.device, cores, arguments.gpus_per_worker)
        return actors, load_model(name, "cpu", None)
    if arguments.ray_address:
        raise ConfigurationError("--ray-address goes with --engine ray")
    gpus = torch.cuda.device_count() if arguments.device is None else 0
    if workers is None:
        workers = max(1, gpus)
    if workers == 1:
        model = load_model(name, arguments.device, arguments.model_dtype)
        return ThisProcess(model), model
    devices = tuple(f"cuda:{number}" for number in range(gpus)) or ((arguments.device,) if arguments.device else ())
    return LocalProcesses(workers, name, devices, arguments.cpus_per_worker), load_model(name, "cpu", None)
