"""The package in the words of transformers: a feature extractor, and a pipeline for `feature-extraction` from audio.

The pipeline of that name in transformers reads texts. Name ours beside the task:

    from transformers import pipeline
    from dasheng_tokenizer.feature_extraction import AudioFeatureExtractionPipeline

    extract = pipeline("feature-extraction", model=folder, pipeline_class=AudioFeatureExtractionPipeline)
    extract("speech.wav", return_tensors=True)  # (T, D)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import BatchFeature, Pipeline, SequenceFeatureExtractor

from dasheng_tokenizer.audio import Array, check_rate, load_audio, resample, to_audio_array
from dasheng_tokenizer.errors import AudioError
from dasheng_tokenizer.spectral import SAMPLING_RATE

if TYPE_CHECKING:
    from dasheng_tokenizer.tokenizer import DashengTokenizerOutput


class DashengTokenizerFeatureExtractor(SequenceFeatureExtractor):  # type: ignore[misc]
    """Clips of any rate and length → a padded batch for `DashengTokenizerModel`.

        batch = AutoFeatureExtractor.from_pretrained(folder)(clips, sampling_rate=44_100, return_tensors="pt")
        output = model(**batch)

    Args:
        sampling_rate: of the model, 16 kHz.
        feature_size: channels, 1.
        padding_value: 0, silence.
    """

    model_input_names = ["audio", "padding_mask"]

    def __init__(
        self, feature_size: int = 1, sampling_rate: int = SAMPLING_RATE, padding_value: float = 0.0, **kwargs: Any
    ) -> None:
        super().__init__(feature_size=feature_size, sampling_rate=sampling_rate, padding_value=padding_value, **kwargs)

    def __call__(
        self,
        raw_audio: npt.ArrayLike | Tensor | Sequence[npt.ArrayLike | Tensor],
        sampling_rate: int | None = None,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Resample and pad.

        Args:
            raw_audio: (samples,), or a list of such; (batch, samples) is a batch. Each clip has one channel.
            sampling_rate: of all clips in Hz, 8000 to 192000; None: they are at 16 kHz.
            return_tensors: "pt" or "np"; None: arrays of NumPy.

        Returns:
            `audio` (B, S) float32 at 16 kHz, zeros after the end of each clip, and `padding_mask` (B, S) bool, true for
            real samples.

        Raises:
            AudioError: an empty clip, NaN or infinity, more than one channel, or a rate out of range.
        """
        rate = check_rate(self.sampling_rate if sampling_rate is None else sampling_rate)
        clips = [resample(_one_channel(clip), rate, self.sampling_rate) for clip in _clips(raw_audio)]
        longest = max(map(len, clips))
        mask = np.arange(longest) < np.array([[len(clip)] for clip in clips])  # (B, S)
        audio = np.full(mask.shape, self.padding_value, dtype=np.float32)
        for row, clip in zip(audio, clips, strict=True):
            row[: len(clip)] = clip
        return BatchFeature({"audio": audio, "padding_mask": mask}, tensor_type=return_tensors)


class AudioFeatureExtractionPipeline(Pipeline):  # type: ignore[misc]
    """Audio → the unified embedding, (T, D) for each clip, 25 vectors a second.

    Takes what `pipeline(…)` of transformers takes for audio: a file, an array at 16 kHz, or a mapping with `array` (or
    `raw`) and `sampling_rate`; or a list of them. Several channels are mixed down to one. With `return_tensors=True`
    tensors come back, else lists of numbers. `part` names another embedding: "semantic" or "acoustic".

    Raises:
        AudioFileError: a file that cannot be read; AudioError: samples that cannot be used.
    """

    # The base class has None in these places, and methods that take anything.
    _load_processor: Any = False
    _load_image_processor: Any = False
    _load_feature_extractor: Any = True
    _load_tokenizer: Any = False

    def _sanitize_parameters(  # type: ignore[override]
        self, return_tensors: bool = False, part: str = "unified"
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if part not in ("unified", "semantic", "acoustic"):
            raise AudioError(f"part {part!r} is none of unified, semantic, acoustic")
        return {}, {}, {"return_tensors": return_tensors, "part": part}

    def preprocess(self, clip: Any) -> BatchFeature:  # type: ignore[override]
        """A file, array or mapping → a batch of one."""
        if isinstance(clip, (str, os.PathLike)):
            audio, rate = load_audio(clip)
        elif isinstance(clip, dict):
            held = clip.get("array", clip.get("raw"))
            if held is None or "sampling_rate" not in clip:
                raise AudioError(f"a mapping with {sorted(clip)} was given; it needs `array` and `sampling_rate`")
            audio, rate = to_audio_array(held), clip["sampling_rate"]
        else:
            audio, rate = to_audio_array(clip), SAMPLING_RATE
        extractor: Any = self.feature_extractor
        return extractor(audio.mean(axis=0), sampling_rate=rate, return_tensors="pt")

    def _forward(self, model_inputs: BatchFeature) -> DashengTokenizerOutput:  # type: ignore[override]
        output: DashengTokenizerOutput = self.model(**model_inputs)
        return output

    def postprocess(  # type: ignore[override]
        self, model_outputs: DashengTokenizerOutput, return_tensors: bool, part: str
    ) -> Any:
        """(T, D) of the batch of one."""
        embedding = model_outputs[part]
        if embedding is None:
            raise AudioError(f"this model is a VAE, which has no {part} part")
        return embedding[0] if return_tensors else embedding[0].tolist()


def _clips(raw_audio: Any) -> list[Any]:
    """The clips of a batch; one alone is a batch of one."""
    if isinstance(raw_audio, (np.ndarray, torch.Tensor)):
        return list(raw_audio) if raw_audio.ndim == 2 else [raw_audio]
    clips = list(raw_audio)
    if not clips:
        raise AudioError("no clips were given; give at least one")
    return [clips] if np.isscalar(clips[0]) else clips


def _one_channel(clip: Any) -> Array:
    audio = to_audio_array(clip)
    if audio.shape[0] != 1:
        raise AudioError(f"a clip has {audio.shape[0]} channels; give one channel a clip, such as the mean")
    return audio[0]
