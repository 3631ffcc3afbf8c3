"""Mean and standard deviation of the frozen encoder's features, in every dimension, over the crops a run will see."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dasheng_tokenizer.errors import ConfigurationError
from dasheng_tokenizer.semantic_encoder import FeatureNorm
from dasheng_tokenizer.tokenizer import DashengTokenizerModel
from dasheng_tokenizer.training.tokenizer_state import Crops

if TYPE_CHECKING:
    from lightning_fabric import Fabric

TOKENS = 65_536
"""Tokens that the statistics are taken over: 44 minutes of audio. The standard error of a mean is then below 1 % of
the standard deviation even if only one token in six says something new."""


@torch.no_grad()
def set_feature_statistics(fabric: Fabric, model: DashengTokenizerModel, data: Crops, tokens: int = TOKENS) -> None:
    """Set the statistics of a model with `normalize_semantic` from the first crops of its training data.

    Args:
        fabric: of the run; its ranks share the work and end with the same statistics.
        model: whose `encoder.semantic_norm` is set.
        data: of the run.
        tokens: how many to look at, over all ranks together, rounded up to whole batches.

    Raises:
        ConfigurationError: the model does not normalise its features.
    """
    norm = model.injection.semantic_norm
    if not isinstance(norm, FeatureNorm):
        raise ConfigurationError("this model takes its features as they are; set model.normalize_semantic: true")
    model.to(device=fabric.device)  # type: ignore[call-arg, arg-type]
    sums = torch.zeros(3, model.latent_dim, dtype=torch.float64, device=fabric.device)  # count, sum, sum of squares
    for batch in data.batches(0, tokens):
        batch = batch.to(fabric.device)
        features = model.encode_features(batch.audio) if batch.features is None else batch.features  # (B, N, D)
        rows = features.flatten(0, 1).double()  # (B·N, D)
        sums += torch.stack([torch.full_like(rows[0], len(rows)), rows.sum(0), rows.square().sum(0)])
        if sums[0, 0] * fabric.world_size >= tokens:
            break
    if fabric.world_size > 1:
        sums = fabric.all_reduce(sums, reduce_op="sum")  # type: ignore[assignment]
    mean = sums[1] / sums[0]  # (D,)
    variance = (sums[2] / sums[0] - mean.square()).clamp(min=0.0)
    norm.set_statistics(mean.float(), variance.sqrt().float())
