"""What `generate` is asked for: texts, requests with lengths and labels, and the names of their files."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dasheng_tokenizer.errors import TextError
from dasheng_tokenizer.files import parse_json
from dasheng_tokenizer.generation.scene_prompt import ScenePrompt

REQUESTS = ".jsonl"
"""Suffix of a file of requests; any other file has one text a line."""

END_OF_SEEDS = 2**63
"""Seeds lie below it; see `Generator.sample`."""

PARTS = ("speech", "transcript", "sfx", "music", "ambience")
"""Of a prompt, beside its caption; see `generation.scene_prompt`."""

KEYS = ("text", "seconds", "seed", "labels", "reference", *PARTS)

_NAME = 40
"""Characters of the text that the name of its file keeps."""


@dataclass(frozen=True, eq=False)
class Request:
    """A text, and what a line of a file may say beside it.

    Attributes:
        text: what shall be heard.
        seconds: length of the clip; None: that of all clips.
        seed: None: that of all clips.
        labels: what the clip should be recognised as.
        reference: key of the real clip that it answers to.
        parts: of the prompt, beside the text, which is its caption; those of `PARTS` that are there.
        origin: file and line, for messages; empty for plain texts.
    """

    text: str
    seconds: float | None = None
    seed: int | None = None
    labels: dict[str, Any] = field(default_factory=dict)
    reference: str | None = None
    parts: dict[str, str] = field(default_factory=dict)
    origin: str = ""

    @property
    def prompt(self) -> str | ScenePrompt:
        """What a pipeline is given.

        Raises:
            TextError: parts that make no prompt.
        """
        return ScenePrompt.of(self.text, self.parts) if self.parts else self.text

    @property
    def name(self) -> str:
        """For messages: where it is from and how it begins."""
        return f"{self.origin}: {self.text[:_NAME]!r}".removeprefix(": ")

    @property
    def stem(self) -> str:
        """Name of its files, but for seed and format; equal for equal requests only, whatever the seed."""
        more = {"seconds": self.seconds, "labels": self.labels, "reference": self.reference, "parts": self.parts}
        more = {key: value for key, value in more.items() if value not in (None, {})}
        if not more:
            return file_name(self.text)
        digest = hashlib.sha256(json.dumps(more, sort_keys=True).encode()).hexdigest()[:16]
        return f"{file_name(self.text)}.{digest}"

    def row(self, file: str, seed: int) -> dict[str, Any]:
        """The line of `generated.jsonl` for one of its clips."""
        row = {"file": file, "text": self.text, **self.parts, "seed": seed, "labels": self.labels}
        row["reference"] = self.reference
        return {key: value for key, value in row.items() if value not in (None, {})}


def read_requests(path: Path, count: int = 1) -> list[Request]:
    """Read a file of requests, or of texts where its suffix is not `.jsonl`.

    Args:
        path: UTF-8; lines without text are left out.
        count: clips a request; so many seeds from its own on must exist.

    Raises:
        TextError: it cannot be read, is no UTF-8, has nothing in it, or a line is no request.
    """
    of_objects = path.suffix.lower() == REQUESTS
    what = "object" if of_objects else "text"
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is no UTF-8 text ({error}); save it as UTF-8, one {what} a line") from error
    except OSError as error:
        raise TextError(f"{path} cannot be read ({error.strerror}); check the path") from error
    # JSON may hold other separators of lines, such as U+2028, as they are.
    lines = content.split("\n") if of_objects else content.splitlines()
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise TextError(f"{path} holds no {what}; write one a line")
    if of_objects:
        return [_request(line, f"{path}, line {number}", count) for number, line in numbered]
    return [Request(text) for text in dict.fromkeys(text for _, text in numbered)]


def _request(line: str, where: str, count: int) -> Request:
    try:
        held = parse_json(line)
    except ValueError as error:
        raise TextError(f"{where}: no JSON ({error}); write one object a line") from error
    if not isinstance(held, dict):
        raise TextError(f'{where}: write an object, such as {{"text": "a dog barks", "seconds": 3}}')
    if unknown := sorted(set(held) - set(KEYS)):
        raise TextError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(KEYS)}")
    held = {key: value for key, value in held.items() if value is not None}
    text, labels, reference = held.get("text"), held.get("labels", {}), held.get("reference")
    seconds, seed = held.get("seconds"), held.get("seed")
    if not isinstance(text, str):
        raise TextError(f'{where}: "text" must be there and a string: what shall be heard')
    if seconds is not None and not (_is_number(seconds) and 0 < seconds <= sys.float_info.max):
        raise TextError(f'{where}: "seconds" is {seconds!r}; write a number above 0')
    if seed is not None and not (_is_number(seed) and isinstance(seed, int) and 0 <= seed <= END_OF_SEEDS - count):
        raise TextError(f'{where}: "seed" is {seed!r}; write a whole number from 0 to 2⁶³ - {count}')
    if not isinstance(labels, dict):
        raise TextError(f'{where}: "labels" must be an object, such as {{"drum": "snare"}}')
    if reference is not None and not (isinstance(reference, str) and reference.strip()):
        raise TextError(f'{where}: "reference" is {reference!r}; write the key of a real clip, a string')
    parts = {name: held[name] for name in PARTS if name in held}
    if wrong := [name for name, part in parts.items() if not isinstance(part, str)]:
        raise TextError(f'{where}: "{wrong[0]}" is {parts[wrong[0]]!r}; write a string')
    return Request(text.strip(), None if seconds is None else float(seconds), seed, labels, reference, parts, where)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


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
