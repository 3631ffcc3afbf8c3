"""Encoding a corpus, on whatever engine: plan, missing units, index.

What is done is read from the shards that are whole, nothing else is remembered. So a run that was killed, at whatever
moment, goes on with the same call, several runs may share the units of one folder, and every clip is there once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from dasheng_tokenizer.errors import ConfigurationError, DataError
from dasheng_tokenizer.generation.latent_index import FORMAT, VERSION, LatentIndex, TokenStatistics
from dasheng_tokenizer.scale.folder import claim, clear, fingerprint, is_complete, is_done, part_name
from dasheng_tokenizer.scale.options import EncodingOptions
from dasheng_tokenizer.scale.plan import plan_units
from dasheng_tokenizer.scale.shard_writer import BATCH_SECONDS, EncodingJob, LatentModel, encode_unit
from dasheng_tokenizer.spectral import SAMPLES_PER_TOKEN, SAMPLING_RATE
from dasheng_tokenizer.training.clips import SkipReport


class Engine(Protocol):
    """Something that encodes units of work, in any order."""

    def run(self, job: EncodingJob, numbers: Sequence[int], advance: Callable[[int], None]) -> None:
        """Encode the units of these numbers; `advance` is told how many items were added.

        Raises:
            DashengTokenizerError: not all units could be encoded.
        """


@dataclass(frozen=True)
class ThisProcess:
    """The engine that encodes one unit after the other in this process, with this model."""

    model: LatentModel

    def run(self, job: EncodingJob, numbers: Sequence[int], advance: Callable[[int], None]) -> None:
        """As in `Engine`."""
        for number in numbers:
            encode_unit(job, number, self.model, advance)


@dataclass(frozen=True)
class Share:
    """One of several runs that fill a folder together: it encodes every `count`-th unit, from unit `index` on."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        """Refuse shares that do not exist."""
        if not 0 <= self.index < self.count:
            raise ConfigurationError(f"there is no share {self.index} of {self.count}; they count from 0")


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a run leaves.

    Attributes:
        index: of the whole data set; None while other shares are not done.
        skipped: what this run's share leaves out, with reasons.
        units: units of work in this run's share.
    """

    index: LatentIndex | None
    skipped: dict[str, str]
    units: int


def encode_latents(
    sources: str | Path | Sequence[str | Path],
    destination: str | Path,
    model: LatentModel,
    *,
    source_name: str,
    batch_seconds: float = BATCH_SECONDS,
    overwrite: bool = False,
    progress: bool = True,
    **options: Any,
) -> LatentIndex:
    """`encode_dataset` in this process, with a model that is loaded.

    Args:
        sources: see `encode_dataset`, as all others.
        destination: folder of the result.
        model: tokenizer, in eval mode and on the device to compute on.
        source_name: what to load that tokenizer by again.
        batch_seconds: audio encoded at once.
        overwrite: whether what the folder holds is replaced.
        progress: show a bar.
        options: of `EncodingOptions`.

    Returns:
        The index; `skipped` has the clips that were left out, with reasons.
    """
    outcome = encode_dataset(
        sources,
        destination,
        ThisProcess(model),
        model,
        EncodingOptions(**options),
        source_name=source_name,
        batch_seconds=batch_seconds,
        overwrite=overwrite,
        progress=progress,
    )
    assert outcome.index is not None  # there are no other shares
    return outcome.index


def encode_dataset(
    sources: str | Path | Sequence[str | Path],
    destination: str | Path,
    engine: Engine,
    model: LatentModel,
    options: EncodingOptions,
    *,
    source_name: str,
    batch_seconds: float = BATCH_SECONDS,
    share: Share | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Outcome:
    """Encode a corpus, or go on with an encoding that was interrupted; a finished one is left as it is.

    Args:
        sources: tar shards, audio files, folders, globs, ranges, manifests or URLs. In shards and folders each clip
            `KEY.flac` (or another kind of audio) has its captions in `KEY.json`. See `plan.plan_units`.
        destination: folder of the result, on a disk that all workers share.
        engine: what does the work.
        model: the tokenizer that the engine uses, for its name, width and hash.
        options: what is stored.
        source_name: what to load that tokenizer by again.
        batch_seconds: audio encoded at once, padding included. May change when a run goes on; rounding may differ then.
        share: what part of the units this run encodes; None is all of them.
        overwrite: whether a data set of another model, other options or other sources, or a finished one, is replaced.
        progress: show a bar.

    Raises:
        ConfigurationError: options out of range.
        DataError: no sources, no clip that can be used, or a storage that does not answer.
        ModelMismatchError: the folder holds latents of another model.
        OutputError: it holds those of other sources or options, or cannot be written.
        WorkerError: workers died, or a unit failed, too often.
    """
    _check(options, model, batch_seconds)
    share = share or Share()
    if overwrite and share.count > 1:
        raise ConfigurationError("one share must not remove what others wrote; remove the folder, then start all")
    plan = plan_units(
        [sources] if isinstance(sources, (str, Path)) else list(sources), options.clips_per_unit, options.path_key
    )
    folder = Path(destination).absolute()
    encoding = claim(folder, _encoding(model, source_name, options, plan.digest), overwrite)
    job = EncodingJob(
        folder, plan.units, options, batch_seconds, encoding["model_hash"], model.latent_dim, fingerprint(encoding)
    )
    mine = range(share.index, len(plan.units), share.count)
    if not is_complete(folder):
        held = {number: job.parts(number) for number in mine}
        missing = [number for number in mine if not is_done(held[number])]
        done = sum(len(part["tokens"]) for parts in held.values() for part in parts)
        with tqdm(desc="encoding", unit=" clips", initial=done, disable=None if progress else True) as bar:

            def advance(items: int) -> None:
                bar.update(items)

            if missing:
                engine.run(job, missing, advance)
        _write_index(job, encoding)
    skipped = _skipped(job, mine)
    return Outcome(LatentIndex.read(folder) if is_complete(folder) else None, skipped.skipped, len(mine))


def _encoding(model: LatentModel, source_name: str, options: EncodingOptions, digest: str) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "model_hash": model.weights_hash(),
        "tokenizer": source_name,
        "latent_dim": model.latent_dim,
        "frame_rate": SAMPLING_RATE / SAMPLES_PER_TOKEN,
        "options": asdict(options),
        "sources": digest,
    }


def _check(options: EncodingOptions, model: LatentModel, batch_seconds: float) -> None:
    if not 0 < batch_seconds < float("inf"):
        raise ConfigurationError(f"a batch of {batch_seconds} seconds holds nothing; {BATCH_SECONDS:g} are usual")
    mode = getattr(getattr(model, "config", None), "length_mode", "exact")
    if mode != "exact":
        raise ConfigurationError(f'latent data sets are exact; load the model with length_mode="exact", not {mode!r}')
    least = options.item_bytes(options.max_tokens, model.latent_dim)
    if least > options.shard_bytes:
        raise ConfigurationError(
            f"an item of {options.max_seconds:g} s needs {(least + 1024) / 2**20:.2f} MiB, more than a shard of "
            f"{options.shard_megabytes:g} MiB; take larger shards or shorter items"
        )


def _skipped(job: EncodingJob, numbers: Iterable[int]) -> SkipReport:
    """What the shards of these units note as left out. Of two clips of one name, the second says where it belongs."""
    report = SkipReport()
    for number in numbers:
        for place, part in enumerate(job.parts(number)):
            for name, why in part["skipped"].items():
                report.add(f"{name} ({part_name(number, place)})" if name in report.skipped else name, why)
    return report


def _write_index(job: EncodingJob, encoding: dict[str, Any]) -> None:
    """Sum up the shards, if all units are done; which run does so makes no difference.

    Raises:
        DataError: there is not one item.
    """
    statistics = TokenStatistics.of(torch.zeros(0, encoding["latent_dim"]))
    names: list[str] = []
    clips = samples = 0
    for number in range(len(job.units)):
        parts = job.parts(number)
        if not is_done(parts):
            return
        for place, part in enumerate(parts):
            if part["tokens"]:
                names.append(part_name(number, place))
            statistics = statistics.merge(TokenStatistics.from_json(part["statistics"]))
            clips, samples = clips + len(part["tokens"]), samples + part["samples"]
    report = _skipped(job, range(len(job.units)))
    if not clips:
        clear(job.folder)  # free for better sources
        raise DataError(f"none of the clips can be encoded; {report.summary()}" if report else "the sources are empty")
    LatentIndex(
        encoding["model_hash"],
        encoding["tokenizer"],
        encoding["latent_dim"],
        encoding["frame_rate"],
        statistics,
        clips,
        hours=samples / SAMPLING_RATE / 3600,
        skipped=report.skipped,
        names=tuple(names),
        options=encoding["options"],
        format=job.options.format,
    ).save(job.folder)
