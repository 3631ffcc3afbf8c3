"""The fast ways give what the plain ones give: windows together, compiled layers, reading ahead."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from conftest import tiny
from dasheng_tokenizer import semantic_encoder
from dasheng_tokenizer.ahead import ahead
from dasheng_tokenizer.chunking import encode_blocks
from dasheng_tokenizer.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ["dasheng", "whisper", "wavlm"]


def noise(*shape: int) -> torch.Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_windows_together_equal_windows_one_by_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(kind)
    model.set_encoder_window(0.4)
    audio = noise(3, 60_000)
    mask = torch.arange(60_000) < torch.tensor([60_000, 31_000, 700])[:, None]
    calls: list[int] = []
    plain = model.semantic_encoder.encode_window

    def counted(context_audio: torch.Tensor, *rest: Any) -> torch.Tensor:
        calls.append(len(context_audio))
        return plain(context_audio, *rest)

    monkeypatch.setattr(model.semantic_encoder, "encode_window", counted)
    monkeypatch.setitem(semantic_encoder.WINDOWS_TOKENS, "cpu", 10)
    expected = model(audio, mask)
    assert max(calls) == 3 and len(calls) > 3
    blocks = torch.cat(list(encode_blocks(model, lambda: [audio[:1].numpy()])), dim=1)
    calls.clear()
    monkeypatch.setitem(semantic_encoder.WINDOWS_TOKENS, "cpu", 10_000)
    found = model(audio, mask)
    # 9 + 4 + 0 whole windows and the started ones of two clips; the rest of the longest one, 0.15 s, comes apart.
    assert calls == [9 + 5 + 1, 1]
    for name in ("unified", "semantic", "audio"):
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5)
    together = torch.cat(list(encode_blocks(model, lambda: [audio[:1].numpy()])), dim=1)
    torch.testing.assert_close(together, blocks, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [*KINDS, "vae"])
@torch.inference_mode()
def test_layers_are_compiled_once_for_every_length(kind: str) -> None:
    model = tiny(kind) if kind != "vae" else tiny_vae()
    expected = [model(noise(1, samples)) for samples in (700, 9_000, 33_000, 170_000)]
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    assert model.compile_layers(backend=backend) is model
    first = model(noise(1, 700)).audio
    torch.testing.assert_close(first, expected[0].audio, rtol=0, atol=1e-5)
    kinds = len(graphs)  # of layers: WavLM has two, since its first layer computes the positions
    assert 1 <= kinds <= 3
    for samples, plain in zip((9_000, 33_000, 170_000), expected[1:], strict=True):
        torch.testing.assert_close(model(noise(1, samples)).audio, plain.audio, rtol=0, atol=1e-5)
    assert len(graphs) == kinds
    torch._dynamo.reset()


def tiny_vae() -> Any:
    from dasheng_tokenizer import DashengTokenizerConfig, DashengTokenizerModel

    sizes = {"decoder_embed_dim": 32, "decoder_depth": 2, "decoder_intermediate_size": 48}
    torch.manual_seed(0)
    return DashengTokenizerModel(DashengTokenizerConfig(latent_kind="vae", vae_dim=8, vae_depth=2, **sizes)).eval()


def test_items_come_in_order_and_are_made_by_another_thread() -> None:
    threads = set()

    def made() -> Iterator[int]:
        for number in range(20):
            threads.add(threading.current_thread())
            yield number

    assert list(ahead(made())) == list(range(20))
    assert threads and threading.current_thread() not in threads
    assert list(ahead([])) == [] and list(ahead([None, None])) == [None, None]


def test_a_fault_comes_up_in_its_place_and_leaving_early_ends_the_thread() -> None:
    def broken() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("third")

    seen = []
    with pytest.raises(ValueError, match="third"):
        for item in ahead(broken(), count=5):
            seen.append(item)
    assert seen == [1, 2]
    endless = ahead(itertools.repeat(0))
    next(endless)
    endless.close()
    assert not any(thread.name.startswith("ahead") for thread in threading.enumerate())


def test_threads_of_the_command_do_not_spin_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert main(["--help"]) == 0
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert main(["--help"]) == 0
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
