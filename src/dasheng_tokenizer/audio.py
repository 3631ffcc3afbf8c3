"""Audio in and out: files, arrays, rates and lengths, gathered from `samples` and the three modules `audio_…`."""

from __future__ import annotations

from dasheng_tokenizer.audio_formats import READ_SUFFIXES, WRITE_FORMATS
from dasheng_tokenizer.audio_reader import AudioReader, load_audio
from dasheng_tokenizer.audio_writer import AudioWriter, save_audio
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
