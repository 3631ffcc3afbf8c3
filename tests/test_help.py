"""What the command tells about itself: help of every option, completion of shells."""

from __future__ import annotations

import argparse
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from dasheng_tokenizer import cli_completion
from dasheng_tokenizer.cli import build_parser, main
from dasheng_tokenizer.errors import MissingExtraError


def commands(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    yield name.strip(), parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, command in action.choices.items():
                yield from commands(command, f"{name} {word}")


ALL = dict(commands(build_parser()))


@pytest.mark.parametrize("name", ALL)
def test_every_option_says_what_it_is_for(name: str) -> None:
    obvious = {"inputs", "command", "kind"}  # FILE_OR_FOLDER, COMMAND, KIND: named by their place and the text above
    silent = [action.dest for action in ALL[name]._actions if not action.help and action.dest not in obvious]
    assert not silent
    described = ALL[name].description or name in ("info", "train", "evaluate", "")
    assert described, f"{name} has no description"


@pytest.mark.parametrize("name", ALL)
def test_every_choice_and_default_is_told(name: str) -> None:
    """A default that matters is in the help, as `(default: …)`; flags and lists start empty."""
    for action in ALL[name]._actions:
        plain = action.default in (None, False, [], argparse.SUPPRESS) or not action.option_strings
        assert plain or "default" in (action.help or ""), f"{name} {action.option_strings}"


@pytest.mark.parametrize("shell", cli_completion.SHELLS)
def test_completion_knows_all_commands_and_options(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab", reason="needs the extra completion")
    assert main(["--print-completion", shell]) == 0
    script = capsys.readouterr().out
    for name, parser in ALL.items():
        for word in name.split():
            assert word in script
        for action in parser._actions:
            assert not action.option_strings or action.option_strings[-1].lstrip("-") in script, (name, action)


def test_bash_completes(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab", reason="needs the extra completion")
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    assert main(["--print-completion", "bash"]) == 0
    ask = """
COMP_WORDS=(dasheng-tokenizer recon)
COMP_CWORD=1
_shtab_dasheng_tokenizer dasheng-tokenizer recon dasheng-tokenizer
echo "${COMPREPLY[@]}"
"""
    done = subprocess.run([bash, "-c", capsys.readouterr().out + ask], capture_output=True, text=True)
    assert done.stdout.split() == ["reconstruct"]


def test_a_missing_shtab_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def absent(module: str, extra: str) -> None:
        raise MissingExtraError(f"{module} is needed; install dasheng-tokenizer[{extra}]")

    monkeypatch.setattr(cli_completion, "require_extra", absent)
    assert main(["--print-completion", "zsh"]) == 2
    assert "dasheng-tokenizer[completion]" in capsys.readouterr().err
    assert main(["--print-completion", "fish"]) == 2
    assert "fish" in capsys.readouterr().err
