"""Audio files, arrays, resampling: what goes in comes out, and what cannot be used is named."""

from __future__ import annotations

import io
import math
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dasheng_tokenizer.audio import (
    AudioReader,
    AudioWriter,
    StreamingResampler,
    fit_length,
    load_audio,
    resample,
    resampled_length,
    save_audio,
    to_audio_array,
)
from dasheng_tokenizer.errors import AudioError, AudioFileError, OutputError

RATES = [8000, 11025, 16000, 22050, 24000, 32000, 44100, 48000, 96000, 192000]


def noise(channels: int, samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal((channels, samples))).astype(np.float32)


# ---------------------------------------------------------------------- arrays


@given(
    samples=st.integers(1, 300),
    channels=st.integers(1, 3),
    dtype=st.sampled_from(["int8", "uint8", "int16", "int32", "float16", "float32", "float64"]),
    tensor=st.booleans(),
)
def test_full_scale_of_every_number_type(samples: int, channels: int, dtype: str, tensor: bool) -> None:
    wave = np.linspace(-1, 1, samples * channels).reshape(channels, samples) * 0.99
    if dtype.startswith("float"):
        given_audio, step = wave.astype(dtype), 1e-3
    else:
        scale = 128 if dtype.endswith("int8") else 2.0 ** (np.iinfo(dtype).bits - 1)
        offset = 128 if dtype == "uint8" else 0
        given_audio, step = np.round(wave * scale + offset).clip(*_limits(dtype)).astype(dtype), 1.01 / scale + 1e-7
    result = to_audio_array(torch.from_numpy(given_audio) if tensor else given_audio)
    assert result.dtype == np.float32 and result.shape == (channels, samples)
    assert np.abs(result - wave).max() <= step


def _limits(dtype: str) -> tuple[int, int]:
    return np.iinfo(dtype).min, np.iinfo(dtype).max


def test_one_axis_lists_and_bfloat16_are_taken() -> None:
    assert to_audio_array([0.0, 0.5]).shape == (1, 2)
    assert to_audio_array(torch.tensor([0.5, -0.5], dtype=torch.bfloat16, requires_grad=True)).tolist() == [[0.5, -0.5]]
    assert to_audio_array(np.zeros((2, 1))).shape == (2, 1)  # stereo of one sample, not a swapped array
    assert to_audio_array(np.zeros((1, 5), dtype=np.float32)[:, ::2]).flags.c_contiguous


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (np.zeros(0), "no samples"),
        (np.zeros((2, 0)), "no samples"),
        (np.zeros((0, 5)), "no samples"),
        ([], "no samples"),
        (np.zeros((1, 2, 3)), r"shape \(1, 2, 3\)"),
        (np.zeros(()), "shape"),
        (np.zeros((48000, 2)), "swapped"),
        (np.zeros(5, dtype=np.int64), "int64"),
        (np.zeros(5, dtype=bool), "bool"),
        (np.zeros(5, dtype=complex), "complex"),
        (np.array(["a"]), "number type"),
        ([[0.0, 1.0], [0.0]], "regular|object"),
        (np.array([1e300]), "infinite"),
    ],
)
def test_unusable_arrays_are_named(bad: object, says: str) -> None:
    with pytest.raises(AudioError, match=says):
        to_audio_array(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_located(value: float) -> None:
    audio = noise(2, 100)
    audio[1, 37] = audio[0, 60] = value
    with pytest.raises(AudioError, match="2 NaN or infinite values, the first in channel 1 at sample 37"):
        to_audio_array(audio)


# ---------------------------------------------------------------------- resampling


@settings(deadline=None, max_examples=60)
@given(
    samples=st.integers(1, 6000),
    rates=st.tuples(st.sampled_from(RATES) | st.integers(8000, 192000), st.sampled_from(RATES)),
    channels=st.integers(1, 3),
    data=st.data(),
)
def test_resampling_in_blocks_equals_whole(samples: int, rates: tuple[int, int], channels: int, data: st.DataObject):
    audio = noise(channels, samples)
    whole = resample(audio, *rates)
    assert whole.shape == (channels, math.ceil(samples * rates[1] / rates[0]))
    assert whole.shape[1] == resampled_length(samples, *rates)
    stream = StreamingResampler(*rates, channels)
    parts, start = [], 0
    while start < samples:
        size = data.draw(st.integers(1, samples - start))
        parts.append(stream.process(audio[:, start : start + size], last=start + size == samples))
        start += size
    assert np.abs(np.concatenate(parts, axis=1) - whole).max() <= 1e-6


@settings(deadline=None, max_examples=100)
@given(samples=st.integers(1, 10**7), rate=st.integers(8000, 192000))
def test_there_and_back_never_loses_a_sample(samples: int, rate: int) -> None:
    assert resampled_length(resampled_length(samples, rate, 16000), 16000, rate) >= samples


@pytest.mark.parametrize("rate", RATES)
def test_a_tone_survives_there_and_back(rate: int) -> None:
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate // 2) / rate, dtype=np.float64).astype(np.float32)
    back = fit_length(resample(resample(tone, rate, 16000), 16000, rate), len(tone))
    assert back.shape == tone.shape
    middle = slice(len(tone) // 5, -len(tone) // 5)
    assert np.abs(back[middle] - tone[middle]).max() < 1e-3


@pytest.mark.parametrize("rate", [0, -1, 7999, 192001, 44100.5, "16000", True, None])
def test_rates_out_of_range_are_refused(rate: object) -> None:
    with pytest.raises(AudioError, match="rate"):
        resample(noise(1, 10), rate, 16000)  # type: ignore[arg-type]


def test_resampler_refuses_other_channels_and_blocks_after_the_last() -> None:
    stream = StreamingResampler(44100, 16000, 2)
    with pytest.raises(AudioError, match="expected"):
        stream.process(noise(1, 5))
    stream.process(noise(2, 5), last=True)
    with pytest.raises(AudioError, match="after the last"):
        stream.process(noise(2, 5))


def test_fit_length_trims_and_pads() -> None:
    assert fit_length(np.ones((2, 3), np.float32), 2).tolist() == [[1, 1], [1, 1]]
    assert fit_length(np.ones((1, 2), np.float32), 4).tolist() == [[1, 1, 0, 0]]


# ---------------------------------------------------------------------- files, good ones


@pytest.mark.parametrize("suffix", [".wav", ".w64", ".flac", ".ogg", ".opus", ".mp3"])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [16000, 48000])
def test_every_format_keeps_length_rate_and_channels(tmp_path: Path, suffix: str, channels: int, rate: int) -> None:
    seconds = np.arange(rate + 123) / rate
    audio = np.stack([0.4 * np.sin(2 * np.pi * f * seconds) for f in (300, 500)[:channels]]).astype(np.float32)
    path = tmp_path / f"clip{suffix}"
    save_audio(path, audio, rate)
    assert os.listdir(tmp_path) == [path.name]
    loaded, loaded_rate = load_audio(path)
    assert loaded.dtype == np.float32 and loaded.shape == audio.shape and loaded_rate == rate
    middle = slice(rate // 4, -rate // 4)
    tolerance = 0.08 if suffix in (".ogg", ".opus", ".mp3") else 2**-15
    assert np.abs(loaded[:, middle] - audio[:, middle]).max() < tolerance
    with path.open("rb") as file, io.BytesIO(path.read_bytes()) as memory:
        assert np.array_equal(load_audio(file)[0], loaded)
        assert np.array_equal(load_audio(memory)[0], loaded)


@settings(deadline=None, max_examples=30)
@given(
    samples=st.integers(1, 3000), size=st.integers(1, 3500), suffix=st.sampled_from([".wav", ".flac", ".mp3", ".ogg"])
)
def test_blocks_are_the_file(tmp_path_factory: pytest.TempPathFactory, samples: int, size: int, suffix: str) -> None:
    path = tmp_path_factory.getbasetemp() / f"blocks{suffix}"
    save_audio(path, noise(2, samples), 16000)
    whole, _ = load_audio(path)
    reader = AudioReader(path)
    assert reader.num_samples == whole.shape[1] and reader.num_channels == 2 and reader.duration == samples / 16000
    for _ in range(2):  # a second pass starts at the beginning
        blocks = list(reader.blocks(size))
        assert [block.shape[1] for block in blocks[:-1]] == [size] * (len(blocks) - 1)
        assert np.array_equal(np.concatenate(blocks, axis=1), whole)


def test_int16_samples_survive_bit_for_bit(tmp_path: Path) -> None:
    samples = np.arange(-32768, 32768, dtype=np.int16)
    for suffix in (".wav", ".flac"):
        save_audio(tmp_path / f"all{suffix}", samples, 16000)
        assert np.array_equal(load_audio(tmp_path / f"all{suffix}")[0], to_audio_array(samples))


def test_a_writer_of_blocks_writes_what_save_audio_writes(tmp_path: Path) -> None:
    audio = noise(2, 1000)
    save_audio(tmp_path / "whole.flac", audio, 44100)
    with AudioWriter(tmp_path / "blocks.flac", 44100, 2) as writer:
        for start in range(0, 1000, 333):
            writer.write(audio[:, start : start + 333])
        assert not (tmp_path / "blocks.flac").exists()  # not before it is whole
    assert (tmp_path / "blocks.flac").read_bytes() == (tmp_path / "whole.flac").read_bytes()


def test_integer_formats_clip_with_a_warning_and_float_does_not(tmp_path: Path) -> None:
    loud = np.array([0.0, 1.5, -2.0, 0.5], dtype=np.float32)
    with pytest.warns(UserWarning, match="2 samples .* clipped"):
        save_audio(tmp_path / "int.wav", loud, 16000)
    assert np.allclose(load_audio(tmp_path / "int.wav")[0], [[0, 1, -1, 0.5]], atol=1e-4)
    save_audio(tmp_path / "float.wav", loud, 16000, subtype="FLOAT")
    assert np.array_equal(load_audio(tmp_path / "float.wav")[0][0], loud)


def test_lengths_left_open_by_a_pipe_are_read(tmp_path: Path) -> None:
    audio = noise(1, 5000)
    save_audio(tmp_path / "a.wav", audio, 16000)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    size = content.find(b"data") + 4
    content[4:8] = content[size : size + 4] = struct.pack("<I", 0xFFFFFFFF)
    (tmp_path / "pipe.wav").write_bytes(content)
    assert load_audio(tmp_path / "pipe.wav")[0].shape == (1, 5000)
    save_audio(tmp_path / "a.flac", audio, 16000)
    content = bytearray((tmp_path / "a.flac").read_bytes())
    content[21] &= 0xF0  # the 36-bit number of samples in STREAMINFO
    content[22:26] = bytes(4)
    (tmp_path / "pipe.flac").write_bytes(content)
    assert load_audio(tmp_path / "pipe.flac")[0].shape == (1, 5000)


def test_an_mp3_without_length_header_is_read_to_its_end(tmp_path: Path) -> None:
    save_audio(tmp_path / "a.mp3", noise(1, 32000), 16000)
    content = (tmp_path / "a.mp3").read_bytes()
    second = content.find(content[:2], 4)  # the first frame holds the Xing header
    (tmp_path / "b.mp3").write_bytes(content[second:])
    reader = AudioReader(tmp_path / "b.mp3")
    audio, _ = load_audio(tmp_path / "b.mp3")
    assert audio.shape[1] == reader.num_samples == sum(block.shape[1] for block in reader.blocks(777)) > 10000


# ---------------------------------------------------------------------- files, bad ones


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    files = {}
    for suffix in ("wav", "flac", "mp3", "ogg", "opus", "w64"):
        save_audio(folder / f"a.{suffix}", noise(2, 100_000), 48000)
        files[suffix] = (folder / f"a.{suffix}").read_bytes()
    for suffix in ("aiff", "au"):
        soundfile.write(folder / f"a.{suffix}", noise(2, 100_000).T, 44100)
        files[suffix] = (folder / f"a.{suffix}").read_bytes()
    return files


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "ogg", "opus", "w64", "aiff", "au"])
@pytest.mark.parametrize("kept", [0.9, 0.5, 0.1, 0.001])
def test_truncated_files_are_refused(tmp_path: Path, whole_files: dict[str, bytes], suffix: str, kept: float) -> None:
    path = tmp_path / f"cut.{suffix}"
    content = whole_files[suffix]
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(AudioFileError, match=rf"cut\.{suffix} (is truncated|is not audio).*(again|convert)"):
        load_audio(path)
    with pytest.raises(AudioFileError):
        load_audio(io.BytesIO(path.read_bytes()))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.wav", b"", "is empty"),
        ("empty.mp3", b"", "is empty"),
        ("text.wav", b"this is no audio\n" * 50, "not audio"),
        ("text.mp3", b"this is no audio\n" * 50, "not audio"),
        ("text.raw", b"this is no audio\n" * 50, "not audio"),
    ],
)
def test_files_without_audio_are_named(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AudioFileError, match=f"{name} .*{says}|{name} {says}"):
        load_audio(tmp_path / name)


def test_missing_folder_zero_samples_and_nan_are_named(tmp_path: Path) -> None:
    with pytest.raises(AudioFileError, match="does not exist"):
        load_audio(tmp_path / "none.wav")
    with pytest.raises(AudioFileError, match="is a folder"):
        load_audio(tmp_path)
    soundfile.write(tmp_path / "zero.wav", np.zeros((0, 1)), 16000)
    with pytest.raises(AudioFileError, match=r"zero\.wav holds no samples"):
        load_audio(tmp_path / "zero.wav")
    bad = noise(2, 400_000)
    bad[1, 333_333] = np.nan
    soundfile.write(tmp_path / "nan.wav", bad.T, 16000, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"nan\.wav has 1 NaN.*channel 1 at sample 333333"):
        load_audio(tmp_path / "nan.wav")


@pytest.mark.parametrize(
    ("name", "channels", "rate", "subtype", "says"),
    [
        ("a.xyz", 1, 16000, None, r"suffix '\.xyz'; use one of \.wav"),
        ("a", 1, 16000, None, "suffix ''"),
        ("a.opus", 1, 44100, None, "8000, 12000, 16000, 24000, 48000"),
        ("a.mp3", 1, 96000, None, "sampling rates"),
        ("a.mp3", 3, 44100, None, "1 to 2 channels"),
        ("a.flac", 9, 44100, None, "1 to 8 channels"),
        ("a.flac", 1, 44100, "FLOAT", "as FLOAT"),
    ],
)
def test_unwritable_wishes_are_named(
    tmp_path: Path, name: str, channels: int, rate: int, subtype: str | None, says: str
) -> None:
    with pytest.raises(AudioError, match=says):
        save_audio(tmp_path / name, noise(channels, 100), rate, subtype)
    assert not os.listdir(tmp_path)


def test_wav_beyond_four_gibibytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dasheng_tokenizer.audio_writer._MAX_WAV_BYTES", 1000)
    with pytest.raises(OutputError, match="4 GiB"):
        save_audio(tmp_path / "a.wav", noise(1, 501), 16000)
    save_audio(tmp_path / "a.w64", noise(1, 501), 16000)
    assert os.listdir(tmp_path) == ["a.w64"]
