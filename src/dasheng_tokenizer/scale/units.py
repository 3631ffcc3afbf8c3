"""Units of work: what one worker encodes at a time, each read in a fixed order that can be taken up at any clip."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from dasheng_tokenizer.errors import DataError
from dasheng_tokenizer.files import parse_json
from dasheng_tokenizer.scale.storage import base_name, is_url, join, local_copy, read_bytes
from dasheng_tokenizer.training.clips import EncodedClip, Shard, SkipReport, encoded_clips


class Unit(Protocol):
    """Part of the sources. It is sent to workers, so it holds names only."""

    @property
    def group(self) -> str:
        """What the names of its clips in messages begin with."""

    @property
    def name(self) -> str:
        """For messages."""

    def clips(self, report: SkipReport, first: int) -> Iterator[tuple[int, EncodedClip]]:
        """Place of a clip in the unit, and the clip as stored, from that place on.

        A place is the same in every run, also where a clip before it could be read in one run only.

        Raises:
            DataError: a storage does not answer. What is missing or broken is noted in `report` instead.
        """


@dataclass(frozen=True)
class TarUnit:
    """A tar shard: local path or URL."""

    path: str

    @property
    def group(self) -> str:
        """As in `Unit`."""
        return base_name(self.path)

    @property
    def name(self) -> str:
        """As in `Unit`."""
        return self.group

    def clips(self, report: SkipReport, first: int) -> Iterator[tuple[int, EncodedClip]]:
        """As in `Unit`."""
        try:
            with local_copy(self.path) as path:
                held = (
                    _RenamingReport(real=str(path), shown=self.path, shown_in=report) if is_url(self.path) else report
                )
                for place, clip in enumerate(encoded_clips(Shard(path), held)):
                    if place >= first:
                        yield place, clip
        except (FileNotFoundError, PermissionError) as error:  # of the URL; local ones are noted by `encoded_clips`
            report.add(self.path, error.strerror or error)


@dataclass
class _RenamingReport(SkipReport):
    """Says the name of a source where a reader says that of its temporary copy."""

    real: str = ""
    shown: str = ""
    shown_in: SkipReport = field(default_factory=SkipReport)

    def add(self, name: str, reason: object) -> None:
        super().add(name, reason)
        self.shown_in.add(name.replace(self.real, self.shown), str(reason).replace(self.real, self.shown))


@dataclass(frozen=True)
class FilesUnit:
    """Audio files below a folder or URL, each with its labels in a JSON file beside it.

    Attributes:
        root: local folder or URL.
        files: names below it, with `/`.
    """

    root: str
    files: tuple[str, ...]

    @property
    def group(self) -> str:
        """As in `Unit`."""
        return base_name(self.root)

    @property
    def name(self) -> str:
        """As in `Unit`."""
        return f"{self.group}, files {self.files[0]} to {self.files[-1]}"

    def clips(self, report: SkipReport, first: int) -> Iterator[tuple[int, EncodedClip]]:
        """As in `Unit`."""
        for place, key in enumerate(self.files[first:], first):
            try:
                data = read_bytes(join(self.root, key))
            except OSError as error:
                report.add(f"{self.group}/{key}", error.strerror or error)
                continue
            yield place, EncodedClip(key, data, _labels(self.root, key, report))


def labels_name(key: str) -> str:
    """Name of the JSON file beside an audio file."""
    return os.fspath(Path(key).with_suffix(".json").as_posix())


def _labels(root: str, key: str, report: SkipReport) -> dict[str, object]:
    try:
        held = parse_json(read_bytes(join(root, labels_name(key))))
    except FileNotFoundError:
        return {}
    except DataError:  # a storage that does not answer
        raise
    except (OSError, ValueError) as error:
        report.add(f"{key}.json", f"labels are not JSON: {error}")
        return {}
    return held if isinstance(held, dict) else {}
