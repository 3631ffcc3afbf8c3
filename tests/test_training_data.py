"""Training data: shards and folders, broken members, the semantic cache, and the order of crops."""

from __future__ import annotations

import io
import json
import tarfile
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor, nn

from dasheng_tokenizer import DashengTokenizerModel
from dasheng_tokenizer.errors import ConfigurationError, DataError
from dasheng_tokenizer.spectral import with_context
from dasheng_tokenizer.training.clips import FILES_PER_SHARD, SkipReport, find_shards, read_clips
from dasheng_tokenizer.training.data import Batch, CachedCrops, DataConfig, prepare_cache, validation_clips
from dasheng_tokenizer.training.semantic_cache import (
    MAX_TOKENS,
    SemanticCache,
    crop_with_context,
    semantic_hash,
    to_int16,
    view_gains,
)
from dasheng_tokenizer.training.streaming import StreamedCrops

Members = dict[str, bytes]


def waveform(seconds: float, seed: int, rate: int = 16_000) -> np.ndarray:
    return (0.2 * np.random.default_rng(seed).standard_normal(round(seconds * rate))).astype(np.float32)


def encoded(audio: np.ndarray, kind: str = "flac", rate: int = 16_000) -> bytes:
    file = io.BytesIO()
    if kind == "opus":
        soundfile.write(file, audio, rate, format="OGG", subtype="OPUS")
    else:
        soundfile.write(file, audio, rate, format=kind.upper())
    return file.getvalue()


def write_tar(path: Path, members: Members) -> str:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def clips_of(prefix: str, durations: Sequence[float], domain: str = "speech") -> Members:
    members: Members = {}
    for i, seconds in enumerate(durations):
        members[f"{prefix}-{i}.flac"] = encoded(waveform(seconds, seed=i + 100 * len(prefix)))
        members[f"{prefix}-{i}.json"] = json.dumps({"domain": domain}).encode()
    return members


class StandIn:
    """As much of a tokenizer as the cache needs: an embedding that depends on every sample of its token."""

    def __init__(self, seed: int = 0, fail_at: int | None = None) -> None:
        torch.manual_seed(seed)
        self.semantic_encoder: nn.Module = nn.Linear(640, 6)
        self.calls, self.fail_at = 0, fail_at

    def encode_features(self, context_audio: Tensor) -> Tensor:
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        self.calls += 1
        tokens: Tensor = self.semantic_encoder(context_audio[:, 512:-512].unflatten(-1, (-1, 640)))
        return tokens


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    """Two shards, 8 clips, of which one is shorter than the crop of 0.4 s."""
    first = write_tar(tmp_path / "a-train-0.tar", clips_of("a", [0.5, 1.3, 0.1, 0.81]))
    second = write_tar(tmp_path / "b-train-0.tar", clips_of("bb", [0.4, 0.9, 2.0, 0.66]))
    return DataConfig(train=[first, second], crop_seconds=0.4, batch_size=4, cache=str(tmp_path / "cache"))


def equal(one: Batch, other: Batch) -> bool:
    same = torch.equal(one.audio, other.audio)
    if one.features is None or other.features is None:
        return same and one.features is other.features
    return same and torch.equal(one.features, other.features)


# ---------------------------------------------------------------------------------------------------- reading clips


def test_every_format_gives_mono_16_khz_of_exact_length(tmp_path: Path) -> None:
    stereo = np.stack([waveform(0.5, 1, 44_100), waveform(0.5, 2, 44_100)], axis=1)
    members = {
        "flac.flac": encoded(waveform(0.5, 0)),
        "opus.opus": encoded(waveform(0.7312, 0), "opus"),
        "mp3.mp3": encoded(waveform(0.5, 0, 48_000), "mp3", 48_000),
        "stereo.wav": encoded(stereo, "wav", 44_100),
    }
    clips = {clip.key: clip.audio for clip in read_clips([write_tar(tmp_path / "x.tar", members)])}
    assert {key: len(audio) for key, audio in clips.items()} == {
        "flac": 8000, "opus": 11_699, "mp3": 8000, "stereo": 8000,
    }  # fmt: skip
    assert all(audio.dtype == np.float32 and audio.ndim == 1 for audio in clips.values())
    np.testing.assert_allclose(clips["flac"], waveform(0.5, 0), atol=1e-4)


def test_folders_globs_ranges_and_tars_hold_the_same_clips(tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    (folder / "deep").mkdir(parents=True)
    (folder / "one.wav").write_bytes(encoded(waveform(0.2, 0), "wav"))
    (folder / "one.json").write_text('{"domain": "music"}')
    (folder / "deep" / "two.flac").write_bytes(encoded(waveform(0.3, 1)))
    (folder / "notes.txt").write_text("no audio")
    clips = list(read_clips([str(folder)]))
    assert [(clip.key, clip.domain, len(clip.audio)) for clip in clips] == [
        ("deep/two.flac", "audio", 4800), ("one.wav", "music", 3200),
    ]  # fmt: skip
    for k in range(3):
        write_tar(tmp_path / f"train-{k:03}.tar", clips_of(f"k{k}", [0.1]))
    for source in ("train-{000..002}.tar", "train-*.tar"):
        assert [clip.key for clip in read_clips([str(tmp_path / source)])] == ["k0-0", "k1-0", "k2-0"]
    assert len(find_shards([str(tmp_path / "train-*.tar"), str(tmp_path / "train-001.tar")])) == 3  # each once


def test_large_folders_are_cut_into_parts(tmp_path: Path) -> None:
    for k in range(FILES_PER_SHARD + 1):
        (tmp_path / f"{k:04}.wav").touch()
    assert [len(shard.files) for shard in find_shards([str(tmp_path)])] == [FILES_PER_SHARD, 1]


def test_a_dot_in_a_name_loses_no_clip(tmp_path: Path) -> None:
    members = {f"take.{k}.flac": encoded(waveform(0.1, k)) for k in range(3)}
    assert [clip.key for clip in read_clips([write_tar(tmp_path / "x.tar", members)])] == ["take.0", "take.1", "take.2"]


def test_broken_members_are_counted_and_named(tmp_path: Path) -> None:
    nan = io.BytesIO()
    soundfile.write(nan, np.full(800, np.nan, dtype=np.float32), 16_000, format="WAV", subtype="FLOAT")
    members = {
        "bad.flac": b"this is text",
        "empty.wav": b"",
        "cut.flac": encoded(waveform(1.0, 0))[:5000],
        "good.flac": encoded(waveform(0.1, 0)),
        "good.json": b"{not json",
        "nan.wav": nan.getvalue(),
    }
    report = SkipReport()
    clips = list(read_clips([write_tar(tmp_path / "x.tar", members)], report))
    assert [clip.key for clip in clips] == ["good"] and clips[0].labels == {}
    assert set(report.skipped) == {"bad", "empty", "cut", "nan", "good.json"}
    assert "5 left out: bad (" in report.summary() and all(report.skipped.values())


def test_a_broken_shard_costs_only_itself(tmp_path: Path) -> None:
    good = write_tar(tmp_path / "good.tar", clips_of("g", [0.1]))
    cut = write_tar(tmp_path / "cut.tar", clips_of("c", [0.5, 0.5, 0.5]))
    Path(cut).write_bytes(Path(cut).read_bytes()[:30_000])
    text = tmp_path / "text.tar"
    text.write_text("no tar at all, " * 100)
    report = SkipReport()
    keys = [clip.key for clip in read_clips([cut, str(text), good], report)]
    assert keys == ["c-0", "g-0"]  # what comes before the cut is kept
    assert set(report.skipped) == {cut, str(text)}


def test_nothing_usable_is_an_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data.train"):
        find_shards([])
    with pytest.raises(DataError, match="matches nothing"):
        find_shards([str(tmp_path / "*.tar")])
    with pytest.raises(DataError, match="no audio files"):
        find_shards([str(tmp_path)])
    with pytest.raises(DataError, match="bad"):
        list(read_clips([write_tar(tmp_path / "x.tar", {"bad.flac": b"text"})]))
    with pytest.raises(DataError, match="no audio"):
        list(read_clips([write_tar(tmp_path / "y.tar", {"only.json": b"{}"})]))


# ---------------------------------------------------------------------------------------------------- the cache


@pytest.mark.parametrize("samples", [1, 300, 512, 513, 700, 5000])
def test_crop_context_equals_that_of_the_whole_clip(samples: int) -> None:
    audio = waveform(samples / 16_000, 0)
    whole = with_context(torch.from_numpy(audio)[None], 8)[0].numpy()
    for start, tokens in ((0, 8), (0, 2), (1, 3), (5, 3)):
        crop = crop_with_context(audio, start, tokens)
        np.testing.assert_array_equal(crop, whole[640 * start : 640 * (start + tokens) + 1024])


def test_cached_embeddings_equal_online_ones(config: DataConfig, tiny_model: DashengTokenizerModel) -> None:
    config = replace(config, gain_db=(-24.0, -20.0))  # far enough from 0 that a mixed-up view shows
    cache = prepare_cache(tiny_model, config, progress=False)
    originals = {clip.key: clip.audio for clip in read_clips(config.train)}
    assert sorted(cache.keys) == sorted(originals) and cache.gains.shape == (8, 2)
    for i, key in enumerate(cache.keys):
        np.testing.assert_allclose(cache.audio(i) / 32767, originals[key], atol=2e-5)
        padded = np.pad(originals[key], (0, max(0, 6400 - len(originals[key]))))  # to the length of a crop
        assert np.abs(cache.semantic(i, 0) - cache.semantic(i, 1)).max() > 0.03
        for view in range(2):
            online = tiny_model(torch.from_numpy(padded * cache.gains[i, view])[None]).semantic[0]
            np.testing.assert_allclose(cache.semantic(i, view), online.detach().numpy(), atol=2e-3, rtol=2e-3)


def test_a_damaged_header_in_the_middle_of_a_shard_is_noted(tmp_path: Path) -> None:
    """Python's reader of tar files ends there without a word."""
    path = Path(write_tar(tmp_path / "a.tar", clips_of("a", [0.3, 0.4, 0.5])))
    with tarfile.open(path) as archive:
        header = archive.getmembers()[2].offset
    data = bytearray(path.read_bytes())
    data[header : header + 512] = bytes([7]) * 512
    path.write_bytes(data)
    report = SkipReport()
    assert [clip.key for clip in read_clips([path], report)] == ["a-0"]
    assert "the rest of it is left out" in report.skipped[str(path)]


def test_batches_hold_the_audio_that_the_embedding_is_of(config: DataConfig) -> None:
    model = StandIn()
    crops = CachedCrops(prepare_cache(model, config, progress=False), config)
    seen = set()
    for step in range(6):
        batch = crops.crops_for_step(step)
        assert batch.audio.shape == (4, 512 + 6400 + 512) and batch.target.shape == (4, 6400)
        assert batch.audio.dtype == batch.features.dtype == torch.float32
        torch.testing.assert_close(model.encode_features(batch.audio), batch.features, atol=2e-3, rtol=2e-3)
        seen.update(batch.audio[:, 600].tolist())
    assert len(seen) > 12  # starts and loudness vary


def test_views_never_clip_and_hang_on_key_and_seed() -> None:
    config = DataConfig(views=50, gain_db=(-12.0, 6.0))
    gains = np.array(view_gains("k", 0.8, config))
    assert gains[0] == 1.0 and gains.max() == pytest.approx(1 / 0.8) and gains.min() >= 10 ** (-12 / 20)
    assert gains.std() > 0.1
    assert view_gains("k", 0.8, config) == gains.tolist() != view_gains("other", 0.8, config)
    assert view_gains("k", 0.8, DataConfig(views=50, seed=1)) != gains.tolist()
    assert np.isfinite(view_gains("silence", 0.0, config)).all()


def test_overshoot_is_scaled_not_clipped() -> None:
    audio = np.array([0.5, -1.25, 1.0], dtype=np.float32)
    np.testing.assert_array_equal(to_int16(audio), np.rint(audio / 1.25 * 32767))
    np.testing.assert_array_equal(to_int16(audio[:1]), np.rint(audio[:1] * 32767))


def test_long_clips_are_embedded_in_pieces(tmp_path: Path) -> None:
    train = [write_tar(tmp_path / "x.tar", {"long.flac": encoded(waveform(61.0, 0))})]
    cache = prepare_cache(StandIn(), DataConfig(train=train, cache=str(tmp_path / "c")), progress=False)
    assert cache.num_tokens.tolist() == [MAX_TOKENS, MAX_TOKENS, 25]
    joined = np.concatenate([cache.audio(i) for i in range(3)])
    np.testing.assert_array_equal(joined, to_int16(next(read_clips(train)).audio))


def test_killed_preparation_resumes_without_repetition(config: DataConfig) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepare_cache(StandIn(fail_at=6), config, progress=False)  # in the second part
    second = StandIn()
    cache = prepare_cache(second, config, progress=False)
    assert second.calls == 4 and len(cache) == 8
    third = StandIn()
    again = prepare_cache(third, config, progress=False)
    assert third.calls == 0
    assert again.keys == cache.keys
    leftovers = [path.name for path in cache.folder.iterdir() if path.name.startswith(".")]
    assert not leftovers


def test_added_data_costs_only_itself(config: DataConfig, tmp_path: Path) -> None:
    prepare_cache(StandIn(), config, progress=False)
    extra = write_tar(tmp_path / "c.tar", clips_of("ccc", [0.5]))
    model = StandIn()
    more = DataConfig(train=[extra, *config.train], crop_seconds=0.4, cache=config.cache)
    assert len(prepare_cache(model, more, progress=False)) == 9
    assert model.calls == 1


def test_changed_shard_of_equal_name_and_size_is_noticed(config: DataConfig) -> None:
    prepare_cache(StandIn(), config, progress=False)
    path = Path(config.train[0])
    size = path.stat().st_size
    write_tar(path, clips_of("z", [0.5, 1.3, 0.1, 0.81]))
    with path.open("r+b") as file:
        file.truncate(size)
    cache = prepare_cache(StandIn(), config, progress=False)
    assert "z-0" in cache.keys and "a-0" not in cache.keys


def test_several_processes_share_the_work(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def waiting(_: float) -> None:
        raise TimeoutError

    monkeypatch.setattr("dasheng_tokenizer.training.semantic_cache.time.sleep", waiting)
    models = [StandIn(), StandIn()]
    with pytest.raises(TimeoutError):  # its own part done, it waits for the other
        prepare_cache(models[1], config, progress=False, rank=1, world_size=2)
    cache = prepare_cache(models[0], config, progress=False, rank=0, world_size=2)
    assert (models[0].calls, models[1].calls, len(cache)) == (4, 4, 8)


def test_foreign_cache_is_refused(config: DataConfig) -> None:
    cache = prepare_cache(StandIn(), config, progress=False)
    other = StandIn(seed=1)
    assert semantic_hash(other) != semantic_hash(StandIn())
    assert len(SemanticCache(cache.folder, StandIn())) == 8
    with pytest.raises(DataError, match="another semantic encoder"):
        SemanticCache(cache.folder, other)
    own = prepare_cache(other, config, progress=False)
    assert own.folder != cache.folder and not np.array_equal(own.semantic(0, 0), cache.semantic(0, 0))
    (own.folder / "index.json").write_text((cache.folder / "index.json").read_text())
    with pytest.raises(DataError, match="another model"):
        prepare_cache(other, config, progress=False)


def test_damaged_cache_is_refused(config: DataConfig) -> None:
    folder = prepare_cache(StandIn(), config, progress=False).folder
    part = next(folder.glob("*.semantic"))
    part.write_bytes(part.read_bytes()[:-2])
    with pytest.raises(DataError, match="prepare it again"):
        SemanticCache(folder)


def test_cache_remembers_what_was_left_out(tmp_path: Path) -> None:
    bad = write_tar(tmp_path / "x.tar", {"bad.flac": b"text"})
    config = DataConfig(train=[bad], cache=str(tmp_path / "c"))
    for _ in range(2):
        with pytest.raises(DataError, match="bad"):
            prepare_cache(StandIn(), config, progress=False)
    good = write_tar(tmp_path / "y.tar", clips_of("g", [0.2]))
    cache = prepare_cache(StandIn(), DataConfig(train=[bad, good], cache=str(tmp_path / "c")), progress=False)
    assert cache.keys == ["g-0"] and list(cache.skipped) == ["bad"]


# ---------------------------------------------------------------------------------------------------- order of crops


@pytest.fixture
def cache(config: DataConfig) -> SemanticCache:
    return prepare_cache(StandIn(), config, progress=False)


def test_a_step_is_a_pure_function(cache: SemanticCache, config: DataConfig) -> None:
    forward, backward = CachedCrops(cache, config, seed=3), CachedCrops(cache, config, seed=3)
    steps = {step: backward.crops_for_step(step) for step in reversed(range(12))}
    assert all(equal(forward.crops_for_step(step), steps[step]) for step in range(12))
    assert all(equal(batch, steps[5 + k]) for k, batch in enumerate(forward.batches(5, 7)))
    assert not equal(CachedCrops(cache, config, seed=4).crops_for_step(0), steps[0])


def test_two_ranks_together_equal_one(cache: SemanticCache, config: DataConfig) -> None:
    one = CachedCrops(cache, config)
    two = [CachedCrops(cache, config, rank=rank, world_size=2) for rank in range(2)]
    for step in range(5):
        parts = [crops.crops_for_step(step) for crops in two]
        joined = Batch(torch.cat([p.audio for p in parts]), torch.cat([p.features for p in parts]))
        assert equal(joined, one.crops_for_step(step))
    with pytest.raises(ConfigurationError, match="multiple of the 3"):
        CachedCrops(cache, config, rank=0, world_size=3)


def test_an_epoch_visits_each_clip_by_its_length(cache: SemanticCache, config: DataConfig) -> None:
    crops = CachedCrops(cache, config, seed=1)
    places = round(crops.steps_per_epoch * config.batch_size)
    orders = [crops._epoch_order(epoch) for epoch in range(2)]
    expected = {i: -(-int(samples) // 6400) for i, samples in enumerate(cache.num_samples)}
    assert all(Counter(order.tolist()) == expected for order in orders) and sum(expected.values()) == places
    assert orders[0].tolist() != orders[1].tolist()


def test_prefetching_changes_nothing_and_ends(cache: SemanticCache, config: DataConfig) -> None:
    plain, ahead = CachedCrops(cache, config), CachedCrops(cache, replace(config, workers=1))
    assert all(equal(a, b) for a, b in zip(plain.batches(2, 6), ahead.batches(2, 6), strict=True))
    before = threading.active_count()
    batches = ahead.batches(0, 1000)
    next(batches)
    batches.close()
    assert threading.active_count() == before


def test_errors_of_the_prefetching_thread_come_out(cache: SemanticCache, config: DataConfig) -> None:
    crops = CachedCrops(cache, replace(config, workers=1))
    crops.cache._semantic.clear()
    with pytest.raises(IndexError):
        next(crops.batches(0, 1))


# ---------------------------------------------------------------------------------------------------- streaming


def stream_config(tmp_path: Path, shards: int, workers: int = 0) -> DataConfig:
    train = [write_tar(tmp_path / f"s{k}.tar", clips_of("s" * (k + 1), [0.2] * 4)) for k in range(shards)]
    return DataConfig(train=train, crop_seconds=0.2, batch_size=4, views=1, workers=workers, shuffle_clips=3)


def items(batches: list[Batch]) -> list[bytes]:
    return [row.numpy().tobytes() for batch in batches for row in batch.audio]


@pytest.mark.parametrize("shards", [1, 4])
def test_no_clip_twice_in_an_epoch_over_two_ranks(tmp_path: Path, shards: int) -> None:
    config = stream_config(tmp_path, shards)
    ranks = [StreamedCrops(config, rank=rank, world_size=2) for rank in range(2)]
    steps = shards  # 4 clips a shard, 2 a rank and step
    seen = [item for crops in ranks for item in items(list(crops.batches(0, steps)))]
    assert len(set(seen)) == len(seen) == 4 * shards


def test_streaming_resumes_at_any_step(tmp_path: Path) -> None:
    config = stream_config(tmp_path, 3)
    whole = list(StreamedCrops(config, seed=5).batches(0, 8))
    assert all(batch.features is None for batch in whole)
    for start in (1, 3, 5):  # in the middle of an epoch, at its border, in the next
        assert items(list(StreamedCrops(config, seed=5).batches(start, 8 - start))) == items(whole[start:])
    epochs = [set(items(whole[:3])), set(items(whole[3:6]))]
    assert epochs[0] == epochs[1] and items(whole[:3]) != items(whole[3:6])  # the same clips in another order
    assert items(list(StreamedCrops(config, seed=6).batches(0, 8))) != items(whole)


def test_decoding_processes_keep_the_order(tmp_path: Path) -> None:
    config = stream_config(tmp_path, 2, workers=2)
    whole = items(list(StreamedCrops(config).batches(0, 5)))
    assert items(list(StreamedCrops(config).batches(3, 2))) == whole[12:]
    assert len(set(whole[:8])) == 8


def test_streaming_leaves_the_place_of_a_broken_clip_to_silence(tmp_path: Path) -> None:
    members = clips_of("s", [0.2] * 4)
    intact = StreamedCrops(DataConfig([write_tar(tmp_path / "a.tar", members)], crop_seconds=0.2, batch_size=4))
    members["s-2.flac"] = b"text"
    broken = StreamedCrops(DataConfig([write_tar(tmp_path / "b.tar", members)], crop_seconds=0.2, batch_size=4))
    (one,), (other,) = intact.batches(0, 1), broken.batches(0, 1)
    changed = [k for k in range(4) if not torch.equal(one.audio[k], other.audio[k])]
    assert len(changed) == 1 and other.audio[changed[0]].abs().max() == 0
    assert list(broken.report.skipped) == ["s-2"]


def test_streaming_gives_up_where_nothing_is_left(tmp_path: Path) -> None:
    bad = write_tar(tmp_path / "bad.tar", {"bad.flac": b"text"})
    empty = write_tar(tmp_path / "empty.tar", {"only.json": b"{}"})
    with pytest.raises(DataError, match="in a row"):
        list(StreamedCrops(DataConfig([bad])).batches(0, 100))
    with pytest.raises(DataError, match="no clips"):
        list(StreamedCrops(DataConfig([empty])).batches(0, 1))


# ---------------------------------------------------------------------------------------------------- the rest


def test_validation_clips_are_fixed_and_spread_over_domains(tmp_path: Path) -> None:
    speech = write_tar(tmp_path / "s.tar", clips_of("s", [0.1] * 9, "speech"))
    music = write_tar(tmp_path / "m.tar", clips_of("mm", [0.2] * 2, "music"))
    chosen = validation_clips(DataConfig(valid=[speech, music]), 6)
    assert Counter(clip.domain for clip in chosen) == {"music": 2, "speech": 4}
    again = validation_clips(DataConfig(valid=[music, speech]), 6)
    assert [clip.key for clip in again] == [clip.key for clip in chosen]
    other = validation_clips(DataConfig(valid=[speech, music]), 6, seed=1)
    assert [clip.key for clip in other] != [clip.key for clip in chosen]
    assert len(validation_clips(DataConfig(valid=[speech, music]), 100)) == 11
    assert validation_clips(DataConfig(), 6) == []


def test_validation_passes_over_broken_clips(tmp_path: Path) -> None:
    members = clips_of("s", [0.1] * 4)
    members["s-1.flac"] = b"text"
    valid = [write_tar(tmp_path / "s.tar", members)]
    assert [clip.key for clip in validation_clips(DataConfig(valid=valid), 4)] == ["s-0", "s-2", "s-3"]
    with pytest.raises(DataError, match="bad"):
        validation_clips(DataConfig(valid=[write_tar(tmp_path / "b.tar", {"bad.flac": b"text"})]), 4)


def test_batch_moves_to_a_device() -> None:
    batch = Batch(torch.zeros(2, 1664), torch.zeros(2, 1, 3)).to("meta")
    assert batch.audio.is_meta and batch.features is not None and batch.features.is_meta
    assert batch.target.shape == (2, 640)
    assert Batch(torch.zeros(2, 1664), None).to("meta").features is None


@pytest.mark.parametrize(
    "wrong",
    [{"crop_seconds": 0.5}, {"crop_seconds": 0.0}, {"batch_size": 0}, {"views": 0}, {"gain_db": (6.0, 0.0)}],
)
def test_wrong_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=f"data.{next(iter(wrong))}"):
        DataConfig(**wrong)  # type: ignore[arg-type]
