"""What makes a reconstruction: tokenizers of ours, and yardsticks that need no weights.

All take one clip at 16 kHz, mono, and give one of the same length, aligned with it.
"""

from __future__ import annotations

import importlib.metadata
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from dasheng_tokenizer.audio import fit_length
from dasheng_tokenizer.errors import AudioFileError, ConfigurationError
from dasheng_tokenizer.evaluation.model_metrics import EXTRA
from dasheng_tokenizer.files import require_extra

if TYPE_CHECKING:
    from dasheng_tokenizer.tokenizer import DashengTokenizerModel

RATE = 16_000
FLOORS = ("opus:KBITS", "griffin-lim", "original")
OPUS_KBITS = (6, 256)
"""Range in kbit/s that libsndfile offers: its compression level 1 is 6 and 0 is 256, linear between."""

Samples = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Decoded:
    """A reconstruction (samples,), and the bits of its code; None for a continuous code or none."""

    audio: Samples
    bits: int | None = None


class Codec(Protocol):
    """A system in the table."""

    @property
    def name(self) -> str:
        """What the table calls it."""

    @property
    def frame_rate(self) -> float | None:
        """Frames of its code a second, or None."""

    @property
    def about(self) -> str:
        """A sentence on it for the notes, or nothing."""

    def identity(self) -> list[Any]:
        """Changes whenever its output may change: name, weights, settings, versions."""

    def reconstruct(self, audio: Samples) -> Decoded:
        """(samples,) at 16 kHz → the same length."""


class Tokenizer:
    """A model of ours; its code is continuous, so that it has no bit rate.

    Args:
        model: in eval mode, on any device.
        name: what the table calls it.
    """

    def __init__(self, model: DashengTokenizerModel, name: str) -> None:
        self.model, self.name = model, name
        self.frame_rate: float | None = float(model.frame_rate)
        self.about = (
            f"{name}: {self.frame_rate:g} vectors of {model.latent_dim} numbers a second, weights "
            f"{model.weights_hash()[:12]}; continuous, so without a bit rate."
        )

    def identity(self) -> list[Any]:
        """As in `Codec`."""
        device = str(next(self.model.parameters()).device.type)
        return ["tokenizer", self.model.weights_hash(), str(self.model.dtype), device]

    def reconstruct(self, audio: Samples) -> Decoded:
        """As in `Codec`."""
        tokens = self.model.compress(audio, RATE)  # in blocks, so that a long clip fits in memory
        return Decoded(self.model.decompress(tokens)[0].float().cpu().numpy())


@dataclass(frozen=True)
class Original:
    """The clip itself: what each metric gives at best, and what those that judge a clip alone say of the originals."""

    name: str = "original"
    frame_rate: float | None = None
    about: str = ""

    def identity(self) -> list[Any]:
        """As in `Codec`."""
        return ["original"]

    def reconstruct(self, audio: Samples) -> Decoded:
        """As in `Codec`."""
        return Decoded(audio)


@dataclass(frozen=True)
class Opus:
    """Opus at a target rate, through libsndfile: variable rate, which keeps length and alignment.

    Attributes:
        kbits: target in kbit/s, 6 to 256; what the clip took is in `Decoded.bits`.
    """

    kbits: float
    frame_rate: float | None = 50.0

    def __post_init__(self) -> None:
        """Refuse rates that libsndfile does not offer."""
        low, high = OPUS_KBITS
        if not low <= self.kbits <= high:
            raise ConfigurationError(f"opus:{self.kbits:g} is out of range; give {low} to {high} kbit/s")

    @property
    def name(self) -> str:
        """As in `Codec`."""
        return f"Opus {self.kbits:g}"

    @property
    def about(self) -> str:
        """As in `Codec`."""
        return f"{self.name}: variable rate with a target of {self.kbits:g} kbit/s; the table has what the clips took."

    def identity(self) -> list[Any]:
        """As in `Codec`."""
        import soundfile

        return ["opus", self.kbits, soundfile.__libsndfile_version__]

    def reconstruct(self, audio: Samples) -> Decoded:
        """As in `Codec`; the bits are those of the audio packets, without the Ogg file around them.

        Raises:
            AudioFileError: this libsndfile has no Opus.
        """
        import soundfile

        low, high = OPUS_KBITS
        level = (high - self.kbits) / (high - low)
        file = io.BytesIO()
        try:
            soundfile.write(file, audio, RATE, format="OGG", subtype="OPUS", compression_level=level)
            file.seek(0)
            decoded, _ = soundfile.read(file, dtype="float32")
        except (soundfile.SoundFileError, ValueError) as error:
            raise AudioFileError(f"libsndfile cannot code this as Opus ({error}); a newer soundfile can") from error
        return Decoded(fit_length(decoded, audio.size), 8 * _opus_bytes(file.getvalue()))


def _opus_bytes(file: bytes) -> int:
    """Bytes of the audio packets of an Ogg Opus file: all page bodies (RFC 3533) less the two header packets.

    Each header packet has pages of its own (RFC 7845, section 3); of all others, every byte belongs to audio.
    """
    bodies: list[bytes] = []
    place = 0
    while place < len(file):
        segments = file[place + 26]
        start = place + 27 + segments
        length = sum(file[place + 27 : start])
        bodies.append(file[start : start + length])
        place = start + length
    tags = next(index for index, body in enumerate(bodies) if body.startswith(b"OpusTags"))
    return sum(map(len, bodies[tags + 1 :]))


@dataclass(frozen=True)
class GriffinLim:
    """The log-mel spectrogram of the acoustic encoder, inverted without a network: phases by Griffin and Lim's method.

    Attributes:
        iterations: of the fast variant (Perraudin et al. 2013) with momentum 0.99.
        seed: of the phases it starts from.
    """

    iterations: int = 32
    seed: int = 0
    name: str = "Griffin-Lim"
    frame_rate: float | None = 100.0

    @property
    def about(self) -> str:
        """As in `Codec`."""
        return (
            f"{self.name}: the acoustic encoder's 128-band log-mel (1024 samples every 160), to linear frequency by "
            f"non-negative least squares, {self.iterations} iterations, seed {self.seed}, by librosa."
        )

    def identity(self) -> list[Any]:
        """As in `Codec`."""
        return ["griffin-lim", self.iterations, self.seed, importlib.metadata.version("librosa")]

    def reconstruct(self, audio: Samples) -> Decoded:
        """As in `Codec`.

        Raises:
            MissingExtraError: librosa is not installed.
        """
        # Each frame but the first and last has a whole hop of samples on both sides; what lies beyond the clip is cut.
        return Decoded(griffin_lim(log_mel(audio), self.iterations, self.seed)[: audio.size])


def griffin_lim(mel: npt.NDArray[np.float32], iterations: int = 32, seed: int = 0) -> Samples:
    """Audio for a log-mel spectrogram of the acoustic encoder, without a network.

    Args:
        mel: (bands, frames) natural logarithm of magnitudes, as `log_mel` gives.
        iterations: of the fast variant of Griffin and Lim's method.
        seed: of the phases it starts from.

    Returns:
        (160·(frames - 1),) samples at 16 kHz.

    Raises:
        MissingExtraError: librosa is not installed.
    """
    librosa = require_extra("librosa", EXTRA)
    settings = {"sr": RATE, "n_fft": 1024, "power": 1.0, "htk": True, "norm": None, "fmin": 0.0, "fmax": RATE / 2}
    magnitude = librosa.feature.inverse.mel_to_stft(np.exp(mel), **settings)  # (513, frames)
    audio: Samples = librosa.griffinlim(magnitude, n_iter=iterations, hop_length=160, n_fft=1024, random_state=seed)
    return audio.astype(np.float32)


def log_mel(audio: Samples) -> npt.NDArray[np.float32]:
    """What the acoustic encoder sees of a clip: (samples,) → (128, frames), natural logarithm, floor ln 1e-7."""
    import torch

    from dasheng_tokenizer.injection import AcousticFrontEnd
    from dasheng_tokenizer.spectral import SAMPLES_PER_TOKEN, with_context

    tokens = audio.size // SAMPLES_PER_TOKEN + 2  # more than cover the clip, so that its end is no edge
    context = with_context(torch.from_numpy(audio)[None], tokens)
    frames: npt.NDArray[np.float32] = AcousticFrontEnd(128)(context, 4 * tokens)[0].numpy()
    return frames


def parse_floor(text: str) -> Codec:
    """`opus:12`, `griffin-lim` or `original`.

    Raises:
        ConfigurationError: anything else.
    """
    kind, _, rate = text.partition(":")
    if kind == "opus" and rate:
        try:
            return Opus(float(rate))
        except ValueError as error:
            if isinstance(error, ConfigurationError):
                raise
            raise ConfigurationError(f"--floor {text}: {rate!r} is no number of kbit/s, as in opus:12") from error
    if text in ("griffin-lim", "original"):
        return GriffinLim() if text == "griffin-lim" else Original()
    raise ConfigurationError(f"--floor {text} is unknown; known: {', '.join(FLOORS)}")
