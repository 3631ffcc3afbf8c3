"""Mixtures embedded once: the same latents, each once an epoch, whole or absent; and a start from another denoiser."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dasheng_tokenizer.enhancement import Denoiser, embedded_mixtures
from dasheng_tokenizer.enhancement.embedded_mixtures import EmbeddedCrops, EmbeddedMixtures, prepare_embeddings
from dasheng_tokenizer.enhancement.latent_space import embed
from dasheng_tokenizer.enhancement.training import train_enhancer
from dasheng_tokenizer.errors import ConfigurationError, DataError
from dasheng_tokenizer.training.loop import fit
from test_enhancement_training import make_config, make_task, small_run, write_clips
from test_vae import tiny_vae

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT = 10


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("sounds"))


@pytest.fixture
def run(sounds: Path, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(embedded_mixtures, "BLOCK", 4)
    return small_run(sounds, tokenizer_folder, tmp_path)


def embedded(run: dict[str, Any], **changes: Any) -> Any:
    return make_task(make_config(run, data={"embedded_mixtures": COUNT}, **changes))


@pytest.mark.parametrize("part", ["unified", "semantic", "acoustic"])
def test_they_are_what_embedding_afresh_gives(run: dict[str, Any], part: Any) -> None:
    task = embedded(run, part=part)
    for index in (0, 3, 9):
        mixture = task.data.train.examples.mixture(index)
        noisy, clean = task.crops.held.latents(index, part)
        expected = embed(task.tokenizer, torch.from_numpy(mixture.noisy)[None], part)[0]
        torch.testing.assert_close(noisy, expected, rtol=2e-3, atol=2e-3)  # float16
        expected = embed(task.tokenizer, torch.from_numpy(mixture.clean)[None], "unified")[0]
        torch.testing.assert_close(clean, expected, rtol=2e-3, atol=2e-3)


def test_those_of_a_vae_have_no_parts(run: dict[str, Any], tmp_path: Path) -> None:
    tiny_vae().save_pretrained(tmp_path / "vae")
    task = embedded(run, tokenizer=str(tmp_path / "vae"))
    mixture = task.data.train.examples.mixture(2)
    expected = task.tokenizer.encode(torch.from_numpy(mixture.noisy)[None])[0].detach()
    torch.testing.assert_close(task.crops.held.latents(2, "unified")[0], expected, rtol=2e-3, atol=2e-3)


def test_the_loss_is_that_of_the_audio(run: dict[str, Any]) -> None:
    weights = {"loss_weights": {"latent": 1.0, "spectral": 1.0}}
    task, afresh = embedded(run, **weights), make_task(make_config(run, **weights))
    batch = task.crops.batch(0)
    assert batch.noisy.dtype == torch.float32 and batch.seconds == pytest.approx(4 * 0.4)
    order = [task.crops._index(place) for place in range(4)]
    mixtures = [task.data.train.examples.mixture(index) for index in order]
    audio = {side: torch.from_numpy(np.stack([getattr(m, side) for m in mixtures])) for side in ("noisy", "clean")}
    expected = afresh.losses(type(afresh.data.train.batch(0))(**audio))
    for name, value in task.losses(batch).items():
        torch.testing.assert_close(value, expected[name], rtol=5e-3, atol=1e-3)
    halves = batch.split(2)
    assert torch.equal(torch.cat([half.noisy for half in halves]), batch.noisy)
    assert sum(half.seconds for half in halves) == pytest.approx(batch.seconds)


def test_an_epoch_has_each_once_in_an_order_of_its_own(run: dict[str, Any]) -> None:
    task = embedded(run)
    order = [task.crops._index(place) for place in range(3 * COUNT)]
    epochs = [order[first : first + COUNT] for first in range(0, len(order), COUNT)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    steps = dict(enumerate(task.crops.batches(0, 5)))
    assert torch.equal(steps[4].noisy, task.crops.batch(4).noisy)
    shares = [EmbeddedCrops(task.crops.held, task.crops.examples, task.config, rank, 2).batch(1) for rank in (0, 1)]
    assert torch.equal(torch.cat([share.clean for share in shares]), task.crops.batch(1).clean)


def test_only_what_is_missing_is_embedded(run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    task = embedded(run)
    folder = task.crops.held.folder
    files = sorted(folder.iterdir())
    assert [path.name for path in files] == ["00000.safetensors", "00001.safetensors", "00002.safetensors"]
    asked: list[list[int]] = []
    original = embedded_mixtures._embed_block

    def noted(tokenizer: Any, examples: Any, block: Any) -> Any:
        asked.append(list(block))
        return original(tokenizer, examples, block)

    monkeypatch.setattr(embedded_mixtures, "_embed_block", noted)
    before = task.crops.held.latents(5, "unified")[0]
    embedded(run)
    assert asked == []
    files[1].unlink()  # as a process leaves it that was killed there
    assert torch.equal(embedded(run).crops.held.latents(5, "unified")[0], before)
    assert asked == [[4, 5, 6, 7]]
    more = make_task(make_config(run, data={"embedded_mixtures": 13}))
    assert asked[1:] == [[8, 9, 10, 11], [12]] and len(more.crops.held) == 13


def test_several_processes_share_the_work(run: dict[str, Any]) -> None:
    task = make_task(make_config(run))
    arguments = (task.tokenizer, task.data.train.examples, 8, task.config.data.cache / "shared")
    first = embedded_mixtures._identity(task.tokenizer, task.data.train.examples)
    from threading import Thread

    other = Thread(target=prepare_embeddings, args=(*arguments, 1, 2))
    other.start()
    held = prepare_embeddings(*arguments, 0, 2)
    other.join()
    assert held.folder.name == first and len(list(held.folder.iterdir())) == 2


def test_other_sounds_and_other_tokenizers_have_other_caches(run: dict[str, Any], tmp_path: Path) -> None:
    tiny_vae().save_pretrained(tmp_path / "vae")
    variants = ({}, {"seed": 1}, {"mixture": {"snr_db": [0.0, 1.0]}}, {"tokenizer": str(tmp_path / "vae")})
    folders = {embedded(run, **changes).crops.held.folder for changes in variants}
    assert len(folders) == len(variants)


def test_a_damaged_cache_is_named(run: dict[str, Any]) -> None:
    held: EmbeddedMixtures = embedded(run).crops.held
    path = held.folder / "00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(DataError, match="damaged"):
        EmbeddedMixtures(held.folder, COUNT).latents(4, "unified")


def test_a_run_on_them_resumes_to_the_same_weights(run: dict[str, Any]) -> None:
    changes = {"data": {"embedded_mixtures": COUNT}}
    whole = make_config(run, **changes)
    train_enhancer(whole)
    config = make_config(run, output=str(whole.output.with_name("stopped")), **changes)
    task = make_task(config)
    original = task.training_step

    def interrupted(batch: Any, step: int) -> Any:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(batch, step)

    task.training_step = interrupted  # type: ignore[method-assign]
    assert not fit(task.fabric, task, config)
    train_enhancer(config)
    first, second = (load_file(one.output / "model" / "model.safetensors") for one in (whole, config))
    assert all(torch.equal(second[name], value) for name, value in first.items())


def test_a_run_can_start_from_another_denoiser(run: dict[str, Any], tmp_path: Path) -> None:
    first = train_enhancer(make_config(run)) / "model"
    start = {"output": str(tmp_path / "second"), "init": str(first)}
    second = train_enhancer(make_config(run, steps=1, optimizer={"lr": 1e-9}, **start)) / "model"
    held = [Denoiser.from_pretrained(folder).state_dict() for folder in (first, second)]
    for name, value in held[0].items():
        torch.testing.assert_close(held[1][name], value, rtol=0, atol=1e-6)
    for changes, named in (({"part": "semantic"}, "another part"), ({"denoiser": {"depth": 2}}, "another sizes")):
        with pytest.raises(ConfigurationError, match=named):
            train_enhancer(make_config(run, **{**start, "output": str(tmp_path / named)}, **changes))


def test_a_negative_number_is_refused(run: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="embedded_mixtures"):
        make_config(run, data={"embedded_mixtures": -1})
