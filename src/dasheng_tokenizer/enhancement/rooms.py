"""Room responses: simulated by the image source method, or recorded ones, and speech in such a room.

A response is (L,) float32 at 16 kHz. Its direct sound lies at sample `BEFORE` and its early part has an energy of 1, so
that speech in the room stays where it was and about as loud as it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from dasheng_tokenizer.errors import ConfigurationError, DataError
from dasheng_tokenizer.files import atomic_path, require_extra
from dasheng_tokenizer.spectral import SAMPLING_RATE

Samples = npt.NDArray[np.float32]

BEFORE = 40
"""Samples kept before the direct sound, 2.5 ms: the fractional delay filters of the simulation ring that long."""

EARLY_SECONDS = 0.05
"""Reflections so soon after the direct sound help to understand speech (ISO 3382-1, clarity C50)."""

FADE_SECONDS = 0.005
"""Over which the early part fades out, so that it does not end in a click."""

MAX_ORDER = 48
"""Reflections of an image source. The time of a simulation grows with their cube; further ones would change the tail
of large reverberation times only, below about -30 dB."""

MOST_TRIES = 100

BANK_VERSION = 1


@dataclass(frozen=True)
class RoomConfig:
    """What rooms are simulated.

    Attributes:
        count: responses in the bank.
        rt60_seconds: range of the reverberation time.
        width_metres, height_metres: ranges of both floor sides, and of the height.
        distance_metres: range of the distance of speaker and microphone.
    """

    count: int = 200
    rt60_seconds: tuple[float, float] = (0.15, 0.6)
    width_metres: tuple[float, float] = (3.0, 8.0)
    height_metres: tuple[float, float] = (2.4, 3.5)
    distance_metres: tuple[float, float] = (0.3, 2.5)

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.count < 1:
            raise ConfigurationError(f"rooms.count must be at least 1, not {self.count}")
        for name in ("rt60_seconds", "width_metres", "height_metres", "distance_metres"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ConfigurationError(f"rooms.{name} is (lowest, highest), both above 0, not {(low, high)}")
        if self.height_metres[0] < 1.5 or self.width_metres[0] < 2:
            raise ConfigurationError("rooms must be at least 2 m wide and 1.5 m high, for a speaker and a microphone")


def simulate_room(config: RoomConfig, seed: int, index: int) -> Samples:
    """The response of one random shoebox room, a function of its arguments alone.

    Raises:
        ConfigurationError: no room of these sizes has so short a reverberation.
        MissingExtraError: pyroomacoustics is not installed.
    """
    acoustics = require_extra("pyroomacoustics", "enhance")
    rng = np.random.default_rng([seed, index])
    for _ in range(MOST_TRIES):
        size = np.array([*rng.uniform(*config.width_metres, 2), rng.uniform(*config.height_metres)])
        rt60 = rng.uniform(*config.rt60_seconds)
        try:
            absorption, order = acoustics.inverse_sabine(rt60, size)
        except ValueError:  # so short a time in so large a room: walls would have to absorb more than all
            continue
        break
    else:
        raise ConfigurationError(f"rooms.rt60_seconds {config.rt60_seconds} is too short for rooms of this size")
    microphone, speaker = _places(rng, size, config.distance_metres)
    room = acoustics.ShoeBox(
        size, fs=SAMPLING_RATE, materials=acoustics.Material(absorption), max_order=min(order, MAX_ORDER)
    )
    room.add_source(speaker)
    room.add_microphone(microphone)
    room.compute_rir()
    response = np.asarray(room.rir[0][0], dtype=np.float32)
    delay = np.linalg.norm(speaker - microphone) / room.c * SAMPLING_RATE
    direct = round(delay) + acoustics.constants.get("frac_delay_length") // 2
    return aligned(response[: direct + int(1.2 * rt60 * SAMPLING_RATE)], direct)


def aligned(response: Samples, direct: int | None = None) -> Samples:
    """A response with its direct sound brought to sample `BEFORE` and its early part to an energy of 1.

    Args:
        response: (L,) as simulated or recorded.
        direct: sample of the direct sound; None: the loudest one.

    Raises:
        DataError: a silent response.
    """
    if not np.abs(response).max(initial=0.0) > 0:
        raise DataError("a room response is silent; take it out of the data")
    direct = int(np.abs(response).argmax()) if direct is None else direct
    placed = np.pad(response, (BEFORE, 0))[direct:].astype(np.float32)
    return placed / np.float32(np.sqrt(np.square(_early(placed)).sum()))


def reverberate(audio: Samples, response: Samples) -> tuple[Samples, Samples]:
    """Speech in a room, and what of it should be kept.

    Args:
        audio: (S,) dry.
        response: (L,) of `aligned`.

    Returns:
        (S,) with all reflections, and (S,) with the direct sound and those of the first 50 ms; both in time with the
        dry audio.
    """
    size = 1 << (len(audio) + len(response) - 1).bit_length()
    spectrum = np.fft.rfft(audio, size)
    wet, early = (
        np.fft.irfft(spectrum * np.fft.rfft(part, size), size)[BEFORE : BEFORE + len(audio)].astype(np.float32)
        for part in (response, _early(response))
    )
    return wet, early


class RoomBank:
    """Simulated responses, made once and kept in a file."""

    def __init__(self, responses: Sequence[Samples]) -> None:
        """Args: responses of `aligned`."""
        self._responses = responses

    def __len__(self) -> int:
        return len(self._responses)

    def __getitem__(self, index: int) -> Samples:
        """One response."""
        return self._responses[index]


def prepare_rooms(config: RoomConfig, seed: int, folder: str | Path, progress: bool = True) -> RoomBank:
    """Simulate a bank of rooms, or read it where that was done before.

    Args:
        config: which rooms.
        seed: of the bank.
        folder: where the bank is kept, in a file named by the hash of config and seed; whole or absent.
        progress: show a bar where there is a terminal.

    Raises:
        DataError: a damaged file.
        OutputError: the file cannot be written.
        MissingExtraError: pyroomacoustics is not installed.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file, save_file

    wanted = {"version": BANK_VERSION, "seed": seed, "order": MAX_ORDER, **asdict(config)}
    name = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]
    path = Path(folder) / f"rooms-{name}.safetensors"
    if not path.exists():
        shown = None if progress else True  # None: only on a terminal
        made = [
            simulate_room(config, seed, index)
            for index in tqdm(range(config.count), desc="simulating rooms", unit=" rooms", disable=shown)
        ]
        with atomic_path(path) as temporary:
            save_file({f"{index:06}": response for index, response in enumerate(made)}, temporary)
    try:
        held = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} is damaged ({error}); delete it, it is made again") from error
    return RoomBank([held[key] for key in sorted(held)])


def _places(
    rng: np.random.Generator, size: npt.NDArray[np.float64], distances: tuple[float, float]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Microphone and speaker at least half a metre from every wall, at a distance in the range or the nearest to it."""
    margin = 0.5
    best: tuple[float, npt.NDArray[np.float64], npt.NDArray[np.float64]] | None = None
    wanted = rng.uniform(*distances)
    for _ in range(64):
        microphone, speaker = (rng.uniform(margin, size - margin) for _ in range(2))
        error = abs(float(np.linalg.norm(speaker - microphone)) - wanted)
        if best is None or error < best[0]:
            best = error, microphone, speaker
    assert best is not None
    return best[1], best[2]


def _early(response: Samples) -> Samples:
    """Direct sound and early reflections of an aligned response, faded out; of the same length."""
    keep, fade = BEFORE + int(EARLY_SECONDS * SAMPLING_RATE), int(FADE_SECONDS * SAMPLING_RATE)
    window = np.clip((keep + fade - np.arange(len(response))) / fade, 0.0, 1.0)
    return (response * window).astype(np.float32)
