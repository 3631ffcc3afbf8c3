"""AdamW, its schedule, a step that never takes in a non-finite gradient, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dasheng_tokenizer.training.configuration import OptimizerConfig
from dasheng_tokenizer.training.sharding import local, whole

if TYPE_CHECKING:
    from lightning_fabric import Fabric

NamedParameters = Iterable[tuple[str, nn.Parameter]]


def make_adamw(parameters: NamedParameters, config: OptimizerConfig) -> torch.optim.AdamW:
    """Build AdamW that decays matrices and convolution kernels only; norms, biases and layer scales keep their size."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for _, parameter in parameters:
        if parameter.requires_grad:
            (decayed if parameter.ndim > 1 else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    # One fused kernel instead of a dozen passes over every tensor.
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of one step: linear warm-up, then half a cosine down to `final_fraction`.

    A function of the step alone, so that a resumed run needs no scheduler state.

    Args:
        config: peak, warm-up and final fraction.
        step: from 0.
        steps: length of the schedule.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    return config.lr * (config.final_fraction + (1 - config.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Give every parameter group the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = value


def guarded_step(
    fabric: Fabric, optimizer: torch.optim.Optimizer, loss: Tensor, clip_grad_norm: float
) -> tuple[Tensor, bool]:
    """Clip the gradient and step, unless the loss or the gradient is not finite on any rank.

    A skipped step leaves weights and optimizer state as they were. All ranks decide alike: they share one vote. The
    vote costs one synchronisation with the accelerator a step.

    Args:
        fabric: of the run.
        optimizer: holds the parameters, whose gradients are cleared in either case.
        loss: the scalar that was back-propagated, detached.
        clip_grad_norm: largest gradient norm.

    Returns:
        The gradient norm before clipping, and whether the step was taken.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = whole(nn.utils.get_total_norm(gradients, foreach=True))  # over the rows of all ranks
    nn.utils.clip_grads_with_norm_(parameters, clip_grad_norm, norm, foreach=True)
    finite = torch.isfinite(norm) & torch.isfinite(loss)
    taken = not any_rank(fabric, ~finite)
    if taken:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, taken


def any_rank(fabric: Fabric, flag: Tensor) -> bool:
    """Whether the flag is set on at least one rank."""
    if fabric.world_size > 1:
        flag = fabric.all_reduce(flag.float(), reduce_op="sum") > 0  # type: ignore[assignment, union-attr, operator]
    return bool(flag)


class ExponentialMovingAverage:
    """Average of the trained weights over the last ~1/(1-decay) steps.

    The decay rises with the number of updates n as (1+n)/(10+n) up to its final value, so that a short run is not held
    back by its random start. Of sharded weights each rank averages its rows.
    """

    def __init__(self, parameters: NamedParameters, decay: float) -> None:
        """Start from the current weights.

        Args:
            parameters: named parameters; those without gradient are left out.
            decay: final decay, in [0, 1); 0 follows the weights.
        """
        named = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
        self.names = [name for name, _ in named]
        self.parameters: list[Tensor] = [parameter for _, parameter in named]
        self.values = [parameter.detach().clone() for parameter in self.parameters]
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the current weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(_locals(self.values), _locals(self.parameters), 1 - decay)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average in place of the weights, and the weights back afterwards."""
        kept = [parameter.clone() for parameter in _locals(self.parameters)]
        self._write(self.values)
        try:
            yield
        finally:
            self._write(kept)

    def state_dict(self) -> dict[str, Tensor]:
        """Averaged tensors by parameter name."""
        return dict(zip(self.names, self.values, strict=True))

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor], updates: int) -> None:
        """Restore what `state_dict` gave, of sharded tensors this rank's rows, and the number of updates behind it."""
        for name, value in zip(self.names, self.values, strict=True):
            local(value).copy_(state[name])
        self.updates = updates

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        torch._foreach_copy_(_locals(self.parameters), _locals(values))


def _locals(tensors: list[Tensor]) -> list[Tensor]:
    """This rank's rows, without gradients."""
    return [local(tensor.detach()) for tensor in tensors]
