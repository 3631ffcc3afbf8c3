"""Token files: the round trip is exact, and every damage is named."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dasheng_tokenizer import AudioTokens
from dasheng_tokenizer.audio import resampled_length
from dasheng_tokenizer.errors import LatentError, OutputError, TokenFileError
from dasheng_tokenizer.token_file import expected_tokens


def tokens(
    num_samples: int = 44100, rate: int = 44100, channels: int = 2, dtype: torch.dtype = torch.float32
) -> AudioTokens:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(channels, expected_tokens(num_samples, rate), 8, generator=generator).to(dtype)
    return AudioTokens(latents, rate, num_samples, channels, 25.0, "a model", "ab" * 32)


@settings(deadline=None, max_examples=40)
@given(
    num_samples=st.integers(1, 200_000),
    rate=st.integers(8000, 192_000),
    channels=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, num_samples: int, rate: int, channels: int, dtype: torch.dtype
) -> None:
    path = tmp_path_factory.getbasetemp() / "clip.tokens.safetensors"
    saved = tokens(num_samples, rate, channels, dtype)
    saved.save(path)
    loaded = AudioTokens.load(path)
    for field in dataclasses.fields(AudioTokens):
        if field.name != "latents":
            assert getattr(loaded, field.name) == getattr(saved, field.name)
    assert loaded.dtype == dtype and torch.equal(loaded.latents, saved.latents)
    assert loaded.num_tokens == math.ceil(resampled_length(num_samples, rate, 16000) / 640)
    header = AudioTokens.info(path)
    assert header["num_samples"] == num_samples and header["dtype"] == str(dtype).removeprefix("torch.")
    assert header["num_tokens"] == loaded.num_tokens and header["latent_dim"] == 8 and header["version"] == 1
    assert header["duration"] == loaded.duration == num_samples / rate


def test_number_types_convert_and_overflow_is_named() -> None:
    half = tokens().to(torch.float16)
    assert half.dtype == torch.float16 and half.num_samples == 44100
    assert torch.allclose(half.latents.float(), tokens().latents, atol=1e-2)
    large = dataclasses.replace(tokens(), latents=tokens().latents * 1e6)
    with pytest.raises(LatentError, match="infinity"):
        large.to(torch.float16)
    assert large.to(torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(LatentError, match="float64"):
        tokens().to(torch.float64)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"latents": torch.zeros(25, 8)}, "shape"),
        ({"latents": torch.zeros(2, 25, 0)}, "shape"),
        ({"latents": torch.zeros(2, 24, 8)}, "24 tokens .* make 25"),
        ({"latents": torch.zeros(1, 25, 8)}, "1 channels for audio of 2"),
        ({"latents": torch.full((2, 25, 8), torch.nan)}, "NaN"),
        ({"num_samples": 0}, "no audio"),
        ({"sampling_rate": 22050}, "make 50"),
        ({"frame_rate": 0.0}, "no audio"),
    ],
)
def test_contradictions_are_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(LatentError, match=says):
        dataclasses.replace(tokens(), **change)  # type: ignore[arg-type]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "clip.tokens.safetensors"
    tokens().save(path)
    return path


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.05, 0.5, 0.99])
def test_truncated_files_are_refused(saved: Path, kept: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(len(content) * kept)])
    for read in (AudioTokens.load, AudioTokens.info):
        with pytest.raises(TokenFileError, match="clip.tokens.safetensors is not a whole .*again"):
            read(saved)


def test_missing_folder_foreign_and_text_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(TokenFileError, match="does not exist"):
        AudioTokens.load(tmp_path / "none")
    with pytest.raises(TokenFileError, match="is a folder"):
        AudioTokens.load(tmp_path)
    (tmp_path / "text").write_text("no tokens" * 100)
    with pytest.raises(TokenFileError, match="not a whole safetensors"):
        AudioTokens.load(tmp_path / "text")
    save_file({"weight": torch.zeros(3)}, tmp_path / "foreign", {"format": "pt"})
    with pytest.raises(TokenFileError, match="not a token file"):
        AudioTokens.load(tmp_path / "foreign")


def change_header(path: Path, changes: dict[str, str | None]) -> None:
    """Rewrite the metadata of a safetensors file: 8 bytes of length, JSON, data."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    metadata = {key: value for key, value in {**header["__metadata__"], **changes}.items() if value is not None}
    encoded = json.dumps({**header, "__metadata__": metadata}).encode()
    encoded += b" " * (-len(encoded) % 8)
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"version": "2"}, "version 2, this package reads version 1; update"),
        ({"version": None}, "version unknown"),
        ({"num_samples": None}, "num_samples"),
        ({"weights_hash": None}, "weights_hash"),
        ({"num_samples": "many"}, "many"),
        ({"num_samples": "88200"}, "make 50"),
        ({"num_samples": "-1"}, "no audio"),
        ({"sampling_rate": "0"}, "no audio"),
        ({"num_channels": "1"}, "2 channels for audio of 1"),
        ({"frame_rate": "nan"}, "no audio"),
        ({"dtype": "float16"}, "says float16"),
        ({"dtype": None}, "dtype"),
    ],
)
def test_inconsistent_headers_are_named(saved: Path, changes: dict[str, str | None], says: str) -> None:
    change_header(saved, {})
    AudioTokens.load(saved)  # the rewriting itself does no harm
    change_header(saved, changes)
    for read in (AudioTokens.load, AudioTokens.info):
        with pytest.raises(TokenFileError, match=says):
            read(saved)


def test_nan_in_the_latents_is_named(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:-4] + struct.pack("<f", math.nan))
    AudioTokens.info(saved)  # the header is whole
    with pytest.raises(TokenFileError, match="clip.tokens.safetensors is damaged: .*NaN"):
        AudioTokens.load(saved)


def test_saving_is_atomic(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()
    with pytest.raises(OutputError, match="exists"):
        tokens(1).save(saved, overwrite=False)

    def fill(_: object, path: Path, __: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fill)
    with pytest.raises(OutputError, match="the disk is full"):
        tokens(1).save(saved)
    assert saved.read_bytes() == before and os.listdir(saved.parent) == [saved.name]
