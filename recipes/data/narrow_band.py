"""Copies of some training clips at lower sampling rates, as shards: what telephones and old recordings leave empty.

    python recipes/data/narrow_band.py '../shared/corpus/*-train-*.tar' -o runs/corpus [--every 5] [--rates 8000 11025]

A copy is FLAC at its own low rate; whoever reads it resamples it to 16 kHz and finds nothing above half of that rate.
Shards that are there are kept. Copies stay on the side of the clips they are made of, so give training clips alone.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import soundfile
import soxr
from shards import add_member
from tqdm import tqdm

from dasheng_tokenizer.errors import DashengTokenizerError
from dasheng_tokenizer.files import atomic_path, make_folder
from dasheng_tokenizer.spectral import SAMPLING_RATE
from dasheng_tokenizer.training.clips import Clip, SkipReport, decoded_clips, find_shards


def drawn(key: str) -> int:
    """A large whole number that hangs on the key alone."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:12], 16)


def narrow_copy(clip: Clip, rate: int) -> bytes:
    """The clip as a FLAC file of 16 bits at a lower rate."""
    audio = soxr.resample(clip.audio, SAMPLING_RATE, rate)
    audio /= max(1.0, float(np.abs(audio).max(initial=0.0)))  # a filter overshoots what was at full scale
    file = io.BytesIO()
    soundfile.write(file, audio, rate, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def main() -> None:
    """Write a shard beside each that is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", help="shards of training clips")
    parser.add_argument("--every", type=int, default=5, help="one clip in so many is copied")
    parser.add_argument("--rates", type=int, nargs="+", default=[8000, 11025], help="in Hz, one drawn for each copy")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    if options.every < 1 or not all(1000 <= rate < SAMPLING_RATE for rate in options.rates):
        parser.error(f"--every is at least 1, and every rate at least 1000 and below {SAMPLING_RATE}")
    try:
        shards = find_shards(options.data)
        make_folder(options.output)
    except DashengTokenizerError as error:
        parser.error(str(error))
    skipped = SkipReport()
    for shard in tqdm(shards, unit="shard"):
        target = options.output / f"narrow-{shard.path.name}"
        if target.exists():
            continue
        with atomic_path(target) as temporary, tarfile.open(temporary, "w") as tar:
            for clip in decoded_clips(shard, skipped):
                number = drawn(clip.key)
                if number % options.every == 0:
                    rate = options.rates[number // options.every % len(options.rates)]
                    add_member(tar, f"{clip.key}-{rate}.flac", narrow_copy(clip, rate))
                    fields = {"key": f"{clip.key}-{rate}", "domain": clip.domain}
                    add_member(tar, f"{clip.key}-{rate}.json", json.dumps(fields, ensure_ascii=False).encode())
    if len(skipped):
        print(skipped.summary())


if __name__ == "__main__":
    main()
