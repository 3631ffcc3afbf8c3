"""Evaluation of generated clips: distances with their properties, judges, and the command on synthetic audio."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
import torch

from dasheng_tokenizer.cli import main
from dasheng_tokenizer.errors import CheckpointError, ConfigurationError, DataError
from dasheng_tokenizer.evaluation import frechet
from dasheng_tokenizer.evaluation.clip_embedders import ClapEmbedder, OnnxEmbedder, load_embedding
from dasheng_tokenizer.evaluation.embedding_store import EmbeddingStore
from dasheng_tokenizer.evaluation.generation import Questions, evaluate_generation
from dasheng_tokenizer.evaluation.generation_clips import MANIFEST, ClipSet, pairs, read_manifest, write_manifest
from dasheng_tokenizer.evaluation.generation_judges import Pitched, heard_note, pitched_clips, train_classifier
from dasheng_tokenizer.evaluation.representations import LogMelEmbedder

pytestmark = pytest.mark.usefixtures("one_thread")

Array = npt.NDArray[np.float64]

RATE = 16_000


# ---------------------------------------------------------------------------------------------------- Fréchet distance


def exactly(count: int, mean: Array, covariance: Array, seed: int = 0) -> Array:
    """Random rows whose sample mean and covariance are the given ones to the last digits."""
    rows = np.random.default_rng(seed).standard_normal((count, len(mean)))
    rows -= rows.mean(0)
    rows = rows @ np.linalg.inv(np.linalg.cholesky(np.cov(rows, rowvar=False))).T
    return rows @ np.linalg.cholesky(covariance).T + mean


def random_covariance(dim: int, seed: int) -> Array:
    factor = np.random.default_rng(seed).standard_normal((dim, dim))
    return factor @ factor.T + 0.1 * np.eye(dim)


def rotation(dim: int, seed: int = 0) -> Array:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((dim, dim)))[0]


@pytest.mark.parametrize("counts", [(40, 30), (6, 30), (4, 4)], ids=["many clips", "few clips", "singular"])
def test_frechet_distance_is_that_of_the_matrix_square_root(counts: tuple[int, int]) -> None:
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(3)
    first, second = (rng.standard_normal((count, 5)) @ random_covariance(5, count) + 1 / count for count in counts)
    moments = [(rows.mean(0), np.cov(rows, rowvar=False)) for rows in (first, second)]
    (mean, covariance), (other, other_covariance) = moments
    root = linalg.sqrtm(covariance @ other_covariance).real
    expected = np.square(mean - other).sum() + np.trace(covariance + other_covariance - 2 * root)
    # The square root of a singular product has errors of the square root of the rounding error.
    assert frechet.frechet_distance(first, second) == pytest.approx(expected, rel=1e-9 if min(counts) > 5 else 1e-5)


def test_frechet_distance_of_known_gaussians() -> None:
    deviations, others, shift = np.array([1.0, 2.0, 0.5]), np.array([3.0, 2.0, 1.5]), np.array([0.0, -1.0, 2.0])
    first = exactly(20, np.zeros(3), np.diag(deviations**2))
    second = exactly(50, shift, np.diag(others**2), seed=1)
    expected = np.square(shift).sum() + np.square(deviations - others).sum()  # commuting covariances
    assert frechet.frechet_distance(first, second) == pytest.approx(expected, rel=1e-12)
    turn = rotation(3)
    assert frechet.frechet_distance(first @ turn, second @ turn) == pytest.approx(expected, rel=1e-12)
    assert frechet.frechet_distance(second + 7.0, first + 7.0) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_of_equal_sets_is_zero_also_where_covariances_are_singular() -> None:
    for count in (200, 12):
        rows = 100 * np.random.default_rng(0).standard_normal((count, 64))
        assert frechet.frechet_distance(rows, rows[::-1]) < 1e-9 * np.square(rows).sum() / count
        assert frechet.is_singular(rows, rows) == (count == 12)


def test_frechet_distance_does_not_know_of_empty_dimensions() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((9, 4)), 2 * rng.standard_normal((8, 4))
    wide = [np.pad(rows, ((0, 0), (0, 46))) @ rotation(50) for rows in (first, second)]  # 9 clips, 50 dimensions
    assert frechet.frechet_distance(*wide) == pytest.approx(frechet.frechet_distance(first, second), rel=1e-10)


@pytest.mark.parametrize("dim", [3, 30])
def test_counts_are_repeated_rows(dim: int) -> None:
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((10, dim)), rng.standard_normal((12, dim)) + 1
    counts, others = rng.multinomial(10, np.full(10, 0.1)), rng.multinomial(12, np.full(12, 1 / 12))
    expected = frechet.frechet_distance(np.repeat(first, counts, axis=0), np.repeat(second, others, axis=0))
    assert frechet.frechet_distance(first, second, counts, others) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("distance", [frechet.frechet_distance, frechet.kernel_distance])
def test_sets_that_have_no_distance_are_named(distance: Any) -> None:
    good = np.random.default_rng(0).standard_normal((5, 3))
    bad = good.copy()
    bad[2, 1] = np.nan
    for other, reason in ((good[:1], "two clips"), (good[:, :2], "compare"), (good[0], "compare"), (bad, "NaN")):
        with pytest.raises(DataError, match=reason):
            distance(good, other)


# ---------------------------------------------------------------------------------------------------- kernel distance


def pair_mean(first: Array, second: Array, same: bool) -> float:
    found = [
        (float(x @ y) / len(x) + 1) ** 3
        for i, x in enumerate(first)
        for j, y in enumerate(second)
        if not (same and i == j)
    ]
    return float(np.mean(found))


def test_kernel_distance_by_hand() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((4, 3)), rng.standard_normal((5, 3)) + 1
    expected = pair_mean(first, first, True) + pair_mean(second, second, True) - 2 * pair_mean(first, second, False)
    assert frechet.kernel_distance(first, second) == pytest.approx(expected, rel=1e-12)
    kernel = frechet.KernelDistance(first, second)
    ones = np.ones(4, np.int64), np.ones(5, np.int64)
    assert kernel(*ones) == pytest.approx(expected, rel=1e-12)
    assert kernel(2 * ones[0], 3 * ones[1]) == pytest.approx(expected, rel=1e-12)  # repetition is no evidence
    chosen = kernel(np.array([1, 1, 0, 1]), np.array([0, 1, 1, 1, 0]))
    assert chosen == pytest.approx(frechet.kernel_distance(first[[0, 1, 3]], second[1:4]), rel=1e-12)


def test_kernel_distance_of_one_distribution_is_zero_on_average_for_any_sizes() -> None:
    rng = np.random.default_rng(0)
    found, with_itself = [], []
    for _ in range(600):
        first, second = rng.standard_normal((5, 4)), rng.standard_normal((9, 4))
        found.append(frechet.kernel_distance(first, second))
        both = np.mean((first @ first.T / 4 + 1) ** 3) + np.mean((second @ second.T / 4 + 1) ** 3)
        with_itself.append(both - 2 * np.mean((first @ second.T / 4 + 1) ** 3))
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found)) < 4 * error
    assert np.mean(with_itself) > 10 * error  # what a clip says of itself would show


def test_kernel_distance_of_subsets() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((40, 4)), rng.standard_normal((60, 4)) + 0.5
    kernel = frechet.KernelDistance(first, second)
    mean, spread = kernel.of_subsets(20, subsets=300)
    assert abs(mean - kernel()) < 4 * spread / np.sqrt(300) and spread > 0
    assert kernel.of_subsets(20, seed=1) == kernel.of_subsets(20, seed=1) != kernel.of_subsets(20, seed=2)
    same = frechet.KernelDistance(first, second[:40])
    assert same.of_subsets(40) == pytest.approx((same(), 0.0), abs=1e-9)  # there is one sub-set of all
    for size in (1, 41):
        with pytest.raises(ConfigurationError, match="sub-sets"):
            kernel.of_subsets(size)
    assert (frechet.subset_size(5000, 3000), frechet.subset_size(300, 80)) == (1000, 40)


# ---------------------------------------------------------------------------------------------------- intervals


def test_bootstrap_interval_of_a_mean_covers_it_in_about_95_of_100_cases() -> None:
    rng = np.random.default_rng(0)
    estimates = [frechet.mean_estimate(rng.exponential(size=60), resamples=100, seed=n) for n in range(150)]
    covered = np.mean([estimate.low <= 1.0 <= estimate.high for estimate in estimates])
    assert 0.87 < covered < 0.99
    assert all(estimate.low < estimate.value < estimate.high for estimate in estimates)


@pytest.mark.parametrize(("measure", "resamples"), [("frechet", 100), ("kernel", 200)])
def test_bootstrap_interval_of_a_distance_covers_what_so_many_clips_give_on_average(
    measure: str, resamples: int
) -> None:
    rng = np.random.default_rng(0)
    estimates = []
    for number in range(80):
        first, second = rng.standard_normal((50, 3)), 1.3 * rng.standard_normal((50, 3)) + 0.4
        if measure == "kernel":
            statistic: Any = frechet.KernelDistance(first, second)
        else:

            def statistic(a: Any, b: Any, first: Array = first, second: Array = second) -> float:
                return frechet.frechet_distance(first, second, a, b)

        estimates.append(frechet.bootstrap(statistic, (50, 50), resamples, seed=number))
    expected = np.mean([estimate.value for estimate in estimates])
    covered = np.mean([estimate.low <= expected <= estimate.high for estimate in estimates])
    assert covered > 0.85
    width = np.mean([estimate.high - estimate.low for estimate in estimates])
    spread = 2 * 1.96 * np.std([estimate.value for estimate in estimates])
    assert 0.6 < width / spread < 1.6  # not by being wide


def test_interval_lies_around_the_figure_also_where_repeated_clips_move_the_distance() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((20, 40)), rng.standard_normal((20, 40))
    found = frechet.bootstrap(lambda a, b: frechet.frechet_distance(first, second, a, b), (20, 20), resamples=60)
    repeated = frechet.frechet_distance(first, second, rng.multinomial(20, np.full(20, 0.05)), np.ones(20, np.int64))
    assert found.value == frechet.frechet_distance(first, second) < repeated
    assert found.low < found.value < found.high


def test_bootstrap_hangs_on_its_seed_alone() -> None:
    values = np.random.default_rng(0).standard_normal(30)
    first, again, other = (frechet.mean_estimate(values, 50, seed) for seed in (1, 1, 2))
    assert first == again and first.value == other.value and first.low != other.low
    with pytest.raises(ConfigurationError, match="resamples"):
        frechet.mean_estimate(values, resamples=3)
    with pytest.raises(DataError):
        frechet.mean_estimate([1.0])


def test_interval_of_a_share_is_that_of_wilson_and_has_a_width_at_the_ends() -> None:
    eight, none, all_of_them = (frechet.share_estimate(hits, 10) for hits in (8, 0, 10))
    assert (eight.value, eight.low, eight.high) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    assert (none.low, none.high) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert (all_of_them.low, all_of_them.high) == pytest.approx((0.7225, 1.0), abs=1e-4)
    with pytest.raises(DataError):
        frechet.share_estimate(0, 0)


# ---------------------------------------------------------------------------------------------------- clips


def noise(seed: int, seconds: float = 0.12) -> npt.NDArray[np.float32]:
    return (0.1 * np.random.default_rng(seed).standard_normal(round(RATE * seconds))).astype(np.float32)


def tone(seed: int, seconds: float = 0.12, hertz: float = 440.0) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    time = np.arange(round(RATE * seconds)) / RATE
    return (rng.uniform(0.2, 0.4) * np.sin(2 * np.pi * hertz * time + rng.uniform(0, 6))).astype(np.float32)


def write(path: Path, audio: npt.NDArray[np.floating], **labels: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, audio, RATE, subtype="FLOAT")
    if labels:
        path.with_suffix(".json").write_text(json.dumps(labels))


def real_folder(folder: Path, count: int, first_seed: int = 0) -> Path:
    """Tones and noises in turn, with labels and captions."""
    for number in range(count):
        seed, kind = first_seed + number, "tone" if number % 2 else "noise"
        audio = tone(seed) if kind == "tone" else noise(seed)
        write(folder / f"{number:02}.wav", audio, labels={"kind": kind}, caption=f"a {kind}")
    return folder


def test_damaged_nan_and_silent_clips_are_told_apart_and_named(tmp_path: Path) -> None:
    write(tmp_path / "good.wav", tone(0))
    write(tmp_path / "silent.wav", 1e-4 * tone(0))
    write(tmp_path / "nan.wav", np.array([0.1, np.nan, 0.2] * 500))
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    found = ClipSet("set", [tmp_path])
    assert set(found.failures) == {"nan.wav", "broken.wav"} and "NaN" in found.failures["nan.wav"]
    assert set(found.usable) == {"good.wav", "silent.wav"}
    assert [facts.key for facts in found.clips.values() if facts.silent] == ["silent.wav"]
    assert found.clips["good.wav"].seconds == pytest.approx(0.12)
    only_bad = ClipSet("bad", [tmp_path / "nan.wav"])
    assert not only_bad.usable and only_bad.clips


def test_the_list_of_generated_clips_goes_before_their_json_files(tmp_path: Path) -> None:
    write(tmp_path / "sub" / "a.wav", tone(0), text="old", labels={"kind": "noise", "pitch": 60})
    write(tmp_path / "b.wav", tone(1), caption=["first", "second"])
    rows = [
        {"file": "sub/a.wav", "text": "ein Ton, C4", "seed": 3, "kind": "tone", "reference": "real-7"},
        {"file": "gone.wav", "text": "lines\n\r\u2028\x85 and half a character \ud800"},
    ]
    assert read_manifest(write_manifest(tmp_path, rows).parent) == {row["file"]: row for row in rows}
    found = ClipSet("set", [tmp_path])
    first, second = found.clips["sub/a.wav"], found.clips["b.wav"]
    assert (first.text, first.label("kind"), first.label("pitch"), first.pair) == (
        "ein Ton, C4",
        "tone",
        "60",
        "real-7",
    )
    assert (second.text, second.label("kind"), second.pair) == ("first", None, "b")
    assert "not there" in found.failures["gone.wav"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "no JSON"),
        ("[1]", '"file"'),
        ('{"text": "a"}', '"file"'),
        ('{"file": "a"}\n\n{"file": "a"}', "line 3.*twice"),
    ],
)
def test_a_broken_list_is_named_with_its_line(tmp_path: Path, text: str, reason: str) -> None:
    write(tmp_path / "a.wav", tone(0))
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(DataError, match=reason):
        ClipSet("set", [tmp_path])


def test_pairs_by_name_over_folders_and_shards(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "real.tar", "w") as archive:
        for key in ("one", "two"):
            for suffix, data in (("json", json.dumps({"labels": {"kind": key}}).encode()), ("flac", flac(tone(0)))):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    for name in ("one.wav", "two.reconstructed.wav", "three.wav"):
        write(tmp_path / "made" / name, tone(1))
    write_manifest(tmp_path / "made", [{"file": "three.wav", "reference": "one.flac"}])
    real, made = ClipSet("real", [tmp_path / "real.tar"]), ClipSet("made", [tmp_path / "made"])
    expected = {("one.wav", "one"), ("two.reconstructed.wav", "two"), ("three.wav", "one")}
    assert set(pairs(made, real)) == expected
    assert real.clips["two"].label("kind") == "two"


def flac(audio: npt.NDArray[np.floating]) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, audio, RATE, format="FLAC")
    return file.getvalue()


def test_clips_of_equal_names_in_two_sources_stay_apart(tmp_path: Path) -> None:
    for folder, seed in (("a", 0), ("b", 1)):
        write(tmp_path / folder / "x.wav", tone(seed))
    both = ClipSet("both", [tmp_path / "a", tmp_path / "b"])
    assert len(both.clips) == 2 and len({facts.digest for facts in both.clips.values()}) == 2
    assert len(list(both.examples(both.usable))) == 2


# ---------------------------------------------------------------------------------------------------- embeddings


def onnx_file(path: Path, rank: int = 2, **metadata: str) -> Path:
    """A network that gives the mean and the maximum of a waveform."""
    onnx = pytest.importorskip("onnx")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [
        helper.make_node("ReduceMean", ["audio"], ["mean"], axes=[1], keepdims=1),
        helper.make_node("ReduceMax", ["audio"], ["most"], axes=[1], keepdims=1),
        helper.make_node("Concat", ["mean", "most"], ["embedding"], axis=1),
    ]
    inputs = [helper.make_tensor_value_info("audio", kind, [1, "samples", 1][:rank])]
    outputs = [helper.make_tensor_value_info("embedding", kind, [None] * rank)]
    model = helper.make_model(
        helper.make_graph(nodes, "embedding", inputs, outputs),
        opset_imports=[helper.make_opsetid("", 13)],
        ir_version=8,
    )
    helper.set_model_props(model, metadata)
    onnx.save(model, path)
    return path


def test_an_onnx_file_embeds_at_its_own_rate_and_short_clips_with_silence(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    clip = np.full(RATE // 2, 0.5, np.float32)
    name, embedder = load_embedding(f"mine={onnx_file(tmp_path / 'a.onnx')}")
    found = embedder([clip, clip[:800]])
    assert name == "mine" and embedder.names == ("a",)
    torch.testing.assert_close(found[0]["a"], torch.tensor([[0.25, 0.5]]))  # half of the second is silent
    torch.testing.assert_close(found[1]["a"], torch.tensor([[0.025, 0.5]]))
    slow = OnnxEmbedder(onnx_file(tmp_path / "b.onnx", sampling_rate="8000"))
    assert slow.rate == 8000 and slow.identity != embedder.identity
    assert slow([clip])[0]["b"][0, 0].item() == pytest.approx(0.25, abs=0.01)


def test_onnx_files_that_are_no_embedding_are_named(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "text.onnx").write_text("no")
    for path, reason in (
        (tmp_path / "absent.onnx", "no such file"),
        (tmp_path / "text.onnx", "loaded"),
        (onnx_file(tmp_path / "rank.onnx", rank=3), "float32 input"),
        (onnx_file(tmp_path / "rate.onnx", sampling_rate="fast"), "sampling_rate"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            OnnxEmbedder(path)


def clap_folder(folder: Path) -> Path:
    """A CLAP model of a tiny random network, windows of half a second."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 1, "<unk>": 3, "a": 4, "tone": 5, "noise": 6}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    ClapFeatureExtractor(
        feature_size=16, sampling_rate=RATE, hop_length=160, max_length_s=1, fft_window_size=512,
        frequency_max=8000, truncation="rand_trunc",
    ).save_pretrained(folder)  # fmt: skip
    text = {
        "vocab_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
        "max_position_embeddings": 12, "projection_dim": 8,
    }  # fmt: skip
    audio = {
        "spec_size": 64, "num_mel_bins": 16, "window_size": 4, "patch_size": 4, "patch_stride": [4, 4],
        "patch_embeds_hidden_size": 8, "depths": [1, 1], "num_attention_heads": [1, 2], "num_hidden_layers": 2,
        "hidden_size": 16, "projection_dim": 8, "enable_fusion": False,
    }  # fmt: skip
    torch.manual_seed(0)
    ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=8)).save_pretrained(folder)
    return folder


def test_clap_gives_unit_vectors_and_the_same_ones_for_long_clips_each_time(tmp_path: Path) -> None:
    name, embedder = load_embedding(f"mine={clap_folder(tmp_path)}", "cpu")
    assert name == "mine" and isinstance(embedder, ClapEmbedder)
    long = noise(0, 2.6)
    first, again = embedder([long])[0]["clap"], embedder([long])[0]["clap"]
    assert first.shape == (3, 8) and torch.equal(first, again)
    torch.testing.assert_close(first[1], embedder([long[RATE : 2 * RATE]])[0]["clap"][0])
    assert embedder([long[: RATE + 100]])[0]["clap"].shape == (1, 8)  # a rest of 100 samples is no window
    texts = embedder.texts(["a tone", "a noise", "a tone " * 50])
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(first.norm(dim=1), torch.ones(3))
    assert not torch.allclose(texts[0], texts[1], atol=1e-4)
    with pytest.raises(CheckpointError, match="no folder"):
        ClapEmbedder(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no CLAP model"):
        ClapEmbedder(tmp_path / "empty")


@pytest.mark.parametrize("text", ["unknown", "=folder", "name="])
def test_an_embedding_that_is_not_known_is_named(text: str) -> None:
    with pytest.raises(ConfigurationError, match="NAME=PATH"):
        load_embedding(text)


# ---------------------------------------------------------------------------------------------------- judges


def test_a_classifier_tells_what_it_learnt_and_its_divergence_is_that_of_the_posteriors(tmp_path: Path) -> None:
    entropy = pytest.importorskip("scipy.stats").entropy
    data = ClipSet("data", [real_folder(tmp_path, 24)])
    direction = torch.tensor([1.0, -1.0, 0.5, 0.0])
    means = {
        key: (2.0 if facts.label("kind") == "tone" else -2.0) * direction + 0.3 * torch.randn(4)
        for key, facts in data.clips.items()
    }
    judged = {("made", "up"): 2 * direction, ("real", "up"): 2 * direction, ("real", "down"): -direction}
    first, again = (train_classifier("kind", data, means, judged, seed=1) for _ in range(2))
    assert first.classes == ("noise", "tone") and first.selection > 0.9
    assert first.says(("made", "up"), "tone") and first.says(("real", "down"), "noise")
    assert all(torch.equal(first.log_posteriors[key], again.log_posteriors[key]) for key in judged)
    p, q = (first.log_posteriors[clip].exp().numpy() for clip in (("real", "down"), ("made", "up")))
    assert p.sum() == pytest.approx(1.0)
    assert first.divergence(("real", "down"), ("made", "up")) == pytest.approx(entropy(p, q), rel=1e-9)
    assert first.divergence(("real", "up"), ("made", "up")) == pytest.approx(0.0, abs=1e-12)


def test_clips_from_which_nothing_can_be_learnt_are_named(tmp_path: Path) -> None:
    data = ClipSet("data", [real_folder(tmp_path, 6)])
    means = {key: torch.randn(4) for key in data.clips}
    judged = {("made", "x"): torch.zeros(4)}
    with pytest.raises(DataError, match="has the label 'drum'"):
        train_classifier("drum", data, means, judged, 0)
    with pytest.raises(DataError, match="single class"):
        train_classifier("kind", data, {key: means[key] for key in list(means)[::2]}, judged, 0)
    with pytest.raises(DataError, match="single clip"):
        train_classifier("kind", data, {key: means[key] for key in list(means)[:2]}, judged, 0)


def test_a_note_is_right_within_half_a_semitone_and_octaves_are_told() -> None:
    cases = [(60.0, 60.4), (60.0, 59.6), (60.0, 60.6), (60.0, 71.8), (60.0, 48.2), (60.0, 66.0), (60.0, None)]
    notes = [Pitched("key", asked, found) for asked, found in cases]
    assert [note.right for note in notes] == [True, True, False, False, False, False, False]
    assert [note.right_but_octave for note in notes] == [True, True, False, True, True, False, False]


def test_notes_are_heard_and_silence_is_none(tmp_path: Path) -> None:
    pytest.importorskip("librosa")
    for note in (45, 69):
        assert heard_note(tone(0, 0.4, 440 * 2 ** ((note - 69) / 12))) == pytest.approx(note, abs=0.2)
    assert heard_note(np.zeros(6400, np.float32)) is None


def test_clips_without_sound_are_wrong_notes_and_a_note_must_be_a_number(tmp_path: Path) -> None:
    write(tmp_path / "silent.wav", np.zeros(1600), labels={"pitch": 60})
    write(tmp_path / "nan.wav", np.full(1600, np.nan), labels={"pitch": 61})
    found = list(pitched_clips(ClipSet("set", [tmp_path]), "pitch"))
    assert sorted((note.key, note.asked, note.found) for note in found) == [
        ("nan.wav", 61, None),
        ("silent.wav", 60, None),
    ]
    assert list(pitched_clips(ClipSet("set", [tmp_path]), "drum")) == []
    write(tmp_path / "word.wav", tone(0), labels={"pitch": "C4"})
    with pytest.raises(DataError, match="'C4' is no MIDI note"):
        list(pitched_clips(ClipSet("set", [tmp_path]), "pitch"))


# ---------------------------------------------------------------------------------------------------- the command


def table(report: dict[str, Any], beginning: str) -> dict[str, dict[str, Any]]:
    """Rows of a table by set, cells by column; the ends of a second interval overwrite those of the first."""
    found = next(item for item in report["tables"] if item["caption"].startswith(beginning))
    return {row[0]: dict(zip(found["columns"], row, strict=True)) for row in found["rows"]}


def run(tmp_path: Path, *words: str) -> tuple[int, dict[str, Any]]:
    path = tmp_path / "report.json"
    options = ["--report", str(path), "--cache", str(tmp_path / "cache"), "--embedding", "log-mel", "--resamples", "20"]
    code = main(["evaluate", "generation", *words, *options])
    return code, json.loads(path.read_text()) if path.is_file() else {}


def test_the_command_on_good_bad_and_broken_clips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real = real_folder(tmp_path / "real", 24)
    data = real_folder(tmp_path / "data", 40, first_seed=100)
    good = real_folder(tmp_path / "good", 24, first_seed=200)  # the same kinds of clips, drawn anew
    rows = []
    for number in range(24):  # always a tone, whatever was asked for
        write(tmp_path / "bad" / f"{number:02}.wav", tone(300 + number))
        rows.append(
            {"file": f"{number:02}.wav", "text": "x", "seed": number, "kind": "tone" if number % 2 else "noise"}
        )
    write(tmp_path / "bad" / "01.wav", np.full(1600, np.nan))
    write(tmp_path / "bad" / "03.wav", np.zeros(1600))
    write_manifest(tmp_path / "bad", rows)
    code, report = run(
        tmp_path, str(good), str(tmp_path / "bad"), "--reference", str(real), "--classifier-data", str(data),
        "--label", "kind",
    )  # fmt: skip
    assert code == 1 and "bad: 01.wav" in capsys.readouterr().err
    clips = table(report, "Clips")
    assert [clips[name]["silent"] for name in ("good", "bad", "reference")] == [0, 1, 0]
    assert [clips[name]["unusable"] for name in ("good", "bad", "reference")] == [0, 1, 0]
    distance = table(report, "Distance to reference by log-mel")
    assert distance["bad"]["clips"] == 23
    for figure in ("Fréchet", "kernel"):
        assert distance["bad"][figure] > 2 * max(distance["good"][figure], 0.0)
    label = table(report, "Label kind by a probe on log-mel")
    assert label["good"]["accuracy, %"] > 90 and label["reference (real)"]["accuracy, %"] > 90
    # Twelve tones were asked for; the silent one and the one of NaN are wrong whatever they are called.
    assert label["bad"]["clips asked"] == 24 and label["bad"]["accuracy, %"] == pytest.approx(100 * 10 / 24)
    assert label["good"]["KL"] < label["bad"]["KL"] and label["bad"]["pairs"] == 23
    notes = " ".join(report["notes"])
    assert "Silent" in notes and "03.wav" in notes and "unequal size" in notes and "singular" in notes


def test_what_cannot_be_measured_is_missing_with_a_reason(tmp_path: Path) -> None:
    real = real_folder(tmp_path / "real", 24)
    for number in range(5):
        write(tmp_path / "few" / f"other-{number}.wav", tone(number))
    code, report = run(
        tmp_path, str(tmp_path / "few"), "--reference", str(real), "--classifier-data", str(real), "--label", "kind",
        "--pitch", "pitch",
    )  # fmt: skip
    assert code == 0
    distance, label = table(report, "Distance")["few"], table(report, "Label kind")["few"]
    pitch = table(report, "Pitch")["few"]
    assert (distance["Fréchet"], distance["kernel"], label["accuracy, %"], label["KL"]) == ("–",) * 4
    assert pitch["within half a semitone, %"] == "–"
    notes = "\n".join(report["notes"])
    for reason in (
        "Missing: distances by log-mel, few: 5 generated and 24 real clips",
        "Missing: accuracy, kind by log-mel, few: no clip has a known label",
        "Missing: KL, kind by log-mel, few: 0 clips",
        "Missing: pitch, few: no clip has the label 'pitch'",
        "24 clips of reference are in the classifier data, too",
    ):
        assert reason in notes


def test_a_set_has_no_distance_to_itself(tmp_path: Path) -> None:
    real = real_folder(tmp_path / "real", 20)
    shutil.copytree(real, tmp_path / "copy")
    code, report = run(tmp_path, str(tmp_path / "copy"), "--reference", str(real))
    found = table(report, "Distance")["copy"]
    assert code == 0 and abs(found["Fréchet"]) < 1e-6 and found["kernel"] < 0  # its unbiased form takes the clips off


def test_clips_made_anew_under_equal_names_and_sizes_are_embedded_anew(tmp_path: Path) -> None:
    real = real_folder(tmp_path / "real", 20)
    found = []
    for first_seed in (50, 70):
        made = real_folder(tmp_path / "made", 20, first_seed)
        found.append(table(run(tmp_path, str(made), "--reference", str(real))[1], "Distance")["made"]["Fréchet"])
    assert found[0] != found[1]


def test_the_text_score_counts_the_clips_that_have_a_text(tmp_path: Path) -> None:
    clap = ClapEmbedder(clap_folder(tmp_path / "clap"), "cpu")
    real = ClipSet("real", [real_folder(tmp_path / "real", 20)])
    for number in range(20):
        write(tmp_path / "made" / f"{number}.wav", tone(number))
    made = ClipSet("made", [tmp_path / "made"])
    store = EmbeddingStore(tmp_path / "cache", progress=False)
    outcome = evaluate_generation([made], real, [], store, Questions(clap=clap, resamples=20))
    rows = {row[0]: row[1:] for row in outcome.tables[-1].rows}
    means = store.load(clap, real.split())["clap"]
    texts = clap.texts(["a tone" if int(key[:2]) % 2 else "a noise" for key in means.keys])
    expected = torch.nn.functional.cosine_similarity(means.means, texts).mean().item()
    count, score, low, high = rows["real (real)"]
    assert count == 20 and score == pytest.approx(expected, abs=1e-6) and float(low) < float(score) < float(high)
    assert rows["made"] == [0, "–", "–", "–"] and any("0 clips have a text" in note for note in outcome.notes)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--label", "kind"], "belong together"),
        (["--embedding", "what"], "NAME=PATH"),
        (["--embedding", "log-mel"], "two embeddings"),
        (["--resamples", "3"], "resamples"),
    ],
)
def test_options_that_make_no_sense_are_wrong_usage(
    tmp_path: Path, words: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    real = real_folder(tmp_path / "real", 2)
    given = ["evaluate", "generation", str(real), "--reference", str(real), "--embedding", "log-mel", *words]
    assert main(given) == 2 and reason in capsys.readouterr().err


def test_two_sets_of_one_name_are_refused(tmp_path: Path) -> None:
    clips = ClipSet("same", [real_folder(tmp_path / "real", 2)])
    with pytest.raises(ConfigurationError, match="two sets"):
        evaluate_generation([clips], clips, [("log-mel", LogMelEmbedder())], EmbeddingStore(tmp_path), Questions())
