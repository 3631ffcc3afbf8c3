"""X-ARES: its tasks from tars in the original layout, our encoder for it, and the original on synthetic tasks."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from conftest import tiny
from dasheng_tokenizer.errors import ConfigurationError, DataError
from dasheng_tokenizer.evaluation import xares_encoder
from dasheng_tokenizer.evaluation.probe_tasks import Event
from dasheng_tokenizer.evaluation.xares_data import XaresData, tar_samples
from dasheng_tokenizer.evaluation.xares_launcher import install_torchaudio_stand_in, launch
from dasheng_tokenizer.evaluation.xares_tasks import XARES_ROWS, available
from dasheng_tokenizer.training.clips import SkipReport

ROWS = {row.task.name: row for row in XARES_ROWS}

RATE = 16_000


def tone(seconds: float, hertz: float = 440.0, rate: int = RATE, seed: int = 0) -> np.ndarray:
    """(samples,) a tone in a little noise."""
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).standard_normal(len(time))
    return (0.3 * np.sin(2 * np.pi * hertz * time) + 0.02 * noise).astype(np.float32)


def encoded(audio: np.ndarray, suffix: str = "flac", rate: int = RATE) -> bytes:
    """(samples,) or (samples, channels) as the bytes of an audio file."""
    held = io.BytesIO()
    soundfile.write(held, audio, rate, format=suffix.upper())
    return held.getvalue()


def write_tar(path: Path, samples: Iterable[tuple[str, dict[str, Any]]]) -> None:
    """Members `key.suffix`; what is not bytes is written as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for key, members in samples:
            for suffix, value in members.items():
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def write_task(folder: Path, name: str, label: Any, clips: int = 2, seconds: float = 0.2) -> None:
    """All shards of a task, `clips` of them in each, all with this label."""
    for split, pattern in ROWS[name].shards.items():
        samples = [(f"{split}-{i}", {"flac": encoded(tone(seconds, seed=i)), "json": label}) for i in range(clips)]
        write_tar(folder / name / pattern.replace("*", "0000000"), samples)


def read(name: str, folder: Path, split: str | None = None) -> tuple[list[Any], dict[str, str]]:
    """Examples of a split, of the first one where none is named, and what was left out."""
    data, skipped = XaresData(ROWS[name], folder), dict[str, str]()
    return list(data.examples(split or next(iter(ROWS[name].shards)), skipped)), skipped


# ---------------------------------------------------------------------------------------------------- rows


def test_rows_are_the_22_public_tasks() -> None:
    assert len(ROWS) == 22
    assert {row.task.domain for row in XARES_ROWS} == {"speech", "sound", "music"}
    assert {row.task.head for row in XARES_ROWS} == {"clip", "multilabel", "frame", "retrieval", "asr"}
    folded = {"libricount", "ravdess", "vocalimitations", "esc50", "urbansound8k", "gtzan_genre"}
    assert {row.task.name for row in XARES_ROWS if row.folded} == folded
    assert {row.task.name for row in XARES_ROWS if row.selects_on_test} == folded | {
        "desed", "fsdkaggle2018", "voxlingua33",
    }  # fmt: skip
    for row in XARES_ROWS:
        assert row.num_classes == len(row.task.classes) or not row.task.classes
        assert len(set(row.task.classes)) == len(row.task.classes)


@pytest.mark.parametrize(
    ("name", "stored", "label"),
    [
        ("esc50", {"label": 7}, "7"),
        ("speechcommandsv1", {"labels": "marvin"}, "marvin"),
        ("fsd50k", {"soundevent": "Bark;Dog"}, ("Bark", "Dog")),
        (
            "desed",
            [
                {"onset": 0.1, "offset": 0.5, "label": "Dog"},
                {"onset": 0, "offset": 10, "label": "Cat,Speech"},
            ],
            (Event(0.1, 0.5, "Dog"), Event(0.0, 10.0, "Cat"), Event(0.0, 10.0, "Speech")),
        ),
        ("desed", [], ()),
        ("maestro", [{"start": 0.5, "end": 1.25, "note": 60}], (Event(0.5, 1.25, "60"),)),
        ("clotho", {f"caption_{i}": f"text {i}" for i in range(5)}, tuple(f"text {i}" for i in range(5))),
        ("librispeech", {"trans": "HELLO THERE", "gender": "F"}, "HELLO THERE"),
        ("librispeechmalefemale", {"trans": "HELLO THERE", "gender": "F"}, "F"),
    ],
)
def test_every_kind_of_label_is_read(tmp_path: Path, name: str, stored: Any, label: Any) -> None:
    write_task(tmp_path / "env", name, stored)
    examples, skipped = read(name, tmp_path)
    assert [example.label for example in examples] == [label, label]
    assert not skipped


def test_audio_is_mono_at_16_khz_whatever_the_format(tmp_path: Path) -> None:
    audio = tone(0.5, rate=24_000)
    stereo = np.stack([audio, -0.5 * audio], 1)
    write_tar(
        tmp_path / "vocalsound" / "train0.tar",
        [
            (suffix, {suffix: encoded(stereo, suffix, 24_000), "json": {"label": "cough"}})
            for suffix in ("wav", "flac", "ogg", "mp3")
        ],
    )
    for split in ("valid", "test"):
        write_tar(tmp_path / "vocalsound" / f"{split}0.tar", [])
    examples, skipped = read("vocalsound", tmp_path)
    assert not skipped and len(examples) == 4
    assert [example.key for example in examples] == [f"train0/{suffix}" for suffix in ("wav", "flac", "ogg", "mp3")]
    for example in examples:
        assert example.audio.dtype == np.float32 and example.audio.shape == (8000,)
        assert 0.5 < np.abs(example.audio).max() / (0.25 * 0.3) < 1.5


def test_crops_are_full_and_short_clips_are_extended(tmp_path: Path) -> None:
    clips = [tone(seconds, seed=i) for i, seconds in enumerate((12.5, 5.0, 1.0))]
    for split in ("train-clean-100", "dev-clean", "test-clean"):
        write_tar(
            tmp_path / "librispeechmalefemale" / f"{split}-0.tar",
            [(str(i), {"wav": encoded(clip, "wav"), "json": {"gender": "M"}}) for i, clip in enumerate(clips)],
        )
    examples, skipped = read("librispeechmalefemale", tmp_path)
    assert not skipped
    assert [len(example.audio) for example in examples] == [5 * RATE] * 4
    assert len({example.key for example in examples}) == 4
    np.testing.assert_allclose(np.concatenate([e.audio for e in examples[:2]]), clips[0][: 10 * RATE], atol=1e-4)
    np.testing.assert_allclose(examples[3].audio, np.pad(clips[2], (0, 4 * RATE)), atol=1e-4)


# ---------------------------------------------------------------------------------------------------- folds


@pytest.mark.parametrize("xares_protocol", [False, True])
@pytest.mark.parametrize("name", sorted(ROWS))
def test_folds_never_train_on_what_they_choose_or_test_on(tmp_path: Path, name: str, xares_protocol: bool) -> None:
    write_task(tmp_path, name, None)
    row = ROWS[name]
    folds = XaresData(row, tmp_path, xares_protocol).folds
    assert len(folds) == (len(row.shards) if row.folded else 1)
    for fold in folds:
        assert not set(fold["train"]) & set(fold["valid"] + fold["test"])
        assert (fold["valid"] == fold["test"]) == (xares_protocol and row.selects_on_test)
    if row.folded:
        assert [fold["test"] for fold in folds] == [[split] for split in row.shards]
        others = len(row.shards) - (1 if xares_protocol else 2)
        assert all(len(fold["train"]) == others for fold in folds)


def test_held_out_clips_and_the_rest_are_the_whole_training_split(tmp_path: Path) -> None:
    write_task(tmp_path, "fsdkaggle2018", {"sound": "Bark"}, clips=60)
    data = XaresData(ROWS["fsdkaggle2018"], tmp_path)
    (fold,) = data.folds
    fit, held = (
        {example.key for split in fold[role] for example in data.examples(split)} for role in ("train", "valid")
    )
    assert not fit & held and len(fit | held) == 60
    assert 1 <= len(held) <= 15
    assert len({data.identity(split) for role in fold.values() for split in role}) == 3


def test_identity_follows_the_shards(tmp_path: Path) -> None:
    write_task(tmp_path / "a", "vocalsound", {"label": "cough"})
    write_task(tmp_path / "b", "vocalsound", {"label": "cough"})
    write_task(tmp_path / "c", "vocalsound", {"label": "cough"}, clips=3)
    a, b, c = (XaresData(ROWS["vocalsound"], tmp_path / name).identity("train") for name in "abc")
    assert a == b != c


# ---------------------------------------------------------------------------------------------------- damage


def test_missing_and_wrong_labels_are_counted_by_name(tmp_path: Path) -> None:
    good, audio = {"label": "cough"}, encoded(tone(0.2))
    samples = [
        ("good", {"flac": audio, "json": good}),
        ("none", {"flac": audio}),
        ("broken", {"flac": audio, "json": b"{"}),
        ("other-field", {"flac": audio, "json": {"labels": "cough"}}),
        ("null", {"flac": audio, "json": {"label": None}}),
        ("list", {"flac": audio, "json": ["cough"]}),
        ("unknown", {"flac": audio, "json": {"label": "music"}}),
        ("no-audio", {"json": good}),
        ("not-audio", {"flac": b"x" * 600, "json": good}),
        ("empty", {"flac": b"", "json": good}),
        ("last", {"json": good, "flac": audio}),
    ]
    for split in ("train", "valid", "test"):
        write_tar(tmp_path / "vocalsound" / f"{split}.tar", samples)
    examples, skipped = read("vocalsound", tmp_path)
    assert [example.key for example in examples] == ["train/good", "train/last"]
    assert set(skipped) == {f"train/{key}" for key, _ in samples[1:-1]}
    assert "no JSON" in skipped["train/none"] and "music" in skipped["train/unknown"]


@pytest.mark.parametrize("events", [{"onset": 0}, [{"onset": 0}], [{"onset": 2, "offset": 1, "label": "Dog"}]])
def test_wrong_events_are_counted(tmp_path: Path, events: Any) -> None:
    write_task(tmp_path, "desed", events)
    examples, skipped = [], dict[str, str]()
    data = XaresData(ROWS["desed"], tmp_path)
    examples = list(data.examples("wds-audio-eval", skipped))
    assert not examples and len(skipped) == 2


def test_every_cut_of_a_shard_is_noted(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    write_tar(path, [(f"clip{i}", {"wav": bytes([i]) * 700, "json": {"label": i}}) for i in range(3)])
    whole = path.read_bytes()
    report = SkipReport()
    assert len(list(tar_samples(path, report))) == 3 and not report
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512  # of the last member
    for size in [0, 100, 512, 700, 1536, 2000, 2048, 2560, 3072, 4000, end - 100, end, end + 512]:
        path.write_bytes(whole[:size])
        report = SkipReport()
        found = list(tar_samples(path, report))
        assert len(found) <= 3
        assert set(report.skipped) == {"shard.tar"}, size


def test_a_damaged_header_in_the_middle_is_noted(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    write_tar(path, [(f"clip{i}", {"wav": b"x" * 700, "json": {"label": i}}) for i in range(3)])
    whole = bytearray(path.read_bytes())
    sample = 512 + 1024 + 512 + 512
    for damage in (b"\xff" * 512, b"\0" * 512):
        path.write_bytes(whole[:sample] + damage + whole[sample + 512 :])
        with tarfile.open(path) as archive:
            assert len(archive.getmembers()) == 2  # the usual reader ends here without a word
        report = SkipReport()
        assert [key for key, _ in tar_samples(path, report)] == ["clip0"]
        assert "damaged" in report.skipped["shard.tar"]


def test_missing_data_is_named_with_its_source(tmp_path: Path) -> None:
    write_task(tmp_path, "vocalsound", {"label": "cough"})
    write_task(tmp_path, "esc50", {"label": 1})
    (tmp_path / "esc50" / "wds-audio-fold-3-0000000.tar").unlink()
    present, missing = available(tmp_path)
    assert [row.task.name for row in present] == ["vocalsound"]
    assert len(missing) == 21
    assert "zenodo.org/records/14614287" in missing["esc50"] and "wds-audio-fold-3-*.tar" in missing["esc50"]
    assert all(ROWS[name].source in reason for name, reason in missing.items())
    with pytest.raises(DataError, match=r"zenodo\.org/records/14856454"):
        XaresData(ROWS["clotho"], tmp_path)


def test_both_librispeech_tasks_read_one_folder(tmp_path: Path) -> None:
    write_task(tmp_path, "librispeech", {"trans": "A", "gender": "M"}, seconds=5.0)
    present, _ = available(tmp_path)
    assert {row.task.name for row in present} == {"librispeech", "librispeechmalefemale"}


# ---------------------------------------------------------------------------------------------------- encoder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny().save_pretrained(folder)
    return folder


def test_encoder_keeps_the_contract(saved: Path) -> None:
    names = [name for name in dir(xares_encoder) if name.endswith("Encoder")]
    assert names == ["DashengTokenizerEncoder"]
    audio = torch.randn(2, 50_000, generator=torch.Generator().manual_seed(0))
    model = tiny()
    expected = model(audio)
    for name in ("unified", "semantic", "acoustic"):
        encoder = xares_encoder.DashengTokenizerEncoder(saved, name)
        assert isinstance(encoder, torch.nn.Module) and type(encoder).__name__.endswith("Encoder")
        assert (encoder.sampling_rate, encoder.hop_size_in_ms, encoder.output_dim) == (16_000, 40, 32)
        found = encoder(audio)
        assert found.shape == (2, 79, 32) and not found.requires_grad
        torch.testing.assert_close(found, getattr(expected, name), atol=1e-4, rtol=1e-4)


def test_encoder_takes_ten_minutes(saved: Path) -> None:
    encoder = xares_encoder.DashengTokenizerEncoder(saved)
    assert encoder(torch.zeros(1, 600 * RATE)).shape == (1, 15_000, 32)


def test_encoder_class_names_tell_models_and_representations_apart(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tiny()
    with torch.no_grad():
        other.encoder.norm.bias.add_(1.0)
    other.save_pretrained(tmp_path)
    names = []
    for folder in (saved, tmp_path):
        for name in ("unified", "semantic", "acoustic"):
            monkeypatch.setenv(xares_encoder.MODEL_VARIABLE, str(folder))
            monkeypatch.setenv(xares_encoder.REPRESENTATION_VARIABLE, name)
            names.append(type(xares_encoder.DashengTokenizerEncoder()).__name__)
    assert len(set(names)) == 6
    assert type(xares_encoder.DashengTokenizerEncoder(saved, "unified")).__name__ == names[0]
    monkeypatch.setenv(xares_encoder.REPRESENTATION_VARIABLE, "discrete")
    with pytest.raises(ConfigurationError, match="unified, semantic, acoustic"):
        xares_encoder.DashengTokenizerEncoder()


# ---------------------------------------------------------------------------------------------------- the original

XARES_PACKAGES = ("xares", "loguru", "ignite", "pandas", "jiwer", "sklearn")

PITCHES = {48: 131.0, 60: 262.0, 72: 523.0, 84: 1047.0, 96: 2093.0}
"""Notes of the frame task and their frequencies in Hz."""


def write_synthetic_tasks(folder: Path) -> None:
    """VocalSound (clip) with a tone for each class, MAESTRO (frame) with a tone for each note; `folder/env`."""
    labels = ROWS["vocalsound"].task.classes
    for split, clips in (("train", 300), ("valid", 60), ("test", 120)):
        samples = []
        for i in range(clips):
            audio = tone(0.3, 200.0 * 2 ** (i % 6), seed=i + 1000 * len(split))
            samples.append((f"{split}{i}", {"flac": encoded(audio), "json": {"label": labels[i % 6]}}))
        write_tar(folder / "env" / "vocalsound" / f"{split}_0000000.tar", samples)
    rng = np.random.default_rng(0)
    for split, clips in (("train", 16), ("valid", 6), ("test", 8)):
        samples = []
        for i in range(clips):
            notes = rng.permutation(list(PITCHES)).tolist()  # one after the other, half a second each
            audio = np.concatenate([tone(0.5, PITCHES[note], seed=i) for note in notes])
            events = [{"start": n / 2, "end": n / 2 + 0.5, "note": note} for n, note in enumerate(notes)]
            samples.append((f"{split}{i}", {"flac": encoded(audio), "json": events}))
        write_tar(folder / "env" / "maestro" / f"maestro_{split}_0000000.tar", samples)
    for name in ("vocalsound", "maestro"):
        (folder / "env" / name / ".audio_tar_ready").touch()


def original_scores(folder: Path, model: Path, representation: str = "unified") -> dict[str, float]:
    """Scores that the original package gives, by task: `vocalsound`, `vocalsound knn` and `maestro`.

    Its embeddings stay in `folder/env/NAME/embeddings/CLASS/wds-encoded-SPLIT*.tar`.

    Args:
        folder: that `write_synthetic_tasks` has filled.
        model: folder of a tokenizer.
        representation: of the tokenizer.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        xares_encoder.MODEL_VARIABLE: str(model),
        xares_encoder.REPRESENTATION_VARIABLE: representation,
    }
    command = [sys.executable, "-m", "dasheng_tokenizer.evaluation.xares_launcher", "default"]
    command += ["tasks/vocalsound_task.py", "tasks/maestro_task.py"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    name = type(xares_encoder.DashengTokenizerEncoder(model, representation)).__name__
    files = {"vocalsound": "mlp", "vocalsound knn": "knn", "maestro": "mlp"}
    return {
        task: float(
            (folder / "env" / task.split()[0] / "checkpoints" / name / f"{kind}_score.txt").read_text().split()[0]
        )
        for task, kind in files.items()
    }


def original_embeddings(folder: Path, name: str, split: str) -> list[tuple[np.ndarray, Any]]:
    """What the original embedded of a split: (T, D) features with the clip's JSON, in the order of the shards."""
    found = []
    for path in sorted((folder / "env" / name / "embeddings").glob(f"*/wds-encoded-{split}*.tar")):
        for _, members in tar_samples(path, SkipReport()):  # it never closes them: the mark at their end is missing
            found.append((np.load(io.BytesIO(members["npy"])), json.loads(members["json"])))
    return found


@pytest.fixture(scope="module")
def original(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """Folder and scores of one run of the original."""
    for name in XARES_PACKAGES:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs the package {name}; see dasheng_tokenizer/evaluation/xares_launcher.py")
    folder = tmp_path_factory.mktemp("xares")
    write_synthetic_tasks(folder)
    return folder, original_scores(folder, saved)


@pytest.mark.slow
def test_the_original_runs_on_our_encoder(original: tuple[Path, dict[str, float]]) -> None:
    folder, scores = original
    assert scores["vocalsound"] > 0.5, scores  # chance: 1/6
    assert scores["vocalsound knn"] > 0.5
    assert scores["maestro"] > 0.4  # five of 87 notes occur, one at a time


@pytest.mark.slow
def test_the_original_and_we_read_the_same(original: tuple[Path, dict[str, float]], saved: Path) -> None:
    folder, _ = original
    encoder = xares_encoder.DashengTokenizerEncoder(saved)
    for name, splits in (("vocalsound", ("train", "valid", "test")), ("maestro", ("maestro_valid", "maestro_test"))):
        data, field = XaresData(ROWS[name], folder), ROWS[name].fields[-1]
        for split in splits:
            examples, stored = list(data.examples(split)), original_embeddings(folder, name, split)
            assert len(examples) == len(stored) > 0
            for example, (features, held) in list(zip(examples, stored, strict=True))[::20]:
                mine = encoder(torch.from_numpy(example.audio)[None])[0].numpy()
                np.testing.assert_allclose(features, mine, atol=1e-4)
                if name == "maestro":
                    assert [event.label for event in example.label] == [str(item[field]) for item in held]
                else:
                    assert example.label == held[field]


@pytest.mark.slow
def test_an_error_that_the_original_only_logs_is_an_exit_code(
    original: tuple[Path, dict[str, float]], saved: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "dasheng_tokenizer.evaluation.xares_launcher", "default", "tasks/esc50*_task.py"]
    nowhere = {name: "http://127.0.0.1:9" for name in ("HTTPS_PROXY", "https_proxy")}  # so that it cannot download
    environment = {**os.environ, **nowhere, xares_encoder.MODEL_VARIABLE: str(saved), "NO_PROXY": "", "no_proxy": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr  # the original itself ended as if all were well
    assert not list((tmp_path / "env").rglob("*.tar"))
    done = subprocess.run([*command, "--max-jobs", "2"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == (2 if importlib.util.find_spec("torchaudio") is None else 1)


def test_the_launcher_names_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match="encoder file"):
        launch(["default"])
    with pytest.raises(ConfigurationError, match="matches no task"):
        launch(["default", "nothing/*_here.py"])
    with pytest.raises(ConfigurationError, match="does not exist"):
        launch([str(tmp_path / "none.py"), "tasks/esc50_task.py"])


@pytest.mark.skipif(importlib.util.find_spec("torchaudio") is not None, reason="torchaudio is installed")
def test_the_stand_in_loads_and_resamples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchaudio", "torchaudio.functional"):
        monkeypatch.setitem(sys.modules, name, None)  # restored after the test
        monkeypatch.delitem(sys.modules, name)
    assert install_torchaudio_stand_in() and not install_torchaudio_stand_in()
    import torchaudio

    stereo = np.stack([tone(0.5, rate=8000), tone(0.5, 880, rate=8000)], 1)
    (tmp_path / "a.flac").write_bytes(encoded(stereo, "flac", 8000))
    audio, rate = torchaudio.load(str(tmp_path / "a.flac"))
    assert rate == 8000 and audio.shape == (2, 4000) and audio.dtype == torch.float32
    resampled = torchaudio.functional.resample(audio, rate, 16_000)
    assert resampled.shape == (2, 8000)
    spectrum = torch.fft.rfft(resampled[1]).abs()
    assert int(spectrum.argmax()) == 440  # bins of 2 Hz: the tone stays at 880 Hz
