"""Token files written and read block by block, so that an hour of audio takes no more memory than a minute.

The files are those of `token_file`; only the way to them differs: their size is known before the first block, so the
header is written first and every block goes to its place.
"""

from __future__ import annotations

import json
import os
import struct
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO

import torch
from torch import Tensor

from dasheng_tokenizer.errors import LatentError, TokenFileError
from dasheng_tokenizer.files import atomic_path, output_error, parse_json
from dasheng_tokenizer.token_file import DTYPES, STORED_DTYPES, AudioTokens, check_name, header_metadata

BYTES = {torch.float32: 4, torch.float16: 2, torch.bfloat16: 2}
_INTEGER = {4: torch.int32, 2: torch.int16}
"""Bytes of floating-point tensors pass through integers: NumPy has no bfloat16."""


class TokenWriter:
    """Writes a token file in blocks of tokens; a context manager. The file appears whole when the block ends.

    Args:
        path: of the file.
        shape: (channels, T, D) of all latents.
        dtype: float32, float16 or bfloat16.
        metadata: see `token_file.header_metadata`.

    Raises:
        OutputError: it cannot be written; LatentError: blocks that do not fit together, NaN or infinity.
    """

    def __init__(
        self, path: str | os.PathLike[str], shape: tuple[int, int, int], dtype: torch.dtype, metadata: dict[str, str]
    ) -> None:
        self.path, self.shape, self.dtype = Path(path), shape, dtype
        self.done = 0
        self._metadata = metadata
        self._stack = ExitStack()

    def __enter__(self) -> TokenWriter:
        channels, length, width = self.shape
        size = channels * length * width * BYTES[self.dtype]
        latents = {"dtype": STORED_DTYPES[self.dtype], "shape": list(self.shape), "data_offsets": [0, size]}
        header = json.dumps({"__metadata__": self._metadata, "latents": latents}).encode()
        header += b" " * (-len(header) % 8)  # safetensors aligns its data to 8 bytes
        check_name(self.path)
        temporary = self._stack.enter_context(atomic_path(self.path))
        self._file: IO[bytes] = self._stack.enter_context(open(temporary, "wb"))
        self._file.write(struct.pack("<Q", len(header)) + header)
        self._start = 8 + len(header)
        return self

    def write(self, block: Tensor) -> None:
        """Append (channels, n, D) latents."""
        channels, length, width = self.shape
        stored = block.to(self.dtype)
        if (block.shape[0], block.shape[2]) != (channels, width) or self.done + block.shape[1] > length:
            raise LatentError(
                f"a block of shape {tuple(block.shape)} does not fit {self.shape} after {self.done} tokens"
            )
        if not bool(torch.isfinite(stored).all()):
            raise LatentError(f"latents hold NaN or infinity as {self.dtype}; store them as float32")
        size = BYTES[self.dtype]
        try:
            for channel, rows in enumerate(stored.contiguous().view(_INTEGER[size])):
                self._file.seek(self._start + (channel * length + self.done) * width * size)
                self._file.write(rows.numpy().tobytes())
        except OSError as error:
            raise output_error(self.path, error) from error
        self.done += block.shape[1]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self.done != self.shape[1]:
            error = LatentError(f"{self.done} of {self.shape[1]} tokens were written")
            self._stack.__exit__(LatentError, error, None)
            raise error
        self._stack.__exit__(kind, error, trace)


class StoredLatents:
    """Latents (channels, T, D) of a token file, read when they are asked for: `latents[:, first:last]`."""

    def __init__(self, path: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.path, self.shape, self.dtype = path, shape, dtype
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = parse_json(file.read(length))
        self._start = 8 + length + header["latents"]["data_offsets"][0]

    def __getitem__(self, index: tuple[slice, slice]) -> Tensor:
        """(channels, n, D) latents of a range of tokens of all channels."""
        channels, length, width = self.shape
        first, last, _ = index[1].indices(length)
        size = BYTES[self.dtype]
        rows = []
        with open(self.path, "rb") as file:
            for channel in range(channels):
                file.seek(self._start + (channel * length + first) * width * size)
                data = bytearray(file.read((last - first) * width * size))
                if len(data) != (last - first) * width * size:
                    raise TokenFileError(f"{self.path} is truncated; copy it again or encode the audio again")
                rows.append(torch.frombuffer(data, dtype=_INTEGER[size]).view(self.dtype).view(-1, width))
        return torch.stack(rows)


class TokenReader:
    """A token file whose latents stay on disk; has the fields of `AudioTokens`.

    Raises:
        TokenFileError: as `AudioTokens.info`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        header = AudioTokens.info(path)
        self.sampling_rate: int = header["sampling_rate"]
        self.num_samples: int = header["num_samples"]
        self.num_channels: int = header["num_channels"]
        self.frame_rate: float = header["frame_rate"]
        self.model_name: str = header["model_name"]
        self.weights_hash: str = header["weights_hash"]
        self.num_tokens: int = header["num_tokens"]
        self.duration: float = header["duration"]
        shape = (self.num_channels, self.num_tokens, header["latent_dim"])
        self.latents = StoredLatents(Path(path), shape, DTYPES[header["dtype"]])


def token_writer(
    path: str | os.PathLike[str], shape: tuple[int, int, int], dtype: torch.dtype, **fields: str | int | float
) -> TokenWriter:
    """A writer whose header holds `fields`, the fields of `AudioTokens` besides the latents."""
    return TokenWriter(path, shape, dtype, header_metadata(dtype, **fields))  # type: ignore[arg-type]
