"""Flow matching (arXiv 2210.02747): learn a velocity field that carries noise to data along straight lines, follow it.

Time t runs from 0, noise, to 1, data. On the line x_t = (1 - t)·noise + t·data the velocity is data - noise. A network
that predicts it from x_t and t learns its mean over all lines through x_t; following that mean from noise ends in the
distribution of the data.

B clips, T tokens, C latent width. Masks are true for real tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from dasheng_tokenizer.errors import ConfigurationError

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x (B, T, C), t (B,)) → velocity (B, T, C)."""

Method = Literal["euler", "midpoint", "heun"]
TimestepDistribution = Literal["uniform", "logit_normal"]
Progress = Callable[[int, int], None]
"""Called with steps done and steps in all."""

SWAY_RANGE = (-1.0, 2 / (math.pi - 2))
"""Sway coefficients whose schedule never runs backwards (F5-TTS, arXiv 2410.06885)."""


def interpolate(data: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Point on the line from noise to data at t (B,), and the velocity there; all else is (B, T, C)."""
    time = t[:, None, None].to(data.dtype)  # (B, 1, 1)
    return (1 - time) * noise + time * data, data - noise


def sample_timesteps(
    count: int,
    distribution: TimestepDistribution = "logit_normal",
    *,
    mean: float = 0.0,
    std: float = 1.0,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Random times (count,) for training: uniform in [0, 1), or the sigmoid of N(mean, std²).

    The latter looks more often at the middle, where the velocity is hardest to tell (arXiv 2403.03206). Drawn on the
    generator's device, then moved to `device`.
    """
    source = generator.device if generator is not None else device
    if distribution == "uniform":
        return torch.rand(count, generator=generator, device=source).to(device)
    if distribution == "logit_normal":
        return torch.sigmoid(mean + std * torch.randn(count, generator=generator, device=source)).to(device)
    raise _unknown("timestep distribution", distribution, get_args(TimestepDistribution))


def flow_matching_loss(
    velocity: Velocity, data: Tensor, noise: Tensor, t: Tensor, token_mask: Tensor | None = None
) -> Tensor:
    """Mean squared error of the predicted velocity, a scalar.

    It is averaged over the real tokens of a clip first and then over clips, so that a short clip weighs what a long one
    does. What the padding holds does not matter.

    Args:
        velocity: the network.
        data: (B, T, C) latents.
        noise: (B, T, C) standard normal.
        t: (B,) times.
        token_mask: (B, T) bool, at least one real token a clip; None: all are real.
    """
    x, target = interpolate(data, noise, t)  # (B, T, C) each
    error = (velocity(x, t).float() - target.float()).square().mean(-1)  # (B, T)
    if token_mask is None:
        return error.mean()
    return (error.masked_fill(~token_mask, 0.0).sum(1) / token_mask.sum(1)).mean()


def timestep_schedule(steps: int, sway: float = 0.0) -> Tensor:
    """Times (steps + 1,) from 0, noise, to 1, data, in float64.

    Sway bends the even schedule u to u + sway·(cos(πu/2) - 1 + u): below 0 it takes smaller steps near the noise,
    where the content is decided, above 0 near the data. -1, the published default, gives 1 - cos(πu/2).

    Raises:
        ConfigurationError: fewer than one step, or a sway outside `SWAY_RANGE`.
    """
    if steps < 1:
        raise ConfigurationError(f"{steps} steps: sampling takes at least 1; 25 are usual")
    low, high = SWAY_RANGE
    if not low <= sway <= high:
        raise ConfigurationError(f"sway {sway} is outside {low:g} … {high:.3f}, beyond which time runs backwards")
    u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    times = u + sway * (torch.cos(math.pi / 2 * u) - 1 + u)
    times[-1] = 1  # cos(π/2) is not quite 0
    return times


def integrate(
    velocity: Velocity, noise: Tensor, times: Tensor, method: Method = "euler", progress: Progress | None = None
) -> Tensor:
    """Follow a velocity field from `noise` (B, T, C) through `times` (N + 1,); the state keeps the type of the noise.

    Euler asks for one velocity a step and its error falls with the step size; midpoint and Heun (the trapezoidal rule)
    ask for two and their error falls with its square.

    Raises:
        ConfigurationError: an unknown method.
    """
    check_method(method)
    x = noise
    steps = len(times) - 1
    for index, (start, end) in enumerate(zip(times[:-1].tolist(), times[1:].tolist(), strict=True)):
        step = end - start
        now = x.new_full((len(x),), start)  # (B,)
        slope = velocity(x, now).to(x.dtype)  # (B, T, C)
        if method == "midpoint":
            slope = velocity(x + step / 2 * slope, now + step / 2).to(x.dtype)  # (B, T, C)
        elif method == "heun":
            slope = (slope + velocity(x + step * slope, now + step).to(x.dtype)) / 2  # (B, T, C)
        x = x + step * slope
        if progress is not None:
            progress(index + 1, steps)
    return x


def evaluation_times(times: Tensor, method: Method = "euler") -> Tensor:
    """Every time (M,) at which `integrate` asks for a velocity, sorted: for what can be computed ahead.

    Raises:
        ConfigurationError: an unknown method.
    """
    check_method(method)
    if method == "midpoint":
        return torch.cat([times[:-1], (times[:-1] + times[1:]) / 2]).sort().values
    return times if method == "heun" else times[:-1]


def check_method(method: str) -> None:
    """Refuse a method that `integrate` does not know.

    Raises:
        ConfigurationError: naming those that it does.
    """
    if method not in get_args(Method):
        raise _unknown("method", method, get_args(Method))


def guided(velocity_for: Callable[[tuple[bool, ...]], Velocity], guidance: float) -> Velocity:
    """Classifier-free guidance (arXiv 2207.12598): unconditional + guidance·(conditional - unconditional).

    Args:
        velocity_for: gives the velocity of a batch that is repeated once for each flag, with the condition where the
            flag is true: (False, True) takes (2B, T, C), first all clips without condition, then all with it.
        guidance: 1 is the conditional velocity and 0 the unconditional one, each evaluated alone at half the cost;
            above 1 the condition is exaggerated.

    Raises:
        ConfigurationError: negative, NaN or infinite guidance.
    """
    if not 0 <= guidance < math.inf:
        raise ConfigurationError(f"guidance {guidance} must be a finite number of at least 0; 3 is usual, 0 is no text")
    if guidance in (0, 1):
        return velocity_for((guidance == 1,))
    both = velocity_for((False, True))

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        unconditional, conditional = both(torch.cat([x, x]), torch.cat([t, t])).chunk(2)  # (B, T, C) each
        return unconditional + guidance * (conditional - unconditional)

    return velocity


def _unknown(kind: str, name: str, known: tuple[str, ...]) -> ConfigurationError:
    return ConfigurationError(f"unknown {kind} {name!r}; choose one of {', '.join(known)}")
