"""The published layout: golden tensors of the published implementation, key names and shapes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dasheng_tokenizer import DashengTokenizerConfig, DashengTokenizerModel

FIXTURE = Path(__file__).parent / "fixtures" / "published-layout"
CASES = json.loads((FIXTURE / "io.json").read_text())["cases"]
EMBEDDING, AUDIO = 3e-5, 3e-6  # tolerances of the fixture's README, absolute


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(FIXTURE / "io.safetensors")


@pytest.fixture(scope="module")
def published() -> DashengTokenizerModel:
    return DashengTokenizerModel.from_pretrained(FIXTURE, length_mode="published").eval()


def audio_of(case: str, golden: dict[str, torch.Tensor]) -> torch.Tensor:
    info = CASES[case]
    if "audio_slice_of" in info:
        cut = info["audio_slice_of"]
        audio = golden[f"{cut['case']}.audio"][:, cut["start"] : cut["start"] + cut["length"]]
    else:
        audio = golden[f"{case}.audio"]
    return audio.float() / 32768


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


UNMASKED = [name for name, info in CASES.items() if info.get("valid_samples") is None]


@pytest.mark.parametrize("case", UNMASKED)
@torch.no_grad()
def test_unmasked_case(case: str, golden: dict[str, torch.Tensor], published: DashengTokenizerModel) -> None:
    out = published(audio_of(case, golden))
    tokens = CASES[case]["tokens"]
    assert out.unified.shape[1] == tokens
    # Item 1 of b got its floor from its louder neighbour in the published code; b.solo1 is the reference below.
    items = [0] if case == "b" else list(range(len(out.unified)))
    for name in ("semantic", "acoustic", "unified"):
        if f"{case}.{name}" in golden:
            assert_close(out[name][items], golden[f"{case}.{name}"][items, :tokens], EMBEDDING)
    if f"{case}.decoded" in golden:
        assert_close(out.audio[items], golden[f"{case}.decoded"][items], AUDIO)
        assert_close(published.decode(golden[f"{case}.unified"]), golden[f"{case}.decoded"], AUDIO)


@torch.no_grad()
def test_quiet_clip_beside_a_loud_one_equals_the_clip_alone(
    golden: dict[str, torch.Tensor], published: DashengTokenizerModel
) -> None:
    out = published(audio_of("b", golden))
    for name in ("semantic", "acoustic", "unified"):
        if f"b.solo1.{name}" in golden:
            assert_close(out[name][1], golden[f"b.solo1.{name}"][0], EMBEDDING)


@torch.no_grad()
def test_masked_clip_equals_the_clip_alone(golden: dict[str, torch.Tensor], published: DashengTokenizerModel) -> None:
    valid = torch.tensor(CASES["f"]["valid_samples"])
    audio = audio_of("f", golden)
    out = published(audio, torch.arange(audio.shape[1]) < valid[:, None])
    assert_close(out.unified[0], golden["f.unified"][0], EMBEDDING)
    tokens = golden["f.solo1.unified"].shape[1]
    assert out.token_mask.sum(1).tolist() == [CASES["f"]["tokens"], tokens]
    assert_close(out.unified[1, :tokens], golden["f.solo1.unified"][0], EMBEDDING)
    assert not out.unified[1, tokens:].any()


@pytest.mark.parametrize("case", ["h", "k"])
@torch.no_grad()
def test_mask_faults_are_not_repeated(
    case: str, golden: dict[str, torch.Tensor], published: DashengTokenizerModel
) -> None:
    """h kept sound behind the mask, k hid the last real token: ours equal the valid part encoded alone."""
    audio, (valid,) = audio_of(case, golden), CASES[case]["valid_samples"]
    out = published(audio, torch.arange(audio.shape[1])[None] < valid)
    alone = published(audio[:, :valid])
    tokens = alone.unified.shape[1]
    assert tokens == (valid // 160 + 1) // 4
    for name in ("semantic", "acoustic", "unified"):
        assert_close(out[name][:, :tokens], alone[name], 1e-5)
        assert not out[name][:, tokens:].any()
    if case == "k":  # every sample is real, so the unmasked golden case j must come out
        assert_close(out.unified, golden["j.unified"], EMBEDDING)


def listed_keys() -> dict[str, list[int]]:
    rows = re.findall(r"^\| `([^`]+)` \| (\[[^\]]*\]|scalar) \|", (FIXTURE / "KEYS.md").read_text(), re.MULTILINE)
    return {key: [] if shape == "scalar" else json.loads(shape) for key, shape in rows}


def test_full_size_has_exactly_the_published_keys() -> None:
    with torch.device("meta"):
        model = DashengTokenizerModel(DashengTokenizerConfig())
    found = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    expected = listed_keys()
    assert len(expected) == 522
    assert found == expected
    assert sum(p.numel() for p in model.parameters()) == 804_920_450


def test_save_pretrained_writes_the_published_layout(tmp_path: Path, published: DashengTokenizerModel) -> None:
    published.save_pretrained(tmp_path)
    with (
        safe_open(FIXTURE / "model.safetensors", "pt") as expected,
        safe_open(tmp_path / "model.safetensors", "pt") as found,
    ):
        assert set(found.keys()) == set(expected.keys())
        for key in expected.keys():
            assert torch.equal(found.get_tensor(key), expected.get_tensor(key)), key
    fields = json.loads((FIXTURE / "config.json").read_text())
    saved = json.loads((tmp_path / "config.json").read_text())
    for name in fields.keys() - {"transformers_version"}:
        assert saved[name] == fields[name], name
