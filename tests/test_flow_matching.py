"""Flow matching: exact velocity fields reach the right distribution, integrators their order, guidance its cost."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dasheng_tokenizer.errors import ConfigurationError
from dasheng_tokenizer.generation.flow_matching import (
    SWAY_RANGE,
    Velocity,
    flow_matching_loss,
    guided,
    integrate,
    interpolate,
    sample_timesteps,
    timestep_schedule,
)

pytestmark = pytest.mark.usefixtures("one_thread")

MEAN, STD = 3.0, 0.5
CENTRES, SPREAD, WEIGHTS = (-2.0, 1.0), 0.3, (0.3, 0.7)


def normal_quantiles(count: int) -> Tensor:
    """Evenly spread noise (count, 1, 1): moments without the luck of a draw."""
    places = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return torch.special.ndtri(places)[:, None, None]


def gaussian(mean: float, std: float) -> Velocity:
    """Mean of data - noise given x_t, for data N(mean, std²): a linear regression, since all is jointly normal."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        t = t[:, None, None]
        variance = (1 - t) ** 2 + (t * std) ** 2
        return mean + (t * std**2 - (1 - t)) / variance * (x - t * mean)

    return velocity


def mixture(x: Tensor, t: Tensor) -> Tensor:
    """That of a mixture: the components' fields, weighted by how likely each made x_t."""
    time = t[:, None, None]
    variance = (1 - time) ** 2 + (time * SPREAD) ** 2
    centres = torch.tensor(CENTRES, dtype=x.dtype)
    likelihood = torch.tensor(WEIGHTS).log() - (x - time * centres) ** 2 / (2 * variance)  # (B, 1, 2)
    fields = torch.cat([gaussian(centre, SPREAD)(x, t) for centre in CENTRES], dim=-1)  # (B, 1, 2)
    return (likelihood.softmax(-1) * fields).sum(-1, keepdim=True)


def mixture_quantiles(places: Tensor) -> Tensor:
    """Where the mixture's distribution function has the given values, by bisection."""
    low, high = torch.full_like(places, -10.0), torch.full_like(places, 10.0)
    for _ in range(60):
        middle = (low + high) / 2
        parts = zip(WEIGHTS, CENTRES, strict=True)
        below = sum(weight * torch.special.ndtr((middle - centre) / SPREAD) for weight, centre in parts) < places
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low


# ---------------------------------------------------------------------- analytic cases


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun"])
@pytest.mark.parametrize("sway", [0.0, -1.0])
def test_the_field_of_a_gaussian_reaches_its_mean_and_variance(method: str, sway: float) -> None:
    noise = normal_quantiles(2001)
    samples = integrate(gaussian(MEAN, STD), noise, timestep_schedule(200, sway), method)
    assert samples.mean() == pytest.approx(MEAN, abs=1e-3)
    assert samples.std() == pytest.approx(STD * float(noise.std()), rel=0.02)


@pytest.mark.parametrize("sway", [0.0, -1.0])
def test_the_field_of_a_mixture_reaches_its_moments_and_mode_weights(sway: float) -> None:
    samples = integrate(mixture, normal_quantiles(4001), timestep_schedule(200, sway), "midpoint")
    mean = sum(weight * centre for weight, centre in zip(WEIGHTS, CENTRES, strict=True))
    second = sum(weight * (centre**2 + SPREAD**2) for weight, centre in zip(WEIGHTS, CENTRES, strict=True))
    assert samples.mean() == pytest.approx(mean, abs=0.01)
    assert samples.var() == pytest.approx(second - mean**2, rel=0.01)
    right = samples > sum(CENTRES) / 2
    assert right.double().mean() == pytest.approx(WEIGHTS[1], abs=0.005)
    for chosen, centre in ((~right, CENTRES[0]), (right, CENTRES[1])):
        assert samples[chosen].mean() == pytest.approx(centre, abs=0.01)
        assert samples[chosen].std() == pytest.approx(SPREAD, rel=0.02)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2)])
@pytest.mark.parametrize("sway", [0.0, -1.0])
def test_integrators_converge_at_their_order(method: str, order: int, sway: float) -> None:
    """On the mixture: on a single Gaussian midpoint happens to reach order 3."""
    noise = normal_quantiles(21)
    exact = mixture_quantiles(torch.special.ndtr(noise))  # paths on a line never cross: the flow keeps quantiles

    def error(steps: int) -> float:
        return float((integrate(mixture, noise, timestep_schedule(steps, sway), method) - exact).abs().max())

    assert math.log2(error(128) / error(256)) == pytest.approx(order, abs=0.1)


# ---------------------------------------------------------------------- other implementations


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun"])
def test_equal_to_torchdiffeq(method: str) -> None:
    torchdiffeq = pytest.importorskip("torchdiffeq")
    noise = torch.randn(64, 3, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    times = timestep_schedule(13, -0.7)
    name = {"heun": "heun2"}.get(method, method)
    theirs = torchdiffeq.odeint(lambda t, x: mixture(x, t.expand(len(x))), noise, times, method=name)[-1]
    assert torch.allclose(integrate(mixture, noise, times, method), theirs, rtol=0, atol=1e-12)


def test_equal_to_the_scheduler_of_diffusers() -> None:
    """Theirs counts sigma from 1, noise, to 0, data, and its velocity points from data to noise."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    times = timestep_schedule(11, -1.0)
    scheduler.set_timesteps(sigmas=(1 - times[:-1]).tolist())
    noise = torch.randn(32, 2, 1, generator=torch.Generator().manual_seed(0))
    theirs = noise
    for step, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        velocity = mixture(theirs, (1 - sigma).expand(len(noise)))
        theirs = scheduler.step(-velocity, step, theirs, return_dict=False)[0]
    assert torch.allclose(integrate(mixture, noise, times), theirs, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------- learning


def test_a_small_network_learns_the_field_of_three_clouds() -> None:
    torch.manual_seed(0)
    centres = torch.tensor([[1.5, 1.0], [-1.5, 1.0], [0.0, -1.5]])
    network = nn.Sequential(nn.Linear(3, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, 2))

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return network(torch.cat([x, t[:, None, None]], dim=-1))

    steps = 200
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        data = centres[torch.randint(3, (128, 1))] + 0.2 * torch.randn(128, 1, 2)
        loss = flow_matching_loss(velocity, data, torch.randn_like(data), sample_timesteps(128))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        samples = integrate(velocity, torch.randn(1000, 1, 2), timestep_schedule(20))[:, 0]
    distances = torch.cdist(samples, centres)  # (1000, 3)
    assert distances.min(1).values.mean() < 0.4  # of the noise 1.08, of the data 0.25
    assert torch.bincount(distances.argmin(1), minlength=3).min() > 250


def test_the_exact_field_has_the_least_loss() -> None:
    """The loss is the variance that is left plus the squared distance from the exact field."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20_000, 1, 1, generator=generator)
    data = MEAN + STD * torch.randn(20_000, 1, 1, generator=generator)
    t = sample_timesteps(20_000, "uniform", generator=generator)
    exact = gaussian(MEAN, STD)
    best = flow_matching_loss(exact, data, noise, t)
    off = flow_matching_loss(lambda x, t: exact(x, t) + 0.5, data, noise, t)
    assert off - best == pytest.approx(0.25, abs=0.02)


def test_the_line_runs_from_noise_to_data_at_constant_velocity() -> None:
    data, noise = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    assert torch.equal(interpolate(data, noise, torch.zeros(3))[0], noise)
    assert torch.equal(interpolate(data, noise, torch.ones(3))[0], data)
    early, velocity = interpolate(data, noise, torch.full((3,), 0.25))
    late, same = interpolate(data, noise, torch.full((3,), 0.75))
    assert torch.equal(velocity, same)
    assert torch.allclose(late, early + 0.5 * velocity, atol=1e-6)


def test_padding_does_not_count_and_clips_weigh_equally() -> None:
    torch.manual_seed(0)
    data, noise, t = torch.randn(2, 6, 3), torch.randn(2, 6, 3), torch.rand(2)
    mask = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    loss = flow_matching_loss(lambda x, t: 0.3 * x, data, noise, t, mask)
    alone = [
        flow_matching_loss(lambda x, t: 0.3 * x, data[i : i + 1, :n], noise[i : i + 1, :n], t[i : i + 1])
        for i, n in ((0, 6), (1, 2))
    ]
    assert loss == pytest.approx(float(sum(alone)) / 2)
    data[1, 2:], noise[1, 2:] = math.nan, math.inf
    data.requires_grad_(True)
    again = flow_matching_loss(lambda x, t: 0.3 * x, data, noise, t, mask)
    assert torch.equal(loss, again)


# ---------------------------------------------------------------------- times


def test_sway_is_that_of_the_published_sibling() -> None:
    """Its sigma runs the other way: sigma = 1 - (u + s·(cos(πu/2) - 1 + u)), with s = -1 simply cos(πu/2)."""
    u = torch.linspace(0, 1, 26, dtype=torch.float64)
    assert torch.allclose(1 - timestep_schedule(25, -1.0), torch.cos(math.pi / 2 * u), rtol=0, atol=1e-12)
    assert torch.allclose(timestep_schedule(25), u, rtol=0, atol=1e-12)
    # Values of that formula by hand, s = 0.5 at u = 1/2: 0.5 + 0.5·(0.70711 - 0.5).
    assert timestep_schedule(2, 0.5)[1] == pytest.approx(0.5 + 0.5 * (math.sqrt(0.5) - 0.5))


@pytest.mark.parametrize("sway", [*SWAY_RANGE, -0.5, 0.0, 0.8])
@pytest.mark.parametrize("steps", [1, 2, 25])
def test_times_rise_from_exactly_zero_to_exactly_one(sway: float, steps: int) -> None:
    times = timestep_schedule(steps, sway)
    assert times.shape == (steps + 1,)
    assert times[0] == 0 and times[-1] == 1
    assert bool((times.diff() > 0).all())


def test_schedules_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="at least 1"):
        timestep_schedule(0)
    for sway in (-1.01, 1.76, math.nan):
        with pytest.raises(ConfigurationError, match="backwards"):
            timestep_schedule(5, sway)


def test_training_times_have_the_distribution_asked_for() -> None:
    generator = torch.Generator().manual_seed(0)
    uniform = sample_timesteps(20_000, "uniform", generator=generator)
    assert uniform.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist() == pytest.approx([0.1, 0.5, 0.9], abs=0.02)
    logits = sample_timesteps(20_000, mean=-0.4, std=1.3, generator=generator).logit()
    assert logits.mean() == pytest.approx(-0.4, abs=0.03)
    assert logits.std() == pytest.approx(1.3, rel=0.02)
    with pytest.raises(ConfigurationError, match="uniform, logit_normal"):
        sample_timesteps(3, "normal")  # type: ignore[arg-type]


def test_training_times_follow_the_generator_alone() -> None:
    first, again = (sample_timesteps(9, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, again)


# ---------------------------------------------------------------------- sampling


def counted(answers: dict[bool, float], calls: list[int]) -> Callable[[tuple[bool, ...]], Velocity]:
    """A network that answers a constant with and another without the condition, and notes the batches it gets."""

    def velocity_for(conditional: tuple[bool, ...]) -> Velocity:
        def velocity(x: Tensor, t: Tensor) -> Tensor:
            calls.append(len(x))
            parts = x.chunk(len(conditional))
            return torch.cat([part + answers[flag] for part, flag in zip(parts, conditional, strict=True)])

        return velocity

    return velocity_for


@pytest.mark.parametrize(("guidance", "expected", "batch"), [(0, 10.0, 3), (1, 12.0, 3), (3, 16.0, 6), (0.5, 11.0, 6)])
def test_guidance_goes_from_without_to_with_and_beyond(guidance: float, expected: float, batch: int) -> None:
    calls: list[int] = []
    x = torch.randn(3, 2, 1)
    velocity = guided(counted({False: 10.0, True: 12.0}, calls), guidance)
    assert torch.allclose(velocity(x, torch.rand(3)), x + expected, atol=1e-5)
    assert calls == [batch]


@pytest.mark.parametrize("guidance", [-1.0, math.nan, math.inf])
def test_guidance_that_cannot_be_is_refused(guidance: float) -> None:
    with pytest.raises(ConfigurationError, match="guidance"):
        guided(counted({False: 0.0, True: 1.0}, []), guidance)


@pytest.mark.parametrize(("method", "evaluations"), [("euler", 1), ("midpoint", 2), ("heun", 2)])
def test_cost_progress_and_number_type(method: str, evaluations: int) -> None:
    times: list[float] = []
    shown: list[tuple[int, int]] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        times.append(float(t[0]))
        return x.to(torch.bfloat16)

    result = integrate(velocity, torch.ones(2, 3, 4), timestep_schedule(4), method, lambda *done: shown.append(done))
    assert len(times) == 4 * evaluations
    assert times[0] == 0
    assert max(times) == 1 if method == "heun" else max(times) < 1  # only Heun asks data for its velocity
    assert shown == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert result.dtype == torch.float32
    with pytest.raises(ConfigurationError, match="euler, midpoint, heun"):
        integrate(velocity, torch.ones(2, 3, 4), timestep_schedule(4), "leap")  # type: ignore[arg-type]
