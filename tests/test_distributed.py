"""Two processes on the CPU: DDP and FSDP train what one process trains, and go on from each other's checkpoints."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dasheng_tokenizer.errors import CheckpointError, ConfigurationError
from dasheng_tokenizer.scale.encode import encode_latents
from dasheng_tokenizer.training import train
from dasheng_tokenizer.training.checkpoint_tensors import CheckpointTensors
from dasheng_tokenizer.training.data import DataConfig
from dasheng_tokenizer.training.loop import make_fabric
from dasheng_tokenizer.training.run_log import read_log
from dasheng_tokenizer.training.sharding import dealt, wrap_units
from dasheng_tokenizer.training.streaming import StreamedCrops
from test_generator_training import WORDS, StandIn, make_config, make_crops, save_text_encoder, write_clips
from test_training_data import clips_of, items, write_tar
from test_training_loop import environment, settings, write_corpus, write_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

WORKER = """
import json, os, shutil, sys
from dasheng_tokenizer.training import train
for recipe, overrides, start in json.loads(sys.argv[1]):
    if start and os.environ["RANK"] == "0":
        shutil.copytree(start[0], start[1])
    if start:
        import torch
        torch.distributed.barrier()
    train(recipe, overrides)
"""

KILLED = """
import os, signal, sys
from pathlib import Path
from dasheng_tokenizer.training import train
from dasheng_tokenizer.training.tokenizer_task import TokenizerTask
step_of, mark = TokenizerTask.training_step, Path(sys.argv[1])
def step(self, batch, number):
    if number == 5 and os.environ["RANK"] == "1" and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return step_of(self, batch, number)
TokenizerTask.training_step = step
train(sys.argv[2], sys.argv[3:])
"""

GENERATOR = """
kind: generator
dit: {width: 16, depth: 2, heads: 2}
steps: 6
optimizer: {lr: 3e-3, betas: [0.9, 0.99], warmup_steps: 2}
ema_decay: 0.9
log_every: 1
checkpoint_every: 3
validate_every: 0
validation_clips: 3
accumulate: 2
gradient_checkpointing: true
accelerator: cpu
data: {train: [train], valid: [valid], crop_seconds: 0.8, batch_size: 8}
"""


def torchrun(script: Path, *arguments: str, dies: bool = False) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(script)]
    done = subprocess.run([*launcher, *arguments], env=environment(), capture_output=True, text=True, timeout=280)
    assert (done.returncode != 0) == dies, done.stderr[-6000:]


def begun(run: Path, other: Path, step: int) -> tuple[str, str]:
    """A checkpoint of one run, and where another would have it."""
    return str(run / f"checkpoints/step-{step:08d}"), str(other / f"checkpoints/step-{step:08d}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same short trainings of a tokenizer with a GAN and of a generator, by one process and by two."""
    folder = tmp_path_factory.mktemp("runs")
    torch.set_num_threads(1)
    recipe, overrides = write_recipe(folder), write_corpus(folder)
    overrides += ["steps=6", "checkpoint_every=3", "keep_checkpoints=9", "gan_start_step=2", "validation_clips=3"]
    overrides += [f"data.cache={folder / 'cache'}"]
    generator = folder / "generator.yaml"
    generator.write_text(GENERATOR)
    for split, seed in (("train", 0), ("valid", 1)):
        source = write_clips(folder / "audio" / split, seed)
        encode_latents(source, folder / "latents" / split, StandIn(), source_name="stand-in", progress=False)
    text = save_text_encoder(folder / "text", WORDS)
    of_generator = [f"text_encoder={text}", f"data.folder={folder / 'latents'}", f"text_cache={folder / 'texts'}"]

    def job(path: Path, changes: list[str], name: str, strategy: str = "ddp", start: str | None = None) -> Any:
        begins = begun(folder / start, folder / name, 3) if start else None
        return str(path), [*changes, f"output={folder / name}", f"strategy={strategy}"], begins

    for path, changes, name in ((recipe, overrides, "one"), (generator, of_generator, "generator-one")):
        train(path, job(path, changes, name)[1])
    jobs = [
        job(recipe, overrides, "ddp"),
        job(recipe, overrides, "fsdp", "fsdp"),
        job(recipe, overrides, "fsdp-after-one", "fsdp", start="one"),
        job(recipe, overrides, "ddp-after-fsdp", "ddp", start="fsdp"),
        job(recipe, overrides, "fsdp-resumed", "fsdp", start="fsdp"),
        job(generator, of_generator, "generator-ddp"),
        job(generator, of_generator, "generator-fsdp", "fsdp"),
        job(recipe, [*overrides, "steps=3", "precision=bf16-mixed"], "half", "fsdp"),
    ]
    script = folder / "worker.py"
    script.write_text(WORKER)
    torchrun(script, json.dumps(jobs))
    start, there = begun(folder / "fsdp", folder / "one-after-fsdp", 3)
    shutil.copytree(start, there)
    train(recipe, job(recipe, overrides, "one-after-fsdp")[1])
    return folder


def assert_alike(one: Path, two: Path, first: int = 1, exact: bool = False) -> None:
    """Same losses and gradients from a step on, same validation, same weights."""
    for kind in ("train", "validation"):
        curves = [
            [entry for entry in read_log(run / "log.jsonl", kind) if entry["step"] >= first] for run in (one, two)
        ]
        assert len(curves[0]) == len(curves[1]) > 0
        for a, b in zip(*curves, strict=True):
            measured = {name for name in a if name not in ("hours", "audio_seconds_per_second", "data_wait", "kind")}
            assert measured <= set(b)
            for name in measured:
                tolerance = 0 if exact else 2e-2 if name.endswith("grad_norm") else 3e-3
                assert b[name] == pytest.approx(a[name], rel=tolerance, abs=0 if exact else 1e-3), (a["step"], name)
    weights = [load_file(run / "model" / "model.safetensors") for run in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        # Adam turns gradients that are zero but for rounding into whole steps, so single weights may differ more.
        difference = (weights[1][name].float() - value.float()).norm()
        assert difference <= (0 if exact else 1e-2 * value.float().norm() + 1e-4), name


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_what_one_trains(runs: Path, kind: str) -> None:
    assert_alike(runs / "one", runs / kind)
    assert_alike(runs / "generator-one", runs / f"generator-{kind}")


def test_each_process_writes_only_its_rows(runs: Path) -> None:
    checkpoint = runs / "fsdp/checkpoints/step-00000006"
    assert sorted(path.name for path in checkpoint.iterdir()) == [
        "state.json",
        "tensors-00000-of-00002.safetensors",
        "tensors-00001-of-00002.safetensors",
    ]
    sizes = [path.stat().st_size for path in sorted(checkpoint.glob("*.safetensors"))]
    whole = (runs / "ddp/checkpoints/step-00000006/tensors.safetensors").stat().st_size
    assert max(sizes) < 0.7 * whole and sum(sizes) < 1.3 * whole
    sharded = CheckpointTensors(checkpoint, [path.name for path in sorted(checkpoint.glob("*.safetensors"))])
    ddp = CheckpointTensors(runs / "ddp/checkpoints/step-00000006")
    assert sorted(sharded.names()) == sorted(ddp.names())
    for prefix in ("module.tokenizer.", "optimizer.discriminators.", "average.tokenizer."):
        for name, value in ddp.state(prefix).items():
            assert sharded.whole(prefix + name).shape == value.shape


def test_torch_reads_the_same_files(runs: Path) -> None:
    import torch.distributed.checkpoint as dcp

    checkpoint = runs / "fsdp/checkpoints/step-00000003"
    tensors = CheckpointTensors(checkpoint, [path.name for path in sorted(checkpoint.glob("*.safetensors"))])
    expected = {name: tensors.whole(name) for name in tensors.names("average.")}
    state = {name: torch.zeros_like(value) for name, value in expected.items()}
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(checkpoint)), no_dist=True)
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_resuming_on_as_many_processes_is_exact(runs: Path) -> None:
    assert_alike(runs / "fsdp", runs / "fsdp-resumed", first=4, exact=True)


@pytest.mark.parametrize("resumed", ["fsdp-after-one", "ddp-after-fsdp", "one-after-fsdp"])
def test_resuming_on_other_processes_goes_on_alike(runs: Path, resumed: str) -> None:
    steps = [entry["step"] for entry in read_log(runs / resumed / "log.jsonl", "train")]
    assert steps == [4, 5, 6]
    assert_alike(runs / "one", runs / resumed, first=4)


def test_mixed_precision_keeps_float32_weights(runs: Path) -> None:
    one, half = (read_log(runs / name / "log.jsonl", "train") for name in ("one", "half"))
    assert half[0]["loss"] == pytest.approx(one[0]["loss"], rel=3e-2)
    for path in (runs / "half/checkpoints/step-00000003").glob("*.safetensors"):
        with safe_open(path, framework="pt") as opened:
            kinds = {opened.get_tensor(name).dtype for name in opened.keys()}  # noqa: SIM118
            assert kinds == {torch.float32, torch.int64} or kinds == {torch.float32}  # int64: counts of a batch norm


def test_an_exported_checkpoint_is_the_model_of_the_run(runs: Path, tmp_path: Path) -> None:
    """The fresh frozen encoder too, which no checkpoint holds, and the statistics of its features."""
    script = Path(__file__).resolve().parents[1] / "recipes/export_checkpoint.py"
    checkpoint = runs / "fsdp/checkpoints/step-00000006"
    command = [sys.executable, str(script), str(runs / "recipe.yaml"), str(checkpoint), str(tmp_path / "model")]
    subprocess.run(command, env=environment(), check=True)
    finished, exported = (load_file(folder / "model/model.safetensors") for folder in (runs / "fsdp", tmp_path))
    assert finished.keys() == exported.keys()
    assert all(torch.equal(value, exported[name]) for name, value in finished.items())


def test_a_missing_file_of_a_checkpoint_is_named(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "fsdp", tmp_path / "run")
    next((tmp_path / "run/checkpoints/step-00000006").glob("tensors-00001*")).unlink()
    changes = [f"output={tmp_path / 'run'}", "steps=8", "gan_start_step=2", f"data.cache={runs / 'cache'}"]
    changes += [f"data.train=[{runs / 'train'}]", f"data.valid=[{runs / 'valid'}]"]
    with pytest.raises(CheckpointError, match="damaged.*tensors-00001-of-00002.safetensors is missing"):
        train(runs / "recipe.yaml", changes)


def test_a_killed_process_resumes(runs: Path, tmp_path: Path) -> None:
    """`kill -9` of one of the two ends the other; the same command finds the last whole checkpoint."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    data = [f"data.train=[{runs / 'train'}]", f"data.valid=[{runs / 'valid'}]", f"data.cache={runs / 'cache'}"]
    changes = [*data, "steps=6", "checkpoint_every=3", "gan_start_step=2", "validation_clips=3", "strategy=fsdp"]
    output, mark = tmp_path / "run", tmp_path / "mark"
    arguments = [str(mark), str(runs / "recipe.yaml"), *changes, f"output={output}"]
    torchrun(script, *arguments, dies=True)
    assert mark.exists() and [path.name for path in (output / "checkpoints").iterdir()] == ["step-00000003"]
    torchrun(script, *arguments)
    assert_alike(runs / "fsdp", output, exact=True)


# ---------------------------------------------------------------------- data


@pytest.mark.parametrize("shards", [3, 8])
def test_streams_do_not_hang_on_processes(tmp_path: Path, shards: int) -> None:
    train_shards = [write_tar(tmp_path / f"s{k}.tar", clips_of("s" * (k + 1), [0.2] * 4)) for k in range(shards)]

    def crops(rank: int, world_size: int, workers: int, start: int, steps: int) -> list[torch.Tensor]:
        config = DataConfig(train_shards, [], 0.2, 8, views=1, workers=workers, shuffle_clips=3, streams=4)
        return [batch.audio for batch in StreamedCrops(config, 1, rank, world_size).batches(start, steps)]

    one = crops(0, 1, 0, 0, 4)
    for world_size, workers in ((2, 0), (4, 0), (2, 2)):
        ranks = [crops(rank, world_size, workers, 0, 4) for rank in range(world_size)]
        assert all(torch.equal(torch.cat(parts), whole) for *parts, whole in zip(*ranks, one, strict=True))
    late = [crops(rank, 2, 2, 2, 2) for rank in range(2)]
    assert all(torch.equal(torch.cat(parts), whole) for *parts, whole in zip(*late, one[2:], strict=True))
    with pytest.raises(ConfigurationError, match="data.streams 4 must be a multiple of the 8"):
        crops(0, 8, 0, 0, 1)
    with pytest.raises(ConfigurationError, match="multiple of data.streams"):
        DataConfig(batch_size=8, streams=3)


@pytest.mark.parametrize(("shards", "workers", "streams"), [(1, 0, None), (4, 2, None), (5, 1, 8), (8, 2, 4)])
def test_no_streamed_clip_twice_in_an_epoch(tmp_path: Path, shards: int, workers: int, streams: int | None) -> None:
    """Whatever shards, processes and workers: the streams of an epoch hold every clip exactly once."""
    held = [write_tar(tmp_path / f"s{k}.tar", clips_of("s" * (k + 1), [0.2] * 8)) for k in range(shards)]
    config = DataConfig(held, [], 0.2, 8, views=1, workers=workers, shuffle_clips=3, streams=streams)
    ranks = [StreamedCrops(config, rank=rank, world_size=2) for rank in range(2)]
    streams_of = [list(crops._streams) for crops in ranks]
    assert sorted(streams_of[0] + streams_of[1]) == list(range(ranks[0]._num_streams))
    for epoch in range(2):
        parts = zip(ranks, streams_of, strict=True)
        keys = [clip.key for crops, mine in parts for stream in mine for clip in crops._epoch(stream, epoch)]
        assert len(keys) == len(set(keys)) == 8 * shards
    if shards == 1:  # streams of equal length: the same of the batches themselves
        seen = [item for crops in ranks for item in items(list(crops.batches(0, shards)))]
        assert len(set(seen)) == len(seen) == 8 * shards


def test_no_latents_twice_in_an_epoch_over_two_processes(runs: Path, tmp_path: Path) -> None:
    values = {"output": tmp_path, "data": {"folder": runs / "latents", "train": ["train"], "batch_size": 4}}
    config = make_config({**values, "text_dropout": 0.0})
    ranks = [make_crops(runs / "latents", config, rank, 2) for rank in range(2)]
    for epoch in range(2):  # 12 clips, of lengths all different
        batches = [crops.batch(step) for step in range(3 * epoch, 3 * epoch + 3) for crops in ranks]
        lengths = [int(count) for batch in batches for count in batch.num_tokens]
        assert len(set(lengths)) == len(lengths) == 12


# ---------------------------------------------------------------------- parts


@pytest.mark.parametrize("count", [0, 1, 4, 5])
def test_every_rank_gets_as_many_and_all_count_once(count: int) -> None:
    shares = [list(dealt(count, rank, 3)) for rank in range(3)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(place for share in shares for place, counts in share if counts) == list(range(count))


def test_units_are_blocks_and_what_runs_apart_from_them() -> None:
    from conftest import new_generator, tiny

    model = tiny()
    names = {id(module): name for name, module in model.named_modules()}
    assert [names[id(unit)].split(".")[-2] for unit in wrap_units(model)] == ["init_bn", "blocks", "blocks"] + [
        "convnext"
    ] * 2
    generator = new_generator()
    names = {id(module): name for name, module in generator.named_modules()}
    assert [names[id(unit)] for unit in wrap_units(generator)][:3] == [
        "dit.blocks.0.cross_attention.kv",
        "dit.blocks.0.cross_attention.norm_k",
        "dit.blocks.0",
    ]


def test_strategies_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="'fsdp'"):
        settings(tmp_path, strategy="zero")
    with pytest.raises(ConfigurationError, match="needs torchrun"):
        make_fabric(settings(tmp_path, strategy="fsdp", devices=2))
    assert make_fabric(settings(tmp_path, strategy="fsdp")).world_size == 1
