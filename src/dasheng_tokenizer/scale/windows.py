"""A unit of work as windows of audio, in a fixed order that can be taken up again anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dasheng_tokenizer.errors import AudioError, AudioFileError
from dasheng_tokenizer.scale.units import Unit
from dasheng_tokenizer.spectral import SAMPLES_PER_TOKEN
from dasheng_tokenizer.training.clips import Clip, EncodedClip, SkipReport

Samples = npt.NDArray[np.float32]


class Position(NamedTuple):
    """A place in a unit: clip, window of the clip."""

    clip: int
    window: int


@dataclass(frozen=True, eq=False)
class Window:
    """What becomes one item: a clip, or a part of a longer one.

    Attributes:
        key: as `LatentItem.key`.
        name: for messages, `GROUP/KEY`.
        audio: (samples,) float32 at 16 kHz.
        captions: of the clip.
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
    unit: Unit, start: Position, report: SkipReport, caption_key: str, keep_uncaptioned: bool, max_tokens: int
) -> Iterator[Window]:
    """All windows of a unit from a position on.

    What cannot be used is noted in `report`, which hangs on the position alone.
    """
    for place, encoded in unit.clips(report, start.clip):
        name = f"{unit.group}/{encoded.key}"
        captions = captions_of(encoded.labels, caption_key)
        if not captions and not keep_uncaptioned:
            report.add(name, f"no text or list of texts under {caption_key!r} in its JSON file or row")
            continue
        clip = _decoded(encoded, name, report)
        if clip is None:
            continue
        labels = {key: value for key, value in clip.labels.items() if key != caption_key}
        spans = equal_spans(len(clip.audio), max_tokens)
        for index, (first, last) in enumerate(spans):
            position = Position(place, index)
            if position >= start:
                mark = f"@{first}" if len(spans) > 1 else ""
                after = Position(place + 1, 0) if index + 1 == len(spans) else position._replace(window=index + 1)
                yield Window(clip.key + mark, name + mark, clip.audio[first:last], captions, labels, after)


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


def _decoded(encoded: EncodedClip, name: str, report: SkipReport) -> Clip | None:
    try:
        return encoded.decode()
    except (AudioError, AudioFileError) as error:
        report.add(name, error)
        return None
