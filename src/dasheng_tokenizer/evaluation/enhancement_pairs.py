"""Noisy recordings with their clean ones in two folders, as the public test sets of speech enhancement come."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dasheng_tokenizer.audio import READ_SUFFIXES, load_audio, resample
from dasheng_tokenizer.enhancement.mixtures import active_power
from dasheng_tokenizer.errors import AudioError, AudioFileError, ConfigurationError, DataError
from dasheng_tokenizer.evaluation.enhancement_inputs import (
    CLEAN,
    NOISE_CLIPS,
    RATE,
    UNKNOWN,
    Example,
    Samples,
    name_digest,
)
from dasheng_tokenizer.evaluation.reconstruction_inputs import LENGTH_TOLERANCE

FILE_NUMBER = re.compile(r"(?:^|_)fileid_(\d+)$")
NAMED_RATIO = re.compile(r"_snr(-?\d+)(?:_|$)")
"""How the names of the DNS challenge's test set say which files belong together, and their ratio in dB."""


@dataclass
class PairSet:
    """Files of two folders: of one name, or of one `fileid_N` as in the DNS challenge.

    Ratio and type of noise come from a log, a text file with lines `NAME NOISE RATIO` as Valentini's set has it; the
    ratio else from the name (`_snr5_`, DNS), else it is measured on the difference of both recordings.

    Args:
        noisy: folder of noisy recordings.
        clean: folder of clean ones.
        log: text file, or None.
        texts: folder of text files `NAME.txt` with what is said in each clean recording, or None.
        seed: of the pairs where there is a limit.
        limit: so many pairs at most, drawn by the seed.

    Raises:
        ConfigurationError: a limit below one.
        DataError: a folder that is absent or without audio, no pair, or a log with a line that is none.
    """

    noisy: Path
    clean: Path
    log: Path | None = None
    texts: Path | None = None
    seed: int = 0
    limit: int | None = None
    failures: dict[str, str] = field(init=False, default_factory=dict)
    total: int = field(init=False)
    notes: list[str] = field(init=False)

    def __post_init__(self) -> None:
        """Match the files."""
        if self.limit is not None and self.limit < 1:
            raise ConfigurationError(f"--limit {self.limit}: at least one pair is needed")
        noisy, clean = self._files(self.noisy, "noisy"), self._files(self.clean, "clean")
        self._log = _read_log(self.log) if self.log is not None else {}
        matched = [name for name in noisy if name in clean]
        if not matched:
            raise DataError(f"no file of {self.noisy} has the name of one in {self.clean}; check both folders")
        for one, other, folder in ((noisy, clean, self.clean), (clean, noisy, self.noisy)):
            for name in one.keys() - other.keys():
                self.failures[str(one[name])] = f"no file of that name in {folder}; it was left out"
        self.failures = dict(sorted(self.failures.items()))
        drawn = sorted(matched, key=lambda name: name_digest(f"{self.seed} {name}"))[: self.limit]
        self._pairs = [(noisy[name], clean[name]) for name in sorted(drawn)]
        self.total = 2 * len(self._pairs)
        source = f"{self.log.name}" if self.log else "the names of the files where they have it"
        self.notes = [
            f"{len(self._pairs)} of {len(matched)} pairs, several channels averaged, resampled to 16 kHz. Ratios from "
            f"{source}, else of the active powers of the clean recording and of the difference to the noisy one."
        ]

    def examples(self) -> Iterator[Example]:
        """As in `ExampleSet`: each pair, and its clean recording as the input."""
        for noisy_path, clean_path in self._pairs:
            try:
                noisy, clean = _read_pair(noisy_path, clean_path)
            except (AudioError, AudioFileError) as error:
                self.failures[str(noisy_path)] = str(error)
                continue
            name = noisy_path.relative_to(self.noisy).with_suffix("").as_posix()
            kind, ratio = self._log.get(noisy_path.stem, (UNKNOWN, None))
            if ratio is None:
                named = NAMED_RATIO.search(noisy_path.stem)
                ratio = float(named[1]) if named else measured_ratio(noisy, clean)
            text = self._text(clean_path)
            yield Example(name, name, noisy, clean, ratio, kind, text)
            yield Example(f"{name} clean", name, clean, clean, CLEAN, "none", text)

    def without_speech(self) -> Iterator[tuple[str, Samples]]:
        """As in `ExampleSet`: the difference of the recordings of some pairs."""
        for noisy_path, clean_path in self._pairs[:NOISE_CLIPS]:
            try:
                noisy, clean = _read_pair(noisy_path, clean_path)
            except (AudioError, AudioFileError):  # `examples` says why
                continue
            if (noisy != clean).any():
                yield noisy_path.stem, noisy - clean

    def _text(self, clean: Path) -> str | None:
        if self.texts is None:
            return None
        path = self.texts / f"{clean.stem}.txt"
        try:
            return path.read_text(encoding="utf-8").strip() or None
        except (OSError, UnicodeDecodeError) as error:
            self.failures.setdefault(str(path), f"cannot be read: {error}")
            return None

    def _files(self, folder: Path, kind: str) -> dict[str, Path]:
        """Audio files by what their pair has in common."""
        if not folder.is_dir():
            raise DataError(f"{folder} is no folder; give the folder of the {kind} recordings")
        found: dict[str, Path] = {}
        for path in sorted(folder.rglob("*")):
            if path.name.startswith(".") or path.suffix.lower() not in READ_SUFFIXES or not path.is_file():
                continue
            number = FILE_NUMBER.search(path.stem)
            name = f"fileid_{number[1]}" if number else path.relative_to(folder).with_suffix("").as_posix()
            if name in found:
                self.failures[str(path)] = f"{found[name]} has the same name; it was left out"
            else:
                found[name] = path
        if not found:
            raise DataError(f"{folder} holds no audio files; give the folder of the {kind} recordings")
        return found


def measured_ratio(noisy: Samples, clean: Samples) -> float | None:
    """Ratio in dB of the active powers of speech and of what was added to it; None where one of both is silent."""
    powers = active_power(clean), active_power(noisy - clean)
    return 10 * math.log10(powers[0] / powers[1]) if min(powers) > 0 else None


def _read_pair(noisy_path: Path, clean_path: Path) -> tuple[Samples, Samples]:
    """Both at 16 kHz, (samples,), the longer one cut.

    Raises:
        AudioFileError: one of both cannot be read. AudioError: NaN, or lengths more than 50 ms apart.
    """
    first, second = (_mono(path) for path in (noisy_path, clean_path))
    if abs(first.size - second.size) > LENGTH_TOLERANCE * RATE:
        raise AudioError(
            f"{noisy_path} has {first.size} and {clean_path} {second.size} samples at 16 kHz, more than "
            f"{1000 * LENGTH_TOLERANCE:g} ms apart; cut both to the same part"
        )
    length = min(first.size, second.size)
    return first[:length], second[:length]


def _mono(path: Path) -> Samples:
    audio, rate = load_audio(path)
    return resample(np.ascontiguousarray(audio.mean(axis=0, dtype=np.float32)), rate, RATE)


def _read_log(path: Path) -> dict[str, tuple[str, float]]:
    """Type of noise and ratio by name.

    Raises:
        DataError: it cannot be read, or a line is not `NAME NOISE RATIO`.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    held = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            name, kind, ratio = line.split()
            held[name] = kind, float(ratio)
        except ValueError:
            raise DataError(
                f"{path}, line {number}: {line!r} is not NAME NOISE RATIO, as in p232_001 bus 17.5"
            ) from None
    return held
