"""The frozen semantic embeddings of a data set, computed once and read from disk ever after.

Layout. One folder for each (semantic encoder, settings), named by their hash; in it `index.json` and, for each shard
of the data, three files named by the shard and the hash of its content list:

    NAME.audio      int16 samples of all clips, one after the other
    NAME.semantic   float16; for each clip its loudness views, (views, T, D); empty in a cache of audio alone
    NAME.json       keys, lengths and gains; written last, so that its presence says the part is whole

A killed preparation therefore repeats at most one part, and data that is added later costs only its own parts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dasheng_tokenizer.errors import DataError
from dasheng_tokenizer.files import atomic_path, parse_json
from dasheng_tokenizer.spectral import CONTEXT, SAMPLES_PER_TOKEN
from dasheng_tokenizer.training.clips import Clip, Shard, SkipReport, decoded_clips, find_shards

if TYPE_CHECKING:
    from dasheng_tokenizer.training.data import DataConfig

CACHE_VERSION = 1

FULL_SCALE = 32767

MAX_TOKENS = 750
"""Longest piece that is embedded at once, 30 s; a longer clip is cut into pieces that count as clips of their own."""

Samples = npt.NDArray[np.float32]

_log = logging.getLogger(__name__)


class SemanticModel(Protocol):
    """What the cache needs of a tokenizer."""

    @property
    def semantic_encoder(self) -> nn.Module:
        """The frozen encoder; its weights identify the cache."""

    def encode_features(self, context_audio: Tensor) -> Tensor:
        """(B, 512 + 640·N + 512) → (B, N, D)."""


@dataclass(frozen=True)
class _CachedClip:
    key: str
    samples: int
    tokens: int
    gains: list[float]


class SemanticCache:
    """Read access to a prepared cache; everything stays on disk until it is asked for.

    Attributes:
        keys: of the clips, in order.
        num_samples, num_tokens: int64 arrays (clips,).
        gains: float32 array (clips, views); view 0 is 1.
        skipped: what could not be read when the cache was made, with reasons.
    """

    def __init__(self, folder: str | Path, model: SemanticModel | None = None, parts: list[str] | None = None) -> None:
        """Open a cache.

        Args:
            folder: that `prepare_cache` made.
            model: whose embeddings are wanted; None to trust the folder.
            parts: names of the parts to read; None for all.

        Raises:
            DataError: no cache, a damaged one, or that of a model with another semantic encoder.
        """
        self.folder = Path(folder)
        index = _read_json(self.folder / "index.json")
        if model is not None and index.get("semantic_hash") != semantic_hash(model):
            raise DataError(f"{self.folder} holds embeddings of another semantic encoder; name another folder")
        self.views, self.dim = 0, 0
        self.keys: list[str] = []
        self.skipped: dict[str, str] = {}
        self._audio: list[npt.NDArray[np.int16]] = []
        self._semantic: list[npt.NDArray[np.float16]] = []
        rows: list[tuple[int, int, int, int, int]] = []  # part, samples, tokens, first sample, first token
        gains: list[list[float]] = []
        names = sorted(p.stem for p in self.folder.glob("*.json") if p.stem != "index") if parts is None else parts
        for part, name in enumerate(names):
            rows += self._open_part(part, name, gains)
        if not rows:
            reasons = f"; {SkipReport(self.skipped).summary()}" if self.skipped else ""
            raise DataError(f"{self.folder} holds no clips{reasons}")
        self._part, self.num_samples, self.num_tokens, self._first_sample, self._first_token = np.array(rows).T
        self.gains = np.array(gains, dtype=np.float32)

    def __len__(self) -> int:
        return len(self.keys)

    def audio(self, clip: int) -> npt.NDArray[np.int16]:
        """All samples of a clip without any gain, full scale 32767, as a view of the file."""
        first = self._first_sample[clip]
        return self._audio[self._part[clip]][first : first + self.num_samples[clip]]

    def semantic(self, clip: int, view: int) -> npt.NDArray[np.float16]:
        """Embedding (T, D) of a clip at the gain `gains[clip, view]`, as a view of the file."""
        length = int(self.num_tokens[clip])
        first = int(self._first_token[clip]) * self.views + view * length
        return self._semantic[self._part[clip]][first : first + length]

    def _open_part(self, part: int, name: str, gains: list[list[float]]) -> list[tuple[int, int, int, int, int]]:
        meta = _read_json(self.folder / f"{name}.json")
        self.skipped.update(meta["skipped"])
        rows, samples, tokens = [], 0, 0
        for clip in (_CachedClip(**held) for held in meta["clips"]):
            rows.append((part, clip.samples, clip.tokens, samples, tokens))
            samples, tokens = samples + clip.samples, tokens + clip.tokens
            self.keys.append(clip.key)
            gains.append(clip.gains)
        if rows:
            self.views, self.dim = meta["views"], meta["dim"]
        shape = (tokens * meta["views"], meta["dim"])
        self._audio.append(_map(self.folder / f"{name}.audio", np.int16, (samples,)))
        self._semantic.append(_map(self.folder / f"{name}.semantic", np.float16, shape))
        return rows


def prepare_cache(
    model: SemanticModel | None,
    config: DataConfig,
    progress: bool = True,
    split: Literal["train", "valid"] = "train",
    rank: int = 0,
    world_size: int = 1,
) -> SemanticCache:
    """Decode a split once, embed every loudness view of every clip, and keep both on disk; what is there is not redone.

    Several processes share the parts among them, and each returns when all parts are there.

    Args:
        model: whose frozen semantic encoder is asked, on the device it is on; None keeps audio alone, for a VAE. Crops
            are the same with and without.
        config: `train` or `valid`, `cache`, `views`, `gain_db`, `crop_seconds` and `seed` matter.
        progress: show a bar.
        split: which list of sources.
        rank: of this process.
        world_size: number of processes that share the work.

    Raises:
        DataError: no audio, no cache folder in the config, or a cache of another model in its place.
        OutputError: the cache cannot be written.
    """
    if config.cache is None:
        raise DataError("data.cache names no folder; set it, or use StreamedCrops for data too large to cache")
    shards = find_shards(config.train if split == "train" else config.valid)
    settings = _settings(config)
    index = {"version": CACHE_VERSION, "semantic_hash": semantic_hash(model), "settings": settings}
    folder = Path(config.cache) / _digest(index)[:16]
    if (folder / "index.json").exists():
        if _read_json(folder / "index.json") != index:
            raise DataError(f"{folder} holds a cache of another model; delete it or name another folder")
    else:
        _write_json(folder / "index.json", index)
    names = [f"{shard.path.name.split('.')[0]}-{_digest(shard.identity())[:12]}" for shard in shards]
    todo = [pair for pair in list(zip(shards, names, strict=True))[rank::world_size] if not _is_done(folder, pair[1])]
    shown = None if progress and rank == 0 and todo else True  # None: only on a terminal
    with tqdm(desc="embedding clips", unit=" clips", disable=shown) as bar:
        for shard, name in todo:
            _write_part(model, config, shard, folder, name, bar)
    while world_size > 1 and not all(_is_done(folder, name) for name in names):
        time.sleep(0.2)
    cache = SemanticCache(folder, parts=names)
    if cache.skipped and rank == 0:
        _log.warning(SkipReport(cache.skipped).summary())
    return cache


def semantic_hash(model: SemanticModel | None) -> str:
    """SHA-256 over the frozen encoder's kind, settings and weights, in hex; without a model, that of nothing."""
    if model is None:
        return hashlib.sha256().hexdigest()
    digest = hashlib.sha256(type(model.semantic_encoder).__name__.encode())
    settings = getattr(getattr(model, "config", None), "semantic_encoder", None)
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.semantic_encoder.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def crop_with_context(audio: npt.NDArray[Any], start: int, num_tokens: int) -> npt.NDArray[Any]:
    """Context audio of a crop: mirrored before the first sample of the clip, zeros after its end (see `spectral`).

    Equals the same samples of `spectral.with_context` of the whole clip, but reads only the crop.

    Args:
        audio: (S,) samples of the whole clip.
        start: first token of the crop.
        num_tokens: N.

    Returns:
        (512 + 640·N + 512,) of the same type.
    """
    first = start * SAMPLES_PER_TOKEN - CONTEXT
    context = np.zeros(2 * CONTEXT + num_tokens * SAMPLES_PER_TOKEN, dtype=audio.dtype)
    held = audio[max(first, 0) : first + len(context)]
    context[max(-first, 0) : max(-first, 0) + len(held)] = held
    if first < 0:
        mirrored = audio[1 : 1 - first][::-1]
        context[-first - len(mirrored) : -first] = mirrored
    return context


def to_int16(audio: Samples) -> npt.NDArray[np.int16]:
    """Samples at full scale 1 → 16 bit. Lossy codecs overshoot full scale; such a clip is scaled down, not clipped."""
    peak = float(np.abs(audio).max(initial=1.0))
    return np.rint(audio * (FULL_SCALE / peak)).astype(np.int16)


def view_gains(key: str, peak: float, config: DataConfig) -> list[float]:
    """Gains of the views of a clip: 1, then ones drawn from `gain_db` by (seed, key, view), none of which clips.

    Args:
        key: of the clip.
        peak: its largest absolute sample at full scale 1.
        config: `seed`, `views` and `gain_db` matter.
    """
    gains = [1.0]
    for view in range(1, config.views):
        drawn = int(hashlib.sha256(f"{config.seed}/{key}/{view}".encode()).hexdigest()[:12], 16) / 16**12
        low, high = config.gain_db
        gains.append(min(10 ** ((low + drawn * (high - low)) / 20), 1 / max(peak, 1e-9)))
    return gains


def _settings(config: DataConfig) -> dict[str, Any]:
    """Crops matter only as the length that shorter clips are extended to."""
    return {
        "views": config.views,
        "gain_db": list(config.gain_db) if config.views > 1 else None,
        "seed": config.seed if config.views > 1 else None,
        "crop_tokens": config.crop_tokens,
    }


def _is_done(folder: Path, name: str) -> bool:
    return (folder / f"{name}.json").exists()


def _write_part(
    model: SemanticModel | None, config: DataConfig, shard: Shard, folder: Path, name: str, bar: tqdm[Any]
) -> None:
    report = SkipReport()
    clips: list[dict[str, Any]] = []
    dim = 0
    with (
        atomic_path(folder / f"{name}.audio") as audio_path,
        atomic_path(folder / f"{name}.semantic") as semantic_path,
        audio_path.open("wb") as audio_file,
        semantic_path.open("wb") as semantic_file,
    ):
        for clip in decoded_clips(shard, report):
            for key, audio in _pieces(clip):
                cached, dim = _write_clip(model, config, key, audio, audio_file, semantic_file)
                clips.append(vars(cached))
            bar.update()
    meta = {"views": config.views, "dim": dim, "clips": clips, "skipped": report.skipped}
    _write_json(folder / f"{name}.json", meta)


def _pieces(clip: Clip) -> Iterator[tuple[str, npt.NDArray[np.int16]]]:
    audio, length = to_int16(clip.audio), MAX_TOKENS * SAMPLES_PER_TOKEN
    for start in range(0, len(audio), length):
        yield clip.key if len(audio) <= length else f"{clip.key}@{start}", audio[start : start + length]


def _write_clip(
    model: SemanticModel | None,
    config: DataConfig,
    key: str,
    audio: npt.NDArray[np.int16],
    audio_file: BinaryIO,
    semantic_file: BinaryIO,
) -> tuple[_CachedClip, int]:
    """Append one clip; returns its row and the width D, 0 without a model."""
    tokens = max(math.ceil(len(audio) / SAMPLES_PER_TOKEN), config.crop_tokens)
    samples = audio.astype(np.float32) / FULL_SCALE
    gains = view_gains(key, float(np.abs(samples).max()), config)
    audio_file.write(audio.tobytes())
    cached = _CachedClip(key, len(audio), tokens, gains)
    if model is None:
        return cached, 0
    context = torch.from_numpy(crop_with_context(samples, 0, tokens))
    device = next((p.device for p in model.semantic_encoder.parameters()), torch.device("cpu"))
    views = torch.tensor(gains)[:, None] * context  # (views, 512 + 640·T + 512)
    with torch.no_grad():
        semantic = model.encode_features(views.to(device)).to("cpu", torch.float16).numpy()  # (views, T, D)
    if not np.isfinite(semantic).all():
        raise DataError(f"{key}: its semantic embedding is not finite in float16; remove the clip or check the encoder")
    semantic_file.write(semantic.tobytes())
    return cached, semantic.shape[-1]


def _map(path: Path, dtype: Any, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Memory-map a raw file of exactly this shape."""
    expected = math.prod(shape) * np.dtype(dtype).itemsize
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; delete the cache folder and prepare it again") from error
    if size != expected:
        raise DataError(f"{path} has {size} bytes instead of {expected}; delete the cache folder and prepare it again")
    return np.memmap(path, dtype, "r", shape=shape) if expected else np.zeros(shape, dtype)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        held: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"), finite=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is missing or damaged; delete the cache folder and prepare it again") from error
    return held


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value), encoding="utf-8")
