"""Linear evaluation: heads that learn what can be learnt, scores by hand, and embeddings that are computed once."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

from conftest import WHISPER, tiny
from dasheng_tokenizer.cli import main
from dasheng_tokenizer.errors import CheckpointError, ConfigurationError, DataError
from dasheng_tokenizer.evaluation import probe_metrics
from dasheng_tokenizer.evaluation.corpus_suite import CorpusSuite, mix
from dasheng_tokenizer.evaluation.embedding_store import EmbeddingStore, Split
from dasheng_tokenizer.evaluation.heads import Items, nearest_neighbours, train_head
from dasheng_tokenizer.evaluation.probe import Fold, SuiteTask, probe_task
from dasheng_tokenizer.evaluation.probe_report import by_representation, injection_sentences
from dasheng_tokenizer.evaluation.probe_tasks import Event, Example, Label, ProbeTask, label_from_json, label_to_json
from dasheng_tokenizer.evaluation.representations import (
    LogMelEmbedder,
    TokenizerEmbedder,
    TransformersEmbedder,
    encoder_embedder,
)

pytestmark = pytest.mark.usefixtures("one_thread")

DIM = 6


class StandIn:
    """Embeds a clip as frames around its first sample, so that tests choose what can be learnt."""

    names = ("stand-in",)
    identity = "stand-in 1"
    seconds_per_frame = 0.04

    def __init__(self, fail_at: int | None = None) -> None:
        self.embedded: list[float] = []
        self.fail_at = fail_at

    def __call__(self, clips: Sequence[np.ndarray]) -> list[dict[str, Tensor]]:
        if self.fail_at is not None and len(self.embedded) >= self.fail_at:
            raise KeyboardInterrupt
        self.embedded += [float(clip[0]) for clip in clips]
        return [{"stand-in": self.frames(clip)} for clip in clips]

    def frames(self, clip: np.ndarray) -> Tensor:
        count = -(-len(clip) // 640)
        noise = torch.Generator().manual_seed(int(abs(clip).sum() * 1000) % 2**31)
        direction = torch.linspace(-1, 1, DIM) * float(clip[0])
        return direction + 0.3 * torch.randn(count, DIM, generator=noise)


def example(key: str, value: float, label: Label | None, seconds: float = 0.2) -> Example:
    audio = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(round(16000 * seconds)).astype(np.float32)
    audio[0] = value
    return Example(key, audio, label)


def split(name: str, examples: Sequence[Example], frames: bool = False, identity: str | None = None) -> Split:
    return Split(name, identity or name, lambda skipped: iter(examples), frames)


def two_classes(name: str, count: int = 40) -> list[Example]:
    """Classes up and down, told apart by the sign of the first sample."""
    return [example(f"{name}-{i}", 1.0 if i % 2 else -1.0, "up" if i % 2 else "down") for i in range(count)]


def clip_task(folds: list[Fold], **changes: Any) -> SuiteTask:
    task = ProbeTask(**{"name": "toy", "domain": "sound", "head": "clip", "metric": "accuracy", **changes})
    return SuiteTask(task, folds, lambda role, key, label: label)


def toy_folds() -> list[Fold]:
    return [Fold(*([split(role, two_classes(role))] for role in ("train", "valid", "test")))]


# ---------------------------------------------------------------------------------------------------- heads


def test_a_learnable_task_is_learnt_and_the_same_seed_gives_the_same_score(tmp_path: Path) -> None:
    task = clip_task(toy_folds(), epochs=80, batch_size=8)
    first, again = (probe_task(task, StandIn(), EmbeddingStore(tmp_path), seeds=(3, 4))[0] for _ in range(2))
    assert first.scores == again.scores
    assert first.mean > 0.95 and first.knn is not None and first.knn > 0.95
    assert first.clips == {"train": 40, "valid": 40, "test": 40}


def test_shuffled_labels_stay_at_chance(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    folds = []
    for role in ("train", "valid", "test"):
        clips = [example(f"{role}-{i}", float(rng.choice([-1, 1])), str(rng.integers(2))) for i in range(200)]
        folds.append([split(role, clips)])
    score = probe_task(clip_task([Fold(*folds)], epochs=5), StandIn(), EmbeddingStore(tmp_path), seeds=(0,))[0]
    assert 0.35 < score.mean < 0.65


def test_epoch_is_chosen_on_the_selection_data_and_its_weights_are_scored() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, DIM, generator=generator)
    items = Items(features, (features[:, 0] > 0).long())
    seen: list[Tensor] = []

    def selection(logits: Tensor) -> float:
        seen.append(logits)
        return 1.0 if len(seen) == 2 else 0.5

    result, logits = train_head(
        items, (items, selection), (items, lambda _: 0.25), torch.nn.functional.cross_entropy, 2, 4, 8, seed=0
    )
    assert (result.epoch, result.selection, result.score) == (2, 1.0, 0.25)
    assert torch.equal(logits, seen[1]) and not torch.equal(logits, seen[-1])


def test_a_head_without_a_score_is_named() -> None:
    items = Items(torch.zeros(4, DIM), torch.tensor([0, 1, 0, 1]))
    nothing = (items, lambda logits: float("nan"))
    with pytest.raises(DataError, match="diverged"):
        train_head(items, nothing, nothing, torch.nn.functional.cross_entropy, 2, 2, 2, seed=0)


def test_a_pitch_that_is_no_class_is_not_near(tmp_path: Path) -> None:
    rows = {role: [example(f"{role}{i}", 1.0 if i % 2 else -1.0, str(60 + 12 * (i % 2))) for i in range(20)]
            for role in ("train", "valid", "test")}  # fmt: skip
    rows["test"] = [Example(item.key, item.audio, "90") for item in rows["test"]]
    fold = Fold(*([split(role, held)] for role, held in rows.items()))
    task = clip_task([fold], name="pitch", classes=("60", "72"), epochs=2)
    score = probe_task(task, StandIn(), EmbeddingStore(tmp_path), (0,))[0]
    assert score.mean == 0.0 and score.extra == {"within a semitone": 0.0}


def test_folds_are_averaged(tmp_path: Path) -> None:
    hopeless = [Example(e.key, e.audio, "up" if e.label == "down" else "down") for e in two_classes("test")]
    good = toy_folds()[0]
    bad = Fold(good.train, good.valid, [split("inverted", hopeless)])
    score = probe_task(clip_task([good, bad], epochs=80, batch_size=8), StandIn(), EmbeddingStore(tmp_path), (0,))[0]
    assert score.mean == pytest.approx(0.5, abs=0.03)


def test_multilabel_and_frame_heads_learn(tmp_path: Path) -> None:
    folds: dict[str, list[list[Split]]] = {"multilabel": [], "frame": []}
    for role in ("train", "valid", "test"):
        rows = [(f"{role}-{i}", 1.0 if i % 2 else -1.0) for i in range(40)]
        many = [example(key, value, ("a", "up") if value > 0 else ("a", "down")) for key, value in rows]
        events = [
            example(f"{key}e", value, (Event(0.0, 1.0, "up"),) if value > 0 else (Event(0.0, 1.0, "down"),), 1.0)
            for key, value in rows
        ]
        folds["multilabel"].append([split(f"{role} many", many)])
        folds["frame"].append([split(f"{role} events", events, frames=True)])
    store = EmbeddingStore(tmp_path)
    many_task = clip_task([Fold(*folds["multilabel"])], head="multilabel", metric="mAP", epochs=80, batch_size=8)
    assert probe_task(many_task, StandIn(), store, (0,))[0].mean > 0.95
    for metric in ("segment_f1_micro", "segment_f1_macro"):
        settings: dict[str, Any] = {"segment_seconds": 0.2, "epochs": 80, "batch_size": 8}
        task = clip_task([Fold(*folds["frame"])], head="frame", metric=metric, **settings)
        assert probe_task(task, StandIn(), store, (0,))[0].mean > 0.95
    no_frames = clip_task(toy_folds(), head="frame", metric="segment_f1_micro", classes=("up", "down"))
    with pytest.raises(DataError):
        probe_task(no_frames, StandIn(), store, (0,))


def test_nearest_neighbours_weigh_votes_by_similarity() -> None:
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [0.0, 1.0]])
    labels = torch.tensor([0, 1, 1, 1])
    # Three votes of another class, but far away: exp(1 / 0.07) against three times about exp(0.1 / 0.07).
    assert nearest_neighbours(train, labels, torch.tensor([[5.0, 0.0], [0.0, 0.2]]), 2).tolist() == [0, 1]


# ---------------------------------------------------------------------------------------------------- metrics


def test_metrics_by_hand() -> None:
    target, predicted = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 0])
    assert probe_metrics.accuracy(predicted, target) == 0.5
    assert probe_metrics.macro_accuracy(predicted, target) == pytest.approx(1 / 3)
    scores = np.array([[0.9, 0.1, 0.3], [0.2, 0.8, 0.2], [0.4, 0.3, 0.1]], dtype=np.float32)
    # Class 0: its clip is ranked first; class 1: second of three; class 2 has no positive clip and does not count.
    targets = np.array([[1, 0, 0], [0, 0, 0], [0, 1, 0]])
    assert probe_metrics.mean_average_precision(scores, targets) == pytest.approx((1 + 0.5) / 2)
    with pytest.raises(DataError, match="known label"):
        probe_metrics.mean_average_precision(scores, np.zeros_like(targets))


def test_segment_f1_by_hand() -> None:
    true = np.zeros((7, 2), bool)
    true[0:3, 0], true[5, 1], true[6, 0] = True, True, True  # segments of 3 frames; the last one is not full
    found = np.zeros((7, 2), bool)
    found[2, 0], found[4, 0] = True, True  # first right, second false; class 1 missed
    assert probe_metrics.segment_f1([found], [true], 3, "micro") == pytest.approx(2 / 4)
    assert probe_metrics.segment_f1([found], [true], 3, "macro") == pytest.approx((2 / 3 + 0) / 2)
    wider = np.pad(true, ((0, 0), (0, 2)))  # two classes that never occur count as 0
    assert probe_metrics.segment_f1([wider], [wider], 3, "macro") == pytest.approx(0.5)
    assert probe_metrics.segment_f1([true[:2]], [true[:2]], 3, "micro") == 1.0  # the only segment is not full
    with pytest.raises(DataError, match="event"):
        probe_metrics.segment_f1([found], [np.zeros_like(true)], 3, "micro")


def test_activity_holds_the_frames_from_onset_to_offset() -> None:
    events = (Event(0.10, 0.21, "a"), Event(0.0, 0.01, "b"), Event(0.0, 1.0, "unknown"))
    grid = probe_metrics.activity(events, ("a", "b"), 6, 0.04)
    # Frames begin at 0, 0.04, 0.08, 0.12, 0.16, 0.20; an event shorter than a frame still holds one.
    assert grid[:, 0].tolist() == [False, False, False, True, True, True]
    assert grid[:, 1].tolist() == [True, False, False, False, False, False]


def test_note_scores() -> None:
    classes = tuple(str(pitch) for pitch in range(60, 72))
    notes = (Event(0.2, 0.6, "60"), Event(0.4, 0.8, "64"))
    truth = probe_metrics.activity(notes, classes, 25, 0.04)
    assert probe_metrics.note_f1([truth], [notes], classes, 0.04) == 1.0
    assert probe_metrics.note_frame_f1([truth], [notes], classes, 0.04) > 0.95
    assert probe_metrics.note_f1([np.roll(truth, 1, axis=1)], [notes], classes, 0.04) == 0.0  # a semitone off
    assert probe_metrics.note_f1([np.roll(truth, 3, axis=0)], [notes], classes, 0.04) == 0.0  # 120 ms late
    assert probe_metrics.note_f1([np.roll(truth, 1, axis=0)], [notes], classes, 0.04) == 1.0  # 40 ms late
    assert probe_metrics.note_f1([np.zeros_like(truth)], [notes], classes, 0.04) == 0.0


def test_labels_survive_json() -> None:
    for label in (None, "a", ("a", "b"), (Event(0.5, 1.0, "60"), Event(1.0, 2.0, "61"))):
        assert label_from_json(json.loads(json.dumps(label_to_json(label)))) == label


# ---------------------------------------------------------------------------------------------------- embedding store


def test_a_killed_extraction_embeds_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dasheng_tokenizer.evaluation.embedding_store.CLIPS_PER_PART", 4)
    clips = [example(f"c{i}", float(i), "x", seconds=0.1 + 0.01 * (i % 3)) for i in range(10)]
    data = split("ten", clips, frames=True)
    killed = StandIn(fail_at=8)
    with pytest.raises(KeyboardInterrupt):
        EmbeddingStore(tmp_path).load(killed, data)
    second = StandIn()
    found = EmbeddingStore(tmp_path).load(second, data)["stand-in"]
    assert sorted(killed.embedded + second.embedded) == [float(i) for i in range(10)] and len(second.embedded) == 2
    third = StandIn(fail_at=0)
    again = EmbeddingStore(tmp_path).load(third, data)["stand-in"]
    assert again.keys == found.keys and torch.equal(again.means, found.means)
    for key, mean, frames in zip(found.keys, found.means, found.frames, strict=True):
        expected = StandIn().frames(clips[int(key[1:])].audio)
        torch.testing.assert_close(mean, expected.mean(0))
        np.testing.assert_allclose(frames, expected.numpy(), rtol=1e-2, atol=1e-3)


def test_other_weights_and_other_data_are_embedded_anew(tmp_path: Path) -> None:
    store, clips = EmbeddingStore(tmp_path), two_classes("a", 4)
    for changes in ({"identity": "other"}, {}):
        embedder = StandIn()
        embedder.identity = changes.get("identity", embedder.identity)
        store.load(embedder, split("a", clips))
        assert len(embedder.embedded) == 4
    changed = StandIn()
    store.load(changed, split("a", clips, identity="changed"))
    assert len(changed.embedded) == 4


def test_embeddings_that_are_not_finite_are_left_out_and_counted(tmp_path: Path) -> None:
    clips = two_classes("train", 12)
    clips[3].audio[0] = np.nan
    folds = [Fold([split("train", clips)], toy_folds()[0].valid, toy_folds()[0].test)]
    embedder = StandIn()
    embedder.frames = lambda clip: torch.full((2, DIM), float(clip[0]))  # type: ignore[method-assign]
    score = probe_task(clip_task(folds), embedder, EmbeddingStore(tmp_path), (0,))[0]
    assert score.clips["train"] == 11 and score.notes == ["1 clips of the train data could not be read or embedded"]
    hopeless = [Example("n", np.full(640, np.nan, np.float32), "up")]
    with pytest.raises(DataError, match="not finite"):
        EmbeddingStore(tmp_path).load(embedder, split("hopeless", hopeless))


def test_damaged_store_is_named(tmp_path: Path) -> None:
    store, data = EmbeddingStore(tmp_path), split("a", two_classes("a", 4))
    store.load(StandIn(), data)
    next(tmp_path.rglob("*.safetensors")).write_bytes(b"no")
    with pytest.raises(DataError, match="delete the folder"):
        store.load(StandIn(), data)


# ---------------------------------------------------------------------------------------------------- bad labels


def test_labels_that_cannot_be_used(tmp_path: Path) -> None:
    store, good = EmbeddingStore(tmp_path), toy_folds()[0]

    def probe(train: Sequence[Example] = (), valid: Sequence[Example] = (), test: Sequence[Example] = ()) -> Any:
        given = {"train": train, "valid": valid, "test": test}
        parts = [
            [split(f"{role} {len(held)}", held, identity=f"{role}{[(e.key, e.label) for e in held]}")]
            if held
            else getattr(good, role)
            for role, held in given.items()
        ]
        return probe_task(clip_task([Fold(*parts)]), StandIn(), store, (0,))[0]

    def relabelled(name: str, label: Label | None, rows: slice = slice(None)) -> list[Example]:
        clips = two_classes(name)
        for i in range(*rows.indices(len(clips))):
            clips[i] = Example(clips[i].key, clips[i].audio, label)
        return clips

    assert probe(train=relabelled("train", None, slice(0, 7))).notes == ["7 train clips without a label left out"]
    with pytest.raises(DataError, match="no labelled clip in the test data"):
        probe(test=relabelled("test", None))
    with pytest.raises(DataError, match="single class"):
        probe(train=relabelled("train", "up"))
    with pytest.raises(DataError, match="validation data has a single class"):
        probe(valid=relabelled("valid", "up"))
    unseen = probe(test=relabelled("test", "sideways", slice(0, 20)))
    assert unseen.notes == ["1 classes of the test data have no training clip: sideways"]
    assert unseen.mean <= 0.5  # those clips count, and can only be wrong


# ---------------------------------------------------------------------------------------------------- representations


def test_tokenizer_representations_do_not_hang_on_the_batch() -> None:
    model = tiny("whisper")
    rng = np.random.default_rng(0)
    clips = [0.1 * rng.standard_normal(n).astype(np.float32) for n in (1, 700, 5000)]
    found = TokenizerEmbedder(model)(clips)
    for clip, item in zip(clips, found, strict=True):
        alone = model(torch.from_numpy(clip)[None])
        for name in ("unified", "semantic", "acoustic"):
            torch.testing.assert_close(item[name], getattr(alone, name)[0].detach(), rtol=0, atol=1e-5)
    assert TokenizerEmbedder(model).identity != TokenizerEmbedder(tiny("dasheng")).identity
    with pytest.raises(ConfigurationError, match="unknown representation 'sound'"):
        TokenizerEmbedder(model, ["sound"])


def test_log_mel_is_what_the_acoustic_layer_sees() -> None:
    model = tiny()
    clip = 0.1 * np.random.default_rng(0).standard_normal(3000).astype(np.float32)
    log_mel = LogMelEmbedder()([clip])[0]["log-mel"].unflatten(1, (4, 128)).transpose(1, 2)  # (T, 128, 4)
    layer = model.encoder.patch_embed
    with torch.no_grad():
        projected = torch.nn.functional.conv2d(log_mel[:, None], layer.weight, layer.bias)
        expected = model(torch.from_numpy(clip)[None]).acoustic[0]
    torch.testing.assert_close(model.encoder.norm(projected[:, :, 0, 0]), expected, rtol=1e-4, atol=1e-4)


def test_frozen_encoders_of_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = WhisperConfig(**{**WHISPER, "max_source_positions": 1500})
    WhisperModel(config).save_pretrained(tmp_path)
    WhisperFeatureExtractor().save_pretrained(tmp_path)
    clip = 0.1 * np.random.default_rng(0).standard_normal(16000).astype(np.float32)
    own = encoder_embedder(tmp_path)
    assert own.names == ("semantic",) and own([clip])[0]["semantic"].shape == (25, 32)
    assert own.identity == encoder_embedder(tmp_path).identity
    generic = TransformersEmbedder(tmp_path)
    assert generic.names == ("whisper",) and generic.seconds_per_frame == pytest.approx(0.02)
    assert generic([clip])[0]["whisper"].shape == (1500, 32)
    with pytest.raises(CheckpointError, match="no audio encoder"):
        TransformersEmbedder(tmp_path / "absent")


# ---------------------------------------------------------------------------------------------------- a whole suite


def write_corpus(folder: Path) -> Path:
    """Tones of two pitches, notes in time, and mixtures, in the layout of a corpus."""
    rng = np.random.default_rng(0)
    rows, counts = [], {"train": 24, "valid": 8, "test": 8}
    for split_name, count in counts.items():
        with tarfile.open(folder / f"tone-{split_name}-000.tar", "w") as tar:
            for i in range(count):
                key, pitch = f"tone-{split_name}-{i:05d}", (60, 72)[i % 2]
                times = np.arange(8000) / 16000
                tone = 0.3 * np.sin(2 * np.pi * 440 * 2 ** ((pitch - 69) / 12) * times) + 0.01 * rng.standard_normal(
                    8000
                )
                data = io.BytesIO()
                soundfile.write(data, tone, 16000, format="FLAC")
                info = tarfile.TarInfo(f"{key}.flac")
                info.size = len(data.getvalue())
                tar.addfile(info, io.BytesIO(data.getvalue()))
                notes = [[0.0, 0.5, pitch]]
                labels = {"pitch": pitch, "none": None}
                rows.append({"key": key, "domain": "tone", "split": split_name, "labels": labels, "notes": notes})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mixtures = [
        {"key": f"mix-{name}-{i}", "split": name, "length_s": 1.0, "n_voices": i % 2, "background": None,
         "voices": [{"key": f"tone-{name}-00000", "onset_s": 0.25, "gain_db": 0.0}] * (i % 2)}
        for name, count in counts.items() for i in range(count)
    ]  # fmt: skip
    for mixture in mixtures:
        mixture["background"] = {"key": f"tone-{mixture['split']}-00001", "gain_db": -20.0}
    (folder / "mixtures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mixtures))
    filters = {name: {"domain": "tone", "split": name} for name in counts}
    base = {"domain": "instrument", "metric": "accuracy", "filters": filters}
    tasks = [
        {**base, "name": "pitch", "level": "clip", "label": "labels.pitch", "classes": [60, 72]},
        {**base, "name": "notes", "level": "frame", "label": "notes", "classes": "MIDI pitches 21-108"},
        {**base, "name": "voices", "level": "clip", "label": "n_voices", "classes": [0, 1], "source": "mixtures.jsonl"},
    ]
    (folder / "tasks.json").write_text(json.dumps({"tasks": tasks}))
    return folder


def test_suite_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus, model, report = tmp_path / "corpus", tmp_path / "model", tmp_path / "out" / "probe.json"
    corpus.mkdir()
    write_corpus(corpus)
    tiny("whisper").save_pretrained(model)
    command = ["evaluate", "probe", "--suite", "corpus", "--data", str(corpus), "--model", str(model), "--seeds", "0,1"]
    command += ["--cache", str(tmp_path / "cache"), "--report", str(report)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "| pitch |" in printed.replace("instrument | pitch", " pitch") and "overall" in printed
    held = json.loads(report.read_text())
    scores = next(table for table in held["tables"] if table["caption"].startswith("Scores"))
    assert scores["columns"][3:] == ["unified", "semantic", "acoustic", "log-mel"] and len(scores["rows"]) == 3
    log_mel = {row[1]: float(row[-1].split()[0]) for row in scores["rows"]}
    assert log_mel["pitch"] == 100.0 and log_mel["voices"] == 100.0 and log_mel["notes"] > 80
    assert report.with_suffix(".png").stat().st_size > 5000
    assert "| log-mel |" in report.with_suffix(".md").read_text()
    assert held["command"] == "dasheng-tokenizer " + " ".join(command)
    first = held["tables"]
    assert main(command) == 0 and json.loads(report.read_text())["tables"] == first


def test_wrong_usage_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_corpus(tmp_path)
    base = ["evaluate", "probe", "--suite", "corpus", "--data", str(corpus), "--cache", str(tmp_path / "c")]
    for more, message in (
        (["--tasks", "singing"], "unknown task 'singing'"),
        (["--representations", "latent"], "unknown representation 'latent'"),
        (["--seeds", "a"], "whole numbers"),
        (["--seeds", "1,1"], "each seed once"),
        (["--encoder", "folder"], "NAME=FOLDER"),
    ):
        assert main([*base, *more]) == 2
        assert message in capsys.readouterr().err
    assert main(["evaluate", "probe", "--suite", "corpus", "--data", str(tmp_path / "absent")]) == 1
    assert "manifest.jsonl is missing" in capsys.readouterr().err


def test_a_task_that_cannot_be_done_does_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_corpus(tmp_path)
    tasks = json.loads((corpus / "tasks.json").read_text())
    tasks["tasks"].insert(0, {**tasks["tasks"][0], "name": "one class", "classes": [60]})
    (corpus / "tasks.json").write_text(json.dumps(tasks))
    command = ["evaluate", "probe", "--suite", "corpus", "--data", str(corpus), "--cache", str(tmp_path / "c")]
    assert main([*command, "--tasks", "one class,pitch", "--representations", "log-mel", "--seeds", "0"]) == 1
    printed = capsys.readouterr()
    assert "single class" in printed.err and "pitch, log-mel: 100.0" in printed.out


def test_mixture_levels() -> None:
    clips = {"voice": np.full(100, 0.5, np.float32), "hum": np.sin(np.arange(300)).astype(np.float32)}
    recipe = {
        "length_s": 1.0,
        "voices": [{"key": "voice", "onset_s": 0.5, "gain_db": -6.0}],
        "background": {"key": "hum", "gain_db": -20.0},
    }
    mixture = mix(recipe, clips)
    assert mixture.shape == (16000,)
    assert 20 * np.log10(np.sqrt(np.mean(mixture[:8000] ** 2))) == pytest.approx(-46.0, abs=0.1)
    assert 20 * np.log10(mixture[8000:8100].mean()) == pytest.approx(-32.0, abs=0.5)
    late = {**recipe, "voices": [{"key": "voice", "onset_s": 0.999, "gain_db": 0.0}]}
    assert mix(late, clips).shape == (16000,)


def test_the_real_corpus_gives_the_counts_it_states(shared: Path) -> None:
    suite = CorpusSuite(shared / "corpus")
    for row in suite.tasks:
        if "filters" in row:
            counts = {role: len(suite._labels(row, role)) for role in ("train", "valid", "test")}
            assert counts == {role: row[role] for role in counts}
    assert len(suite.suite()) == len(suite.tasks)


def test_sentences_say_where_injection_helps(tmp_path: Path) -> None:
    from dasheng_tokenizer.evaluation.probe import ProbeScore

    def score(task: str, name: str, *values: float) -> ProbeScore:
        return ProbeScore(task, "speech", "accuracy", name, list(values))

    scores = by_representation(
        [
            score("up", "unified", 0.9, 0.91, 0.9), score("up", "semantic", 0.5, 0.51, 0.5),
            score("down", "unified", 0.4, 0.41, 0.4), score("down", "semantic", 0.7, 0.71, 0.7),
            score("same", "unified", 0.5, 0.6, 0.4), score("same", "semantic", 0.51, 0.6, 0.42),
        ]
    )  # fmt: skip
    helps, hurts, neither, mean = injection_sentences(scores)
    assert helps.startswith("Injection helps: up (+40.0") and hurts.startswith("Injection hurts: down (-30.0")
    assert "same" in neither and mean.endswith("+3.0 points.")
    assert injection_sentences({"semantic": scores["semantic"]}) == []
