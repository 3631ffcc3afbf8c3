"""Altered copies of real clips, from which a judge of generated clips learns."""

from __future__ import annotations

import importlib
import io
import json
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile

from dasheng_tokenizer import DashengTokenizerModel, load_audio

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    return importlib.import_module("judge_copies")


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """Two clips, the second without a label that a judge could learn."""
    path = tmp_path / "sound.tar"
    with tarfile.open(path, "w") as tar:
        for name, labels in (("hit", {"drum": "snare", "event": None}), ("other", {"drum": None})):
            audio = io.BytesIO()
            time = np.arange(8_000) / 16_000
            soundfile.write(audio, 0.5 * np.sin(2 * np.pi * 440 * time) * np.exp(-9 * time), 16_000, format="FLAC")
            for suffix, content in (("flac", audio.getvalue()), ("json", json.dumps({"labels": labels}).encode())):
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def test_copies_keep_labels_and_nothing_else(
    copies: ModuleType, shard: Path, tiny_model: DashengTokenizerModel, tmp_path: Path
) -> None:
    copies.write_copies(shard, tmp_path / "copies", 3, tiny_model)
    rows = [json.loads(line) for line in (tmp_path / "copies" / copies.MANIFEST).read_text().splitlines()]
    assert [row["labels"] for row in rows] == [{"drum": "snare"}] * 3
    held = [load_audio(tmp_path / "copies" / row["file"])[0][0] for row in rows]
    assert all(np.isfinite(one).all() and np.abs(one).max() > 1e-4 for one in held)
    assert len({one.tobytes() for one in held}) == 3
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "copies").iterdir()}
    copies.write_copies(shard, tmp_path / "copies", 3, tiny_model)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "copies").iterdir()}


def test_a_copy_is_a_function_of_its_seed(copies: ModuleType, tiny_model: DashengTokenizerModel) -> None:
    audio = np.sin(np.arange(12_000) / 5).astype(np.float32)
    first, again, other = (copies.altered(audio, np.random.default_rng(seed), tiny_model) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert len(other) != len(first) or np.abs(other - first).max() > 1e-3
    assert 0.8 < len(first) / len(audio) < 2.0 and np.abs(first).max() <= 1


def test_a_silent_clip_stays_finite(copies: ModuleType, tiny_model: DashengTokenizerModel) -> None:
    for seed in range(6):
        assert np.isfinite(copies.altered(np.zeros(8_000, np.float32), np.random.default_rng(seed), tiny_model)).all()
