"""The list of the shipped corpus' clips, made from its manifest once: where in its source each clip begins.

    python recipes/data/clip_list.py CORPUS --work FOLDER [--mirror URL] -o recipes/data/corpus.jsonl.xz

The manifest names the source file of a clip but not where in it the clip begins, since silence was cut off. The place
is found by cross-correlation with the clip; of a MIDI piece by its list of notes.
"""

from __future__ import annotations

import argparse
import io
import json
import lzma
import tarfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
from archive import MIRROR, fetch, load_packages, unpack
from decoding import SAMPLING_RATE, Samples, decode
from instruments import midi_events
from tqdm import tqdm

from dasheng_tokenizer.files import atomic_path

MARGIN = 16_000
HERE = Path(__file__).resolve().parent


def place(whole: Samples, part: Samples) -> int:
    """Sample of `whole` at which `part` begins."""
    size = 1 << (len(whole) + len(part)).bit_length()
    spectrum = np.fft.rfft(whole, size) * np.conj(np.fft.rfft(part, size))
    lags = np.fft.irfft(spectrum, size)[: max(1, len(whole))]
    return int(np.argmax(lags))


def place_of_window(whole: Samples, part: Samples, start_s: float) -> int:
    """The same for a window of music, whose second counts from the first sound of the track."""
    begin = max(0, round(start_s * SAMPLING_RATE) - MARGIN)
    silence = int(np.argmax(np.abs(whole) > 0.01))
    return begin + place(whole[begin : begin + silence + len(part) + 2 * MARGIN], part)


def window_of_piece(midi: Path, notes: list[list[float]]) -> float:
    """Second of a MIDI file at which a window with these notes begins."""
    heard = [(event.second, event.values[1]) for event in midi_events(midi) if event.kind == "noteon"]
    onsets, pitches = np.array([h[0] for h in heard]), np.array([h[1] for h in heard])

    def matches(start: float) -> int:
        return sum(bool(np.any((np.abs(onsets - start - n[0]) < 0.003) & (pitches == n[2]))) for n in notes)

    starts = {round(second - notes[0][0], 4) for second, pitch in heard if pitch == notes[0][2]}
    return max(sorted(starts), key=matches)


def read_clip(shard: tarfile.TarFile, row: dict[str, Any]) -> Samples:
    """The shipped audio at 16 kHz."""
    member = shard.extractfile(f"{row['key']}.{row['format']}")
    assert member is not None
    audio, rate = soundfile.read(io.BytesIO(member.read()), dtype="float32")
    return soxr.resample(audio, rate, SAMPLING_RATE) if rate != SAMPLING_RATE else audio


def main() -> None:
    """Find the places and write the list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="folder with manifest.jsonl and its shards")
    parser.add_argument("--work", type=Path, required=True, help="folder for downloads and unpacked packages")
    parser.add_argument("--mirror", default=MIRROR)
    parser.add_argument("-o", "--output", type=Path, default=HERE / "corpus.jsonl.xz")
    arguments = parser.parse_args()

    packages = load_packages(HERE / "packages.yaml")
    rows = [json.loads(line) for line in (arguments.corpus / "manifest.jsonl").read_text().splitlines()]
    sources: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        sources[row.get("also_from", row["source_package"]), row["source_path"]].append(row)
    shards = {row["shard"]: tarfile.open(arguments.corpus / row["shard"]) for row in rows}
    for (name, path), clips in tqdm(sorted(sources.items()), unit="file"):
        package = packages[name]
        folder = unpack(package, fetch(package, arguments.mirror, arguments.work / "debs"), arguments.work / "unpacked")
        if clips[0]["domain"] != "instrument":
            whole = decode(folder / path)
            for row in clips:
                part = read_clip(shards[row["shard"]], row)
                found = place_of_window(whole, part, row["start_s"]) if "start_s" in row else place(whole, part)
                row["first_sample"] = found
        elif path.startswith("midi:"):
            for row in clips:
                row["window_s"] = window_of_piece(next(folder.rglob(path.removeprefix("midi:"))), row["notes"])
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with atomic_path(arguments.output) as temporary:
        temporary.write_bytes(lzma.compress(lines.encode(), preset=9 | lzma.PRESET_EXTREME))


if __name__ == "__main__":
    main()
