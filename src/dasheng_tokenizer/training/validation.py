"""Quality on held-out clips while training: mel distance, PESQ and STOI, and samples to hear and see in TensorBoard."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dasheng_tokenizer.spectral import SAMPLES_PER_TOKEN, SAMPLING_RATE, with_context
from dasheng_tokenizer.training.configuration import TrainingConfig
from dasheng_tokenizer.training.data import ValidationClip, validation_clips
from dasheng_tokenizer.training.losses import MultiScaleMelLoss
from dasheng_tokenizer.training.run_log import RunLog
from dasheng_tokenizer.training.sharding import dealt
from dasheng_tokenizer.training.tokenizer_state import Generated

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from matplotlib.figure import Figure

Samples = npt.NDArray[np.float32]


@torch.no_grad()
def validate(fabric: Fabric, generator: nn.Module, config: TrainingConfig, step: int, log: RunLog) -> dict[str, float]:
    """Decode whole held-out clips, share the work among the ranks, and average.

    Args:
        fabric: of the run.
        generator: the `tokenizer_state.Generator` with the weights to judge, without Fabric's wrapper.
        config: says which clips, how many, and what the decoder gets.
        step: for the log.
        log: receives originals (once), reconstructions and spectrograms.

    Returns:
        Means over clips: `mel` (7-scale mel distance) over all and `mel_DOMAIN` for each domain; for speech `pesq_wb`
        and `stoi` where those packages are installed; of a VAE `kl`, nats per latent number. Empty where there are no
        held-out clips.
    """
    clips = validation_clips(config.data, config.validation_clips)
    mel = MultiScaleMelLoss().to(fabric.device)
    was_training = generator.training
    generator.eval()
    rows: list[dict[str, float]] = []
    for index, counts in dealt(len(clips), fabric.global_rank, fabric.world_size):
        clip = clips[index]
        original = torch.from_numpy(np.ascontiguousarray(clip.audio)).float()
        decoded, kl = _reconstruct(fabric, generator, original.to(fabric.device))
        if not counts:
            continue
        row = {"mel": float(mel(decoded[None], original.to(fabric.device)[None])), **kl}
        row[f"mel_{clip.domain}"] = row["mel"]
        if clip.domain == "speech":
            row |= speech_quality(original.numpy(), decoded.cpu().numpy(), SAMPLING_RATE)
        rows.append(row)
        if _is_sample(index, len(clips), config.validation_samples):
            _show(log, clip, decoded.cpu().numpy(), step, SAMPLING_RATE)
    generator.train(was_training)
    return mean_rows(fabric, rows)


def speech_quality(original: Samples, decoded: Samples, sampling_rate: int) -> dict[str, float]:
    """PESQ-WB and STOI, (S,) each, as far as the packages are installed and can judge the clip.

    PESQ refuses clips without speech-like activity or shorter than a quarter of a second; such clips are left out.
    """
    quality = {}
    try:
        import pesq

        quality["pesq_wb"] = float(pesq.pesq(sampling_rate, original, decoded, "wb"))
    except ImportError:
        pass
    except (pesq.PesqError, ValueError):
        pass
    try:
        import pystoi
    except ImportError:
        return quality
    # STOI compares windows of 384 ms; a clip with less speech yields a constant 1e-5 and a warning instead of a figure.
    value = float(pystoi.stoi(original, decoded, sampling_rate))
    return quality if value <= 1e-4 else {**quality, "stoi": value}


def spectrogram_figure(original: Samples, decoded: Samples, sampling_rate: int) -> Figure | None:
    """Log-magnitude spectrograms, original above and reconstruction below; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(8, 5), layout="constrained")
    for row, (name, samples) in enumerate((("original", original), ("reconstruction", decoded)), start=1):
        window = torch.hann_window(1024)
        padded = torch.nn.functional.pad(torch.from_numpy(samples.copy()), (0, max(0, 1024 - len(samples))))
        spectrum = torch.stft(padded, 1024, 256, window=window, return_complex=True).abs()  # (513, frames)
        axes = figure.add_subplot(2, 1, row, title=name, ylabel="kHz")
        extent = (0.0, len(samples) / sampling_rate, 0.0, sampling_rate / 2000)
        decibel = 20 * spectrum.clamp(min=1e-4).log10().numpy()
        axes.imshow(decibel, origin="lower", aspect="auto", extent=extent, vmin=-60, vmax=40)
    return figure


def _reconstruct(fabric: Fabric, generator: nn.Module, audio: Tensor) -> tuple[Tensor, dict[str, float]]:
    """(S,) → (S,), through the embedding that this run trains, or the mean of a VAE; and the divergence of a VAE."""
    context = with_context(audio[None], -(-len(audio) // SAMPLES_PER_TOKEN))  # (1, 512 + 640·T + 512)
    with fabric.autocast():
        generated: Generated = generator(context, None)
    kl = {} if generated.posterior is None else {"kl": float(generated.posterior.kl().mean())}
    return generated.audio[0, : len(audio)].float(), kl


def _is_sample(index: int, count: int, samples: int) -> bool:
    """Spread the samples evenly over the clips, and with them over the domains."""
    return samples > 0 and index % max(1, count // samples) == 0 and index // max(1, count // samples) < samples


def _show(log: RunLog, clip: ValidationClip, decoded: Samples, step: int, sampling_rate: int) -> None:
    log.audio(f"original/{clip.key}", clip.audio, 0, sampling_rate)
    log.audio(f"reconstruction/{clip.key}", decoded, step, sampling_rate)
    figure = spectrogram_figure(clip.audio, decoded, sampling_rate)
    if figure is not None:
        log.figure(f"spectrogram/{clip.key}", figure, step)


def mean_rows(fabric: Fabric, rows: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each metric over the clips of all ranks that have it."""
    if fabric.world_size > 1:
        gathered: list[Any] = [None] * fabric.world_size
        torch.distributed.all_gather_object(gathered, rows)
        rows = [row for part in gathered for row in part]
    values: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for name, value in row.items():
            values[name].append(value)
    return {name: round(float(np.mean(held)), 5) for name, held in sorted(values.items())}
