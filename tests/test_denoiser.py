"""The denoiser: what a fresh one does, batches, exports, and its folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dasheng_tokenizer.enhancement import Denoiser, DenoiserConfig, DenoiserInfo
from dasheng_tokenizer.enhancement import denoiser as denoiser_module
from dasheng_tokenizer.enhancement.denoiser import POSITION_KERNEL
from dasheng_tokenizer.errors import CheckpointError, ConfigurationError, LatentError
from dasheng_tokenizer.weights_folder import CONFIG, WEIGHTS

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH = 16
SIZES = DenoiserConfig(latent_dim=WIDTH, depth=2, heads=2)
STATISTICS = (torch.linspace(-1, 1, WIDTH), torch.linspace(0.5, 2, WIDTH)) * 2


def fresh(**info: Any) -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(SIZES, DenoiserInfo("no tokenizer", **info), *STATISTICS).eval()


def awake(**info: Any) -> Denoiser:
    """A denoiser that changes what it is given."""
    denoiser = fresh(**info)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return denoiser


def latents(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed))


def mask_of(counts: list[int], length: int) -> Tensor:
    return torch.arange(length) < torch.tensor(counts)[:, None]


def test_a_fresh_denoiser_changes_nothing() -> None:
    given = latents(2, 7)
    torch.testing.assert_close(fresh()(given), given, rtol=0, atol=1e-5)
    assert (awake()(given) - given).abs().mean() > 0.1


def test_a_part_starts_at_the_latent_it_is_likest() -> None:
    """What is standard in the part that is seen becomes standard in the latent."""
    mean, std = torch.full((WIDTH,), 3.0), torch.full((WIDTH,), 0.1)
    denoiser = Denoiser(SIZES, DenoiserInfo("none", part="semantic"), *STATISTICS[:2], mean, std).eval()
    given = latents(1, 5)
    torch.testing.assert_close(denoiser(given * std + mean), denoiser.restore_target(given), rtol=0, atol=1e-4)
    torch.testing.assert_close(denoiser.standardize_target(denoiser.restore_target(given)), given, rtol=0, atol=1e-5)


@torch.no_grad()
def test_clips_do_not_see_padding_or_each_other() -> None:
    denoiser, counts = awake(), [9, 4, 1]
    batch = latents(3, 9)
    found = denoiser(batch, mask_of(counts, 9))
    poisoned = batch.masked_fill(~mask_of(counts, 9)[..., None], 1e6)
    torch.testing.assert_close(denoiser(poisoned, mask_of(counts, 9)), found, rtol=0, atol=1e-5)
    for row, count in enumerate(counts):
        alone = denoiser(batch[row : row + 1, :count])
        torch.testing.assert_close(found[row, :count], alone[0], rtol=0, atol=1e-5)
        assert not found[row, count:].any()


@torch.no_grad()
def test_the_order_of_tokens_matters_and_distant_ones_are_seen() -> None:
    denoiser = awake()
    given = latents(1, 2 * POSITION_KERNEL)
    turned = denoiser(given.flip(1)).flip(1)
    assert (turned - denoiser(given)).abs().max() > 1e-2
    changed = given.clone()
    changed[0, -1] += 3
    assert (denoiser(changed) - denoiser(given))[0, 0].abs().max() > 1e-4


def test_every_parameter_learns() -> None:
    denoiser = awake().train()
    denoiser(latents(2, 6), mask_of([6, 3], 6)).square().sum().backward()
    for name, parameter in denoiser.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@torch.no_grad()
def test_half_precision_is_close() -> None:
    denoiser, given = awake(), latents(1, 30)
    expected = denoiser(given)
    with torch.autocast("cpu", torch.bfloat16):
        found = denoiser(given)
    assert 0 < (found - expected).norm() / expected.norm() < 0.05


@pytest.mark.slow
def test_onnx_export_with_dynamic_shapes(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    denoiser = awake()
    batch, tokens = (torch.export.Dim(name, min=1) for name in ("batch", "tokens"))
    shapes = {"embeddings": {0: batch, 1: tokens}, "token_mask": {0: batch, 1: tokens}}
    example = (latents(2, 9), mask_of([9, 6], 9))
    program = torch.onnx.export(denoiser, example, dynamo=True, dynamic_shapes=shapes, verbose=False)
    program.save(tmp_path / "denoiser.onnx")
    session = runtime.InferenceSession(tmp_path / "denoiser.onnx")
    for clips, length in ((1, 1), (3, 40), (2, 133)):
        given, mask = latents(clips, length), mask_of([length] + [1] * (clips - 1), length)
        (found,) = session.run(None, {"embeddings": given.numpy(), "token_mask": mask.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), denoiser(given, mask), rtol=0, atol=1e-4)


@torch.no_grad()
def test_blocks_may_be_wider_than_the_latent() -> None:
    torch.manual_seed(0)
    sizes = dataclasses.replace(SIZES, width=24, heads=3)
    denoiser = Denoiser(sizes, DenoiserInfo("no tokenizer"), *STATISTICS).eval()
    assert denoiser.blocks[0].norm1.weight.shape == (24,)
    torch.testing.assert_close(denoiser(latents(1, 5)), latents(1, 5), rtol=0, atol=1e-5)


def test_latents_of_another_width_are_refused() -> None:
    for given in (torch.zeros(1, 5, WIDTH + 1), torch.zeros(5, WIDTH)):
        with pytest.raises(LatentError, match=f"{WIDTH}"):
            fresh()(given)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"heads": 3}, "does not divide"),
        ({"width": 15}, "does not divide"),
        ({"depth": -1}, "depth -1"),
        ({"heads": 0}, "at least 1"),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        DenoiserConfig(**{"latent_dim": WIDTH, "depth": 1, "heads": 2, **sizes})


@pytest.mark.parametrize(
    ("info", "message"),
    [({"part": "both"}, "'both'"), ({"window_seconds": 0.0}, "window_seconds"), ({"frame_rate": -1.0}, "frame_rate")],
)
def test_impossible_facts_are_refused(info: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        DenoiserInfo("none", **info)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(WIDTH + 1), "latent_mean has shape"),
        (1, torch.zeros(WIDTH), "latent_std must be finite"),
        (3, -torch.ones(WIDTH), "input_std must be finite"),
        (2, torch.full((WIDTH,), float("nan")), "input_mean must be finite"),
    ],
)
def test_statistics_that_cannot_be_are_refused(place: int, value: Tensor, message: str) -> None:
    statistics = list(STATISTICS)
    statistics[place] = value
    with pytest.raises(ConfigurationError, match=message):
        Denoiser(SIZES, DenoiserInfo("none"), *statistics)


def test_a_dimension_that_never_changes_is_not_divided_by_zero() -> None:
    still = STATISTICS[1].clone()
    still[3] = 0.0
    denoiser = Denoiser(SIZES, DenoiserInfo("none"), STATISTICS[0], still, STATISTICS[0], still)
    assert torch.isfinite(denoiser.standardize_target(latents(1, 3))).all()


# ---------------------------------------------------------------------- on disk


def test_a_folder_holds_all_of_it(tmp_path: Path) -> None:
    first = awake(part="acoustic", window_seconds=2.0, tokenizer="somewhere", provenance={"hours": 3.5})
    first.save_pretrained(tmp_path)
    again = Denoiser.from_pretrained(tmp_path)
    assert again.info == first.info and again.config == first.config and not again.training
    given = latents(1, 8)
    with torch.no_grad():
        assert torch.equal(again(given), first(given))
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    assert again.num_parameters == sum(p.numel() for p in first.parameters())


def test_half_precision_on_disk_and_float32_in_memory(tmp_path: Path) -> None:
    awake().save_pretrained(tmp_path, torch.float16)
    stored = load_file(tmp_path / WEIGHTS)
    wide = {name for name, value in stored.items() if value.dtype == torch.float32}
    assert wide == {"latent_mean", "latent_std", "input_mean", "input_std"}
    assert {value.dtype for value in Denoiser.from_pretrained(tmp_path).state_dict().values()} == {torch.float32}


def test_folders_that_are_no_denoiser_are_named(tmp_path: Path, generator_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        Denoiser.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="dashengtokenizer-generator"):
        Denoiser.from_pretrained(generator_folder)
    awake().save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    for changes, message in (
        ({"version": 99}, "version 99"),
        ({"denoiser": {"latent_dim": WIDTH, "colour": 1}}, "damaged"),
        ({"denoiser": dataclasses.asdict(dataclasses.replace(SIZES, depth=1))}, "unknown"),
        ({"weights": "other"}, "cut off"),
    ):
        (tmp_path / CONFIG).write_text(json.dumps(config | changes))
        with pytest.raises(CheckpointError, match=message):
            Denoiser.from_pretrained(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:-50])
    with pytest.raises(CheckpointError, match="damaged"):
        Denoiser.from_pretrained(tmp_path)


def test_nan_is_not_saved(tmp_path: Path) -> None:
    denoiser = awake()
    with torch.no_grad():
        denoiser.project_out.bias[0] = float("nan")
    with pytest.raises(CheckpointError, match=r"project_out\.bias holds NaN"):
        denoiser.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_an_embedded_one_the_way_out_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(denoiser_module, "embedded_denoiser", lambda: tmp_path / "enhancer")
    with pytest.raises(CheckpointError, match="--model FOLDER"):
        Denoiser.from_pretrained()
