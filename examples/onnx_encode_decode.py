"""Encode and decode a file with onnxruntime and numpy alone; soundfile reads and writes.

dasheng-tokenizer export --format onnx -o exported
python examples/onnx_encode_decode.py exported speech.flac decoded.wav
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import soundfile


def main(folder: Path, source: str, target: str) -> None:
    """Audio → latents → audio; every channel is a clip of the batch."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    encoder, decoder = (
        onnxruntime.InferenceSession(folder / config[part]["file"], providers=["CPUExecutionProvider"])
        for part in ("encoder", "decoder")
    )
    audio, rate = soundfile.read(source, dtype="float32", always_2d=True)  # (samples, channels)
    if rate != config["sampling_rate"]:
        sys.exit(f"{source} is at {rate} Hz; resample it to {config['sampling_rate']} Hz")
    clips = np.ascontiguousarray(audio.T)  # (B, S)
    num_samples = np.full(len(clips), clips.shape[1], dtype=np.int64)
    unified, _, num_tokens = encoder.run(None, {"audio": clips, "num_samples": num_samples})
    (decoded,) = decoder.run(None, {"latents": unified, "num_tokens": num_tokens})  # (B, 640·T)
    soundfile.write(target, decoded[:, : clips.shape[1]].T, rate)
    print(f"{source}: {unified.shape[1]} tokens of {unified.shape[2]} for each of {len(clips)} channels → {target}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
