"""The metrics by name: which columns each fills, for which domains, what it needs, and how to read it."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from dasheng_tokenizer.audio import resample
from dasheng_tokenizer.errors import AudioError, ConfigurationError
from dasheng_tokenizer.evaluation import metrics, model_metrics
from dasheng_tokenizer.evaluation.model_metrics import EXTRA
from dasheng_tokenizer.files import require_extra

RATE = 16_000
SPEECH = "speech"
"""The domain for which figures of speech are made."""

DIGITS = 6
"""Decimals kept; what lies below differs between builds of the libraries."""

Samples = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Pair:
    """An original and its reconstruction, (samples,) each, of equal length and rate."""

    reference: Samples
    estimate: Samples
    sampling_rate: int

    @functools.cached_property
    def at_16_khz(self) -> tuple[Samples, Samples]:
        """Both at 16 kHz."""
        return self._at(RATE)

    @functools.cached_property
    def at_48_khz(self) -> tuple[Samples, Samples]:
        """Both at 48 kHz."""
        return self._at(3 * RATE)

    def _at(self, rate: int) -> tuple[Samples, Samples]:
        first, second = (resample(audio, self.sampling_rate, rate) for audio in (self.reference, self.estimate))
        return first, second


@dataclass(frozen=True)
class Column:
    """One figure: its name in tables, its heading in reports, for which domains it is, and how it is made."""

    name: str
    heading: str
    compute: Callable[[Pair], float]
    domains: Literal["all", "speech", "other"] = "all"

    def applies(self, domain: str) -> bool:
        """Whether the figure has a meaning for clips of this domain."""
        return self.domains == "all" or (self.domains == "speech") == (domain == SPEECH)


@dataclass(frozen=True)
class Metric:
    """What `--metrics` names: its columns, the modules and distributions it needs, and a sentence on how to read it."""

    name: str
    columns: tuple[Column, ...]
    about: str
    modules: tuple[str, ...] = ()
    distributions: tuple[str, ...] = ()


def _at_16_khz(function: Callable[[Samples, Samples], float]) -> Callable[[Pair], float]:
    return lambda pair: function(*pair.at_16_khz)


def _dnsmos(scale: Literal["sig", "bak", "ovr"]) -> Callable[[Pair], float]:
    return lambda pair: model_metrics.dnsmos(pair.at_16_khz[1], scale)


def _visqol(mode: Literal["speech", "audio"]) -> Callable[[Pair], float]:
    return lambda pair: model_metrics.visqol(*(pair.at_16_khz if mode == "speech" else pair.at_48_khz), mode)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "pesq_wb",
            (Column("pesq_wb", "PESQ-WB ↑", _at_16_khz(metrics.pesq_wb), "speech"),),
            "PESQ-WB (speech only): ITU-T P.862.2 at 16 kHz, at most 4.64.",
            ("pesq",),
            ("pesq",),
        ),
        Metric(
            "pesq_nb",
            (Column("pesq_nb", "PESQ-NB ↑", _at_16_khz(metrics.pesq_nb), "speech"),),
            "PESQ-NB (speech only): ITU-T P.862 with P.862.1, narrow band, from 16 kHz, at most 4.55.",
            ("pesq",),
            ("pesq",),
        ),
        Metric(
            "stoi",
            (Column("stoi", "STOI ↑", _at_16_khz(metrics.stoi), "speech"),),
            "STOI (speech only): Taal et al. 2011, at most 1.",
            ("pystoi",),
            ("pystoi",),
        ),
        Metric(
            "estoi",
            (Column("estoi", "ESTOI ↑", _at_16_khz(metrics.estoi), "speech"),),
            "ESTOI (speech only): Jensen & Taal 2016, at most 1.",
            ("pystoi",),
            ("pystoi",),
        ),
        Metric(
            "si_sdr",
            (Column("si_sdr", "SI-SDR dB ↑", _at_16_khz(metrics.si_sdr)),),
            "SI-SDR compares waveforms sample by sample; a decoder that makes its own phases has a low one however it "
            "sounds.",
        ),
        Metric(
            "mel",
            (Column("mel_distance", "mel ↓", _at_16_khz(metrics.mel_distance)),),
            "mel: 7-scale mel distance, windows of 32 to 2048 samples at 16 kHz, mean absolute difference of log10.",
        ),
        Metric(
            "lsd",
            (Column("lsd", "LSD dB ↓", _at_16_khz(metrics.log_spectral_distance)),),
            "LSD: log-spectral distance, root mean square over bins of the difference in dB, mean over frames; Hann "
            "window of 1024 samples every 256 at 16 kHz, power floor −100 dB of a full-scale sine.",
        ),
        Metric(
            "dnsmos",
            tuple(
                Column(f"dnsmos_{scale}", f"DNSMOS {scale.upper()} ↑", _dnsmos(scale), "speech")
                for scale in model_metrics.DNSMOS_KEYS
            ),
            "DNSMOS P.835 (speech only): judges the reconstruction alone, 1 to 5; compare with --floor original.",
            ("onnxruntime", "speechmos.dnsmos"),
            ("speechmos",),
        ),
        Metric(
            "visqol",
            (
                Column("visqol_speech", "ViSQOL speech ↑", _visqol("speech"), "speech"),
                Column("visqol_audio", "ViSQOL audio ↑", _visqol("audio"), "other"),
            ),
            "ViSQOL v3, 1 to 5: mode speech at 16 kHz for speech, mode audio at 48 kHz for all else.",
            ("visqol",),
            ("visqol-python",),
        ),
        Metric(
            "speaker_similarity",
            (Column("speaker_similarity", "speaker ↑", _at_16_khz(model_metrics.speaker_similarity), "speech"),),
            "speaker (speech only): cosine of resemblyzer's speaker embeddings, at most 1, strangers well above 0.",
            ("resemblyzer",),
            ("resemblyzer",),
        ),
        Metric(
            "f0",
            (
                Column("f0_cents", "F0 cents ↓", _at_16_khz(model_metrics.f0_cents), "speech"),
                Column("voicing_error", "voicing ↓", _at_16_khz(model_metrics.voicing_error), "speech"),
            ),
            "F0 (speech only): root mean square error in cents where both are voiced, and the share of frames "
            "voiced in one alone; probabilistic YIN of librosa, 60 to 500 Hz, 64 ms windows every 10 ms.",
            ("librosa",),
            ("librosa",),
        ),
    )
}


def require_metrics(names: Iterable[str]) -> tuple[Metric, ...]:
    """The metrics of these names, each once, with the packages they need at hand.

    Raises:
        ConfigurationError: no name, or an unknown one. MissingExtraError: a package is not installed.
    """
    chosen = list(dict.fromkeys(names))
    unknown = [name for name in chosen if name not in METRICS]
    if unknown or not chosen:
        raise ConfigurationError(f"no metric {', '.join(unknown) or 'is named'}; known: {', '.join(METRICS)}, or all")
    found = tuple(METRICS[name] for name in chosen)
    for module in dict.fromkeys(module for metric in found for module in metric.modules):
        if module == "resemblyzer":
            model_metrics.require_resemblyzer()
        else:
            require_extra(module, EXTRA)
    return found


def versions(chosen: Sequence[Metric]) -> dict[str, str]:
    """What the figures hang on besides the audio: versions of the packages, and ViSQOL's mapper."""
    names = dict.fromkeys(name for metric in chosen for name in metric.distributions)
    held = {name: importlib.metadata.version(name) for name in names}
    return held | ({"ViSQOL speech mapper": model_metrics.visqol_mapper()} if "visqol-python" in held else {})


def measure(pair: Pair, domain: str, chosen: Sequence[Metric]) -> tuple[dict[str, float | None], dict[str, str]]:
    """All figures of a pair.

    Returns:
        Per column the figure or None; and for those that should have one and have not, the reason.
    """
    values: dict[str, float | None] = {}
    missing: dict[str, str] = {}
    for column in (column for metric in chosen for column in metric.columns):
        values[column.name] = None
        if not column.applies(domain):
            continue
        try:
            value = column.compute(pair)
        except AudioError as error:
            missing[column.name] = str(error)
        except Exception as error:  # of a library: it must cost this figure and no other
            missing[column.name] = f"{type(error).__name__}: {error}"
        else:
            if np.isfinite(value):
                values[column.name] = round(value, DIGITS)
            else:
                missing[column.name] = "the library gave no finite number"
    return values, missing
