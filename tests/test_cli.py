"""The command line: folders, bad inputs, resumption, exit codes."""

from __future__ import annotations

import csv
import errno
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from conftest import tiny
from dasheng_tokenizer import AudioTokens, load_audio, save_audio
from dasheng_tokenizer.cli import main
from dasheng_tokenizer.cli_paths import is_audio, plan
from dasheng_tokenizer.errors import ConfigurationError
from dasheng_tokenizer.evaluation import metrics


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "other"
    tiny("whisper").save_pretrained(folder)
    return str(folder)


def tone(samples: int = 9000, channels: int = 1, rate: int = 16000) -> np.ndarray:
    time = np.arange(samples) / rate
    return np.stack([0.3 * np.sin(2 * np.pi * 220 * (k + 1) * time) for k in range(channels)]).astype(np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Good files of several kinds at two depths."""
    (tmp_path / "in" / "sub").mkdir(parents=True)
    save_audio(tmp_path / "in" / "one.wav", tone(), 16000)
    save_audio(tmp_path / "in" / "sub" / "two.flac", tone(20_001, 2, 44100), 44100)
    save_audio(tmp_path / "in" / "sub" / "three.mp3", tone(), 22050)
    (tmp_path / "in" / "notes.txt").write_text("not asked for")
    (tmp_path / "in" / ".hidden.wav").write_text("not asked for")
    return tmp_path / "in"


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# ---------------------------------------------------------------------- the work


def test_encode_and_decode_a_folder(folder: Path, tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]):
    out, back = tmp_path / "out", tmp_path / "back"
    assert main(["encode", str(folder), "-o", str(out), "--model", model, "--token-dtype", "float16"]) == 0
    assert names(out) == ["one.tokens.safetensors", "sub/three.tokens.safetensors", "sub/two.tokens.safetensors"]
    assert AudioTokens.info(out / "one.tokens.safetensors")["dtype"] == "float16"
    assert main(["decode", str(out), "-o", str(back), "--model", model, "--format", "flac"]) == 0
    assert names(back) == ["one.decoded.flac", "sub/three.decoded.flac", "sub/two.decoded.flac"]
    for source, result in (("one.wav", "one"), ("sub/two.flac", "sub/two"), ("sub/three.mp3", "sub/three")):
        original, rate = load_audio(folder / source)
        decoded, decoded_rate = load_audio(back / f"{result}.decoded.flac")
        assert decoded.shape == original.shape and decoded_rate == rate
    captured = capsys.readouterr()
    assert "3 done, 0 kept, 0 failed" in captured.out and "error" not in captured.err


def test_single_files_beside_the_input_or_where_told(folder: Path, tmp_path: Path, model: str) -> None:
    source = folder / "one.wav"
    assert main(["encode", str(source), "--model", model]) == 0
    assert main(["decode", str(folder / "one.tokens.safetensors"), "--model", model]) == 0
    assert {"one.wav", "one.tokens.safetensors", "one.decoded.wav"} <= set(names(folder))
    assert main(["encode", str(source), "-o", str(tmp_path / "x.safetensors"), "--model", model]) == 0
    assert main(["decode", str(tmp_path / "x.safetensors"), "-o", str(tmp_path / "y.mp3"), "--model", model]) == 0
    assert load_audio(tmp_path / "y.mp3")[0].shape == (1, 9000)


def test_reconstruct_writes_audio_picture_and_figures(
    folder: Path, tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    save_audio(folder / "silence.wav", np.zeros((1, 4000)), 16000)  # no error, but most metrics are not defined
    out = tmp_path / "out"
    assert main(["reconstruct", str(folder), "-o", str(out), "--model", model]) == 0
    stems = ["one", "silence", "sub/three", "sub/two"]
    expected = [f"{stem}.reconstructed.{kind}" for stem in stems for kind in ("wav", "png")]
    assert names(out) == sorted([*expected, "metrics.json", "metrics.csv"])
    assert (out / "one.reconstructed.png").read_bytes().startswith(b"\x89PNG")
    rows = {Path(row["file"]).stem: row for row in json.loads((out / "metrics.json").read_text())["files"]}
    original, decoded = load_audio(folder / "one.wav")[0][0], load_audio(out / "one.reconstructed.wav")[0][0]
    assert rows["one"]["mel_distance"] == pytest.approx(metrics.mel_distance(original, decoded), abs=1e-4)
    assert rows["one"]["si_sdr"] == pytest.approx(metrics.si_sdr(original, decoded), abs=1e-3)
    assert rows["silence"]["si_sdr"] is None and "silence" in rows["silence"]["missing"]["si_sdr"]
    with (out / "metrics.csv").open() as file:
        assert {row["file"]: row["si_sdr"] for row in csv.DictReader(file)}[str(folder / "silence.wav")] == ""
    assert "mel distance" in capsys.readouterr().out
    # A second run keeps what is there; a killed one, of which one output is missing, makes only that.
    made = (out / "one.reconstructed.wav").stat().st_mtime_ns
    (out / "sub" / "two.reconstructed.wav").unlink()
    assert main(["reconstruct", str(folder), "-o", str(out), "--model", model]) == 0
    assert "1 done, 3 kept, 0 failed" in capsys.readouterr().out
    assert (out / "one.reconstructed.wav").stat().st_mtime_ns == made
    assert len(json.loads((out / "metrics.json").read_text())["files"]) == 4


def test_reconstruct_without_optional_packages(
    folder: Path, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("matplotlib.figure", "pesq", "pystoi"):
        monkeypatch.setitem(sys.modules, package, None)
    assert main(["reconstruct", str(folder / "one.wav"), "-o", str(tmp_path / "r.wav"), "--model", model]) == 0
    assert names(tmp_path / "in").count("one.wav") == 1 and not (tmp_path / "r.png").exists()
    (row,) = json.loads((tmp_path / "metrics.json").read_text())["files"]
    assert row["pesq_wb"] is None and "dasheng-tokenizer[metrics]" in row["missing"]["pesq_wb"]
    assert row["mel_distance"] > 0
    assert "dasheng-tokenizer[report]" in capsys.readouterr().err


def test_existing_outputs_are_kept_unless_told(folder: Path, tmp_path: Path, model: str, capsys) -> None:
    out = tmp_path / "one.tokens.safetensors"
    out.write_text("precious")
    assert main(["encode", str(folder / "one.wav"), "-o", str(tmp_path), "--model", model]) == 0
    assert out.read_text() == "precious" and "kept" in capsys.readouterr().out
    assert main(["encode", str(folder / "one.wav"), "-o", str(tmp_path), "--model", model, "--overwrite"]) == 0
    assert AudioTokens.load(out).num_samples == 9000


def test_inputs_that_differ_in_their_suffix_get_outputs_of_their_own(folder: Path, tmp_path: Path, model: str) -> None:
    save_audio(folder / "one.flac", tone(5000), 16000)
    assert main(["encode", str(folder), "-o", str(tmp_path / "out"), "--model", model]) == 0
    assert AudioTokens.load(tmp_path / "out" / "one.flac.tokens.safetensors").num_samples == 5000
    assert AudioTokens.load(tmp_path / "out" / "one.wav.tokens.safetensors").num_samples == 9000


def test_plans_never_share_an_output(tmp_path: Path) -> None:
    for path in ("a/x.wav", "b/x.wav", "c/b/y.wav", "out/x.wav"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()

    def targets(*inputs: str, out: Path | None) -> tuple[list[str], int]:
        work = plan([tmp_path / one for one in inputs], out, is_audio, "audio files", ".t", (".wav",))
        return sorted(str(job.target.relative_to(tmp_path)) for job in work.jobs), len(work.failures)

    out = tmp_path / "out"
    assert targets("a", out=out) == (["out/x.t"], 0)
    assert targets("a", "a/x.wav", out=out) == (["out/x.t"], 0)  # named twice, done once
    assert targets("a", "b", out=out) == (["out/a/x.t", "out/b/x.t"], 0)
    assert targets("b", "c/b", out=out) == (["out/b/x.t", "out/b/y.t"], 0)
    assert targets("a/x.wav", "b/x.wav", out=out) == (["out/x.wav.t"], 1)  # the second is refused
    assert targets("a", "b", out=None) == (["a/x.t", "b/x.t"], 0)
    assert targets("", out=out) == (["out/a/x.t", "out/b/x.t", "out/c/b/y.t"], 0)  # outputs are no inputs
    same = plan([tmp_path / "a" / "x.wav"], tmp_path / "a" / "x.wav", is_audio, "audio", ".wav", (".wav",))
    assert not same.jobs and "one of the inputs" in same.failures[0][1]


# ---------------------------------------------------------------------- bad inputs: named, the rest done, exit code 1


def test_every_bad_file_is_named_and_the_rest_done(
    folder: Path, tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "empty.wav").touch()
    (folder / "text.wav").write_text("this is no audio\n" * 40)
    soundfile.write(folder / "zero.wav", np.zeros((0, 1)), 16000)
    soundfile.write(folder / "nan.wav", np.full((4000, 1), np.nan), 16000, subtype="FLOAT")
    soundfile.write(folder / "slow.wav", np.zeros((4000, 1)), 4000)
    save_audio(folder / "cut.mp3", tone(50_000), 44100)
    (folder / "cut.mp3").write_bytes((folder / "cut.mp3").read_bytes()[:4000])
    arguments = [str(folder), str(folder / "missing.wav"), "-o", str(tmp_path / "out"), "--model", model]
    assert main(["encode", *arguments]) == 1
    captured = capsys.readouterr()
    for name, why in (
        ("empty.wav", "empty"),
        ("text.wav", "not audio"),
        ("zero.wav", "no samples"),
        ("nan.wav", "NaN"),
        ("slow.wav", "4000 Hz"),
        ("cut.mp3", "truncated"),
        ("missing.wav", "does not exist"),
    ):
        lines = [line for line in captured.err.splitlines() if line.startswith(f"error: {folder / name}")]
        assert len(lines) == 1 and why in lines[0], captured.err
    assert "Traceback" not in captured.err and "3 done, 0 kept, 7 failed" in captured.out
    assert names(tmp_path / "out") == [f"{stem}.tokens.safetensors" for stem in ("one", "sub/three", "sub/two")]


def test_bad_tokens_are_named_and_foreign_ones_need_force(
    folder: Path, tmp_path: Path, model: str, other_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["encode", str(folder / "one.wav"), "-o", str(out), "--model", model]) == 0
    whole = (out / "one.tokens.safetensors").read_bytes()
    (out / "cut.tokens.safetensors").write_bytes(whole[:-10])
    assert main(["decode", str(out), "--model", other_model]) == 1
    errors = capsys.readouterr().err
    assert "cut.tokens.safetensors" in errors and "tiny" in errors and "other" in errors
    assert names(out) == ["cut.tokens.safetensors", "one.tokens.safetensors"]
    assert main(["decode", str(out), "--model", other_model, "--force"]) == 1
    assert names(out) == ["cut.tokens.safetensors", "one.decoded.wav", "one.tokens.safetensors"]


def test_a_folder_without_audio_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("encode", "decode", "reconstruct"):
        assert main([command, str(tmp_path)]) == 1
        assert f"error: {tmp_path}: no " in capsys.readouterr().err


def test_unknown_models_are_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("no-such-model", str(tmp_path / "nowhere"), str(folder)):
        assert main(["encode", str(folder), "-o", str(tmp_path / "out"), "--model", name]) == 1
        errors = capsys.readouterr().err
        assert errors.startswith("error: ") and name in errors and "Traceback" not in errors
        assert main(["info", name]) == 1
    assert not (tmp_path / "out").exists()


def test_unwritable_outputs_are_named(folder: Path, tmp_path: Path, model: str, capsys) -> None:
    (tmp_path / "file").write_text("in the way")
    assert main(["encode", str(folder / "one.wav"), "-o", str(tmp_path / "file" / "sub"), "--model", model]) == 1
    assert "folder" in capsys.readouterr().err
    assert main(["encode", str(folder), "-o", "/proc/out", "--model", model]) == 1
    assert "cannot write /proc/out" in capsys.readouterr().err


def test_a_full_disk_is_named_and_nothing_remains(
    folder: Path, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    for command in ("encode", "reconstruct"):
        out = tmp_path / command
        assert main([command, str(folder), "-o", str(out), "--model", model]) == 1
        assert capsys.readouterr().err.count("the disk is full") == 3
        assert names(out) == []


@pytest.mark.parametrize("command", ["encode", "decode", "reconstruct"])
def test_ctrl_c_leaves_nothing_half_written_and_the_run_goes_on(
    folder: Path, tmp_path: Path, model: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if command == "decode":
        assert main(["encode", str(folder), "-o", str(tmp_path / "tokens"), "--model", model]) == 0
    source = tmp_path / "tokens" if command == "decode" else folder
    out = tmp_path / "out"
    arguments = [command, str(source), "-o", str(out), "--model", model]
    interrupted = _interrupt_at_second_file(monkeypatch, command)
    assert main(arguments) == 130 and interrupted
    written = names(out)
    assert len([name for name in written if name.endswith((".wav", ".safetensors"))]) == 1
    assert not [name for name in written if "partial" in name]
    monkeypatch.undo()
    assert main(arguments) == 0
    assert len([name for name in names(out) if name.endswith((".wav", ".safetensors"))]) == 3


def _interrupt_at_second_file(monkeypatch: pytest.MonkeyPatch, command: str) -> list[int]:
    """Let the process be told to stop (SIGTERM) in the middle of the second output."""
    import signal

    from dasheng_tokenizer import audio_writer, token_file

    calls: list[int] = []

    def stop() -> None:
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)

    if command == "encode":
        replace = token_file.os.replace
        monkeypatch.setattr(token_file.os, "replace", lambda *paths: (stop(), replace(*paths)))
    else:
        write = audio_writer.AudioWriter.write
        monkeypatch.setattr(audio_writer.AudioWriter, "write", lambda self, block: (write(self, block), stop()))
    return calls


def test_a_fault_of_the_program_does_not_stop_the_other_files(
    folder: Path, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dasheng_tokenizer import chunking

    encode_file = chunking.encode_file

    def broken(model: object, path: Path, *others: object) -> object:
        if path.name == "one.wav":
            raise MemoryError("too much")
        return encode_file(model, path, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(chunking, "encode_file", broken)
    assert main(["encode", str(folder), "-o", str(tmp_path / "out"), "--model", model]) == 1
    captured = capsys.readouterr()
    assert "Traceback" in captured.err and "one.wav: MemoryError: too much" in captured.err
    assert "2 done, 0 kept, 1 failed" in captured.out


# ---------------------------------------------------------------------- usage, info, train


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["encode"],
        ["unknown"],
        ["encode", "a.wav", "--dtype", "int8"],
        ["encode", "a.wav", "b.wav", "-o", "c.safetensors"],
        ["train"],
        ["train", "--config", "x.yaml", "not a setting"],
        ["reconstruct", "a.wav", "--format", "mp3"],
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "error" in capsys.readouterr().err


def test_an_unknown_device_is_wrong_usage(folder: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["encode", str(folder), "--model", model, "--device", "nonsense"]) == 2
    assert "device 'nonsense'" in capsys.readouterr().err


def test_help_and_info(folder: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0 and "reconstruct" in capsys.readouterr().out
    assert main(["info", model]) == 0
    out = capsys.readouterr().out
    assert "weights hash" in out and tiny().weights_hash() in out and "32 wide" in out and "dasheng" in out
    assert main(["encode", str(folder / "one.wav"), "--model", model]) == 0
    assert main(["info", str(folder / "one.tokens.safetensors")]) == 0
    out = capsys.readouterr().out
    assert "9000 samples at 16000 Hz" in out and "15 per channel" in out and "float32" in out


def test_train_hands_over_recipe_and_settings(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    import dasheng_tokenizer.training as training

    calls: list[object] = []
    monkeypatch.setattr(training, "train", lambda *arguments: calls.append(arguments))
    assert main(["train", "--config", "r.yaml", "steps=5", "data.batch_size=2"]) == 0
    assert calls == [(Path("r.yaml"), ["steps=5", "data.batch_size=2"])]

    def refuse(*_: object) -> None:
        raise ConfigurationError("no such key")

    monkeypatch.setattr(training, "train", refuse)
    assert main(["train", "--config", "r.yaml"]) == 2 and "no such key" in capsys.readouterr().err


def test_half_precision_runs(folder: Path, tmp_path: Path, model: str) -> None:
    assert main(["encode", str(folder / "one.wav"), "-o", str(tmp_path), "--model", model, "--dtype", "bfloat16"]) == 0
    assert AudioTokens.load(tmp_path / "one.tokens.safetensors").dtype == torch.bfloat16
