"""Latent data sets: what is stored is what the model gives, and a killed encoding ends as one that was not killed."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import signal
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader

from conftest import tiny
from dasheng_tokenizer.cli import main
from dasheng_tokenizer.errors import ConfigurationError, DataError, LatentError, ModelMismatchError, OutputError
from dasheng_tokenizer.generation.latent_dataset import LatentDataset
from dasheng_tokenizer.generation.latent_index import LatentIndex, TokenStatistics
from dasheng_tokenizer.scale.encode import encode_latents
from dasheng_tokenizer.scale.windows import captions_of, equal_spans

pytestmark = pytest.mark.usefixtures("one_thread")

RATE = 16_000
WIDTH = 5


class StandIn:
    """A tokenizer of which only the public interface is there: five figures of every 640 samples."""

    def __init__(self, name: str = "stand-in", gain: float = 1.0, before: Callable[[int], None] | None = None) -> None:
        self.name, self.gain, self.before = name, gain, before
        self.shapes: list[tuple[int, int]] = []
        self.padded: list[int] = []  # samples of padding in each batch

    @property
    def latent_dim(self) -> int:
        return WIDTH

    def weights_hash(self) -> str:
        return self.name

    def encode(self, audio: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        assert padding_mask is not None
        if self.before is not None:
            self.before(len(self.shapes))
        self.shapes.append((audio.shape[0], audio.shape[1]))
        self.padded.append(int((~padding_mask).sum()))
        blocks = F.pad(audio, (0, -audio.shape[1] % 640)).unflatten(1, (-1, 640))  # (B, T, 640)
        figures = (blocks.mean(2), blocks.amax(2), blocks.amin(2), blocks[..., 0], blocks.square().mean(2))
        return self.gain * torch.stack(figures, 2)


def noise(seconds: float, seed: int) -> np.ndarray:
    return (0.2 * np.random.default_rng(seed).standard_normal(round(seconds * RATE))).astype(np.float32)


def flac(audio: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, audio, RATE, format="FLAC")
    return file.getvalue()


def decoded(data: bytes) -> Tensor:
    return torch.from_numpy(soundfile.read(io.BytesIO(data), dtype="float32")[0])


def clip(key: str, seconds: float, seed: int, **row: Any) -> dict[str, bytes]:
    return {f"{key}.flac": flac(noise(seconds, seed)), f"{key}.json": json.dumps(row).encode()}


def write_tar(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def corpus(folder: Path, clips: int = 24, broken: bool = True) -> list[str]:
    """Two tar shards of clips of many lengths; among them one without caption, one that is no audio, one too long."""
    members: dict[str, bytes] = {}
    for i in range(clips):
        members |= clip(f"c{i:02d}", 0.1 + 0.07 * (i * 7 % 11), i, caption=f"clip {i}", labels={"number": i})
    if broken and clips > 12:
        members = {"a.flac": b"no audio", "a.json": b'{"caption": "a"}'} | members
        del members["c05.json"]
        members["c11.flac"] = b"broken"
        members["c12.json"] = b"{"
    members |= clip("long", 3.0, 99, caption="a long one")
    names = list(members)
    middle = names.index("c13.flac") if clips > 13 else len(names)
    folder.mkdir(exist_ok=True)
    parts = (names[:middle], names[middle:])
    return [write_tar(folder / f"part-{n}.tar", {name: members[name] for name in part}) for n, part in enumerate(parts)]


def encode(sources: Sequence[str | Path], folder: Path, model: Any = None, **options: Any) -> LatentIndex:
    """Shards of 2.5 KiB, items of 1 s, batches of 1 s: each a few times over."""
    settings = {"max_seconds": 1.0, "shard_megabytes": 2.5 / 1024, "batch_seconds": 1.0, **options}
    return encode_latents(list(sources), folder, model or StandIn(), source_name="stand-in", progress=False, **settings)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# ---------------------------------------------------------------------------------------------------- content


@pytest.mark.parametrize("kind", ["dasheng", "whisper"])
def test_an_item_is_what_the_model_gives_for_the_clip_alone(kind: str, tmp_path: Path) -> None:
    model = tiny(kind)
    lengths = (0.5, 0.03, 1.3, 0.31)
    members = {name: data for i, s in enumerate(lengths) for name, data in clip(f"c{i}", s, i, caption="x").items()}
    encode_latents([write_tar(tmp_path / "a.tar", members)], tmp_path / "z", model, source_name="tiny", dtype="float32")
    data = LatentDataset(tmp_path / "z")
    data.require_model(model)
    assert [item.key for item in data] == ["c0", "c1", "c2", "c3"]
    for i, item in enumerate(data):
        with torch.no_grad():
            alone = model.encode(decoded(members[f"c{i}.flac"])[None])[0]
        assert item.latents.shape == alone.shape == (data.num_tokens[i], model.latent_dim)
        torch.testing.assert_close(item.latents, alone, atol=1e-5, rtol=0)


def test_captions_and_labels_come_along(tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    rows = [{"text": "a bell"}, {"text": ["a dog", " ", "ein Hund "], "labels": {"a": [1]}, "domain": "sound"}]
    for i, row in enumerate(rows):
        for name, data in clip(f"c{i}", 0.2, i, **row).items():
            (folder / name).write_bytes(data)
    index = encode([folder], tmp_path / "z", captions="text")
    first, second = LatentDataset(tmp_path / "z")
    assert (first.captions, first.labels) == (("a bell",), {})
    assert (second.captions, second.labels) == (("a dog", "ein Hund"), {"labels": {"a": [1]}, "domain": "sound"})
    assert index.skipped == {} and index.tokenizer == "stand-in"


@pytest.mark.parametrize("value", [None, "", " ", [], [""], 3, ["a", None], {"a": "b"}])
def test_what_is_no_caption(value: object) -> None:
    assert captions_of({"caption": value}, "caption") == () == captions_of({}, "caption")


def test_statistics_are_those_of_all_stored_tokens(tmp_path: Path) -> None:
    index = encode(corpus(tmp_path), tmp_path / "z", StandIn(gain=300.0))
    data = LatentDataset(tmp_path / "z")
    tokens = torch.cat([item.latents for item in data]).double()
    assert index.shards > 3 and len(tokens) == index.tokens == data.num_tokens.sum()
    for found in (index, data.index):
        torch.testing.assert_close(found.statistics.mean, tokens.mean(0), atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(found.statistics.std, tokens.std(0, correction=0), atol=1e-12, rtol=1e-12)
        assert found.mean.dtype == found.std.dtype == torch.float32


def test_statistics_hold_far_from_zero() -> None:
    tokens = 1e6 + torch.randn(999, 2, generator=torch.Generator().manual_seed(0)).double()
    merged = TokenStatistics.of(tokens[:0])
    for part in tokens.split(7):
        merged = merged.merge(TokenStatistics.from_json(json.loads(json.dumps(TokenStatistics.of(part).to_json()))))
    torch.testing.assert_close(merged.std, tokens.std(0, correction=0), atol=0, rtol=1e-9)


def test_number_types(tmp_path: Path) -> None:
    sources = corpus(tmp_path, broken=False)
    exact: dict[str, LatentDataset] = {}
    stored: dict[str, torch.dtype] = {}
    for dtype in ("float32", "float16", "bfloat16"):
        encode(sources, tmp_path / dtype, dtype=dtype, shard_megabytes=1)
        exact[dtype] = LatentDataset(tmp_path / dtype)
        stored[dtype] = load_file(tmp_path / dtype / "latents-00000-000.safetensors")["000000"].dtype
        assert exact[dtype][3].latents.dtype == torch.float32
        torch.testing.assert_close(exact[dtype][3].latents, exact["float32"][3].latents, atol=1e-2, rtol=1e-2)
    assert stored == {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def test_latents_that_do_not_fit_the_number_type_are_named(tmp_path: Path) -> None:
    members = clip("loud", 0.2, 0, caption="x") | {
        "quiet.flac": flac(np.zeros(RATE)),
        "quiet.json": b'{"caption": "y"}',
    }
    source = write_tar(tmp_path / "a.tar", members)
    index = encode([source], tmp_path / "half", StandIn(gain=1e6))
    assert index.clips == 1 and index.skipped == {"a.tar/loud": "its latents are not finite as float16"}
    assert [item.key for item in LatentDataset(tmp_path / "half")] == ["quiet"]
    assert not encode([source], tmp_path / "full", StandIn(gain=1e6), dtype="float32").skipped


# ---------------------------------------------------------------------------------------------------- windows, batches


@given(samples=st.integers(1, 10**6), most=st.integers(1, 800))
def test_spans_cover_a_clip_in_windows_of_equal_length(samples: int, most: int) -> None:
    spans = equal_spans(samples, most)
    assert spans[0][0] == 0 and spans[-1][1] == samples
    assert all(end == start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
    assert all(start % 640 == 0 for start, _ in spans)
    tokens = [-(-(end - start) // 640) for start, end in spans]
    assert max(tokens) <= most and max(tokens) - min(tokens) <= 1
    assert len(spans) == -(-sum(tokens) // most) and sum(tokens) == -(-samples // 640)


def test_a_long_clip_becomes_windows_with_its_captions(tmp_path: Path) -> None:
    members = clip("long", 2.5, 0, caption=["a", "b"])
    encode([write_tar(tmp_path / "a.tar", members)], tmp_path / "z", dtype="float32")
    items = list(LatentDataset(tmp_path / "z"))
    assert [(item.key, len(item.latents)) for item in items] == [("long@0", 21), ("long@13440", 21), ("long@26880", 21)]
    assert {item.captions for item in items} == {("a", "b")}
    whole = StandIn().encode(decoded(members["long.flac"])[None], torch.ones(1, 40_000, dtype=torch.bool))[0]
    torch.testing.assert_close(torch.cat([item.latents for item in items]), whole)


def test_memory_is_bounded_and_clips_of_like_length_go_together(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for i in range(40):
        members |= clip(f"c{i:02d}", (0.2, 1.0)[i % 2], i, caption="x")
    model = StandIn()
    encode([write_tar(tmp_path / "a.tar", members)], tmp_path / "z", model, shard_megabytes=1, batch_seconds=2.0)
    assert max(count * samples for count, samples in model.shapes) <= 2 * RATE  # batch_seconds
    assert sum(count for count, _ in model.shapes) == 40 and len(model.shapes) < 20
    assert sum(model.padded) < 0.2 * sum(count * samples for count, samples in model.shapes)


def test_shards_stay_within_their_size(tmp_path: Path) -> None:
    index = encode(corpus(tmp_path), tmp_path / "z")
    sizes = [path.stat().st_size for path in sorted((tmp_path / "z").glob("*.safetensors"))]
    assert len(sizes) == index.shards > 3
    assert max(sizes) <= 2.5 * 1024 and min(sizes[:-1]) > 800


# ---------------------------------------------------------------------------------------------------- interruption


class Killed(BaseException):
    """Stands for a signal."""


@pytest.mark.parametrize("batch", range(0, 12, 2))
def test_an_interrupted_encoding_repeats_one_shard_and_gives_the_same_bytes(batch: int, tmp_path: Path) -> None:
    sources = corpus(tmp_path / "data")
    whole = StandIn()
    encode(sources, tmp_path / "whole", whole)
    assert len(whole.shapes) > batch
    started: list[int] = []

    def stop(count: int) -> None:
        started.append(len(list((tmp_path / "z").glob("latents-*.json"))))
        if count == batch:
            raise Killed

    with pytest.raises(Killed):
        encode(sources, tmp_path / "z", StandIn(before=stop))
    assert not (tmp_path / "z" / "index.json").exists()
    again = StandIn()
    encode(sources, tmp_path / "z", again)
    assert files_of(tmp_path / "z") == files_of(tmp_path / "whole")
    in_shard = sum(shards == started[-1] for shards in started) - 1  # batches done and lost
    assert len(again.shapes) == len(whole.shapes) - batch + in_shard


@pytest.mark.parametrize("after", [False, True])
def test_a_stop_at_any_file_leaves_nothing_half(after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = corpus(tmp_path / "data")
    expected = encode(sources, tmp_path / "whole")
    replace, count, stops = os.replace, 0, (1, 2, 3, 5, 9, 14)

    def stopping(source: Any, target: Any) -> None:
        nonlocal count
        count += 1
        if after:
            replace(source, target)
        if count in stops:
            raise Killed
        if not after:
            replace(source, target)

    monkeypatch.setattr(os, "replace", stopping)
    for _ in stops:
        with pytest.raises(Killed):
            encode(sources, tmp_path / "z")
        if (tmp_path / "z").exists():
            kept = {name: data for name, data in files_of(tmp_path / "z").items() if name != "encoding.json"}
            assert kept.items() <= files_of(tmp_path / "whole").items()
    finished = encode(sources, tmp_path / "z")
    assert files_of(tmp_path / "z") == files_of(tmp_path / "whole")
    assert finished.clips == expected.clips == len(LatentDataset(tmp_path / "z"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_process_is_resumed(tmp_path: Path) -> None:
    sources = corpus(tmp_path / "data")
    encode(sources, tmp_path / "whole")

    def die(count: int) -> None:
        if count == 12:
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(
        target=encode, args=(sources, tmp_path / "z", StandIn(before=die))
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    # What a kill within a write leaves.
    shards = len(list((tmp_path / "z").glob("latents-00001-*.json")))
    assert shards >= 1
    (tmp_path / "z" / f".latents-00001-{shards:03d}.safetensors.01abcdef.partial.safetensors").write_bytes(b"half")
    encode(sources, tmp_path / "z")
    assert files_of(tmp_path / "z") == files_of(tmp_path / "whole")


def test_a_finished_data_set_is_left_alone_and_a_lost_shard_made_again(tmp_path: Path) -> None:
    sources = corpus(tmp_path / "data")
    first = encode(sources, tmp_path / "z")
    before = files_of(tmp_path / "z")
    model = StandIn()
    again = encode(sources, tmp_path / "z", model)
    assert not model.shapes and files_of(tmp_path / "z") == before
    assert (again.clips, again.hours, again.skipped) == (first.clips, first.hours, first.skipped)
    (tmp_path / "z" / "latents-00000-001.safetensors").unlink()
    with pytest.raises(DataError, match="missing"):
        LatentDataset(tmp_path / "z")
    encode(sources, tmp_path / "z", model)
    assert model.shapes and files_of(tmp_path / "z") == before


def test_another_model_other_options_or_other_sources_are_refused_unless_overwritten(tmp_path: Path) -> None:
    sources = corpus(tmp_path / "data")
    encode(sources, tmp_path / "z")
    before = files_of(tmp_path / "z")
    (tmp_path / "other").mkdir()
    other = write_tar(tmp_path / "other" / "part-0.tar", clip("d", 0.2, 5, caption="d"))
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ModelMismatchError, "overwrite", {"model": StandIn("another")}),
        (OutputError, "dtype float16 → float32.*overwrite", {"dtype": "float32"}),
        (OutputError, "max_seconds 1.0 → 0.5.*overwrite", {"max_seconds": 0.5}),
        (OutputError, "sources.*overwrite", {"sources": [other]}),
        (OutputError, "sources.*overwrite", {"sources": sources[:1]}),
    ]
    for error, text, changes in cases:
        with pytest.raises(error, match=text):
            encode(**{"sources": sources, "folder": tmp_path / "z", **changes})
        assert files_of(tmp_path / "z") == before
    (tmp_path / "z" / ".latents-00000-007.jsonl.0123abcd.partial.jsonl").write_bytes(b"half")
    encode([other], tmp_path / "z", StandIn("another"), overwrite=True)
    encode([other], tmp_path / "fresh", StandIn("another"))
    assert files_of(tmp_path / "z") == files_of(tmp_path / "fresh")


def test_changed_captions_of_plain_files_are_other_sources_and_moved_files_are_not(tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    for name, data in clip("a", 0.2, 0, caption="cat").items():
        (folder / name).write_bytes(data)
    encode([folder], tmp_path / "z")
    encode([folder.rename(tmp_path / "moved")], tmp_path / "z")
    (tmp_path / "moved" / "a.json").write_text('{"caption": "dog"}')
    with pytest.raises(OutputError, match="sources"):
        encode([tmp_path / "moved"], tmp_path / "z")


def test_nothing_usable_is_an_error_and_the_folder_free_for_better_sources(tmp_path: Path) -> None:
    bad = write_tar(tmp_path / "bad.tar", {"a.flac": flac(noise(0.1, 0)), "b.flac": b"", "b.json": b'{"caption": "b"}'})
    with pytest.raises(DataError, match="2 left out.*bad.tar/a.*caption"):
        encode([bad], tmp_path / "z")
    assert not list((tmp_path / "z").iterdir())
    assert encode(corpus(tmp_path / "data"), tmp_path / "z").clips


# ---------------------------------------------------------------------------------------------------- what is refused


def test_what_is_left_out_is_named_with_its_reason(tmp_path: Path) -> None:
    index = encode(corpus(tmp_path), tmp_path / "z")
    assert list(index.skipped) == ["part-0.tar/a", "part-0.tar/c05", "part-0.tar/c11", "c12.json", "part-0.tar/c12"]
    assert "'caption'" in index.skipped["part-0.tar/c05"] and "not JSON" in index.skipped["c12.json"]
    assert "c11" in index.skipped["part-0.tar/c11"]
    keys = [item.key for item in LatentDataset(tmp_path / "z")]
    assert len(keys) == index.clips == 24 - 3 + 3 and not {"a", "c05", "c11", "c12"} & set(keys)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "int8"},
        {"captions": ""},
        {"max_seconds": 0.01},
        {"max_seconds": float("nan")},
        {"shard_megabytes": 0},
        {"shard_megabytes": 0.0011},
        {"batch_seconds": 0},
        {"format": "zip"},
        {"format": "parquet", "dtype": "bfloat16"},
        {"arithmetic": "int8"},
        {"clips_per_unit": 0},
    ],
)
def test_options_out_of_range(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError):
        encode(corpus(tmp_path, 2), tmp_path / "z", **options)
    assert not (tmp_path / "z").exists()


def test_models_that_count_tokens_otherwise_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="length_mode"):
        encode(corpus(tmp_path, 2), tmp_path / "z", tiny(length_mode="published"))

    class Short(StandIn):
        def encode(self, audio: Tensor, padding_mask: Tensor | None = None) -> Tensor:
            return super().encode(audio, padding_mask)[:, :-1]

    with pytest.raises(LatentError, match="shape"):
        encode(corpus(tmp_path, 2), tmp_path / "y", Short())


def test_latents_of_another_model_are_refused(tmp_path: Path) -> None:
    model = StandIn()
    encode(corpus(tmp_path, 3), tmp_path / "z", model)
    data = LatentDataset(tmp_path / "z")
    data.require_model(model)
    data.require_model(model.weights_hash())
    for other in (StandIn("other"), "other"):
        with pytest.raises(ModelMismatchError, match="other"):
            data.require_model(other)


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no latents"):
        LatentDataset(tmp_path)
    sources = corpus(tmp_path / "data")
    encode(sources, tmp_path / "z")
    for name, cut in (("latents-00000-001.safetensors", 100), ("latents-00000-001.jsonl", 150)):
        path = tmp_path / "z" / name
        held = path.read_bytes()
        path.write_bytes(held[:-cut])
        data = LatentDataset(tmp_path / "z")
        with pytest.raises(DataError, match=f"{name}.* damaged"):
            list(data)
        path.write_bytes(held)
    assert len(list(LatentDataset(tmp_path / "z"))) == 24
    for name in ("latents-00000-001.json", "index.json"):
        held = (tmp_path / "z" / name).read_bytes()
        (tmp_path / "z" / name).write_bytes(held[:-9])
        with pytest.raises(DataError, match=f"{name} is missing or damaged"):
            LatentDataset(tmp_path / "z")
        if name == "latents-00000-001.json":
            (tmp_path / "z" / name).write_bytes(held)
    with pytest.raises(DataError, match="--overwrite"):
        encode(sources, tmp_path / "z")
    encode(sources, tmp_path / "z", overwrite=True)
    assert (tmp_path / "z" / "index.json").read_bytes() == held


# ---------------------------------------------------------------------------------------------------- reading


def test_items_are_found_by_place_and_are_copies(tmp_path: Path) -> None:
    encode(corpus(tmp_path), tmp_path / "z", dtype="float32", shard_megabytes=12 / 1024)
    data = LatentDataset(tmp_path / "z")
    order = np.random.default_rng(0).permutation(len(data))
    in_order = list(data)
    for i in order:
        item = data[int(i)]
        assert item.key == in_order[i].key and torch.equal(item.latents, in_order[i].latents)
        assert len(item.latents) == data.num_tokens[i]
        assert data.description(int(i)) == (item.key, item.captions, item.labels)
        item.latents.zero_()
    assert data[-1].key == in_order[-1].key == "long@32000" and data[-1].latents.abs().sum() > 0
    for beyond in (len(data), -len(data) - 1):
        with pytest.raises(IndexError):
            data[beyond]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_workers_read_what_one_process_reads(tmp_path: Path) -> None:
    encode(corpus(tmp_path), tmp_path / "z")
    data = LatentDataset(tmp_path / "z")
    alone = list(data)  # files are open when the workers start
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork")
    for found, item in zip(loader, alone, strict=True):
        assert (found.key, found.captions, found.labels) == (item.key, item.captions, item.labels)
        assert torch.equal(found.latents, item.latents)
    sent = pickle.loads(pickle.dumps(data))  # as to a spawned worker
    assert torch.equal(sent[5].latents, alone[5].latents)


def test_folders_of_one_model_are_joined(tmp_path: Path) -> None:
    sources = corpus(tmp_path)
    folders = [tmp_path / "a", tmp_path / "b"]
    parts = [encode([source], folder) for source, folder in zip(sources, folders, strict=True)]
    whole = encode(sources, tmp_path / "whole")
    joined = LatentDataset(folders)
    assert [item.key for item in joined] == [item.key for item in LatentDataset(tmp_path / "whole")]
    torch.testing.assert_close(joined.index.statistics.mean, whole.statistics.mean, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(joined.index.statistics.std, whole.statistics.std, atol=1e-12, rtol=1e-9)
    assert abs(joined.index.hours - whole.hours) < 1e-12 and joined.index.clips == whole.clips == len(joined)
    assert len(joined.index.skipped) == sum(len(part.skipped) for part in parts) == len(whole.skipped)
    encode(sources, tmp_path / "c", StandIn("another"))
    with pytest.raises(ModelMismatchError, match="one model"):
        LatentDataset([*folders, tmp_path / "c"])
    with pytest.raises(DataError, match="no folder"):
        LatentDataset([])


def test_plain_folders_need_no_training_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("webdataset", "braceexpand", "lightning_fabric"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "clips").mkdir()
    for name, data in clip("a", 0.2, 0, caption="cat").items():
        (tmp_path / "clips" / name).write_bytes(data)
    encode([tmp_path / "clips"], tmp_path / "z")
    assert [item.captions for item in LatentDataset(tmp_path / "z")] == [("cat",)]


# ---------------------------------------------------------------------------------------------------- command


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny("whisper")
    model.save_pretrained(tmp_path / "model")
    sources = corpus(tmp_path / "data", 4, broken=False)[:1]
    (tmp_path / "data" / "no.tar").write_bytes(Path(sources[0]).read_bytes()[:700])
    command = ["encode-dataset", "--engine", "local", "--model", str(tmp_path / "model"), "--device", "cpu"]
    target = str(tmp_path / "z")
    assert main([*command, sources[0], target]) == 0
    assert "5 clips" in capsys.readouterr().out
    data = LatentDataset(target)
    data.require_model(model)
    assert data.index.tokenizer == str(tmp_path / "model") and data.index.options["max_seconds"] == 30
    assert main([*command, sources[0], target]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main([*command, "--dtype", "bfloat16", sources[0], target]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--dtype", "bfloat16", sources[0], target]) == 0
    assert "nothing to do" not in capsys.readouterr().out
    assert main([*command, "--model-dtype", "bfloat16", sources[0], str(tmp_path / "x")]) == 0
    half, whole = LatentDataset(tmp_path / "x"), LatentDataset(target)
    half.require_model(model)  # whatever it computes in
    error = torch.cat([a.latents - b.latents for a, b in zip(half, whole, strict=True)]).norm()
    assert 0 < error < 0.05 * torch.cat([item.latents for item in whole]).norm()
    assert main([*command, sources[0], str(tmp_path / "data" / "no.tar"), str(tmp_path / "y")]) == 1
    assert "error: " in (said := capsys.readouterr()).err and "no.tar" in said.err and "5 clips" in said.out


def test_wrong_usage_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["encode-dataset", "a.tar"]) == 2
    assert main(["encode-dataset", "a.tar", "z", "--engine", "spark"]) == 2
    assert main(["encode-dataset", "a.tar", "z", "--ray-address", "auto"]) == 2
    assert main(["encode-dataset", "a.tar", "z", "--workers", "0"]) == 2
    assert main(["encode-dataset", "a.tar", "z", "--shard-index", "2", "--shard-count", "2"]) == 2
    assert main(["encode-dataset", "a.tar", "z", "--dtype", "bfloat16", "--format", "parquet"]) == 2
    (tmp_path / "file").write_text("")
    assert main(["encode-dataset", "a.tar", str(tmp_path / "file")]) == 2
    assert "is a file" in capsys.readouterr().err


def test_clips_of_the_real_corpus(shared: Path, tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    with tarfile.open(shared / "corpus" / "instrument-valid-000.tar") as tar:
        for info in tar.getmembers()[:10]:
            file = tar.extractfile(info)
            assert file is not None
            members[info.name] = file.read()
    model = tiny("whisper")
    index = encode_latents(
        write_tar(tmp_path / "a.tar", members), tmp_path / "z", model, source_name="tiny", progress=False
    )
    items = list(LatentDataset(tmp_path / "z"))
    assert index.clips == len(items) == 5 and not index.skipped and index.frame_rate == 25.0
    assert all("playing" in item.captions[0] and item.labels["labels"]["family"] for item in items)
    assert index.hours == pytest.approx(5 * 1.5 / 3600) and bool((index.std > 0).all())
