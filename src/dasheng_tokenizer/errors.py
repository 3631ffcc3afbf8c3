"""Named errors. Each message says what is wrong and what to do about it.

All derive from `DashengTokenizerError`, so that `except DashengTokenizerError` catches every failure that this package
foresees; the second base class keeps code working that expects the usual built-in (`ValueError`, `OSError`, …).
"""

from __future__ import annotations

import re

MOST_CHARACTERS = 2000
"""Of a message; what files put into it may be of any length."""


def one_line(text: str) -> str:
    """A message that takes one line and cannot steer a terminal: what is quoted from a file may hold anything."""
    flat = re.sub(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*", " ", text.strip())
    shown = "".join(char if char.isprintable() or char == " " else ascii(char)[1:-1] for char in flat)
    return shown if len(shown) <= MOST_CHARACTERS else f"{shown[:MOST_CHARACTERS]} …"


class DashengTokenizerError(Exception):
    """Base class of all errors this package raises on purpose. As text it takes one line."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class AudioError(DashengTokenizerError, ValueError):
    """Audio samples that cannot be used: empty, NaN or infinite, wrong rank, wrong type, wrong sampling rate."""


class AudioFileError(DashengTokenizerError, OSError):
    """An audio file that cannot be read: missing, empty, truncated, or not audio."""


class MaskError(DashengTokenizerError, ValueError):
    """A padding mask of wrong shape or type, with holes, or with padding on the left."""


class LatentError(DashengTokenizerError, ValueError):
    """Latents that cannot be decoded: wrong rank or width, NaN or infinite, or too short for the samples asked for."""


class TokenFileError(DashengTokenizerError, OSError):
    """A token file that cannot be read: missing, truncated, of a foreign kind or of a newer version."""


class ModelMismatchError(DashengTokenizerError, ValueError):
    """Tokens of one model given to another."""


class CheckpointError(DashengTokenizerError, OSError):
    """A model folder, file or name that cannot be loaded: unknown, incomplete, or of a foreign layout."""


class ConfigurationError(DashengTokenizerError, ValueError):
    """Settings that contradict each other or are out of range."""


class DataError(DashengTokenizerError, ValueError):
    """Training data that cannot be used: no audio found, a broken shard, a cache of another model."""


class TextError(DashengTokenizerError, ValueError):
    """A text that cannot be encoded: empty, too long, not a string, or damaged characters."""


class OutputError(DashengTokenizerError, OSError):
    """An output that cannot be written: no permission, a full disk, or a file in the way."""


class ExportError(DashengTokenizerError, ValueError):
    """A model that cannot be exported as a graph."""


class WorkerError(DashengTokenizerError, RuntimeError):
    """Work that several processes share and that some of them could not do, however often it was tried."""


class MissingExtraError(DashengTokenizerError, ImportError):
    """An optional package is missing; the message names the extra that installs it."""
