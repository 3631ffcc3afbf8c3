"""Mixtures for the training of an enhancer: exact ratios, honest degradations, and the same for a (seed, index)."""

from __future__ import annotations

import json
import math
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from dasheng_tokenizer.enhancement import rooms as rooms_module
from dasheng_tokenizer.enhancement.clip_store import ClipStore, matches, prepare_clips
from dasheng_tokenizer.enhancement.degradations import CODECS, TELEPHONE, band_limit, clip, code
from dasheng_tokenizer.enhancement.mixture_configuration import MixtureConfig
from dasheng_tokenizer.enhancement.mixtures import Mixtures, active_power, colored_noise, mix
from dasheng_tokenizer.enhancement.rooms import (
    BEFORE,
    RoomBank,
    RoomConfig,
    aligned,
    prepare_rooms,
    reverberate,
    simulate_room,
)
from dasheng_tokenizer.errors import AudioError, ConfigurationError, DataError, OutputError

pytestmark = pytest.mark.usefixtures("one_thread")

RATE = 16_000
SAMPLES = 6400
SPEAKERS = ("ann", "bob", "eve")
QUIET: dict[str, Any] = {
    name: 0.0 for name in ("no_speech", "reverberation", "band_limit", "telephone", "clipping", "codec")
}
PLAIN: dict[str, Any] = {**QUIET, "kinds": {"noise": 1.0}, "gain_db": (0.0, 0.0)}


def tone(hertz: float, samples: int = SAMPLES, amplitude: float = 0.3) -> np.ndarray:
    return (amplitude * np.sin(2 * np.pi * hertz * np.arange(samples) / RATE)).astype(np.float32)


def noise_like(seed: int, samples: int = SAMPLES, amplitude: float = 0.1) -> np.ndarray:
    return (amplitude * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def delay(a: np.ndarray, b: np.ndarray) -> int:
    """Samples that `b` comes later than `a`."""
    size = 1 << (len(a) + len(b)).bit_length()
    best = int(np.argmax(np.fft.irfft(np.fft.rfft(a, size).conj() * np.fft.rfft(b, size), size)))
    return best if best < size // 2 else best - size


def write_clips(folder: Path) -> Path:
    """Speech of three speakers, two clips each; three noises; one piece of music. A speaker's clips share a level."""
    folder.mkdir(parents=True)
    for number, speaker in enumerate(SPEAKERS):
        for take in range(2):
            audio = noise_like(10 * number + take, 4000 + 500 * take, 0.02 * 2**number)
            write_clip(folder / f"{speaker}-{take}", audio, {"domain": "speech", "labels": {"speaker": speaker}})
    for number in range(3):
        write_clip(folder / f"noise-{number}", tone(500 + 100 * number, 3000 + 4000 * number), {"domain": "sound"})
    write_clip(folder / "music", tone(3000, 9000), {"domain": "music"})
    return folder


def write_clip(stem: Path, audio: np.ndarray, labels: dict[str, Any]) -> None:
    soundfile.write(stem.with_suffix(".wav"), audio, RATE, subtype="PCM_16")
    stem.with_suffix(".json").write_text(json.dumps(labels))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ClipStore]:
    folder = tmp_path_factory.mktemp("clips")
    source = write_clips(folder / "data")
    return {
        domain: prepare_clips([str(source)], folder / "cache", {"domain": domain}, progress=False)
        for domain in ("speech", "sound", "music")
    }


@pytest.fixture(scope="module")
def some_rooms() -> RoomBank:
    """Made up, so that most tests need no simulation."""
    rng = np.random.default_rng(0)
    decay = np.exp(-np.arange(3000) / 700)
    return RoomBank([aligned((rng.standard_normal(3000) * decay).astype(np.float32), 0) for _ in range(3)])


def make(clips: dict[str, ClipStore], seed: int = 0, rooms: RoomBank | None = None, **changes: Any) -> Mixtures:
    config = MixtureConfig(**{**PLAIN, **changes})
    return Mixtures(config, SAMPLES, seed, clips["speech"], clips["sound"], clips["music"], rooms)


# ---------------------------------------------------------------------- mixing


@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 12.5])
def test_the_ratio_is_exact(snr_db: float) -> None:
    clean, noise = noise_like(0), noise_like(1, amplitude=0.7)
    clean[2000:4000] = 0  # a pause
    mixed = mix(clean, noise, snr_db)
    added = mixed.astype(np.float64) - clean
    assert 10 * math.log10(active_power(clean) / active_power(added)) == pytest.approx(snr_db, abs=1e-3)
    assert delay(noise, added.astype(np.float32)) == 0
    np.testing.assert_allclose(mix(clean, 0.01 * noise, snr_db), mixed, atol=1e-6)
    assert mixed.dtype == np.float32


def test_active_power_ignores_pauses() -> None:
    speech = tone(1000)
    paused = np.concatenate([np.zeros(32_000, np.float32), speech, np.zeros(64_000, np.float32)])
    assert active_power(paused) == pytest.approx(active_power(speech), rel=1e-6)
    assert active_power(speech) == pytest.approx(0.3**2 / 2, rel=1e-3)
    hiss = paused + noise_like(0, len(paused), 1e-4)  # 66 dB below the tone
    assert active_power(hiss) == pytest.approx(active_power(speech), rel=1e-3)
    assert active_power(np.zeros(100)) == 0 == active_power(np.zeros(0))


def test_silence_has_no_ratio_and_is_added_to() -> None:
    silence, noise = np.zeros(SAMPLES, np.float32), noise_like(0)
    assert np.array_equal(mix(silence, noise, 5.0), noise)
    assert np.array_equal(mix(noise, silence, 5.0), noise)


def test_what_cannot_be_mixed_is_refused() -> None:
    with pytest.raises(AudioError, match="one length"):
        mix(tone(100, 10), tone(100, 11), 0.0)
    with pytest.raises(AudioError, match="finite"):
        mix(tone(100), tone(200), math.nan)


def test_colored_noise_falls_as_it_should() -> None:
    for slope in (-6.0, -3.0, 0.0):
        noise = colored_noise(np.random.default_rng(0), 1 << 16, slope)
        power = np.square(np.abs(np.fft.rfft(noise)))
        hertz = np.fft.rfftfreq(len(noise), 1 / RATE)
        octaves = [power[(hertz >= low) & (hertz < 2 * low)].mean() for low in (200, 400, 800, 1600, 3200)]
        falls = np.diff(10 * np.log10(octaves))
        assert np.abs(falls - slope).max() < 1.0
        assert np.square(noise).mean() == pytest.approx(1, rel=1e-5)


# ---------------------------------------------------------------------- degradations


def test_a_band_limit_keeps_its_band_and_removes_the_rest() -> None:
    inside, below, above = tone(1000), tone(100), tone(6000)
    limited = band_limit(inside + below + above, *TELEPHONE)
    middle = slice(800, -800)  # the ends of a tone are clicks of any frequency
    assert np.abs(limited - inside)[middle].max() < 2e-3
    assert np.abs(band_limit(below + inside, 0.0, 3000.0) - below - inside)[middle].max() < 2e-3
    edge = band_limit(tone(2000), 0.0, 2000.0)
    assert np.abs(edge[middle]).max() == pytest.approx(0.15, rel=0.05)  # 6 dB down
    for low, high in ((-1.0, 100.0), (500.0, 400.0), (0.0, 9000.0)):
        with pytest.raises(ConfigurationError, match="band"):
            band_limit(inside, low, high)


def test_clipping_cuts_what_is_above_the_level_and_nothing_else() -> None:
    audio = noise_like(0)
    clipped = clip(audio, 6.0)
    level = np.abs(audio).max() * 10 ** (-6 / 20)
    assert np.abs(clipped).max() == pytest.approx(level, rel=1e-6)
    quiet = np.abs(audio) < level
    assert np.array_equal(clipped[quiet], audio[quiet]) and not quiet.all()
    assert np.array_equal(clip(audio, 0.0), audio)
    assert not clip(np.zeros(5, np.float32), 3.0).any()
    with pytest.raises(ConfigurationError, match="negative"):
        clip(audio, -1.0)


@pytest.mark.parametrize("codec", CODECS)
def test_a_codec_changes_the_sound_but_neither_length_nor_place(codec: Any) -> None:
    audio = band_limit(noise_like(0, 4001) * np.hanning(4001).astype(np.float32), 400.0, 3000.0)
    coded = code(audio, codec)
    assert coded.shape == audio.shape and coded.dtype == np.float32
    assert abs(delay(audio, coded)) <= 1
    error = np.square(coded - audio).sum() / np.square(audio).sum()
    assert 1e-6 < error < 0.7  # GSM was made for speech
    assert np.array_equal(code(audio, codec), coded)
    assert code(audio[:1], codec).shape == (1,)


def test_more_compression_costs_more() -> None:
    audio = noise_like(0)
    errors = [np.square(code(audio, "opus", level) - audio).sum() for level in (0.0, 0.9)]
    assert errors[1] > 2 * errors[0]


def test_a_codec_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="'aac'"):
        MixtureConfig(codec=0.5, codecs=["aac"])
    monkeypatch.setattr(soundfile, "available_formats", lambda: {"WAV": ""})
    with pytest.raises(ConfigurationError, match="cannot write opus"):
        MixtureConfig(codec=0.5, codecs=["opus"])
    MixtureConfig(codec=0.0, codecs=["opus"])


# ---------------------------------------------------------------------- rooms


def test_a_response_is_applied_in_time_and_split_at_fifty_milliseconds() -> None:
    response = np.zeros(3000, np.float32)
    response[100], response[100 + 700], response[100 + 1600] = 1.0, 0.5, 0.25
    held = aligned(response)
    assert np.square(held[: BEFORE + 800]).sum() == pytest.approx(1, rel=1e-6)
    dry = noise_like(0)
    wet, early = reverberate(dry, held)
    scale = 1 / math.sqrt(1.25)
    expected = dry.copy()
    expected[700:] += 0.5 * dry[:-700]
    np.testing.assert_allclose(early, scale * expected, atol=1e-6)
    expected[1600:] += 0.25 * dry[:-1600]
    np.testing.assert_allclose(wet, scale * expected, atol=1e-6)
    with pytest.raises(DataError, match="silent"):
        aligned(np.zeros(10, np.float32))


def test_a_simulated_room_rings_as_long_as_it_was_asked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    acoustics = pytest.importorskip("pyroomacoustics")
    config = RoomConfig(count=2, rt60_seconds=(0.25, 0.3), width_metres=(3, 4))
    made = prepare_rooms(config, 7, tmp_path, progress=False)
    assert len(made) == 2
    for index in range(2):
        response = made[index]
        assert np.abs(response).argmax() == BEFORE
        assert 0.2 < acoustics.measure_rt60(response, fs=RATE, decay_db=20) < 0.35
    assert np.array_equal(made[1], simulate_room(config, 7, 1))
    assert made[0].shape != made[1].shape or not np.array_equal(made[0], made[1])

    def forbidden(*_: object) -> None:
        raise AssertionError("simulated again")

    monkeypatch.setattr(rooms_module, "simulate_room", forbidden)
    again = prepare_rooms(config, 7, tmp_path)
    assert all(np.array_equal(again[index], made[index]) for index in range(2))
    (file,) = tmp_path.glob("rooms-*.safetensors")
    file.write_bytes(b"cut")
    with pytest.raises(DataError, match="damaged"):
        prepare_rooms(config, 7, tmp_path)
    with pytest.raises(ConfigurationError, match="too short"):
        simulate_room(RoomConfig(rt60_seconds=(1e-3, 2e-3)), 0, 0)


def test_a_bank_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def simulate(config: RoomConfig, seed: int, index: int) -> np.ndarray:
        if index == 2:
            raise KeyboardInterrupt
        return np.ones(5, np.float32)

    monkeypatch.setattr(rooms_module, "simulate_room", simulate)
    with pytest.raises(KeyboardInterrupt):
        prepare_rooms(RoomConfig(count=3), 0, tmp_path, progress=False)
    assert not list(tmp_path.iterdir())
    assert len(prepare_rooms(RoomConfig(count=2), 0, tmp_path, progress=False)) == 2
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        prepare_rooms(RoomConfig(count=1), 0, tmp_path / "file" / "x", progress=False)


@pytest.mark.parametrize(
    "changes", [{"count": 0}, {"rt60_seconds": (0.5, 0.2)}, {"height_metres": (0.5, 2)}, {"distance_metres": (0, 1)}]
)
def test_impossible_rooms_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="room"):
        RoomConfig(**changes)


# ---------------------------------------------------------------------- the store of clips


def test_the_store_holds_what_the_files_hold(clips: dict[str, ClipStore], tmp_path: Path) -> None:
    store = clips["speech"]
    assert store.keys == [f"{speaker}-{take}.wav" for speaker in SPEAKERS for take in range(2)]
    assert store.num_samples.tolist() == [4000, 4500] * 3 and store.total == 25_500
    np.testing.assert_allclose(store.audio(3), noise_like(11, 4500, 0.04), atol=1e-4)
    assert np.array_equal(store.audio(3, 4000, 1000), store.audio(3)[4000:])
    assert [store.at(place) for place in (0, 3999, 4000, 25_499)] == [(0, 0), (0, 3999), (1, 0), (5, 4499)]
    copied = pickle.loads(pickle.dumps(store))
    assert len(pickle.dumps(store)) < 10_000 and np.array_equal(copied.audio(2), store.audio(2))
    with pytest.raises(DataError, match=r"none of 10 clips has.*opera"):
        prepare_clips([str(store._files[0][0].parents[1] / "data")], tmp_path, {"domain": "opera"}, progress=False)


def test_a_filter_looks_at_labels_and_at_the_group_of_them() -> None:
    labels = {"domain": "speech", "labels": {"speaker": "ann", "year": 3, "domain": "hidden"}}
    assert matches(labels, {}) and matches(labels, {"domain": "speech", "year": 3})
    assert matches(labels, {"speaker": ["bob", "ann"], "year": "3"})
    assert not matches(labels, {"speaker": "bob"}) and not matches(labels, {"mood": "x"})
    assert not matches(labels, {"domain": "hidden"})


def test_files_of_equal_names_and_sizes_are_told_apart(tmp_path: Path) -> None:
    for side, seed in (("a", 0), ("b", 1)):
        (tmp_path / side / "wav").mkdir(parents=True)
        write_clip(tmp_path / side / "wav" / "x", noise_like(seed), {})
    stores = [prepare_clips([str(tmp_path / side / "wav")], tmp_path / "c", progress=False) for side in ("a", "b")]
    assert not np.array_equal(stores[0].audio(0), stores[1].audio(0))


def test_a_store_is_made_once_and_damage_is_named(tmp_path: Path) -> None:
    source = write_clips(tmp_path / "data")
    (source / "broken.wav").write_bytes(b"no audio")
    store = prepare_clips([str(source)], tmp_path / "c", progress=False)
    assert len(store) == 10 and list(store.skipped.skipped) == ["broken.wav"]
    (audio,) = (tmp_path / "c").glob("*.audio")
    stamp = audio.stat().st_mtime_ns
    prepare_clips([str(source)], tmp_path / "c", progress=False)
    assert audio.stat().st_mtime_ns == stamp
    audio.write_bytes(audio.read_bytes()[:-2])
    with pytest.raises(DataError, match="bytes instead of"):
        prepare_clips([str(source)], tmp_path / "c", progress=False)
    (index,) = (tmp_path / "c").glob("*.json")
    index.write_text("{")
    with pytest.raises(DataError, match="damaged"):
        prepare_clips([str(source)], tmp_path / "c", progress=False)


# ---------------------------------------------------------------------- mixtures


def test_a_mixture_is_a_function_of_seed_and_index(clips: dict[str, ClipStore], some_rooms: RoomBank) -> None:
    everything = {"kinds": {"noise": 1.0, "babble": 1.0, "music": 1.0, "colored": 1.0, "none": 1.0}}
    damage = {"reverberation": 0.5, "clipping": 0.5, "telephone": 0.4, "band_limit": 0.4, "no_speech": 0.2}
    one = make(clips, 3, some_rooms, **everything, **damage)
    two = make(clips, 3, some_rooms, **everything, **damage)
    order = [5, 0, 9, 5, 2]
    drawn = [one.mixture(index) for index in order]
    for index, mixture in sorted(zip(order, drawn, strict=True), key=lambda pair: pair[0]):
        again = two.mixture(index)
        assert np.array_equal(mixture.noisy, again.noisy) and np.array_equal(mixture.clean, again.clean)
        assert (mixture.kind, mixture.snr_db, mixture.facts) == (again.kind, again.snr_db, again.facts)
    other = make(clips, 4, some_rooms, **everything, **damage)
    assert not any(np.array_equal(other.mixture(index).noisy, one.mixture(index).noisy) for index in range(5))
    assert all(mixture.noisy.shape == mixture.clean.shape == (SAMPLES,) for mixture in drawn)


def test_one_setting_changes_no_other_draw(clips: dict[str, ClipStore], some_rooms: RoomBank) -> None:
    plain, changed = make(clips), make(clips, 0, some_rooms, clipping=1.0, reverberation=1.0)
    for index in range(5):
        a, b = plain.mixture(index), changed.mixture(index)
        assert (a.kind, a.snr_db, a.facts["clip"]) == (b.kind, b.snr_db, b.facts["clip"])
        assert set(b.facts) - set(a.facts) == {"clipping_db", "room"}


@pytest.mark.parametrize("kind", ["noise", "music", "babble", "colored"])
def test_the_ratio_of_a_mixture_is_the_one_it_states(clips: dict[str, ClipStore], kind: str) -> None:
    mixtures = make(clips, kinds={kind: 1.0}, gain_db=(-9.0, -6.0))
    ratios = []
    for index in range(4):
        mixture = mixtures.mixture(index)
        added = mixture.noisy.astype(np.float64) - mixture.clean
        measured = 10 * math.log10(active_power(mixture.clean) / active_power(added))
        assert measured == pytest.approx(mixture.snr_db, abs=0.01) and mixture.kind == kind
        ratios.append(mixture.snr_db)
    assert len(set(ratios)) == 4 and all(-5 <= ratio <= 20 for ratio in ratios)


def test_music_is_music_and_without_noise_nothing_is_added(clips: dict[str, ClipStore]) -> None:
    mixture = make(clips, kinds={"music": 1.0}, snr_db=(0.0, 0.0)).mixture(0)
    spectrum = np.abs(np.fft.rfft(mixture.noisy - mixture.clean))
    assert np.fft.rfftfreq(SAMPLES, 1 / RATE)[spectrum.argmax()] == pytest.approx(3000, abs=10)
    mixture = make(clips, kinds={"none": 1.0}).mixture(0)
    assert np.array_equal(mixture.noisy, mixture.clean) and mixture.snr_db == math.inf


def test_kinds_come_at_their_rates(clips: dict[str, ClipStore]) -> None:
    mixtures = make(clips, kinds={"noise": 3.0, "none": 1.0})
    kinds = Counter(mixtures._plan(mixtures._rng(index, 1))[0] for index in range(2000))
    assert set(kinds) == {"noise", "none"} and abs(kinds["none"] / 2000 - 0.25) < 0.04


def test_a_line_keeps_to_one_voice_and_babble_to_others(clips: dict[str, ClipStore]) -> None:
    mixtures = make(clips, kinds={"none": 1.0}, pause_seconds=(0.05, 0.1))
    levels = {speaker: 0.02 * 2**number for number, speaker in enumerate(SPEAKERS)}
    for index in range(10):
        mixture = mixtures.mixture(index)
        level = levels[str(mixture.facts["clip"]).partition("-")[0]]
        spoken = mixture.clean[mixture.clean != 0]
        assert len(spoken) > 0.7 * SAMPLES and np.std(spoken) == pytest.approx(level, rel=0.1)
        assert 0 < np.mean(mixture.clean == 0) < 0.5  # the pause
    rng = np.random.default_rng(0)
    for target in range(6):
        others = {mixtures._other(rng, mixtures._speakers[target], target) for _ in range(40)}
        assert others == set(range(6)) - {target, target ^ 1}


def test_where_nobody_speaks_the_noise_is_left_as_loud_as_it_was(clips: dict[str, ClipStore]) -> None:
    with_speech, without = make(clips), make(clips, no_speech=1.0)
    for index in range(3):
        a, b = with_speech.mixture(index), without.mixture(index)
        assert not b.clean.any() and b.facts["no_speech"]
        np.testing.assert_allclose(b.noisy, a.noisy - a.clean, atol=1e-6)


def test_a_room_reaches_the_speech_and_its_early_part_the_target(
    clips: dict[str, ClipStore], some_rooms: RoomBank
) -> None:
    dry = make(clips, kinds={"none": 1.0}, gain_db=(-6.0, -6.0))
    wet = make(clips, 0, some_rooms, kinds={"none": 1.0}, gain_db=(-6.0, -6.0), reverberation=1.0)
    for index in range(3):
        a, b = dry.mixture(index), wet.mixture(index)
        full, early = reverberate(a.clean, some_rooms[b.facts["room"]])
        np.testing.assert_allclose(b.noisy, full, atol=1e-5)
        np.testing.assert_allclose(b.clean, early, atol=1e-5)
        assert not np.allclose(full, early, atol=1e-3)


def test_damage_reaches_the_noisy_side_only_and_is_stated(clips: dict[str, ClipStore]) -> None:
    plain = make(clips).mixture(0)
    for changes, fact in (
        ({"telephone": 1.0}, "band_hertz"),
        ({"band_limit": 1.0}, "band_hertz"),
        ({"clipping": 1.0}, "clipping_db"),
        ({"codec": 1.0, "codecs": ["ulaw"]}, "codec"),
    ):
        damaged = make(clips, **changes).mixture(0)
        assert fact in damaged.facts and fact not in plain.facts
        assert np.array_equal(damaged.clean, plain.clean)
        assert damaged.noisy.shape == plain.noisy.shape and not np.allclose(damaged.noisy, plain.noisy, atol=1e-4)
        assert abs(delay(plain.noisy, damaged.noisy)) <= 1
    low, high = MixtureConfig(**PLAIN).band_hertz
    edges = [make(clips, band_limit=1.0).mixture(index).facts["band_hertz"][1] for index in range(8)]
    assert low <= min(edges) < max(edges) <= high
    assert make(clips, telephone=1.0).mixture(1).facts["band_hertz"] == TELEPHONE


def test_loudness_changes_both_sides_alike_and_never_clips(clips: dict[str, ClipStore]) -> None:
    plain = make(clips, snr_db=(0.0, 0.0))
    quiet, loud = (make(clips, snr_db=(0.0, 0.0), gain_db=(gain, gain)) for gain in (-20.0, 60.0))
    for index in range(3):
        a, b, c = (mixtures.mixture(index) for mixtures in (plain, quiet, loud))
        np.testing.assert_allclose(b.noisy, 0.1 * a.noisy, atol=1e-6)
        np.testing.assert_allclose(b.clean, 0.1 * a.clean, atol=1e-6)
        assert max(np.abs(c.noisy).max(), np.abs(c.clean).max()) == pytest.approx(1, rel=1e-5)
        assert c.facts["gain_db"] < 60


def test_kinds_without_sources_are_refused(clips: dict[str, ClipStore]) -> None:
    speech = clips["speech"]
    for kind in ("noise", "music"):
        with pytest.raises(ConfigurationError, match=rf"data\.{kind} names nothing.*kinds\.{kind}"):
            Mixtures(MixtureConfig(**{**PLAIN, "kinds": {kind: 1.0}}), SAMPLES, 0, speech)
    with pytest.raises(ConfigurationError, match=r"no rooms.*reverberation"):
        Mixtures(MixtureConfig(**{**PLAIN, "kinds": {"none": 1.0}, "reverberation": 0.1}), SAMPLES, 0, speech)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codec": 1.5}, "codec is a probability"),
        ({"no_speech": math.nan}, "no_speech is a probability"),
        ({"snr_db": (5.0, 0.0)}, "snr_db is"),
        ({"gain_db": (0.0, math.inf)}, "gain_db is"),
        ({"kinds": {"thunder": 1.0}}, "'thunder'"),
        ({"kinds": {"noise": 0.0}}, "not all 0"),
        ({"kinds": {}}, "not all 0"),
        ({"kinds": {"noise": -1.0, "none": 2.0}}, "not be negative"),
        ({"telephone": 0.6, "band_limit": 0.6}, "exclude each other"),
        ({"band_hertz": (0.0, 4000.0)}, "band_hertz"),
        ({"babble_voices": (0, 3)}, "babble_voices"),
        ({"codec": 0.5, "codecs": []}, "codecs is empty"),
    ],
)
def test_wrong_mixtures_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        MixtureConfig(**changes)
