"""The data recipe on a small archive made here: whole command, resume, checksums, no leakage."""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

from dasheng_tokenizer.errors import DataError
from dasheng_tokenizer.training.clips import read_clips

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "data"
sys.path.insert(0, str(RECIPE))  # as it is when build.py is started

from archive import fetch, load_packages  # noqa: E402
from build import main  # noqa: E402
from containers import unpack_containers  # noqa: E402
from decoding import trim_silence  # noqa: E402
from instruments import midi_events  # noqa: E402
from narrow_band import main as narrow_band  # noqa: E402
from shards import add_member, fingerprints, without_copies  # noqa: E402
from sources import cut, load_rules, split_of  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb makes and unpacks the packages"),
]


def noise(seconds: float, seed: int, level: float = 0.1) -> np.ndarray:
    """White noise at 16 kHz."""
    return (level * np.random.default_rng(seed).standard_normal(round(seconds * 16_000))).astype(np.float32)


class Archive:
    """A folder laid out like a mirror, with two packages and the lists of the recipe."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.packages = folder, {}
        words = {f"usr/share/words/{index:02d}.wav": noise(0.5, index) for index in range(30)}
        words["usr/share/words/copy.wav"] = words["usr/share/words/03.wav"]
        self.add("words", words)
        self.add("songs", {f"usr/share/songs/{index}.wav": noise(45.0, 100 + index) for index in range(2)})
        listed = [
            self.listed("speech", "test", 0, "words", "usr/share/words/00.wav", "word:00", 100, 0.45),
            self.listed("speech", "train", 0, "words", "usr/share/words/01.wav", "word:01", 0, 0.5),
            self.listed("music", "test", 0, "songs", "usr/share/songs/0.wav", "song:0", 160_000, 20.0)
            | {"start_s": 10.0},
        ]
        (folder / "clips.xz").write_bytes(lzma.compress("".join(json.dumps(row) + "\n" for row in listed).encode()))
        (folder / "packages.yaml").write_text(yaml.safe_dump(self.packages))
        rules = [
            self.rule("words", r"usr/share/words/(?P<word>\w+)\.wav", "speech", "word:{word}"),
            self.rule("songs", r"usr/share/songs/(?P<song>\d)\.wav", "music", "song:{song}"),
        ]
        (folder / "rules.yaml").write_text(yaml.safe_dump(rules))

    def add(self, name: str, files: dict[str, np.ndarray]) -> None:
        root = self.folder / "root" / name
        for path, audio in files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(root / path, audio, 16_000)
        document = root / "usr/share/doc" / name / "copyright"
        document.parent.mkdir(parents=True)
        document.write_text(f"Licence of {name}: free.\n")
        (root / "DEBIAN").mkdir()
        control = (
            f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: Nobody <nobody@example.org>\nDescription: x\n"
        )
        (root / "DEBIAN/control").write_text(control)
        deb = self.folder / "pool" / f"{name}.deb"
        deb.parent.mkdir(exist_ok=True)
        subprocess.run(["dpkg-deb", "-Znone", "-b", root, deb], check=True, capture_output=True)
        digest = hashlib.sha256(deb.read_bytes()).hexdigest()
        size = deb.stat().st_size
        self.packages[name] = {"version": "1", "file": f"pool/{name}.deb", "size": size, "sha256": digest}

    @staticmethod
    def listed(
        domain: str, split: str, number: int, package: str, path: str, group: str, first: int, seconds: float
    ) -> dict[str, object]:
        return {
            "key": f"{domain}-{split}-{number:05d}", "shard": f"{domain}-{split}-000.tar", "domain": domain,
            "subset": "word", "split": split, "duration_s": seconds, "source_package": package, "source_path": path,
            "license": "free", "group": group, "labels": {"language": "xx"}, "caption": "a clip", "first_sample": first,
        }  # fmt: skip

    @staticmethod
    def rule(package: str, files: str, domain: str, group: str) -> dict[str, object]:
        return {
            "package": package, "files": files, "domain": domain, "subset": "word", "license": "free",
            "caption": "a clip", "group": group, "split": "by-group", "labels": {"language": "xx", "name": "{stem}"},
        }  # fmt: skip

    def build(self, output: Path, *more: str) -> None:
        lists = {"--packages": "packages.yaml", "--clips": "clips.xz", "--rules": "rules.yaml"}
        arguments = [part for flag, name in lists.items() for part in (flag, str(self.folder / name))]
        command = ["build.py", "-o", str(output), "--mirror", str(self.folder), *arguments, *more]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", command)
            main()


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return Archive(tmp_path_factory.mktemp("archive"))


@pytest.fixture(scope="module")
def built(archive: Archive, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("built")
    archive.build(output, "--wide", "--speeds", "0.8")
    return output


def rows(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def test_listed_clips_are_the_listed_samples(built: Path) -> None:
    with tarfile.open(built / "speech-test-000.tar") as tar:
        audio, rate = soundfile.read(io.BytesIO(tar.extractfile("speech-test-00000.flac").read()), dtype="float32")
        fields = json.load(tar.extractfile("speech-test-00000.json"))
    assert rate == 16_000
    np.testing.assert_allclose(audio, noise(0.5, 0)[100 : 100 + 7200], atol=1e-4)
    assert fields["domain"] == "speech" and fields["group"] == "word:00"


def test_no_group_and_no_copy_is_on_two_sides(built: Path) -> None:
    sides: dict[object, set[object]] = {}
    for row in rows(built):
        sides.setdefault(row["group"], set()).add(row["split"])
    assert all(len(splits) == 1 for splits in sides.values())
    assert {row["split"] for row in rows(built) if row["part"] == "wide"} >= {"train", "test"}
    names = [row["source_path"] for row in rows(built) if row["part"] != "augmented"]
    assert len({"usr/share/words/03.wav", "usr/share/words/copy.wav"} & set(names)) == 1
    assert names.count("usr/share/words/00.wav") == 1, "what is listed is not taken again"


def test_windows_of_listed_tracks_do_not_overlap_those_of_the_list(built: Path) -> None:
    begins = [row["start_s"] for row in rows(built) if row["source_path"] == "usr/share/songs/0.wav"]
    assert sorted(begins) == [10.0, 40.0]


def test_augmented_clips_come_from_training_clips_alone_and_last_longer(built: Path) -> None:
    originals = {(r["source_path"], r.get("start_s")): r for r in rows(built) if r["part"] != "augmented"}
    listed = {row["source_path"] for row in originals.values() if row["part"] == "corpus"}
    slow = [row for row in rows(built) if row["part"] == "augmented"]
    assert listed & {row["source_path"] for row in slow}
    for row in slow:
        original = originals[row["source_path"], row.get("start_s")]
        assert row["split"] == original["split"] == "train"
        assert row["duration_s"] == pytest.approx(original["duration_s"] / 0.8, abs=0.001)
    copies = {"usr/share/words/03.wav", "usr/share/words/copy.wav"}
    assert len(copies & {row["source_path"] for row in slow}) <= 1, "a copy that was left out leaves no other speeds"


def test_statistics_and_licences_are_beside_the_shards(built: Path) -> None:
    statistics = json.loads((built / "statistics.json").read_text())
    seconds = sum(row["duration_s"] for row in rows(built))
    assert sum(sum(hours.values()) for hours in statistics["hours"].values()) == pytest.approx(seconds / 3600, abs=1e-3)
    assert statistics["copies_left_out"] >= 1
    text = (built / "LICENCES.txt").read_text()
    assert "Licence of words: free." in text and "Licence of songs: free." in text


def test_an_interrupted_build_goes_on_and_gives_the_same_shards(
    archive: Archive, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import build

    calls = []

    def killed(audio: np.ndarray, split: str) -> tuple[str, bytes]:
        calls.append(split)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return whole(audio, split)

    whole = build.encoded
    monkeypatch.setattr(build, "encoded", killed)
    with pytest.raises(KeyboardInterrupt):
        archive.build(tmp_path, "--wide", "--speeds", "0.8")
    assert not list(tmp_path.glob("*.tar"))
    archive.build(tmp_path, "--wide", "--speeds", "0.8")
    made = len(calls)
    archive.build(tmp_path, "--wide", "--speeds", "0.8")
    assert len(calls) == made, "what is whole is not made again"
    assert (tmp_path / "manifest.jsonl").read_text() == (built / "manifest.jsonl").read_text()
    for shard in built.glob("*-test-*.tar"):  # Ogg streams carry a random serial number, FLAC does not
        assert (tmp_path / shard.name).read_bytes() == shard.read_bytes()


def test_a_wrong_checksum_is_refused_and_nothing_is_kept(archive: Archive, tmp_path: Path) -> None:
    package = load_packages(archive.folder / "packages.yaml")["words"]
    mirror = tmp_path / "mirror"
    shutil.copytree(archive.folder / "pool", mirror / "pool")
    with (mirror / package.file).open("r+b") as file:
        file.seek(200)
        file.write(b"changed")
    with pytest.raises(DataError, match="checksum"):
        fetch(package, str(mirror), tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    with pytest.raises(DataError, match="--mirror"):
        fetch(package, str(tmp_path / "nowhere"), tmp_path / "cache")


def test_a_second_build_in_the_same_folder_is_refused(archive: Archive, tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "work").mkdir()
    with (tmp_path / "work" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="--work"):
            archive.build(tmp_path)


def test_comparison_tells_equal_from_different(
    archive: Archive, built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(built, tmp_path / "shipped", ignore=shutil.ignore_patterns("work", "wide-*", "augmented-*"))
    manifest = tmp_path / "shipped" / "manifest.jsonl"
    listed = [row for row in rows(built) if row["part"] == "corpus"]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in listed))
    with pytest.raises(SystemExit) as leaving:
        archive.build(built, "--compare", str(tmp_path / "shipped"))
    assert leaving.value.code == 0 and "are equal" in capsys.readouterr().out
    manifest.write_text("".join(json.dumps(row) + "\n" for row in [*listed, listed[0] | {"key": "speech-test-99999"}]))
    with pytest.raises(SystemExit) as leaving:
        archive.build(built, "--compare", str(tmp_path / "shipped"))
    assert leaving.value.code == 1 and "speech-test-99999" in capsys.readouterr().out


def test_containers_give_their_audio_and_write_nowhere_else(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "pak0.pk3", "w") as archive:
        archive.writestr("sound/a.wav", b"RIFF....")
        archive.writestr("textures/b.png", b"no audio")
    wave = b"RIFF" + struct.pack("<I", 4) + b"WAVE"
    name = b'"Big crash". By nobody.\0'
    (tmp_path / "set.cat").write_bytes(struct.pack("<II", 8, 12) + bytes([len(name)]) + name + wave)
    unpack_containers(tmp_path)
    found = {path.relative_to(tmp_path / "unpacked").as_posix() for path in tmp_path.glob("unpacked/**/*.wav")}
    assert found == {"sound/a.wav", "00_Big_crash.wav"}
    assert (tmp_path / "unpacked/00_Big_crash.wav").read_bytes() == wave
    with zipfile.ZipFile(tmp_path / "bad.pk3", "w") as archive:
        archive.writestr("../../outside.wav", b"RIFF")
    with pytest.raises(DataError, match="outside"):
        unpack_containers(tmp_path)


def test_the_shipped_lists_fit_each_other() -> None:
    packages = load_packages(RECIPE / "packages.yaml")
    rules = [rule for name in ("wide", "more") for rule in load_rules(RECIPE / f"{name}.yaml")]
    assert {rule["package"] for rule in rules} <= packages.keys()
    listed = [json.loads(line) for line in lzma.decompress((RECIPE / "corpus.jsonl.xz").read_bytes()).splitlines()]
    assert {row["source_package"] for row in listed} <= packages.keys()
    sides: dict[tuple[str, str], set[str]] = {}
    for row in listed:
        sides.setdefault((row["subset"], row["group"]), set()).add(row["split"])
    assert all(len(splits) == 1 for splits in sides.values())


def test_groups_spread_over_the_splits_by_their_name() -> None:
    rule = {"split": "by-group"}
    splits = [split_of(rule, f"group {index}", {}) for index in range(2000)]
    assert splits.count("test") == pytest.approx(200, abs=60)
    assert splits.count("valid") == pytest.approx(100, abs=45)
    assert split_of(rule, "known", {"known": "valid"}) == "valid"
    assert split_of({"split": "test"}, "any", {}) == "test"


def test_cutting_drops_silence_and_pads_short_sounds() -> None:
    sound = np.concatenate([np.zeros(8000, np.float32), noise(0.1, 0), np.zeros(8000, np.float32)])
    first, last = trim_silence(sound)
    assert 7000 < first <= 8000 and 9600 <= last < 10_600
    ((_, part, padded),) = cut({"domain": "sound"}, sound, set())
    assert padded and len(part) == 5600
    assert list(cut({"domain": "speech"}, sound, set())) == []
    assert list(cut({"domain": "sound"}, sound * 1e-3, set())) == []
    pieces = [len(part) for _, part, _ in cut({"domain": "speech"}, noise(50.0, 1), set())]
    assert len(pieces) == 3 and max(pieces) - min(pieces) <= 1


def test_copies_are_found_whatever_their_codec(tmp_path: Path) -> None:
    audio = noise(1.0, 5)
    clips = {"0-listed": audio, "1-again": audio, "2-nearly": audio * 0.97 + noise(1.0, 7, level=0.01)}
    clips |= {"3-alike": noise(1.0, 6), "4-longer": noise(1.2, 5)}
    marked = []
    for name, samples in clips.items():
        soundfile.write(tmp_path / f"{name}.wav", samples, 16_000)
        exact, curve = fingerprints(samples)
        row = {"domain": "speech", "split": "train", "source_package": "x", "source_path": name, "labels": {}}
        row["duration_s"] = len(samples) / 16_000
        marked.append(row | {"file": str(tmp_path / f"{name}.wav"), "exact": exact, "curve": curve})
    kept, dropped = without_copies(marked[:1], marked[1:])
    assert [Path(row["file"]).stem for row in kept] == ["3-alike", "4-longer"] and dropped == 2


def test_notes_of_a_piece_come_without_its_drums_and_in_seconds(tmp_path: Path) -> None:
    mido = pytest.importorskip("mido")
    track = mido.MidiTrack()
    track += [
        mido.MetaMessage("set_tempo", tempo=1_000_000),  # a beat a second
        mido.Message("program_change", channel=2, program=40),
        mido.Message("note_on", channel=2, note=60, velocity=80, time=480),
        mido.Message("note_on", channel=9, note=36, velocity=80),
        mido.Message("control_change", channel=2, control=7, value=1),
        mido.Message("note_on", channel=2, note=60, velocity=0, time=240),
    ]
    file = mido.MidiFile(ticks_per_beat=480)
    file.tracks.append(track)
    file.save(tmp_path / "piece.mid")
    events = [(event.second, event.kind, event.values) for event in midi_events(tmp_path / "piece.mid")]
    assert events == [
        (0.0, "program_change", (2, 40)),
        (1.0, "noteon", (2, 60, 80)),
        (1.5, "noteoff", (2, 60)),
    ]
    (tmp_path / "no.mid").write_bytes(b"no MIDI")
    with pytest.raises(DataError, match=r"no\.mid"):
        midi_events(tmp_path / "no.mid")


def test_notes_of_another_sound_font_keep_their_side(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sources

    class Player:
        def __init__(self, font: Path) -> None:
            assert font == tmp_path / "font.sf2"

        def __enter__(self) -> Player:
            return self

        def __exit__(self, *_: object) -> None: ...

        def note(self, labels: dict[str, int], seconds: float) -> np.ndarray:
            return noise(seconds, 0, level=0.1 if labels["pitch"] < 100 else 0.0)

    monkeypatch.setattr(sources, "SoundFontPlayer", Player)
    row = {"subset": "note", "split": "test", "group": "gm:001", "duration_s": 1.5, "key": "k", "shard": "s"}
    corpus = [row | {"labels": {"pitch": pitch}} for pitch in (60, 100)] + [row | {"subset": "clip"}]
    rule = {"package": "font", "license": "free", "sound_font": "font.sf2"}
    made = [row for row, _ in sources.rerendered_notes(rule, tmp_path, corpus)]
    assert [(row["split"], row["group"], row["labels"]["pitch"]) for row in made] == [("test", "gm:001", 60)]
    assert made[0]["source_package"] == "font" and "key" not in made[0]


def test_narrow_copies_are_empty_above_their_band_and_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = tmp_path / "speech-train-000.tar"
    with tarfile.open(shard, "w") as tar:
        for number in range(20):
            file = io.BytesIO()
            soundfile.write(file, noise(0.5, number), 16_000, format="FLAC")
            add_member(tar, f"clip-{number}.flac", file.getvalue())
            add_member(tar, f"clip-{number}.json", b'{"domain":"speech"}')
    command = ["narrow_band.py", str(shard), "-o", str(tmp_path / "out"), "--every", "4", "--rates", "8000", "12000"]
    monkeypatch.setattr(sys, "argv", command)
    narrow_band()
    made = tmp_path / "out" / "narrow-speech-train-000.tar"
    clips = list(read_clips([made]))
    assert 1 <= len(clips) <= 12 and {clip.domain for clip in clips} == {"speech"}
    for clip in clips:
        rate = int(clip.key.rpartition("-")[2])
        assert clip.audio.shape == (8000,)
        spectrum = np.abs(np.fft.rfft(clip.audio * np.hanning(8000))) ** 2  # bins of 2 Hz
        edge = rate // 4
        assert spectrum[edge + 100 :].mean() < 1e-6 * spectrum[: edge - 200].mean()
    before = made.stat().st_mtime_ns
    narrow_band()
    assert made.stat().st_mtime_ns == before
    monkeypatch.setattr(sys, "argv", [*command, "16000"])
    with pytest.raises(SystemExit):
        narrow_band()
    assert "below 16000" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["narrow_band.py", str(tmp_path / "none.tar"), "-o", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        narrow_band()
    assert "none.tar does not exist" in capsys.readouterr().err
