"""Word errors of a recogniser on noisy and enhanced speech: Whisper by faster-whisper, from a local folder."""

from __future__ import annotations

import hashlib
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dasheng_tokenizer.errors import CheckpointError
from dasheng_tokenizer.evaluation.model_metrics import EXTRA
from dasheng_tokenizer.files import require_extra

FILES = ("model.bin", "config.json", "tokenizer.json")
"""What a folder must hold; without its tokenizer the library would fetch one from elsewhere."""

BEAMS = 5

Samples = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Words:
    """What was heard: its text, and word errors (substituted, left out, put in) against so many true words."""

    heard: str
    errors: int
    words: int


class Recogniser:
    """Whisper in the layout of CTranslate2."""

    def __init__(self, folder: str | Path, device: str = "cpu") -> None:
        """Load it.

        Args:
            folder: with `model.bin`, `config.json` and `tokenizer.json`.
            device: cpu or cuda.

        Raises:
            CheckpointError: no such folder, or one that lacks a file or holds another model.
            MissingExtraError: faster-whisper or jiwer is not installed.
        """
        self.folder = Path(folder)
        lacking = [name for name in FILES if not (self.folder / name).is_file()]
        if lacking:
            raise CheckpointError(
                f"{folder} lacks {', '.join(lacking)}; give the folder of a Whisper model that was converted for "
                "faster-whisper (CTranslate2)"
            )
        package = require_extra("faster_whisper", EXTRA)
        require_extra("jiwer", EXTRA)
        kind = "cuda" if device.startswith("cuda") else "cpu"
        try:
            self._model = package.WhisperModel(str(folder), device=kind, compute_type="float32", local_files_only=True)
        except (RuntimeError, ValueError, OSError) as error:
            raise CheckpointError(f"{folder} holds no Whisper model that CTranslate2 can load ({error})") from error
        digest = hashlib.sha256()
        for name in FILES:
            with (self.folder / name).open("rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
        self._hash = digest.hexdigest()

    @property
    def about(self) -> str:
        """A sentence for the notes."""
        return (
            f"WER: Whisper from {self.folder.name} (files {self._hash[:12]}) by faster-whisper "
            f"{importlib.metadata.version('faster-whisper')}, float32, {BEAMS} beams, temperature 0, in the language "
            "of the label or a detected one; word errors over words of all clips with a text, both without case and "
            "punctuation."
        )

    def identity(self) -> list[Any]:
        """Changes whenever what is heard may change."""
        versions = [importlib.metadata.version(name) for name in ("faster-whisper", "ctranslate2")]
        return ["whisper", self._hash, BEAMS, *versions]

    def words(self, audio: Samples, text: str, language: str | None) -> Words:
        """Recognise a clip and count its word errors.

        Args:
            audio: (samples,) at 16 kHz.
            text: what is said, with a word at least.
            language: as `en`; None lets the model guess.
        """
        segments, _ = self._model.transcribe(
            audio,
            language=language,
            beam_size=BEAMS,
            temperature=0.0,
            condition_on_previous_text=False,
            without_timestamps=True,
        )
        heard = " ".join(segment.text.strip() for segment in segments)
        return count_errors(text, heard)


def count_errors(text: str, heard: str) -> Words:
    """Word errors without regard to case, punctuation and symbols.

    Raises:
        MissingExtraError: jiwer is not installed.
    """
    reference, hypothesis = plain(text), plain(heard)
    found = require_extra("jiwer", EXTRA).process_words(reference, hypothesis)
    return Words(heard, found.substitutions + found.deletions + found.insertions, len(reference.split()))


def plain(text: str) -> str:
    """Lower case, letters and digits alone, single spaces: what Whisper's authors do to texts of any language."""
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    normalized: str = BasicTextNormalizer()(text)
    return " ".join(normalized.split())
