"""Drawing a batch of clips by flow matching, each as if it were alone: noise by its own seed, cut at its own length.

B clips, T tokens, C latent width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dasheng_tokenizer.errors import ConfigurationError, LatentError
from dasheng_tokenizer.generation.flow_matching import Method, Progress, Velocity, guided, integrate, timestep_schedule
from dasheng_tokenizer.semantic_encoder import token_mask

STEPS, SWAY = 25, -1.0
"""Those of the published text-to-audio sibling."""

MAX_SEED = 2**63 - 1


def sample_clips(
    velocity_for: Callable[[tuple[bool, ...]], Velocity],
    num_texts: int,
    num_tokens: Sequence[int],
    seeds: Sequence[int],
    latent_dim: int,
    device: torch.device,
    *,
    steps: int = STEPS,
    guidance: float,
    method: Method = "euler",
    sway: float = SWAY,
    progress: Progress | None = None,
) -> list[Tensor]:
    """Latents of a batch of clips.

    Args:
        velocity_for: see `flow_matching.guided`; its velocity must know of `clip_mask`.
        num_texts: texts that it follows, one a clip.
        num_tokens: length T_i of each clip.
        seeds: of the noise of each clip, 0 … 2⁶³ - 1.
        latent_dim: C.
        device: where the velocity is computed.
        steps, method, sway, progress: see `flow_matching`.
        guidance: see `flow_matching.guided`.

    Returns:
        (T_i, C) each, float32, in the scale of the noise.

    Raises:
        ConfigurationError: settings out of range, or lists of different length.
        LatentError: the result is not finite.
    """
    if not num_texts == len(num_tokens) == len(seeds):
        raise ConfigurationError(
            f"{num_texts} texts, {len(num_tokens)} lengths and {len(seeds)} seeds: each clip needs one of all three"
        )
    times = timestep_schedule(steps, sway)
    if not num_texts:
        return []
    noise = nn.utils.rnn.pad_sequence(
        [clip_noise(seed, count, latent_dim) for seed, count in zip(seeds, num_tokens, strict=True)], batch_first=True
    ).to(device)  # (B, T, C)
    latents = integrate(guided(velocity_for, guidance), noise, times, method, progress)  # (B, T, C)
    clips = [clip[:count] for clip, count in zip(latents, num_tokens, strict=True)]
    if bad := [index for index, clip in enumerate(clips) if not bool(torch.isfinite(clip).all())]:
        raise LatentError(
            f"sampling clip {bad[0]} ended in NaN or infinity; lower the guidance ({guidance}), take more steps, "
            "or run the transformer in float32"
        )
    return clips


def clip_noise(seed: int, count: int, latent_dim: int) -> Tensor:
    """(count, C) standard normal, a function of its arguments alone: drawn on the CPU, alike for every device.

    Raises:
        ConfigurationError: a seed out of range, or no tokens.
    """
    if not 0 <= seed <= MAX_SEED:
        raise ConfigurationError(f"seed {seed} is outside 0 … 2⁶³ - 1")
    if count < 1:
        raise ConfigurationError(f"a clip of {count} tokens was asked for; it needs at least one")
    source = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(count, latent_dim, generator=source)


def clip_mask(num_tokens: Sequence[int], device: torch.device) -> Tensor:
    """(B, T) bool, true for the tokens of each clip."""
    return token_mask(torch.tensor(list(num_tokens), dtype=torch.int64, device=device), max(num_tokens, default=0))
