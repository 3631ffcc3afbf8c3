"""Which inputs a command works on and which outputs they get; no two inputs share one."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from dasheng_tokenizer.audio_formats import READ_SUFFIXES
from dasheng_tokenizer.files import is_partial

TOKEN_SUFFIX = ".tokens.safetensors"
DECODED = ".decoded"
RECONSTRUCTED = ".reconstructed"
ENHANCED = ".enhanced"


@dataclass(frozen=True)
class Job:
    """One input, its output, and where the input lies below the folder that was given."""

    source: Path
    target: Path
    relative: Path


@dataclass
class Plan:
    """What is to be done, and the inputs with which nothing can be done: (name, reason)."""

    jobs: list[Job] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)


def is_audio(path: Path) -> bool:
    """Whether a file found in a folder is taken for audio; not what other commands wrote there."""
    return path.suffix.lower() in READ_SUFFIXES and not path.stem.endswith((DECODED, RECONSTRUCTED, ENHANCED))


def is_tokens(path: Path) -> bool:
    """Whether a file found in a folder is taken for a token file."""
    return path.name.endswith(TOKEN_SUFFIX)


def plan(
    inputs: Iterable[Path],
    output: Path | None,
    accepts: Callable[[Path], bool],
    kind: str,
    suffix: str,
    file_suffixes: Iterable[str],
) -> Plan:
    """Find the files and give each its output.

    Args:
        inputs: Files, taken as they are, and folders, searched to any depth with their structure kept.
        output: Folder for the outputs, or, for one input file, the output file. None: beside the inputs.
        accepts: Which files of a folder count.
        kind: What they are called in messages.
        suffix: What follows the name of the input without its suffix; two inputs that differ only in their suffix
            (song.wav, song.mp3) keep it in the names of their outputs.
        file_suffixes: Suffixes by which `output` is known as a file.
    """
    result = Plan()
    inputs = list(inputs)
    found: dict[str, tuple[Path, Path]] = {}  # absolute path → path as given, and path below the folder given
    several = sum(os.path.isdir(one) for one in inputs) > 1
    for one in inputs:
        if os.path.isdir(one):
            files = sorted(path for path in _files_below(one, output, result.failures) if accepts(path))
            if not files:
                result.failures.append((str(one), f"no {kind} in this folder; check the path"))
            prefix = Path(one.resolve().name) if several else Path()
            pairs = [(path, prefix / path.relative_to(one)) for path in files]
        elif os.path.exists(one):
            pairs = [(one, Path(one.name))]
        else:
            result.failures.append((str(one), "does not exist; check the path"))
            continue
        for path, relative in pairs:
            found.setdefault(os.path.abspath(path), (path, relative))
    if is_output_file(output, file_suffixes) and output is not None:
        result.jobs = [Job(path, output, relative) for path, relative in found.values()]
    else:
        result.jobs = _name_outputs([Job(path, Path(), relative) for path, relative in found.values()], output, suffix)
    return _refuse_shared(result)


def is_output_file(output: Path | None, suffixes: Iterable[str]) -> bool:
    """Whether `-o` names a file and not a folder."""
    return output is not None and output.suffix.lower() in suffixes and not os.path.isdir(output)


def _files_below(folder: Path, output: Path | None, failures: list[tuple[str, str]]) -> Iterator[Path]:
    """All files, without hidden ones and without those in the output folder, where it lies below."""

    def note(error: OSError) -> None:
        failures.append((str(error.filename), f"{error.strerror}; this folder was left out"))

    own = output.resolve() if output is not None else None
    for base, folders, names in os.walk(folder, onerror=note):
        here = Path(base)
        folders[:] = [name for name in folders if not name.startswith(".") and (here / name).resolve() != own]
        yield from (here / name for name in names if not name.startswith(".") and not is_partial(here / name))


def _name_outputs(jobs: list[Job], output: Path | None, suffix: str) -> list[Job]:
    def target(job: Job, stem: str) -> Path:
        return (job.source.parent if output is None else output / job.relative.parent) / f"{stem}{suffix}"

    short = [target(job, _stem(job.source)) for job in jobs]
    count = Counter(map(_key, short))
    return [
        replace(job, target=path if count[_key(path)] == 1 else target(job, job.source.name))
        for job, path in zip(jobs, short, strict=True)
    ]


def _stem(path: Path) -> str:
    return path.name.removesuffix(TOKEN_SUFFIX) if is_tokens(path) else path.stem


def _key(path: Path) -> str:
    """Equal for paths that are one file on file systems that ignore case."""
    return os.path.abspath(path).casefold()


def _refuse_shared(result: Plan) -> Plan:
    """Keep the first of several inputs that would have one output, and refuse outputs that are an input."""
    owners: dict[str, Path] = {}
    sources = {_key(job.source) for job in result.jobs}
    kept = []
    for job in result.jobs:
        owner = owners.setdefault(_key(job.target), job.source)
        if owner is not job.source:
            why = f"its output {job.target} is already that of {owner}; give it another folder with -o"
            result.failures.append((str(job.source), why))
        elif _key(job.target) in sources:
            result.failures.append((str(job.source), f"its output {job.target} is one of the inputs; give another -o"))
        else:
            kept.append(job)
    result.jobs = kept
    return result
