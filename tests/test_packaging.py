"""What is published: version, package data, the files that build and test it elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import dasheng_tokenizer

ROOT = Path(__file__).resolve().parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


OPTIONAL = PROJECT.split("[project.optional-dependencies]")[1].split("\n[")[0]

EXTRAS = set(re.findall(r"^(\w+) = \[", OPTIONAL, re.M))


def test_one_version() -> None:
    assert f'version = "{dasheng_tokenizer.__version__}"' in PROJECT
    assert f"version: {dasheng_tokenizer.__version__}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_all_is_all_but_the_browser() -> None:
    named = re.search(r'^all = \["dasheng-tokenizer\[([\w,]+)\]"\]', OPTIONAL, re.M)
    assert named is not None
    assert set(named[1].split(",")) == EXTRAS - {"all", "browser"}


def test_the_readme_tells_what_each_extra_is_for() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.split("| extra | for |")[1].split("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.M)) == EXTRAS


def test_every_extra_that_a_message_names_exists() -> None:
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    named = set(re.findall(r'require_extra\("[\w.]+", "(\w+)"\)', sources))
    assert named and named <= EXTRAS


@pytest.mark.parametrize("name", ["tests", "release"])
def test_workflows_call_what_there_is(name: str) -> None:
    text = (ROOT / ".github" / "workflows" / f"{name}.yml").read_text(encoding="utf-8")
    flow = yaml.safe_load(text)
    assert set(flow) >= {"name", "jobs", "permissions"} and True in flow  # `on` is a boolean in YAML 1.1
    targets = set(re.findall(r"run: make (\w+)", text))
    assert targets <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert (ROOT / ".ci" / "run").exists() and ".ci/run" in text


def test_supported_pythons_are_those_that_are_tested() -> None:
    flow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))
    tested = {*flow["jobs"]["newest"]["strategy"]["matrix"]["python"], "3.11"}
    assert tested == set(re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT))


def test_the_image_copies_what_the_package_needs() -> None:
    docker = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = {word for line in re.findall(r"^COPY (.+) \S+$", docker, re.M) for word in line.split()}
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == kept and all((ROOT / name).exists() for name in copied)
    wanted = re.search(r'"\.\[([\w,]+)\]"', docker)
    assert wanted is not None and set(wanted[1].split(",")) <= EXTRAS


def test_the_wheel_holds_weights_clips_and_types(tmp_path: Path) -> None:
    """Built without a network by the build backend itself; skipped where that is not installed."""
    pytest.importorskip("hatchling", reason="needs hatchling, which pip fetches when it builds")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 100e6  # the package index takes no more
    names = set(zipfile.ZipFile(wheel).namelist())
    there = {
        str(path.relative_to(ROOT / "src"))
        for path in (ROOT / "src" / "dasheng_tokenizer").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert there <= names
    assert {"dasheng_tokenizer/py.typed", "dasheng_tokenizer/embedded/default/config.json"} <= names


# ---------------------------------------------------------------------- import

HEAVY = ("torch", "transformers", "numpy", "soundfile", "soxr", "matplotlib", "scipy", "gradio", "lightning_fabric")

IMPORTS = (  # each in a process of its own; then the Auto classes must know the package
    "import dasheng_tokenizer; from transformers import AutoConfig, AutoFeatureExtractor, AutoModel",
    "from transformers import AutoConfig, AutoFeatureExtractor, AutoModel; import dasheng_tokenizer",
    "import dasheng_tokenizer; from transformers import pipeline, AutoConfig, AutoFeatureExtractor, AutoModel",
    "import dasheng_tokenizer.feature_extraction; from transformers import AutoConfig, AutoFeatureExtractor, AutoModel",
)


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=300).stdout


def test_the_package_and_its_command_line_import_nothing_heavy() -> None:
    code = (
        "import sys, dasheng_tokenizer, dasheng_tokenizer.cli as cli; cli.build_parser().format_help()\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    assert run(code).strip() == "[]"


@pytest.mark.parametrize("imports", IMPORTS)
def test_auto_classes_know_the_package_in_any_order_of_imports(imports: str) -> None:
    folder = ROOT / "src" / "dasheng_tokenizer" / "embedded" / "default"
    code = (
        f"{imports}\n"
        f"config = AutoConfig.from_pretrained({str(folder)!r})\n"
        f"print(type(config).__name__, type(AutoFeatureExtractor.from_pretrained({str(folder)!r})).__name__)\n"
        "import torch\n"
        "with torch.device('meta'): print(type(AutoModel.from_config(config)).__name__)"
    )
    assert run(code).split() == [
        "DashengTokenizerConfig", "DashengTokenizerFeatureExtractor", "DashengTokenizerModel",
    ]  # fmt: skip


def test_every_public_name_can_be_imported() -> None:
    for name in dasheng_tokenizer.__all__:
        assert getattr(dasheng_tokenizer, name).__name__ == name
        assert name in dir(dasheng_tokenizer)
    with pytest.raises(AttributeError, match="no attribute 'Tokens'"):
        _ = dasheng_tokenizer.Tokens
