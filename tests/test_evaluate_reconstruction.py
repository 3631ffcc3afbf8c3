"""`evaluate reconstruction`: systems, pairs, tables, and everything that can go wrong with them."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import soundfile
import torch

from conftest import tiny
from dasheng_tokenizer.audio import load_audio, save_audio
from dasheng_tokenizer.cli import main
from dasheng_tokenizer.cli_evaluate import METRIC_NAMES
from dasheng_tokenizer.errors import CheckpointError, ConfigurationError, DataError, MissingExtraError
from dasheng_tokenizer.evaluation import metric_columns, metrics
from dasheng_tokenizer.evaluation.codecs import GriffinLim, Opus, Original, Tokenizer, log_mel, parse_floor
from dasheng_tokenizer.evaluation.metric_columns import METRICS, Column, Metric, Pair, measure, require_metrics
from dasheng_tokenizer.evaluation.peers import Peer, parse_peer
from dasheng_tokenizer.evaluation.reconstruction import ROWS, RowStore, run
from dasheng_tokenizer.evaluation.reconstruction_inputs import (
    ClipInputs,
    DecodedClip,
    FilePair,
    Opened,
    PairInputs,
    Source,
    System,
    Task,
)
from dasheng_tokenizer.evaluation.reconstruction_tables import Tables, mean_of

CLIPS = Path(metrics.__file__).parents[1] / "embedded" / "clips"
MAKE_RESULTS = Path(__file__).resolve().parents[1] / "docs" / "make_results.py"


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    """One and a half seconds of real speech at 16 kHz."""
    audio, rate = load_audio(CLIPS / "speech.flac")
    assert rate == 16000
    return audio[0, 16000:40000].copy()


def noisy(audio: np.ndarray, level: float = 0.01) -> np.ndarray:
    return audio + (level * np.random.default_rng(0).standard_normal(audio.shape)).astype(np.float32)


def write(path: Path, audio: np.ndarray, rate: int = 16000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, audio.T, rate, subtype="FLOAT")
    return path


def evaluate(*arguments: object) -> int:
    return main(["evaluate", "reconstruction", *map(str, arguments)])


# ---------------------------------------------------------------- figures and where they are missing


def test_each_metric_is_offered_by_the_command() -> None:
    assert tuple(METRICS) == METRIC_NAMES


def test_figures_of_speech_are_for_speech_alone(speech: np.ndarray) -> None:
    chosen = [METRICS["stoi"], METRICS["mel"]]
    values, missing = measure(Pair(speech, speech, 16000), "speech", chosen)
    assert values == {"stoi": pytest.approx(1), "mel_distance": 0} and not missing
    values, missing = measure(Pair(speech, speech, 16000), "music", chosen)
    assert values == {"stoi": None, "mel_distance": 0} and not missing  # not applicable is not missing


def test_silence_has_missing_values_with_reasons(speech: np.ndarray) -> None:
    chosen = [METRICS[name] for name in ("pesq_wb", "pesq_nb", "stoi", "estoi", "si_sdr", "mel", "lsd")]
    for pair in (Pair(0 * speech, speech, 16000), Pair(speech, 0 * speech, 16000), Pair(0 * speech, 0 * speech, 16000)):
        values, missing = measure(pair, "speech", chosen)
        assert {name for name, value in values.items() if value is None} == set(missing)
        assert set(missing) == {"pesq_wb", "pesq_nb", "stoi", "estoi", "si_sdr"}
        assert all("silence" in reason for reason in missing.values())


def test_a_library_that_fails_costs_one_figure(speech: np.ndarray) -> None:
    def broken(pair: Pair) -> float:
        return 1 / 0

    columns = (
        Column("broken", "", broken),
        Column("nan", "", lambda pair: float("nan")),
        Column("one", "", lambda pair: 1),
    )
    values, missing = measure(Pair(speech, speech, 16000), "speech", [Metric("test", columns, "")])
    assert values == {"broken": None, "nan": None, "one": 1}
    assert missing == {"broken": "ZeroDivisionError: division by zero", "nan": "the library gave no finite number"}


def test_metrics_measure_at_16_khz_whatever_the_rate(speech: np.ndarray) -> None:
    from dasheng_tokenizer.audio import resample

    other = noisy(speech)
    high = Pair(resample(speech, 16000, 48000), resample(other, 16000, 48000), 48000)
    chosen = [METRICS["mel"], METRICS["pesq_wb"]]
    at_48, _ = measure(high, "speech", chosen)
    at_16, _ = measure(Pair(speech, other, 16000), "speech", chosen)
    assert at_48["mel_distance"] == pytest.approx(at_16["mel_distance"], rel=0.05)
    assert at_48["pesq_wb"] == pytest.approx(at_16["pesq_wb"], rel=0.05)
    assert all(len(audio) == len(speech) for audio in high.at_16_khz)


def test_a_missing_package_is_named_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "librosa", None)
    with pytest.raises(MissingExtraError, match=r"librosa.*dasheng-tokenizer\[evaluate\]"):
        require_metrics(["mel", "f0"])
    monkeypatch.setitem(sys.modules, "resemblyzer", None)
    with pytest.raises(MissingExtraError, match="--no-deps resemblyzer"):
        require_metrics(["speaker_similarity"])


# ---------------------------------------------------------------- systems


def lag(reference: np.ndarray, estimate: np.ndarray) -> int:
    """Shift in samples at which both agree best."""
    size = 2 * len(reference)
    both = np.fft.irfft(np.fft.rfft(estimate, size) * np.fft.rfft(reference, size).conj())
    found = int(np.argmax(both))
    return found if found < len(reference) else found - size


def test_opus_keeps_length_and_alignment_and_its_rate_is_that_of_its_bytes(speech: np.ndarray) -> None:
    audio = np.tile(speech, 3)
    distances = []
    for kbits in (6, 12, 24):
        decoded = parse_floor(f"opus:{kbits}").reconstruct(audio)
        assert decoded.audio.shape == audio.shape and decoded.audio.dtype == np.float32
        assert abs(lag(audio, decoded.audio)) <= (1 if kbits == 6 else 0)  # 6 kbit/s are narrow-band: a broad maximum
        assert decoded.bits is not None and decoded.bits / len(audio) * 16 == pytest.approx(kbits, rel=0.25)
        distances.append(metrics.mel_distance(audio, decoded.audio))
    assert distances[0] > distances[1] > distances[2]
    for samples in (1, 319, 321, 16001):
        assert Opus(12).reconstruct(speech[:samples]).audio.shape == (samples,)
    packet = Opus(12).reconstruct(speech[:1]).bits
    assert packet is not None and 0 < packet / 8 < 40  # an Ogg Opus file has more than 100 bytes besides


def test_opus_does_not_clip_loud_clips(speech: np.ndarray) -> None:
    loud = speech * np.float32(4 / np.abs(speech).max())
    assert np.abs(Opus(64).reconstruct(loud).audio).max() > 3


def test_griffin_lim_is_of_the_acoustic_encoders_mel_and_seeded(speech: np.ndarray) -> None:
    pytest.importorskip("librosa")
    audio = speech[4000:12000]
    from dasheng_tokenizer.spectral import with_context

    front_end = tiny().encoder.front_end
    expected = front_end(with_context(torch.from_numpy(audio)[None], 13), 52)[0]
    np.testing.assert_allclose(log_mel(audio)[:, :48], expected[:, :48].numpy(), atol=1e-5)
    first, again = GriffinLim(8).reconstruct(audio).audio, GriffinLim(8).reconstruct(audio).audio
    assert np.array_equal(first, again) and first.shape == audio.shape
    few = metrics.mel_distance(audio, GriffinLim(1).reconstruct(audio).audio)
    assert metrics.mel_distance(audio, GriffinLim(32).reconstruct(audio).audio) < few
    assert GriffinLim(1).reconstruct(audio[:1]).audio.shape == (1,)


def test_our_tokenizer_is_the_model(speech: np.ndarray) -> None:
    model = tiny()
    with torch.inference_mode():
        expected = model(torch.from_numpy(speech)[None]).audio[0].numpy()
    codec = Tokenizer(model, "tiny")
    decoded = codec.reconstruct(speech)
    np.testing.assert_allclose(decoded.audio, expected, atol=1e-5)
    assert decoded.bits is None and codec.frame_rate == 25
    before = codec.identity()
    with torch.no_grad():
        next(model.parameters()).add_(1)
    assert codec.identity() != before


@pytest.mark.parametrize(
    ("text", "reason"), [("opus", "known"), ("opus:x", "number"), ("opus:5", "6"), ("mp3:1", "known")]
)
def test_unknown_floors_are_refused(text: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        parse_floor(text)


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny random codecs in the layout of save_pretrained."""
    from transformers import DacConfig, DacModel, EncodecConfig, EncodecModel, MimiConfig, MimiModel

    folder = tmp_path_factory.mktemp("peers")
    torch.manual_seed(0)
    encodec = EncodecConfig(num_filters=4, hidden_size=16, codebook_size=16, target_bandwidths=[0.6, 1.2])
    dac = DacConfig(encoder_hidden_size=4, decoder_hidden_size=32, n_codebooks=3, codebook_size=16, codebook_dim=4)
    mimi = MimiConfig(
        hidden_size=16,
        num_filters=4,
        codebook_size=16,
        codebook_dim=8,
        vector_quantization_hidden_dimension=8,
        num_quantizers=4,
        num_hidden_layers=1,
        intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        upsample_groups=16,
    )
    for name, model in (("encodec", EncodecModel(encodec)), ("dac", DacModel(dac)), ("mimi", MimiModel(mimi))):
        model.eval().save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize(
    ("peer", "rate", "frame_rate", "bits_per_frame"),
    [
        ("encodec", 24000, 75, 2 * 4),
        ("encodec:1.2", 24000, 75, 4 * 4),
        ("dac", 16000, 31.25, 3 * 4),
        ("dac:2", 16000, 31.25, 2 * 4),
        ("mimi", 24000, 12.5, 4 * 4),
        ("mimi:2", 24000, 12.5, 2 * 4),
    ],
)
def test_peers_keep_the_length_and_count_the_bits_of_their_codes(
    peers: Path, speech: np.ndarray, peer: str, rate: int, frame_rate: float, bits_per_frame: int
) -> None:
    codec = parse_peer(f"{peer}={peers / peer.partition(':')[0]}")
    assert codec.name == peer and codec.sampling_rate == rate and codec.frame_rate == frame_rate
    for samples in (1, 999, 16001):
        decoded = codec.reconstruct(speech[:samples])
        assert decoded.audio.shape == (samples,) and np.isfinite(decoded.audio).all()
        assert decoded.bits == max(int(np.ceil(samples / 16000 * frame_rate)), 4) * bits_per_frame


def test_a_peer_is_what_transformers_gives(peers: Path, speech: np.ndarray) -> None:
    codec = Peer("dac", peers / "dac")
    audio = speech[: 512 * 20]
    with torch.inference_mode():
        codes = codec.model.encode(torch.from_numpy(audio)[None, None]).audio_codes
        expected = codec.model.decode(audio_codes=codes).audio_values[0].numpy()
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(codec.reconstruct(audio).audio[: len(expected)], expected[: len(audio)], atol=1e-6)


def test_wrong_peers_are_refused(peers: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="known: encodec, dac, mimi"):
        parse_peer("snac=folder")
    with pytest.raises(ConfigurationError, match="names no folder"):
        parse_peer("dac")
    with pytest.raises(ConfigurationError, match=r"offers 0\.6, 1\.2 kbit/s, not 7"):
        parse_peer(f"encodec:7={peers / 'encodec'}")
    with pytest.raises(ConfigurationError, match="no number of codebooks"):
        parse_peer(f"dac:many={peers / 'dac'}")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        parse_peer(f"dac={tmp_path}")
    with pytest.raises(CheckpointError, match="type 'mimi', not 'dac'"):
        parse_peer(f"dac={peers / 'mimi'}")
    (tmp_path / "config.json").write_bytes((peers / "dac" / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="no .*safetensors"):
        parse_peer(f"dac={tmp_path}")
    from safetensors.torch import load_file, save_file

    weights = load_file(peers / "dac" / "model.safetensors")
    save_file(dict(list(weights.items())[3:]), tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks weights of DacModel"):
        parse_peer(f"dac={tmp_path}")


# ---------------------------------------------------------------- pairs and clips


def test_pairs_are_matched_by_name_and_the_others_are_named(tmp_path: Path, speech: np.ndarray) -> None:
    originals, estimates = tmp_path / "originals", tmp_path / "estimates"
    for name in ("speech/a.wav", "speech/b.wav", "c.wav", "lonely.wav"):
        write(originals / name, speech)
    (originals / "c.json").write_text('{"domain": "music"}')
    for name in ("speech/a.flac", "speech/b.reconstructed.wav", "c.decoded.wav", "stranger.wav"):
        path = estimates / name
        save_audio(path, speech, 16000) if path.suffix == ".flac" else write(path, speech)
    write(estimates / "c.wav", speech)
    inputs = PairInputs(originals, [estimates])
    tasks = list(inputs.tasks())
    assert [(task.key, task.domain) for task in tasks] == [
        ("c", "music"),
        ("speech/a", "speech"),
        ("speech/b", "speech"),
    ]
    assert inputs.total == 3 and inputs.systems == [System("estimates")]
    reasons = {Path(name).name: reason for name, reason in inputs.failures.items()}
    assert set(reasons) == {"lonely.wav", "stranger.wav", "c.wav"}
    assert "no file of that name" in reasons["lonely.wav"] and "no original" in reasons["stranger.wav"]
    assert "same name" in reasons["c.wav"]
    assert [task.domain for task in PairInputs(originals, [estimates], "noise").tasks()] == ["noise"] * 3


def test_reconstructions_may_lie_beside_their_originals(tmp_path: Path, speech: np.ndarray) -> None:
    write(tmp_path / "a.wav", speech)
    write(tmp_path / "a.reconstructed.wav", 0.5 * speech)
    (task,) = PairInputs(tmp_path, [tmp_path]).tasks()
    opened = task.prepare().open()
    assert np.array_equal(opened.pair.reference, speech) and np.array_equal(opened.pair.estimate, 0.5 * speech)


def test_folders_without_pairs_are_refused(tmp_path: Path, speech: np.ndarray) -> None:
    write(tmp_path / "a" / "x.wav", speech)
    write(tmp_path / "b" / "y.wav", speech)
    (tmp_path / "empty").mkdir()
    for reference, estimate, reason in (
        ("a", "b", "no file of .* has the name"),
        ("a", "empty", "holds no audio"),
        ("empty", "a", "holds no audio"),
        ("a", "absent", "is no folder"),
    ):
        with pytest.raises(DataError, match=reason):
            PairInputs(tmp_path / reference, [tmp_path / estimate])


def test_files_of_a_pair_must_belong_together(tmp_path: Path, speech: np.ndarray) -> None:
    original = write(tmp_path / "original.wav", speech)
    tolerated = FilePair(original, write(tmp_path / "short.wav", speech[:-800])).open()
    assert tolerated.cut_samples == 800 and tolerated.pair.reference.shape == (len(speech) - 800,)
    damaged = speech.copy()
    damaged[100] = np.nan
    for bad, rate, reason in (
        (speech[:-801], 16000, "more than 50 ms apart"),
        (speech, 8000, "16000 Hz and .* 8000 Hz"),
        (np.stack([speech, speech]), 16000, "1 channels and .* 2"),
        (damaged, 16000, "NaN"),
    ):
        with pytest.raises(ValueError, match=reason):
            FilePair(original, write(tmp_path / "bad.wav", bad, rate)).open()


def test_clips_of_folders_have_a_task_for_each_system(tmp_path: Path, speech: np.ndarray) -> None:
    write(tmp_path / "speech" / "a.wav", speech)
    write(tmp_path / "b.wav", speech)
    (tmp_path / "b.json").write_text('{"domain": "music"}')
    inputs = ClipInputs([tmp_path], [Original(), Opus(6)])
    found = [(task.key, task.system, task.domain) for task in inputs.tasks()]
    assert found == [
        ("b.wav", "original", "music"),
        ("b.wav", "Opus 6", "music"),
        ("speech/a.wav", "original", "speech"),
        ("speech/a.wav", "Opus 6", "speech"),
    ]
    assert inputs.total == 4
    with pytest.raises(ConfigurationError, match="two systems are called Opus 6"):
        ClipInputs([tmp_path], [Opus(6), Opus(6)])


def test_clips_of_shards_and_shards_that_are_cut(tmp_path: Path, speech: np.ndarray) -> None:
    pytest.importorskip("webdataset")
    write(tmp_path / "clip.wav", speech)
    for name in ("whole", "cut"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as shard:
            for key in ("a", "b"):
                shard.add(tmp_path / "clip.wav", f"{key}.wav")
                labels = json.dumps({"domain": "speech"} if key == "a" else {}).encode()
                member = tarfile.TarInfo(f"{key}.json")
                member.size = len(labels)
                shard.addfile(member, io.BytesIO(labels))
    data = (tmp_path / "cut.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[: len(data) // 2 + 4096])
    inputs = ClipInputs([tmp_path / "whole.tar"], [Original()])
    assert [(task.key, task.domain) for task in inputs.tasks()] == [("a", "speech"), ("b", "audio")]
    assert inputs.total is None and not inputs.failures
    cut = ClipInputs([tmp_path / "cut.tar"], [Original()])
    assert [task.key for task in cut.tasks()] == ["a"]
    assert "broken shard" in cut.failures[str(tmp_path / "cut.tar")]
    (tmp_path / "nothing.tar").write_bytes(data[:700])
    with pytest.raises(DataError, match="no clip to measure; 1 left out: .*broken shard"):
        list(ClipInputs([tmp_path / "nothing.tar"], [Original()]).tasks())


# ---------------------------------------------------------------- runs


@dataclass(frozen=True)
class Deadly:
    """Ends the process that opens it, as a fault in C code would."""

    def open(self) -> Opened:
        os._exit(7)


@dataclass
class FixedInputs:
    """Named sources."""

    sources: dict[str, Source]

    def __post_init__(self) -> None:
        self.systems, self.failures, self.total = [System("it")], {}, len(self.sources)

    def tasks(self) -> Iterator[Task]:
        for key, source in self.sources.items():
            yield Task(key, "it", "speech", [key], lambda source=source: source)


def test_a_process_that_dies_costs_one_clip(tmp_path: Path, speech: np.ndarray) -> None:
    good = DecodedClip(speech, noisy(speech), 480)
    outcome = run(FixedInputs({"a": good, "b": Deadly(), "c": good}), require_metrics(["si_sdr"]), tmp_path, 1)
    assert [row["file"] for row in outcome.rows] == ["a", "b", "c"]
    assert "died" in outcome.rows[1]["error"] and "died" in outcome.rows[1]["missing"]["si_sdr"]
    assert (
        outcome.rows[0]["si_sdr"] == outcome.rows[2]["si_sdr"] == pytest.approx(metrics.si_sdr(speech, noisy(speech)))
    )
    assert outcome.failed() == [("b (it)", outcome.rows[1]["error"])]
    assert len(RowStore(tmp_path / ROWS).rows) == 2  # what failed is tried again


@pytest.fixture
def pairs(tmp_path: Path, speech: np.ndarray) -> tuple[Path, Path]:
    originals, estimates = tmp_path / "originals", tmp_path / "estimates"
    for index, domain in enumerate(("speech", "speech", "music", "speech")):
        part = speech[2000 * index : 2000 * index + 16000]
        write(originals / domain / f"{index}.wav", part)
        write(estimates / domain / f"{index}.wav", noisy(part, 0.005 * (index + 1)))
    write(originals / "speech" / "silent.wav", 0 * speech[:16000])
    write(estimates / "speech" / "silent.wav", speech[:16000])
    write(originals / "speech" / "long.wav", speech)
    write(estimates / "speech" / "long.wav", speech[:9000])
    write(originals / "lonely.wav", speech)
    return originals, estimates


def test_pairs_on_the_command_line(
    pairs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    originals, estimates = pairs
    report, metric_names = tmp_path / "report.json", "--metrics=si_sdr,stoi,mel"
    folders = ("--reference", originals, "--estimate", estimates)
    assert evaluate(*folders, metric_names, "-o", tmp_path / "one", "--workers", 1, "--report", report) == 1
    shown = capsys.readouterr()
    assert "lonely.wav: no file of that name" in shown.err and "speech/long (estimates): " in shown.err
    with (tmp_path / "one" / "reconstruction.csv").open(newline="") as file:
        table = {row["file"]: row for row in csv.DictReader(file)}
    assert set(table) == {"speech/0", "speech/1", "music/2", "speech/3", "speech/silent", "speech/long"}
    first, _ = load_audio(originals / "speech" / "0.wav")
    second, _ = load_audio(estimates / "speech" / "0.wav")
    assert float(table["speech/0"]["si_sdr"]) == pytest.approx(metrics.si_sdr(first[0], second[0]), abs=1e-5)
    assert table["music/2"]["stoi"] == "" and table["music/2"]["missing"] == ""
    assert table["speech/silent"]["si_sdr"] == "" and "SI-SDR is not defined" in table["speech/silent"]["missing"]
    assert "50 ms apart" in table["speech/long"]["error"] and table["speech/long"]["mel_distance"] == ""

    held = json.loads((tmp_path / "one" / "reconstruction.json").read_text())
    (sdr,) = [m for m in held["means"] if m["domain"] == "speech" and m["column"] == "si_sdr"]
    values = [float(table[f"speech/{index}"]["si_sdr"]) for index in (0, 1, 3)]
    low, high = scipy.stats.t.interval(0.95, 2, np.mean(values), scipy.stats.sem(values))
    assert (sdr["values"], sdr["missing"]) == (3, 2)
    assert sdr["mean"] == pytest.approx(np.mean(values)) and 2 * sdr["interval"] == pytest.approx(high - low)
    assert "lonely.wav" in next(iter(held["failures"]))
    cell = f"{sdr['mean']:.3f} ± {sdr['interval']:.3f} (3, 2 missing)"
    assert cell in shown.out and cell in report.read_text(encoding="utf-8")
    assert "Missing for 1 clip: estimates, si_sdr: SI-SDR is not defined for silence" in shown.out
    _check_report(report)

    # Neither the number of processes nor a second run changes anything.
    assert evaluate(*folders, metric_names, "-o", tmp_path / "two", "--workers", 3) == 1
    for name in ("reconstruction.csv", "reconstruction.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def _check_report(path: Path) -> None:
    spec = importlib.util.spec_from_file_location("make_results", MAKE_RESULTS)
    assert spec is not None and spec.loader is not None
    script: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert [table["caption"] for table in script.read_report(path, path.parent)["tables"]] == [
        "music",
        "speech",
        "all domains",
    ]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc to see which processes are left")
def test_a_killed_run_repeats_nothing(pairs: tuple[Path, Path], tmp_path: Path) -> None:
    originals, estimates = pairs
    output = tmp_path / "out"
    arguments = ["evaluate", "reconstruction", "--reference", originals, "--estimate", estimates]
    arguments += ["--metrics=si_sdr,mel,stoi,estoi", "--workers=1", "-o", output]
    command = [sys.executable, "-m", "dasheng_tokenizer.cli", *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    rows = output / ROWS
    deadline = time.monotonic() + 300
    while not (rows.exists() and rows.read_bytes().count(b"\n")) and time.monotonic() < deadline:
        time.sleep(0.005)
    children = _descendants(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert children and not (output / "reconstruction.json").exists()
    with rows.open("ab") as file:
        file.write(b'{"id": "half a li')  # as a full disk leaves it
    made = rows.read_bytes().rpartition(b"\n")[0]
    assert main(list(map(str, arguments))) == 1
    lines = rows.read_bytes().splitlines()
    assert rows.read_bytes().startswith(made + b"\n") and len(lines) == 5  # the pair that failed is not kept
    assert len({json.loads(line)["id"] for line in lines}) == 5
    while any(_runs(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_runs(child) for child in children)  # workers end with their parent


def _descendants(pid: int) -> list[int]:
    try:
        children = list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    except OSError:
        return []
    return children + [below for child in children for below in _descendants(child)]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_other_data_and_other_metrics_are_measured_anew(tmp_path: Path, speech: np.ndarray) -> None:
    clip = write(tmp_path / "data" / "a.wav", speech[:16000])

    def kept(names: list[str]) -> int:
        return run(ClipInputs([tmp_path / "data"], [Original()]), require_metrics(names), tmp_path / "out", 1).kept

    assert kept(["mel"]) == 0 and kept(["mel"]) == 1 and kept(["mel", "si_sdr"]) == 0
    write(clip, speech[1:16001])
    assert kept(["mel"]) == 0


def test_models_peers_and_floors_in_one_table(
    tmp_path: Path, peers: Path, speech: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny().save_pretrained(tmp_path / "tiny")
    write(tmp_path / "data" / "speech" / "a.wav", speech[:16000])
    damaged = speech[:16000].copy()
    damaged[5] = np.nan
    write(tmp_path / "data" / "speech" / "nan.wav", damaged)
    (tmp_path / "data" / "broken.wav").write_bytes(b"RIFF")
    options = ("--model", tmp_path / "tiny", "--peer", f"dac={peers / 'dac'}", "--floor", "opus:12", "--floor=original")
    output = tmp_path / "out"
    code = evaluate(tmp_path / "data", *options, "--metrics=mel,si_sdr", "--workers=1", "--device=cpu", "-o", output)
    assert code == 1
    held = json.loads((output / "reconstruction.json").read_text())
    rows = {(row["system"], row["file"]): row for row in held["files"]}
    assert [system["name"] for system in held["systems"]] == ["tiny", "dac", "Opus 12", "original"]
    assert len(rows) == 12
    for system in ("tiny", "dac", "Opus 12", "original"):
        assert rows[system, "speech/a.wav"]["mel_distance"] is not None
        assert "NaN" in rows[system, "speech/nan.wav"]["error"] and rows[system, "broken.wav"]["error"]
    assert rows["original", "speech/a.wav"]["mel_distance"] == 0
    assert rows["dac", "speech/a.wav"]["bits"] == 32 * 12 and rows["tiny", "speech/a.wav"]["bits"] is None
    with torch.inference_mode():
        decoded = tiny()(torch.from_numpy(speech[None, :16000])).audio[0].numpy()
    expected = metrics.mel_distance(speech[:16000], decoded)
    assert rows["tiny", "speech/a.wav"]["mel_distance"] == pytest.approx(expected, abs=1e-4)
    shown = capsys.readouterr().out
    assert "| dac | 2 | 0.38 | 31.25 |" in shown and "| original | 2 | – | – | 120.000 (1, 1 missing)" not in shown
    assert "| original | 2 | – | – | 0.000 (1, 1 missing) | 120.000 (1, 1 missing) |" in shown


# ---------------------------------------------------------------- wrong usage


def test_wrong_usage_is_named(tmp_path: Path, speech: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "data" / "a.wav", speech)
    out = ("-o", tmp_path / "out")
    data = tmp_path / "data"
    for arguments, reason in (
        ((data, "--metrics", "pesq"), "known: pesq_wb, pesq_nb"),
        ((data, "--metrics", ""), "no metric is named"),
        ((data, "--peer", "snac=x"), "known: encodec, dac, mimi"),
        ((data, "--floor", "mp3"), "known: opus:KBITS, griffin-lim, original"),
        ((data, "--workers", 0), "at least one process"),
        ((), "nothing to measure"),
        (("--reference", data), "--reference and --estimate belong together"),
        (("--reference", data, "--estimate", data, "--floor", "original"), "leave SOURCE"),
    ):
        assert evaluate(*arguments, "--device", "cpu", *out) == 2, arguments
        assert reason in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert evaluate(tmp_path / "empty", *out) == 1
    assert "holds no tar shards and no audio files" in capsys.readouterr().err


def test_a_report_that_cannot_be_written_is_named_before_measuring(
    tmp_path: Path, speech: np.ndarray, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "data" / "a.wav", speech)
    (tmp_path / "file").touch()
    monkeypatch.setattr("dasheng_tokenizer.evaluation.reconstruction.run", None)
    for report in (tmp_path / "data", tmp_path / "file" / "report.json"):
        assert evaluate(tmp_path / "data", "-o", tmp_path / "out", "--report", report) == 1
        assert str(tmp_path) in capsys.readouterr().err
    assert evaluate(tmp_path / "data", "-o", tmp_path / "file") == 1
    assert "a file is" in capsys.readouterr().err


def test_a_missing_extra_is_named_on_the_command_line(
    tmp_path: Path, speech: np.ndarray, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.wav", speech)
    monkeypatch.setitem(sys.modules, "visqol", None)
    assert evaluate(tmp_path, "--metrics", "visqol", "-o", tmp_path / "out") == 1
    assert "dasheng-tokenizer[evaluate]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_means_without_and_with_one_value() -> None:
    row = {"x": None, "missing": {"x": "why"}}
    assert str(mean_of([row, row], "s", "d", "x")) == "– (0, 2 missing)"
    assert str(mean_of([{"x": 1.5, "missing": {}}, row], "s", "d", "x")) == "1.500 (1, 1 missing)"
    assert str(mean_of([{"x": None, "missing": {}}], "s", "d", "x")) == "–"


def test_figures_of_speech_without_speech_are_explained(tmp_path: Path, speech: np.ndarray) -> None:
    good = DecodedClip(speech[:8000], speech[:8000], None)
    inputs = FixedInputs({"a": good})
    inputs.tasks = lambda: iter([Task("a", "it", "music", ["a"], lambda: good)])  # type: ignore[method-assign]
    tables = Tables(run(inputs, require_metrics(["stoi", "mel"]), tmp_path, 1))
    assert any("--domain speech" in note for note in tables.notes())
    assert "STOI ↑" not in tables.report("t", "c", "d").tables[0].columns
    assert metric_columns.SPEECH == "speech"
