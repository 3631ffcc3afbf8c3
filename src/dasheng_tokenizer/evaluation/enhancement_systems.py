"""What is compared on noisy speech: nothing at all, enhancers, classical methods, and the ceiling of a tokenizer.

All take a clip at 16 kHz, mono, and give one of the same length, in time with it.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from dasheng_tokenizer.audio import fit_length, resample
from dasheng_tokenizer.errors import AudioError, ConfigurationError
from dasheng_tokenizer.evaluation.codecs import Tokenizer
from dasheng_tokenizer.evaluation.model_metrics import EXTRA
from dasheng_tokenizer.files import require_extra

if TYPE_CHECKING:
    from torch import nn

    from dasheng_tokenizer.enhancement.enhancer import Enhancer

RATE = 16_000
UNPROCESSED = "unprocessed"
CEILING = "clean through the tokenizer"

RNNOISE_RATE = 48_000
RNNOISE_DELAY = 960
"""Of RNNoise 0.2 in samples at 48 kHz: one frame of overlapping windows, and one that the network looks ahead."""

RNNOISE_FULL_SCALE = 32768.0

Samples = npt.NDArray[np.float32]


class System(Protocol):
    """A row of the tables."""

    @property
    def light(self) -> bool:
        """Whether it may be sent to another process, to run there in one thread."""

    @property
    def from_clean(self) -> bool:
        """Whether it hears the clean speech and not the noisy one, as a yardstick."""

    @property
    def name(self) -> str:
        """What the tables call it."""

    @property
    def about(self) -> str:
        """A sentence on it for the notes, or nothing."""

    def identity(self) -> list[Any]:
        """Changes whenever its output may change: name, weights, settings, versions."""

    def process(self, audio: Samples) -> Samples:
        """(samples,) at 16 kHz → the same length."""


@dataclass(frozen=True)
class Unprocessed:
    """The noisy clip as it is."""

    name: str = UNPROCESSED
    about: str = ""
    light: bool = True
    from_clean: bool = False

    def identity(self) -> list[Any]:
        """As in `System`."""
        return ["unprocessed"]

    def process(self, audio: Samples) -> Samples:
        """As in `System`."""
        return audio


class EnhancerSystem:
    """An enhancer of ours.

    Args:
        enhancer: on any device.
        name: what the tables call it.
    """

    light = False
    from_clean = False

    def __init__(self, enhancer: Enhancer, name: str) -> None:
        self.enhancer, self.name = enhancer, name
        self._hash = _weights_hash(enhancer.denoiser)
        millions = sum(parameter.numel() for parameter in enhancer.denoiser.parameters()) / 1e6
        self.about = (
            f"{name}: denoiser of {millions:.1f} M parameters, weights {self._hash[:12]}, part "
            f"{enhancer.denoiser.info.part}, of the tokenizer {enhancer.tokenizer.weights_hash()[:12]}."
        )

    def identity(self) -> list[Any]:
        """As in `System`."""
        tokenizer = self.enhancer.tokenizer
        device = str(next(tokenizer.parameters()).device.type)
        info = self.enhancer.denoiser.info
        return ["enhancer", self._hash, info.part, info.window_seconds, *Tokenizer(tokenizer, "").identity(), device]

    def process(self, audio: Samples) -> Samples:
        """As in `System`."""
        enhanced: Samples = self.enhancer.enhance(audio[None], RATE)[0].float().cpu().numpy()
        return enhanced


class Ceiling:
    """The clean speech, coded and decoded by a tokenizer: no enhancer in its latent can be expected to do better.

    Args:
        tokenizer: in eval mode, on any device.
        name: what the tables call it.
    """

    light = False
    from_clean = True

    def __init__(self, tokenizer: nn.Module, name: str = CEILING) -> None:
        self._codec = Tokenizer(tokenizer, name)  # type: ignore[arg-type]
        self.name, self.about = name, self._codec.about

    def identity(self) -> list[Any]:
        """As in `System`."""
        return ["ceiling", *self._codec.identity()]

    def process(self, audio: Samples) -> Samples:
        """As in `System`."""
        return self._codec.reconstruct(audio).audio


@dataclass(frozen=True)
class SpectralGate:
    """Spectral gating without a network, by noisereduce: a threshold that follows each band, with its default settings.

    The noise floor is the magnitude smoothed over about 2 s, so that no recording of the noise alone is needed.
    """

    name: str = "spectral gate"
    light: bool = True
    from_clean: bool = False

    @property
    def about(self) -> str:
        """As in `System`."""
        return (
            f"{self.name}: noisereduce {_version('noisereduce')}, non-stationary, default settings (windows of 1024 "
            "samples every 256, floor over 2 s), at 16 kHz."
        )

    def identity(self) -> list[Any]:
        """As in `System`."""
        return ["spectral-gate", _version("noisereduce")]

    def process(self, audio: Samples) -> Samples:
        """As in `System`; silence stays silence.

        Raises:
            AudioError: the library gives no finite samples. MissingExtraError: noisereduce is not installed.
        """
        package = require_extra("noisereduce", EXTRA)
        if not audio.any():
            return audio.copy()  # its thresholds divide by the level
        gated: Samples = package.reduce_noise(y=audio, sr=RATE, stationary=False).astype(np.float32)
        if not np.isfinite(gated).all():
            raise AudioError("noisereduce gives NaN for this clip; leave it out")
        return gated


@dataclass(frozen=True)
class RNNoise:
    """RNNoise (Valin 2018, arXiv 1709.08243), the version 0.2 of the package pyrnnoise with the weights inside it.

    It works at 48 kHz: clips are resampled to that rate and back, and its delay is taken out.
    """

    name: str = "RNNoise"
    light: bool = True
    from_clean: bool = False

    @property
    def about(self) -> str:
        """As in `System`."""
        return (
            f"{self.name}: pyrnnoise {_version('pyrnnoise')} with its own weights, at 48 kHz, resampled from 16 kHz "
            f"and back by soxr, its delay of {RNNOISE_DELAY} samples taken out."
        )

    def identity(self) -> list[Any]:
        """As in `System`."""
        return ["rnnoise", _version("pyrnnoise"), RNNOISE_DELAY]

    def process(self, audio: Samples) -> Samples:
        """As in `System`.

        Raises:
            MissingExtraError: pyrnnoise is not installed.
        """
        # The library's own function and not the package's wrapper, which rounds to 16 bit and wraps around beyond.
        package = require_extra("pyrnnoise.rnnoise", EXTRA)
        high = resample(audio, RATE, RNNOISE_RATE)
        length = high.size + RNNOISE_DELAY
        padded = fit_length(RNNOISE_FULL_SCALE * high, length + -length % package.FRAME_SIZE)
        frames = padded.astype(np.float32).reshape(-1, package.FRAME_SIZE)  # a copy, since each is written over
        state = package.create()
        try:
            for frame in frames:
                pointer = frame.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
                package.lib.rnnoise_process_frame(state, pointer, pointer)
        finally:
            package.destroy(state)
        denoised = frames.reshape(-1)[RNNOISE_DELAY:length] / np.float32(RNNOISE_FULL_SCALE)
        return fit_length(resample(denoised, RNNOISE_RATE, RATE), audio.size)


BASELINES: dict[str, tuple[System, str]] = {
    "spectral-gate": (SpectralGate(), "noisereduce"),
    "rnnoise": (RNNoise(), "pyrnnoise.rnnoise"),
}
"""What `--baseline` takes: the system, and the module that it needs."""


def parse_baseline(text: str) -> System:
    """`spectral-gate` or `rnnoise`.

    Raises:
        ConfigurationError: anything else. MissingExtraError: its package is not installed.
    """
    if text not in BASELINES:
        raise ConfigurationError(f"--baseline {text} is unknown; known: {', '.join(BASELINES)}")
    system, module = BASELINES[text]
    require_extra(module, EXTRA)
    return system


def ceilings(enhancers: Sequence[EnhancerSystem]) -> list[Ceiling]:
    """The ceiling of each tokenizer that the enhancers have, named by its first enhancer where there are several."""
    first: dict[str, EnhancerSystem] = {}
    for system in enhancers:
        first.setdefault(system.enhancer.tokenizer.weights_hash(), system)
    if len(first) == 1:
        return [Ceiling(system.enhancer.tokenizer) for system in first.values()]
    return [Ceiling(system.enhancer.tokenizer, f"clean through that of {system.name}") for system in first.values()]


def _version(distribution: str) -> str:
    return importlib.metadata.version(distribution)


def _weights_hash(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
