"""The package in the words of transformers: a feature extractor that makes a batch of clips."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import AutoFeatureExtractor, BatchFeature, SequenceFeatureExtractor

from dasheng_tokenizer.audio import Array, check_rate, resample, to_audio_array
from dasheng_tokenizer.configuration import DashengTokenizerConfig
from dasheng_tokenizer.errors import AudioError, CheckpointError
from dasheng_tokenizer.spectral import SAMPLING_RATE


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

    @classmethod
    def get_feature_extractor_dict(cls, *args: Any, **kwargs: Any) -> Any:
        """Part of `from_pretrained`: reads preprocessor_config.json.

        Raises:
            CheckpointError: it is nested too deep.
        """
        try:
            return super().get_feature_extractor_dict(*args, **kwargs)
        except RecursionError as error:
            raise CheckpointError("preprocessor_config.json is nested too deep; download or copy it again") from error

    @classmethod
    def from_dict(cls, feature_extractor_dict: Any, **kwargs: Any) -> Any:
        """Part of `from_pretrained`: from the entries of preprocessor_config.json.

        Raises:
            CheckpointError: they are none.
        """
        try:
            return super().from_dict(feature_extractor_dict, **kwargs)
        except Exception as error:  # of any kind where the file holds what transformers does not expect
            raise CheckpointError(
                f"preprocessor_config.json makes no feature extractor ({error}); download or copy it again"
            ) from error

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


AutoFeatureExtractor.register(DashengTokenizerConfig, DashengTokenizerFeatureExtractor, exist_ok=True)
