"""What a checkpoint claims, held against the header of its weights before anything of that size is made.

A config.json takes a few hundred bytes and can ask for a model of any size. The header of the safetensors file tells
the shapes that are really there.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from safetensors import SafetensorError, safe_open

from dasheng_tokenizer.errors import CheckpointError

Shapes = dict[str, tuple[int, ...]]
Settings = TypeVar("Settings")

PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".h5", ".msgpack")
"""Suffixes of weights in other formats, most of which can run code when they are loaded."""

_UNBUILT = ("vocab_size", "id", "ids", "tokens")
"""Ends of the names of whole numbers in a configuration of transformers that no part of an encoder is made of."""


def refuse_other_weights(folder: Path) -> None:
    """Refuse a folder whose weights are in another format only.

    Raises:
        CheckpointError: there are no safetensors, but weights in formats of which most have to be unpickled.
    """
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    other = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in PICKLED)
    if other:
        raise CheckpointError(
            f"{folder} holds weights as {other[0]} and none as *.safetensors; only safetensors are loaded, since other "
            "formats can run code. Ask the publisher for safetensors, or convert them where you trust them"
        )


def stored_shapes(folder: Path) -> Shapes:
    """Names and shapes of all weights in the safetensors files of a folder, by their headers alone.

    Raises:
        CheckpointError: a file is damaged.
    """
    shapes: Shapes = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as opened:
                shapes.update({name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()})  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: the weights are damaged ({error}); download or copy it again") from error
    return shapes


def refuse_inflated(source: object, settings: Mapping[str, Any], shapes: Shapes) -> None:
    """Refuse a configuration with more layers than there are weights, or a size beyond the number of all weights.

    Args:
        source: what to call the checkpoint.
        settings: numbers and lists of numbers by name, also in groups.
        shapes: of `stored_shapes`.

    Raises:
        CheckpointError: a number that these weights cannot have.
    """
    numbers = sum(math.prod(shape) for shape in shapes.values())
    for name, value in settings.items():
        if isinstance(value, Mapping):
            refuse_inflated(source, value, shapes)
            continue
        layers = name.endswith(("layers", "depth")) and not name == "decoder_layers"
        most = len(shapes) if layers else numbers
        held = value if isinstance(value, list) else [value]
        large = [item for item in held if isinstance(item, (int, float)) and not abs(item) <= most]
        large += [len(held)] if len(held) > numbers else []
        if large and name.rpartition("_")[2] not in _UNBUILT and name not in _UNBUILT:
            raise CheckpointError(
                f"{source}: {name} is {large[0]}, but the file holds {len(shapes)} weights of {numbers} numbers; "
                "config.json and weights do not belong together, download or copy both again"
            )


def settings_from_json(kind: type[Settings], held: Any) -> Settings:
    """A dataclass from what JSON holds, with the types of its fields checked.

    Raises:
        TypeError: no object, an unknown or missing entry, or one of a wrong type; ConfigurationError: out of range.
    """
    if not isinstance(held, dict):
        raise TypeError(f"{held!r} is no group of settings")
    hints = typing.get_type_hints(kind)
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name, value in held.items():
        if name in known and not _fits(hints[name], value):
            raise TypeError(
                f"{name} is {value!r}, which is not of type {getattr(hints[name], '__name__', hints[name])}"
            )
    return kind(**held)


def _fits(hint: Any, value: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(argument, value) for argument in arguments)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin is tuple:  # JSON has lists
        several = isinstance(value, (list, tuple)) and len(value) == len(arguments)
        return several and all(map(_fits, arguments, value))
    if origin is not None:
        return isinstance(value, origin)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e300
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
