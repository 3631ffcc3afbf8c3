"""Encoding a corpus with several workers: every clip once, whatever dies; sources, formats, shares."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import tiny
from dasheng_tokenizer.cli import main
from dasheng_tokenizer.errors import DataError, LatentError, ModelMismatchError, OutputError, WorkerError
from dasheng_tokenizer.generation.latent_dataset import LatentDataset
from dasheng_tokenizer.generation.latent_index import TokenStatistics
from dasheng_tokenizer.scale import encode as encode_module
from dasheng_tokenizer.scale.encode import encode_latents
from dasheng_tokenizer.scale.options import EncodingOptions
from dasheng_tokenizer.scale.shard_writer import EncodingJob
from dasheng_tokenizer.scale.units import TarUnit
from dasheng_tokenizer.scale.work import ATTEMPTS, MOST_FAILED, WorkQueue, check_model, try_unit
from test_latent_dataset import StandIn, clip, corpus, files_of, write_tar

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[1]
CLIPS = 1200
PER_TAR = 120


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten tar shards of 120 clips of 0.1 to 0.3 s, two of them broken, and a tiny model."""
    folder = tmp_path_factory.mktemp("large")
    for tar in range(CLIPS // PER_TAR):
        members: dict[str, bytes] = {}
        for i in range(PER_TAR):
            members |= clip(f"t{tar}-c{i:03d}", 0.1 + 0.02 * (i % 11), 1000 * tar + i, caption=f"clip {i}")
        if tar in (3, 6):
            members[f"t{tar}-c007.flac"] = b"no audio"
        write_tar(folder / f"tar-{tar}.tar", members)
    tiny("whisper").save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def expected(large: Path, tmp_path_factory: pytest.TempPathFactory) -> LatentDataset:
    """What one process makes of it without being disturbed."""
    folder = tmp_path_factory.mktemp("expected")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    encode_latents([large / "*.tar"], folder, tiny("whisper"), source_name="tiny", progress=False)
    torch.set_num_threads(threads)
    return LatentDataset(folder)


def command(large: Path, target: Path, *options: str) -> list[str]:
    model = str(large / "model")
    return ["encode-dataset", "--model", model, "--device", "cpu", *options, str(large / "*.tar"), str(target)]


def check_against(expected: LatentDataset, folder: Path) -> None:
    """Every clip once and in order, the same latents up to rounding, nothing half-written."""
    found = LatentDataset(folder)
    assert [item.key for item in found] == [item.key for item in expected]
    assert len({item.key for item in found}) == len(found) == CLIPS - 2
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.latents, other.latents, atol=2e-3, rtol=2e-3)
        assert one.captions == other.captions
    assert list(found.index.skipped) == ["tar-3.tar/t3-c007", "tar-6.tar/t6-c007"] == list(expected.index.skipped)
    assert not [path for path in folder.iterdir() if "partial" in path.name]


def done_units(folder: Path) -> int:
    return len(list(folder.glob("latents-*.json")))


def wait_for(condition: Callable[[], object], process: subprocess.Popen[bytes], seconds: float = 600) -> Any:
    """Poll until the condition holds while the process runs."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert process.poll() is None, f"ended too early, code {process.returncode}"
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)
    return found


def busy_workers(parent: int, mark: str) -> list[Any]:
    """Processes below `parent` whose command line holds `mark`."""
    psutil = pytest.importorskip("psutil", reason="finds the processes to kill")
    found = []
    for process in psutil.Process(parent).children(recursive=True):
        try:
            if any(mark in part for part in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def kill_worker_then_driver(arguments: list[str], folder: Path, mark: str, parent: int | None = None) -> None:
    """Start the command, kill a worker after one unit and the driver after three more."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "dasheng_tokenizer.cli", *arguments], env=environment)
    try:
        wait_for(lambda: done_units(folder) >= 1, process)
        worker = busy_workers(parent or process.pid, mark)[0]
        worker.kill()
        wait_for(lambda: not worker.is_running() or worker.status() == "zombie", process)
        before = done_units(folder)
        wait_for(lambda: done_units(folder) >= min(before + 3, 8), process)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert not (folder / "index.json").exists()


linux = pytest.mark.skipif(sys.platform != "linux", reason="looks processes up and kills them")


# ---------------------------------------------------------------------------------------------------- what dies


@linux
def test_local_workers_and_their_driver_may_die(
    large: Path, expected: LatentDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(large, tmp_path / "z", "--workers", "2")
    kill_worker_then_driver(arguments, tmp_path / "z", "multiprocessing.spawn")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "z").glob("latents-*.json")}
    assert main(arguments) == 1  # because of the broken clips, which are named
    assert "tar-3.tar/t3-c007" in (said := capsys.readouterr()).err and f"{CLIPS - 2} clips" in said.out
    check_against(expected, tmp_path / "z")
    assert kept and all(path.stat().st_mtime_ns == time for path, time in kept.items())  # nothing twice


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A local Ray cluster of two cores; its address."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    ray = pytest.importorskip("ray", reason="needs the extra scale")
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 << 20,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@linux
def test_ray_workers_and_their_driver_may_die(
    large: Path, expected: LatentDataset, tmp_path: Path, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--engine", "ray", "--workers", "2")
    arguments = command(large, tmp_path / "z", *options, "--ray-address", cluster)
    kill_worker_then_driver(arguments, tmp_path / "z", "UnitEncoder", os.getpid())
    assert main(command(large, tmp_path / "z", *options)) == 1
    assert "tar-6.tar/t6-c007" in capsys.readouterr().err
    check_against(expected, tmp_path / "z")


def fake_job(tmp_path: Path, units: int) -> EncodingJob:
    names = tuple(TarUnit(str(tmp_path / f"{n}.tar")) for n in range(units))
    return EncodingJob(tmp_path, names, EncodingOptions(), 120.0, "hash", 5, "mark")


def test_a_unit_is_tried_a_few_times_and_the_others_done(tmp_path: Path) -> None:
    queue = WorkQueue(fake_job(tmp_path, 3), [0, 1, 2])
    done, tries = [], 0
    while queue:
        number = queue.take()
        if number == 1:
            tries += 1
            queue.unit_lost(number, "its process died (SIGSEGV)")
        else:
            done.append(number)
    assert tries == ATTEMPTS and done == [0, 2]
    with pytest.raises(WorkerError, match=r"unit 1 \(1.tar\).*SIGSEGV"):
        queue.check()


def test_many_failed_units_and_workers_that_never_start_stop_a_run(tmp_path: Path) -> None:
    queue = WorkQueue(fake_job(tmp_path, 50), range(50))
    with pytest.raises(WorkerError, match=f"^{MOST_FAILED} units"):
        while True:
            queue.unit_lost(queue.take(), "x")
    queue = WorkQueue(fake_job(tmp_path, 1), [0])
    for _ in range(5):
        queue.worker_lost("x")
        queue.worker_started()
    with pytest.raises(WorkerError, match="loaded the model"):
        for _ in range(ATTEMPTS):
            queue.worker_lost("x")


def test_a_model_that_changed_under_its_name_is_noticed(tmp_path: Path) -> None:
    check_model(fake_job(tmp_path, 1), StandIn("hash"))
    with pytest.raises(ModelMismatchError, match="same model on all machines"):
        check_model(fake_job(tmp_path, 1), StandIn("other"))


def test_what_another_try_may_mend_and_what_not(tmp_path: Path) -> None:
    class Failing(StandIn):
        def encode(self, audio: Any, padding_mask: Any = None) -> Any:
            raise RuntimeError("out of memory")

    class Wrong(StandIn):
        def encode(self, audio: Any, padding_mask: Any = None) -> Any:
            return super().encode(audio, padding_mask)[:, :-1]

    write_tar(tmp_path / "0.tar", clip("a", 0.2, 0, caption="x"))
    job = fake_job(tmp_path, 1)
    assert try_unit(job, 0, Failing(), print) == ("failed", "RuntimeError: out of memory")
    kind, error = try_unit(job, 0, Wrong(), print)
    assert kind == "fatal" and isinstance(error, LatentError)
    added: list[int] = []
    assert try_unit(job, 0, StandIn(), added.append) == ("done", 0) and added == [1]
    assert try_unit(job, 0, StandIn(), added.append) == ("done", 0) and added == [1]  # it was done


# ---------------------------------------------------------------------------------------------------- formats


def test_all_formats_hold_the_same(tmp_path: Path) -> None:
    sources = corpus(tmp_path)
    found: dict[str, LatentDataset] = {}
    for kind in ("safetensors", "webdataset", "parquet"):
        for name in ("z", "again"):
            encode_latents(
                sources,
                tmp_path / kind / name,
                StandIn(),
                source_name="x",
                progress=False,
                format=kind,
                max_seconds=1.0,
                shard_megabytes=12 / 1024,
                dtype="float32",
            )
        assert files_of(tmp_path / kind / "z") == files_of(tmp_path / kind / "again")
        found[kind] = LatentDataset(tmp_path / kind / "z")
    first = found["safetensors"]
    for other in found.values():
        assert other.index.shards > 1 and other.index.clips == first.index.clips
        for i in reversed(range(len(first))):
            assert torch.equal(other[i].latents, first[i].latents)
            assert other.description(i) == first.description(i)
        assert torch.equal(other.index.mean, first.index.mean)


def test_shards_are_what_other_readers_expect(tmp_path: Path) -> None:
    webdataset, parquet = pytest.importorskip("webdataset"), pytest.importorskip("pyarrow.parquet")
    members = clip("a", 0.2, 0, caption="x", labels={"n": 1}) | clip("b.c", 0.3, 1, caption=["y", "z"])
    source = write_tar(tmp_path / "a.tar", members)
    for kind in ("webdataset", "parquet"):
        encode_latents(source, tmp_path / kind, StandIn(), source_name="x", progress=False, format=kind)
    shard = tmp_path / "webdataset" / "latents-00000-000.tar"
    samples = list(webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False).decode())
    assert [sample["json"]["key"] for sample in samples] == ["a", "b.c"]
    assert samples[0]["npy"].dtype == np.float16 and samples[1]["npy"].shape == (8, 5)
    assert len({sample["__key__"] for sample in samples}) == 2
    rows = parquet.read_table(tmp_path / "parquet" / "latents-00000-000.parquet").to_pylist()
    assert rows[1]["captions"] == ["y", "z"] and json.loads(rows[0]["labels"]) == {"labels": {"n": 1}}
    for row, sample in zip(rows, samples, strict=True):
        assert np.array_equal(np.array(row["latents"], np.float16).reshape(row["num_tokens"], -1), sample["npy"])


def test_each_shard_has_its_statistics(tmp_path: Path) -> None:
    encode_latents(corpus(tmp_path), tmp_path / "z", StandIn(), source_name="x", progress=False)
    data = LatentDataset(tmp_path / "z")
    start = 0
    for name in data.index.names:
        note = json.loads((tmp_path / "z" / f"{name}.json").read_text())
        tokens = torch.cat([data[i].latents for i in range(start, start + len(note["tokens"]))]).double()
        torch.testing.assert_close(TokenStatistics.from_json(note["statistics"]).std, tokens.std(0, correction=0))
        start += len(note["tokens"])
    assert start == len(data)


def test_folders_of_the_first_version_are_read_and_not_gone_on_with(tmp_path: Path) -> None:
    source = write_tar(tmp_path / "a.tar", clip("a", 0.2, 0, caption="x"))
    encode_latents(source, tmp_path / "z", StandIn(), source_name="x", progress=False)
    before = LatentDataset(tmp_path / "z")[0]
    for path in (tmp_path / "z").glob("latents-00000-000.*"):
        path.rename(path.with_name(path.name.replace("-000.", ".")))
    for name in ("index.json", "encoding.json"):
        held = json.loads((tmp_path / "z" / name).read_text())
        changes = {"version": 1} if name == "encoding.json" else {"version": 1, "shards": 1}
        (tmp_path / "z" / name).write_text(json.dumps({**held, **changes}))
    assert torch.equal(LatentDataset(tmp_path / "z")[0].latents, before.latents)
    with pytest.raises(OutputError, match="another version"):
        encode_latents(source, tmp_path / "z", StandIn(), source_name="x", progress=False)
    encode_latents(source, tmp_path / "z", StandIn(), source_name="x", progress=False, overwrite=True)
    assert not (tmp_path / "z" / "latents-00000.safetensors").exists()


# ---------------------------------------------------------------------------------------------------- sources


def write_clips(folder: Path, count: int) -> list[Path]:
    folder.mkdir(parents=True)
    paths = []
    for i in range(count):
        for name, data in clip(f"c{i:02d}", 0.1 + 0.05 * i, i, caption=f"clip {i}", speaker=i).items():
            (folder / name).write_bytes(data)
        paths.append(folder / f"c{i:02d}.flac")
    return paths


def items(sources: list[Any], folder: Path, **options: Any) -> list[tuple[Any, ...]]:
    encode_latents(sources, folder, StandIn(), source_name="x", progress=False, clips_per_unit=3, **options)
    return [(item.key, item.captions, item.labels, item.latents.tolist()) for item in LatentDataset(folder)]


def test_a_folder_by_path_and_by_url_is_the_same(tmp_path: Path) -> None:
    pytest.importorskip("fsspec", reason="needs the extra scale")
    write_clips(tmp_path / "data" / "clips", 7)
    write_tar(tmp_path / "data" / "a-1.tar", clip("t", 0.2, 9, caption="t"))
    whole = items([tmp_path / "data"], tmp_path / "z")
    assert len(whole) == 8
    assert items([f"file://{tmp_path}/data"], tmp_path / "y") == whole
    assert items([f"file://{tmp_path}/data/a-{{1..1}}.tar"], tmp_path / "x") == whole[:1]
    assert [row[0] for row in items([f"file://{tmp_path}/data/clips/c0[1-3].flac"], tmp_path / "w")] == [
        f"c0{i}.flac" for i in (1, 2, 3)
    ]


def test_what_a_url_lacks_is_named(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec", reason="needs the extra scale")
    memory = fsspec.filesystem("memory")
    members = clip("a", 0.2, 0, caption="a") | {"b.flac": b"no audio", "b.json": b'{"caption": "b"}'}
    for name, data in members.items():
        memory.pipe(f"/scale-test/{name}", data)
    whole = Path(write_tar(tmp_path / "t.tar", clip("t", 0.2, 1, caption="t"))).read_bytes()
    memory.pipe("/scale-test/t.tar", whole[:700])
    index = encode_latents("memory://scale-test", tmp_path / "z", StandIn(), source_name="x", progress=False)
    assert index.clips == 1 and "scale-test/b.flac" in index.skipped
    assert [name for name in index.skipped if name.startswith("memory://")] == ["memory:///scale-test/t.tar"]
    with pytest.raises(DataError, match="nothing"):
        encode_latents("memory://scale-test/*.mp3", tmp_path / "y", StandIn(), source_name="x", progress=False)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_manifests(kind: str, tmp_path: Path) -> None:
    """Relative and absolute paths, URLs, embedded audio, rows that cannot be used; in units of three rows."""
    pytest.importorskip("pyarrow", reason="needs the extra scale")
    paths = write_clips(tmp_path / "clips", 7)
    rows: list[dict[str, Any]] = [
        {"id": f"k{i}", "path": path.name, "caption": f"row {i}", "n": i} for i, path in enumerate(paths)
    ]
    rows[1]["path"], rows[2]["path"] = str(paths[1]), f"file://{paths[2]}"
    rows[3]["path"], rows[4]["caption"] = "missing.flac", None
    manifest = tmp_path / "clips" / f"list.{kind}"
    write_manifest(manifest, rows)
    found = items([manifest], tmp_path / "z")
    assert [row[0] for row in found] == ["k0", "k1", "k2", "k5", "k6"]
    assert found[0][1] == ("row 0",) and found[0][2] == {"id": "k0", "path": "c00.flac", "n": 0}
    by_path = {row[0]: row[3] for row in items([tmp_path / "clips"], tmp_path / "y")}
    assert all(row[3] == by_path[f"c0{row[0][1]}.flac"] for row in found)
    skipped = LatentDataset(tmp_path / "z").index.skipped
    assert "missing.flac" in skipped[f"list.{kind}/k3"] and "'caption'" in skipped[f"list.{kind}/k4"]
    kept = items([f"file://{manifest}"], tmp_path / "x", keep_uncaptioned=True)
    assert [row[0] for row in kept] == ["k0", "k1", "k2", "k4", "k5", "k6"] and kept[3][1] == ()
    write_manifest(manifest, rows[:6])
    with pytest.raises(OutputError, match="sources"):
        items([manifest], tmp_path / "z")


def write_manifest(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)


def test_parquet_with_the_audio_inside(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="needs the extra scale")
    paths = write_clips(tmp_path / "clips", 5)
    rows = [{"audio": {"bytes": path.read_bytes(), "path": path.name}, "text": "x"} for path in paths]
    write_manifest(tmp_path / "a.parquet", rows)
    found = items([tmp_path / "a.parquet"], tmp_path / "z", captions="text")
    plain = items([tmp_path / "clips"], tmp_path / "y")
    assert [(row[0], row[3]) for row in found] == [(row[0], row[3]) for row in plain]
    assert found[0][2] == {}


def test_lines_that_are_no_rows_are_named(tmp_path: Path) -> None:
    write_clips(tmp_path / "clips", 2)
    lines = ['{"path": "c00.flac", "caption": "a"}', "{", "", "[1]", '{"caption": "no path"}', '{"file": "c01.flac"}']
    manifest = tmp_path / "clips" / "list.jsonl"
    manifest.write_text("\n".join(lines))
    found = items([manifest], tmp_path / "z", keep_uncaptioned=True)
    assert [row[0] for row in found] == ["c00.flac", "c01.flac"]
    assert list(LatentDataset(tmp_path / "z").index.skipped) == [f"list.jsonl, row {n}" for n in (2, 4, 5)]
    with pytest.raises(DataError, match="under speech"):
        items([manifest], tmp_path / "y", path_key="speech")
    manifest.write_text("")
    with pytest.raises(DataError, match="no rows"):
        items([manifest], tmp_path / "y")


def test_a_file_that_was_missing_for_a_while_moves_no_other(tmp_path: Path) -> None:
    """The place where a run goes on must not hang on what an earlier run could read."""
    paths = write_clips(tmp_path / "clips", 12)
    options = {"clips_per_unit": 12, "shard_megabytes": 2 / 1024, "max_seconds": 1.0, "progress": False}
    hidden = paths[0].rename(tmp_path / "hidden")

    class Stop(BaseException):
        pass

    def stop(batch: int) -> None:
        if len(list((tmp_path / "z").glob("latents-*.json"))) == 2:
            raise Stop

    hidden.rename(paths[0])
    plan = encode_module.plan_units([tmp_path / "clips"], 12)
    assert len(plan.units) == 1
    paths[0].rename(hidden)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode_module, "plan_units", lambda *_: plan)  # it was there when the run began
        with pytest.raises(Stop):
            encode_latents([tmp_path / "clips"], tmp_path / "z", StandIn(before=stop), source_name="x", **options)
    hidden.rename(paths[0])
    encode_latents([tmp_path / "clips"], tmp_path / "z", StandIn(), source_name="x", **options)
    data = LatentDataset(tmp_path / "z")
    assert [item.key for item in data] == [path.name for path in paths[1:]]
    assert list(data.index.skipped) == ["clips/c00.flac"]


# ---------------------------------------------------------------------------------------------------- shares


def test_shares_fill_one_folder_and_the_last_one_writes_the_index(large: Path, tmp_path: Path) -> None:
    sources = [large / f"tar-{n}.tar" for n in range(3)]
    model, target = tiny("whisper"), tmp_path / "z"
    for index in (2, 0):
        arguments = command(large, target, "--shard-index", str(index), "--shard-count", "3")
        arguments[-2:] = [*map(str, sources), str(target)]
        assert main(arguments) == 0
        with pytest.raises(DataError, match="not complete"):
            LatentDataset(target)
    arguments[arguments.index("--shard-index") + 1] = "1"
    assert main(arguments) == 0
    encode_latents(sources, tmp_path / "whole", model, source_name=str(large / "model"), progress=False)
    assert files_of(target) == files_of(tmp_path / "whole")


def test_shards_of_two_encodings_never_mix(tmp_path: Path) -> None:
    """Two runs with other settings that begin at once in one folder: the second finds no shard yet to object to."""
    source = write_tar(tmp_path / "a.tar", clip("a", 0.2, 0, caption="x"))
    encode_latents(source, tmp_path / "z", StandIn(), source_name="x", progress=False)
    encode_latents(source, tmp_path / "y", StandIn(), source_name="x", progress=False, dtype="float32")
    (tmp_path / "z" / "encoding.json").write_bytes((tmp_path / "y" / "encoding.json").read_bytes())
    (tmp_path / "z" / "index.json").unlink()
    with pytest.raises(OutputError, match="other settings"):
        encode_latents(source, tmp_path / "z", StandIn(), source_name="x", progress=False, dtype="float32")


def test_clips_of_one_name_are_all_reported(tmp_path: Path) -> None:
    broken = {"k.flac": b"broken", "k.json": b'{"caption": "x"}'} | clip("o", 0.1, 0, caption="o")
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "p.tar", broken)
    index = encode_latents([tmp_path / "a", tmp_path / "b"], tmp_path / "z", StandIn(), source_name="x", progress=False)
    assert list(index.skipped) == ["p.tar/k", "p.tar/k (latents-00001-000)"] and index.clips == 2
