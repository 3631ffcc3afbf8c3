"""Audio in and out: files, arrays, rates and lengths. Gathers `samples`, `audio_reader` and `audio_writer`."""

from __future__ import annotations

from dasheng_tokenizer.audio_reader import READ_SUFFIXES, AudioReader, load_audio
from dasheng_tokenizer.audio_writer import WRITE_FORMATS, AudioWriter, save_audio
from dasheng_tokenizer.samples import (
    MAX_RATE,
    MIN_RATE,
    Array,
    StreamingResampler,
    check_finite,
    check_rate,
    fit_length,
    resample,
    resampled_length,
    to_audio_array,
)

__all__ = [
    "MAX_RATE",
    "MIN_RATE",
    "READ_SUFFIXES",
    "WRITE_FORMATS",
    "Array",
    "AudioReader",
    "AudioWriter",
    "StreamingResampler",
    "check_finite",
    "check_rate",
    "fit_length",
    "load_audio",
    "resample",
    "resampled_length",
    "save_audio",
    "to_audio_array",
]
