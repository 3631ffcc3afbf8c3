"""Speech recognition heads on frozen embeddings, scored as max(0, 1 − word error rate).

`train_ctc` is light and needs nothing but the embeddings: LayerNorm and one linear layer, two outputs a token, trained
by connectionist temporal classification over characters. `train_adapter` is that of X-ARES: a SwiGLU adapter turns the
embeddings into a prompt of a frozen causal language model, which then writes the transcript; the model is a folder that
the user has (in X-ARES Qwen2.5-0.5B).

Transcripts are compared in lower case with single spaces, over all words of the test data together.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dasheng_tokenizer.errors import CheckpointError, DataError
from dasheng_tokenizer.evaluation.heads import HeadResult, epoch_rate
from dasheng_tokenizer.evaluation.probe_tasks import ProbeTask
from dasheng_tokenizer.files import require_extra

Features = npt.NDArray[np.floating]

Transcribed = Sequence[tuple[Features, str]]
"""Clips: (T, D) features and the transcript."""

OUTPUTS_PER_TOKEN = 2
"""Of the CTC head: 25 tokens a second are fewer than the characters of fast speech."""

MAX_NEW_TOKENS = 200
REPETITION_PENALTY = 1.1
SEPARATOR = "<|vision_end|>"
"""Of the adapter, as in X-ARES: between audio and text; where the vocabulary lacks it, the first or last token of a
text."""


def normalized(transcript: str) -> str:
    """Lower case, single spaces."""
    return " ".join(transcript.lower().split())


def error_rates(references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, float]:
    """Word and character error rate over all clips together.

    Raises:
        MissingExtraError: jiwer is not installed.
    """
    jiwer = require_extra("jiwer", "probe")
    wanted, found = [normalized(text) for text in references], [normalized(text) for text in hypotheses]
    return {"word error rate": float(jiwer.wer(wanted, found)), "character error rate": float(jiwer.cer(wanted, found))}


class CTCHead(nn.Module):
    """LayerNorm and a linear layer: (B, T, D) → (B, 2·T, C) logits; class 0 is the blank."""

    def __init__(self, dim: int, alphabet: Sequence[str]) -> None:
        super().__init__()
        self.alphabet = tuple(alphabet)
        self.norm = nn.LayerNorm(dim)
        self.linear = nn.Linear(dim, OUTPUTS_PER_TOKEN * (len(alphabet) + 1))

    def forward(self, features: Tensor) -> Tensor:
        """(B, T, D) → (B, 2·T, C)."""
        logits = self.linear(self.norm(features))  # (B, T, 2·C)
        return logits.reshape(len(features), OUTPUTS_PER_TOKEN * features.shape[1], -1)  # (B, 2·T, C)

    @torch.no_grad()
    def transcribe(self, features: Tensor) -> str:
        """(T, D) → the most probable character at each output, repetitions and blanks taken out."""
        best = self(features[None])[0].argmax(-1).tolist()
        return "".join(self.alphabet[index - 1] for index, _ in itertools.groupby(best) if index)


def train_ctc(
    train: Transcribed,
    valid: Transcribed,
    test: Transcribed,
    task: ProbeTask,
    seed: int,
    notes: list[str] | None = None,
) -> HeadResult:
    """Train a CTC head; the epoch is the one whose transcripts of the validation data score best.

    Args:
        train, valid, test: clips with transcripts.
        task: `epochs` and `batch_size` matter.
        seed: of weights and order.
        notes: receives how many training clips are too short for their transcript and were left out.

    Raises:
        DataError: no usable clips, an empty transcript, or embeddings that are not finite.
        MissingExtraError: jiwer is not installed.
    """
    learn, choose, report = _checked("training", train), _checked("validation", valid), _checked("test", test)
    head, index = _ctc_head(learn, seed)
    items = [(clip, torch.tensor([index[letter] for letter in text])) for clip, text in learn]
    fitting = [item for item in items if OUTPUTS_PER_TOKEN * len(item[0]) >= _ctc_length(item[1])]
    if not fitting:
        raise DataError("every training clip is too short for its transcript; check that they belong together")
    if notes is not None and len(fitting) < len(items):
        notes.append(f"{len(items) - len(fitting)} training clips are too short for their transcript and were left out")

    def loss(batch: list[tuple[Tensor, Tensor]]) -> Tensor:
        clips, targets = zip(*batch, strict=True)
        logits = head(nn.utils.rnn.pad_sequence(list(clips), batch_first=True))  # (B, 2·T, C)
        lengths = torch.tensor([OUTPUTS_PER_TOKEN * len(clip) for clip in clips])
        counts = torch.tensor([len(target) for target in targets])
        return F.ctc_loss(logits.log_softmax(-1).transpose(0, 1), torch.cat(targets), lengths, counts)

    def score(clips: list[tuple[Tensor, str]]) -> float:
        return _score(clips, [head.transcribe(clip) for clip, _ in clips])["score"]

    best, epoch = _train(head, fitting, loss, lambda: score(choose), task, seed)
    rates = _score(report, [head.transcribe(clip) for clip, _ in report])
    return HeadResult(rates.pop("score"), best, epoch, rates)


class SwiGLUAdapter(nn.Module):
    """(…, D) → (…, H): a product of two linear layers, one through SiLU, and a third."""

    def __init__(self, dim: int, inner: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.value = nn.Linear(dim, inner), nn.Linear(dim, inner)
        self.out = nn.Linear(inner, hidden)

    def forward(self, features: Tensor) -> Tensor:
        """(…, D) → (…, H)."""
        return self.out(F.silu(self.gate(features)) * self.value(features))


class LanguageModel:
    """A frozen causal language model of transformers that is prompted with vectors."""

    def __init__(self, folder: str | Path, device: str = "cpu") -> None:
        """Load it.

        Args:
            folder: with model (safetensors) and tokenizer.
            device: to run on.

        Raises:
            CheckpointError: not a folder, without model or tokenizer, or a tokenizer that cannot end a text.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if not Path(folder).is_dir():
            raise CheckpointError(f"{folder} is no folder; give one with a causal language model of transformers")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
            )
        except (OSError, ValueError, KeyError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"{folder}: no causal language model could be loaded ({reason})") from error
        if self.tokenizer.eos_token_id is None:
            raise CheckpointError(f"{folder}: its tokenizer has no token that ends a text; the head cannot stop")
        self.model = model.to(device).eval().requires_grad_(False)
        self.device, self.eos = device, int(self.tokenizer.eos_token_id)
        known = self.tokenizer.get_vocab().get(SEPARATOR, self.tokenizer.bos_token_id)
        self.separator = self.eos if known is None else int(known)
        self.hidden = int(model.config.hidden_size)
        self.inner = int(getattr(model.config, "intermediate_size", None) or 4 * self.hidden)

    def loss(self, prompts: Sequence[Tensor], texts: Sequence[str]) -> Tensor:
        """Mean cross-entropy of the tokens of the texts and their ends, after prompts (T, H) and the separator."""
        rows, labels = [], []
        for prompt, text in zip(prompts, texts, strict=True):
            known = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if not known:
                raise DataError(f"the tokenizer of the language model has no token for {text!r}; use another model")
            tokens = [*known, self.eos]
            rows.append(torch.cat([prompt, self._embed([self.separator, *tokens])]))
            labels.append(torch.tensor([-100] * (len(prompt) + 1) + tokens))
        mask = nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in rows], batch_first=True).long()
        return self.model(
            inputs_embeds=nn.utils.rnn.pad_sequence(rows, batch_first=True),  # (B, L, H)
            attention_mask=mask.to(self.device),
            labels=nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100).to(self.device),
        ).loss

    @torch.no_grad()
    def write(self, prompts: Sequence[Tensor], max_new_tokens: int) -> list[str]:
        """The texts that follow prompts (T, H) and the separator, always by the most probable token."""
        from transformers import GenerationConfig

        rows = [torch.cat([prompt, self._embed([self.separator])]) for prompt in prompts]
        longest = max(map(len, rows))
        # Filled on the left, so that the text follows its prompt; the model counts positions by the mask.
        padded = torch.stack([F.pad(row, (0, 0, longest - len(row), 0)) for row in rows])  # (B, L, H)
        mask = torch.stack([F.pad(torch.ones(len(row)), (longest - len(row), 0)) for row in rows]).long()
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            repetition_penalty=REPETITION_PENALTY,
            eos_token_id=self.eos,
            pad_token_id=self.eos,
        )
        written = self.model.generate(
            inputs_embeds=padded, attention_mask=mask.to(self.device), generation_config=settings
        )
        texts: list[str] = self.tokenizer.batch_decode(written, skip_special_tokens=True)
        return texts

    def _embed(self, tokens: list[int]) -> Tensor:
        embedded: Tensor = self.model.get_input_embeddings()(torch.tensor(tokens, device=self.device))  # (L, H)
        return embedded


def train_adapter(
    train: Transcribed,
    valid: Transcribed,
    test: Transcribed,
    task: ProbeTask,
    seed: int,
    language_model: LanguageModel,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> HeadResult:
    """Train an adapter into a frozen language model; the epoch is the one of least loss on the validation data.

    Args:
        train, valid, test: clips with transcripts.
        task: `epochs` and `batch_size` matter.
        seed: of weights and order.
        language_model: that writes.
        max_new_tokens: longest transcript written.

    Returns:
        `selection` is the negative loss.

    Raises:
        DataError: no clips, an empty transcript, or embeddings that are not finite.
        MissingExtraError: jiwer is not installed.
    """
    learn, choose, report = _checked("training", train), _checked("validation", valid), _checked("test", test)
    device = language_model.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = SwiGLUAdapter(learn[0][0].shape[1], language_model.inner, language_model.hidden).to(device)

    def loss(batch: list[tuple[Tensor, str]]) -> Tensor:
        return language_model.loss([adapter(clip.to(device)) for clip, _ in batch], [text for _, text in batch])

    def selection() -> float:
        with torch.no_grad():
            return -sum(len(batch) * float(loss(batch)) for batch in _batches(choose, task.batch_size)) / len(choose)

    best, epoch = _train(adapter, learn, loss, selection, task, seed)
    written: list[str] = []
    with torch.no_grad():
        for batch in _batches(report, task.batch_size):
            written += language_model.write([adapter(clip.to(device)) for clip, _ in batch], max_new_tokens)
    rates = _score(report, written)
    return HeadResult(rates.pop("score"), best, epoch, rates)


def _train(
    head: nn.Module,
    items: list[Any],
    loss: Callable[[list[Any]], Tensor],
    selection: Callable[[], float],
    task: ProbeTask,
    seed: int,
) -> tuple[float, int]:
    """Train, leave the weights of the best epoch in the head, and return its selection score and number."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(head.parameters())
    best: tuple[float, int, dict[str, Tensor]] = (-math.inf, 0, head.state_dict())
    for epoch in range(1, task.epochs + 1):
        optimizer.param_groups[0]["lr"] = epoch_rate(epoch, task.epochs)
        order = torch.randperm(len(items), generator=generator).tolist()
        for batch in _batches([items[row] for row in order], task.batch_size):
            optimizer.zero_grad()
            loss(batch).backward()
            optimizer.step()
        score = selection()
        if score > best[0]:
            best = score, epoch, copy.deepcopy(head.state_dict())
    if not best[1]:
        raise DataError("the head's training diverged: no epoch has a validation score that is a number")
    head.load_state_dict(best[2])
    return best[0], best[1]


def _ctc_head(learn: list[tuple[Tensor, str]], seed: int) -> tuple[CTCHead, dict[str, int]]:
    """A head for the characters of the training data, and their classes."""
    alphabet = sorted({letter for _, text in learn for letter in text})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = CTCHead(learn[0][0].shape[1], alphabet)
    return head, {letter: number for number, letter in enumerate(alphabet, start=1)}


def _ctc_length(target: Tensor) -> int:
    """Outputs that a target needs: one a character, and a blank between equal ones."""
    return len(target) + int((target[1:] == target[:-1]).sum())


def _score(clips: list[tuple[Tensor, str]], written: list[str]) -> dict[str, float]:
    rates = error_rates([text for _, text in clips], written)
    return {"score": max(0.0, 1 - rates["word error rate"]), **rates}


def _checked(name: str, split: Transcribed) -> list[tuple[Tensor, str]]:
    """Clips as float32 tensors (T, D), transcripts normalised."""
    clips = [(torch.from_numpy(np.asarray(features, np.float32)), normalized(text)) for features, text in split]
    if not clips:
        raise DataError(f"the {name} data of the recognition task is empty")
    for clip, text in clips:
        if clip.ndim != 2 or not clip.numel():
            raise DataError(f"features of the {name} data have shape {tuple(clip.shape)}; expected (T, D)")
        if not torch.isfinite(clip).all():
            raise DataError(f"embeddings of the {name} data hold NaN or infinity; check the model")
        if not text:
            raise DataError(f"a clip of the {name} data has an empty transcript; leave it out")
    return clips


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
