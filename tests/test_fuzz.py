"""A few hundred damaged inputs, and that the run notices what must not happen. `make fuzz` has ten thousand."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from dasheng_tokenizer.errors import DataError
from fuzz import runner, targets
from fuzz.runner import run
from fuzz.targets import KINDS, Case, Finding, check_outputs, command, foreseen

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the run watches memory as Linux tells"
)

INPUTS = 160


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.slow
def test_damaged_inputs_lead_to_named_errors(root: Path) -> None:
    outcome = list(run(root, seed=1, first=0, count=INPUTS, seconds=1e9, hang=120.0))[-1]
    assert not outcome.findings, outcome.findings
    assert set(outcome.counts) == set(KINDS) and sum(outcome.counts.values()) == INPUTS


@pytest.mark.slow
def test_an_input_without_end_is_a_finding_and_the_run_goes_on(root: Path, tmp_path: Path) -> None:
    outcome = list(run(root, seed=1, first=0, count=2, seconds=1e9, keep=tmp_path, hang=0.0))[-1]
    assert [(finding["index"], finding["problem"]) for finding in outcome.findings] == [
        (0, "no end after 0 s"),
        (1, "no end after 0 s"),
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"1-0", "1-0.txt", "1-1", "1-1.txt"}


def test_growth_is_measured_at_its_peak() -> None:
    before = runner.restart_peak()
    held = bytearray(100 * 2**20)
    held[::4096] = b"x" * len(held[::4096])
    del held
    assert runner.peak() - before > 50


def raises(error: Exception) -> Callable[[], None]:
    def call() -> None:
        raise error

    return call


def test_a_call_may_raise_named_errors_only() -> None:
    foreseen(raises(DataError("a broken shard; copy it again")))
    with pytest.raises(TypeError):
        foreseen(raises(TypeError("list indices must be integers")))
    with pytest.raises(Finding):
        foreseen(raises(DataError("")))


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (1, "Traceback (most recent call last)\nerror: x"),
        (1, ""),
        (1, "error: a\nb"),
        (3, "error: x"),
        (1, "error: \x1b[31m"),
    ],
)
def test_a_command_may_fail_on_one_line_only(code: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def main(argv: list[str]) -> int:
        import sys

        print(said, file=sys.stderr)
        return code

    monkeypatch.setattr(targets, "main", main)
    with pytest.raises(Finding):
        command("encode")


@pytest.mark.parametrize("name", [".x.12345678.partial.wav", "cut.wav", "cut.tokens.safetensors", "cut.json"])
def test_half_written_outputs_are_found(name: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_bytes(b"RIFF{")
    with pytest.raises((Finding, OSError, ValueError)):
        check_outputs(Case(tmp_path / "case", tmp_path, tmp_path / "out", tmp_path, random.Random(0)))
