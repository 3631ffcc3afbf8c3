"""`dasheng-tokenizer --print-completion SHELL`: what makes a shell complete commands, options and file names."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dasheng_tokenizer.errors import MissingExtraError
from dasheng_tokenizer.files import require_extra

SHELLS = ("bash", "zsh", "tcsh")

FILES_OF_OPTIONS = ("--model", "--tokenizer", "--enhancer", "--generator", "--text-encoder", "--wer", "--judge")
"""Options that take a folder or a hub name, and so are no paths to argparse."""


class PrintCompletion(argparse.Action):
    """Prints the script of a shell for the parser that it is part of, and ends the program."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Print and exit: 0, or 2 where shtab is not installed."""
        try:
            shtab = require_extra("shtab", "completion")
        except MissingExtraError as error:
            print(f"error: {error}", file=sys.stderr)
            parser.exit(2)
        for action in _actions(parser):
            if action.type is Path or set(action.option_strings) & set(FILES_OF_OPTIONS):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
        print(shtab.complete(parser, shell=str(values)))
        parser.exit(0)


def add_completion_option(parser: argparse.ArgumentParser) -> None:
    """Add `--print-completion` to the command itself."""
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=SHELLS,
        help="print what makes a shell complete this command, and exit (extra completion)",
    )


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in set(action.choices.values()):
                yield from _actions(command)
