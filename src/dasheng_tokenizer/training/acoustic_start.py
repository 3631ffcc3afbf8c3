"""A start of the acoustic layer that puts the log-mel spectrogram where the semantic encoder is quiet.

The decoder sees the sum z = s + a of a semantic embedding s, which is frozen, and an acoustic embedding a, which is
linear in a patch m of the log-mel spectrogram but for a layer norm. For the recovery of m, s is noise: strong in some
directions of the latent space, hundreds of times weaker in others. The linear code of a given power that loses least is
known (Lee and Petersen 1976, optimal linear coding for vector channels): the k-th strongest principal component of m,
of variance v_k, goes into the k-th quietest direction of s, of variance n_k, with the power

    p_k = max(0, sqrt(v_k n_k / λ) - n_k),    λ such that the p_k sum up to the power allowed,

which leaves the error v_k n_k / (n_k + p_k). Directions in which s is loud get nothing and stay purely semantic.

The layer norm would undo that: it divides by a length that hangs on m. So a constant vector, `offset` times as long as
the rest, goes into one more direction before the norm, which makes it nearly a multiplication by a constant; the
norm's bias takes the constant out again. The norm also takes out the mean over the dimensions, so all this happens in
the D - 1 dimensions without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dasheng_tokenizer.errors import ConfigurationError, DataError
from dasheng_tokenizer.semantic_encoder import FRAMES_PER_TOKEN
from dasheng_tokenizer.spectral import CONTEXT, SAMPLES_PER_TOKEN

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from dasheng_tokenizer.tokenizer import DashengTokenizerModel
    from dasheng_tokenizer.training.tokenizer_state import Crops

LEAST_NOISE = 1e-6
"""Of the mean variance of the semantic embedding: a direction in which it never moves is quiet, not silent."""

BISECTIONS = 200


@dataclass(frozen=True)
class AcousticStartConfig:
    """How the acoustic layer starts.

    Attributes:
        kind: `random` weights, or `water_filling`, see the module.
        power: of the acoustic embedding, in units of the semantic embedding's variance summed over dimensions.
        offset: length of the constant vector in the layer norm, in units of what varies.
        tokens: of the training data that covariances are taken over, rounded up to whole batches.
    """

    kind: Literal["random", "water_filling"] = "random"
    power: float = 2.0
    offset: float = 5.0
    tokens: int = 131_072

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if not (0 < self.power < float("inf") and 0 <= self.offset < float("inf") and self.tokens >= 1):
            raise ConfigurationError(
                f"acoustic_start: power {self.power} must be above 0, offset {self.offset} not negative, both finite, "
                f"tokens {self.tokens} at least 1"
            )


@torch.no_grad()
def start_acoustic_layer(
    fabric: Fabric, model: DashengTokenizerModel, data: Crops, config: AcousticStartConfig
) -> None:
    """Set a model's acoustic layer by water-filling over the first crops of its training data.

    Args:
        fabric: of the run; its ranks share the work and end with the same layer.
        model: whose `encoder.patch_embed` and `encoder.norm` are set.
        data: of the run.
        config: how.

    Raises:
        ConfigurationError: a VAE, which has no acoustic layer.
        DataError: the data is silent, or has fewer tokens than the latent has dimensions.
    """
    layer, norm = model.injection.patch_embed, model.injection.norm
    model.to(device=fabric.device)  # type: ignore[call-arg, arg-type]
    moments = [_Moments(), _Moments()]
    for pair in _tokens(fabric, model, data, config.tokens):
        for held, rows in zip(moments, pair, strict=True):
            held.add(rows)
    (mean, patches), (_, semantic) = (held.result(fabric) for held in moments)
    if moments[0].count * fabric.world_size <= model.latent_dim or not float(patches.trace()) > 0:
        raise DataError("acoustic_start needs sound, and more tokens than the latent has dimensions; name more data")
    weight, constant, gain = water_filling(patches, semantic, config.power, config.offset)
    bias = (constant - weight @ mean).float()
    layer.weight.copy_(weight.float().reshape(layer.weight.shape))
    assert layer.bias is not None
    layer.bias.copy_(bias)
    norm.weight.fill_(gain)
    norm.bias.zero_()
    acoustic = _Moments()
    for rows, _ in _tokens(fabric, model, data, config.tokens):
        acoustic.add(norm(F.linear(rows.to(bias.device), weight.float(), bias)))
    norm.bias.copy_(-acoustic.result(fabric)[0].float())


def water_filling(patches: Tensor, semantic: Tensor, power: float, offset: float) -> tuple[Tensor, Tensor, float]:
    """The code, from the covariances of what is coded and of what disturbs.

    Args:
        patches: (K, K) covariance of log-mel patches.
        semantic: (D, D) covariance of semantic embeddings.
        power: see `AcousticStartConfig`.
        offset: see there.

    Returns:
        (D, K) weight, (D,) constant before the norm, and the norm's gain.
    """
    dim = len(semantic)
    flat = torch.full((dim, 1), dim**-0.5, dtype=semantic.dtype, device=semantic.device)  # what the norm takes out
    clear = torch.eye(dim, dtype=semantic.dtype, device=semantic.device) - flat @ flat.T
    # The flat direction gets a negative variance, so that it comes first and can be left out.
    noise, directions = torch.linalg.eigh(clear @ semantic @ clear - float(semantic.trace()) * flat @ flat.T)
    channels = min(len(patches), dim - 2)
    noise = noise[2 : 2 + channels].clamp(min=LEAST_NOISE * float(semantic.trace()) / dim)
    variance, components = (part.flip(-1)[..., :channels] for part in torch.linalg.eigh(patches))
    variance = variance.clamp(min=0.0)
    shares = _shares(variance, noise, power * float(semantic.trace()))  # (channels,)
    amplitudes = torch.where(variance > 0, (shares / variance.clamp(min=1e-30)).sqrt(), 0.0)
    weight = directions[:, 2 : 2 + channels] * amplitudes @ components.T  # (D, K)
    total = float(shares.sum())
    # Of the rows of a layer norm of gain 1 the squares sum up to D; a share of 1 / (1 + offset²) of that varies.
    gain = (total * (1 + offset**2) / dim) ** 0.5
    return weight, directions[:, 1] * offset * total**0.5, gain


def _shares(variance: Tensor, noise: Tensor, power: float) -> Tensor:
    """(K,) powers of the channels that sum up to `power`."""
    low, high = 1e-30, float((variance / noise).max())  # of λ: above `high` no channel gets any
    for _ in range(BISECTIONS):
        level = (low * high) ** 0.5
        shares = ((variance * noise / level).sqrt() - noise).clamp(min=0.0)
        low, high = (level, high) if float(shares.sum()) > power else (low, level)
    return shares * (power / float(shares.sum()))


def _tokens(fabric: Fabric, model: DashengTokenizerModel, data: Crops, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Log-mel patches (n, K) and semantic embeddings (n, D) of this rank's share of the first crops, on its device."""
    seen = 0
    for batch in data.batches(0, tokens):
        batch = batch.to(fabric.device)
        frames = FRAMES_PER_TOKEN * ((batch.audio.shape[-1] - 2 * CONTEXT) // SAMPLES_PER_TOKEN)
        log_mel = model.injection.front_end(batch.audio, frames)  # (B, n_mels, 4·N)
        patches = log_mel.unflatten(-1, (-1, FRAMES_PER_TOKEN)).transpose(1, 2).flatten(2)  # (B, N, n_mels·4)
        features = model.encode_features(batch.audio) if batch.features is None else batch.features
        semantic = model.injection.semantic_norm(features.float())  # (B, N, D)
        yield patches.flatten(0, 1), semantic.flatten(0, 1)
        seen += patches.shape[0] * patches.shape[1]
        if seen * fabric.world_size >= tokens:
            break


class _Moments:
    """Mean and covariance of rows that come in pieces, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: Tensor | None = None
        self.squares: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """(n, K) more rows."""
        rows = rows.double()
        self.count += len(rows)
        self.sums = rows.sum(0) if self.sums is None else self.sums + rows.sum(0)
        squares = rows.T @ rows
        self.squares = squares if self.squares is None else self.squares + squares

    def result(self, fabric: Fabric) -> tuple[Tensor, Tensor]:
        """(K,) mean and (K, K) covariance over all ranks."""
        assert self.sums is not None and self.squares is not None
        count = torch.tensor(float(self.count), dtype=torch.float64, device=self.sums.device)
        held = [count, self.sums, self.squares]
        if fabric.world_size > 1:
            held = [fabric.all_reduce(one, reduce_op="sum") for one in held]  # type: ignore[misc]
        mean = held[1] / held[0]
        return mean, held[2] / held[0] - torch.outer(mean, mean)
