"""Retrieval head: audio and captions into one space, scored by recall at 1 both ways (Clotho in X-ARES).

As in X-ARES: mean over time, contrastive loss with a learnt temperature from 0.07, batches of (clip, caption) pairs,
Adam with a cosine schedule; recall at 1 from clip to captions and from caption to clips, averaged. Unlike there, the
text side is a frozen sentence encoder that the user has, and both sides are LayerNorm and one linear layer, so that the
score speaks of the embedding and not of words learnt from a few thousand captions. For figures of the original head use
`xares_launcher`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dasheng_tokenizer.errors import CheckpointError, DataError
from dasheng_tokenizer.evaluation.heads import LEARNING_RATE, HeadResult, epoch_rate
from dasheng_tokenizer.evaluation.probe_tasks import ProbeTask

Features = npt.NDArray[np.floating]

Captioned = Sequence[tuple[Features, Sequence[str]]]
"""Clips: (T, D) features, or (D,) their mean over time, with one or more captions each."""

JOINT_DIM = 1024
"""Width of the joint space, as in X-ARES."""

TEMPERATURE = 0.07
TEXT_BATCH = 32


class TextEncoder(Protocol):
    """Sentences to vectors."""

    def __call__(self, sentences: Sequence[str]) -> Tensor:
        """N sentences → (N, H) float32."""
        ...


class SentenceEncoder:
    """A frozen text encoder of transformers: its last hidden state, averaged over the tokens of a sentence."""

    def __init__(self, folder: str | Path, device: str = "cpu") -> None:
        """Load it.

        Args:
            folder: with model (safetensors) and tokenizer.
            device: to run on.

        Raises:
            CheckpointError: not a folder, or without model or tokenizer.
        """
        from transformers import AutoModel, AutoTokenizer

        if not Path(folder).is_dir():
            raise CheckpointError(
                f"{folder} is no folder; give one with a text encoder of transformers and its tokenizer"
            )
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            model = AutoModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{folder}: no text encoder could be loaded ({_first_line(error)})") from error
        # The text side of models that have one for each of two modalities or an encoder and a decoder.
        text = getattr(model, "text_model", None) or (model.get_encoder() if model.config.is_encoder_decoder else model)
        self.model = text.to(device).eval().requires_grad_(False)
        self.device = device

    @torch.inference_mode()
    def __call__(self, sentences: Sequence[str]) -> Tensor:
        """See `TextEncoder`."""
        found = []
        for start in range(0, len(sentences), TEXT_BATCH):
            batch = list(sentences[start : start + TEXT_BATCH])
            tokens = self.tokenizer(batch, padding=True, truncation=True, return_tensors="pt").to(self.device)
            hidden = self.model(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            ).last_hidden_state.float()  # (B, L, H)
            mask = tokens["attention_mask"][..., None].float()  # (B, L, 1)
            found.append(((hidden * mask).sum(1) / mask.sum(1).clamp(min=1)).cpu())
        return torch.cat(found).clone()  # out of inference mode


class RetrievalHead(nn.Module):
    """LayerNorm and a linear layer for each side, and a temperature."""

    def __init__(self, audio_dim: int, text_dim: int, joint_dim: int = JOINT_DIM) -> None:
        super().__init__()
        self.audio = nn.Sequential(nn.LayerNorm(audio_dim), nn.Linear(audio_dim, joint_dim))
        self.text = nn.Sequential(nn.LayerNorm(text_dim), nn.Linear(text_dim, joint_dim))
        self.log_scale = nn.Parameter(torch.tensor(1 / TEMPERATURE).log())

    def similarity(self, audio: Tensor, text: Tensor) -> Tensor:
        """(N, D), (M, H) → (N, M) cosine similarity."""
        return F.normalize(self.audio(audio), dim=1) @ F.normalize(self.text(text), dim=1).T

    def forward(self, audio: Tensor, text: Tensor, clips: Tensor) -> Tensor:
        """Contrastive loss of a batch of pairs: (B, D), (B, H), and (B,) which clip each pair is of.

        Captions of the same clip in one batch are no mistakes of each other: they are left out of the sum.
        """
        logits = self.log_scale.exp() * self.similarity(audio, text)  # (B, B)
        target = torch.arange(len(logits))
        same = (clips[:, None] == clips[None, :]) & ~torch.eye(len(logits), dtype=torch.bool)
        logits = logits.masked_fill(same, -torch.inf)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def recall_at_1(similarity: Tensor, clips: Tensor) -> tuple[float, float]:
    """Recall at 1 from clips to captions, and from captions to clips.

    Args:
        similarity: (N clips, M captions).
        clips: (M,) index of the clip of each caption.
    """
    to_text = (clips[similarity.argmax(1)] == torch.arange(len(similarity))).float().mean()
    to_audio = (similarity.argmax(0) == clips).float().mean()
    return float(to_text), float(to_audio)


class _Side:
    """A split as tensors: audio (N, D), text (M, H), and clips (M,)."""

    def __init__(self, name: str, split: Captioned, encoder: TextEncoder) -> None:
        if not split:
            raise DataError(f"the {name} data of the retrieval task is empty")
        self.audio = torch.stack([_mean(name, features) for features, _ in split])
        if not torch.isfinite(self.audio).all():
            raise DataError(f"embeddings of the {name} data hold NaN or infinity; check the model")
        sentences = [caption for _, captions in split for caption in captions]
        counts = torch.tensor([len(captions) for _, captions in split])
        if not bool(counts.all()):
            raise DataError(f"a clip of the {name} data has no caption; leave it out")
        self.clips = torch.arange(len(split)).repeat_interleave(counts)
        self.text = encoder(sentences)


def train_retrieval(
    train: Captioned, valid: Captioned, test: Captioned, task: ProbeTask, seed: int, encoder: TextEncoder
) -> HeadResult:
    """Train the head and score the epoch that does best on the validation data.

    Args:
        train, valid, test: clips with captions.
        task: `epochs` and `batch_size` (pairs) matter.
        seed: of weights and order.
        encoder: of the captions.

    Returns:
        Score: mean of both recalls at 1; `extra` has each, and chance.

    Raises:
        DataError: no clips, a clip without a caption, embeddings or text vectors that are not finite.
    """
    sides = [
        _Side(name, split, encoder) for name, split in (("training", train), ("validation", valid), ("test", test))
    ]
    if not all(bool(torch.isfinite(side.text).all()) for side in sides):
        raise DataError("the text encoder gave NaN or infinity; check it")
    learn, choose, report = sides
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = RetrievalHead(learn.audio.shape[1], learn.text.shape[1])
    optimizer = torch.optim.Adam(head.parameters(), lr=LEARNING_RATE)
    best: tuple[float, int, dict[str, Tensor]] = (-math.inf, 0, {})
    for epoch in range(1, task.epochs + 1):
        optimizer.param_groups[0]["lr"] = epoch_rate(epoch, task.epochs)
        for rows in torch.randperm(len(learn.clips), generator=generator).split(task.batch_size):
            if len(rows) < 2:
                continue  # a pair alone has nothing to be told from
            clips = learn.clips[rows]
            optimizer.zero_grad()
            head(learn.audio[clips], learn.text[rows], clips).backward()
            optimizer.step()
        score = sum(_recalls(head, choose)) / 2
        if score > best[0]:
            best = score, epoch, copy.deepcopy(head.state_dict())
    head.load_state_dict(best[2])
    to_text, to_audio = _recalls(head, report)
    extra = {"audio to text": to_text, "text to audio": to_audio, "chance": 1 / len(report.audio)}
    return HeadResult((to_text + to_audio) / 2, best[0], best[1], extra)


@torch.no_grad()
def _recalls(head: RetrievalHead, side: _Side) -> tuple[float, float]:
    return recall_at_1(head.similarity(side.audio, side.text), side.clips)


def _mean(name: str, features: Features) -> Tensor:
    tensor = torch.from_numpy(np.asarray(features, np.float32))
    if tensor.ndim not in (1, 2) or not tensor.numel():
        raise DataError(f"features of the {name} data have shape {tuple(tensor.shape)}; expected (T, D) or (D,)")
    return tensor if tensor.ndim == 1 else tensor.mean(0)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
