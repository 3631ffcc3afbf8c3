"""Token files: latents in safetensors with a versioned header.

The file holds one tensor, `latents` (channels, T, D), in float32, float16 or bfloat16. Its metadata is

    format = dasheng-tokenizer-tokens     version = 1              dtype = float32 | float16 | bfloat16
    sampling_rate, num_samples, num_channels: of the original audio, so that decoding restores it exactly
    frame_rate = 25.0                     model_name, weights_hash: of the model that alone can decode it

T is ceil(num_samples at 16 kHz / 640), with the length rule of `resampled_length`.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dasheng_tokenizer.errors import LatentError, OutputError, TokenFileError
from dasheng_tokenizer.files import atomic_path
from dasheng_tokenizer.samples import resampled_length

SUFFIX = ".tokens.safetensors"
FORMAT = "dasheng-tokenizer-tokens"
VERSION = 1
MODEL_RATE = 16_000
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_INTEGERS = ("sampling_rate", "num_samples", "num_channels")


def expected_tokens(num_samples: int, sampling_rate: int, frame_rate: float = 25.0) -> int:
    """Tokens per channel of a clip: ceil(samples at 16 kHz / samples per token)."""
    return math.ceil(resampled_length(num_samples, sampling_rate, MODEL_RATE) * frame_rate / MODEL_RATE)


@dataclass(frozen=True, eq=False)
class AudioTokens:
    """The latents of one clip and what is needed to decode them to audio of the original length, rate and channels.

    Attributes:
        latents: (channels, T, D), float32, float16 or bfloat16.
        sampling_rate: Of the original audio, Hz.
        num_samples: Of the original audio, per channel.
        num_channels: Of the original audio.
        frame_rate: Tokens per second.
        model_name: Name or folder of the model that made them.
        weights_hash: SHA-256 of its weights, in hexadecimal.

    Raises:
        LatentError: the parts do not fit together, or the latents hold NaN or infinity.
    """

    latents: Tensor
    sampling_rate: int
    num_samples: int
    num_channels: int
    frame_rate: float
    model_name: str
    weights_hash: str

    def __post_init__(self) -> None:
        latents = self.latents
        if latents.dtype not in DTYPES.values():
            raise LatentError(f"latents are {latents.dtype}; use {', '.join(DTYPES)}")
        _check_header(tuple(latents.shape), self.sampling_rate, self.num_samples, self.num_channels, self.frame_rate)
        if not torch.isfinite(latents).all():
            raise LatentError("latents hold NaN or infinity; encode the audio again, in float32 if they were float16")

    @property
    def dtype(self) -> torch.dtype:
        """Number type of the latents."""
        return self.latents.dtype

    @property
    def num_tokens(self) -> int:
        """Tokens per channel, T."""
        return int(self.latents.shape[1])

    @property
    def duration(self) -> float:
        """Seconds of the original audio."""
        return self.num_samples / self.sampling_rate

    def to(self, dtype: torch.dtype) -> AudioTokens:
        """Return the same tokens in another number type.

        Raises:
            LatentError: the type is not one of float32, float16, bfloat16, or the values do not fit into it.
        """
        return replace(self, latents=self.latents.to(dtype))

    def save(self, path: str | os.PathLike[str], overwrite: bool = True) -> None:
        """Write the file; it appears whole or not at all. By convention its name ends in `.tokens.safetensors`.

        Raises:
            OutputError: it cannot be written, or it exists and `overwrite` is false.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        metadata = header_metadata(
            self.dtype,
            self.sampling_rate,
            self.num_samples,
            self.num_channels,
            self.frame_rate,
            self.model_name,
            self.weights_hash,
        )
        check_name(path)
        with atomic_path(path, overwrite) as temporary:
            try:
                save_file({"latents": self.latents.detach().cpu().contiguous()}, temporary, metadata)
            except SafetensorError as error:
                number = re.search(r"os error (\d+)", str(error))  # how its text ends where the system refused
                if number:
                    raise OSError(int(number[1]), str(error)) from error  # atomic_path names it
                raise OutputError(f"cannot write {path}: {error}; check free space and permissions") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AudioTokens:
        """Read and check a token file.

        Raises:
            TokenFileError: missing, truncated, not a token file, of a newer version, or inconsistent.
        """
        from safetensors import SafetensorError, safe_open

        header = cls.info(path)
        try:
            with safe_open(path, framework="pt") as file:
                latents = file.get_tensor("latents")
        except (SafetensorError, OSError) as error:
            raise TokenFileError(f"{path} cannot be read ({error}); copy it again or encode the audio again") from error
        try:
            return cls(
                latents=latents,
                sampling_rate=header["sampling_rate"],
                num_samples=header["num_samples"],
                num_channels=header["num_channels"],
                frame_rate=header["frame_rate"],
                model_name=header["model_name"],
                weights_hash=header["weights_hash"],
            )
        except LatentError as error:
            raise TokenFileError(f"{path} is damaged: {error}") from error

    @staticmethod
    def info(path: str | os.PathLike[str]) -> dict[str, Any]:
        """Read and check the header alone, without the latents.

        Returns:
            sampling_rate, num_samples, num_channels, frame_rate, model_name, weights_hash, dtype (name), version,
            num_tokens, latent_dim, duration (seconds).

        Raises:
            TokenFileError: as `load`, apart from NaN in the latents.
        """
        metadata, shape, stored = _read_header(Path(path))
        if metadata.get("format") != FORMAT:
            raise TokenFileError(
                f"{path} is a safetensors file but not a token file (no format = {FORMAT}); "
                "give a file written by `dasheng-tokenizer encode`"
            )
        version = metadata.get("version", "")
        if version != str(VERSION):
            raise TokenFileError(
                f"{path} has token file version {version or 'unknown'}, this package reads version {VERSION}; "
                "update dasheng-tokenizer or encode the audio again"
            )
        try:
            header: dict[str, Any] = {key: int(metadata[key]) for key in _INTEGERS}
            header["frame_rate"] = float(metadata["frame_rate"])
            header["model_name"], header["weights_hash"] = metadata["model_name"], metadata["weights_hash"]
            header["dtype"] = metadata["dtype"]
            sizes = {key: header[key] for key in (*_INTEGERS, "frame_rate")}
            _check_header(shape, **sizes)
        except KeyError as error:
            raise TokenFileError(f"{path} is damaged: its header has no {error}; encode the audio again") from error
        except ValueError as error:  # LatentError is one too
            raise TokenFileError(f"{path} is damaged: {error}; encode the audio again") from error
        if STORED_DTYPES.get(DTYPES.get(header["dtype"])) != stored:  # type: ignore[arg-type]
            raise TokenFileError(
                f"{path} is damaged: its header says {header['dtype']}, but the latents are {stored}; encode again"
            )
        header |= {"version": VERSION, "num_tokens": shape[1], "latent_dim": shape[2]}
        header["duration"] = header["num_samples"] / header["sampling_rate"]
        return header


STORED_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""Names of the number types in a safetensors header."""


def check_name(path: str | os.PathLike[str]) -> None:
    """Refuse names that the readers of safetensors do not open.

    Raises:
        OutputError: a name that is not UTF-8.
    """
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError as error:
        raise OutputError(
            f"cannot write {path}: safetensors needs a name in UTF-8; rename the input or folder"
        ) from error


def header_metadata(
    dtype: torch.dtype,
    sampling_rate: int,
    num_samples: int,
    num_channels: int,
    frame_rate: float,
    model_name: str,
    weights_hash: str,
) -> dict[str, str]:
    """The metadata of a token file, as text; arguments as the fields of `AudioTokens`."""
    return {
        "format": FORMAT,
        "version": str(VERSION),
        "dtype": str(dtype).removeprefix("torch."),
        "sampling_rate": str(sampling_rate),
        "num_samples": str(num_samples),
        "num_channels": str(num_channels),
        "frame_rate": repr(float(frame_rate)),
        "model_name": model_name,
        "weights_hash": weights_hash,
    }


def _check_header(
    shape: tuple[int, ...], sampling_rate: int, num_samples: int, num_channels: int, frame_rate: float
) -> None:
    """Raise LatentError where sizes contradict each other."""
    if len(shape) != 3 or 0 in shape:
        raise LatentError(f"latents have shape {shape}; expected (channels, T, D)")
    if min(sampling_rate, num_samples) < 1 or not 0 < frame_rate < MODEL_RATE:
        raise LatentError(f"{num_samples} samples at {sampling_rate} Hz, {frame_rate} tokens a second, are no audio")
    if shape[0] != num_channels:
        raise LatentError(f"latents of {shape[0]} channels for audio of {num_channels} channels")
    tokens = expected_tokens(num_samples, sampling_rate, frame_rate)
    if shape[1] != tokens:
        raise LatentError(
            f"{shape[1]} tokens for {num_samples} samples at {sampling_rate} Hz, which make {tokens} tokens"
        )


def _read_header(path: Path) -> tuple[dict[str, str], tuple[int, ...], str]:
    """Return metadata, shape and stored number type of `latents`."""
    from safetensors import SafetensorError, safe_open

    if os.path.isdir(path):
        raise TokenFileError(f"{path} is a folder; give a {SUFFIX} file")
    if not os.path.exists(path):
        raise TokenFileError(f"{path} does not exist; check the path")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                return metadata, (), ""
            if "latents" not in file.keys():  # noqa: SIM118 (a method of safe_open, not of a dict)
                raise TokenFileError(f"{path} is damaged: it has no latents; encode the audio again")
            part = file.get_slice("latents")
            return metadata, tuple(part.get_shape()), part.get_dtype()
    except (SafetensorError, OSError) as error:
        if isinstance(error, TokenFileError):
            raise
        raise TokenFileError(
            f"{path} is not a whole safetensors file ({error}); copy it again or encode the audio again"
        ) from error
