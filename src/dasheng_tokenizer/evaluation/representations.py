"""What is probed: the embeddings of a tokenizer, of another frozen encoder, or a log-mel spectrogram.

An embedder turns a batch of clips into one or several representations, each (T, D) a clip. Those that share their
arithmetic, as the three of a tokenizer do, come from one pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dasheng_tokenizer.checkpoints import new_tokenizer, read_weights
from dasheng_tokenizer.configuration import SEMANTIC_KINDS
from dasheng_tokenizer.errors import CheckpointError, ConfigurationError
from dasheng_tokenizer.injection import AcousticFrontEnd
from dasheng_tokenizer.semantic_encoder import FRAMES_PER_TOKEN
from dasheng_tokenizer.spectral import SAMPLES_PER_TOKEN, SAMPLING_RATE, with_context
from dasheng_tokenizer.tokenizer import DashengTokenizerModel
from dasheng_tokenizer.training.semantic_cache import semantic_hash

Samples = npt.NDArray[np.float32]

TOKENIZER_REPRESENTATIONS = ("unified", "semantic", "acoustic")


class Embedder(Protocol):
    """Frozen.

    Attributes:
        names: of the representations it gives.
        identity: changes with the weights; part of the key of cached embeddings.
        seconds_per_frame: hop of its frames.
    """

    names: tuple[str, ...]
    identity: str
    seconds_per_frame: float

    def __call__(self, clips: Sequence[Samples]) -> list[dict[str, Tensor]]:
        """Clips at 16 kHz, (samples,) each → for each its representations, (T, D) float32 on the CPU."""
        ...


def tokenizer_representations(model: DashengTokenizerModel) -> tuple[str, ...]:
    """What a tokenizer has; the latent of a VAE goes by the name `unified`, and has no parts."""
    return TOKENIZER_REPRESENTATIONS[:1] if model.config.is_vae else TOKENIZER_REPRESENTATIONS


def check_representation(name: str, known: Sequence[str]) -> None:
    """Raise a ConfigurationError for a name that is not known."""
    if name not in known:
        raise ConfigurationError(f"unknown representation {name!r}; this tokenizer has {', '.join(known)}")


class TokenizerEmbedder:
    """Unified, semantic and acoustic embedding of a tokenizer, from one pass over the audio; of a VAE its latent."""

    seconds_per_frame = SAMPLES_PER_TOKEN / SAMPLING_RATE

    def __init__(self, model: DashengTokenizerModel, names: Sequence[str] | None = None) -> None:
        """Args: the tokenizer, on its device, and which of its representations, all when None.

        Raises:
            ConfigurationError: a representation it does not have.
        """
        known = tokenizer_representations(model)
        names = known if names is None else names
        for name in names:
            check_representation(name, known)
        self.model = model.eval()
        self.names: tuple[str, ...] = tuple(names)
        self.identity = f"tokenizer {model.weights_hash()}"

    @torch.inference_mode()
    def __call__(self, clips: Sequence[Samples]) -> list[dict[str, Tensor]]:
        """See `Embedder`. Clips of any length may share a batch: the tokenizer is batch-invariant."""
        audio = nn.utils.rnn.pad_sequence([torch.from_numpy(clip) for clip in clips], batch_first=True)  # (B, S)
        lengths = torch.tensor([len(clip) for clip in clips])
        mask = torch.arange(audio.shape[1]) < lengths[:, None]  # (B, S)
        *held, tokens = self.model._encode_parts(audio.to(self.model.device), mask.to(self.model.device))
        parts = dict(zip(TOKENIZER_REPRESENTATIONS, held, strict=True))  # (B, T, D) each
        return [
            {name: parts[name][row, :count].float().cpu() for name in self.names}
            for row, count in enumerate(tokens.tolist())
        ]


class LogMelEmbedder:
    """The input of the published acoustic layer: log-mel magnitudes of 4 frames, 512 numbers a token, floor 1e-7."""

    names: tuple[str, ...] = ("log-mel",)
    seconds_per_frame = SAMPLES_PER_TOKEN / SAMPLING_RATE

    def __init__(self, bands: int = 128) -> None:
        """Args: mel bands."""
        self.front_end = AcousticFrontEnd(bands)
        self.identity = f"log-mel {bands}"

    @torch.inference_mode()
    def __call__(self, clips: Sequence[Samples]) -> list[dict[str, Tensor]]:
        """See `Embedder`."""
        found = []
        for clip in clips:
            tokens = -(-len(clip) // SAMPLES_PER_TOKEN)
            context = with_context(torch.from_numpy(clip)[None], tokens)  # (1, 512 + 640·T + 512)
            log_mel = self.front_end(context, FRAMES_PER_TOKEN * tokens)[0]  # (bands, 4·T)
            found.append({"log-mel": log_mel.T.reshape(tokens, -1)})  # (T, 4·bands)
        return found


class TransformersEmbedder:
    """Last hidden state of any audio encoder of transformers, from a folder or the hub, one clip at a time.

    Encoders that take a waveform or log-mel features through their own feature extractor. For Whisper, WavLM, HuBERT,
    wav2vec2 and Dasheng folders use `encoder_embedder`: it gives their features at 25 Hz, as a tokenizer has them.
    """

    def __init__(self, name: str | Path) -> None:
        """Args: folder or hub name with model and feature extractor.

        Raises:
            CheckpointError: not found, or no feature extractor beside it.
        """
        from transformers import AutoFeatureExtractor, AutoModel

        try:
            self.extractor = AutoFeatureExtractor.from_pretrained(name, trust_remote_code=False)
            model = AutoModel.from_pretrained(name, use_safetensors=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(
                f"{name}: no audio encoder with a feature extractor could be loaded ({reason})"
            ) from error
        encoder = getattr(model, "get_encoder", lambda: model)()
        self.model = encoder.eval().requires_grad_(False)
        self.names: tuple[str, ...] = (model.config.model_type,)
        digest = hashlib.sha256()
        for key, tensor in sorted(self.model.state_dict().items()):
            digest.update(key.encode() + tensor.float().numpy().tobytes())
        self.identity = f"transformers {digest.hexdigest()}"
        self.seconds_per_frame = self._measure_hop()

    @torch.inference_mode()
    def __call__(self, clips: Sequence[Samples]) -> list[dict[str, Tensor]]:
        """See `Embedder`."""
        return [{self.names[0]: self._frames(clip)} for clip in clips]

    def _frames(self, clip: Samples) -> Tensor:
        inputs = self.extractor(clip, sampling_rate=SAMPLING_RATE, return_tensors="pt")
        main = next(iter(inputs))
        frames: Tensor = self.model(inputs[main]).last_hidden_state[0]  # (T, D)
        return frames

    @torch.inference_mode()
    def _measure_hop(self) -> float:
        """Seconds a frame, from a clip of 30 s, the length that encoders of fixed length have."""
        seconds = 30
        return seconds / len(self._frames(np.zeros(seconds * SAMPLING_RATE, np.float32)))


def encoder_embedder(folder: str | Path) -> Embedder:
    """A frozen encoder alone, without a tokenizer around it.

    Whisper, WavLM, HuBERT, wav2vec2 and Dasheng come at 25 Hz, as the semantic branch of a tokenizer; any other audio
    encoder of transformers as it is.

    Args:
        folder: weights as `semantic_weights` of a recipe takes them, or any audio encoder of transformers.

    Raises:
        CheckpointError: not found or unreadable.
    """
    path = Path(folder)
    if path.exists():
        state, config = read_weights(path)
        dasheng = any(key.endswith("time_pos_embed") for key in state)
        if dasheng or config.get("model_type") in SEMANTIC_KINDS:
            torch.manual_seed(0)  # of the decoder, which is not used, but counts in the hash of the weights
            embedder = TokenizerEmbedder(new_tokenizer(path, **SMALL_DECODER), ("semantic",))
            embedder.identity = f"encoder {semantic_hash(embedder.model)}"
            return embedder
    return TransformersEmbedder(folder)


SMALL_DECODER: dict[str, Any] = {"decoder_embed_dim": 8, "decoder_depth": 1, "decoder_intermediate_size": 8}
"""Of a tokenizer whose decoder is never used."""
