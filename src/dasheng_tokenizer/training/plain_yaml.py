"""YAML as settings need it: mappings with names, lists and scalars; from anywhere, so without what can blow up."""

from __future__ import annotations

import re
from typing import Any

import yaml

MOST_CHARACTERS = 1_000_000
LARGEST = 2**64
DEEPEST = 50
"""Nested groups. The parser of PyYAML recurses; recipes need four."""


class _PlainLoader(yaml.SafeLoader):
    """The safe loader without aliases, which can stand for themselves or multiply to any size."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias (*name) is not supported here; write the value itself")
        self._depth += 1
        if self._depth > DEEPEST:
            raise yaml.YAMLError(f"more than {DEEPEST} groups lie in each other")
        node = super().compose_node(parent, index)  # type: ignore[no-untyped-call]
        self._depth -= 1
        return node


# PyYAML takes 3e-3 for text, by YAML 1.1; by YAML 1.2, and to everyone who writes it, it is a number.
_PlainLoader.add_implicit_resolver(  # type: ignore[no-untyped-call]
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str) -> Any:
    """Read YAML that may come from anywhere.

    Raises:
        ValueError: no YAML, an alias, a key that is no name, a number that is none, nested too deep, or too long.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"it has {len(text)} characters, more than {MOST_CHARACTERS}")
    try:
        held = yaml.load(text, Loader=_PlainLoader)  # noqa: S506 (a subclass of the safe loader)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        # PyYAML's constructors let through whatever int(), float(), dates and base64 raise.
        raise ValueError(str(error) or type(error).__name__) from error
    _check_plain(held)
    return held


def _check_plain(held: Any) -> None:
    if isinstance(held, dict):
        for key, value in held.items():
            if not isinstance(key, str):
                raise ValueError(f"the key {key!r} is not a name; put it into quotes")
            _check_plain(value)
    elif isinstance(held, list):
        for value in held:
            _check_plain(value)
    elif isinstance(held, int) and abs(held) > LARGEST:
        raise ValueError("a whole number has more than 64 bits")
