"""How speech is spoilt for training: kinds of noise, rooms and damage, with their probabilities and ranges."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from dasheng_tokenizer.enhancement.degradations import CODECS, check_codec
from dasheng_tokenizer.enhancement.rooms import RoomConfig
from dasheng_tokenizer.errors import ConfigurationError
from dasheng_tokenizer.spectral import SAMPLING_RATE

Kind = Literal["noise", "music", "babble", "colored", "none"]

KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class MixtureConfig:
    """How speech is spoilt. Probabilities are of a mixture; ranges are drawn from uniformly.

    Attributes:
        snr_db: range of the signal-to-noise ratio, see `mix`.
        kinds: how often each kind of noise is drawn, in proportion: `noise` and `music` of those sources, `babble` of
            several other speakers, `colored` noise that is computed, and `none`.
        babble_voices: fewest and most voices of babble.
        no_speech: probability that the speaker is silent: noise alone, and silence as the target.
        reverberation: probability of a room around the speaker.
        rooms: which rooms are simulated.
        band_limit: probability of a missing upper band.
        band_hertz: range of its edge.
        telephone: probability of a telephone's band, 300 to 3400 Hz, in place of that.
        clipping: probability of clipping.
        clipping_db: range of what is cut off, dB below the peak.
        codec: probability of a lossy codec.
        codecs: the codecs to draw from.
        gain_db: range of the change of loudness; less is used where the mixture or the speech would clip.
        pause_seconds: range of the pauses between the clips that a longer line of speech is made of.
    """

    snr_db: tuple[float, float] = (-5.0, 20.0)
    kinds: dict[str, float] = field(
        default_factory=lambda: {"noise": 4.0, "music": 1.0, "babble": 2.0, "colored": 2.0, "none": 1.0}
    )
    babble_voices: tuple[int, int] = (3, 6)
    no_speech: float = 0.03
    reverberation: float = 0.3
    rooms: RoomConfig = field(default_factory=RoomConfig)
    band_limit: float = 0.05
    band_hertz: tuple[float, float] = (2000.0, 7000.0)
    telephone: float = 0.05
    clipping: float = 0.05
    clipping_db: tuple[float, float] = (3.0, 12.0)
    codec: float = 0.05
    codecs: list[str] = field(default_factory=lambda: list(CODECS))
    gain_db: tuple[float, float] = (-12.0, 6.0)
    pause_seconds: tuple[float, float] = (0.1, 0.5)

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        for name in ("no_speech", "reverberation", "band_limit", "telephone", "clipping", "codec"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigurationError(f"mixture.{name} is a probability, not {getattr(self, name)}")
        for name in ("snr_db", "babble_voices", "band_hertz", "clipping_db", "gain_db", "pause_seconds"):
            low, high = getattr(self, name)
            if not (low <= high and math.isfinite(low) and math.isfinite(high)):
                raise ConfigurationError(f"mixture.{name} is (lowest, highest), not {(low, high)}")
        if unknown := sorted(set(self.kinds) - set(KINDS)):
            raise ConfigurationError(f"mixture.kinds are {', '.join(KINDS)}, not {unknown[0]!r}")
        if min(self.kinds.values(), default=0) < 0 or not sum(self.kinds.values()) > 0:
            raise ConfigurationError(f"mixture.kinds must not be negative and not all 0: {self.kinds}")
        if self.band_limit + self.telephone > 1:
            raise ConfigurationError("mixture.band_limit and mixture.telephone exclude each other: at most 1 together")
        if not 0 < self.band_hertz[0] <= self.band_hertz[1] <= SAMPLING_RATE / 2:
            raise ConfigurationError(f"mixture.band_hertz must lie above 0 and up to 8000, not {self.band_hertz}")
        if self.babble_voices[0] < 1 or self.clipping_db[0] < 0 or self.pause_seconds[0] < 0:
            raise ConfigurationError("mixture.babble_voices start at 1, clipping_db and pause_seconds at 0")
        if self.codec > 0:
            if not self.codecs:
                raise ConfigurationError("mixture.codecs is empty; name some, or set mixture.codec to 0")
            for codec in self.codecs:
                check_codec(codec)

    def uses(self, kind: Kind) -> bool:
        """Whether this kind of noise is ever drawn."""
        return self.kinds.get(kind, 0.0) > 0
