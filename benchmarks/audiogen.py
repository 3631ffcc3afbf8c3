"""The published sibling generator with random weights: memory at full size, and what is saved against a plain loop.

    python benchmarks/audiogen.py --report docs/reports/audiogen.json [--runs 3]

Memory is counted on the meta device: the weights, and the most that is alive at once among the results of operations.
On a GPU it is measured, too, at full size. Speed is taken at full size on a GPU, else with a transformer of 1/30 of the
size on the CPU, where only the ratio means anything. The plain loop asks for a velocity at every entry of the published
list of times, the last without effect, and computes at every step all that hangs on the prompt and the time.
"""

from __future__ import annotations

import argparse
import statistics
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dasheng_tokenizer import DashengTokenizerConfig, DashengTokenizerModel
from dasheng_tokenizer.generation.audiogen import AudioGen
from dasheng_tokenizer.generation.audiogen_configuration import AudioGenConfig
from dasheng_tokenizer.generation.flow_matching import guided, timestep_schedule
from dasheng_tokenizer.generation.sampling import clip_mask, clip_noise
from report import Report, Table, hardware

SECONDS, STEPS, GUIDANCE, TEXT_TOKENS = 10, 25, 5.0, 64

SMALL = AudioGenConfig(
    latent_dim=256, dit_embed_dim=512, dit_depth=8, dit_num_heads=8, content_dim=256, text_dim=256,
    task_instruction_dim=256, dit_ta_context_dim=256, adapter_num_heads=4, duration_predictor_filter_channels=128,
)  # fmt: skip

FLAN_T5_LARGE = {
    "vocab_size": 32128, "d_model": 1024, "d_kv": 64, "d_ff": 2816, "num_layers": 24, "num_heads": 16,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
"""From the published config.json of google/flan-t5-large."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations have made and nobody has let go of; not those of the weights."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and look at what it gives."""
        result = function(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(item, Tensor):
                self._count(item.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def mebibytes(module: nn.Module) -> float:
    """Of weights and buffers."""
    held = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in held) / 2**20


def memory_rows() -> list[list[str | float | int]]:
    """Counted on the meta device, in MiB."""
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        model = AudioGen(AudioGenConfig()).to(torch.bfloat16).eval()
        words = T5EncoderModel(T5Config(**FLAN_T5_LARGE))
        codec = DashengTokenizerModel(DashengTokenizerConfig())
    config, tokens = model.config, int(SECONDS * model.config.frame_rate)
    mask = torch.ones(2, TEXT_TOKENS, dtype=torch.bool)  # on the CPU: whether it hides anything is asked for
    with torch.no_grad(), LiveBytes(model) as live:
        content = torch.empty(2, TEXT_TOKENS, config.content_dim, dtype=torch.bfloat16, device="meta")
        aligned = torch.empty(2, config.content_dim, dtype=torch.bfloat16, device="meta")
        context = model.backbone.encode_context(content, mask, aligned)
        modulation = model.backbone.modulation(torch.empty(STEPS, device="meta"))
        kept = live.now
        rows = torch.zeros(2, dtype=torch.int64, device="meta")
        latents = torch.empty(2, tokens, config.latent_dim, device="meta")
        model.backbone(latents, modulation.at(rows), context)
    return [
        ["generator, bfloat16", f"{mebibytes(model):.0f}"],
        [f"kept for {STEPS} steps and {TEXT_TOKENS} text tokens", f"{kept / 2**20:.0f}"],
        [f"one velocity of a {SECONDS} s clip with guidance, at its peak", f"{(live.peak - kept) / 2**20:.0f}"],
        ["text encoder flan-t5-large, float32 (may stay on the CPU)", f"{mebibytes(words):.0f}"],
        ["published tokenizer, float32 (its decoder alone is used)", f"{mebibytes(codec):.0f}"],
    ]


def measured_memory(model: AudioGen, text: list[Tensor]) -> list[list[str | float | int]]:
    """On a GPU, in MiB."""
    torch.cuda.reset_peak_memory_stats()
    model.sample(text, [int(SECONDS * model.config.frame_rate)], seeds=[0], steps=STEPS, guidance=GUIDANCE)
    return [["measured peak of the generator on the GPU", f"{torch.cuda.max_memory_allocated() / 2**20:.0f}"]]


def random_model(config: AudioGenConfig, device: torch.device, dtype: torch.dtype) -> AudioGen:
    """Weights as they are initialised; the learned vectors, which start at zero, are drawn."""
    torch.manual_seed(0)
    with device:
        model = AudioGen(config)
        nn.init.normal_(model.dummy_ta_embed)
        nn.init.normal_(model.instruction_embedding)
    return model.to(dtype).eval().requires_grad_(False)


def plain(model: AudioGen, text: list[Tensor], tokens: int) -> Tensor:
    """The published loop: nothing is kept from one step to the next, and the last evaluation is in vain."""
    device = model.dummy_ta_embed.device
    mask = clip_mask([tokens], device)
    times = timestep_schedule(STEPS, -1.0).float()
    x = clip_noise(0, tokens, model.config.latent_dim)[None].to(device)
    for index in range(STEPS + 1):
        here = times[index : index + 1]
        anew = torch.cat([here, here + 1])  # of a schedule of one step, whose first time is the one asked for
        velocity = guided(lambda flags, anew=anew: model.velocity(text, mask, flags, anew), GUIDANCE)  # type: ignore[misc]
        slope = velocity(x, here.to(device))
        x = x + (times[index + 1] - times[index] if index < STEPS else 0.0) * slope
    return x[0]


def kept(model: AudioGen, text: list[Tensor], tokens: int) -> Tensor:
    """Ours."""
    return model.sample(text, [tokens], seeds=[0], steps=STEPS, guidance=GUIDANCE)[0]


def seconds_of(action: Callable[[], Tensor]) -> float:
    """Of one call."""
    start = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def speed_rows(model: AudioGen, text: list[Tensor], runs: int) -> list[list[str | float | int]]:
    """Medians of runs that take turns, and how far the results are apart."""
    tokens = int(SECONDS * model.config.frame_rate)
    names: dict[str, Callable[[], Tensor]] = {
        "plain loop": lambda: plain(model, text, tokens),
        "ours": lambda: kept(model, text, tokens),
    }
    first, second = (action() for action in names.values())
    apart = float((first - second).norm() / first.norm())
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(runs):
        for name, action in names.items():
            times[name].append(seconds_of(action))
    middle = {name: statistics.median(values) for name, values in times.items()}
    base = middle["plain loop"]
    rows: list[list[str | float | int]] = [
        [name, STEPS + 1 if name == "plain loop" else STEPS, f"{value:.2f} s", f"{base / value:.2f}"]
        for name, value in middle.items()
    ]
    return [*rows, ["relative difference of the latents", "", f"{apart:.1e}", ""]]


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, default=Path("docs/reports/audiogen.json"))
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    gpu = torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if gpu else (torch.device("cpu"), torch.float32)
    model = random_model(AudioGenConfig() if gpu else SMALL, device, dtype)
    text = [torch.randn(TEXT_TOKENS, model.config.text_dim, generator=torch.Generator().manual_seed(0))]
    memory = memory_rows() + (measured_memory(model, text) if gpu else [])
    size = f"{model.num_parameters / 1e6:.0f} M parameters, {dtype}".replace("torch.", "")
    Report(
        title="Published sibling generator: memory and speed",
        command="python benchmarks/audiogen.py",
        data=f"random weights; one clip of {SECONDS} s, {STEPS} steps, guidance {GUIDANCE:g}",
        hardware=hardware(),
        seed=0,
        tables=[
            Table("Memory at full size, 2.19 B parameters, MiB", ["what", "MiB"], memory),
            Table(
                f"Speed, {size}",
                ["loop", "velocities", "time", "times faster"],
                speed_rows(model, text, arguments.runs),
            ),
        ],
        notes=["The published weights could not be had here; layout and numerics are tested, the sound is not."],
        order=9,
    ).save(arguments.report)


if __name__ == "__main__":
    main()
