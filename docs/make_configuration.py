"""Makes `docs/configuration.md`, the reference of all recipe keys, from the dataclasses that read the recipes.

python docs/make_configuration.py            # write configuration.md
python docs/make_configuration.py --check    # exit 1 when configuration.md is not what the dataclasses give
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dasheng_tokenizer import DashengTokenizerConfig
from dasheng_tokenizer.enhancement.training_configuration import EnhancementConfig
from dasheng_tokenizer.generation.training_configuration import GeneratorTrainingConfig
from dasheng_tokenizer.training.configuration import TrainingConfig

PAGE = Path(__file__).resolve().parent / "configuration.md"

HEAD = """# Configuration

This page is made by `docs/make_configuration.py` from the dataclasses of the package; do not edit it. A recipe is a
YAML file with these keys; a key that does not exist is an error, and so is a value out of range. `key=value` after the
recipe on the command line replaces one, with dots between the parts of nested keys: `optimizer.lr=1e-3`. What the keys
are for is told in [Training](training.md), [Generation](generation.md) and [Enhancement](enhancement.md); the files in
`recipes` have them in use.
"""

RECIPES: dict[str, tuple[type[Any], str]] = {
    "Recipes of the tokenizer": (TrainingConfig, "`kind: tokenizer`, which may be left out."),
    "Recipes of generators": (GeneratorTrainingConfig, "`kind: generator`."),
    "Recipes of enhancers": (EnhancementConfig, "`kind: enhancement`."),
}

MODEL = (
    "Arguments of `DashengTokenizerConfig`, the keys of a tokenizer's `config.json` and of `model` in its recipes. The "
    "defaults are those of the published model."
)


def described(owner: type[Any], section: str = "Attributes") -> dict[str, str]:
    """Descriptions by name, from a section of the docstrings of a class and of those that it inherits from.

    Raises:
        ValueError: there is no such section anywhere.
    """
    found: dict[str, str] = {}
    for one in reversed(owner.__mro__):
        text = inspect.cleandoc(one.__dict__.get("__doc__") or "")
        _, heading, rest = text.partition(f"{section}:\n")
        if not heading:
            continue
        body = re.split(r"\n\n(?=\S)|\n(?=\S)", rest)[0]
        for entry in re.split(r"\n(?=    \w)", "\n" + body.rstrip()):
            names, colon, told = entry.strip().partition(":")
            if colon:
                words = " ".join(told.split())
                found |= {name.strip(" `"): words for name in re.sub(r"\([^)]*\)", "", names).split(",")}
    if not found:
        raise ValueError(f"{owner.__name__} has no section {section} in its docstring")
    return found


def type_name(annotation: Any) -> str:
    """A type as a reader of YAML understands it."""
    if annotation is type(None):
        return "null"
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(annotation))
    arguments = typing.get_args(annotation)
    if "Union" in str(typing.get_origin(annotation)):
        return " or ".join(type_name(one) for one in arguments)
    plain = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false", "Path": "path"}
    if arguments:
        inner = [type_name(one) for one in arguments if one is not Ellipsis]
        mapping = typing.get_origin(annotation) is dict
        return f"{inner[0]}: {inner[1]}" if mapping else f"list of {inner[0]}"
    name = getattr(annotation, "__name__", str(annotation))
    return plain.get(name, name)


def shown(value: Any) -> str:
    """A default as it would stand in a recipe."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(shown, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {shown(held)}" for key, held in value.items()) + "}"
    return str(value)


def rows(owner: type[Any], held: Any = None, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Key, type, default and description of each setting, nested ones after the one that holds them.

    Args:
        owner: dataclass of the settings.
        held: the default of the setting that holds them, which may differ from the defaults of `owner`.
        prefix: what comes before the keys.

    Raises:
        ValueError: a setting is not described.
    """
    told, types = described(owner), typing.get_type_hints(owner)
    for field in dataclasses.fields(owner):
        if field.name not in told:
            raise ValueError(f"{owner.__name__}.{field.name} is not described in the docstring")
        nested, key = types[field.name], f"{prefix}{field.name}"
        default: Any = field.default
        if held is not None:
            default = getattr(held, field.name)
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        missing = default is dataclasses.MISSING
        if dataclasses.is_dataclass(nested) and isinstance(nested, type):
            yield key, "keys below", "", told[field.name]
            yield from rows(nested, None if missing else default, f"{key}.")
        else:
            yield key, type_name(nested), "required" if missing else f"`{shown(default)}`", told[field.name]


def model_rows() -> Iterator[tuple[str, str, str, str]]:
    """The same of the arguments of `DashengTokenizerConfig`.

    Raises:
        ValueError: an argument is not described.
    """
    told = described(DashengTokenizerConfig, "Args")
    signature = inspect.signature(DashengTokenizerConfig.__init__)
    types = typing.get_type_hints(DashengTokenizerConfig.__init__)
    for name, parameter in signature.parameters.items():
        if name == "self" or parameter.kind is inspect.Parameter.VAR_KEYWORD:
            continue
        if name not in told:
            raise ValueError(f"DashengTokenizerConfig: {name} is not described in the docstring")
        yield name, type_name(types[name]), f"`{shown(parameter.default)}`", told[name]


def table(lines: Iterator[tuple[str, str, str, str]]) -> str:
    """A Markdown table."""
    cells = [(f"`{key}`", kind, default, told.replace("|", "\\|")) for key, kind, default, told in lines]
    return "\n".join(["| key | type | default | |", "|---|---|---|---|", *(f"| {' | '.join(row)} |" for row in cells)])


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, (owner, about) in RECIPES.items():
        parts.append(f"\n## {title}\n\n{about}\n\n{table(rows(owner))}\n")
    parts.append(f"\n## The tokenizer\n\n{MODEL}\n\n{table(model_rows())}\n")
    return "".join(parts)


def main() -> None:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit 1 when the page is not up to date")
    text = page()
    if parser.parse_args().check:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
            sys.exit(f"{PAGE.name} is not what the dataclasses give; run: python docs/make_configuration.py")
        return
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
