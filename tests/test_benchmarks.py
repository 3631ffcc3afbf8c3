"""What the benchmarks compare with is what it is said to be."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parent.parent
FIXTURE = ROOT / "tests" / "fixtures" / "published-layout"


@pytest.mark.parametrize("case", ["a", "b", "c", "d", "e"])
@torch.inference_mode()
def test_the_plain_forward_pass_is_the_published_one(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import plain_forward

    weights, golden = load_file(FIXTURE / "model.safetensors"), load_file(FIXTURE / "io.safetensors")
    unified = plain_forward.encode(weights, golden[f"{case}.audio"].float() / 32768, num_heads=4)
    torch.testing.assert_close(unified, golden[f"{case}.unified"], rtol=0, atol=3e-5)
    audio = plain_forward.decode(weights, golden[f"{case}.unified"])
    torch.testing.assert_close(audio, golden[f"{case}.decoded"], rtol=0, atol=3e-6)
