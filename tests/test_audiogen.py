"""The published sibling generator: golden tensors, strict loading, sampling, prompts, pipeline and command."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from dasheng_tokenizer import DashengTokenizerConfig, DashengTokenizerModel
from dasheng_tokenizer.cli import main
from dasheng_tokenizer.errors import (
    CheckpointError,
    ConfigurationError,
    LatentError,
    ModelMismatchError,
    TextError,
)
from dasheng_tokenizer.generation import AudioGen, AudioGenConfig, ScenePipeline, ScenePrompt, load_pipeline
from dasheng_tokenizer.generation.audiogen_backbone import AudioGenBackbone
from dasheng_tokenizer.generation.audiogen_content import frames_of_tokens
from dasheng_tokenizer.generation.flow_matching import evaluation_times, guided, integrate, timestep_schedule
from dasheng_tokenizer.generation.sampling import clip_mask
from dasheng_tokenizer.generation.scene_prompt import TAGS
from dasheng_tokenizer.generation.text_encoders import load_text_encoder

pytestmark = pytest.mark.usefixtures("one_thread")

FIXTURE = Path(__file__).parent / "fixtures" / "sibling-generator"
TOLERANCE = 1e-4
"""Absolute, on velocities and latents, as the fixture's README says."""

WORDS = (
    "a",
    "dog",
    "barks",
    "rain",
    "bell",
    "loud",
    "caption",
    "sfx",
    "music",
    "env",
    "asr",
    "speech",
    "soft",
    "piano",
)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(FIXTURE / "io.safetensors")


@pytest.fixture(scope="module")
def runs() -> dict[str, Any]:
    return json.loads((FIXTURE / "io.json").read_text())


@pytest.fixture(scope="module")
def model() -> AudioGen:
    return AudioGen.from_pretrained(FIXTURE)


@pytest.fixture(scope="module")
def texts(golden: dict[str, Tensor]) -> list[Tensor]:
    """The two prompts of the fixture, of 7 and 5 tokens."""
    return [row[mask.bool()] for row, mask in zip(golden["text_hidden"], golden["text_mask"], strict=True)]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The fixture's folder, to be spoilt."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(FIXTURE / name, folder / name)
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def reconfigure(folder: Path, **entries: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))


def shard(folder: Path) -> dict[str, str]:
    """Split the weights into two files with an index, as the hub does with large ones."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    parts = {"model-00001-of-00002.safetensors": names[:100], "model-00002-of-00002.safetensors": names[100:]}
    for file, keys in parts.items():
        save_file({key: state[key] for key in keys}, folder / file)
    where = {key: file for file, keys in parts.items() for key in keys}
    write_index(folder, where)
    return where


def write_index(folder: Path, where: dict[str, str]) -> None:
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# ---------------------------------------------------------------------- golden tensors


def test_content_and_lengths_are_the_published_ones(
    model: AudioGen, golden: dict[str, Tensor], texts: list[Tensor]
) -> None:
    mask = golden["text_mask"].bool()
    x = model.instructed(golden["text_hidden"], mask)
    torch.testing.assert_close(model.content_adapter.content(x), golden["content"], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(model.log_durations(texts), golden["global_duration_log"], rtol=0, atol=TOLERANCE)
    assert model.num_tokens(texts) == [41, 39]


@pytest.mark.parametrize("name", ["sway", "linear"])
def test_velocities_and_latents_are_the_published_ones(
    golden: dict[str, Tensor], runs: dict[str, Any], texts: list[Tensor], name: str
) -> None:
    model, run = AudioGen.from_pretrained(FIXTURE, published_padding=True), runs[name]
    times = timestep_schedule(run["num_steps"], run["sway_sampling_coef"])
    mask = clip_mask([41, 39], torch.device("cpu"))
    seen: list[Tensor] = []

    def recorded(conditional: tuple[bool, ...]) -> Callable[[Tensor, Tensor], Tensor]:
        inner = model.velocity(texts, mask, conditional, times)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            seen.append(inner(x, t))
            return seen[-1]

        return velocity

    latents = integrate(guided(recorded, run["guidance_scale"]), golden[f"{name}.noise"].transpose(1, 2), times)
    for row, wanted in enumerate(("first", "second")):
        published = golden[f"{name}.velocity_{wanted}"].transpose(1, 2)  # towards the noise
        torch.testing.assert_close(-seen[row], published, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(latents, golden[f"{name}.latent"], rtol=0, atol=TOLERANCE)
    assert len(seen) == run["num_steps"]  # the published loop asks once more in vain where it sways
    positions = model._position(times[:-1])
    wanted_positions = torch.tensor(run["timesteps"]).trunc()[: run["num_steps"]]
    assert torch.equal(positions, wanted_positions)


def test_the_longest_clip_does_not_need_the_published_padding(
    model: AudioGen, golden: dict[str, Tensor], texts: list[Tensor]
) -> None:
    times = timestep_schedule(6, -1.0)
    mask = clip_mask([41, 39], torch.device("cpu"))
    velocity = guided(lambda conditional: model.velocity(texts, mask, conditional, times), 3.0)
    latents = integrate(velocity, golden["sway.noise"].transpose(1, 2), times)
    torch.testing.assert_close(latents[0], golden["sway.latent"][0], rtol=0, atol=TOLERANCE)
    assert (latents[1, :39] - golden["sway.latent"][1, :39]).abs().max() > TOLERANCE  # what the flag is for


def test_full_size_has_the_published_tensors() -> None:
    with torch.device("meta"):
        model = AudioGen(AudioGenConfig())
    state = model.state_dict()
    assert len(state) == 1311 and model.num_parameters == 2_185_498_626
    assert sum(key.endswith("rotary.inv_freq") for key in state) == 33
    block = sum(weight.numel() for key, weight in state.items() if key.startswith("backbone.out_blocks.3."))
    assert block == 67_681_792 + 32  # and its frequencies


# ---------------------------------------------------------------------- sampling


def test_a_clip_is_the_same_alone_and_in_any_batch(model: AudioGen, texts: list[Tensor]) -> None:
    together = model.sample(texts, [20, 13], seeds=[4, 5], steps=3)
    turned = model.sample(texts[::-1], [13, 20], seeds=[5, 4], steps=3)[::-1]
    for index, (text, count, seed) in enumerate(zip(texts, (20, 13), (4, 5), strict=True)):
        (alone,) = model.sample([text], [count], seeds=[seed], steps=3)
        assert alone.shape == (count, 16)
        torch.testing.assert_close(together[index], alone, rtol=0, atol=1e-4)
        torch.testing.assert_close(turned[index], alone, rtol=0, atol=1e-4)


def test_published_padding_lets_clips_hang_on_each_other(texts: list[Tensor]) -> None:
    model = AudioGen.from_pretrained(FIXTURE, published_padding=True)
    together = model.sample(texts, [20, 13], seeds=[4, 5], steps=3)
    (alone,) = model.sample(texts[1:], [13], seeds=[5], steps=3)
    assert (together[1] - alone).abs().max() > 1e-3


def test_seed_guidance_and_text_matter(model: AudioGen, texts: list[Tensor]) -> None:
    def draw(text: Tensor, **changes: Any) -> Tensor:
        return model.sample([text], [9], **{"seeds": [1], "steps": 3, **changes})[0]

    base = draw(texts[0])
    assert torch.equal(base, draw(texts[0]))
    assert not torch.allclose(base, draw(texts[0], seeds=[2]))
    assert not torch.allclose(base, draw(texts[0], guidance=1.0))
    assert not torch.allclose(base, draw(texts[1]))
    # Rows of equal content give one answer, however many they are: without text the two differ by roundings alone.
    torch.testing.assert_close(draw(texts[0], guidance=0.0), draw(texts[1], guidance=0.0), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("method", "calls"), [("euler", 4), ("midpoint", 8), ("heun", 8)])
def test_velocity_is_asked_for_as_often_as_it_must_be_and_times_are_prepared_once(
    model: AudioGen, texts: list[Tensor], monkeypatch: pytest.MonkeyPatch, method: Any, calls: int
) -> None:
    counts = {"forward": 0, "modulation": 0, "encode_context": 0}
    for name in counts:
        inner = getattr(AudioGenBackbone, name)

        def counted(*args: Any, _name: str = name, _inner: Any = inner, **kwargs: Any) -> Any:
            counts[_name] += 1
            return _inner(*args, **kwargs)

        monkeypatch.setattr(AudioGenBackbone, name, counted)
    model.sample(texts, [9, 8], seeds=[0, 1], steps=4, method=method)
    assert counts == {"forward": calls, "modulation": 1, "encode_context": 1}


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun"])
@pytest.mark.parametrize("sway", [-1.0, 0.0])
def test_every_time_that_is_asked_for_was_prepared(method: Any, sway: float) -> None:
    times, asked = timestep_schedule(25, sway), []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        asked.append(float(t[0]))
        return torch.zeros_like(x)

    integrate(velocity, torch.zeros(1, 2, 3), times, method)
    prepared = evaluation_times(times, method)
    assert torch.equal(prepared, prepared.sort().values)
    distance = (torch.tensor(asked)[:, None] - prepared[None]).abs()  # in float32 a time moves by a rounding
    assert float(distance.amin(1).max()) < 1e-6 and float(distance.amin(0).max()) < 1e-6


def test_times_are_cut_as_published_unless_asked_otherwise(model: AudioGen) -> None:
    exact = AudioGen.from_pretrained(FIXTURE, published_time=False)
    times = torch.tensor([0.0011, 0.002, 0.0, 0.96, 1.0])  # the first is 998.9 on the model's scale
    assert model._position(times).tolist() == [998.0, 998.0, 1000.0, 40.0, 0.0]
    assert exact._position(times).tolist() == pytest.approx([998.9, 998.0, 1000.0, 40.0, 0.0], abs=1e-4)
    steps = torch.arange(25) / 25  # whole numbers stay what they are in float32, too
    assert model._position(steps.float()).tolist() == [1000.0 - 40 * k for k in range(25)]


def test_half_precision_is_close(model: AudioGen, texts: list[Tensor]) -> None:
    half = AudioGen.from_pretrained(FIXTURE, dtype=torch.bfloat16)
    assert half.backbone.in_blocks[0].attn.rotary.inv_freq.dtype == torch.float32
    (wanted,) = model.sample(texts[:1], [9], seeds=[0], steps=3, guidance=2.0)
    (found,) = half.sample(texts[:1], [9], seeds=[0], steps=3, guidance=2.0)
    assert found.dtype == torch.float32
    assert float((found - wanted).norm() / wanted.norm()) < 0.05


def test_compiled_once_for_every_length(model: AudioGen, texts: list[Tensor]) -> None:
    compiled, graphs = AudioGen.from_pretrained(FIXTURE), []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled.backbone.compile(backend=backend, dynamic=True)
    for counts in ([9, 7], [16, 12], [11, 5]):
        for found, wanted in zip(
            compiled.sample(texts, counts, seeds=[0, 1], steps=2),
            model.sample(texts, counts, seeds=[0, 1], steps=2),
            strict=True,
        ):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert len(graphs) == 1


def test_durations_of_text_tokens_do_not_hang_on_the_batch(model: AudioGen, texts: list[Tensor]) -> None:
    together = model.token_frames(texts)
    assert [len(row) for row in together] == [7, 5]
    assert torch.equal(together[1], model.token_frames(texts[1:])[0])


def test_durations_of_text_tokens_are_rounded_as_published() -> None:
    log = torch.tensor([[math.log(9.0), math.log(20.5), 0.0, 5.0]])
    mask = torch.tensor([[True, True, True, False]])
    # (9 - 1), (21 - 1) and (1 - 1) units of 5 ms at 25 tokens a second: 1, 2.5 (to the even), 0
    assert frames_of_tokens(log, mask, 0.005, 25.0).tolist() == [[1, 2, 0, 0]]


def test_lengths_that_cannot_be_made_are_refused(copy: Path, texts: list[Tensor]) -> None:
    def longer(state: dict[str, Tensor]) -> None:
        state["content_adapter.global_duration_mlp.3.bias"] += 10

    rewrite(copy, longer)
    with pytest.raises(TextError, match=r"predicts .* seconds for prompt 0; at most 120"):
        AudioGen.from_pretrained(copy).num_tokens(texts)


def test_a_prediction_of_nothing_gives_one_token(copy: Path, texts: list[Tensor]) -> None:
    def shorter(state: dict[str, Tensor]) -> None:
        state["content_adapter.global_duration_mlp.3.bias"] -= 10

    rewrite(copy, shorter)
    assert AudioGen.from_pretrained(copy).num_tokens(texts) == [1, 1]


def test_settings_that_cannot_be_are_refused(model: AudioGen, texts: list[Tensor]) -> None:
    with pytest.raises(ConfigurationError, match="2 texts, 1 lengths"):
        model.sample(texts, [3], seeds=[0, 1])
    with pytest.raises(ConfigurationError, match="expected .*24"):
        model.sample([torch.zeros(3, 25)], [3], seeds=[0])
    with pytest.raises(ConfigurationError, match="unknown method"):
        model.sample(texts, [3, 3], seeds=[0, 1], method="leap")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="guidance"):
        model.sample(texts, [3, 3], seeds=[0, 1], guidance=math.nan)
    with pytest.raises(LatentError, match="NaN or infinity"):
        model.sample([torch.full((3, 24), math.inf)], [3], seeds=[0], steps=2)


# ---------------------------------------------------------------------- loading


def test_shards_give_what_one_file_gives(copy: Path, model: AudioGen) -> None:
    shard(copy)
    found = AudioGen.from_pretrained(copy).state_dict()
    wanted = model.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_parameter_without_numbers_may_be_in_the_file(copy: Path, texts: list[Tensor]) -> None:
    rewrite(copy, lambda state: state.update(dummy_param=torch.zeros(0)))
    assert AudioGen.from_pretrained(copy).num_tokens(texts) == [41, 39]


def drop(state: dict[str, Tensor]) -> None:
    del state["backbone.mid_block.norm1.weight"]


def add(state: dict[str, Tensor]) -> None:
    state["backbone.extra"] = torch.zeros(1)


def misshape(state: dict[str, Tensor]) -> None:
    state["dummy_ta_embed"] = torch.zeros(23)


def poison(state: dict[str, Tensor]) -> None:
    state["dummy_ta_embed"][3] = math.nan


def retune(state: dict[str, Tensor]) -> None:
    state["backbone.mid_block.attn.rotary.inv_freq"] *= 2


def empty(state: dict[str, Tensor]) -> None:
    state.clear()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop, "1 weights missing: backbone.mid_block.norm1.weight"),
        (add, "1 weights unknown: backbone.extra"),
        (misshape, "dummy_ta_embed has shape"),
        (poison, "dummy_ta_embed holds NaN"),
        (retune, "rotary base"),
        (empty, "weights missing"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    copy: Path, spoil: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    rewrite(copy, spoil)
    with pytest.raises(CheckpointError, match=message):
        AudioGen.from_pretrained(copy)


def test_too_large_for_half_precision_is_named(copy: Path) -> None:
    rewrite(copy, lambda state: state.update(dummy_ta_embed=torch.full((24,), 1e6)))
    with pytest.raises(CheckpointError, match="too large"):
        AudioGen.from_pretrained(copy, dtype=torch.float16)


def test_many_missing_weights_are_counted(copy: Path) -> None:
    reconfigure(copy, dit_depth=6)
    with pytest.raises(CheckpointError, match=r"\d\d weights missing: .* and \d+ more"):
        AudioGen.from_pretrained(copy)


def test_broken_shards_are_named(copy: Path) -> None:
    where = shard(copy)
    first = where[min(where)]
    write_index(copy, {**where, min(where): where[max(where)]})
    with pytest.raises(CheckpointError, match=f"{first} holds, without being listed"):
        AudioGen.from_pretrained(copy)
    write_index(copy, where)
    (copy / first).unlink()
    with pytest.raises(CheckpointError, match=f"{first} is missing or damaged"):
        AudioGen.from_pretrained(copy)
    (copy / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="index.json is damaged"):
        AudioGen.from_pretrained(copy)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model_type": "bert"}, "of kind 'bert'"),
        ({"dit_time_fusion": "ada_sola"}, "dit_time_fusion"),
        ({"dit_in_chans": 17}, "dit_in_chans"),
        ({"dit_num_heads": 5}, "dit_embed_dim"),
        ({"dit_depth": 5}, "even"),
        ({"adapter_num_heads": 7}, "adapter_num_heads"),
        ({"dit_ta_context_dim": 12}, "dit_ta_context_dim"),
        ({"latent_dim": "wide"}, "latent_dim"),
        ({"sample_rate": -1}, "sample_rate"),
    ],
)
def test_configurations_that_are_not_built_are_named(copy: Path, entries: dict[str, Any], message: str) -> None:
    reconfigure(copy, **entries)
    with pytest.raises(CheckpointError, match=message):
        AudioGen.from_pretrained(copy)


def test_damaged_files_are_named(copy: Path) -> None:
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[:1000])
    with pytest.raises(CheckpointError, match="missing or damaged"):
        AudioGen.from_pretrained(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is missing or damaged"):
        AudioGen.from_pretrained(copy)
    with pytest.raises(CheckpointError, match="no such folder"):
        AudioGen.from_pretrained(copy / "elsewhere" / "deep")


def test_a_hub_name_is_found_in_the_local_cache(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: list[Tensor]
) -> None:
    commit = "0" * 40
    home = tmp_path / "hub" / "models--someone--some-generator"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    (home / "snapshots").mkdir()
    copy.rename(home / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert AudioGen.from_pretrained("someone/some-generator").num_tokens(texts) == [41, 39]
    with pytest.raises(CheckpointError, match="cannot be had from the hub"):
        AudioGen.from_pretrained("someone/another-generator")


# ---------------------------------------------------------------------- prompts


def test_parts_are_composed_in_the_published_order() -> None:
    scene = ScenePrompt(
        "a street", ambience="wind", transcript="hello there", speech="a man", music="jazz", sfx=" horn "
    )
    assert str(scene) == (
        "<|caption|> a street <|speech|> a man <|asr|> hello there <|sfx|> horn <|music|> jazz <|env|> wind"
    )
    assert str(ScenePrompt("a street")) == "<|caption|> a street"
    assert ScenePrompt.of(str(scene)).parts == {**scene.parts, "sfx": "horn"}


plain = st.text(st.characters(exclude_characters="<|>", exclude_categories=("Cs",)), min_size=1, max_size=20)


@given(st.dictionaries(st.sampled_from(list(TAGS)), plain.filter(str.strip)).filter(lambda held: "caption" in held))
@settings(max_examples=60, deadline=None)
def test_composing_and_reading_give_back_the_parts(parts: dict[str, str]) -> None:
    found = ScenePrompt.of(str(ScenePrompt(**parts)))
    assert {"caption": found.caption, **found.parts} == {name: text.strip() for name, text in parts.items()}


@pytest.mark.parametrize(
    ("prompt", "parts", "message"),
    [
        ("", {}, "caption of the prompt is empty"),
        (" \n", {}, "caption of the prompt is empty"),
        ("a street", {"music": " "}, "music of the prompt is empty"),
        ("a street", {"music": "jazz <|env|> wind"}, "holds the tag"),
        ("a street <|env|> wind", {}, "must begin with"),
        ("<|env|> wind", {}, "must begin with"),
        ("<|caption|> <|env|> wind", {}, "caption of the prompt is empty"),
        ("<|caption|> a street <|env|>", {}, "ambience of the prompt is empty"),
        ("<|caption|> a street <|noise|> wind", {}, "unknown tag"),
        ("<|caption|> a <|sfx|> b <|sfx|> c", {}, "twice"),
        ("<|caption|> a <|sfx|> b", {"sfx": "c"}, "give it once"),
        ("a street", {"noise": "wind"}, "unknown part"),
        (3, {}, "type int"),
        (ScenePrompt("a"), {"sfx": "b"}, "parts already"),
    ],
)
def test_prompts_that_cannot_be_are_refused(prompt: Any, parts: dict[str, str], message: str) -> None:
    with pytest.raises(TextError, match=message):
        ScenePrompt.of(prompt, parts)


def test_a_part_that_is_no_string_is_refused() -> None:
    with pytest.raises(TextError, match="music of the prompt is of type int"):
        ScenePrompt("a", music=3)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- pipeline


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of a tiny T5 encoder of the fixture's width, and of a tokenizer of its latent."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    words, codec = tmp_path_factory.mktemp("t5"), tmp_path_factory.mktemp("codec")
    vocabulary = {word: number for number, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    ).save_pretrained(words)
    torch.manual_seed(0)
    T5EncoderModel(
        T5Config(vocab_size=len(vocabulary), d_model=24, d_kv=6, d_ff=32, num_layers=2, num_heads=4)
    ).save_pretrained(words)
    sizes = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_intermediate_size": 16}
    DashengTokenizerModel(DashengTokenizerConfig(embed_dim=16, depth=1, num_heads=2, **sizes)).save_pretrained(codec)
    return {"tokenizer": str(codec), "text_encoder": str(words)}


@pytest.fixture(scope="module")
def scenes(parts: dict[str, str]) -> ScenePipeline:
    pipeline = load_pipeline(FIXTURE, **parts, device="cpu")
    assert isinstance(pipeline, ScenePipeline)
    return pipeline


def test_length_comes_from_the_model_unless_asked_for(scenes: ScenePipeline) -> None:
    prompts = ["a dog barks", ScenePrompt("rain", sfx="a loud bell", music="soft piano a a a a a a a a")]
    clips = scenes(prompts, steps=2)
    predicted = scenes.generator.num_tokens(scenes.text_encoder([str(ScenePrompt.of(prompt)) for prompt in prompts]))
    assert [len(clip.audio) for clip in clips] == [640 * count for count in predicted]
    assert [clip.seconds for clip in clips] == [count / 25 for count in predicted]
    some = scenes(prompts, seconds=[None, 0.33], steps=2)
    assert [len(clip.audio) for clip in some] == [640 * predicted[0], 5280]


def test_clips_hang_on_seed_and_prompt_alone(scenes: ScenePipeline) -> None:
    prompts = ["a dog barks", "rain", "a loud bell"]
    together = scenes(prompts, seconds=[0.4, 0.6, 0.5], steps=2, seed=[1, 2, 3], batch_size=2)
    (alone,) = scenes(prompts[1], seconds=0.6, steps=2, seed=2)
    torch.testing.assert_close(torch.from_numpy(together[1].audio), torch.from_numpy(alone.audio), rtol=0, atol=1e-4)
    assert alone.text == "<|caption|> rain"
    (other,) = scenes(prompts[1], seconds=0.6, steps=2, seed=3)
    assert not torch.allclose(torch.from_numpy(other.audio), torch.from_numpy(alone.audio))


def test_guidance_of_the_published_generator_is_the_default(scenes: ScenePipeline) -> None:
    default, five = scenes("rain", 0.4, steps=2)[0], scenes("rain", 0.4, steps=2, guidance=5.0)[0]
    assert (default.audio == five.audio).all()


def test_prompts_and_lengths_that_cannot_be_are_refused(scenes: ScenePipeline) -> None:
    with pytest.raises(TextError, match="caption of the prompt is empty"):
        scenes("")
    with pytest.raises(TextError, match="has 60. tokens, and the generator reads 512; shorten it"):
        scenes("rain " * 600)
    with pytest.raises(TextError, match="at most 10000"):
        scenes("rain " * 2001)
    for seconds in (0, 1000, math.nan):
        with pytest.raises(ConfigurationError, match="up to 120 seconds"):
            scenes("rain", seconds)


def test_parts_that_do_not_belong_are_refused(
    scenes: ScenePipeline, parts: dict[str, str], text_folder: Path, tokenizer_folder: Path
) -> None:
    with pytest.raises(ModelMismatchError, match="latents of 16 numbers"):
        ScenePipeline(scenes.generator, DashengTokenizerModel.from_pretrained(tokenizer_folder), scenes.text_encoder)
    with pytest.raises(ModelMismatchError, match="width 24, but the text encoder gives 16"):
        ScenePipeline(scenes.generator, scenes.tokenizer, load_text_encoder(text_folder))
    with pytest.raises(CheckpointError, match="the generator's text encoder cannot be loaded"):
        load_pipeline(broken_names(FIXTURE, text_folder.parent, "text_encoder_name"), parts["tokenizer"], device="cpu")
    with pytest.raises(CheckpointError, match="the generator's tokenizer cannot be loaded"):
        load_pipeline(broken_names(FIXTURE, text_folder.parent, "tokenizer_name"), device="cpu")
    with pytest.raises(CheckpointError, match=r"nowhere/at/all: no such folder"):
        load_pipeline(FIXTURE, parts["tokenizer"], "nowhere/at/all", device="cpu")


def broken_names(source: Path, parent: Path, entry: str) -> Path:
    """A copy whose config names a part that is nowhere."""
    folder = parent / f"without-{entry}"
    shutil.copytree(source, folder, dirs_exist_ok=True)
    reconfigure(folder, **{entry: "no such place"})
    return folder


def test_a_text_encoder_of_another_width_needs_its_own_generator(copy: Path) -> None:
    """As of a multilingual variant: the width is read from the weights, the config does not tell it."""

    def wider(state: dict[str, Tensor]) -> None:
        weight = state["content_encoder.text_encoder.proj.weight"]
        state["content_encoder.text_encoder.proj.weight"] = torch.cat([weight, weight[:, :8]], dim=1)

    rewrite(copy, wider)
    model = AudioGen.from_pretrained(copy)
    assert model.config.text_dim == 32 and model.config.content_dim == 24
    assert model.sample([torch.zeros(3, 32)], [4], seeds=[0], steps=1)[0].shape == (4, 16)


def test_a_multilingual_encoder_is_a_matter_of_its_name(copy: Path, parts: dict[str, str], tmp_path: Path) -> None:
    from transformers import MT5Config, MT5EncoderModel

    words = tmp_path / "mt5"
    shutil.copytree(parts["text_encoder"], words, ignore=shutil.ignore_patterns("model*", "config.json"))
    torch.manual_seed(1)
    MT5EncoderModel(
        MT5Config(vocab_size=len(WORDS) + 3, d_model=24, d_kv=6, d_ff=32, num_layers=1, num_heads=4)
    ).save_pretrained(words)
    reconfigure(copy, text_encoder_name=str(words), tokenizer_name=parts["tokenizer"])
    (clip,) = load_pipeline(copy, device="cpu")("rain", 0.2, steps=1)
    assert clip.audio.shape == (3200,)


# ---------------------------------------------------------------------- command


def test_command_makes_a_scene(
    copy: Path, parts: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import soundfile

    reconfigure(copy, text_encoder_name=parts["text_encoder"], tokenizer_name=parts["tokenizer"])
    out = tmp_path / "out.wav"
    words = [
        "a dog barks",
        "--music",
        "soft piano",
        "--ambience",
        "rain",
        "--steps",
        "2",
        "--seed",
        "7",
        "-o",
        str(out),
    ]
    assert main(["generate", "--model", str(copy), "--device", "cpu", *words]) == 0
    assert "'a dog barks' →" in capsys.readouterr().out
    (wanted,) = load_pipeline(copy, device="cpu")(
        ScenePrompt("a dog barks", music="soft piano", ambience="rain"), steps=2, seed=7
    )
    assert soundfile.info(out).frames == len(wanted.audio)


def test_command_reads_parts_from_a_file_and_names_what_cannot_be(
    copy: Path, parts: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reconfigure(copy, text_encoder_name=parts["text_encoder"], tokenizer_name=parts["tokenizer"])
    requests, out = tmp_path / "scenes.jsonl", tmp_path / "out"
    rows = [
        {"text": "rain", "sfx": "bell", "seconds": 0.2},
        {"text": "rain", "sfx": " ", "seconds": 0.2},
        {"text": "rain " * 600, "seconds": 0.2},
        {"text": "rain", "sfx": "dog", "seconds": 0.2},
    ]
    requests.write_text("\n".join(json.dumps(row) for row in rows))
    command = ["generate", "--model", str(copy), "--device", "cpu", "--from-file", str(requests), "--steps", "1"]
    assert main([*command, "-o", str(out)]) == 1
    said = capsys.readouterr().err
    assert "sfx of the prompt is empty" in said and "reads 512; shorten it" in said
    listed = [json.loads(line) for line in (out / "generated.jsonl").read_text().splitlines()]
    assert [row["sfx"] for row in listed] == ["bell", "dog"] and len(list(out.glob("*.wav"))) == 2
    requests.write_text(json.dumps({"text": "rain", "sfx": 3}))
    assert main([*command, "-o", str(out)]) != 0
    assert '"sfx" is 3; write a string' in capsys.readouterr().err


def test_other_generators_refuse_parts(
    generator_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", "a dog", "--model", str(generator_folder), "--device", "cpu", "-o", str(tmp_path / "a.wav")]
    assert main([*command, "--sfx", "bell"]) == 1
    assert "published sibling generator alone" in capsys.readouterr().err
    assert not (tmp_path / "a.wav").exists()
