"""Reading the published files of the sibling generator: strictly, from one file or from shards."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dasheng_tokenizer.checkpoint_sizes import refuse_other_weights
from dasheng_tokenizer.errors import CheckpointError, ConfigurationError
from dasheng_tokenizer.files import parse_json
from dasheng_tokenizer.generation.audiogen_configuration import MODEL_TYPE, PUBLISHED_GENERATOR, AudioGenConfig
from dasheng_tokenizer.weights_folder import CONFIG, WEIGHTS, model_folder

if TYPE_CHECKING:
    from dasheng_tokenizer.generation.audiogen import AudioGen

INDEX = f"{WEIGHTS}.index.json"

PROJECTION = "content_encoder.text_encoder.proj.weight"
"""Tells the width of the text encoder, which the published config does not."""

FREQUENCIES = "rotary.inv_freq"

_LISTED = 5


def load_audiogen(
    cls: type[AudioGen],
    name: str | os.PathLike[str] | None,
    device: torch.device,
    dtype: torch.dtype | None,
    options: Mapping[str, Any],
) -> AudioGen:
    """See `AudioGen.from_pretrained`."""
    folder = model_folder(PUBLISHED_GENERATOR if name is None else name, "generator")
    refuse_other_weights(folder)
    told = read_config(folder)
    where = _tensor_files(folder)
    try:
        config = AudioGenConfig.from_published({"text_dim": _text_dim(folder, where), **told})
    except (ConfigurationError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error
    blocks = config.dit_depth + config.duration_predictor_n_layers
    if blocks > len(where):
        raise CheckpointError(
            f"{folder / CONFIG}: {blocks} blocks, but there are {len(where)} weights; download it again"
        )
    with torch.device("meta"):
        model = cls(config, **options)
    wanted = model.state_dict()
    # A parameter without numbers may be left out by who writes the file.
    state = {key: torch.empty(0, device=device) for key, tensor in wanted.items() if not tensor.numel()}
    _check_names(folder, set(wanted) - set(state), set(where) - set(state))
    for file in sorted(set(where.values())):
        with _opened(file) as opened:
            for key in (key for key in opened.keys() if where[key] == file):
                if tuple(opened.get_slice(key).get_shape()) != tuple(wanted[key].shape):
                    raise CheckpointError(
                        f"{file}: {key} has shape {tuple(opened.get_slice(key).get_shape())}, not "
                        f"{tuple(wanted[key].shape)} as {CONFIG} says; download both again"
                    )
                state[key] = _converted(file, key, opened.get_tensor(key), device, dtype)
    _check_frequencies(folder, model, state)
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def read_config(folder: Path) -> dict[str, Any]:
    """The entries of a published config.json.

    Raises:
        CheckpointError: missing, damaged, or of another model.
    """
    path = folder / CONFIG
    try:
        told = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is missing or damaged ({error}); download it again") from error
    found = told.get("model_type") if isinstance(told, dict) else None
    if found != MODEL_TYPE:
        raise CheckpointError(f"{path} is of kind {found!r}, not {MODEL_TYPE!r}; name a folder of that generator")
    return dict(told)


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Name of each tensor → file that holds it, by the index of the shards or from the one file."""
    index = folder / INDEX
    if not index.is_file():
        with _opened(folder / WEIGHTS) as opened:
            return dict.fromkeys(opened.keys(), folder / WEIGHTS)
    try:
        listed = parse_json(index.read_text(encoding="utf-8"))["weight_map"]
        where = {str(key): folder / Path(str(file)).name for key, file in listed.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is damaged ({type(error).__name__}: {error}); download it again") from error
    for file in sorted(set(where.values())):
        with _opened(file) as opened:
            found, expected = set(opened.keys()), {key for key, place in where.items() if place == file}
        if found != expected:
            odd = sorted(found ^ expected)
            word = "lacks" if odd[0] in expected else "holds, without being listed for it,"
            raise CheckpointError(f"{file} {word} {odd[0]}, against {INDEX}; download the folder again")
    return where


def _text_dim(folder: Path, where: Mapping[str, Path]) -> int:
    if PROJECTION not in where:
        raise CheckpointError(f"{folder}: 1 weights missing: {PROJECTION}; this is no generator of this layout")
    with _opened(where[PROJECTION]) as opened:
        shape = opened.get_slice(PROJECTION).get_shape()
    if len(shape) != 2:
        raise CheckpointError(f"{where[PROJECTION]}: {PROJECTION} has shape {tuple(shape)}; download it again")
    return int(shape[1])


def _check_names(folder: Path, wanted: set[str], found: set[str]) -> None:
    for word, names in (("missing", sorted(wanted - found)), ("unknown", sorted(found - wanted))):
        if names:
            more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
            raise CheckpointError(
                f"{folder}: {len(names)} weights {word}: {', '.join(names[:_LISTED])}{more}; this is no generator of "
                f"the sizes in its {CONFIG}. Download the folder again"
            )


def _converted(file: Path, key: str, tensor: Tensor, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.to(device)
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{file}: {key} holds NaN or infinity; download the file again")
    tensor = tensor.to(device, torch.float32 if key.endswith(FREQUENCIES) else dtype)
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{file}: {key} is too large for {dtype}; load the weights as bfloat16 or float32")
    return tensor


def _check_frequencies(folder: Path, model: AudioGen, state: Mapping[str, Tensor]) -> None:
    """Positions are computed anew; files that mean others must not pass unseen."""
    head_size = model.config.dit_embed_dim // model.config.dit_num_heads
    from dasheng_tokenizer.generation.audiogen_backbone import Rotary

    wanted = Rotary(head_size).inv_freq
    for key, tensor in state.items():
        if key.endswith(FREQUENCIES) and not torch.allclose(tensor.cpu(), wanted, rtol=1e-2):  # files may be bfloat16
            raise CheckpointError(f"{folder}: {key} is of another rotary base than 10,000; this is not supported")


class _opened:
    """A safetensors file, open; each of its failures is a CheckpointError."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __enter__(self) -> Any:
        try:
            self._handle = safe_open(self._file, "pt")
            return self._handle.__enter__()
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self._file} is missing or damaged ({error}); download it again") from error

    def __exit__(self, *error: Any) -> None:
        self._handle.__exit__(*error)
