"""The diffusion transformer: batch invariance, exact reuse of texts, sizes, precision, export, bad input."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dasheng_tokenizer.errors import ConfigurationError, LatentError, MaskError
from dasheng_tokenizer.generation.dit import DiffusionTransformer, DiTConfig
from dasheng_tokenizer.generation.dit_blocks import rotary_turns, rotate, time_features

CONFIG = DiTConfig(latent_dim=12, text_dim=10, width=32, depth=3, heads=2)
SKIPS = dataclasses.replace(CONFIG, long_skips=True)


def fresh(config: DiTConfig = CONFIG) -> DiffusionTransformer:
    torch.manual_seed(0)
    return DiffusionTransformer(config)


def awake(config: DiTConfig = CONFIG) -> DiffusionTransformer:
    """A tiny transformer moved away from its start, where gates and output are zero and hide every mistake."""
    model, generator = fresh(config).eval(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(clips: int = 2, tokens: int = 7, words: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    times = torch.rand(clips, generator=torch.Generator().manual_seed(seed))
    return noise(clips, tokens, 12, seed=seed), times, noise(clips, words, 10, seed=seed + 1)


def mask_of(lengths: list[int], width: int) -> Tensor:
    return torch.arange(width) < torch.tensor(lengths)[:, None]


MODELS = {"plain": awake(), "skips": awake(SKIPS)}


# ---------------------------------------------------------------------- properties


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", MODELS)
@given(data=st.data())
@settings(max_examples=8, deadline=None)
@torch.no_grad()
def test_batch_invariance(kind: str, training: bool, data: st.DataObject) -> None:
    """A clip alone, or beside longer clips and texts with NaN under both masks: the same velocity."""
    model = MODELS[kind].train(training)
    tokens = data.draw(st.lists(st.integers(1, 40), min_size=2, max_size=4))
    words = data.draw(st.lists(st.integers(1, 9), min_size=len(tokens), max_size=len(tokens)))
    longest = max(tokens) + data.draw(st.integers(0, 5))
    latents, t, text = inputs(len(tokens), longest, max(words) + data.draw(st.integers(0, 3)), seed=sum(tokens))
    token_mask, text_mask = mask_of(tokens, longest), mask_of(words, text.shape[1])
    latents[~token_mask] = float("nan")
    text[~text_mask] = float("nan")
    together = model(latents, t, text, text_mask, token_mask)
    assert together.abs().max() > 0.1
    assert not together[~token_mask].any()
    for item, (length, count) in enumerate(zip(tokens, words, strict=True)):
        one = slice(item, item + 1)
        alone = model(latents[one, :length], t[one], text[one, :count])
        torch.testing.assert_close(together[one, :length], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [CONFIG, SKIPS, dataclasses.replace(SKIPS, depth=4)])
@torch.no_grad()
def test_a_fresh_transformer_answers_zero_and_its_blocks_change_nothing(config: DiTConfig) -> None:
    model = fresh(config)
    latents, t, text = inputs()
    assert torch.equal(model(latents, t, text), torch.zeros_like(latents))
    model.latent_out = torch.nn.Identity()
    expected = torch.nn.functional.layer_norm(model.latent_in(latents), (32,), eps=1e-6)
    torch.testing.assert_close(model(latents, t, text), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_every_input_matters() -> None:
    model = MODELS["plain"]
    latents, t, text = inputs()
    velocity = model(latents, t, text)
    shifted = latents.clone()
    shifted[:, 3] += 1.0
    assert ((model(shifted, t, text) - velocity).abs().amax(-1) > 1e-4).all()  # self-attention reaches every token
    for changed in (model(latents, 0.5 * t, text), model(latents, t, text + noise(*text.shape, seed=9))):
        assert ((changed - velocity).abs().amax(-1) > 1e-3).all()
    # Without positions, tokens in another order would give the velocities in that order.
    assert (model(latents.flip(1), t, text).flip(1) - velocity).abs().max() > 1e-2
    assert (model(latents, t, text[:, :1]) - velocity).abs().max() > 1e-2


@torch.no_grad()
def test_any_length_runs() -> None:
    """A minute of tokens, with a mask and without; no length limit is stored anywhere."""
    model = MODELS["plain"]
    latents, t, text = inputs(1, 1_500)
    velocity = model(latents, t, text)
    assert torch.isfinite(velocity).all()
    masked = model(latents, t, text, None, mask_of([1_200], 1_500))
    torch.testing.assert_close(masked[:, :1_200], model(latents[:, :1_200], t, text), rtol=0, atol=1e-5)
    assert all(1_500 not in tensor.shape for tensor in model.state_dict().values())


@pytest.mark.parametrize("start", [0, 17, 4_000])
def test_rotary_scores_hang_on_the_distance_alone(start: int) -> None:
    q, k = noise(1, 16), noise(1, 16, seed=1)
    turns = rotary_turns(5_000, 16, q.device)

    def score(first: int, second: int) -> Tensor:
        return (rotate(q, turns[:, first, None]) * rotate(k, turns[:, second, None])).sum()

    for distance in (0, 1, 9):
        torch.testing.assert_close(score(start, start + distance), score(0, distance), rtol=0, atol=2e-3)
    assert (score(0, 1) - score(0, 9)).abs() > 1e-2


def test_rotary_positions_equal_a_peer() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, turns = noise(2, 3, 50, 16), rotary_turns(50, 16, torch.device("cpu"))
    cos, sin = torch.cat([turns, turns], dim=-1)[:, None]
    expected, _ = apply_rotary_pos_emb(q, q, cos, sin)
    torch.testing.assert_close(rotate(q, turns), expected, rtol=0, atol=1e-6)


def test_time_features() -> None:
    features = time_features(torch.tensor([0.0, 0.001, 1.0]))
    assert features.shape == (3, 256)
    assert torch.equal(features[0], torch.cat([torch.ones(128), torch.zeros(128)]))
    one = torch.tensor(1.0)
    torch.testing.assert_close(features[1, [0, 128]], torch.stack([one.cos(), one.sin()]))
    torch.testing.assert_close(features[2, 64], torch.tensor(10.0).cos(), rtol=0, atol=1e-4)  # 1000 / sqrt(10000)


# ---------------------------------------------------------------------- text


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_a_text_context_gives_exactly_what_the_text_gives(kind: str) -> None:
    model = MODELS[kind]
    latents, t, text = inputs()
    for text_mask in (None, mask_of([4, 2], 4)):
        context = model.encode_text(text, text_mask)
        for times in (t, 1 - t):
            assert torch.equal(model(latents, times, context), model(latents, times, text, text_mask))
    with pytest.raises(MaskError, match="already"):
        model(latents, t, context, mask_of([4, 2], 4))
    with pytest.raises(LatentError, match="2 texts"):
        model(latents[:1], t[:1], context)


def test_the_unconditional_text_is_learned() -> None:
    model = awake()
    latents, t, _ = inputs(3)
    text, mask = model.unconditional(3)
    assert text.shape == (3, 1, 10)
    assert mask.shape == (3, 1)
    model(latents, t, text, mask).square().sum().backward()
    assert model.null_text.grad.abs().max() > 0


def test_a_few_steps_learn_what_each_text_asks_for() -> None:
    """Same latents, same time, two texts, two targets."""
    model = fresh(dataclasses.replace(CONFIG, depth=2))
    latents, t, text = inputs(1, 5)
    latents, t = latents.repeat(2, 1, 1), t.repeat(2)
    text, target = noise(2, 3, 10, seed=3), noise(2, 5, 12, seed=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(50):
        loss = (model(latents, t, text) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(target.square().mean().item())
    assert losses[-1] < 0.05 * losses[0]


# ---------------------------------------------------------------------- training and precision


@pytest.mark.parametrize("config", [CONFIG, SKIPS])
def test_gradients_reach_every_parameter_and_checkpointing_keeps_them(config: DiTConfig) -> None:
    latents, t, text = inputs(2)
    gradients = []
    for checkpointing in (False, True):
        model = awake(config).train()
        model.gradient_checkpointing = checkpointing
        null_text, _ = model.unconditional(2)
        both = torch.cat([text, null_text], dim=1)
        model(latents, t, both, mask_of([5, 3], 5), mask_of([7, 4], 7)).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.abs().max() > 0, name
        assert torch.equal(gradient, gradients[1][name]), name


def test_checkpointing_keeps_less() -> None:
    """Counts the bytes kept for the backward pass."""
    kept = []
    for checkpointing in (False, True):
        model, sizes = awake(), []
        model.gradient_checkpointing = checkpointing
        latents, t, text = inputs(2, 50)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, sizes=sizes: sizes.append(tensor.nbytes) or tensor, lambda tensor: tensor
        ):
            model(latents, t, text)
        kept.append(sum(sizes))
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.parametrize("kind", MODELS)
def test_bfloat16_autocast(kind: str) -> None:
    model = awake(MODELS[kind].config)
    latents, t, text = inputs()
    masks = mask_of([4, 2], 4), mask_of([7, 5], 7)
    expected = model(latents, t, text, *masks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        velocity = model(latents, t, text, *masks)
    assert velocity.dtype == torch.float32
    assert 0 < (velocity - expected).norm() / expected.norm() < 0.05
    velocity.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert name == "null_text" or torch.isfinite(parameter.grad).all(), name


@torch.no_grad()
def test_weights_in_bfloat16() -> None:
    """Float32 latents and times go in and come out; positions and times stay exact."""
    latents, t, text = inputs(1, 300)
    expected = MODELS["plain"](latents, t, text)
    velocity = awake().bfloat16()(latents, t, text)
    assert velocity.dtype == torch.float32
    assert 0 < (velocity - expected).norm() / expected.norm() < 0.05


@pytest.mark.slow
def test_onnx_export_with_dynamic_shapes(tmp_path: Any) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, names = awake(dataclasses.replace(SKIPS, depth=2)), ["latents", "t", "text", "text_mask", "token_mask"]
    batch, tokens, words = (torch.export.Dim(name, min=1) for name in ("batch", "tokens", "words"))
    shapes = [{0: batch, 1: tokens}, {0: batch}, {0: batch, 1: words}, {0: batch, 1: words}, {0: batch, 1: tokens}]
    example = (*inputs(2, 9, 5), mask_of([5, 4], 5), mask_of([9, 6], 9))
    dynamic = dict(zip(names, shapes, strict=True))
    program = torch.onnx.export(model, example, dynamo=True, dynamic_shapes=dynamic, verbose=False)
    program.save(tmp_path / "dit.onnx")
    session = runtime.InferenceSession(tmp_path / "dit.onnx")
    for clips, length, count in ((1, 1, 1), (3, 40, 2), (2, 133, 11)):
        latents, t, text = inputs(clips, length, count)
        masks = mask_of([count] * clips, count), mask_of([length] + [1] * (clips - 1), length)
        given_inputs = dict(zip(names, (tensor.numpy() for tensor in (latents, t, text, *masks)), strict=True))
        (found,) = session.run(None, given_inputs)
        with torch.no_grad():
            expected = model(latents, t, text, *masks)
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-4)


# ---------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("size", "latent_dim", "text_dim", "width", "millions"),
    [
        ("tiny", 128, 384, 256, 4),
        ("tiny", 384, 384, 384, 9),
        ("small", 128, 384, 448, 30),
        ("small", 384, 384, 448, 30),
        ("base", 1280, 1024, 1280, 300),
        ("large", 1280, 1024, 1536, 1000),
    ],
)
def test_presets_are_as_large_as_documented(
    size: Any, latent_dim: int, text_dim: int, width: int, millions: float
) -> None:
    config = DiTConfig.preset(size, latent_dim, text_dim)
    with torch.device("meta"):
        count = DiffusionTransformer(config).num_parameters
    assert config.width == width
    assert config.width // config.heads == 64
    assert count / 1e6 == pytest.approx(millions, rel=0.07)
    (row,) = [line for line in str(DiTConfig.preset.__doc__).splitlines() if line.strip().startswith(f"| {size} |")]
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[{128: 3, 384: 4, 1280: 5}[latent_dim]] == f"{count / 1e6:.1f} M"


def test_presets_widen_with_the_latent_and_take_changes() -> None:
    assert DiTConfig.preset("tiny", 257, 8).width == 320
    assert DiTConfig.preset("small", 1280, 8).width == 1280
    changed = DiTConfig.preset("tiny", 128, 8, width=384, depth=2, long_skips=True)
    assert (changed.width, changed.heads, changed.depth, changed.long_skips) == (384, 6, 2, True)
    with pytest.raises(ConfigurationError, match="below the latent"):
        DiTConfig.preset("tiny", 384, 8, width=256)
    with pytest.raises(ConfigurationError, match="hight"):
        DiTConfig.preset("tiny", 128, 8, hight=2)
    with pytest.raises(ConfigurationError, match="tiny, small, base, large"):
        DiTConfig.preset("huge", 128, 8)  # type: ignore[arg-type]


def test_long_skips_join_both_halves() -> None:
    for depth, joined in ((2, 1), (3, 1), (4, 2)):
        config = dataclasses.replace(SKIPS, depth=depth)
        with_skips, without = fresh(config), fresh(dataclasses.replace(config, long_skips=False))
        assert with_skips.num_parameters - without.num_parameters == joined * (2 * 32 * 32 + 32)
    model = awake(SKIPS)
    arguments = inputs()
    with torch.no_grad():
        before = model(*arguments)
        model.blocks[2].skip.weight[:, 32:] = 0.0
        assert (model(*arguments) - before).abs().max() > 1e-2


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "changes",
    [
        {"width": 10, "heads": 1},
        {"heads": 3},
        {"heads": 32},
        {"depth": 0},
        {"latent_dim": 0},
        {"mlp_ratio": 0.0},
        {"mlp_ratio": float("nan")},
        {"depth": 1, "long_skips": True},
    ],
)
def test_contradicting_sizes(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize(
    ("latents", "t"),
    [
        (torch.zeros(2, 7, 11), torch.zeros(2)),
        (torch.zeros(2, 12), torch.zeros(2)),
        (torch.zeros(2, 0, 12), torch.zeros(2)),
        (torch.zeros(0, 7, 12), torch.zeros(0)),
        (torch.zeros(2, 7, 12), torch.zeros(3)),
        (torch.zeros(2, 7, 12), torch.zeros(2, 1)),
        (torch.zeros(2, 7, 12), torch.tensor(0.5)),
        (torch.zeros(3, 7, 12), torch.zeros(3)),
    ],
)
def test_latents_and_times_of_wrong_shape(latents: Tensor, t: Tensor) -> None:
    with pytest.raises(LatentError):
        MODELS["plain"](latents, t, torch.zeros(2, 4, 10))


@pytest.mark.parametrize("text", [torch.zeros(2, 4, 9), torch.zeros(2, 10), torch.zeros(2, 10, 4)])
def test_text_of_wrong_shape(text: Tensor) -> None:
    with pytest.raises(ConfigurationError, match="text encoder"):
        MODELS["plain"](torch.zeros(2, 7, 12), torch.zeros(2), text)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (mask_of([7, 7], 7).int(), "int32"),
        (mask_of([6, 6], 6), "shape"),
        (mask_of([7], 7), "shape"),
        (mask_of([7, 0], 7), "every token of item 1"),
        (~mask_of([0, 2], 7), "item 1 has holes"),
        (mask_of([7, 7], 7) & (torch.arange(7) != 3), "item 0 has holes"),
    ],
)
def test_bad_masks(mask: Tensor, message: str) -> None:
    model = MODELS["plain"]
    latents, t, text = inputs(2, 7, 7)
    with pytest.raises(MaskError, match=f"token_mask.*{message}"):
        model(latents, t, text, None, mask)
    with pytest.raises(MaskError, match=f"text_mask.*{message}"):
        model(latents, t, text, mask)


def test_a_text_without_tokens() -> None:
    latents, t, _ = inputs()
    with pytest.raises(MaskError, match="text_mask"):
        MODELS["plain"](latents, t, torch.zeros(2, 0, 10))
