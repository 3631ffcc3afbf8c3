"""A pipeline of transformers for `feature-extraction` from audio.

The pipeline of that name in transformers reads texts. Name ours beside the task:

    from transformers import pipeline
    from dasheng_tokenizer import AudioFeatureExtractionPipeline

    extract = pipeline("feature-extraction", model=folder, pipeline_class=AudioFeatureExtractionPipeline)
    extract("speech.wav", return_tensors=True)  # (T, D)
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from transformers import BatchFeature, Pipeline

from dasheng_tokenizer.audio import load_audio, to_audio_array
from dasheng_tokenizer.errors import AudioError
from dasheng_tokenizer.spectral import SAMPLING_RATE

if TYPE_CHECKING:
    from dasheng_tokenizer.tokenizer import DashengTokenizerOutput


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
