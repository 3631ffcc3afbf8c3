"""What reads each kind of input, and what must hold afterwards."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dasheng_tokenizer.cli import main
from dasheng_tokenizer.errors import DashengTokenizerError
from dasheng_tokenizer.files import is_partial
from fuzz import mutators
from fuzz.mutators import Mutator


class Finding(Exception):
    """Something that must not happen."""


@dataclass(frozen=True)
class Case:
    """A spoilt copy of a seed.

    Attributes:
        folder: the copy.
        path: the file in it that was changed.
        out: folder for outputs.
        seeds: the folder of all seeds, none of them changed.
        rng: for choices of the target.
    """

    folder: Path
    path: Path
    out: Path
    seeds: Path
    rng: random.Random


Target = Callable[[Case], None]


def command(*arguments: object) -> None:
    """Run the command line in this process; anything but an exit code with one line an error is a finding."""
    argv = [str(argument) for argument in arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    said = err.getvalue()
    for text in (out.getvalue(), said):
        text.encode()  # a terminal takes UTF-8; halves of characters would end the program
    lines = [line for line in said.splitlines() if line.strip()]
    if code not in (0, 1, 2):
        raise Finding(f"exit code {code} of {argv[0]}: {said[-500:]}")
    if "Traceback" in said:
        raise Finding(f"traceback of {argv[0]}: {said[-2500:]}")
    if code and not any(line.startswith(("error:", "usage:")) for line in lines):
        raise Finding(f"exit code {code} of {argv[0]} without an error: {said[-500:]}")
    odd = [line for line in lines if not line.startswith(("error:", "warning:", "usage:", "dasheng-tokenizer"))]
    odd = [line for line in odd if "%|" not in line and "it/s" not in line]  # progress bars
    if odd:
        raise Finding(f"{argv[0]} says on more than one line: {odd[0][:300]!r} in {said[-1000:]!r}")
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f]", said):
        raise Finding(f"{argv[0]} prints control characters: {said[-300:]!r}")


def foreseen(call: Callable[[], object]) -> None:
    """A call may succeed or raise an error of `errors.py` with a message of one line."""
    try:
        call()
    except DashengTokenizerError as error:
        if "\n" in str(error) or not str(error):
            raise Finding(f"{type(error).__name__} with a message of {str(error).count(chr(10)) + 1} lines") from error


def check_outputs(case: Case) -> None:
    """Whatever is there must be whole, and nothing temporary may remain."""
    from dasheng_tokenizer.audio import load_audio
    from dasheng_tokenizer.token_file import AudioTokens

    for path in (*case.out.rglob("*"), *case.folder.rglob("*")):
        if is_partial(path):
            raise Finding(f"left behind: {path.name}")
    for path in (path for path in case.out.rglob("*") if path.is_file()):
        if path.name.endswith(".tokens.safetensors"):
            AudioTokens.load(path)
        elif path.suffix in (".wav", ".flac"):
            load_audio(path)
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))


# ---------------------------------------------------------------------- targets


def audio(case: Case) -> None:
    from dasheng_tokenizer.audio import AudioReader, load_audio

    def blocks() -> None:
        for block in AudioReader(case.path).blocks(case.rng.choice([1000, None])):
            assert len(block)

    choice = case.rng.random()
    if choice < 0.4:
        foreseen(lambda: load_audio(case.path))
    elif choice < 0.5:
        foreseen(lambda: load_audio(io.BytesIO(case.path.read_bytes())))
    elif choice < 0.65:
        foreseen(blocks)
    elif choice < 0.9:
        command("encode", case.path, "-o", case.out, "--model", case.seeds / "tokenizer")
    else:
        command("enhance", case.path, "-o", case.out, "--model", case.seeds / "denoiser")


def tokens(case: Case) -> None:
    from dasheng_tokenizer.token_file import AudioTokens
    from dasheng_tokenizer.token_stream import TokenReader

    choice = case.rng.random()
    if choice < 0.3:
        foreseen(lambda: AudioTokens.load(case.path))
    elif choice < 0.5:
        foreseen(lambda: TokenReader(case.path).latents[:, 1:3])
    elif choice < 0.6:
        command("info", case.path)
    else:
        force = ["--force"] if case.rng.random() < 0.7 else []
        command("decode", case.path, "-o", case.out, "--model", case.seeds / "tokenizer", *force)


def model(case: Case) -> None:
    from dasheng_tokenizer.feature_extraction import DashengTokenizerFeatureExtractor

    if case.path.name == "preprocessor_config.json" and case.rng.random() < 0.3:
        with contextlib.suppress(OSError, ValueError):  # the reader is that of transformers
            DashengTokenizerFeatureExtractor.from_pretrained(case.folder)
    if case.rng.random() < 0.7:
        command("info", case.folder)
    else:
        command("encode", case.seeds / "audio" / "clip.wav", "-o", case.out, "--model", case.folder)


def frozen(case: Case) -> None:
    from dasheng_tokenizer.checkpoints import new_tokenizer

    sizes = {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_intermediate_size": 48}
    foreseen(lambda: new_tokenizer(case.folder, **sizes))


def generator(case: Case) -> None:
    command("generate", "a dog barks", "-o", case.out, "--model", case.folder, "--steps", 1, "--seconds", 0.4)


def sibling(case: Case) -> None:
    from dasheng_tokenizer.generation.audiogen import AudioGen

    foreseen(lambda: AudioGen.from_pretrained(case.folder))


def denoiser(case: Case) -> None:
    command("enhance", case.seeds / "audio" / "clip.wav", "-o", case.out, "--model", case.folder)


def text(case: Case) -> None:
    from dasheng_tokenizer.generation.text_encoders import load_text_encoder

    foreseen(lambda: load_text_encoder(case.folder)(["a dog barks"]))


def shards(case: Case) -> None:
    from dasheng_tokenizer.training.clips import read_clips

    if case.rng.random() < 0.6:
        foreseen(lambda: list(read_clips([case.folder])))
    else:
        command("encode-dataset", case.folder, case.out / "latents", "--model", case.seeds / "tokenizer")


def latents(case: Case) -> None:
    from dasheng_tokenizer.generation import LatentDataset

    def read() -> None:
        data = LatentDataset(case.folder)
        for number in range(min(len(data), 10)):
            item = data[number]
            assert item.captions and isinstance(item.labels, dict) and isinstance(item.key, str)

    if case.rng.random() < 0.6:
        foreseen(read)
    else:  # going on with a data set that is damaged
        if case.rng.random() < 0.5 and case.path.name != "index.json":
            (case.folder / "index.json").unlink()
        command("encode-dataset", case.seeds / "shards", case.folder, "--model", case.seeds / "tokenizer")


def recipes(case: Case) -> None:
    from dasheng_tokenizer.training import load_any_recipe

    overrides = []
    if case.rng.random() < 0.3:
        overrides = [case.rng.choice(["steps", "data.batch_size", "model", "optimizer.betas", "a.b.c", "", "."])]
        overrides[0] += "=" + case.rng.choice([*mutators.SCALARS, *mutators.YAML])
    foreseen(lambda: load_any_recipe(case.path, overrides))


def requests(case: Case) -> None:
    from dasheng_tokenizer.cli_generate_requests import read_requests

    if case.rng.random() < 0.7:
        foreseen(lambda: [request.stem for request in read_requests(case.path)])
        return
    options = ["-o", case.out, "--model", case.seeds / "generator", "--steps", 1]
    command("generate", "--from-file", case.path, *options)


def manifest(case: Case) -> None:
    from dasheng_tokenizer.evaluation.generation_clips import ClipSet
    from dasheng_tokenizer.reconstruction_report import Report

    if case.path.name == "metrics.json":

        def go_on() -> None:
            report = Report.open(case.folder)
            report.add({"file": "y.wav", "stoi": 0.5, "mel_distance": 1.0})
            report.table()

        foreseen(go_on)
    else:
        foreseen(lambda: [(facts.text, facts.label("event")) for facts in ClipSet("a", [case.folder]).clips.values()])


def clip_list(case: Case) -> None:
    """A manifest of `encode-dataset`, and going on with a data set whose manifest changed."""
    options = [case.out / "latents", "--model", case.seeds / "tokenizer"]
    if case.rng.random() < 0.2:
        options += ["--path-key", case.rng.choice(["path", "audio", "id", "nothing"])]
    command("encode-dataset", case.path, *options)


def rows(case: Case) -> None:
    """Rows that an evaluation of reconstructions kept, from which its tables are made."""
    from dasheng_tokenizer.evaluation.metric_columns import require_metrics
    from dasheng_tokenizer.evaluation.reconstruction import Outcome, RowStore
    from dasheng_tokenizer.evaluation.reconstruction_inputs import System
    from dasheng_tokenizer.evaluation.reconstruction_tables import Tables

    metrics = require_metrics(["stoi", "mel"])

    def go_on() -> None:
        store = RowStore(case.path)
        store.add("z", dict(ROW, file="z.wav"))
        tables = Tables(Outcome([System(name) for name in ("a", "b")], metrics, list(store.rows.values()), {}))
        tables.save(case.out)
        tables.report("title", "command", "data").markdown()

    foreseen(go_on)


ROW = {
    "system": "a", "file": "x.wav", "domain": "speech", "seconds": 1.0, "bits": None, "cut_samples": 0,
    "stoi": 0.5, "mel_distance": 0.2, "missing": {}, "error": None,
}  # fmt: skip


def pairs(case: Case) -> None:
    """Noisy and clean recordings with their log and texts."""
    from dasheng_tokenizer.evaluation.enhancement_pairs import PairSet

    def read() -> None:
        found = PairSet(case.folder / "noisy", case.folder / "clean", case.folder / "log.txt", case.folder / "texts")
        for example in found.examples():
            assert len(example.noisy) == len(example.clean)
        for _, noise in found.without_speech():
            assert len(noise)

    foreseen(read)


def page(case: Case) -> None:
    """What the demo page does with an uploaded file."""
    from dasheng_tokenizer.cli_audio import load_model
    from dasheng_tokenizer.demo.workbench import Workbench
    from dasheng_tokenizer.enhancement import Enhancer

    bench = Workbench(load_model(str(case.seeds / "tokenizer"), "cpu", None), max_seconds=2.0)
    bench.enhancer = Enhancer.from_pretrained(case.seeds / "denoiser")

    def visit() -> None:
        clip = bench.read(case.path)
        assert bench.reconstruct(clip).clip.audio.shape == clip.audio.shape
        assert bench.enhance(clip).audio.shape == clip.audio.shape
        bench.similarities(bench.embed(clip))

    foreseen(visit)


@dataclass(frozen=True)
class Kind:
    """A kind of input: the folder of its seeds, what is changed there and how, who reads it, and its share."""

    seeds: str
    mutations: dict[str, Mutator]  # glob → mutator
    target: Target
    share: int


_MODEL = {"*.json": mutators.damage_json, "*.safetensors": mutators.damage_safetensors}
_LATENTS = {**_MODEL, "*.jsonl": mutators.damage_lines}

KINDS: dict[str, Kind] = {
    "audio": Kind("audio", {"*": mutators.damage}, audio, 8),
    "tokens": Kind("tokens", {"*": mutators.damage_safetensors}, tokens, 4),
    "tokenizer": Kind("tokenizer", _MODEL, model, 3),
    "tokenizer on Whisper": Kind("whisper-tokenizer", _MODEL, model, 2),
    "tokenizer on WavLM": Kind("wave-tokenizer", _MODEL, model, 1),
    "frozen encoder": Kind("frozen", _MODEL, frozen, 2),
    "generator": Kind("generator", _MODEL, generator, 2),
    "published generator": Kind("sibling", _MODEL, sibling, 1),
    "enhancer": Kind("denoiser", _MODEL, denoiser, 2),
    "text encoder": Kind("text", _MODEL, text, 2),
    "tar shard": Kind("shards", {"*.tar": mutators.damage_tar}, shards, 4),
    "folder of latents": Kind("latents", _LATENTS, latents, 3),
    "recipe": Kind("recipes", {"*.yaml": mutators.damage_yaml}, recipes, 3),
    "requests": Kind("requests", {"*.jsonl": mutators.damage_lines, "*.txt": mutators.damage}, requests, 2),
    "manifest and table": Kind(
        "manifest", {"*.jsonl": mutators.damage_lines, "metrics.json": mutators.damage_json}, manifest, 1
    ),
    "list of clips": Kind("clip-list", {"*.jsonl": mutators.damage_lines, "*.parquet": mutators.damage}, clip_list, 2),
    "rows of an evaluation": Kind("rows", {"*.jsonl": mutators.damage_lines}, rows, 1),
    "pairs with a log": Kind("pairs", {"*.txt": mutators.damage, "*.wav": mutators.damage}, pairs, 1),
    "upload": Kind("audio", {"*": mutators.damage}, page, 1),
}
ORDER = [name for step in range(8) for name, kind in KINDS.items() if step < kind.share]


def kind_of(index: int) -> str:
    """Kinds take turns by their shares."""
    return ORDER[index % len(ORDER)]


def make_case(seeds: Path, work: Path, seed: int, index: int) -> Case:
    """The input of that number; the same for the same seed."""
    rng = random.Random(f"{seed}/{index}")
    kind = KINDS[kind_of(index)]
    files = sorted((seeds / kind.seeds).rglob("*"))
    choices = [(path, mutate) for glob, mutate in kind.mutations.items() for path in files if path.match(glob)]
    chosen, mutate = rng.choice([pair for pair in choices if pair[0].is_file()])
    shutil.rmtree(work, ignore_errors=True)
    folder, out = work / "case", work / "out"
    if kind.seeds in ("audio", "tokens", "recipes", "requests"):  # single files
        folder.mkdir(parents=True)
    else:
        shutil.copytree(seeds / kind.seeds, folder)
    out.mkdir()
    path = folder / chosen.relative_to(seeds / kind.seeds)
    path.write_bytes(mutate(chosen.read_bytes(), rng))
    return Case(folder, path, out, seeds, rng)


def run_case(case: Case, kind: str) -> None:
    """Raises what must not happen."""
    temporary = case.out.parent / "tmp"
    temporary.mkdir()
    os.environ["TMPDIR"] = str(temporary)
    import tempfile

    tempfile.tempdir = None
    KINDS[kind].target(case)
    check_outputs(case)
    if left := list(temporary.iterdir()):
        raise Finding(f"temporary files left: {left[0].name}")
