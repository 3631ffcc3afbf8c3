"""Embeddings for distances between sets of clips: by name, from a folder, or from an ONNX file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dasheng_tokenizer.audio import resample
from dasheng_tokenizer.errors import CheckpointError, ConfigurationError, DataError
from dasheng_tokenizer.evaluation.representations import (
    Embedder,
    LogMelEmbedder,
    Samples,
    TokenizerEmbedder,
    encoder_embedder,
    tokenizer_representations,
)
from dasheng_tokenizer.files import parse_json, require_extra
from dasheng_tokenizer.spectral import SAMPLING_RATE

SEMANTIC, LOG_MEL = "semantic", "log-mel"
DEFAULT_EMBEDDINGS = (SEMANTIC, LOG_MEL)
"""Known by name alone: the semantic part of the embedded tokenizer, and the input of its acoustic layer."""

TEXT_BATCH = 32


def load_embedding(text: str, device: str | None = None) -> tuple[str, Embedder]:
    """The embedding that `--embedding` names, with its name.

    Args:
        text: `semantic`, `log-mel`, or `NAME=PATH`: a tokenizer of this package (its semantic part; of a VAE the
            latent), a CLAP model or any other audio encoder of transformers, or an ONNX file as `OnnxEmbedder` has it.
        device: of tokenizers and CLAP; None takes CUDA where there is one.

    Raises:
        ConfigurationError: an unknown name. CheckpointError: nothing that can be loaded.
    """
    from dasheng_tokenizer.cli_audio import load_model

    name, separator, path = text.partition("=")
    if not separator:
        if name == LOG_MEL:
            return name, LogMelEmbedder()
        if name == SEMANTIC:
            return name, TokenizerEmbedder(load_model(None, device, None), (SEMANTIC,))
        raise ConfigurationError(f"--embedding {text}: write {', '.join(DEFAULT_EMBEDDINGS)} or NAME=PATH")
    if not (name and path):
        raise ConfigurationError(f"--embedding {text}: write NAME=PATH")
    if path.lower().endswith(".onnx"):
        return name, OnnxEmbedder(path)
    kind = _model_type(path)
    if kind == "clap":
        return name, ClapEmbedder(path, device)
    if kind == "dashengtokenizer":
        model = load_model(path, device, None)
        known = tokenizer_representations(model)
        return name, TokenizerEmbedder(model, (SEMANTIC if SEMANTIC in known else known[0],))
    try:
        return name, encoder_embedder(path)
    except ValueError as error:  # of a feature extractor for another rate than 16 kHz
        raise CheckpointError(f"{path}: takes no audio of {SAMPLING_RATE} Hz ({error}); export it to ONNX") from error


class OnnxEmbedder:
    """Any network in an ONNX file that turns a waveform into an embedding, such as VGGish or PANNs.

    The file has one input, float32 of shape (1, S), a clip of full scale 1; its first output is (1, D), or (1, T, D),
    of which the mean over time counts. The rate is 16 kHz unless the file's metadata has `sampling_rate` in Hz. It must
    take any S of at least a second; shorter clips are extended by silence.
    """

    def __init__(self, path: str | Path) -> None:
        """Load it.

        Raises:
            CheckpointError: no ONNX file that can be loaded, or another input than described.
            MissingExtraError: onnxruntime is not installed.
        """
        runtime = require_extra("onnxruntime", "evaluate")
        self.path = Path(path)
        if not self.path.is_file():
            raise CheckpointError(f"{path}: no such file; give an ONNX file of an audio embedding")
        try:
            self.session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has a class of its own for each kind
            raise CheckpointError(f"{path}: no ONNX file that can be loaded ({_first_line(error)})") from error
        inputs = self.session.get_inputs()
        if len(inputs) != 1 or len(inputs[0].shape) != 2 or inputs[0].type != "tensor(float)":
            found = ", ".join(f"{item.name} {item.type} {item.shape}" for item in inputs)
            raise CheckpointError(f"{path}: an embedding takes one float32 input (1, samples), this one {found}")
        rate = self.session.get_modelmeta().custom_metadata_map.get("sampling_rate", str(SAMPLING_RATE))
        if not rate.isdecimal() or int(rate) < 1:
            raise CheckpointError(f"{path}: its metadata has the sampling_rate {rate!r}; write Hz as a whole number")
        self.rate = int(rate)
        self.input: str = inputs[0].name
        self.names: tuple[str, ...] = (self.path.stem,)
        self.identity = f"onnx {hashlib.sha256(self.path.read_bytes()).hexdigest()}"
        self.seconds_per_frame = 1.0

    def __call__(self, clips: Sequence[Samples]) -> list[dict[str, Tensor]]:
        """See `Embedder`; one clip at a time.

        Raises:
            DataError: the network fails on a clip, or gives no embedding.
        """
        return [{self.names[0]: self._embed(clip)} for clip in clips]

    def _embed(self, clip: Samples) -> Tensor:
        audio = resample(clip, SAMPLING_RATE, self.rate)
        audio = np.pad(audio, (0, max(0, self.rate - len(audio))))[None].astype(np.float32)  # (1, S)
        try:
            output = np.asarray(self.session.run(None, {self.input: audio})[0])
        except Exception as error:  # onnxruntime has a class of its own for each kind
            raise DataError(f"{self.path} fails on a clip of {audio.shape[1]} samples: {_first_line(error)}") from error
        if output.ndim not in (2, 3) or len(output) != 1 or not output.size:
            raise DataError(f"{self.path} gives {output.shape}; an embedding is (1, D) or (1, T, D)")
        return torch.from_numpy(output.reshape(-1, output.shape[-1]).astype(np.float32))


class ClapEmbedder:
    """Audio and text in the joint space of a CLAP model of transformers; vectors of length 1.

    A clip is brought from 16 kHz to the model's rate, so that it is judged without anything above 8 kHz, real and
    generated alike. One that is longer than the model's window is cut into windows: the model's own way, a random
    window, would give another figure each time.
    """

    def __init__(self, folder: str | Path, device: str | None = None) -> None:
        """Load it.

        Args:
            folder: with model (safetensors), feature extractor and text tokenizer.
            device: None takes CUDA where there is one.

        Raises:
            CheckpointError: not a folder, or without one of the three.
        """
        from transformers import AutoFeatureExtractor, AutoTokenizer, ClapModel

        if not Path(folder).is_dir():
            raise CheckpointError(f"{folder} is no folder; give one with a CLAP model of transformers")
        try:
            self.extractor = AutoFeatureExtractor.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            model: Any = ClapModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder}: no CLAP model could be loaded ({_first_line(error)})") from error
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.window = int(self.extractor.nb_max_samples)
        self.names: tuple[str, ...] = ("clap",)
        self.identity = f"clap {_weights_digest(self.model)}"
        self.seconds_per_frame = self.window / self.extractor.sampling_rate

    @torch.inference_mode()
    def __call__(self, clips: Sequence[Samples]) -> list[dict[str, Tensor]]:
        """See `Embedder`; a window is a frame, (windows, D)."""
        return [{"clap": self._windows(clip)} for clip in clips]

    def _windows(self, clip: Samples) -> Tensor:
        rate = int(self.extractor.sampling_rate)
        audio = resample(clip, SAMPLING_RATE, rate)
        starts = range(0, len(audio), self.window)
        found: list[Tensor] = []
        for part in (audio[start : start + self.window] for start in starts):
            if len(part) < rate // 2 and found:  # a rest that would be repeated many times over
                continue
            inputs = self.extractor(part, sampling_rate=rate, return_tensors="pt").to(self.device)
            output = self.model.get_audio_features(
                input_features=inputs["input_features"].float(), is_longer=inputs["is_longer"]
            )
            found.append(F.normalize(_pooled(output)[0], dim=-1))
        return torch.stack(found).float().cpu()  # (windows, D)

    @torch.inference_mode()
    def texts(self, sentences: Sequence[str]) -> Tensor:
        """N sentences → (N, D) vectors of length 1; what the model cannot take is cut off."""
        found = []
        for start in range(0, len(sentences), TEXT_BATCH):
            batch = list(sentences[start : start + TEXT_BATCH])
            limit = self.model.config.text_config.max_position_embeddings - 2  # as RoBERTa counts positions
            tokens = self.tokenizer(batch, padding=True, truncation=True, max_length=limit, return_tensors="pt")
            output = self.model.get_text_features(
                input_ids=tokens["input_ids"].to(self.device), attention_mask=tokens["attention_mask"].to(self.device)
            )
            found.append(F.normalize(_pooled(output), dim=-1).float().cpu())
        return torch.cat(found).clone()  # out of inference mode


def _pooled(output: Any) -> Tensor:
    """Releases of transformers differ in whether features come alone or as the pooled output of a record."""
    pooled: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return pooled


def _weights_digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(key.encode() + tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _model_type(path: str) -> str | None:
    """Of a folder's config.json; None where there is none, such as for a hub name."""
    try:
        held = parse_json((Path(path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return held.get("model_type") if isinstance(held, dict) else None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
