"""The generator that ships inside the package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from dasheng_tokenizer import load_audio
from dasheng_tokenizer.cli import main
from dasheng_tokenizer.evaluation.generation_judges import heard_note
from dasheng_tokenizer.generation import TextToAudioPipeline
from dasheng_tokenizer.generation.generator import embedded_generator

pytestmark = pytest.mark.usefixtures("one_thread")

FLUTE = "a flute playing a single note, C4"


@pytest.fixture(scope="module")
def pipeline() -> TextToAudioPipeline:
    return TextToAudioPipeline.from_pretrained(device="cpu")


def test_it_is_small_documented_and_float16_on_disk(pipeline: TextToAudioPipeline) -> None:
    folder = embedded_generator()
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 25 * 2**20
    card = (folder / "README.md").read_text()
    assert "{{" not in card and "Apache-2.0" in card
    provenance = pipeline.generator.info.provenance
    assert provenance["audio_hours_seen"] > 0 and provenance["hardware"] and str(provenance["steps"]) in card
    with safe_open(folder / "model.safetensors", "pt") as weights:
        kinds = {weights.get_slice(name).get_dtype() for name in weights.keys() if name.startswith("dit.")}
    assert kinds == {"F16"}


def test_it_belongs_to_the_embedded_default(pipeline: TextToAudioPipeline) -> None:
    assert pipeline.generator.info.tokenizer is None
    assert pipeline.generator.info.tokenizer_hash == pipeline.tokenizer.weights_hash()


def test_it_plays_the_note_that_it_is_asked_for(pipeline: TextToAudioPipeline) -> None:
    texts = [FLUTE] * 6 + ["a violin playing a single note, B4"] * 6
    clips = pipeline(texts, 1.5, steps=12, seed=list(range(12)), batch_size=12)
    notes = [heard_note(clip.audio) for clip in clips]
    # Chance is one in some fifty notes.
    for asked, found in ((60, notes[:6]), (71, notes[6:])):
        assert sum(note is not None and abs(note - asked) <= 0.5 for note in found) >= 3, notes


def test_a_drum_is_short_and_begins_at_once(pipeline: TextToAudioPipeline) -> None:
    clips = pipeline(["a single kick drum hit"] * 4, 1.0, steps=12, seed=[0, 1, 2, 3])
    energy = sum(np.square(clip.audio).reshape(10, -1).sum(axis=1) for clip in clips)  # (10,) of 0.1 s
    assert energy[:5].sum() > 4 * energy[5:].sum()


def test_the_command_needs_no_model(tmp_path: Path) -> None:
    target = tmp_path / "flute.wav"
    assert main(["generate", FLUTE, "-o", str(target), "--steps", "4", "--seconds", "0.77", "--device", "cpu"]) == 0
    audio, rate = load_audio(target)
    assert (audio.shape, rate) == ((1, 12_320), 16_000)
    assert np.isfinite(audio).all() and 0.001 < np.abs(audio).max() <= 1
