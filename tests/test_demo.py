"""The demo page: the work behind it, its endpoints over HTTP, and the page itself in a browser where there is one."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from dasheng_tokenizer import DashengTokenizerModel
from dasheng_tokenizer.audio import load_audio
from dasheng_tokenizer.cli import main
from dasheng_tokenizer.demo import Workbench
from dasheng_tokenizer.demo.pictures import latent_picture, similarity_picture, spectrograms
from dasheng_tokenizer.demo.workbench import bundled_clips
from dasheng_tokenizer.enhancement import Denoiser, DenoiserConfig, DenoiserInfo, Enhancer
from dasheng_tokenizer.errors import AudioError, AudioFileError, CheckpointError, DashengTokenizerError
from dasheng_tokenizer.generation import TextToAudioPipeline

pytestmark = pytest.mark.usefixtures("one_thread")

SPEECH = next(path for path in bundled_clips() if path.name == "speech.flac")
SPACE = Path(__file__).resolve().parents[1] / "space"


@pytest.fixture(scope="module")
def bench(tokenizer_folder: Path, pipeline: TextToAudioPipeline) -> Workbench:
    tokenizer: DashengTokenizerModel = DashengTokenizerModel.from_pretrained(tokenizer_folder).eval()
    width = tokenizer.latent_dim
    info = DenoiserInfo(tokenizer.weights_hash(), str(tokenizer_folder), window_seconds=0.64)
    denoiser = Denoiser(DenoiserConfig(width, depth=1, heads=2), info, *([torch.zeros(width), torch.ones(width)] * 2))
    return Workbench(tokenizer, Enhancer(denoiser, tokenizer), pipeline, max_seconds=20)


def wav(path: Path, seconds: float, rate: int = 16_000, channels: int = 1) -> Path:
    audio = 0.1 * np.random.default_rng(0).standard_normal((round(seconds * rate), channels))
    soundfile.write(path, audio, rate)
    return path


# ---------------------------------------------------------------------- the work behind the page


def test_a_clip_comes_back_as_long_at_its_rate_with_its_channels(bench: Workbench, tmp_path: Path) -> None:
    clip = bench.read(wav(tmp_path / "stereo.wav", 1.23456, 44_100, 2))
    made = bench.reconstruct(clip)
    assert made.clip.audio.shape == clip.audio.shape == (2, round(1.23456 * 44_100))
    assert made.clip.sampling_rate == 44_100
    assert made.tokens.latents.shape == (2, 31, bench.tokenizer.latent_dim)
    assert made.figures["mel_distance"] > 0
    assert bench.enhance(clip).audio.shape == clip.audio.shape


def test_parts_add_up_and_moments_are_like_themselves(bench: Workbench) -> None:
    held = bench.embed(bench.read(SPEECH))
    torch.testing.assert_close(held["unified"], held["semantic"] + held["acoustic"], atol=1e-4, rtol=1e-4)
    for square in bench.similarities(held).values():
        assert square.shape == (135, 135)
        torch.testing.assert_close(square.diagonal(), torch.ones(135))
        torch.testing.assert_close(square, square.T)


def test_the_nearest_bundled_clip_of_a_bundled_clip_is_itself() -> None:
    bench = Workbench(DashengTokenizerModel.from_pretrained().eval())
    found = bench.nearest(bench.embed(bench.read(SPEECH)))
    assert len(found) == len(bundled_clips()) == len({name for name, _ in found})
    assert found[0][0] == "speech" and found[0][1]["unified"] == pytest.approx(1, abs=1e-4)
    assert {name for name, _ in found[1:4]} <= {path.stem for path in bundled_clips() if "speech" in path.stem}
    values = [row["unified"] for _, row in found]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda path: None, AudioError, "there is no clip yet"),
        (lambda path: wav(path / "long.wav", 20.5), AudioError, "lasts 20 s; the page takes up to 20 s"),
        (lambda path: wav(path / "quad.wav", 0.1, channels=4), AudioError, "4 channels"),
        (lambda path: (path / "text.wav").write_text("no audio") and path / "text.wav", AudioFileError, "text.wav"),
        (lambda path: path / "absent.wav", AudioFileError, "absent.wav"),
    ],
)
def test_bad_clips_are_named(bench: Workbench, tmp_path: Path, make, error: type[Exception], says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=says):
        bench.read(make(tmp_path))


def test_a_page_without_enhancer_and_generator_says_so() -> None:
    bench = Workbench(DashengTokenizerModel.from_pretrained().eval())
    with pytest.raises(DashengTokenizerError, match="no enhancer"):
        bench.enhance(bench.read(SPEECH))
    with pytest.raises(DashengTokenizerError, match="no generator"):
        bench.generate("a bell", 1, 4, 3, 0)


def test_a_model_that_was_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        Workbench.load(enhancer=tmp_path / "none", device="cpu")
    with pytest.raises(CheckpointError):
        Workbench.load(generator=tmp_path / "none", device="cpu")


def test_pictures_draw(bench: Workbench) -> None:
    clip = bench.read(SPEECH)
    held = bench.embed(clip)
    figures = (
        spectrograms({"one $": clip, "two": clip}),
        latent_picture(held["unified"], 25.0),
        similarity_picture({str(part): square for part, square in bench.similarities(held).items()}, 25.0),
        latent_picture(torch.zeros(1, 4), 25.0),
    )
    assert [len(figure.axes) for figure in figures] == [4, 2, 4, 2]  # colour bars are axes too


# ---------------------------------------------------------------------- over HTTP


@pytest.fixture(scope="module")
def address(bench: Workbench) -> Iterator[str]:
    if not importlib.util.find_spec("gradio"):
        pytest.skip("needs the extra demo")
    from dasheng_tokenizer.demo import launch_page

    before = os.environ.get("GRADIO_TEMP_DIR")
    page = launch_page(bench, port=None, block=False)
    scratch = Path(page.scratch.name)  # type: ignore[attr-defined]
    assert page.local_url.startswith("http://127.0.0.1:")
    yield page.local_url
    page.close()
    page.scratch.cleanup()  # type: ignore[attr-defined]
    assert not scratch.exists()
    os.environ.pop("GRADIO_TEMP_DIR")
    if before is not None:
        os.environ["GRADIO_TEMP_DIR"] = before


@pytest.fixture
def client(address: str, tmp_path: Path):  # type: ignore[no-untyped-def]
    from gradio_client import Client

    return Client(address, verbose=False, analytics_enabled=False, download_files=str(tmp_path / "downloads"))


def test_every_tab_answers(client, bench: Workbench) -> None:  # type: ignore[no-untyped-def]
    from gradio_client import handle_file

    player, table, spectra, latent = client.predict(handle_file(str(SPEECH)), api_name="/reconstruct")
    audio, rate = load_audio(player)
    assert (rate, audio.shape) == (16_000, (1, 85_792))
    expected = bench.reconstruct(bench.read(SPEECH)).clip.audio
    np.testing.assert_allclose(audio, expected.clip(-1, 1), atol=1e-4)  # its own level, not that of its peak
    assert "135 a channel, 25 a second" in table and "85792 samples" in table
    assert spectra["plot"].startswith("data:image/") and latent["plot"].startswith("data:image/")
    squares, rows = client.predict(handle_file(str(SPEECH)), api_name="/compare")
    assert squares["plot"].startswith("data:image/")
    assert rows["headers"] == ["bundled clip", "unified", "semantic", "acoustic"]
    assert len(rows["data"]) == len(bundled_clips())
    player, spectra = client.predict(handle_file(str(SPEECH)), api_name="/enhance")
    assert load_audio(player)[0].shape == (1, 85_792)
    player, spectra = client.predict("a loud bell", 0.4, 4, 3, 1, api_name="/generate")
    assert load_audio(player)[0].shape == (1, 6_400)


def test_bad_input_is_a_message_without_folders(client, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    (tmp_path / "<b>notes.wav").write_text("not audio at all")
    with pytest.raises(AppError, match="notes.wav is not audio") as told:
        client.predict(handle_file(str(tmp_path / "<b>notes.wav")), api_name="/reconstruct")
    assert "/" not in str(told.value).split(" is not audio")[0] and "<b>" not in str(told.value)
    with pytest.raises(AppError, match="there is no clip yet"):
        client.predict(None, api_name="/enhance")
    with pytest.raises(AppError, match="empty"):
        client.predict("   ", 0.4, 4, 3, 1, api_name="/generate")
    with pytest.raises(AppError, match="lasts 2[0-9] s"):
        client.predict(handle_file(str(wav(tmp_path / "long.wav", 21))), api_name="/compare")


def test_visitors_do_not_meet(address: str, bench: Workbench, tmp_path: Path) -> None:
    from gradio_client import Client, handle_file

    def visit(seconds: float) -> int:
        client = Client(address, verbose=False, analytics_enabled=False, download_files=str(tmp_path / f"{seconds}"))
        clip = wav(tmp_path / f"{seconds}.wav", seconds)
        return int(load_audio(client.predict(handle_file(str(clip)), api_name="/reconstruct")[0])[0].shape[1])

    lengths = (0.5, 0.75, 1.0, 1.25, 1.5)
    with ThreadPoolExecutor(len(lengths)) as pool:
        assert list(pool.map(visit, lengths)) == [round(seconds * 16_000) for seconds in lengths]


def test_old_files_of_visitors_are_swept(bench: Workbench) -> None:
    pytest.importorskip("gradio", reason="needs the extra demo")
    from dasheng_tokenizer.demo.page import KEPT_SECONDS, SWEEP_SECONDS, build_page

    assert build_page(bench).delete_cache == (SWEEP_SECONDS, KEPT_SECONDS)


# ---------------------------------------------------------------------- the command, and a Space


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--port", "70000"], "port 70000"),
        (["--max-seconds", "0"], "--max-seconds 0"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_wrong_usage_of_the_command(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gradio", reason="needs the extra demo")
    assert main(["demo", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_a_taken_port_is_named(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gradio", reason="needs the extra demo")
    monkeypatch.setattr(Workbench, "load", lambda *named: bench)
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["demo", "--port", str(port)]) == 2
    assert f"127.0.0.1:{port}" in (told := capsys.readouterr().err) and "--port" in told
    assert not Path(os.environ["GRADIO_TEMP_DIR"]).exists()


def test_the_space_is_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """`app.py` as a Space runs it, less the server; its card and requirements name what is there."""
    gradio = pytest.importorskip("gradio", reason="needs the extra demo")
    launched: list[object] = []
    monkeypatch.setattr(gradio.Blocks, "launch", lambda page, **settings: launched.append(page))
    source = (SPACE / "app.py").read_text(encoding="utf-8")
    exec(compile(source, str(SPACE / "app.py"), "exec"), {"__name__": "__main__"})
    assert len(launched) == 1
    card = (SPACE / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n") and "sdk: gradio" in card and "app_file: app.py" in card
    assert "dasheng-tokenizer[demo]" in (SPACE / "requirements.txt").read_text(encoding="utf-8")


# ---------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def chromium() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None or not importlib.util.find_spec("playwright"):
        pytest.skip("needs Chromium on the path and `pip install playwright`")
    return found


def test_in_a_browser(chromium: str, address: str, tmp_path: Path) -> None:
    """Upload, reconstruct, play; all tabs; an example; an error on a text file. Playwright wants its own process."""
    (tmp_path / "notes.wav").write_text("not audio at all")
    script = Path(__file__).with_name("browser_visit.py")
    command = [sys.executable, str(script), chromium, address, str(SPEECH), str(tmp_path / "notes.wav")]
    folder = Path(os.environ.get("DEMO_SCREENSHOTS", tmp_path))
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path.name for path in folder.glob("*.png")} >= {
        f"{name}.png" for name in ("reconstruct", "inside", "enhance", "generate", "error")
    }
