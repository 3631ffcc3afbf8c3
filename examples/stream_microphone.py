"""A source like a microphone: 20 ms of a file every 20 ms, tokens and reconstruction as soon as they are determined.

    python examples/stream_microphone.py speech.wav heard.wav --window 1.0

With a real microphone, `blocks` is what a callback of your audio library puts into a queue.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np

from dasheng_tokenizer import DashengTokenizerModel, load_audio, save_audio
from dasheng_tokenizer.streaming import streaming_latency

BLOCK_SECONDS = 0.02


def blocks(audio: np.ndarray, rate: int, fast: bool) -> Iterator[np.ndarray]:
    """(channels, samples) in pieces of 20 ms, each when a microphone would have it."""
    size, start = round(BLOCK_SECONDS * rate), time.perf_counter()
    for first in range(0, audio.shape[1], size):
        due = start + (first + size) / rate
        if not fast:
            time.sleep(max(0.0, due - time.perf_counter()))
        yield audio[:, first : first + size]


def main() -> None:
    """Stream one file and write what a listener hears."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="audio file")
    parser.add_argument("target", type=Path, help="where the reconstruction goes")
    parser.add_argument("--window", type=float, default=1.0, metavar="S", help="encoder window (default: 1 s)")
    parser.add_argument("--fast", action="store_true", help="do not wait for the clock")
    arguments = parser.parse_args()
    audio, rate = load_audio(arguments.source)
    model = DashengTokenizerModel.from_pretrained().eval()
    model.set_encoder_window(arguments.window)
    heard, tokens, busy = [], 0, 0.0
    with model.streaming(rate, num_channels=len(audio)) as stream:
        for block in chain(blocks(audio, rate, arguments.fast), [None]):  # None: the microphone was switched off
            began = time.perf_counter()
            latents, sound = stream.finish() if block is None else stream.push(block)
            busy += time.perf_counter() - began
            tokens += latents.shape[1]
            heard.append(sound.numpy())
    save_audio(arguments.target, np.concatenate(heard, axis=1), rate)
    seconds = audio.shape[1] / rate
    summary = {"seconds": seconds, "tokens": tokens, "latency_s": streaming_latency(model)[1], "load": busy / seconds}
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
