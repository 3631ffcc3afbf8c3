"""Small valid inputs of every kind, made on the spot."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import soundfile
import torch

from conftest import WHISPER, new_generator, tiny
from dasheng_tokenizer import DashengTokenizerModel
from dasheng_tokenizer.enhancement.denoiser import Denoiser, DenoiserConfig, DenoiserInfo
from dasheng_tokenizer.generation import GeneratorInfo
from dasheng_tokenizer.generation.text_encoders import load_text_encoder
from dasheng_tokenizer.scale.encode import encode_latents

RATE = 16_000
ROOT = Path(__file__).resolve().parents[2]
AUDIO = {
    "wav": ("WAV", "PCM_16"), "float.wav": ("WAV", "FLOAT"), "adpcm.wav": ("WAV", "IMA_ADPCM"),
    "ext.wav": ("WAVEX", "PCM_24"),
    "flac": ("FLAC", "PCM_16"), "ogg": ("OGG", "VORBIS"), "opus.ogg": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "aiff": ("AIFF", "PCM_16"), "au": ("AU", "PCM_16"), "w64.w64": ("W64", "PCM_16"), "rf64.wav": ("RF64", "PCM_16"),
    "caf.caf": ("CAF", "PCM_16"),
}  # fmt: skip


def tone(samples: int = 6400, channels: int = 1) -> np.ndarray:
    """(samples, channels)"""
    time = np.arange(samples)[:, None] * (1 + np.arange(channels)) / RATE
    return (0.3 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)


def audio_bytes(format: str = "WAV", subtype: str = "PCM_16", channels: int = 1) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, tone(channels=channels), RATE, format=format, subtype=subtype)
    return file.getvalue()


def make_seeds(root: Path) -> None:
    """Fill `root` with a folder for each kind of input."""
    torch.manual_seed(0)
    _audio(root)
    _models(root)
    _tokens(root)
    _shards(root)
    _lists(root)
    _evaluations(root)


def _audio(root: Path) -> None:
    folder = root / "audio"
    folder.mkdir(parents=True)
    for name, (kind, subtype) in AUDIO.items():
        data = audio_bytes(kind, subtype, channels=2 if name in ("wav", "flac") else 1)
        (folder / (name if "." in name else f"clip.{name}")).write_bytes(data)


def _models(root: Path) -> None:
    tokenizer = root / "tokenizer"
    tiny().save_pretrained(tokenizer)
    tiny("whisper").save_pretrained(root / "whisper-tokenizer")
    tiny("wavlm").save_pretrained(root / "wave-tokenizer")
    tiny(length_mode="published").save_pretrained(root / "published-tokenizer")
    text = root / "text"
    text_encoder(text)
    weights_hash = DashengTokenizerModel.from_pretrained(tokenizer).weights_hash()
    info = GeneratorInfo(
        tokenizer_hash=weights_hash,
        tokenizer=str(tokenizer),
        text_encoder=str(text),
        text_identity=load_text_encoder(text).identity,
        max_seconds=2.0,
        typical_seconds=0.4,
        provenance={"name": "tiny"},
    )
    new_generator(info).save_pretrained(root / "generator")
    facts = DenoiserInfo(weights_hash, str(tokenizer), "unified", window_seconds=0.64)
    statistics = [torch.zeros(32), torch.ones(32)] * 2
    Denoiser(DenoiserConfig(32, depth=1, heads=2), facts, *statistics).save_pretrained(root / "denoiser")
    shutil.copytree(ROOT / "tests" / "fixtures" / "sibling-generator", root / "sibling")
    for name in ("io.safetensors", "io.json", "README.md"):
        (root / "sibling" / name).unlink(missing_ok=True)
    from transformers import WhisperConfig, WhisperModel

    WhisperModel(WhisperConfig(**WHISPER)).save_pretrained(root / "frozen")


def text_encoder(folder: Path) -> None:
    """A tiny BERT that knows a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ("[PAD]", "[UNK]", "a", "dog", "barks", "twice", "rain", "bell", "loud")
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)


def _tokens(root: Path) -> None:
    model = DashengTokenizerModel.from_pretrained(root / "tokenizer").eval()
    folder = root / "tokens"
    folder.mkdir()
    for name, dtype, channels in (("a", torch.float32, 1), ("b", torch.float16, 2), ("c", torch.bfloat16, 1)):
        tokens = model.compress(tone(3000, channels).T, RATE).to(dtype)
        tokens.save(folder / f"{name}.tokens.safetensors")


def _shards(root: Path) -> None:
    folder = root / "shards"
    folder.mkdir()
    with tarfile.open(folder / "data.tar", "w") as archive:
        for number in range(3):
            labels = {"caption": f"a dog barks {number}", "domain": "sound", "labels": {"event": "dog"}, "n": [1, 2]}
            parts = {"flac": audio_bytes("FLAC"), "json": json.dumps(labels).encode()}
            for suffix, data in parts.items():
                member = tarfile.TarInfo(f"clip-{number}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    model = DashengTokenizerModel.from_pretrained(root / "tokenizer").eval()
    encode_latents([folder], root / "latents", model, source_name=str(root / "tokenizer"))


def _lists(root: Path) -> None:
    requests = root / "requests"
    requests.mkdir()
    rows = [
        {"text": "a dog barks", "seconds": 0.4, "seed": 3, "labels": {"event": "dog"}, "reference": "x"},
        {"text": "rain", "caption": "rain", "sfx": "bell"},
        {"text": "bell", "seconds": 0.2},
    ]
    (requests / "requests.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (requests / "texts.txt").write_text("a dog barks\nrain\nbell loud\n")
    manifest = root / "manifest"
    manifest.mkdir()
    lines = []
    for number in range(2):
        (manifest / f"{number}.wav").write_bytes(audio_bytes())
        lines.append(json.dumps({"file": f"{number}.wav", "text": "rain", "seed": 1, "labels": {"a": "b"}, "n": 1}))
    (manifest / "generated.jsonl").write_text("\n".join(lines))
    (manifest / "metrics.json").write_text(
        json.dumps({"mean": {}, "files": [{"file": "x.wav", "stoi": 0.5, "mel_distance": 1.0}]})
    )
    recipes = root / "recipes"
    recipes.mkdir()
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        shutil.copy(path, recipes)
    clips = root / "clip-list"
    clips.mkdir()
    rows = []
    for number in range(3):
        (clips / f"{number}.wav").write_bytes(audio_bytes())
        rows.append({"id": f"clip {number}", "path": f"{number}.wav", "caption": "rain", "labels": {"event": "bell"}})
    (clips / "clips.jsonl").write_text("\n".join(map(json.dumps, rows)))
    import pyarrow
    import pyarrow.parquet

    held = [{"bytes": audio_bytes("FLAC"), "path": f"{row['id']}.flac"} for row in rows]
    columns = {"id": [row["id"] for row in rows], "audio": held, "caption": ["rain"] * len(rows)}
    pyarrow.parquet.write_table(pyarrow.table(columns), clips / "clips.parquet")


def _evaluations(root: Path) -> None:
    from dasheng_tokenizer.evaluation.reconstruction import RowStore
    from fuzz.targets import ROW

    (root / "rows").mkdir()
    store = RowStore(root / "rows" / "rows.jsonl")
    for number, name in enumerate("abab"):
        store.add(str(number), dict(ROW, system=name))
    pairs = root / "pairs"
    for folder in ("noisy", "clean", "texts"):
        (pairs / folder).mkdir(parents=True)
    for name in ("p1_001", "p1_002"):
        for folder in ("noisy", "clean"):
            (pairs / folder / f"{name}.wav").write_bytes(audio_bytes())
        (pairs / "texts" / f"{name}.txt").write_text("a dog barks")
    (pairs / "log.txt").write_text("p1_001 bus 17.5\np1_002 cafe 2.5\n")
