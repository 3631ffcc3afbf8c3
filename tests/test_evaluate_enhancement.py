"""`evaluate enhancement`: mixtures, pairs, systems, tables, and everything that can go wrong with them."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from conftest import tiny
from dasheng_tokenizer.audio import load_audio, resample
from dasheng_tokenizer.cli import main
from dasheng_tokenizer.enhancement.mixtures import active_power
from dasheng_tokenizer.errors import CheckpointError, ConfigurationError, DataError, MissingExtraError
from dasheng_tokenizer.evaluation import enhancement_systems, metrics
from dasheng_tokenizer.evaluation.codecs import Tokenizer
from dasheng_tokenizer.evaluation.enhancement import SILENCE, Level, Outcome, decibels, evaluate_enhancement
from dasheng_tokenizer.evaluation.enhancement_inputs import CLEAN, Example, MixtureSet
from dasheng_tokenizer.evaluation.enhancement_pairs import PairSet, measured_ratio
from dasheng_tokenizer.evaluation.enhancement_picture import draw
from dasheng_tokenizer.evaluation.enhancement_systems import (
    CEILING,
    RNNOISE_RATE,
    UNPROCESSED,
    Ceiling,
    EnhancerSystem,
    RNNoise,
    SpectralGate,
    Unprocessed,
    ceilings,
    parse_baseline,
)
from dasheng_tokenizer.evaluation.enhancement_tables import (
    CLEAN_INPUT,
    INTERVAL,
    NOISY,
    OTHER,
    Figure,
    Tables,
)
from dasheng_tokenizer.evaluation.enhancement_words import Recogniser, Words, count_errors
from dasheng_tokenizer.evaluation.metric_columns import require_metrics

pytestmark = pytest.mark.usefixtures("one_thread")

CLIPS = Path(metrics.__file__).parents[1] / "embedded" / "clips"
MAKE_RESULTS = Path(__file__).resolve().parents[1] / "docs" / "make_results.py"

Samples = np.ndarray


@pytest.fixture(scope="module")
def speech() -> Samples:
    """Two and a half seconds of real speech at 16 kHz."""
    audio, rate = load_audio(CLIPS / "speech.flac")
    assert rate == 16000
    return audio[0, 16000:56000].copy()


def white(samples: int, level: float = 0.05, seed: int = 0) -> Samples:
    return (level * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def write(path: Path, audio: Samples, rate: int = 16000, labels: dict[str, Any] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, audio.T, rate, subtype="FLOAT")
    if labels is not None:
        path.with_suffix(".json").write_text(json.dumps(labels))
    return path


@pytest.fixture
def corpus(tmp_path: Path, speech: Samples) -> Path:
    """Three clips of speech and three of noise; the noise is shorter, as long and longer than speech."""
    for number in range(3):
        audio = speech[4000 * number : 4000 * number + 16000]
        facts = {"domain": "speech", "labels": {"text": f"Number {number}!", "language": "en"}}
        write(tmp_path / "data" / "speech" / f"s{number}.wav", audio, labels=facts)
    kinds = {"rain": 4000, "door": 16000, "engine": 40000}
    for number, (kind, samples) in enumerate(kinds.items()):
        facts = {"domain": "sound", "subset": "event", "labels": {"event": kind}}
        write(tmp_path / "data" / "noise" / f"{kind}.wav", white(samples, seed=number), labels=facts)
    return tmp_path / "data"


def mixtures(corpus: Path, *snrs: float, **settings: Any) -> MixtureSet:
    sources = [str(corpus / "speech")], [str(corpus / "noise")]
    return MixtureSet(*sources, snrs or (0.0, 5.0), corpus.parent / "cache", **settings)


def lag(reference: Samples, estimate: Samples) -> int:
    """Shift in samples at which both agree best."""
    size = 2 * len(reference)
    both = np.fft.irfft(np.fft.rfft(estimate, size) * np.fft.rfft(reference, size).conj(), size)
    found = int(np.argmax(both))
    return found if found < len(reference) else found - size


# ---------------------------------------------------------------- mixtures


def test_mixtures_have_the_ratio_they_say_and_do_not_pass_full_scale(corpus: Path, speech: Samples) -> None:
    write(corpus / "speech" / "loud.wav", speech[:16000] / np.abs(speech[:16000]).max())
    found = list(mixtures(corpus, -5.0, 0.0, 10.0).examples())
    noisy = [example for example in found if example.snr_db != CLEAN]
    assert len(noisy) == 4 * 3 and len(found) == 4 * 4
    softened = 0
    for example in noisy:
        noise = example.noisy.astype(np.float64) - example.clean
        ratio = 10 * math.log10(active_power(example.clean) / active_power(noise))
        assert ratio == pytest.approx(example.snr_db, abs=1e-3)
        assert np.abs(example.noisy).max() <= 1.0 + 1e-6 and example.noisy.shape == example.clean.shape
        softened += np.abs(example.noisy).max() > 0.999
    assert softened  # the loud clip, which noise would take beyond full scale
    assert all(example.noisy is example.clean for example in found if example.snr_db == CLEAN)


def test_mixtures_hang_on_the_seed_and_the_clip_alone(corpus: Path) -> None:
    def held(**settings: Any) -> dict[str, Samples]:
        return {example.key: example.noisy for example in mixtures(corpus, **settings).examples()}

    first, again, other = held(seed=3), held(seed=3), held(seed=4)
    assert first.keys() == again.keys() == other.keys()
    assert all(np.array_equal(first[key], again[key]) for key in first)
    assert any(not np.array_equal(first[key], other[key]) for key in first if "clean" not in key)
    few = held(seed=3, limit=2)
    assert len(few) == 2 * 3 and all(np.array_equal(first[key], few[key]) for key in few)
    chosen = {frozenset(held(seed=seed, limit=1)) for seed in range(12)}
    assert len(chosen) > 1  # the limit draws, and does not take the first


def test_a_clip_has_the_same_noise_at_every_ratio(corpus: Path) -> None:
    by_clip: dict[str, list[Example]] = {}
    for example in mixtures(corpus, 0.0, 20.0).examples():
        by_clip.setdefault(example.clip, []).append(example)
    for low, high, _ in by_clip.values():
        noises = [(example.noisy - example.clean).astype(np.float64) for example in (low, high)]
        cosine = noises[0] @ noises[1] / np.linalg.norm(noises[0]) / np.linalg.norm(noises[1])
        assert cosine == pytest.approx(1, abs=1e-4) and low.noise == high.noise
        assert np.linalg.norm(noises[0]) > 5 * np.linalg.norm(noises[1])


def test_labels_filter_clips_and_name_the_noise(corpus: Path) -> None:
    example = next(mixtures(corpus, noise_where={"event": ["door"]}).examples())
    assert (example.noise, example.text, example.language) == ("sound/door", "Number 0!", "en")
    assert example.key == "s0 at 0 dB"
    by_subset = mixtures(corpus, noise_where={"event": "rain"}, noise_label="subset")
    assert next(by_subset.examples()).noise == "event"
    assert next(mixtures(corpus, noise_label="absent").examples()).noise == "unknown"
    assert mixtures(corpus, where={"text": "Number 1!"}).total == 3
    with pytest.raises(DataError, match="none of 3 clips"):
        mixtures(corpus, where={"domain": "music"})


def test_clips_that_cannot_be_used_are_named_and_silent_noise_is_not_drawn(corpus: Path, speech: Samples) -> None:
    damaged = speech.copy()
    damaged[7] = np.nan
    write(corpus / "speech" / "nan.wav", damaged)
    (corpus / "noise" / "broken.wav").write_bytes(b"RIFF")
    for number in range(20):
        write(corpus / "noise" / f"silent{number}.wav", np.zeros(8000, np.float32))
    found = mixtures(corpus)
    assert found.total == 9 and set(found.failures) == {"nan.wav", "broken.wav"}
    assert "NaN" in found.failures["nan.wav"]
    assert {example.noise for example in found.examples()} <= {"none", "sound/rain", "sound/door", "sound/engine"}
    with pytest.raises(DataError, match="every clip of noise is silent"):
        MixtureSet([str(corpus / "speech")], [str(corpus / "noise" / "silent1.wav")], [0], corpus.parent / "cache")


def test_noise_in_which_the_drawn_stretch_is_silent_still_gives_the_ratio(corpus: Path) -> None:
    mostly = np.zeros(160_000, np.float32)
    mostly[80_000:80_400] = white(400)
    path = write(corpus / "sparse.wav", mostly)
    sources = [str(corpus / "speech")], [str(path)]
    for seed in range(4):
        for example in MixtureSet(*sources, [5.0], corpus.parent / "cache", seed).examples():
            if example.snr_db != CLEAN:
                assert measured_ratio(example.noisy, example.clean) == pytest.approx(5, abs=1e-2)


def test_wrong_mixtures_are_refused(corpus: Path) -> None:
    for settings, reason in (
        ({"snrs": (0.0, 0.0)}, "each once"),
        ({"snrs": (math.nan,)}, "finite"),
        ({"limit": 0}, "at least one"),
        ({"seed": -1}, "negative"),
    ):
        snrs = settings.pop("snrs", (0.0,))
        with pytest.raises(ConfigurationError, match=reason):
            mixtures(corpus, *snrs, **settings)


# ---------------------------------------------------------------- pairs


def test_pairs_in_the_layout_of_valentini(tmp_path: Path, speech: Samples) -> None:
    clean = resample(speech, 16000, 48000)
    noisy = clean + white(clean.size, 0.01)
    for name in ("p232_001", "p232_002"):
        write(tmp_path / "clean_testset_wav" / f"{name}.wav", clean, 48000)
        write(tmp_path / "noisy_testset_wav" / f"{name}.wav", noisy, 48000)
    (tmp_path / "log_testset.txt").write_text("p232_001 bus 17.5\np232_002 cafe 2.5\n")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "p232_001.txt").write_text("Please call Stella.\n")
    folders = tmp_path / "noisy_testset_wav", tmp_path / "clean_testset_wav"
    pairs = PairSet(*folders, tmp_path / "log_testset.txt", tmp_path / "text")
    found = list(pairs.examples())
    assert [(example.key, example.snr_db, example.noise) for example in found] == [
        ("p232_001", 17.5, "bus"),
        ("p232_001 clean", CLEAN, "none"),
        ("p232_002", 2.5, "cafe"),
        ("p232_002 clean", CLEAN, "none"),
    ]
    assert pairs.total == 4 and found[0].text == "Please call Stella." and found[2].text is None
    assert list(map(Path, pairs.failures)) == [tmp_path / "text" / "p232_002.txt"]
    assert np.corrcoef(found[0].clean, speech)[0, 1] > 0.99 and lag(speech, found[0].clean) == 0  # to 48 kHz and back
    assert found[0].noisy.shape == found[0].clean.shape == speech.shape
    assert [name for name, _ in pairs.without_speech()] == ["p232_001", "p232_002"]
    assert PairSet(*folders, limit=1).total == 2


def test_pairs_in_the_layout_of_the_dns_challenge(tmp_path: Path, speech: Samples) -> None:
    noise = white(speech.size)
    for number, ratio in ((1, -3), (12, 20)):
        write(tmp_path / "noisy" / f"clnsp{number}_train_7_snr{ratio}_tl-21_fileid_{number}.wav", speech + noise)
        write(tmp_path / "clean" / f"clean_fileid_{number}.wav", speech)
    found = list(PairSet(tmp_path / "noisy", tmp_path / "clean").examples())
    assert [example.snr_db for example in found[::2]] == [-3, 20]
    assert {example.noise for example in found[::2]} == {"unknown"}


def test_ratios_of_other_pairs_are_measured(tmp_path: Path, speech: Samples) -> None:
    from dasheng_tokenizer.enhancement.mixtures import mix

    write(tmp_path / "clean" / "a.wav", speech)
    write(tmp_path / "noisy" / "a.wav", mix(speech, white(speech.size), 7.0))
    example = next(PairSet(tmp_path / "noisy", tmp_path / "clean").examples())
    assert example.snr_db == pytest.approx(7, abs=1e-3)
    assert measured_ratio(speech, speech) is None


def test_pairs_that_do_not_belong_together_are_named(tmp_path: Path, speech: Samples) -> None:
    noisy, clean = tmp_path / "noisy", tmp_path / "clean"
    for name in ("good", "long", "nan", "lonely"):
        write(noisy / f"{name}.wav", speech)
    damaged = speech.copy()
    damaged[3] = np.inf
    for name, audio in (("good", speech[:-700]), ("long", speech[:-900]), ("nan", damaged), ("stranger", speech)):
        write(clean / f"{name}.wav", audio)
    pairs = PairSet(noisy, clean)
    found = list(pairs.examples())
    assert [example.key for example in found] == ["good", "good clean"]
    assert found[0].noisy.shape == found[0].clean.shape == (speech.size - 700,)
    reasons = {Path(name).stem: reason for name, reason in pairs.failures.items()}
    assert set(reasons) == {"long", "nan", "lonely", "stranger"}
    assert "50 ms apart" in reasons["long"] and "NaN or infinite" in reasons["nan"]
    assert "no file of that name" in reasons["lonely"]
    (tmp_path / "empty").mkdir()
    for folders, reason in (
        ((noisy, tmp_path / "absent"), "is no folder"),
        ((tmp_path / "empty", clean), "holds no audio"),
        ((write(tmp_path / "other" / "x.wav", speech).parent, clean), "has the name of one"),
    ):
        with pytest.raises(DataError, match=reason):
            PairSet(*folders)
    (tmp_path / "log.txt").write_text("good bus 17.5\n\ngood bus\n")
    with pytest.raises(DataError, match="line 3: 'good bus' is not NAME NOISE RATIO"):
        PairSet(noisy, clean, tmp_path / "log.txt")


# ---------------------------------------------------------------- systems


def test_rnnoise_is_in_time_with_its_input_at_48_khz_and_at_16(speech: Samples) -> None:
    pytest.importorskip("pyrnnoise.rnnoise")
    denoised = RNNoise().process(speech)
    assert denoised.shape == speech.shape and denoised.dtype == np.float32
    assert lag(speech, denoised) == 0
    high = [resample(audio, 16000, RNNOISE_RATE) for audio in (speech, denoised)]
    assert abs(lag(*high)) <= 1  # its high-pass moves the maximum by a fraction of a sample
    assert np.corrcoef(speech, denoised)[0, 1] > 0.9


def test_rnnoise_takes_any_length_and_does_not_wrap_around(speech: Samples) -> None:
    pytest.importorskip("pyrnnoise.rnnoise")
    for samples in (1, 159, 160, 161, 4001):
        assert RNNoise().process(speech[:samples]).shape == (samples,)
    loud = speech[:16000] * np.float32(3 / np.abs(speech[:16000]).max())
    scaled = RNNoise().process(loud)
    assert np.abs(scaled).max() > 1.5 and np.corrcoef(loud, scaled)[0, 1] > 0.9
    assert decibels(RNNoise().process(np.zeros(8000, np.float32))) < -60


def test_the_spectral_gate_is_in_time_and_lowers_noise(speech: Samples) -> None:
    pytest.importorskip("noisereduce")
    noisy = speech + white(speech.size, 0.01)
    gated = SpectralGate().process(noisy)
    assert gated.shape == noisy.shape and gated.dtype == np.float32 and lag(noisy, gated) == 0
    noise = white(16000, 0.05)
    assert decibels(SpectralGate().process(noise)) < decibels(noise) - 3
    assert not SpectralGate().process(np.zeros(4000, np.float32)).any()
    for samples in (1, 100):
        assert SpectralGate().process(speech[:samples]).shape == (samples,)


def test_unknown_and_missing_baselines_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="known: spectral-gate, rnnoise"):
        parse_baseline("wiener")
    monkeypatch.setitem(sys.modules, "noisereduce", None)
    with pytest.raises(MissingExtraError, match=r"noisereduce.*dasheng-tokenizer\[evaluate\]"):
        parse_baseline("spectral-gate")


@dataclass
class Info:
    part: str = "unified"
    window_seconds: float = 2.56


class Double:
    """An enhancer that changes nothing but the level."""

    def __init__(self, gain: float = 1.0) -> None:
        self.gain, self.tokenizer, self.calls = gain, tiny(), 0
        self.denoiser: Any = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(self.denoiser.weight, gain)
        torch.nn.init.zeros_(self.denoiser.bias)
        self.denoiser.info = Info()

    def enhance(self, audio: Samples, sampling_rate: int) -> torch.Tensor:
        assert sampling_rate == 16000 and audio.ndim == 2
        self.calls += 1
        return self.gain * torch.from_numpy(audio)


class Deaf(Double):
    """Fails at silence."""

    def enhance(self, audio: Samples, sampling_rate: int) -> torch.Tensor:
        if not audio.any():
            raise RuntimeError("nothing to hear")
        return super().enhance(audio, sampling_rate)


def double(name: str = "identity", gain: float = 1.0, kind: type[Double] = Double) -> EnhancerSystem:
    return EnhancerSystem(kind(gain), name)  # type: ignore[arg-type]


def test_an_enhancer_is_known_by_its_weights_and_its_tokenizer() -> None:
    one, same, other = double(), double("other name"), double(gain=0.5)
    assert one.identity() == same.identity() != other.identity()
    with torch.no_grad():
        next(same.enhancer.tokenizer.parameters()).add_(1)
    assert one.identity() != same.identity()


def test_each_tokenizer_has_one_ceiling(speech: Samples) -> None:
    one, same, other = double("a"), double("b"), double("c")
    with torch.no_grad():
        next(other.enhancer.tokenizer.parameters()).add_(1)
    (only,) = ceilings([one, same])
    assert only.name == CEILING and only.from_clean
    assert [system.name for system in ceilings([one, same, other])] == [
        "clean through that of a",
        "clean through that of c",
    ]
    expected = Tokenizer(tiny(), "").reconstruct(speech[:6400]).audio
    np.testing.assert_array_equal(only.process(speech[:6400]), expected)


# ---------------------------------------------------------------- runs


class FixedWords:
    """Hears the text with its first word left out, and counts how often it listened."""

    about = "WER: a double."

    def __init__(self) -> None:
        self.calls = 0

    def identity(self) -> list[Any]:
        return ["double"]

    def words(self, audio: Samples, text: str, language: str | None) -> Words:
        assert language == "en"
        self.calls += 1
        return count_errors(text, text.partition(" ")[2])


@dataclass
class FixedSet:
    """Examples made in memory."""

    held: list[Example]
    noise: list[tuple[str, Samples]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=lambda: ["Made in memory."])

    @property
    def total(self) -> int:
        return len(self.held)

    def examples(self) -> Iterator[Example]:
        yield from self.held

    def without_speech(self) -> Iterator[tuple[str, Samples]]:
        yield from self.noise


def fixed_set(speech: Samples) -> FixedSet:
    """A clip that is long enough for all figures, at two ratios and clean, and one that is too short for any."""
    long, short, noise = speech[:24000], speech[8000:10000], white(24000)
    said = {"text": "One two three", "language": "en"}
    held = [
        Example("long at 0 dB", "long", long + noise, long, 0.0, "rain", **said),
        Example("long at 10 dB", "long", long + 0.3 * noise, long, 10.0, "rain", **said),
        Example("long clean", "long", long, long, CLEAN, "none", **said),
        Example("short at 0 dB", "short", short + noise[:2000], short, 0.0, "door"),
    ]
    return FixedSet(held, [("rain", noise[:8000])])


def test_a_whole_run(tmp_path: Path, speech: Samples) -> None:
    examples, systems, recogniser = fixed_set(speech), [Unprocessed(), double(), Ceiling(tiny())], FixedWords()
    arguments = (examples, systems, require_metrics(["pesq_wb", "stoi", "si_sdr"]), tmp_path / "out", 1)
    outcome = evaluate_enhancement(*arguments, recogniser, keep_audio=True)  # type: ignore[arg-type]
    rows = {(row["system"], row["file"]): row for row in outcome.rows}
    assert len(rows) == 12 and not outcome.failed() and outcome.kept == 0

    figures = ("pesq_wb", "stoi", "si_sdr")
    for example in examples.held:
        same, raw = rows["identity", example.key], rows[UNPROCESSED, example.key]
        assert [same[name] for name in figures] == [raw[name] for name in figures]
        assert (raw["clip"], raw["snr_db"], raw["noise"]) == (example.clip, example.snr_db, example.noise)
    assert rows[UNPROCESSED, "long at 0 dB"]["si_sdr"] < rows[UNPROCESSED, "long at 10 dB"]["si_sdr"]
    assert rows[UNPROCESSED, "long clean"]["pesq_wb"] == pytest.approx(4.644, abs=1e-3)
    reached = [rows[CEILING, example.key]["si_sdr"] for example in examples.held[:3]]
    expected = Tokenizer(tiny(), "").reconstruct(examples.held[0].clean).audio
    assert reached == [pytest.approx(metrics.si_sdr(examples.held[0].clean, expected), abs=1e-3)] * 3
    short = rows[UNPROCESSED, "short at 0 dB"]
    assert short["pesq_wb"] is short["stoi"] is None and short["si_sdr"] is not None
    assert "quarter of a second" in short["missing"]["pesq_wb"]

    tables = Tables(outcome, resamples=20)
    shown = {table.caption.removesuffix(f": {INTERVAL}"): table for table in tables.tables()}
    assert list(shown) == [
        "All noisy inputs",
        "Difference to the unprocessed input",
        "By signal-to-noise ratio",
        "By type of noise",
        "Clean speech as the input",
        f"Clean speech as the input: difference to {CEILING}",
        "Input without speech: level in dB of full scale, root mean square; −100 is that or less",
    ]
    changes = shown["Difference to the unprocessed input"]
    assert [row[0] for row in changes.rows] == [NOISY, "0 dB", "10 dB"]
    assert all(row[1] == "identity" and row[3].startswith("+0.000") for row in changes.rows)
    assert "(1 missing)" in shown["All noisy inputs"].rows[0][2]
    assert shown["All noisy inputs"].rows[0][-1] == "33.3"  # one word of three; the short clip has no text
    assert any("Missing for 1 input: unprocessed, pesq_wb: " in note for note in tables.notes())

    levels = {(level.system, level.name): level for level in outcome.levels}
    assert set(levels) == {(name, clip) for name in (UNPROCESSED, "identity") for clip in (SILENCE, "rain")}
    assert levels["identity", SILENCE].after == -100
    assert levels["identity", "rain"].after == levels["identity", "rain"].before == pytest.approx(-26, abs=0.2)

    kept, rate = load_audio(tmp_path / "out" / "audio" / "identity" / "long at 0 dB.wav")
    assert rate == 16000 and np.array_equal(kept[0], examples.held[0].noisy)

    heard = recogniser.calls
    systems[1].enhancer.calls = 0
    again = evaluate_enhancement(*arguments, recogniser)  # type: ignore[arg-type]
    assert again.kept == 12 and again.rows == outcome.rows and again.levels == outcome.levels
    assert recogniser.calls == heard == 9 and systems[1].enhancer.calls == 0

    tables.save(tmp_path / "out")
    held = json.loads((tmp_path / "out" / "enhancement.json").read_text())
    assert [row["snr_db"] for row in held["rows"][::3]] == [0, 10, "clean", 0]
    assert (tmp_path / "out" / "enhancement.csv").read_text().count("\n") == 13
    draw(tmp_path / "picture.png", tables, examples, systems)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_system_that_fails_costs_no_other_its_figures(tmp_path: Path, speech: Samples) -> None:
    silent = np.zeros(8000, np.float32)
    examples = FixedSet(
        [
            Example("good", "good", speech[:8000], speech[:8000], 3.0, "rain"),
            Example("silent", "silent", silent, silent, None, "rain"),
        ]
    )
    systems = [Unprocessed(), double("deaf", kind=Deaf)]
    outcome = evaluate_enhancement(examples, systems, require_metrics(["si_sdr"]), tmp_path, 1)
    errors = {(row["system"], row["file"]): row["error"] for row in outcome.rows}
    assert errors.pop(("deaf", "silent")) == "RuntimeError: nothing to hear" and not any(errors.values())
    assert [level.error for level in outcome.levels] == [None, "RuntimeError: nothing to hear"]
    assert len(outcome.failed()) == 2
    tables = Tables(outcome, resamples=20)
    assert tables.ratios == ["3 dB", "unknown ratio"]
    draw(tmp_path / "picture.png", tables, examples, systems)  # of what could be processed
    with pytest.raises(ConfigurationError, match="two systems are called identity"):
        evaluate_enhancement(examples, [double(), double()], require_metrics(["si_sdr"]), tmp_path, 1)


# ---------------------------------------------------------------- tables


def outcome_of(rows: list[dict[str, Any]], names: tuple[str, ...] = (UNPROCESSED, "ours")) -> Outcome:
    whole = [{"error": None, "seconds": 1.0, "noise": "rain", **row} for row in rows]
    systems = [Unprocessed(name) for name in names]
    return Outcome(systems, require_metrics(["si_sdr"]), whole, [], {}, {}, [])


def row(system: str, clip: str, snr: float | None, value: float | None, **more: Any) -> dict[str, Any]:
    missing = {} if value is not None else {"si_sdr": "why"}
    facts = {"system": system, "file": f"{clip} {snr}", "clip": clip, "snr_db": snr}
    return {**facts, "si_sdr": value, "missing": missing, **more}


def test_intervals_draw_clips_and_not_inputs() -> None:
    rows = []
    for clip in range(30):
        for snr in (0.0, 5.0, 10.0, 15.0):
            rows.append(row(UNPROCESSED, str(clip), snr, float(clip % 2)))
    tables = Tables(outcome_of(rows, (UNPROCESSED,)), resamples=200)
    (figure,) = tables.figures
    whole, single = (tables.mean(group, UNPROCESSED, figure).estimate for group in (NOISY, "5 dB"))
    assert whole is not None and single is not None
    assert whole.value == single.value == 0.5
    assert (whole.low, whole.high) == (single.low, single.high)  # four inputs of a clip say no more than one
    assert 0.1 < whole.high - whole.low < 0.5


def test_differences_are_of_the_same_inputs() -> None:
    rows = [row(UNPROCESSED, "a", 0.0, 1.0), row(UNPROCESSED, "b", 0.0, 9.0), row(UNPROCESSED, "c", 0.0, None)]
    rows += [row("ours", "a", 0.0, 3.0), row("ours", "b", 0.0, None), row("ours", "c", 0.0, 50.0)]
    tables = Tables(outcome_of(rows), resamples=20)
    found = tables.mean(NOISY, "ours", tables.figures[0], UNPROCESSED)
    assert found.estimate is not None and found.estimate.value == 2
    assert (found.values, found.missing, found.text(1)) == (1, 2, "+2.0 (2 missing)")
    nothing = tables.mean(CLEAN_INPUT, "ours", tables.figures[0])
    assert nothing.text(1) == "–" and nothing.values == 0


def test_word_errors_are_over_all_words() -> None:
    rows = [row("ours", "a", 0.0, 1.0, errors=1, words=1), row("ours", "b", 0.0, 1.0, errors=0, words=9)]
    tables = Tables(outcome_of(rows, ("ours",)), resamples=20)
    wer = next(figure for figure in tables.figures if figure.name == "wer")
    found = tables.mean(NOISY, "ours", wer).estimate
    assert isinstance(wer, Figure) and found is not None and found.value == pytest.approx(10)


def test_many_ratios_are_ranges_and_many_types_are_the_commonest() -> None:
    ratios = [-7.5, -5.0, -0.1, 0.0, 2.0, 4.9, 5.0, 11.0, 12.0, None]
    rows = [row("ours", str(number), ratio, 1.0) for number, ratio in enumerate(ratios)]
    tables = Tables(outcome_of(rows, ("ours",)), resamples=20)
    assert tables.ratios == ["-10 to -5 dB", "-5 to 0 dB", "0 to 5 dB", "5 to 10 dB", "10 to 15 dB", "unknown ratio"]
    few = Tables(outcome_of(rows[:3], ("ours",)), resamples=20)
    assert few.ratios == ["-7.5 dB", "-5 dB", "-0.1 dB"]
    many = [row("ours", f"{kind} {n}", 0.0, 1.0, noise=f"t{kind}") for kind in range(15) for n in range(kind + 1)]
    kinds = Tables(outcome_of(many, ("ours",)), resamples=20).noises
    assert len(kinds) == 12 and kinds[0] == "t14" and kinds[-1] == OTHER and "t3" not in kinds


def test_levels_of_inputs_without_speech() -> None:
    outcome = outcome_of([row("ours", "a", 0.0, 1.0)], ("ours",))
    outcome.levels = [
        Level("ours", SILENCE, -100.0, -88.0),
        Level("ours", "rain", -20.0, -50.0),
        Level("ours", "door", -30.0, -40.0),
        Level("ours", "broken", -30.0, None, "why"),
    ]
    table = Tables(outcome, resamples=20).tables()[-1]
    assert table.rows == [["ours", "-88.0", 2, "-25.0", "-45.0", "20.0 [10.0 … 30.0]"]]
    assert outcome.failed() == [("broken (ours)", "why")]


# ---------------------------------------------------------------- words


def test_word_errors_know_no_case_and_no_punctuation() -> None:
    pytest.importorskip("jiwer")
    assert count_errors("Please call Stella.", " please, CALL stella") == Words(" please, CALL stella", 0, 3)
    assert count_errors("ask her to bring", "ask to sing things").errors == 3
    assert count_errors("one two", "").errors == 2


def test_folders_without_a_recogniser_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lacks model\.bin, config\.json, tokenizer\.json"):
        Recogniser(tmp_path)
    for name in ("model.bin", "config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes(b"{}")
    pytest.importorskip("faster_whisper")
    with pytest.raises(CheckpointError, match="no Whisper model"):
        Recogniser(tmp_path)


# ---------------------------------------------------------------- command


def evaluate(*arguments: object) -> int:
    return main(["evaluate", "enhancement", *map(str, arguments)])


def test_the_command_writes_tables_report_and_picture(
    corpus: Path, tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "reports" / "enhancement.json"
    options = ("--system=none", "--tokenizer", tokenizer_folder, "--metrics=si_sdr", "--workers=1", "--device=cpu")
    data = (corpus / "speech", "--noise", corpus / "noise", "--snr", "-5", "5", "--limit", 2, "--seed", 1)
    assert evaluate(*data, *options, "-o", tmp_path / "out", "--report", report) == 0
    shown = capsys.readouterr().out
    assert (
        "## Enhancement" in shown and "clean through the tokenizer" in shown and "| -5 dB | unprocessed | 2 |" in shown
    )
    spec = importlib.util.spec_from_file_location("make_results", MAKE_RESULTS)
    assert spec is not None and spec.loader is not None
    script: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    read = script.read_report(report, report.parent)
    assert read["seed"] == 1 and read["pictures"] == ["enhancement.png"]
    assert read["tables"][0]["rows"][0][1] == 4 and any("2 of 3 clean clips" in note for note in read["notes"])
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"enhancement.json", "enhancement.csv", "rows.jsonl"}


def test_wrong_usage_is_named(
    corpus: Path, tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = (corpus / "speech", "--noise", corpus / "noise")
    pairs = ("--pairs", corpus / "noise", corpus / "speech")
    none = ("--system=none", "--tokenizer", tokenizer_folder)
    for arguments, code, reason in (
        ((), 2, "give clean speech and --noise, or --pairs"),
        ((corpus / "speech",), 2, "give clean speech and --noise, or --pairs"),
        ((*pairs, "--snr", "5"), 2, "leave --snr out"),
        ((*mixed, "--log", "log.txt"), 2, "belong to --pairs"),
        ((*mixed, "--metrics", "pesq"), 2, "known: pesq_wb"),
        ((*mixed, "--metrics", "si_sdr", "--baseline", "wiener"), 2, "known: spectral-gate, rnnoise"),
        ((*mixed, "--metrics", "si_sdr", "--system", "folder"), 2, "write NAME=FOLDER, embedded or none"),
        ((*mixed, "--metrics", "si_sdr", "--system", "none", "--system", "embedded"), 2, "give it alone"),
        ((*mixed, *none, "--metrics", "si_sdr", "--where", "speech"), 2, "write KEY=VALUE"),
        ((*mixed, *none, "--metrics", "si_sdr", "--workers", 0), 2, "at least one process"),
        ((*mixed, *none, "--metrics", "si_sdr", "--wer", tmp_path), 1, "lacks model.bin"),
        ((*pairs, *none, "--metrics", "si_sdr"), 1, "check both folders"),
    ):
        assert evaluate(*arguments, "--device", "cpu", "-o", tmp_path / "out") == code, arguments
        assert reason in capsys.readouterr().err, arguments
    assert evaluate(*mixed, "-o", corpus / "speech" / "s0.wav") == 1
    assert "s0.wav" in capsys.readouterr().err
    assert enhancement_systems.BASELINES.keys() == {"spectral-gate", "rnnoise"}
