"""The enhancer and its command: lengths, rates, channels, long files, bad input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from dasheng_tokenizer import DashengTokenizerModel
from dasheng_tokenizer.chunking import compress
from dasheng_tokenizer.cli import main
from dasheng_tokenizer.enhancement import Denoiser, DenoiserConfig, DenoiserInfo, Enhancer
from dasheng_tokenizer.enhancement.enhancer import WINDOWS, DenoisedLatents
from dasheng_tokenizer.errors import AudioError, CheckpointError, ConfigurationError, LatentError, ModelMismatchError
from dasheng_tokenizer.injection import Part

pytestmark = pytest.mark.usefixtures("one_thread")

RATE = 16_000


def new_denoiser(
    tokenizer: DashengTokenizerModel, name: str | None, part: Part = "unified", **info: object
) -> Denoiser:
    """A denoiser that changes what it is given, with windows of 16 tokens."""
    torch.manual_seed(5)
    width = tokenizer.latent_dim
    facts = {"window_seconds": 0.64, **info}
    denoiser = Denoiser(
        DenoiserConfig(width, depth=1, heads=2),
        DenoiserInfo(tokenizer.weights_hash(), name, part, **facts),  # type: ignore[arg-type]
        *([torch.zeros(width), torch.ones(width)] * 2),
    ).eval()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return denoiser


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> DashengTokenizerModel:
    model: DashengTokenizerModel = DashengTokenizerModel.from_pretrained(tokenizer_folder)
    return model.eval()


@pytest.fixture(scope="module")
def enhancer_folder(
    tokenizer: DashengTokenizerModel, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("enhancer") / "model"
    new_denoiser(tokenizer, str(tokenizer_folder)).save_pretrained(folder)
    return folder


@pytest.fixture
def enhancer(enhancer_folder: Path) -> Enhancer:
    return Enhancer.from_pretrained(enhancer_folder, device="cpu")


def noise(samples: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    held = 0.1 * np.random.default_rng(seed).standard_normal((channels, samples))
    return held.astype(np.float32)


# ---------------------------------------------------------------------- clean input


def test_what_would_hardly_change_passes_as_it_is(tokenizer: DashengTokenizerModel, enhancer: Enhancer) -> None:
    """Each window on its own: between both limits in part."""
    audio = noise(40 * 640)
    plain = enhancer.tokenizer.decompress(enhancer.tokenizer.compress(audio, RATE))
    denoised = enhancer.enhance(audio, RATE)
    assert float((denoised - plain).abs().max()) > 1e-3

    def limited(low: float, high: float) -> torch.Tensor:
        denoiser = new_denoiser(tokenizer, None, clean_change=(low, high))
        return Enhancer(denoiser, tokenizer).enhance(audio, RATE)

    torch.testing.assert_close(limited(1e6, 2e6), plain)
    torch.testing.assert_close(limited(0.0, 1e-9), denoised)
    between = limited(0.0, 10.0)
    assert float((between - plain).abs().max()) > 1e-5 and float((between - denoised).abs().max()) > 1e-5


@pytest.mark.parametrize("limits", [(0.2, 0.1), (-1.0, 1.0), (0.1, float("inf")), (0.1, 0.1)])
def test_limits_of_clean_input_are_checked(limits: tuple[float, float]) -> None:
    with pytest.raises(ConfigurationError, match="clean_change"):
        DenoiserInfo("hash", clean_change=limits)
    with pytest.raises(ConfigurationError, match="not semantic"):
        DenoiserInfo("hash", part="semantic", clean_change=(0.1, 0.2))


# ---------------------------------------------------------------------- audio in memory


@pytest.mark.parametrize(
    ("rate", "samples", "channels"),
    [(16_000, 1, 1), (16_000, 640, 1), (16_000, 20_001, 2), (8_000, 7_777, 1), (44_100, 50_000, 3), (48_000, 3, 1)],
)
def test_length_rate_and_channels_stay(enhancer: Enhancer, rate: int, samples: int, channels: int) -> None:
    audio = noise(samples, channels)
    enhanced = enhancer.enhance(audio, rate)
    assert enhanced.shape == (channels, samples) and enhanced.dtype == torch.float32
    assert torch.isfinite(enhanced).all()


def test_it_is_tokenizer_denoiser_decoder(enhancer: Enhancer) -> None:
    audio = noise(16 * 640)
    latents = enhancer.tokenizer.encode(torch.from_numpy(audio))
    with torch.no_grad():
        expected = enhancer.tokenizer.decode(enhancer.denoiser(latents))
        plain = enhancer.tokenizer.decode(latents)
    torch.testing.assert_close(enhancer.enhance(audio, RATE), expected, rtol=0, atol=1e-5)
    assert (expected - plain).abs().max() > 1e-3


def test_channels_are_enhanced_each_on_its_own(enhancer: Enhancer) -> None:
    audio = noise(15_000, 2)
    both = enhancer.enhance(audio, RATE)
    for channel in (0, 1):
        torch.testing.assert_close(both[channel], enhancer.enhance(audio[channel], RATE)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("part", ["semantic", "acoustic"])
def test_a_denoiser_of_a_part_sees_that_part(tokenizer: DashengTokenizerModel, part: Part) -> None:
    enhancer = Enhancer(new_denoiser(tokenizer, None, part), tokenizer)
    audio = noise(12 * 640)
    with torch.no_grad():
        held = getattr(tokenizer(torch.from_numpy(audio)), part)
        expected = tokenizer.decode(enhancer.denoiser(held))
    torch.testing.assert_close(enhancer.enhance(audio, RATE), expected, rtol=0, atol=1e-5)


def test_windows_have_context_and_hang_on_the_clip_alone(enhancer: Enhancer) -> None:
    latents = torch.randn(2, 16 + 8 * (WINDOWS + 3) + 5, 32)
    length = latents.shape[1]
    view = DenoisedLatents(enhancer.denoiser, latents)
    whole = view[:, :]
    assert whole.shape == latents.shape == view.shape
    for first, last in ((0, 1), (7, 9), (30, length), (length - 1, length), (5, 5 + 8 * WINDOWS)):
        torch.testing.assert_close(view[:, first:last], whole[:, first:last], rtol=0, atol=1e-5)
    with torch.no_grad():  # the third run of 8 tokens, in its window of 4 + 8 + 4
        expected = enhancer.denoiser(latents[:, 12:28])[:, 4:12]
    torch.testing.assert_close(whole[:, 16:24], expected, rtol=0, atol=1e-5)
    short = DenoisedLatents(enhancer.denoiser, latents[:, :16])[:, :]
    with torch.no_grad():
        torch.testing.assert_close(short, enhancer.denoiser(latents[:, :16]), rtol=0, atol=1e-5)


def test_bad_audio_is_named(enhancer: Enhancer) -> None:
    with pytest.raises(AudioError, match="NaN"):
        enhancer.enhance(np.array([[0.0, np.nan]], dtype=np.float32), RATE)
    with pytest.raises(AudioError):
        enhancer.enhance(np.zeros((1, 0), dtype=np.float32), RATE)
    with pytest.raises(AudioError, match="4000"):
        enhancer.enhance(noise(100), 4_000)


def test_a_denoiser_that_makes_nan_is_named(tokenizer: DashengTokenizerModel) -> None:
    denoiser = new_denoiser(tokenizer, None)
    with torch.no_grad():
        denoiser.project_out.bias.fill_(float("inf"))
    with pytest.raises(LatentError, match="the denoiser made NaN"):
        Enhancer(denoiser, tokenizer).enhance(noise(2_000), RATE)


# ---------------------------------------------------------------------- what belongs together


def test_another_tokenizer_is_refused(
    enhancer_folder: Path, whisper_tiny_random: DashengTokenizerModel, tmp_path: Path
) -> None:
    whisper_tiny_random.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelMismatchError, match="trained with the tokenizer"):
        Enhancer.from_pretrained(enhancer_folder, tmp_path / "other", device="cpu")


def test_a_tokenizer_that_moved_is_named(tokenizer: DashengTokenizerModel, tmp_path: Path) -> None:
    denoiser = new_denoiser(tokenizer, str(tmp_path / "gone"))
    denoiser.save_pretrained(tmp_path / "enhancer")
    with pytest.raises(CheckpointError, match=denoiser.info.tokenizer_hash):
        Enhancer.from_pretrained(tmp_path / "enhancer", device="cpu")
    with pytest.raises(ConfigurationError, match="device"):
        Enhancer.from_pretrained(tmp_path / "enhancer", tmp_path, device="abacus")


# ---------------------------------------------------------------------- files and the command


def test_a_long_file_is_as_in_memory_and_whole(enhancer: Enhancer, tmp_path: Path) -> None:
    """Longer than a block of the decoder, in an odd rate."""
    audio = noise(33 * 22_050 + 123, 2)
    soundfile.write(tmp_path / "in.wav", audio.T, 22_050, subtype="FLOAT")
    seen: list[tuple[float, float]] = []
    enhancer.enhance_file(
        tmp_path / "in.wav", tmp_path / "out.wav", lambda done, total: seen.append((done, total)), subtype="FLOAT"
    )
    written, rate = soundfile.read(tmp_path / "out.wav", dtype="float32")
    assert rate == 22_050 and written.shape == audio.T.shape
    np.testing.assert_allclose(written.T, enhancer.enhance(audio, 22_050).numpy(), atol=1e-4)
    done = [moment for moment, _ in seen]
    assert done == sorted(done) and done[-1] == pytest.approx(seen[-1][1]) and done[0] < 0.6 * done[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.wav", "out.wav"]


def test_latents_on_the_disk_are_those_in_memory(enhancer: Enhancer) -> None:
    tokens = compress(enhancer.tokenizer, noise(9_000), RATE, "acoustic")
    with torch.no_grad():
        expected = enhancer.tokenizer(torch.from_numpy(noise(9_000))).acoustic
    torch.testing.assert_close(tokens.latents, expected, rtol=0, atol=1e-5)


def test_the_command_on_files_and_folders(
    enhancer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in"
    (source / "deep").mkdir(parents=True)
    soundfile.write(source / "a.wav", noise(8_000)[0], 8_000)
    soundfile.write(source / "deep" / "b.flac", noise(4_001, 2).T, 44_100)
    (source / "broken.wav").write_text("no audio")
    (source / "notes.txt").write_text("no audio either")
    arguments = ["enhance", str(source), "-o", str(tmp_path / "out"), "--model", str(enhancer_folder)]
    assert main([*arguments, "--device", "cpu"]) == 1
    told = capsys.readouterr()
    assert "broken.wav" in told.err and "2 done, 0 kept, 1 failed" in told.out
    written = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*"))
    assert written == ["a.enhanced.wav", "deep/b.enhanced.wav"]
    assert soundfile.info(tmp_path / "out" / "a.enhanced.wav").frames == 8_000
    held = soundfile.info(tmp_path / "out" / "deep" / "b.enhanced.wav")
    assert (held.frames, held.channels, held.samplerate) == (4_001, 2, 44_100)
    assert main(arguments) == 1  # what is there is kept
    assert "0 done, 2 kept, 1 failed" in capsys.readouterr().out


def test_what_it_wrote_is_not_taken_for_input(enhancer_folder: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", noise(2_000)[0], RATE)
    for _ in range(2):
        assert main(["enhance", str(tmp_path), "--model", str(enhancer_folder), "--device", "cpu"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.enhanced.wav", "a.wav"]


def test_one_file_to_one_file_and_other_formats(enhancer_folder: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", noise(2_000)[0], RATE)
    common = ["--model", str(enhancer_folder), "--device", "cpu"]
    assert main(["enhance", str(tmp_path / "a.wav"), "-o", str(tmp_path / "b.flac"), *common]) == 0
    assert soundfile.info(tmp_path / "b.flac").format == "FLAC"
    assert main(["enhance", str(tmp_path / "a.wav"), "--format", "flac", *common]) == 0
    assert (tmp_path / "a.enhanced.flac").is_file()
    assert main(["enhance", str(tmp_path), "-o", str(tmp_path / "c.wav"), *common]) == 2


def test_a_model_that_is_none_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soundfile.write(tmp_path / "a.wav", noise(2_000)[0], RATE)
    assert main(["enhance", str(tmp_path / "a.wav"), "--model", str(tmp_path / "nowhere")]) == 1
    assert "no such folder" in capsys.readouterr().err
    assert not (tmp_path / "a.enhanced.wav").exists()
