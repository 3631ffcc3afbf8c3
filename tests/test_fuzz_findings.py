"""What `make fuzz` has found, each with the least input that shows it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import WhisperConfig, WhisperModel

from conftest import WHISPER, tiny
from dasheng_tokenizer import DashengTokenizerConfig, DashengTokenizerModel, load_audio
from dasheng_tokenizer.checkpoint_sizes import settings_from_json
from dasheng_tokenizer.checkpoints import new_tokenizer
from dasheng_tokenizer.cli import main
from dasheng_tokenizer.enhancement.denoiser import DenoiserInfo
from dasheng_tokenizer.errors import (
    MOST_CHARACTERS,
    AudioFileError,
    CheckpointError,
    ConfigurationError,
    DashengTokenizerError,
    DataError,
    OutputError,
    one_line,
)
from dasheng_tokenizer.evaluation.reconstruction import RowStore
from dasheng_tokenizer.feature_extraction import DashengTokenizerFeatureExtractor
from dasheng_tokenizer.files import parse_json
from dasheng_tokenizer.generation import LatentDataset
from dasheng_tokenizer.generation.dit import DiTConfig
from dasheng_tokenizer.generation.generator import Generator, GeneratorInfo
from dasheng_tokenizer.generation.text_encoders import load_text_encoder
from dasheng_tokenizer.reconstruction_report import Report
from dasheng_tokenizer.scale.encode import encode_latents
from dasheng_tokenizer.training import load_any_recipe
from dasheng_tokenizer.training.plain_yaml import DEEPEST, parse_yaml
from fuzz.seeds import audio_bytes, text_encoder

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_intermediate_size": 48}


def change(path: Path, **entries: Any) -> None:
    """Entries of a JSON file set, or removed where they are `...`."""
    held = {**json.loads(path.read_text()), **entries}
    path.write_text(json.dumps({key: value for key, value in held.items() if value is not ...}))


# ---------------------------------------------------------------------- messages


def test_a_message_takes_one_line_and_cannot_steer_a_terminal() -> None:
    assert one_line("a\n  b\r\nc\u2028d") == "a b c d"
    assert one_line("\x1b[31mred\x07") == r"\x1b[31mred\x07"
    assert one_line("half \ud800").encode()
    assert len(one_line("x" * 10**6)) < MOST_CHARACTERS + 10
    assert str(DataError("line 1\n\nline 2")) == "line 1 line 2"
    assert str(CheckpointError("line 1\nline 2")) == "line 1 line 2"


def test_hostile_facts_of_a_model_are_shown_on_a_line_each(
    tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    DashengTokenizerModel.from_pretrained(tokenizer_folder).save_pretrained(tmp_path)
    change(tmp_path / "config.json", provenance={"data\x1b[2J": "mine\x1b[31m\nfake  line \ud800"})
    assert main(["info", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "fake" in next(line for line in out.splitlines() if "mine" in line)


# ---------------------------------------------------------------------- JSON and YAML


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "NaN", "[-Infinity]", "1e999", "9" * 5000, "", "{", b"\xff\xfe\x00"]
)
def test_json_that_is_none_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


def test_figures_of_a_run_may_be_nan() -> None:
    assert str(parse_json("[NaN, Infinity]", finite=False)) == "[nan, inf]"


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x]\nb: *a",
        "&a [*a]",
        "steps: " + "[" * 5000,
        "- " * 5000 + "x",
        "? {a: b}\n: c",
        "1: 2",
        "2020-01-01: x",
        "steps: 2020-13-45",
        "steps: !!int x",
        "steps: !!timestamp x",
        "steps: =",
        "steps: !!python/object/apply:os.system ['true']",
        "a\x00b",
        "steps: 0x" + "f" * 4000,
        "x" * 2_000_000,
    ],
)
def test_yaml_that_is_no_recipe_is_a_named_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigurationError):
        load_any_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(ConfigurationError):
        load_any_recipe(tmp_path / "recipe.yaml", ["steps=" + text])


def test_yaml_of_usual_depth_is_read() -> None:
    text = "[" * (DEEPEST - 1) + "]" * (DEEPEST - 1)
    assert json.dumps(parse_yaml("a: " + text)) == json.dumps({"a": json.loads(text)})


# ---------------------------------------------------------------------- models


@pytest.mark.parametrize(
    "entries",
    [
        {"depth": 2**31 - 1, "model_type": ...},
        {"decoder_depth": 10**18},
        {"n_mels_patch": 10**9},
        {"decoder_embed_dim": 20_000},
        {"num_heads": 2.0},
        {"embed_dim": [32]},
        {"depth": True},
        {"depth": "2"},
        {"provenance": [1]},
        {"semantic_encoder": "dasheng"},
        {"semantic_encoder": {"kind": "whisper", "config": 3}},
        {"semantic_encoder": {"kind": "whisper", "config": {"d_model": 32, "activation_function": 10**200}}},
        {"semantic_encoder": {"kind": ["whisper"]}},
        {"dtype": "x"},
        {"model_type": "bert"},
        {"model_type": 7},
    ],
)
def test_a_damaged_config_is_a_checkpoint_error(entries: dict[str, Any], tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    change(tmp_path / "config.json", **entries)
    with pytest.raises(CheckpointError):
        DashengTokenizerModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("config", ["null", "[]", "3", '{"model_type": "whisper", "d_model": 32.0}', "[" * 100_000])
def test_a_frozen_encoder_with_a_damaged_config_is_named(config: str, tmp_path: Path) -> None:
    WhisperModel(WhisperConfig(**WHISPER)).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(DashengTokenizerError):
        new_tokenizer(tmp_path, **SMALL)


@pytest.mark.parametrize("size", [{"encoder_layers": 10**9}, {"num_mel_bins": -80}, {"d_model": 10**9}])
def test_a_frozen_encoder_of_impossible_size_is_named(size: dict[str, int], tmp_path: Path) -> None:
    WhisperModel(WhisperConfig(**WHISPER)).save_pretrained(tmp_path)
    change(tmp_path / "config.json", **size)
    with pytest.raises(DashengTokenizerError):
        new_tokenizer(tmp_path, **SMALL)


@pytest.mark.parametrize(
    ("kind", "held"),
    [
        (DiTConfig, [1]),
        (DiTConfig, {"latent_dim": 32, "text_dim": 16, "width": 32, "depth": "2", "heads": 2}),
        (DiTConfig, {"latent_dim": 32, "text_dim": 16, "width": 32, "depth": 2, "heads": True}),
        (GeneratorInfo, {"tokenizer_hash": "x", "text_identity": 3}),
        (GeneratorInfo, {"tokenizer_hash": "x", "provenance": []}),
        (GeneratorInfo, {"tokenizer_hash": "x", "max_seconds": 10**400}),
        (DenoiserInfo, {"tokenizer_hash": "x", "part": ["unified"]}),
        (DenoiserInfo, {"tokenizer_hash": "x", "clean_change": [0.1]}),
    ],
)
def test_settings_of_a_wrong_type_are_refused(kind: type, held: Any) -> None:
    with pytest.raises(TypeError):
        settings_from_json(kind, held)


def test_settings_of_the_right_types_are_taken() -> None:
    info = settings_from_json(DenoiserInfo, {"tokenizer_hash": "x", "clean_change": [0, 0.5], "window_seconds": 5})
    assert info.clean_change == (0.0, 0.5) and info.window_seconds == 5


def test_a_generator_of_more_blocks_than_weights_is_refused(generator_folder: Path, tmp_path: Path) -> None:
    for path in generator_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    dit = json.loads((tmp_path / "config.json").read_text())["dit"]
    change(tmp_path / "config.json", dit={**dit, "depth": 10**9})
    with pytest.raises(CheckpointError, match="blocks"):
        Generator.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("tokenizer_config.json", {"model_max_length": [1]}),
        ("config.json", {"max_position_embeddings": "x"}),
        ("config.json", {"hidden_size": 10**9}),
        ("config.json", {"num_hidden_layers": 10**9}),
    ],
)
def test_a_text_encoder_with_odd_settings_is_named(name: str, entries: dict[str, Any], tmp_path: Path) -> None:
    text_encoder(tmp_path)
    change(tmp_path / name, **entries)
    with pytest.raises(CheckpointError):
        load_text_encoder(tmp_path)


# ---------------------------------------------------------------------- latents


@pytest.fixture
def latents(tmp_path: Path) -> Path:
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / "a.wav").write_bytes(audio_bytes())
    (tmp_path / "audio" / "a.json").write_text('{"caption": "rain"}')
    encode_latents([tmp_path / "audio"], tmp_path / "latents", tiny(), source_name="tiny")
    return tmp_path / "latents"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda row: [row],
        lambda row: {**row, "key": 3},
        lambda row: {**row, "captions": []},
        lambda row: {**row, "captions": "rain"},
        lambda row: {**row, "labels": None},
        lambda row: {key: value for key, value in row.items() if key != "labels"},
    ],
)
def test_a_damaged_line_of_a_folder_of_latents_is_named(latents: Path, spoil: Callable[[dict[str, Any]], Any]) -> None:
    path = latents / "latents-00000-000.jsonl"
    path.write_text(json.dumps(spoil(json.loads(path.read_text()))) + "\n")
    data = LatentDataset(latents)
    with pytest.raises(DataError, match="damaged"):
        data[0]
    with pytest.raises(DataError, match="damaged"):
        data.description(0)


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("index.json", {"shards": "1"}),
        ("index.json", {"shards": ["../audio/a"]}),
        ("index.json", {"shards": ["latents-00000-000", 1]}),
        ("index.json", {"version": 1, "shards": 10**9}),
        ("index.json", {"shard_format": "pickle"}),
        ("index.json", {"clips": None}),
        ("index.json", {"mean": {}}),
        ("index.json", {"mean": [0.0]}),
        ("latents-00000-000.json", {"tokens": 3}),
        ("latents-00000-000.json", {"tokens": [10**30]}),
    ],
)
def test_a_damaged_index_of_latents_is_named(latents: Path, name: str, entries: dict[str, Any]) -> None:
    change(latents / name, **entries)
    with pytest.raises(DataError, match="damaged"):
        LatentDataset(latents)


@pytest.mark.parametrize(
    "entries",
    [
        {"skipped": None},
        {"next": ...},
        {"tokens": {}},
        {"samples": {}},
        {"statistics": {"count": 1, "mean": [0], "squares": [0]}},
    ],
)
def test_an_encoding_does_not_go_on_from_a_damaged_note(latents: Path, entries: dict[str, Any]) -> None:
    (latents / "index.json").unlink()
    change(latents / "latents-00000-000.json", **entries)
    with pytest.raises(DataError, match="damaged"):
        encode_latents([latents.parent / "audio"], latents, tiny(), source_name="tiny")


@pytest.mark.parametrize("entries", [{"latent_dim": 33}, {"frame_rate": "x"}, {"tokenizer": None}])
def test_an_encoding_does_not_go_on_from_a_damaged_description(latents: Path, entries: dict[str, Any]) -> None:
    (latents / "index.json").unlink()
    change(latents / "encoding.json", **entries)
    with pytest.raises(DataError, match="damaged"):
        encode_latents([latents.parent / "audio"], latents, tiny(), source_name="tiny")


@pytest.mark.parametrize(
    "table",
    [[], {"files": [3]}, {"files": [{"file": "a", "stoi": "x"}]}, {"files": [{"file": "a", "mel_distance": [1]}]}],
)
def test_a_table_of_another_kind_is_not_gone_on_with(table: Any, tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps(table))
    with pytest.raises(OutputError):
        Report.open(tmp_path)


@pytest.mark.parametrize("held", ["3.5", "[" * 100_000])
def test_a_feature_extractor_with_odd_settings_is_named(held: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(held)
    with pytest.raises(CheckpointError):
        DashengTokenizerFeatureExtractor.from_pretrained(tmp_path)


# ---------------------------------------------------------------------- lists of clips, long headers, kept rows


def test_a_damaged_list_of_clips_is_named_and_what_was_read_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pyarrow, parquet = (
        pytest.importorskip(name, reason="needs the extra scale") for name in ("pyarrow", "pyarrow.parquet")
    )
    tiny().save_pretrained(tmp_path / "tokenizer")
    rows = [{"id": str(n), "audio": {"bytes": audio_bytes(), "path": "a.wav"}, "caption": "rain"} for n in range(3)]
    path = tmp_path / "clips.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=1, compression="none")
    data = bytearray(path.read_bytes())
    group = parquet.ParquetFile(path).metadata.row_group(1)
    start = min(group.column(number).data_page_offset for number in range(group.num_columns))
    data[start : start + 16] = b"\xff" * 16
    path.write_bytes(data)
    out = tmp_path / "latents"
    assert main(["encode-dataset", str(path), str(out), "--model", str(tmp_path / "tokenizer")]) == 1
    dataset = LatentDataset(out)
    assert [dataset[number].key for number in range(len(dataset))] == ["0"]
    assert "error: clips.parquet, rows 1 to 3: damaged, rows that were not read yet" in capsys.readouterr().err


def test_a_header_that_announces_more_than_memory_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "long.wav"
    path.write_bytes(audio_bytes())

    def full(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("dasheng_tokenizer.audio_reader.np.empty", full)
    with pytest.raises(AudioFileError, match="1 channels of 6400 samples, more than there is memory for"):
        load_audio(path)


def test_a_changed_row_of_an_evaluation_counts_for_nothing(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    store = RowStore(path)
    store.add("a", {"stoi": 0.5})
    store.add("b", {"stoi": 0.6})
    assert RowStore(path).rows == {"a": {"stoi": 0.5}, "b": {"stoi": 0.6}}
    path.write_text(path.read_text().replace("0.6", '"x"'))
    assert RowStore(path).rows == {"a": {"stoi": 0.5}}


def test_files_whose_names_are_not_utf8_are_read_and_listed(tmp_path: Path) -> None:
    """As archives from other systems unpack them."""
    folder = tmp_path / "clips"
    folder.mkdir()
    name = os.fsdecode(b"caf\xe9.wav")
    try:
        (folder / name).write_bytes(audio_bytes())
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert main(["reconstruct", str(folder), "-o", str(tmp_path / "heard")]) == 0
    table = json.loads((tmp_path / "heard" / "metrics.json").read_text(encoding="utf-8"))
    assert [Path(row["file"]).name for row in table["files"]] == [name]
    rows = RowStore(tmp_path / "rows.jsonl")
    rows.add("a", {"file": name})
    assert RowStore(tmp_path / "rows.jsonl").rows == {"a": {"file": name}}


@pytest.mark.parametrize("path", ["a\ud800.wav", "a\0.wav"])
def test_a_manifest_with_a_path_that_no_file_can_have(
    path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = tmp_path / "clips.jsonl"
    (tmp_path / "good.wav").write_bytes(audio_bytes())
    manifest.write_text(json.dumps({"path": path}) + "\n" + json.dumps({"path": "good.wav", "caption": "x"}) + "\n")
    tiny("whisper").save_pretrained(tmp_path / "tokenizer")
    out = tmp_path / "latents"
    assert main(["encode-dataset", str(manifest), str(out), "--model", str(tmp_path / "tokenizer")]) == 1
    assert len(LatentDataset(out)) == 1
    assert "no file can have such a name" in capsys.readouterr().err


@pytest.mark.parametrize("width", [{}, "a\nb", 1.5, [384]])
def test_a_width_of_an_encoder_that_is_no_number(width: object) -> None:
    with pytest.raises(ConfigurationError, match="whole number|needs 'config'"):
        DashengTokenizerConfig(semantic_encoder={"kind": "whisper", "config": {"d_model": width}})


def test_a_token_file_whose_name_no_reader_would_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        (tmp_path / os.fsdecode(b"caf\xe9.wav")).write_bytes(audio_bytes())
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert main(["encode", str(tmp_path), "-o", str(tmp_path / "tokens")]) == 1
    assert "needs a name in UTF-8; rename" in capsys.readouterr().err
    assert not list((tmp_path / "tokens").rglob("*.*"))
