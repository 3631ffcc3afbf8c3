"""The systems that `throughput.py` measures, each as an encode and a decode function on tensors."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

import plain_forward
from dasheng_tokenizer import DashengTokenizerConfig, DashengTokenizerModel
from dasheng_tokenizer.chunking import decode_blocks, encode_blocks


@dataclass
class System:
    """What is measured.

    Attributes:
        rate: sampling rate of its audio, in Hz.
        encode: (B, S) float32 samples → anything.
        decode: what `encode` gives → samples.
        model: ours, where blocks of an hour can be asked for, else None.
    """

    rate: int
    encode: Callable[[Tensor], Any]
    decode: Callable[[Any], Tensor]
    model: DashengTokenizerModel | None = None


def random_published_model(folder: Path) -> None:
    """A model of the full published size with random weights, in float32, 3.2 GB."""
    torch.manual_seed(0)
    DashengTokenizerModel(DashengTokenizerConfig()).save_pretrained(folder, max_shard_size="10GB")


def ours(folder: str | None, dtype: torch.dtype, device: str, compiled: bool) -> System:
    """The tokenizer of a folder, or the embedded default."""
    model = DashengTokenizerModel.from_pretrained(*([folder] if folder else []), dtype=dtype).to(device).eval()
    if compiled:
        model.compile_layers()
    return System(model.sampling_rate, model.encode, model.decode, model)


def plain(folder: str, device: str) -> System:
    """The plain transcription of the published forward pass, in float32."""
    weights = {name: tensor.to(device) for name, tensor in load_file(Path(folder) / "model.safetensors").items()}
    return System(
        16_000, lambda audio: plain_forward.encode(weights, audio), lambda z: plain_forward.decode(weights, z)
    )


def peer(name: str, dtype: torch.dtype, device: str) -> System:
    """A codec of transformers in its default size, with random weights."""
    import transformers

    config = getattr(transformers, f"{name}Config")()
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(config).to(device=device, dtype=dtype).eval()
    for module in list(model.modules()):  # weight norm folded in, as one would to run it fast
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")

    def encode(audio: Tensor) -> Any:
        return model.encode(audio[:, None].to(dtype))

    def decode(encoded: Any) -> Tensor:
        if name == "Encodec":
            return model.decode(encoded.audio_codes, encoded.audio_scales).audio_values
        return model.decode(audio_codes=encoded.audio_codes).audio_values

    return System(config.sampling_rate, encode, decode)


def noise(samples: int, batch: int, device: str) -> Tensor:
    """(batch, samples); speed does not hang on the content."""
    return (0.1 * torch.randn(batch, samples, generator=torch.Generator().manual_seed(0))).to(device)


def gigaflops(action: Callable[[], object]) -> float:
    """10⁹ floating-point operations of an action, a multiplication and an addition being two.

    Attention is taken apart into its matrix products, since the counter does not know the fused one of a CPU.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        action()
    return float(counter.get_total_flops()) / 1e9


def encode_hour(model: DashengTokenizerModel, folder: Path) -> Path:
    """An hour in blocks, as a file is encoded; the latents go to a file so that memory holds a block."""
    block = noise(10 * 16_000, 1, "cpu").numpy()

    def blocks() -> Iterator[Any]:
        return (block for _ in range(360))

    path = folder / "latents.npy"
    stored = np.lib.format.open_memmap(path, "w+", np.float32, (1, 90_000, model.latent_dim))
    start = 0
    for latents in encode_blocks(model, blocks):
        stored[:, start : start + latents.shape[1]] = latents.float().numpy()
        start += latents.shape[1]
    return path


def decode_hour(model: DashengTokenizerModel, path: Path) -> None:
    """The latents of `encode_hour` in blocks."""
    stored = np.load(path, mmap_mode="r")

    class Latents:
        shape = stored.shape

        def __getitem__(self, index: tuple[slice, slice]) -> Tensor:
            return torch.from_numpy(np.array(stored[index]))

    for _ in decode_blocks(model, Latents()):
        pass


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder for the latents of an hour."""
    return tempfile.TemporaryDirectory()
