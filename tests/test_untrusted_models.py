"""Models from strangers: nothing is unpickled and no code of theirs runs, from a folder or from the hub's cache."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel

from conftest import tiny
from dasheng_tokenizer import DashengTokenizerModel
from dasheng_tokenizer.checkpoints import new_tokenizer, semantic_settings
from dasheng_tokenizer.enhancement import Enhancer
from dasheng_tokenizer.errors import CheckpointError, DashengTokenizerError
from dasheng_tokenizer.generation.audiogen import AudioGen
from dasheng_tokenizer.generation.generator import Generator
from dasheng_tokenizer.generation.text_encoders import load_text_encoder
from fuzz.seeds import make_seeds

pytestmark = pytest.mark.usefixtures("one_thread")

PICKLES = (
    *("pytorch_model.bin", "pytorch_model-00001-of-00001.bin", "model.pt", "model.pth", "model.pkl", "model.ckpt"),
    *("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.bin", "tokenizer.pkl"),
    *("tf_model.h5", "flax_model.msgpack", "weights.npy", "weights.joblib", "preprocessor.pkl"),
)

Loader = Callable[[str], Any]

SMALL = {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_intermediate_size": 48}

LOADERS: dict[str, tuple[str, Loader]] = {
    "tokenizer": ("tokenizer", DashengTokenizerModel.from_pretrained),
    "tokenizer on Whisper": ("whisper-tokenizer", DashengTokenizerModel.from_pretrained),
    "tokenizer on WavLM": ("wave-tokenizer", DashengTokenizerModel.from_pretrained),
    "AutoModel": ("tokenizer", AutoModel.from_pretrained),
    "AutoConfig": ("tokenizer", AutoConfig.from_pretrained),
    "AutoFeatureExtractor": ("tokenizer", AutoFeatureExtractor.from_pretrained),
    "text encoder": ("text", load_text_encoder),
    "generator": ("generator", Generator.from_pretrained),
    "published generator": ("sibling", AudioGen.from_pretrained),
    "enhancer": ("denoiser", lambda name: Enhancer.from_pretrained(name, device="cpu")),
    "frozen encoder": ("frozen", lambda name: new_tokenizer(name, **SMALL)),
}
ON_THE_HUB = [name for name in LOADERS if name not in ("enhancer", "frozen encoder")]


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("seeds")
    make_seeds(root)
    return root


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """What hostile code would leave behind."""
    path = tmp_path / "it-ran"
    yield path
    assert not path.exists()


def plant(folder: Path, marker: Path) -> None:
    """Pickles under every name that some library loads, and code that the configurations name."""
    for name in PICKLES:
        with (folder / name).open("wb") as file:
            pickle.dump(Bomb(marker), file)
    torch.save({"x": Bomb(marker)}, folder / "pytorch_model.bin")
    index = {"metadata": {}, "weight_map": {"x": "pytorch_model-00001-of-00001.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nclass Evil: pass\n")
    classes = ("AutoConfig", "AutoModel", "AutoFeatureExtractor", "AutoProcessor", "AutoModelForTextEncoding")
    named: dict[str, Any] = {name: "evil.Evil" for name in classes} | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    for name in ("config.json", "preprocessor_config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            held = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps({**held, "auto_map": named}))


def test_the_bombs_are_armed(tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.is_dir()


@pytest.mark.parametrize("name", LOADERS)
def test_a_folder_with_bombs_loads_by_its_safetensors(name: str, seeds: Path, tmp_path: Path, marker: Path) -> None:
    seed, load = LOADERS[name]
    folder = Path(shutil.copytree(seeds / seed, tmp_path / "model"))
    plant(folder, marker)
    assert load(str(folder)) is not None


@pytest.mark.parametrize("name", [name for name in LOADERS if name not in ("AutoConfig", "AutoFeatureExtractor")])
def test_a_folder_of_bombs_alone_is_refused(name: str, seeds: Path, tmp_path: Path, marker: Path) -> None:
    seed, load = LOADERS[name]
    folder = Path(shutil.copytree(seeds / seed, tmp_path / "model"))
    plant(folder, marker)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(CheckpointError, match="only safetensors are loaded"):
        load(str(folder))


@pytest.mark.parametrize("kind", ["evil", "bert", "clip", "t5"])
def test_a_foreign_model_type_runs_no_code(kind: str, seeds: Path, tmp_path: Path, marker: Path) -> None:
    for seed, load in LOADERS.values():
        folder = Path(shutil.copytree(seeds / seed, tmp_path / f"model-{seed}", dirs_exist_ok=True))
        plant(folder, marker)
        held = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**held, "model_type": kind}))
        if load not in (AutoModel.from_pretrained, AutoConfig.from_pretrained, AutoFeatureExtractor.from_pretrained):
            try:
                load(str(folder))
            except DashengTokenizerError:
                continue


@pytest.mark.parametrize("name", ON_THE_HUB)
def test_a_hub_repository_with_bombs_loads_by_its_safetensors(
    name: str, seeds: Path, tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed, load = LOADERS[name]
    repository = tmp_path / "hub" / "models--stranger--model"
    folder = Path(shutil.copytree(seeds / seed, repository / "snapshots" / ("a" * 40)))
    plant(folder, marker)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: True, raising=False)
    assert load("stranger/model") is not None


def test_pickles_cannot_be_asked_for(tmp_path: Path, seeds: Path) -> None:
    with pytest.raises(CheckpointError, match="only safetensors"):
        DashengTokenizerModel.from_pretrained(seeds / "tokenizer", use_safetensors=False)


def test_a_pt_file_of_a_frozen_encoder_is_read_without_running_it(tmp_path: Path, marker: Path) -> None:
    torch.save({"model": {"time_pos_embed": torch.zeros(1, 4, 1, 4)}, "x": Bomb(marker)}, tmp_path / "base.pt")
    with pytest.raises(CheckpointError):
        semantic_settings(tmp_path / "base.pt")


@pytest.mark.parametrize("size", [{"embed_dim": 2_000_000_000}, {"depth": 10**9}, {"istft_n_fft": 320 * 10**8}])
def test_a_config_of_a_giant_is_refused_before_it_is_made(size: dict[str, int], tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    held = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**held, **size}))
    with pytest.raises(CheckpointError, match=next(iter(size))):
        DashengTokenizerModel.from_pretrained(tmp_path)
