"""The results page is what the reports say, and a broken report is named."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "docs" / "make_results.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_results", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def report(**changes: Any) -> dict[str, Any]:
    table = {"caption": "Reconstruction", "columns": ["domain", "clips", "PESQ"], "rows": [["a|b", 12, 2.5]]}
    facts = {"command": "python measure.py", "data": "clips", "hardware": "2 cores", "seed": 0, "date": "2026-01-02"}
    return {"title": "Quality", **facts, "tables": [table], **changes}


def write(docs: Path, name: str, content: Any) -> None:
    (docs / "reports").mkdir(exist_ok=True)
    (docs / "reports" / name).write_text(content if isinstance(content, str) else json.dumps(content))


def test_a_report_becomes_a_section(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "curve.png").write_bytes(b"")
    write(tmp_path, "quality.json", report(notes=["Lower is\nbetter."], pictures=["curve.png"]))
    assert script.main([], tmp_path) == 0
    assert (tmp_path / "results.md").read_text() == script.HEAD + (
        "\n## Quality\n\n- command: `python measure.py`\n- data: clips\n- hardware: 2 cores\n- seed: 0\n"
        "- date: 2026-01-02\n\n**Reconstruction**\n\n| domain | clips | PESQ |\n| --- | ---: | ---: |\n"
        "| a\\|b | 12 | 2.5 |\n\n![curve](curve.png)\n\n- Lower is better.\n"
    )


def test_a_picture_beside_a_report_is_shown(script: ModuleType, tmp_path: Path) -> None:
    write(tmp_path, "probe.json", report())
    assert "![" not in script.results_page(script.read_reports(tmp_path))
    (tmp_path / "reports" / "probe.png").write_bytes(b"")
    assert "![probe](reports/probe.png)" in script.results_page(script.read_reports(tmp_path))


def test_reports_go_by_order_then_by_name(script: ModuleType, tmp_path: Path) -> None:
    for name, order in (("a", 2), ("c", 1), ("b", 1)):
        write(tmp_path, f"{name}.json", report(title=f"Report {name}", order=order))
    titles = [line for line in script.results_page(script.read_reports(tmp_path)).splitlines() if line.startswith("##")]
    assert titles == ["## Report b", "## Report c", "## Report a"]


def test_empty_cells_and_float_noise(script: ModuleType, tmp_path: Path) -> None:
    table = {"caption": "", "columns": ["x", "y"], "rows": [[None, 0.1 + 0.2]]}
    write(tmp_path, "a.json", report(tables=[table]))
    assert "| – | 0.3 |" in script.results_page(script.read_reports(tmp_path))


def test_check_sees_a_page_that_is_out_of_date(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["--check"], tmp_path) == 1  # no page yet
    assert script.main([], tmp_path) == 0
    assert script.main(["--check"], tmp_path) == 0
    write(tmp_path, "a.json", report())
    assert script.main(["--check"], tmp_path) == 1
    assert "out of date" in capsys.readouterr().err


ROW = {"caption": "", "columns": ["x", "y"], "rows": [["only one"]]}
BROKEN = [
    ("{", "cannot be read as JSON"),
    ([], "a JSON object"),
    ({"title": "Quality"}, "missing command, data, date, hardware, seed, tables"),
    (report(note=["a slip"]), "unknown key note"),
    (report(command=""), "command"),
    (report(tables=[ROW]), "table 1, row 1 has 1 cells for 2 columns"),
    (report(tables=[{**ROW, "rows": [[1.0, float("nan")]]}]), "not finite"),
    (report(tables=[{**ROW, "rows": [[1.0, {}]]}]), "no text, number or null"),
    (report(tables=[{"caption": "", "rows": []}]), "caption, columns and rows"),
    (report(notes="one"), "notes must be a list"),
    (report(pictures=["absent.png"]), "no picture absent.png"),
    (report(order="first"), "order must be a finite number"),
]


@pytest.mark.parametrize(("content", "reason"), BROKEN, ids=[reason for _, reason in BROKEN])
def test_a_broken_report_is_named_and_nothing_is_written(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: Any, reason: str
) -> None:
    write(tmp_path, "good.json", report())
    write(tmp_path, "broken.json", content)
    assert script.main([], tmp_path) == 1
    message = capsys.readouterr().err
    assert "broken.json" in message and reason in message
    assert not (tmp_path / "results.md").exists()


def test_the_page_in_the_repository_is_up_to_date(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--check"]) == 0, capsys.readouterr().err


def test_the_configuration_page_is_what_the_dataclasses_give() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT.with_name("make_configuration.py")), "--check"], text=True)
    assert done.returncode == 0


def test_every_setting_of_a_recipe_is_on_the_configuration_page() -> None:
    """With the default that a nested setting has where it stands, not that of its class."""
    page = (SCRIPT.parent / "configuration.md").read_text(encoding="utf-8")
    assert "| `discriminator.optimizer.lr` | number | `0.0002` |" in page
    assert "| `optimizer.lr` | number | `0.001` |" in page
    for key in ("mixture.snr_db", "dit.size", "acoustic_start.power", "vae_dim"):
        assert f"| `{key}` |" in page
