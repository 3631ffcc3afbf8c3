"""Notes rendered with a sound font by FluidSynth: single notes, MIDI pieces, and lists of notes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import soxr
from decoding import SAMPLING_RATE, Samples

from dasheng_tokenizer.errors import DataError, MissingExtraError
from dasheng_tokenizer.files import require_extra

RATE = 44_100
GAIN = 0.9  # with it, levels are those of the shipped notes
VELOCITY = 85  # brings generated pieces to the level of the shipped ones
SOUND_FONT = "usr/share/sounds/sf2/FluidR3_GM.sf2"
DRUM_CHANNEL = 9


@dataclass(frozen=True, order=True)
class Event:
    """Something that a channel is told at `second`: `values` are arguments of the synthesizer's method `kind`."""

    second: float
    order: int
    kind: str
    values: tuple[int, ...]


class SoundFontPlayer:
    """Renders events dry: no reverb, no chorus."""

    def __init__(self, sound_font: Path) -> None:
        self._library = _fluidsynth()
        self._synth = self._library.Synth(gain=GAIN, samplerate=float(RATE))
        self._synth.setting("synth.reverb.active", 0)
        self._synth.setting("synth.chorus.active", 0)
        self._font = self._synth.sfload(str(sound_font))
        if self._font == -1:
            raise DataError(f"{sound_font} cannot be loaded as a sound font")

    def __enter__(self) -> SoundFontPlayer:
        return self

    def __exit__(self, *_: object) -> None:
        self._synth.delete()

    def render(self, events: Iterable[Event], seconds: float) -> Samples:
        """Play events from silence. Returns (samples,) at 16 kHz, mono."""
        self._synth.system_reset()
        for channel in range(16):
            bank = 128 if channel == DRUM_CHANNEL else 0
            self._synth.program_select(channel, self._font, bank, 0)
        blocks, done = [], 0
        for event in sorted(events):
            due = round(event.second * RATE)
            if due > round(seconds * RATE):
                break
            if due > done:
                blocks.append(self._synth.get_samples(due - done))
                done = due
            getattr(self._synth, event.kind)(*event.values)
        if done < round(seconds * RATE):
            blocks.append(self._synth.get_samples(round(seconds * RATE) - done))
        stereo = np.concatenate(blocks).reshape(-1, 2).astype(np.float32) / 32768
        return soxr.resample(stereo.mean(axis=1), RATE, SAMPLING_RATE, quality="VHQ")

    def note(self, labels: dict[str, Any], seconds: float) -> Samples:
        """One note as its labels describe it (program, pitch, velocity, onset_s, note_off_s)."""
        pitch = labels["pitch"]
        return self.render(
            [
                Event(0.0, 0, "program_change", (0, labels["program"])),
                Event(labels["onset_s"], 1, "noteon", (0, pitch, labels["velocity"])),
                Event(labels["note_off_s"], 0, "noteoff", (0, pitch)),
            ],
            seconds,
        )

    def notes(self, notes: Sequence[Sequence[float]], programs: Sequence[int], seconds: float) -> Samples:
        """A list of [onset_s, offset_s, pitch].

        The list does not tell which program plays a note, nor how loud. Of two programs the second, a bass or an
        accompaniment, takes the lower half of the notes; their velocity is `VELOCITY`.
        """
        middle = float(np.median([note[2] for note in notes])) if len(programs) > 1 else float("inf")
        events = [Event(0.0, 0, "program_change", (channel, program)) for channel, program in enumerate(programs[:2])]
        for onset, offset, pitch in notes:
            channel = int(len(programs) > 1 and pitch < middle)
            events.append(Event(onset, 2, "noteon", (channel, int(pitch), VELOCITY)))
            events.append(Event(offset, 1, "noteoff", (channel, int(pitch))))
        return self.render(events, seconds)

    def piece(self, midi: Path, start: float, seconds: float) -> Samples:
        """A window of a MIDI file without its drum channel: the notes that begin in it, with the programs of then."""
        events = []
        for event in midi_events(midi):
            second = event.second - start
            if event.kind == "program_change" or second >= -1e-3:
                events.append(replace(event, second=max(0.0, second)))
        return self.render(events, seconds)


def midi_events(path: Path) -> list[Event]:
    """Notes and programs of a MIDI file but those of the drum channel; controllers and bends are left out.

    Raises:
        DataError: not a MIDI file.
    """
    mido = require_extra("mido", "data")
    try:
        messages = list(mido.MidiFile(str(path)))  # merged tracks; times are seconds since the message before
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path} cannot be read as MIDI: {error}") from error
    events, second = [], 0.0
    for order, message in enumerate(messages):
        second += message.time
        if message.type not in ("note_on", "note_off", "program_change") or message.channel == DRUM_CHANNEL:
            continue
        channel = message.channel
        if message.type == "program_change":
            events.append(Event(second, order, "program_change", (channel, message.program)))
        elif message.type == "note_on" and message.velocity:
            events.append(Event(second, order, "noteon", (channel, message.note, message.velocity)))
        else:
            events.append(Event(second, order, "noteoff", (channel, message.note)))
    return events


def _fluidsynth() -> Any:
    try:
        return require_extra("fluidsynth", "data")
    except MissingExtraError as error:
        if "library" in str(error):
            raise MissingExtraError(
                f"{error}; pyfluidsynth also needs the library itself: apt-get install libfluidsynth3, or brew install "
                "fluid-synth"
            ) from error
        raise
