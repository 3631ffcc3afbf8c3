"""Batches of latents and texts for the training of a generator, and held-out clips for its validation.

The batch of any step is a pure function of (seed, step), noise and times included, so that a run resumes exactly and
its loss does not depend on the number of processes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dasheng_tokenizer.errors import ConfigurationError, DataError
from dasheng_tokenizer.generation.flow_matching import sample_timesteps
from dasheng_tokenizer.generation.latent_dataset import LatentDataset
from dasheng_tokenizer.generation.text_cache import CachedTextEncoder
from dasheng_tokenizer.generation.text_encoders import TextEncoder, pad_text
from dasheng_tokenizer.generation.training_configuration import GeneratorTrainingConfig
from dasheng_tokenizer.generation.training_texts import all_captions, embed_captions
from dasheng_tokenizer.semantic_encoder import token_mask
from dasheng_tokenizer.training.clips import clip_label
from dasheng_tokenizer.training.data import load_ahead, local_slice

if TYPE_CHECKING:
    from lightning_fabric import Fabric

MAX_NOISE_SEED = 2**63
ORDER, GROUP, ITEM, TIME = range(4)
"""First words of the seeds of what is drawn: order of clips, order of groups, what a clip gets, times."""


@dataclass(frozen=True, eq=False)
class LatentBatch:
    """Clips of a step, on the CPU.

    Attributes:
        latents: (B, T, C) float32 as the tokenizer gives them, zeros after the end of a clip.
        num_tokens: (B,) int64 real tokens of each.
        text: (B, S, E) embeddings of the captions, zeros after their end.
        text_mask: (B, S) bool.
        dropped: (B,) bool, clips that are shown without their text, which then has one token of zeros.
        times: (B,) float32 in [0, 1].
        noise_seeds: (B,) int64, of the noise of each clip.
    """

    latents: Tensor
    num_tokens: Tensor
    text: Tensor
    text_mask: Tensor
    dropped: Tensor
    times: Tensor
    noise_seeds: Tensor

    @property
    def token_mask(self) -> Tensor:
        """(B, T) bool."""
        return token_mask(self.num_tokens, self.latents.shape[1])

    def split(self, parts: int) -> list[LatentBatch]:
        """Cut into equal parts for gradient accumulation, clips of like length together, so that less is padded."""
        if parts == 1:
            return [self]
        order = torch.argsort(self.num_tokens, stable=True)
        return [self._take(rows) for rows in order.chunk(parts)]

    def _take(self, rows: Tensor) -> LatentBatch:
        taken = LatentBatch(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))
        tokens, words = int(taken.num_tokens.max()), int(taken.text_mask.sum(1).max())
        return replace(
            taken,
            latents=taken.latents[:, :tokens],
            text=taken.text[:, :words],
            text_mask=taken.text_mask[:, :words],
        )


class LatentCrops:
    """Crops of a latent data set with one of their captions each.

    An epoch visits each clip once, in an order that hangs on (seed, epoch). With `data.balance`, clips with the same
    value of that label are a group; every group has epochs of its own and is visited equally often, or as often as
    `data.shares` says; with `data.evened`, clips of small classes of a group come several times an epoch. Crop,
    caption, whether the text is dropped, and the noise hang on (seed, place in the endless sequence of visits).
    """

    def __init__(
        self,
        dataset: LatentDataset,
        texts: TextEncoder,
        config: GeneratorTrainingConfig,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Set up the sequence.

        Args:
            dataset: the latents.
            texts: gives the embedding of every caption.
            config: of the run.
            rank: of this process.
            world_size: number of processes.

        Raises:
            ConfigurationError: the batch cannot be shared evenly, crops are shorter than a token, no clip has the
                label of `data.balance` or of `data.evened`, or none a value that shares or evened groups name.
        """
        self.dataset, self.texts, self.config = dataset, texts, config
        self._slice = local_slice(config.data.batch_size, rank, world_size)
        if len(self._slice) % config.accumulate:
            raise ConfigurationError(
                f"the {len(self._slice)} clips of a process must be a multiple of accumulate, {config.accumulate}"
            )
        self.crop_tokens = crop_tokens(config, dataset.index.frame_rate)
        shortest = config.data.min_crop_seconds
        self._least = None if shortest is None else max(1, int(shortest * dataset.index.frame_rate + 1e-6))
        groups = _groups(dataset, config.data.balance)
        if unknown := sorted(set(config.data.evened) - set(groups)):
            raise ConfigurationError(
                f"data.evened: no clip has the value {unknown[0]!r}; there are: {', '.join(groups)}"
            )
        for name, label in config.data.evened.items():
            groups[name] = _evened(dataset, groups[name], label)
        self._groups = list(groups.values())
        self._slots = _slots(list(groups), config.data.shares)
        self._orders: dict[int, tuple[int, npt.NDArray[np.int64]]] = {}

    def batch(self, step: int) -> LatentBatch:
        """This rank's part of the batch of a step; the same however often and in which order it is asked."""
        config = self.config
        first = step * config.data.batch_size
        clips = [self._clip(first + place) for place in self._slice]
        source = torch.Generator().manual_seed(int(_draw(TIME, config.seed, step).integers(MAX_NOISE_SEED)))
        times = sample_timesteps(
            config.data.batch_size,
            config.timesteps,
            mean=config.timestep_mean,
            std=config.timestep_std,
            generator=source,
        )
        known = iter(self.texts([clip.caption for clip in clips if clip.caption is not None]))
        nothing = torch.zeros(1, self.texts.width)
        text, text_mask = pad_text([nothing if clip.caption is None else next(known) for clip in clips])
        return LatentBatch(
            latents=nn.utils.rnn.pad_sequence([clip.latents for clip in clips], batch_first=True),  # (B, T, C)
            num_tokens=torch.tensor([len(clip.latents) for clip in clips]),
            text=text,
            text_mask=text_mask,
            dropped=torch.tensor([clip.caption is None for clip in clips]),
            times=times[self._slice.start : self._slice.stop],
            noise_seeds=torch.tensor([clip.noise_seed for clip in clips]),
        )

    def batches(self, first_step: int, last_step: int) -> Iterator[LatentBatch]:
        """This rank's batches of the steps `first_step` … `last_step` - 1."""
        batches = (self.batch(step) for step in range(first_step, last_step))
        return load_ahead(batches) if self.config.data.load_ahead else batches

    def _clip(self, place: int) -> _Clip:
        item = self.dataset[self._visited(place)]
        rng = _draw(ITEM, self.config.seed, place)
        longest = min(len(item.latents), self.crop_tokens)
        least = longest if self._least is None else min(self._least, longest)
        tokens = int(rng.integers(least, longest + 1))
        start = int(rng.integers(len(item.latents) - tokens + 1))
        caption = item.captions[int(rng.integers(len(item.captions)))]
        dropped = rng.random() < self.config.text_dropout
        noise_seed = int(rng.integers(MAX_NOISE_SEED))
        return _Clip(item.latents[start : start + tokens], None if dropped else caption, noise_seed)

    def _visited(self, place: int) -> int:
        """Clip of a visit. Visits go in rounds of each group's share, in an order drawn for each round."""
        seed = self.config.seed
        number, place_in_round = divmod(place, len(self._slots))
        slot = int(_draw(GROUP, seed, number).permutation(len(self._slots))[place_in_round])
        group, turn, share = self._slots[slot]
        clips = self._groups[group]
        epoch, index = divmod(number * share + turn, len(clips))
        held = self._orders.get(group)
        if held is None or held[0] != epoch:
            held = epoch, _draw(ORDER, seed, group, epoch).permutation(clips)
            self._orders[group] = held
        return int(held[1][index])


@dataclass(frozen=True, eq=False)
class _Clip:
    """Latents (T, C), caption or None where it is dropped, and seed of the noise."""

    latents: Tensor
    caption: str | None
    noise_seed: int


@dataclass(frozen=True, eq=False)
class HeldOutClip:
    """A clip for validation: the beginning of its latents (T, C), its first caption, its `domain` or `audio`."""

    domain: str
    latents: Tensor
    caption: str


class HeldOutClips:
    """A fixed choice of clips, spread evenly over the domains; read when they are asked for."""

    def __init__(self, dataset: LatentDataset, texts: TextEncoder, count: int, tokens: int) -> None:
        """Choose.

        Args:
            dataset: held-out latents.
            texts: gives the embedding of every caption.
            count: how many, if there are as many.
            tokens: most of a clip.
        """
        self.dataset, self.texts, self._tokens = dataset, texts, tokens
        domains: dict[str, list[int]] = defaultdict(list)
        for index in range(len(dataset)):
            domains[_domain(dataset.description(index)[2])].append(index)
        waiting = [list(_draw(ORDER, 0).permutation(domains[name])) for name in sorted(domains)]
        chosen: list[int] = []
        while len(chosen) < count and any(waiting):
            chosen += [int(clips.pop()) for clips in waiting if clips][: count - len(chosen)]
        self._chosen = sorted(chosen)

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, place: int) -> HeldOutClip:
        """Read one clip."""
        item = self.dataset[self._chosen[place]]
        return HeldOutClip(_domain(item.labels), item.latents[: self._tokens], item.captions[0])


@dataclass(frozen=True, eq=False)
class GeneratorData:
    """What a run learns from and is measured by; `valid` is None without held-out latents."""

    train: LatentCrops
    valid: HeldOutClips | None
    text_width: int
    text_identity: str


def open_data(fabric: Fabric, config: GeneratorTrainingConfig) -> GeneratorData:
    """Open the latents of a recipe and embed all their captions, as far as that was not done before.

    Raises:
        DataError: no latents, damaged ones, or a caption that cannot be encoded.
        ModelMismatchError: latents of different models.
        ConfigurationError: settings that do not fit the data.
        CheckpointError: the text encoder cannot be loaded.
        OutputError: the text cache cannot be written.
    """
    if not config.data.train:
        raise DataError("data.train names no latents; list folders that `dasheng-tokenizer encode-dataset` made")
    train = LatentDataset(config.data.paths(config.data.train))
    valid = LatentDataset(config.data.paths(config.data.valid)) if config.data.valid else None
    if valid is not None:
        valid.require_model(train.index.model_hash)
    captions = all_captions(train) | (all_captions(valid) if valid is not None else set())
    stored = embed_captions(fabric, config, sorted(captions))
    # Each has a memory of its own: the batches may come from a thread.
    crops = LatentCrops(
        train, CachedTextEncoder(stored, config.text_cache), config, fabric.global_rank, fabric.world_size
    )
    held_out = None
    if valid is not None and config.validation_clips:
        texts = CachedTextEncoder(stored, config.text_cache)
        held_out = HeldOutClips(valid, texts, config.validation_clips, crops.crop_tokens)
    return GeneratorData(crops, held_out, stored.width, stored.identity)


def crop_tokens(config: GeneratorTrainingConfig, frame_rate: float) -> int:
    """Tokens of the longest crop.

    Raises:
        ConfigurationError: less than one.
    """
    tokens = int(config.data.crop_seconds * frame_rate + 1e-6)
    if not tokens:
        raise ConfigurationError(
            f"data.crop_seconds {config.data.crop_seconds} is less than a token; take at least {1 / frame_rate:g}"
        )
    return tokens


def _draw(*words: int) -> np.random.Generator:
    return np.random.default_rng(words)


def _domain(labels: dict[str, Any]) -> str:
    return str(labels.get("domain") or "audio")


def _groups(dataset: LatentDataset, label: str | None) -> dict[str, npt.NDArray[np.int64]]:
    """Clips by their value of a label, those without it as ""; all as one group without a label."""
    if label is None:
        return {"": np.arange(len(dataset))}
    return _by_label(dataset, range(len(dataset)), label, "data.balance")


def _evened(dataset: LatentDataset, clips: npt.NDArray[np.int64], label: str) -> npt.NDArray[np.int64]:
    """Clips of a group, each value of a label as often as the commonest: those of rarer ones come several times."""
    classes = _by_label(dataset, clips.tolist(), label, "data.evened").values()
    most = max(map(len, classes))
    return np.concatenate([np.resize(members, most) for members in classes])


def _by_label(
    dataset: LatentDataset, clips: Iterable[int], label: str, setting: str
) -> dict[str, npt.NDArray[np.int64]]:
    members: dict[str, list[int]] = defaultdict(list)
    known: set[str] = set()
    for index in clips:
        labels = dataset.description(index)[2]
        known |= labels.keys()
        members[clip_label(labels, label) or ""].append(index)
    if set(members) == {""}:
        has = ", ".join(sorted(known)) or "none"
        raise ConfigurationError(f"{setting}: no clip has the label {label!r}; labels of this data are: {has}")
    return {name: np.array(members[name]) for name in sorted(members)}


def _slots(names: list[str], shares: Mapping[str, int]) -> list[tuple[int, int, int]]:
    """The visits of a round: group, number of the visit among those of its group, and how many it has."""
    if unknown := sorted(set(shares) - set(names)):
        raise ConfigurationError(f"data.shares: no clip has the value {unknown[0]!r}; there are: {', '.join(names)}")
    counts = [shares.get(name, 1) for name in names]
    return [(group, turn, count) for group, count in enumerate(counts) for turn in range(count)]
