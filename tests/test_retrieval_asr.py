"""Heads for retrieval and speech recognition on embeddings made up so that they can, or cannot, be learnt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dasheng_tokenizer.errors import CheckpointError, DataError
from dasheng_tokenizer.evaluation.asr import LanguageModel, error_rates, train_adapter, train_ctc
from dasheng_tokenizer.evaluation.probe_tasks import ProbeTask
from dasheng_tokenizer.evaluation.retrieval import SentenceEncoder, recall_at_1, train_retrieval

ADJECTIVES = ("loud", "soft", "near", "far", "old")
NOUNS = ("dog", "rain", "door", "bell", "train")
WORDS = ("a", "the", "is", "sounds", *ADJECTIVES, *NOUNS)

DIM = 64


def save_tokenizer(folder: Path, words: Sequence[str]) -> int:
    """A tokenizer of whole words, saved; returns the size of its vocabulary."""
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(("<pad>", "<unk>", "<eos>", *words))}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>"
    ).save_pretrained(folder)
    return len(vocabulary)


# ---------------------------------------------------------------------------------------------------- retrieval


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> SentenceEncoder:
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("text")
    size = save_tokenizer(folder, WORDS)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=size, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, initializer_range=0.5,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return SentenceEncoder(folder)


def captioned(clips: int, seed: int, shuffled: bool = False) -> list[tuple[np.ndarray, tuple[str, ...]]]:
    """Clips of a thing with a quality, (T, D), and two captions that say which; every pair of both occurs."""
    parts = np.random.default_rng(0).standard_normal((2, 5, DIM)).astype(np.float32)
    rng = np.random.default_rng(seed)
    pairs = [(i % 25 // 5, i % 5) for i in range(clips)]
    said = [pairs[row] for row in rng.permutation(clips)] if shuffled else pairs
    found = []
    for (quality, thing), (told_quality, told_thing) in zip(pairs, said, strict=True):
        length = int(rng.integers(3, 9))
        noise = 0.5 * rng.standard_normal((length, DIM)).astype(np.float32)
        adjective, noun = ADJECTIVES[told_quality], NOUNS[told_thing]
        captions = (f"a {adjective} {noun}", f"the {noun} sounds {adjective}")
        found.append((parts[0, quality] + parts[1, thing] + noise, captions))
    return found


RETRIEVAL = ProbeTask("clotho", "sound", "retrieval", "recall@1", epochs=12, batch_size=32)


def test_retrieval_learns_which_caption_belongs_to_which_clip(sentences: SentenceEncoder) -> None:
    train, valid, test = (captioned(clips, seed) for seed, clips in enumerate((200, 25, 25)))
    result = train_retrieval(train, valid, test, RETRIEVAL, 0, sentences)
    assert result.score > 0.6
    assert result.extra["chance"] == 1 / 25
    assert result.score == pytest.approx((result.extra["audio to text"] + result.extra["text to audio"]) / 2)
    again = train_retrieval(train, valid, test, RETRIEVAL, 0, sentences)
    assert again == result


def test_retrieval_with_shuffled_captions_is_at_chance(sentences: SentenceEncoder) -> None:
    train, valid = captioned(200, 0, shuffled=True), captioned(25, 1, shuffled=True)
    scores = [train_retrieval(train, valid, captioned(25, 2), RETRIEVAL, seed, sentences).score for seed in range(3)]
    assert np.mean(scores) < 0.2


def test_recall_at_1_by_hand() -> None:
    clips = torch.tensor([0, 0, 1, 1])
    similarity = torch.tensor([[0.1, 0.9, 0.2, 0.3], [0.8, 0.0, 0.4, 0.2]])
    # Clip 0 → caption 1, right; clip 1 → caption 0, wrong. Captions → clips 1, 0, 1, 0: two of four are right.
    assert recall_at_1(similarity, clips) == (0.5, 0.5)
    assert recall_at_1(torch.eye(2)[clips].T, clips) == (1.0, 1.0)


def test_sentence_vectors_do_not_hang_on_the_batch(sentences: SentenceEncoder) -> None:
    texts = ["a loud dog", "the rain sounds soft", "a bell"]
    alone = torch.cat([sentences([text]) for text in texts])
    torch.testing.assert_close(sentences(texts), alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(alone[0], alone[1], atol=1e-2)


@pytest.mark.parametrize("damage", ["nan", "no caption", "empty", "rank"])
def test_retrieval_names_bad_input(sentences: SentenceEncoder, damage: str) -> None:
    train, valid, test = captioned(25, 0), captioned(25, 1), captioned(25, 2)
    bad: list[Any] = list(valid)
    if damage == "nan":
        bad[3] = (np.full((4, DIM), np.nan, np.float32), bad[3][1])
    elif damage == "no caption":
        bad[3] = (bad[3][0], ())
    elif damage == "rank":
        bad[3] = (bad[3][0][None], bad[3][1])
    else:
        bad = []
    with pytest.raises(DataError, match="validation"):
        train_retrieval(train, bad, test, RETRIEVAL, 0, sentences)


def test_text_model_must_be_a_folder_with_one(tmp_path: Path) -> None:
    for load in (SentenceEncoder, LanguageModel):
        with pytest.raises(CheckpointError, match="no folder"):
            load(tmp_path / "none")
        with pytest.raises(CheckpointError, match="could be loaded"):
            load(tmp_path)


# ---------------------------------------------------------------------------------------------------- recognition

COMMANDS = ("open the door", "call a train", "ring old bell", "far rain")
ASR = ProbeTask("librispeech", "speech", "asr", "1-wer", epochs=15, batch_size=4)


def spelt(clips: int, seed: int, shuffled: bool = False) -> list[tuple[np.ndarray, str]]:
    """Clips of two or three words, each letter one vector and then one or two of silence; transcripts in capitals."""
    letters = np.random.default_rng(0).standard_normal((128, DIM)).astype(np.float32)
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(clips):
        text = " ".join(rng.choice(WORDS, int(rng.integers(2, 4))).tolist())
        rows = [letters[code] for letter in text for code in [ord(letter)] + [0] * int(rng.integers(1, 3))]
        noise = 0.2 * rng.standard_normal((len(rows), DIM)).astype(np.float32)
        found.append((np.stack(rows) + noise, text.upper()))
    texts = [text for _, text in found]
    order = rng.permutation(clips) if shuffled else range(clips)
    return [(features, texts[row]) for (features, _), row in zip(found, order, strict=True)]


def test_ctc_learns_to_spell() -> None:
    pytest.importorskip("jiwer", reason="needs the extra probe")
    train, valid, test = (spelt(clips, seed) for seed, clips in enumerate((150, 15, 20)))
    result = train_ctc(train, valid, test, ASR, 0)
    assert result.score > 0.6
    assert result.extra["word error rate"] == pytest.approx(1 - result.score)
    assert train_ctc(train, valid, test, ASR, 0) == result


def test_ctc_with_shuffled_transcripts_learns_nothing() -> None:
    pytest.importorskip("jiwer", reason="needs the extra probe")
    notes: list[str] = []
    train = spelt(150, 0, shuffled=True)
    assert train_ctc(train, spelt(15, 1, shuffled=True), spelt(20, 2), ASR, 0, notes).score < 0.1


def test_ctc_counts_clips_too_short_for_their_transcript() -> None:
    pytest.importorskip("jiwer", reason="needs the extra probe")
    train, notes = spelt(20, 0), list[str]()
    short = [(features[:1], text) for features, text in train[:5]]
    task = ProbeTask("librispeech", "speech", "asr", "1-wer", epochs=1, batch_size=4)
    train_ctc(short + train[5:], spelt(4, 1), spelt(4, 2), task, 0, notes)
    assert notes == ["5 training clips are too short for their transcript and were left out"]
    with pytest.raises(DataError, match="too short"):
        train_ctc(short, spelt(4, 1), spelt(4, 2), task, 0)


@pytest.mark.parametrize("damage", ["nan", "empty transcript", "empty", "rank"])
def test_recognition_names_bad_input(damage: str) -> None:
    train, test = spelt(4, 0), spelt(4, 2)
    bad: list[Any] = spelt(4, 1)
    if damage == "nan":
        bad[1] = (np.full((4, DIM), np.inf, np.float32), "A")
    elif damage == "empty transcript":
        bad[1] = (bad[1][0], "  ")
    elif damage == "rank":
        bad[1] = (bad[1][0].mean(0), "A")
    else:
        bad = []
    with pytest.raises(DataError, match="validation"):
        train_ctc(train, bad, test, ASR, 0)


def test_error_rates_ignore_case_and_spacing() -> None:
    pytest.importorskip("jiwer", reason="needs the extra probe")
    assert error_rates(["Hello  there"], ["hello there"])["word error rate"] == 0
    rates = error_rates(["a b c d", "e"], ["a x c d", "e f"])  # one wrong and one too many of five words
    assert rates["word error rate"] == pytest.approx(0.4)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """A tiny model that knows the commands by heart, so that a prompt need only say which."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("language")
    words = sorted({word for text in COMMANDS for word in text.split()})
    size = save_tokenizer(folder, words)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=None, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    learner = LanguageModel(folder)
    learner.model.requires_grad_(True)
    optimizer = torch.optim.Adam(learner.model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        learner.loss([torch.zeros(1, 32)] * len(COMMANDS), COMMANDS).backward()
        optimizer.step()
    learner.model.save_pretrained(folder)
    return LanguageModel(folder)


def commanded(clips: int, seed: int, shuffled: bool = False) -> list[tuple[np.ndarray, str]]:
    """Clips of (T, D) whose vectors say which command it is."""
    centres = np.random.default_rng(0).standard_normal((len(COMMANDS), DIM)).astype(np.float32)
    rng = np.random.default_rng(seed)
    found = []
    for i in range(clips):
        which = i % len(COMMANDS)
        noise = 0.2 * rng.standard_normal((int(rng.integers(2, 6)), DIM)).astype(np.float32)
        told = int(rng.integers(len(COMMANDS))) if shuffled else which
        found.append((centres[which] + noise, COMMANDS[told]))
    return found


ADAPTER = ProbeTask("librispeech", "speech", "asr", "1-wer", epochs=25, batch_size=8)


def test_adapter_makes_a_frozen_language_model_write_what_is_said(language_model: LanguageModel) -> None:
    pytest.importorskip("jiwer", reason="needs the extra probe")
    before = {name: tensor.clone() for name, tensor in language_model.model.state_dict().items()}
    train, valid, test = commanded(64, 0), commanded(8, 1), commanded(16, 2)
    result = train_adapter(train, valid, test, ADAPTER, 0, language_model, max_new_tokens=6)
    assert result.score > 0.8
    assert train_adapter(train, valid, test, ADAPTER, 0, language_model, max_new_tokens=6) == result
    for name, tensor in language_model.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_adapter_with_shuffled_transcripts_is_at_chance(language_model: LanguageModel) -> None:
    pytest.importorskip("jiwer", reason="needs the extra probe")
    train, valid = commanded(64, 0, shuffled=True), commanded(8, 1, shuffled=True)
    result = train_adapter(train, valid, commanded(16, 2), ADAPTER, 0, language_model, max_new_tokens=6)
    assert result.score < 0.5  # always the same command: a quarter


def test_writing_does_not_hang_on_the_batch(language_model: LanguageModel) -> None:
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randn(length, 32, generator=generator) for length in (1, 7, 3)]
    alone = [language_model.write([prompt], 6)[0] for prompt in prompts]
    assert language_model.write(prompts, 6) == alone
    losses = [float(language_model.loss([prompt], [text])) for prompt, text in zip(prompts, COMMANDS, strict=False)]
    counts = [len(text.split()) + 1 for text in COMMANDS[:3]]
    together = float(language_model.loss(prompts, COMMANDS[:3]))
    assert together == pytest.approx(np.average(losses, weights=counts), rel=1e-4)
