"""A saved folder in the hands of transformers: Auto classes, feature extractor, pipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, pipeline

from dasheng_tokenizer import (
    AudioFeatureExtractionPipeline,
    DashengTokenizerFeatureExtractor,
    DashengTokenizerModel,
    load_audio,
)
from dasheng_tokenizer.checkpoints import embedded_default
from dasheng_tokenizer.errors import AudioError, AudioFileError

pytestmark = pytest.mark.usefixtures("one_thread")

SPEECH = embedded_default().parent / "clips" / "speech.flac"


@pytest.fixture(scope="module")
def folder(tokenizer_folder: Path) -> str:
    return str(tokenizer_folder)


@pytest.mark.parametrize("place", ["saved", "embedded"])
def test_auto_classes_load_a_folder(place: str, folder: str) -> None:
    name = folder if place == "saved" else str(embedded_default())
    assert type(AutoModel.from_pretrained(name)) is DashengTokenizerModel
    assert type(AutoFeatureExtractor.from_pretrained(name)) is DashengTokenizerFeatureExtractor
    assert AutoConfig.from_pretrained(name).model_type == "dashengtokenizer"


def test_clips_of_any_length_and_rate_become_a_batch(folder: str) -> None:
    extract = AutoFeatureExtractor.from_pretrained(folder)
    clips = [0.1 * np.random.default_rng(length).standard_normal(length) for length in (44_100, 22_051)]
    batch = extract(clips, sampling_rate=44_100, return_tensors="pt")
    assert set(batch) == {"audio", "padding_mask"} == set(extract.model_input_names)
    assert batch["audio"].shape == (2, 16_000) and batch["audio"].dtype == torch.float32
    assert batch["padding_mask"].sum(dim=1).tolist() == [16_000, 8_001]  # ceil(22051 · 16 / 44.1)
    assert not batch["audio"][1, 8_001:].any()
    model = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        together, alone = model(**batch), model(**extract(clips[1], sampling_rate=44_100, return_tensors="pt"))
    torch.testing.assert_close(together.unified[1, : alone.unified.shape[1]], alone.unified[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "raw",
    [
        np.zeros(640),
        np.zeros((1, 640)),
        torch.zeros(640),
        torch.zeros(1, 640),
        [0.0] * 640,
        [np.zeros(640)],
        [torch.zeros(1, 640)],
        [[0.0] * 640],
        np.zeros(640, dtype=np.int16),
    ],
)
def test_every_usual_form_of_a_clip(raw: object) -> None:
    batch = DashengTokenizerFeatureExtractor()(raw)
    assert batch["audio"].shape == (1, 640) and isinstance(batch["audio"], np.ndarray)
    assert batch["padding_mask"].all()


@pytest.mark.parametrize(
    ("raw", "rate", "says"),
    [
        ([], 16_000, "no clips"),
        ([np.zeros((2, 640))], 16_000, "2 channels"),
        (np.zeros(0), 16_000, "no samples"),
        (np.full(640, np.nan), 16_000, "NaN"),
        (np.zeros(640), 1_000, "1000 Hz"),
    ],
)
def test_bad_clips_are_named(raw: object, rate: int, says: str) -> None:
    with pytest.raises(AudioError, match=says):
        DashengTokenizerFeatureExtractor()(raw, sampling_rate=rate)


def test_the_pipeline_gives_the_embedding(folder: str) -> None:
    extract = pipeline("feature-extraction", model=folder, pipeline_class=AudioFeatureExtractionPipeline)
    audio, rate = load_audio(SPEECH)
    expected = DashengTokenizerModel.from_pretrained(folder).eval().compress(audio, rate).latents[0]
    from_file = extract(str(SPEECH), return_tensors=True)
    torch.testing.assert_close(from_file, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(extract(audio[0], return_tensors=True), from_file)
    torch.testing.assert_close(extract({"array": audio, "sampling_rate": rate}, return_tensors=True), from_file)
    stereo = extract({"raw": np.concatenate([audio, audio]), "sampling_rate": rate}, return_tensors=True)
    torch.testing.assert_close(stereo, from_file)
    both = extract([audio[0, :6_400], audio[0, :12_800]], part="acoustic")
    assert [len(clip) for clip in both] == [10, 20] and isinstance(both[0][0][0], float)


def test_the_pipeline_names_what_is_wrong(folder: str, tmp_path: Path) -> None:
    extract = pipeline("feature-extraction", model=folder, pipeline_class=AudioFeatureExtractionPipeline)
    with pytest.raises(AudioError, match="part 'tone'"):
        extract(np.zeros(640), part="tone")
    with pytest.raises(AudioError, match="needs `array` and `sampling_rate`"):
        extract({"array": np.zeros(640)})
    with pytest.raises(AudioFileError, match="absent.wav"):
        extract(str(tmp_path / "absent.wav"))
