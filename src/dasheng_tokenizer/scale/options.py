"""What the latents of a corpus hang on, besides model and sources."""

from __future__ import annotations

from dataclasses import dataclass

from dasheng_tokenizer.errors import ConfigurationError
from dasheng_tokenizer.generation.latent_index import SUFFIXES
from dasheng_tokenizer.scale.plan import CLIPS_PER_UNIT
from dasheng_tokenizer.spectral import SAMPLES_PER_TOKEN, SAMPLING_RATE
from dasheng_tokenizer.token_file import DTYPES

MAX_SECONDS = 30.0
"""Longest item: a window of the Whisper encoder, and longer than the clips of the usual captioned corpora."""

ENTRY_BYTES = {"safetensors": 128, "webdataset": 3072, "parquet": 64}
"""Room for what surrounds the numbers of an item: a line of about 80 bytes in the header of a safetensors file; two
headers of a tar file, their padding and the JSON of the item; offsets and name."""


@dataclass(frozen=True)
class EncodingOptions:
    """Options that change what is stored; a run that goes on must have the same.

    Attributes:
        captions: key of the captions, a text or a list of texts, in the JSON file or manifest row of a clip.
        max_seconds: longer clips are cut into windows of equal length, each with the captions of the clip.
        shard_megabytes: largest file of latents, MiB.
        dtype: number type stored: float16, bfloat16 or float32.
        format: kind of shards: safetensors, webdataset or parquet; the last two know no bfloat16.
        keep_uncaptioned: whether clips without captions are kept; no generator can be trained on these.
        clips_per_unit: files of a folder, or rows of a manifest, that one worker encodes at a time.
        path_key: column of the audio in manifests; None searches for it.
        arithmetic: number type that the model computes in: float32, float16 or bfloat16.
    """

    captions: str = "caption"
    max_seconds: float = MAX_SECONDS
    shard_megabytes: float = 64
    dtype: str = "float16"
    format: str = "safetensors"
    keep_uncaptioned: bool = False
    clips_per_unit: int = CLIPS_PER_UNIT
    path_key: str | None = None
    arithmetic: str = "float32"

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if not self.captions:
            raise ConfigurationError("the key of the captions is empty; name that of the JSON files, such as caption")
        if self.dtype not in DTYPES:
            raise ConfigurationError(f"latents cannot be stored as {self.dtype!r}; choose from {', '.join(DTYPES)}")
        if self.arithmetic not in DTYPES:
            raise ConfigurationError(f"no model computes in {self.arithmetic!r}; choose from {', '.join(DTYPES)}")
        if self.format not in SUFFIXES:
            raise ConfigurationError(
                f"there are no shards of format {self.format!r}; choose from {', '.join(SUFFIXES)}"
            )
        if self.dtype == "bfloat16" and self.format != "safetensors":
            raise ConfigurationError(f"{self.format} has no bfloat16; store float16, float32, or safetensors")
        if self.clips_per_unit < 1:
            raise ConfigurationError(f"{self.clips_per_unit} clips are no unit of work; {CLIPS_PER_UNIT} are usual")
        if not SAMPLES_PER_TOKEN / SAMPLING_RATE <= self.max_seconds <= 3600:
            raise ConfigurationError(f"clips are cut at 0.04 to 3600 seconds, not at {self.max_seconds}")
        if not 0 < self.shard_megabytes < float("inf"):
            raise ConfigurationError(f"a shard of {self.shard_megabytes} MiB holds nothing; 64 are usual")

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest item."""
        return int(self.max_seconds * SAMPLING_RATE / SAMPLES_PER_TOKEN + 1e-6)

    @property
    def shard_bytes(self) -> int:
        """Bytes that the tensors of a shard and their entries in its header may take."""
        return int(self.shard_megabytes * 2**20) - 1024

    def item_bytes(self, tokens: int, latent_dim: int) -> int:
        """Bytes that an item adds to a shard."""
        return tokens * latent_dim * DTYPES[self.dtype].itemsize + ENTRY_BYTES[self.format]
