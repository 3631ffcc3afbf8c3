"""The exported graphs compute what the model computes, for any batch and length, without PyTorch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import tiny
from dasheng_tokenizer import DashengTokenizerModel, load_audio
from dasheng_tokenizer.checkpoints import embedded_default
from dasheng_tokenizer.cli import main
from dasheng_tokenizer.errors import ConfigurationError, ExportError, MissingExtraError, OutputError
from dasheng_tokenizer.export import DecoderGraph, EncoderGraph, export_model
from dasheng_tokenizer.export import folder as export_folder
from dasheng_tokenizer.export.graphs import MatrixMelSpectrogram
from dasheng_tokenizer.spectral import CONTEXT, MelSpectrogram

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[1]
CLIPS = sorted((embedded_default().parent / "clips").glob("*.flac"))
# One sample, less than a token, two windows of Dasheng (10.08 s) and two of Whisper (30 s).
LENGTHS = [(1, 1), (1, 700), (2, 16_000), (3, 200_000), (2, 500_000)]


class Exported:
    """The two graphs of a folder in onnxruntime."""

    def __init__(self, folder: Path) -> None:
        runtime = pytest.importorskip("onnxruntime")
        self.encoder, self.decoder = (
            runtime.InferenceSession(folder / f"{part}.onnx", providers=["CPUExecutionProvider"])
            for part in ("encoder", "decoder")
        )

    def encode(self, audio: torch.Tensor, num_samples: torch.Tensor) -> list[torch.Tensor]:
        inputs = {"audio": audio.numpy(), "num_samples": num_samples.numpy()}
        return [torch.from_numpy(part) for part in self.encoder.run(None, inputs)]

    def decode(self, latents: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
        inputs = {"latents": latents.numpy(), "num_tokens": num_tokens.numpy()}
        return torch.from_numpy(self.decoder.run(None, inputs)[0])


def batch(clips: int, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise past the clips' ends too, which the graphs must not read."""
    generator = torch.Generator().manual_seed(samples)
    audio = 0.1 * torch.randn(clips, samples, generator=generator)
    return audio, torch.tensor([max(1, samples // (1 + 2 * item)) for item in range(clips)])


@pytest.fixture(scope="module")
def embedded() -> DashengTokenizerModel:
    return DashengTokenizerModel.from_pretrained().eval()


@pytest.fixture(scope="module")
def embedded_folder(embedded: DashengTokenizerModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxscript")
    return export_model(embedded, tmp_path_factory.mktemp("exported") / "default")


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxscript")
    return export_model(tiny(), tmp_path_factory.mktemp("exported") / "tiny")


@torch.inference_mode()
@pytest.mark.parametrize("clip", CLIPS, ids=lambda path: path.stem)
def test_onnxruntime_gives_what_pytorch_gives(clip: Path, embedded: DashengTokenizerModel, embedded_folder: Path):
    exported = Exported(embedded_folder)
    audio = torch.as_tensor(load_audio(clip)[0])
    expected = embedded(audio)
    unified, semantic, tokens = exported.encode(audio, torch.tensor([audio.shape[1]]))
    assert (unified - expected.unified).abs().max() <= 1e-4
    assert (semantic - expected.semantic).abs().max() <= 1e-4
    decoded = exported.decode(unified, tokens)[:, : audio.shape[1]]
    assert (decoded - expected.audio).abs().max() <= 1e-4


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["dasheng", "whisper"])
@pytest.mark.parametrize("clips, samples", LENGTHS)
def test_graphs_give_what_the_model_gives_for_any_batch_and_length(kind: str, clips: int, samples: int) -> None:
    model = tiny(kind, istft_block_dc=kind == "whisper")
    audio, count = batch(clips, samples)
    mask = torch.arange(samples) < count[:, None]
    expected = model(audio, mask)
    unified, semantic, tokens = EncoderGraph(model)(audio, count)
    assert (unified - expected.unified).abs().max() <= 5e-5
    assert (semantic - expected.semantic).abs().max() <= 5e-5
    assert tokens.tolist() == expected.token_mask.sum(1).tolist()
    decoded = DecoderGraph(model)(unified, tokens)[:, :samples] * mask
    assert (decoded - expected.audio).abs().max() <= 1e-5


@torch.inference_mode()
@pytest.mark.parametrize("clips, samples", LENGTHS)
def test_onnx_takes_any_batch_and_length(clips: int, samples: int, tiny_folder: Path) -> None:
    audio, count = batch(clips, samples)
    mask = torch.arange(samples) < count[:, None]
    expected = tiny()(audio, mask)
    exported = Exported(tiny_folder)
    unified, _, tokens = exported.encode(audio, count)
    assert (unified - expected.unified).abs().max() <= 5e-5
    assert (exported.decode(unified, tokens)[:, :samples] * mask - expected.audio).abs().max() <= 1e-5


@pytest.mark.parametrize("n_fft, power", [(1024, 1.0), (512, 2.0), (400, 2.0), (202, 1.0)])
@pytest.mark.filterwarnings("ignore:At least one mel filter")
def test_spectrogram_by_matrices_is_nearer_to_the_truth_than_float32(n_fft: int, power: float) -> None:
    """A quiet band beside loud ones, as in speech without rumble, is where rounding shows in the logarithm."""
    original = MelSpectrogram(n_fft, n_mels=64, power=power)
    seconds = torch.arange(16_000 + 2 * CONTEXT) / 16_000
    audio = (0.5 * torch.sin(2000 * seconds) + 1e-4 * torch.sin(9000 * seconds))[None]
    found = MatrixMelSpectrogram(original)(audio, 100)
    first = CONTEXT - n_fft // 2
    windows = audio[:, first:].double().unfold(1, n_fft, 160)[:, :100]  # (1, 100, n_fft)
    magnitude = torch.fft.rfft(windows * original.spectrogram.window.double()).abs() ** power
    truth = (magnitude @ original.mel_scale.fb.double()).transpose(1, 2)
    assert found.dtype == torch.float32 and found.shape == (1, 64, 100)
    assert ((found - truth).abs() <= 1e-6 * truth + 1e-12).all()


def test_a_padded_clip_gives_the_same_alone_and_in_a_batch(tiny_folder: Path) -> None:
    exported = Exported(tiny_folder)
    audio, count = batch(3, 200_000)
    together, _, tokens = exported.encode(audio, count)
    decoded = exported.decode(together, tokens)
    for item, samples in enumerate(count.tolist()):
        alone, _, own = exported.encode(audio[item : item + 1, :samples], count[item : item + 1])
        assert (together[item, : alone.shape[1]] - alone[0]).abs().max() <= 1e-5
        assert not together[item, alone.shape[1] :].any()
        audible = exported.decode(alone, own)[0]
        assert (decoded[item, : len(audible)] - audible).abs().max() <= 1e-5
        assert not decoded[item, len(audible) :].any()


@torch.no_grad()
def test_programs_of_torch_export_give_the_same_after_reload(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny("whisper").save_pretrained(tmp_path / "model")
    folder = tmp_path / "programs"
    assert main(["export", "--model", str(tmp_path / "model"), "--format", "torch", "-o", str(folder)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        str(folder / name) for name in ("config.json", "decoder.pt2", "encoder.pt2")
    ]
    encode, decode = (
        torch.export.load(folder / f"{part}.pt2").module(check_guards=False) for part in ("encoder", "decoder")
    )
    for clips, samples in LENGTHS[:4]:
        audio, count = batch(clips, samples)
        mask = torch.arange(samples) < count[:, None]
        expected = tiny("whisper")(audio, mask)
        unified, _, tokens = encode(audio, count)
        assert (unified - expected.unified).abs().max() <= 5e-5
        assert (decode(unified, tokens)[:, :samples] * mask - expected.audio).abs().max() <= 1e-5


def test_the_config_says_how_to_use_the_graphs(tiny_folder: Path) -> None:
    onnx = pytest.importorskip("onnx")
    config = json.loads((tiny_folder / "config.json").read_text())
    model = tiny()
    assert config["weights_hash"] == model.weights_hash()
    assert (config["sampling_rate"], config["samples_per_token"], config["latent_dim"]) == (16_000, 640, 32)
    for part in ("encoder", "decoder"):
        graph = onnx.load(tiny_folder / config[part]["file"])
        assert [entry.version for entry in graph.opset_import if entry.domain == ""] == [config["opset"]]
        assert [value.name for value in graph.graph.input] == config[part]["inputs"]
        assert [value.name for value in graph.graph.output] == config[part]["outputs"]


def test_int8_takes_less_and_stays_near(tmp_path: Path, tiny_folder: Path) -> None:
    folder = tmp_path / "int8"
    shutil.copytree(tiny_folder, folder)
    for part in ("encoder", "decoder"):
        graph = (EncoderGraph if part == "encoder" else DecoderGraph)(tiny())
        export_folder._quantize(folder / f"{part}.onnx", graph.spectral_width)
        operators = {node.op_type for node in pytest.importorskip("onnx").load(folder / f"{part}.onnx").graph.node}
        assert "MatMulInteger" in operators and "ConvInteger" not in operators
    assert {path.name for path in folder.iterdir()} == {"config.json", "decoder.onnx", "encoder.onnx"}
    audio, count = batch(2, 16_000)
    small, whole = Exported(folder), Exported(tiny_folder)
    near, (exact, _, tokens) = small.encode(audio, count)[0], whole.encode(audio, count)
    assert 0 < (near - exact).norm() / exact.norm() < 0.1
    heard, expected = small.decode(exact, tokens), whole.decode(exact, tokens)
    assert 0 < (heard - expected).norm() / expected.norm() < 0.1
    encoder = pytest.importorskip("onnx").load(folder / "encoder.onnx").graph
    kept = {tuple(weight.dims) for weight in encoder.initializer if weight.data_type in (1, 11)}
    front_ends = [part for part in EncoderGraph(tiny()).modules() if isinstance(part, MatrixMelSpectrogram)]
    assert {tuple(part.second.shape) for part in front_ends} <= kept  # transforms in float64, filters in float32
    assert all({tuple(part.bank.shape), tuple(part.bank.T.shape)} & kept for part in front_ends)
    spectral = DecoderGraph(tiny()).spectral_width  # the head and the inverse STFT
    weights = pytest.importorskip("onnx").load(folder / "decoder.onnx").graph.initializer
    assert [weight.data_type for weight in weights if spectral in weight.dims and len(weight.dims) == 2] == [1, 1]


def test_the_example_needs_no_torch(embedded_folder: Path, tmp_path: Path) -> None:
    script = ROOT / "examples" / "onnx_encode_decode.py"
    assert len(script.read_text().splitlines()) <= 60
    code = (
        f"import runpy, sys; sys.argv = ['x', {str(embedded_folder)!r}, {str(CLIPS[0])!r}, "
        f"{str(tmp_path / 'decoded.wav')!r}]; runpy.run_path({str(script)!r}, run_name='__main__'); "
        "assert not {'torch', 'dasheng_tokenizer', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert load_audio(tmp_path / "decoded.wav")[0].shape == load_audio(CLIPS[0])[0].shape


def test_what_cannot_be_exported_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(OutputError, match="already"):
        export_model(tiny(), tmp_path / "full")
    with pytest.raises(ConfigurationError, match="int8"):
        export_model(tiny(), tmp_path / "new", "torch", "int8")
    with pytest.raises(ExportError, match="wavlm"):
        export_model(tiny("wavlm"), tmp_path / "new", "torch")
    with pytest.raises(ExportError, match="published"):
        export_model(tiny(length_mode="published"), tmp_path / "new", "torch")
    assert main(["export", "--model", str(tmp_path / "absent"), "-o", str(tmp_path / "new")]) == 1
    assert "absent" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"\[export\]"):
        export_model(tiny(), tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_folder, "_write_graph", full_disk)
    with pytest.raises(OutputError, match="disk"):
        export_model(tiny(), tmp_path / "new", "torch")
    assert not list(tmp_path.iterdir())
