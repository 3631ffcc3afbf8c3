"""Runs the original package xares 0.1.3 on a tokenizer, also where torchaudio is not installed.

    python -m dasheng_tokenizer.evaluation.xares_launcher default tasks/esc50_task.py
    python -m dasheng_tokenizer.evaluation.xares_launcher my_encoder.py 'tasks/*_task.py' --from-stage 1

Run it in the folder that holds `env/` (the original makes it and downloads what `env/NAME/.audio_tar_ready` does not
mark as present). `default` is `xares_encoder.py` beside this file. Model and representation come from the variables
DASHENG_TOKENIZER_MODEL and DASHENG_TOKENIZER_REPRESENTATION. All further arguments are those of `python -m xares.run`;
without `--max-jobs` it runs in one process, which is what the CPU needs.

To install: `pip install --no-deps xares==0.1.3`, then `pip install jiwer loguru pandas pytorch-ignite scikit-learn
webdataset`; with its dependencies it would bring torchaudio and with that a second torch.
"""

from __future__ import annotations

import glob
import importlib
import importlib.machinery
import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dasheng_tokenizer.audio import load_audio, resample
from dasheng_tokenizer.errors import ConfigurationError, DashengTokenizerError, MissingExtraError

DEFAULT_ENCODER = "dasheng_tokenizer/evaluation/xares_encoder.py"

_INSTALL = (
    "install it with: pip install --no-deps xares==0.1.3, then "
    "pip install jiwer loguru pandas pytorch-ignite scikit-learn webdataset"
)


def install_torchaudio_stand_in() -> bool:
    """Put a module in the place of torchaudio that has what xares calls: `load` and `functional.resample`.

    Files are read by libsndfile and resampled by soxr, so samples differ from torchaudio's by less than its filter's
    ripple.

    Returns:
        Whether it was needed; False where torchaudio is installed or a stand-in is already there.
    """
    if "torchaudio" in sys.modules or importlib.util.find_spec("torchaudio") is not None:
        return False
    from transformers.utils.import_utils import is_torchaudio_available

    is_torchaudio_available()  # transformers remembers the answer; after this it would take the stand-in for the whole
    module, functional = (_empty_module(name) for name in ("torchaudio", "torchaudio.functional"))
    module.__dict__.update(load=_load, functional=functional)
    functional.__dict__["resample"] = _resample
    sys.modules.update({"torchaudio": module, "torchaudio.functional": functional})
    return True


def _empty_module(name: str) -> ModuleType:
    module = ModuleType(name, "Stand-in by dasheng_tokenizer.")
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)  # without it importlib.util.find_spec raises
    return module


def _load(path: str) -> tuple[Tensor, int]:
    audio, rate = load_audio(path)  # (channels, samples)
    return torch.from_numpy(audio), rate


def _resample(waveform: Tensor, orig_freq: int, new_freq: int) -> Tensor:
    return torch.from_numpy(resample(waveform.numpy(), int(orig_freq), int(new_freq)))


def launch(arguments: Sequence[str]) -> int:
    """Run the original in this process.

    Args:
        arguments: encoder file or `default`, task files, options of the original.

    Returns:
        0 done; 1 the original reported an error, after which it would itself end as if all were well.

    Raises:
        MissingExtraError: xares or one of its dependencies is missing.
        ConfigurationError: no arguments, a pattern that matches no task, or several jobs without torchaudio.
    """
    prepared = _prepare(arguments)
    for name in ("xares", "loguru", "ignite", "pandas", "jiwer", "sklearn", "webdataset"):
        if importlib.util.find_spec(name) is None:
            raise MissingExtraError(f"{name} is needed for running xares but is not installed; {_INSTALL}")
    install_torchaudio_stand_in()
    jobs = _jobs(prepared)
    if jobs is None:
        prepared += ["--max-jobs", "0"]
    elif jobs != "0" and getattr(sys.modules.get("torchaudio"), "load", None) is _load:
        raise ConfigurationError(
            f"--max-jobs {jobs} starts processes that need torchaudio itself; install it, or leave --max-jobs out"
        )
    return _run(prepared)


def _run(arguments: list[str]) -> int:
    logger = importlib.import_module("loguru").logger
    errors: list[str] = []

    def note(record: Any) -> None:
        if record["level"].name == "ERROR":
            errors.append(record["message"])

    logger.configure(patcher=note)
    kept = sys.argv
    sys.argv = ["xares.run", *arguments]
    try:
        runpy.run_module("xares.run", run_name="__main__", alter_sys=True)
    finally:
        sys.argv = kept
        logger.configure(patcher=lambda record: None)
    return 1 if errors else 0


def _prepare(arguments: Sequence[str]) -> list[str]:
    """Paths as the original can import them: relative to a folder of `sys.path`, patterns expanded."""
    if len(arguments) < 2:
        raise ConfigurationError(
            "give an encoder file (or `default`) and task files, for example: default tasks/esc50_task.py"
        )
    encoder, *rest = arguments
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    prepared = [DEFAULT_ENCODER if encoder == "default" else _importable(encoder)]
    for argument in rest:
        prepared += _expand(argument) if "*" in argument else [_importable(argument)]
    return prepared


def _importable(argument: str) -> str:
    path = Path(argument)
    if path.suffix != ".py" or not path.is_absolute():
        return argument
    if not path.is_file():
        raise ConfigurationError(f"{path} does not exist; give a file with an encoder or a task")
    sys.path.insert(0, str(path.parent))
    return path.name


def _expand(pattern: str) -> list[str]:
    """Files here, or else tasks that come with xares (its top-level package `tasks`)."""
    found = sorted(glob.glob(pattern))
    spec = importlib.util.find_spec("tasks")
    for folder in (spec.submodule_search_locations or []) if spec and not found else []:
        root = Path(folder).parent
        found = sorted(path.relative_to(root).as_posix() for path in root.glob(pattern))
    if not found:
        raise ConfigurationError(f"{pattern} matches no task, neither here nor among those that come with xares")
    return [_importable(name) for name in found]


def _jobs(arguments: Sequence[str]) -> str | None:
    for index, argument in enumerate(arguments):
        if argument.startswith("--max-jobs"):
            return argument.partition("=")[2] or "".join(arguments[index + 1 : index + 2])
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module. Exit 2: wrong usage."""
    try:
        return launch(sys.argv[1:] if arguments is None else arguments)
    except DashengTokenizerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
