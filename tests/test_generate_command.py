"""The command `generate`: requests, names of files, the list of clips, what is kept and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dasheng_tokenizer import load_audio
from dasheng_tokenizer.cli import main
from dasheng_tokenizer.cli_generate_requests import Request, file_name
from dasheng_tokenizer.errors import LatentError
from dasheng_tokenizer.evaluation import generation_clips
from dasheng_tokenizer.evaluation.generation_clips import MANIFEST, ClipSet, pairs, read_manifest
from dasheng_tokenizer.generation import Generator, TextToAudioPipeline

pytestmark = pytest.mark.usefixtures("one_thread")

FAST = {"steps": 2, "seconds": 0.2}
QUICK = ["--steps", "2", "--seconds", "0.2", "--device", "cpu"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def clips(folder: Path) -> list[str]:
    """All but the list, which must name them and nothing else."""
    found = [name for name in names(folder) if name != MANIFEST]
    assert sorted(read_manifest(folder)) == found
    return found


def write_requests(path: Path, *requests: dict[str, Any]) -> Path:
    path.write_text("\n\n".join(json.dumps(request) for request in requests), encoding="utf-8")
    return path


SNARE = "a snare drum hit"
REQUESTS = [
    {"text": SNARE, "labels": {"drum": "snare"}, "reference": "real-1", "seconds": 0.2},
    {"text": SNARE, "labels": {"drum": "snare"}, "reference": "real-2", "seconds": 0.2},
    {"text": SNARE, "labels": {"drum": "rim"}, "reference": "real-2", "seconds": 0.2},
    {"text": SNARE, "labels": {"drum": "rim"}, "reference": "real-2", "seconds": 0.12},
    {"text": SNARE, "seed": 4},
    {"text": SNARE},
]
LENGTHS = [3200, 3200, 3200, 1920, 6400, 6400]  # samples; 0.4 s where none is asked for


def test_one_text_to_one_file(generator_folder: Path, pipeline: TextToAudioPipeline, tmp_path: Path) -> None:
    target = tmp_path / "new" / "dog.wav"
    options = ["--model", str(generator_folder), *QUICK]
    assert main(["generate", "a dog barks twice", "-o", str(target), "--seed", "5", *options]) == 0
    assert names(target.parent) == ["dog.wav"]
    audio, rate = load_audio(target)
    clip = pipeline("a dog barks twice", seed=5, **FAST)[0]
    assert rate == 16000 and audio.shape == (1, 3200)
    assert np.allclose(audio[0], np.clip(clip.audio, -1, 1), atol=1e-3)  # 16 bits
    again = tmp_path / "again.wav"
    assert main(["generate", "a dog barks twice", "-o", str(again), "--seed", "5", *options]) == 0
    assert again.read_bytes() == target.read_bytes()


def test_several_texts_a_file_of_texts_and_several_seeds(generator_folder: Path, tmp_path: Path) -> None:
    lines, out = tmp_path / "texts.txt", tmp_path / "out"
    lines.write_text("rain\n\n  A loud bell!  \nrain\n", encoding="utf-8")
    arguments = ["generate", "a dog", "--from-file", str(lines), "-o", str(out), "--count", "2", "--seed", "7"]
    options = ["--model", str(generator_folder), *QUICK, "--batch-size", "4", "--format", "flac"]
    assert main([*arguments, *options]) == 0
    bell = file_name("A loud bell!")
    assert bell.startswith("a-loud-bell.")
    stems = ["a-dog", bell, "rain"]
    assert clips(out) == [f"{stem}.seed{seed}.flac" for stem in stems for seed in (7, 8)]
    contents = {(out / name).read_bytes() for name in clips(out)}
    assert len(contents) == 6


def test_existing_files_are_kept_unless_told(
    generator_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rain.seed0.wav").write_bytes(b"mine")
    command = ["generate", "rain", "a dog", "-o", str(tmp_path), "--model", str(generator_folder), *QUICK]
    assert main(command) == 0
    assert "1 done, 1 kept, 0 failed" in capsys.readouterr().out
    assert (tmp_path / "rain.seed0.wav").read_bytes() == b"mine"
    assert clips(tmp_path) == ["a-dog.seed0.wav", "rain.seed0.wav"]
    assert main([*command, "--overwrite"]) == 0
    assert load_audio(tmp_path / "rain.seed0.wav")[0].shape == (1, 3200)


def test_bad_texts_are_named_and_the_others_done(
    generator_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["", "rain", "x" * 10_001]
    assert main(["generate", *texts, "-o", str(tmp_path), "--model", str(generator_folder), *QUICK]) == 1
    captured = capsys.readouterr()
    assert clips(tmp_path) == ["rain.seed0.wav"]
    assert "empty" in captured.err and "10001 characters" in captured.err and "Traceback" not in captured.err
    assert "1 done, 0 kept, 2 failed" in captured.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to generate"),
        (["rain", "--seconds", "0"], "above 0 and up to 2 seconds"),
        (["rain", "--seconds", "1000"], "above 0 and up to 2 seconds"),
        (["rain", "--steps", "0"], "--steps 0"),
        (["rain", "--count", "0"], "--count 0"),
        (["rain", "--batch-size", "0"], "--batch-size 0"),
        (["rain", "--seed", "-1"], "--seed -1"),
        (["rain", "--guidance", "-2"], "guidance -2"),
        (["rain", "--method", "leap"], "invalid choice"),
        (["rain", "a dog", "-o", "one.wav"], "several clips"),
        (["rain", "--count", "2", "-o", "one.wav"], "several clips"),
    ],
)
def test_wrong_usage_ends_with_two(
    arguments: list[str],
    message: str,
    generator_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["generate", *arguments, "--model", str(generator_folder), "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err
    assert names(tmp_path) == []


def test_the_current_folder_gets_no_list_unless_it_is_named(
    generator_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = [
        "generate",
        "a dog",
        "--steps",
        "1",
        "--seconds",
        "0.2",
        "--model",
        str(generator_folder),
        "--device",
        "cpu",
    ]
    assert main(command) == 0
    assert names(tmp_path) == ["a-dog.seed0.wav"]
    assert main([*command, "-o", "."]) == 0
    assert names(tmp_path) == ["a-dog.seed0.wav", MANIFEST]


def test_files_of_texts_and_models_that_cannot_be_read_end_with_one(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text("\n  \n")
    latin.write_bytes("café".encode("latin-1"))
    for arguments, message in (
        (["--from-file", str(tmp_path / "no.txt")], "No such file"),
        (["--from-file", str(empty)], "holds no text"),
        (["--from-file", str(latin)], "no UTF-8"),
        (["--from-file", str(write_requests(tmp_path / "empty.jsonl"))], "holds no object"),
        (["rain", "--model", str(tmp_path / "no")], "no such folder"),
        (["rain", "--model", str(tokenizer_folder)], "name the folder of a generator"),
    ):
        assert main(["generate", *arguments, "-o", str(tmp_path / "out"), "--device", "cpu"]) == 1
        captured = capsys.readouterr()
        assert message in captured.err and "Traceback" not in captured.err
    assert not (tmp_path / "out").exists() or names(tmp_path / "out") == []


def test_a_batch_that_fails_is_named_and_the_next_is_done(
    generator_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = Generator.sample

    def failing(self: Generator, *arguments: Any, seeds: list[int], **settings: Any) -> list[Tensor]:
        if seeds == [0]:
            raise LatentError("ended in NaN")
        return sample(self, *arguments, seeds=seeds, **settings)

    monkeypatch.setattr(Generator, "sample", failing)
    command = ["generate", "rain", "--count", "2", "--batch-size", "1", "-o", str(tmp_path)]
    assert main([*command, "--model", str(generator_folder), *QUICK]) == 1
    assert "rain.seed0.wav: ended in NaN" in capsys.readouterr().err
    assert clips(tmp_path) == ["rain.seed1.wav"]


# ---------------------------------------------------------------------- requests and the list


def test_requests_are_made_each_and_listed_with_what_they_asked_for(generator_folder: Path, tmp_path: Path) -> None:
    lines, out = write_requests(tmp_path / "requests.jsonl", *REQUESTS), tmp_path / "out"
    command = ["generate", "--from-file", str(lines), "-o", str(out), "--model", str(generator_folder)]
    assert main([*command, "--steps", "1", "--device", "cpu"]) == 0
    assert len(clips(out)) == len(REQUESTS)
    for (name, row), request, length in zip(read_manifest(out).items(), REQUESTS, LENGTHS, strict=True):
        expected = {"seed": 0, **request}
        expected.pop("seconds", None)
        assert row == {"file": name, **expected}
        assert load_audio(out / name)[0].shape == (1, length)
    assert {"a-snare-drum-hit.seed0.wav", "a-snare-drum-hit.seed4.wav"} < set(clips(out))


def test_the_list_says_to_the_evaluation_what_was_asked_for(generator_folder: Path, tmp_path: Path) -> None:
    lines, out, real = write_requests(tmp_path / "requests.jsonl", *REQUESTS[:3]), tmp_path / "out", tmp_path / "real"
    command = ["generate", "--from-file", str(lines), "-o", str(out), "--model", str(generator_folder)]
    assert main([*command, "--steps", "1", "--device", "cpu"]) == 0
    generated = ClipSet("generated", [out])
    assert not generated.failures
    assert {facts.text for facts in generated.usable.values()} == {SNARE}
    real.mkdir()
    for number in (1, 2):
        (real / f"real-{number}.wav").write_bytes((out / clips(out)[0]).read_bytes())
    found = [
        (generated.clips[key].label("drum"), partner) for key, partner in pairs(generated, ClipSet("real", [real]))
    ]
    assert sorted(found) == [("rim", "real-2.wav"), ("snare", "real-1.wav"), ("snare", "real-2.wav")]


def test_a_clip_hangs_on_its_request_alone_and_equal_requests_are_made_once(
    generator_folder: Path, pipeline: TextToAudioPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = [{"text": "rain", "seconds": 1}, {"text": "rain", "seconds": 1.0, "labels": {}, "reference": None}]
    for number, requests in enumerate([REQUESTS, [*others, *reversed(REQUESTS), *REQUESTS]]):
        lines = write_requests(tmp_path / f"{number}.jsonl", *requests)
        command = ["generate", "--from-file", str(lines), "-o", str(tmp_path / str(number)), "--batch-size", "4"]
        assert main([*command, "--model", str(generator_folder), "--steps", "1", "--device", "cpu"]) == 0
        assert f"{len(REQUESTS) + number} done, 0 kept" in capsys.readouterr().out
    first, second = tmp_path / "0", tmp_path / "1"
    assert len(clips(second)) == len(clips(first)) + 1
    for name, row in read_manifest(first).items():
        assert row == read_manifest(second)[name]
        assert np.allclose(load_audio(first / name)[0], load_audio(second / name)[0], rtol=0, atol=1e-3)


def test_seed_and_length_of_a_line_replace_those_of_all(generator_folder: Path, tmp_path: Path) -> None:
    lines = write_requests(tmp_path / "requests.jsonl", {"text": "rain", "seed": 7}, {"text": "a bell", "seconds": 0.1})
    command = ["generate", "--from-file", str(lines), "-o", str(tmp_path / "out"), "--count", "2", "--seed", "3"]
    assert main([*command, "--model", str(generator_folder), *QUICK]) == 0
    made = {
        (row["text"], row["seed"]): load_audio(tmp_path / "out" / name)[0].shape[1]
        for name, row in read_manifest(tmp_path / "out").items()
    }
    assert made == {("rain", 7): 3200, ("rain", 8): 3200, ("a bell", 3): 1600, ("a bell", 4): 1600}


def test_clips_of_equal_length_share_a_batch(
    generator_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample, seen = Generator.sample, []

    def watching(self: Generator, text: list[Tensor], lengths: list[int], **settings: Any) -> list[Tensor]:
        seen.append(list(lengths))
        return sample(self, text, lengths, **settings)

    monkeypatch.setattr(Generator, "sample", watching)
    requests = [{"text": f"rain {number}", "seconds": (0.2, 0.4)[number % 2]} for number in range(4)]
    lines = write_requests(tmp_path / "requests.jsonl", *requests)
    command = ["generate", "--from-file", str(lines), "-o", str(tmp_path / "out"), "--batch-size", "2"]
    assert main([*command, "--model", str(generator_folder), *QUICK]) == 0
    assert seen == [[10, 10], [5, 5]]
    assert [row["text"] for row in read_manifest(tmp_path / "out").values()] == [one["text"] for one in requests]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "no JSON"),
        ("rain", "no JSON"),
        ('"rain"', "write an object"),
        ('{"seconds": 2}', '"text" must be there'),
        ('{"text": null}', '"text" must be there'),
        ('{"text": ["rain"]}', '"text" must be there'),
        ('{"text": "rain", "second": 2}', "unknown key 'second'; known are text, seconds, seed"),
        ('{"text": "rain", "seconds": 0}', '"seconds" is 0'),
        ('{"text": "rain", "seconds": true}', '"seconds" is True'),
        ('{"text": "rain", "seconds": "2"}', "\"seconds\" is '2'"),
        ('{"text": "rain", "seconds": 1e999}', "no number"),
        ('{"text": "rain", "seconds": 1' + 400 * "0" + "}", "no number"),
        ('{"text": "rain", "seconds": NaN}', "NaN is no number"),
        ('{"text": "rain", "seed": -1}', '"seed" is -1'),
        ('{"text": "rain", "seed": 1.0}', '"seed" is 1.0'),
        ('{"text": "rain", "seed": false}', '"seed" is False'),
        ('{"text": "rain", "seed": 9223372036854775807}', '"seed" is 9223372036854775807'),  # the last; two are wanted
        ('{"text": "rain", "labels": ["snare"]}', '"labels" must be an object'),
        ('{"text": "rain", "reference": 3}', '"reference" is 3'),
        ('{"text": "rain", "reference": " "}', "\"reference\" is ' '"),
        ("[" * 100_000, "no JSON"),
    ],
)
def test_a_line_that_is_no_request_is_named_before_anything_is_loaded(
    line: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = tmp_path / "requests.jsonl"
    lines.write_text(f'{{"text": "a dog"}}\n\n{line}\n', encoding="utf-8")
    command = ["generate", "--from-file", str(lines), "-o", str(tmp_path / "out"), "--count", "2"]
    assert main([*command, "--model", str(tmp_path / "nothing")]) == 1
    captured = capsys.readouterr()
    assert f"error: {lines}, line 3: " in captured.err and message in captured.err
    assert not (tmp_path / "out").exists()


def test_requests_that_cannot_be_made_are_named_and_the_others_done(
    generator_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = [{"text": " "}, {"text": "x" * 10_001}, {"text": "a \ud800"}, {"text": "rain", "seconds": 2.01}]
    lines = write_requests(tmp_path / "requests.jsonl", *requests, {"text": " rain "})
    command = ["generate", "--from-file", str(lines), "-o", str(tmp_path / "out"), "--model", str(generator_folder)]
    assert main([*command, *QUICK]) == 1
    captured = capsys.readouterr()
    for line, reason in ((1, "empty"), (3, "10001 characters"), (5, "damaged"), (7, "above 0 and up to 2 seconds")):
        assert any(f"line {line}: " in error and reason in error for error in captured.err.splitlines())
    assert "1 done, 0 kept, 4 failed" in captured.out
    assert clips(tmp_path / "out") == ["rain.seed0.wav"]


def test_the_list_keeps_the_lines_of_other_clips_and_fields_of_others(generator_folder: Path, tmp_path: Path) -> None:
    other = {"file": "sub/other.wav", "text": "a\u2028dog", "seed": 1, "mine": [1]}
    old = {"file": "rain.seed0.wav", "text": "old", "stars": 5}
    gone = {"file": "a-dog.seed0.wav", "text": "a dog"}  # removed by hand, and not made anew
    generation_clips.write_manifest(tmp_path, [old, gone, other])
    (tmp_path / "rain.seed0.wav").write_bytes(b"mine")
    command = ["generate", "rain", "a loud bell", "-o", str(tmp_path), "--model", str(generator_folder), *QUICK]
    assert main(command) == 0
    assert read_manifest(tmp_path) == {
        "sub/other.wav": other,
        "a-dog.seed0.wav": gone,
        "rain.seed0.wav": {"file": "rain.seed0.wav", "text": "rain", "stars": 5, "seed": 0},
        "a-loud-bell.seed0.wav": {"file": "a-loud-bell.seed0.wav", "text": "a loud bell", "seed": 0},
    }


def test_the_list_does_not_name_a_clip_that_was_removed_and_failed(
    generator_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: Any, **settings: Any) -> list[Tensor]:
        raise LatentError("ended in NaN")

    generation_clips.write_manifest(tmp_path, [{"file": "rain.seed0.wav"}, {"file": "other.wav"}])
    monkeypatch.setattr(Generator, "sample", failing)
    assert main(["generate", "rain", "-o", str(tmp_path), "--model", str(generator_folder), *QUICK]) == 1
    assert list(read_manifest(tmp_path)) == ["other.wav"]


@pytest.mark.parametrize("batches", [0, 1])
def test_a_run_that_was_killed_goes_on_to_the_same_list(
    batches: int, generator_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when the clips of a batch are written and their lines are not, the worst moment."""
    lines, whole, cut = write_requests(tmp_path / "requests.jsonl", *REQUESTS), tmp_path / "whole", tmp_path / "cut"
    options = ["--batch-size", "2", "--model", str(generator_folder), "--steps", "1", "--device", "cpu"]
    command = ["generate", "--from-file", str(lines), *options, "-o"]
    assert main([*command, str(whole)]) == 0
    write, calls = generation_clips.write_manifest, []

    def dying(*arguments: Any) -> Path:
        calls.append(1)
        if len(calls) > batches:
            raise KeyboardInterrupt
        return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(generation_clips, "write_manifest", dying)
        assert main([*command, str(cut)]) == 130
    there = [name for name in names(cut) if name != MANIFEST]
    assert len(there) == 2 * batches + 2
    assert (cut / MANIFEST).exists() == bool(batches)
    assert not batches or len(read_manifest(cut)) == 2 * batches
    assert main([*command, str(cut)]) == 0
    assert names(cut) == names(whole)
    assert (cut / MANIFEST).read_bytes() == (whole / MANIFEST).read_bytes()


def test_kept_clips_are_listed_without_loading_anything_and_the_list_is_written_once(tmp_path: Path) -> None:
    (tmp_path / "rain.seed0.wav").write_bytes(b"mine")
    command = ["generate", "rain", "-o", str(tmp_path), "--model", str(tmp_path / "nothing")]
    assert main(command) == 0
    assert clips(tmp_path) == ["rain.seed0.wav"]
    before = (tmp_path / MANIFEST).stat()
    assert main(command) == 0
    assert (tmp_path / MANIFEST).stat() == before  # a new file would have another number


def test_a_damaged_list_is_named_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / MANIFEST
    for content, message in (
        (b'{"file": "a.wav"}\n{"fi', "line 2"),
        (b"\xff\n", "cannot be read"),
        (b"[]\n", "line 1"),
    ):
        path.write_bytes(content)
        assert main(["generate", "rain", "-o", str(tmp_path), "--model", str(tmp_path / "nothing")]) == 1
        captured = capsys.readouterr()
        assert str(path) in captured.err and message in captured.err and "Traceback" not in captured.err
        assert path.read_bytes() == content and names(tmp_path) == [MANIFEST]


REQUEST = st.builds(
    Request,
    st.sampled_from(["rain", "Rain", "rain 1"]),
    seconds=st.sampled_from([None, 1.0, 1.5]),
    labels=st.dictionaries(st.sampled_from(["a", "b", "\ud800"]), st.sampled_from([1, "1", None, ["a"]]), max_size=2),
    reference=st.sampled_from([None, "a", "b"]),
)


@given(REQUEST, REQUEST)
@settings(max_examples=50, deadline=None)
def test_requests_have_the_same_name_only_where_all_they_ask_for_is_the_same(one: Request, other: Request) -> None:
    rows = [(request.row("", 0), request.seconds) for request in (one, other)]
    assert (one.stem == other.stem) == (rows[0] == rows[1])
    assert one.stem.startswith(file_name(one.text))


# ---------------------------------------------------------------------- names of files


@given(st.lists(st.text(max_size=50), min_size=2, max_size=4, unique=True))
@settings(max_examples=25, deadline=None)
def test_names_of_files_are_safe_short_and_unique(texts: list[str]) -> None:
    found = [file_name(text) for text in texts]
    assert len({name.casefold() for name in found}) == len(found)
    for name in found:
        assert 0 < len(name.encode()) < 200
        assert name not in (".", "..") and not name.startswith((".", "-"))
        assert all(character.isalnum() or character in ".-" for character in name.replace("\u0307", ""))


def test_names_of_files_are_readable() -> None:
    assert file_name("a dog barks") == "a-dog-barks"
    assert file_name("A dog barks!").startswith("a-dog-barks.")
    assert len(file_name("word " * 1000)) < 60
    assert file_name("../../etc/passwd").startswith("etc-passwd.")
