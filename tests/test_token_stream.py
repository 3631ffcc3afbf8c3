"""Token files written and read in blocks equal those written and read whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import tiny
from dasheng_tokenizer import AudioTokens
from dasheng_tokenizer.audio import load_audio, save_audio
from dasheng_tokenizer.chunking import decode_file, encode_file
from dasheng_tokenizer.errors import LatentError, TokenFileError
from dasheng_tokenizer.token_file import STORED_DTYPES
from dasheng_tokenizer.token_stream import TokenReader, token_writer

FIELDS = {"sampling_rate": 16_000, "num_samples": 640 * 9 - 3, "num_channels": 2, "frame_rate": 25.0}
FIELDS |= {"model_name": "m", "weights_hash": "h"}


def latents() -> torch.Tensor:
    return torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", list(STORED_DTYPES))
def test_blocks_equal_the_whole(dtype: torch.dtype, tmp_path: Path) -> None:
    whole = AudioTokens(latents=latents().to(dtype), **FIELDS)
    whole.save(tmp_path / "whole.tokens.safetensors")
    with token_writer(tmp_path / "blocks.tokens.safetensors", (2, 9, 5), dtype, **FIELDS) as out:
        for block in latents().split([1, 5, 3], dim=1):
            out.write(block)
    names = ("whole", "blocks")
    read = [AudioTokens.load(tmp_path / f"{name}.tokens.safetensors") for name in names]
    assert torch.equal(read[0].latents, read[1].latents) and read[1].dtype == dtype
    assert AudioTokens.info(tmp_path / "whole.tokens.safetensors") == AudioTokens.info(
        tmp_path / "blocks.tokens.safetensors"
    )
    for name in names:
        reader = TokenReader(tmp_path / f"{name}.tokens.safetensors")
        assert reader.latents.shape == (2, 9, 5)
        assert torch.equal(reader.latents[:, 2:7], whole.latents[:, 2:7])
        assert torch.equal(reader.latents[:, 7:99], whole.latents[:, 7:])


def test_nothing_is_left_of_an_unfinished_or_broken_file(tmp_path: Path) -> None:
    path = tmp_path / "x.tokens.safetensors"
    with pytest.raises(LatentError, match="8 of 9"), token_writer(path, (2, 9, 5), torch.float32, **FIELDS) as out:
        out.write(latents()[:, :8])
    with pytest.raises(LatentError, match="fit"), token_writer(path, (2, 9, 5), torch.float32, **FIELDS) as out:
        out.write(torch.zeros(2, 10, 5))
    with pytest.raises(LatentError, match="NaN"), token_writer(path, (2, 9, 5), torch.float16, **FIELDS) as out:
        out.write(latents() * 1e9)
    assert list(tmp_path.iterdir()) == []


def test_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "x.tokens.safetensors"
    AudioTokens(latents=latents(), **FIELDS).save(path)
    reader = TokenReader(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(TokenFileError, match="truncated"):
        reader.latents[:, 3:9]
    with pytest.raises(TokenFileError):
        TokenReader(path)


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_files_equal_arrays(rate: int, tmp_path: Path) -> None:
    model = tiny()
    audio = 0.1 * np.random.default_rng(0).standard_normal((2, rate * 11 + 7)).astype(np.float32)
    save_audio(tmp_path / "a.wav", audio, rate, subtype="FLOAT")
    reader = encode_file(model, tmp_path / "a.wav", tmp_path / "a.tokens.safetensors")
    tokens = model.compress(audio, sampling_rate=rate)
    torch.testing.assert_close(reader.latents[:, 0:10_000], tokens.latents, rtol=0, atol=1e-5)
    decode_file(model, reader, tmp_path / "b.wav", subtype="FLOAT")
    decoded, decoded_rate = load_audio(tmp_path / "b.wav")
    assert decoded_rate == rate and decoded.shape == audio.shape
    torch.testing.assert_close(torch.from_numpy(decoded), model.decompress(tokens), rtol=0, atol=1e-5)
