"""What the documentation says is so: its Python runs, its commands parse, its links and recipe keys exist."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib.util
import re
import shlex
import shutil
import typing
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from dasheng_tokenizer import load_audio, save_audio
from dasheng_tokenizer.checkpoints import embedded_default
from dasheng_tokenizer.cli import build_parser
from dasheng_tokenizer.enhancement.training_configuration import EnhancementConfig
from dasheng_tokenizer.generation.training_configuration import GeneratorTrainingConfig
from dasheng_tokenizer.training import load_any_recipe
from dasheng_tokenizer.training.configuration import LoopConfig, TrainingConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
CLIPS = ROOT / "src" / "dasheng_tokenizer" / "embedded" / "clips"
NEEDS_NETWORK = "<!-- needs network -->"
FENCE = re.compile(r"^(?P<before>[^\n]*)\n```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `line` is that of its first line of code."""

    page: Path
    line: int
    code: str
    needs_network: bool


def blocks(page: Path, language: str) -> list[Block]:
    text = "\n" + page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        if match["language"] == language:
            line = text.count("\n", 0, match.start("code"))
            found.append(Block(page, line, match["code"], match["before"].strip() == NEEDS_NETWORK))
    return found


def name(item: Path | Block) -> str:
    path = item if isinstance(item, Path) else item.page
    return str(path.relative_to(ROOT)) + (f":{item.line}" if isinstance(item, Block) else "")


def commands(block: Block) -> list[list[str]]:
    return [shlex.split(line, comments=True) for line in block.code.splitlines() if line.strip()]


def subcommands() -> set[str]:
    actions = build_parser()._actions
    return set(next(action for action in actions if isinstance(action, argparse._SubParsersAction)).choices)


PYTHON_PAGES = [page for page in PAGES if blocks(page, "python")]
PYTHON_BLOCKS = [block for page in PAGES for block in blocks(page, "python")]
SHELL_BLOCKS = [block for page in PAGES for block in blocks(page, "bash")]


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=name)
def test_the_python_of_a_page_runs_from_top_to_bottom(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (embedded_default() / "config.json").is_file():
        pytest.skip("the embedded default is not in the package: no embedded/default/config.json")
    for clip in CLIPS.glob("*.flac"):
        shutil.copy(clip, tmp_path)
    song, rate = load_audio(CLIPS / "music.flac")
    # Half as loud: a decoder makes its own phases, and peaks near full scale go beyond it, with a warning.
    save_audio(tmp_path / "song.mp3", 0.5 * song, rate)
    save_audio(tmp_path / "noisy.wav", *load_audio(CLIPS / "speech.flac"))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}  # shared: a reader reads on
    for block in blocks(page, "python"):
        if not block.needs_network:
            # Blank lines above, so that an error names the line of the page.
            exec(compile("\n" * (block.line - 1) + block.code, name(page), "exec"), names)


@pytest.mark.parametrize("block", PYTHON_BLOCKS, ids=name)
def test_python_blocks_are_python(block: Block) -> None:
    ast.parse(block.code)


def test_blocks_are_found_with_their_lines_and_marks() -> None:
    found = blocks(ROOT / "README.md", "python")
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert [lines[block.line - 1] for block in found] == [block.code.splitlines()[0] for block in found]
    assert [block.needs_network for block in found].count(True) == 1
    fences = sum(line == "```python" for page in PAGES for line in page.read_text(encoding="utf-8").splitlines())
    assert fences == len(PYTHON_BLOCKS)


def test_the_table_of_commands_is_that_of_the_parser() -> None:
    rows = re.findall(r"^\| `dasheng-tokenizer ([\w-]+)[^`]*`", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert sorted(rows) == sorted(subcommands())


@pytest.mark.parametrize("block", SHELL_BLOCKS, ids=name)
def test_shell_lines_name_commands_options_and_targets_that_exist(block: Block) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    for words in filter(None, commands(block)):
        if words[0] == "make":
            assert set(words[1:]) <= set(targets), words
        elif "torchrun" in words[:2]:  # also behind srun
            check_command(words[words.index("dasheng_tokenizer.cli") + 1 :])
        elif words[0] == "dasheng-tokenizer":
            check_command(words[1:])
        elif words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]), f"{name(block)}: no module {words[2]}"
        elif words[0] == "python":
            source = (ROOT / words[1]).read_text(encoding="utf-8")
            options = [word for word in words[2:] if word.startswith("--")]
            assert all(f'"{option}"' in source for option in options), words
        else:
            assert words[0] in ("pip", "tensorboard") or words[0].startswith("HOST="), (
                f"{name(block)}: say here how to check {words[0]}"
            )


def check_command(words: list[str]) -> None:
    arguments = build_parser().parse_args(words)  # exits where an option does not exist
    if arguments.command == "train":
        load_any_recipe(ROOT / arguments.config, arguments.overrides)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_point_to_files(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path = (page.parent / target.partition("#")[0]).resolve()
        assert path.exists(), f"{name(page)}: {target}"
        # The site holds `docs` alone.
        assert page.parent == ROOT or path.is_relative_to(ROOT / "docs"), f"{name(page)}: {target} leaves the site"


def test_every_page_is_in_the_site() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = [page for entry in settings["nav"] for page in entry.values()]
    assert sorted(listed) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def recipe_keys(kind: type, prefix: str = "") -> set[str]:
    hints = typing.get_type_hints(kind)
    keys: set[str] = set()
    for item in dataclasses.fields(kind):
        inner = hints[item.name]
        nested = dataclasses.is_dataclass(inner) and isinstance(inner, type)
        keys |= recipe_keys(inner, f"{prefix}{item.name}.") if nested else {prefix + item.name}
    return keys


@pytest.mark.parametrize(
    ("kind", "page"),
    [
        (TrainingConfig, "training.md"),
        (GeneratorTrainingConfig, "generation.md"),
        (EnhancementConfig, "enhancement.md"),
    ],
    ids=["tokenizer", "generator", "enhancement"],
)
def test_every_recipe_key_is_documented_and_exists(kind: type, page: str) -> None:
    keys = recipe_keys(kind)
    if kind is not TrainingConfig:  # the loop's are documented once, with the tokenizer's
        keys -= recipe_keys(LoopConfig) - {"output"}
    section = (ROOT / "docs" / page).read_text(encoding="utf-8").partition("## Recipe keys")[2]
    documented = set(re.findall(r"^\| `([\w.]+)`", section.partition("\n## ")[0], re.M))
    grouped = {key for key in keys if any(key.startswith(f"{group}.") for group in documented - keys)}
    assert keys - grouped == documented & keys
    assert all(any(key.startswith(f"{group}.") for key in keys) for group in documented - keys)
