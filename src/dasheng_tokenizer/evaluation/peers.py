"""Codecs of others, through transformers, from local folders in the layout of `save_pretrained`: EnCodec, DAC, Mimi."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dasheng_tokenizer.audio import fit_length, resample
from dasheng_tokenizer.errors import CheckpointError, ConfigurationError
from dasheng_tokenizer.evaluation.codecs import RATE, Decoded
from dasheng_tokenizer.files import parse_json

MIN_FRAMES = 4
"""Frames that a clip is extended to; the convolutions of DAC refuse less than two."""

Samples = npt.NDArray[np.float32]
RoundTrip = Callable[[Any, Tensor, float | None], tuple[Tensor, Tensor]]
"""Model, audio (1, channels, samples) at its rate, N of `KIND:N` → codes of any shape, audio (1, channels, samples)."""


def _encodec(model: Any, audio: Tensor, kbits: float | None) -> tuple[Tensor, Tensor]:
    code = model.encode(audio, bandwidth=kbits)
    decoded = model.decode(code.audio_codes, code.audio_scales, last_frame_pad_length=code.last_frame_pad_length)
    codes = code.audio_codes
    return codes, decoded.audio_values


def _dac(model: Any, audio: Tensor, codebooks: float | None) -> tuple[Tensor, Tensor]:
    codes = model.encode(audio, n_quantizers=None if codebooks is None else int(codebooks)).audio_codes
    return codes, model.decode(audio_codes=codes).audio_values[:, None]


def _mimi(model: Any, audio: Tensor, codebooks: float | None) -> tuple[Tensor, Tensor]:
    codes = model.encode(audio, num_quantizers=None if codebooks is None else int(codebooks)).audio_codes
    return codes, model.decode(codes).audio_values


@dataclass(frozen=True)
class PeerKind:
    """How a kind of codec is loaded and run.

    Attributes:
        class_name: in transformers.
        run: codes and audio of a clip.
        choices: the values of N that a configuration allows.
        unit: of N.
    """

    class_name: str
    run: RoundTrip
    choices: Callable[[Any], list[float]]
    unit: str


PEERS = {
    "encodec": PeerKind("EncodecModel", _encodec, lambda config: list(config.target_bandwidths), "kbit/s"),
    "dac": PeerKind("DacModel", _dac, lambda config: list(range(1, config.n_codebooks + 1)), "codebooks"),
    "mimi": PeerKind(
        "MimiModel",
        _mimi,
        lambda config: list(range(config.num_semantic_quantizers, config.num_quantizers + 1)),
        "codebooks",
    ),
}


class Peer:
    """A codec of transformers as a system in the table.

    The clip goes to the model's rate and back, extended by zeros to whole frames, four at least, and cut to its length.

    Args:
        kind: of `PEERS`.
        folder: with `config.json` and safetensors.
        number: N of `KIND:N`; None is the model's own choice: EnCodec's lowest rate, all codebooks of the others.
        device: as torch writes it.

    Raises:
        CheckpointError: no such folder, another kind of model, or weights that are missing or left over.
        ConfigurationError: a number that the model does not offer.
    """

    def __init__(self, kind: str, folder: str | Path, number: float | None = None, device: str = "cpu") -> None:
        self.kind, self.folder, self.number = kind, Path(folder), number
        self._kind = PEERS[kind]
        self._digest = _check_folder(kind, self.folder)
        self.model = _load(self._kind.class_name, self.folder).to(device).eval()
        config = self.model.config
        choices = self._kind.choices(config)
        if number is not None and number not in choices:
            offered = ", ".join(f"{choice:g}" for choice in choices)
            raise ConfigurationError(f"{self.folder} offers {offered} {self._kind.unit}, not {number:g}")
        self.sampling_rate = int(config.sampling_rate)
        # Not `config.frame_rate`, which DAC and EnCodec round up to a whole number.
        self.hop_length = int(getattr(config, "hop_length", 0) or config.frame_size)
        self.frame_rate: float | None = self.sampling_rate / self.hop_length
        name = kind if self.folder.name == kind else f"{kind} {self.folder.name}"
        self.name = name if number is None else f"{name}:{number:g}"
        self.about = f"{self.name}: {self._kind.class_name} at {self.sampling_rate} Hz, files {self._digest[:12]}."

    def identity(self) -> list[Any]:
        """As in `codecs.Codec`."""
        import transformers

        device = next(self.model.parameters()).device.type
        return ["peer", self.kind, self._digest, self.number, device, transformers.__version__]

    def reconstruct(self, audio: Samples) -> Decoded:
        """As in `codecs.Codec`; the bits are those of the codes, all of the same size."""
        config = self.model.config
        there = resample(audio, RATE, self.sampling_rate)
        frames = max(math.ceil(there.size / self.hop_length), MIN_FRAMES)
        whole = fit_length(there, frames * self.hop_length)
        device = next(self.model.parameters()).device
        channels = int(getattr(config, "audio_channels", 1))
        batch = torch.from_numpy(whole).to(device).expand(1, channels, -1)  # (1, channels, samples)
        with torch.inference_mode():
            codes, decoded = self._kind.run(self.model, batch, self.number)
        mono = decoded[0].float().mean(0).cpu().numpy()  # (samples,)
        back = resample(fit_length(mono, there.size), self.sampling_rate, RATE)
        return Decoded(fit_length(back, audio.size), round(codes.numel() * math.log2(config.codebook_size)))


def parse_peer(text: str, device: str = "cpu") -> Peer:
    """`KIND=FOLDER` or `KIND:N=FOLDER`.

    Raises:
        ConfigurationError: an unknown kind, no folder, or a wrong number. CheckpointError: as `Peer`.
    """
    name, _, folder = text.partition("=")
    kind, colon, number = name.partition(":")
    if kind not in PEERS:
        raise ConfigurationError(f"--peer {text}: kind {kind!r} is unknown; known: {', '.join(PEERS)}")
    if not folder:
        raise ConfigurationError(f"--peer {text} names no folder; write {name}=FOLDER")
    try:
        chosen = float(number) if colon else None
    except ValueError as error:
        raise ConfigurationError(f"--peer {text}: {number!r} is no number of {PEERS[kind].unit}") from error
    return Peer(kind, folder, chosen, device)


def _check_folder(kind: str, folder: Path) -> str:
    """See that the folder holds such a model; SHA-256 of its configuration and weights, in hex."""
    try:
        config = parse_json((folder / "config.json").read_text(encoding="utf-8"))
        found = config.get("model_type") if isinstance(config, dict) else None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} holds no readable config.json; name a folder of save_pretrained") from error
    if found != kind:
        raise CheckpointError(f"{folder} holds a model of type {found!r}, not {kind!r}; name the right --peer kind")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise CheckpointError(f"{folder} holds no *.safetensors; save the model again by save_pretrained")
    digest = hashlib.sha256()
    for path in (folder / "config.json", *weights):
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _load(class_name: str, folder: Path) -> Any:
    """Weights from safetensors alone, and all of them."""
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model, report = getattr(transformers, class_name).from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{folder} cannot be loaded as {class_name}: {str(error).splitlines()[0]}") from error
    wrong = [*report["missing_keys"], *report["mismatched_keys"]]
    if wrong:
        raise CheckpointError(f"{folder} lacks weights of {class_name}: {', '.join(map(str, wrong[:3]))}, …")
    return model
