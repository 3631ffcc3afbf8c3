"""A captioned corpus as windows of audio, in a fixed order that can be taken up again anywhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dasheng_tokenizer.errors import AudioError, AudioFileError, DataError
from dasheng_tokenizer.spectral import SAMPLES_PER_TOKEN
from dasheng_tokenizer.training.clips import Clip, EncodedClip, Shard, SkipReport, encoded_clips

Samples = npt.NDArray[np.float32]


class Position(NamedTuple):
    """A place in the sources: shard, clip of the shard, window of the clip."""

    shard: int
    clip: int
    window: int


@dataclass(frozen=True, eq=False)
class Window:
    """What becomes one item: a clip, or a part of a longer one.

    Attributes:
        key: as `LatentItem.key`.
        name: for messages, `SHARD/KEY`.
        audio: (samples,) float32 at 16 kHz.
        captions: of the clip, at least one.
        labels: of the clip, without its captions.
        after: where the sources go on.
    """

    key: str
    name: str
    audio: Samples
    captions: tuple[str, ...]
    labels: dict[str, Any]
    after: Position

    @property
    def tokens(self) -> int:
        """T, the last token may be filled in part."""
        return -(-len(self.audio) // SAMPLES_PER_TOKEN)


def windows(
    shards: Sequence[Shard], start: Position, report: SkipReport, caption_key: str, max_tokens: int
) -> Iterator[Window]:
    """All windows from a position on. What cannot be used is noted in `report`, which hangs on the position alone."""
    for number in range(start.shard, len(shards)):
        for place, encoded in enumerate(encoded_clips(shards[number], report)):
            if (number, place) < start[:2]:
                continue
            name = f"{shards[number].path.name}/{encoded.key}"
            captions = captions_of(encoded.labels, caption_key)
            if not captions:
                report.add(name, f"no text or list of texts under {caption_key!r} in its JSON file")
                continue
            clip = _decoded(encoded, name, report)
            if clip is None:
                continue
            labels = {key: value for key, value in clip.labels.items() if key != caption_key}
            spans = equal_spans(len(clip.audio), max_tokens)
            for index, (first, last) in enumerate(spans):
                position = Position(number, place, index)
                if position >= start:
                    mark = f"@{first}" if len(spans) > 1 else ""
                    after = (
                        Position(number, place + 1, 0)
                        if index + 1 == len(spans)
                        else position._replace(window=index + 1)
                    )
                    audio = clip.audio[first:last]
                    yield Window(clip.key + mark, name + mark, audio, captions, labels, after)


def captions_of(labels: dict[str, Any], key: str) -> tuple[str, ...]:
    """The captions of a clip: a text, or a list of texts. Empty where there is none, or something else than text."""
    value = labels.get(key)
    texts: list[Any] = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        return ()
    return tuple(text.strip() for text in texts if text.strip())


def equal_spans(samples: int, max_tokens: int) -> list[tuple[int, int]]:
    """Cut a clip into as few windows as possible, whose lengths differ by no more than one token.

    Returns:
        First sample and the one after the last of each window; every border between two is one between tokens.
    """
    tokens = -(-samples // SAMPLES_PER_TOKEN)
    count = -(-tokens // max_tokens)
    borders = [index * tokens // count * SAMPLES_PER_TOKEN for index in range(count)] + [samples]
    return list(zip(borders[:-1], borders[1:], strict=True))


def sources_digest(shards: Sequence[Shard]) -> str:
    """A hash that changes with the sources, wherever they lie.

    Of tar files it sees what `Shard.identity` sees; of plain files names and sizes, and the content of their captions.

    Raises:
        DataError: a source cannot be read.
    """
    digest = hashlib.sha256()
    for shard in shards:
        try:
            digest.update(json.dumps(shard.identity()).encode())
            for file in shard.files:
                captions = file.with_suffix(".json")
                if captions.exists():
                    digest.update(hashlib.sha256(captions.read_bytes()).digest())
        except OSError as error:
            raise DataError(f"{error.filename or shard.path} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def _decoded(encoded: EncodedClip, name: str, report: SkipReport) -> Clip | None:
    try:
        return encoded.decode()
    except (AudioError, AudioFileError) as error:
        report.add(name, error)
        return None
