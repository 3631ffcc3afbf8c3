"""Weights, gradients, optimizer states and averages shared out among the processes: FSDP2 of torch, through Fabric.

Every trained module that Fabric sets up is sharded as a whole, each of its repeated blocks as a unit of its own: a
block's weights are gathered from all processes when it runs and given up right after. Between steps a process holds
1/N of everything, as rows of `DTensor`s.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from dasheng_tokenizer.files import require_extra

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def fsdp_strategy(world_size: int) -> Any:
    """Fabric's strategy that shards modules over a number of processes.

    Raises:
        MissingExtraError: Lightning Fabric is not installed.
    """
    strategies = require_extra("lightning_fabric.strategies", "train")
    return strategies.ModelParallelStrategy(shard, data_parallel_size=world_size, tensor_parallel_size=1)


def shard(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Shard a module in place over the `data_parallel` axis of a mesh.

    Weights are gathered, and gradients summed, in float32. With `bf16-mixed` autocast rounds what a block has gathered,
    as it does without sharding, so that norms and residual sums keep their float32.

    Returns:
        The same module.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = mesh["data_parallel"]
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    marks = {name: dict(vars(parameter)) for name, parameter in module.named_parameters()}
    # The root too gives its weights up after each pass: they change in between, when averages are put in their place.
    for unit in [*wrap_units(module), module]:
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for name, parameter in module.named_parameters():
        vars(parameter).update(marks[name])
    return module


def wrap_units(module: nn.Module) -> list[nn.Module]:
    """Modules to gather on their own: the items of the outermost lists of modules, inner ones first.

    A module whose parts are called from outside its own forward pass names them in `called_apart`; they are units too.
    """
    units: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            for block in child:
                units += [part for inner in block.modules() for part in _called_apart(inner)]
                units.append(block)
        else:
            units += wrap_units(child)
    return [unit for unit in units if next(unit.parameters(), None) is not None]


def is_sharded(module: nn.Module) -> bool:
    """Whether this process holds only rows of the module's weights."""
    return any(_is_dtensor(parameter) for parameter in module.parameters())


def local(tensor: Tensor) -> Tensor:
    """This process's rows of a tensor, sharing its memory; a tensor that is not sharded itself."""
    held: Tensor = tensor.to_local() if _is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
    return held


def first_row(tensor: Tensor) -> int:
    """Where this process's rows begin. Rows are dealt as `torch.chunk` does, in the order of ranks."""
    if not _is_dtensor(tensor):
        return 0
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    return int(min(mesh.get_local_rank() * -(-tensor.shape[0] // mesh.size()), tensor.shape[0]))


def like(tensor: Tensor, rows: Tensor) -> Tensor:
    """Rows of this process as a tensor sharded in the way of another one; as they are if that is not sharded."""
    if not _is_dtensor(tensor):
        return rows
    from torch.distributed.tensor import DTensor

    placed = rows.to(local(tensor).device)
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    made: Tensor = DTensor.from_local(
        placed, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
    return made


def whole(tensor: Tensor) -> Tensor:
    """All rows of a tensor, gathered; every rank must call this alike."""
    gathered: Tensor = tensor.full_tensor() if _is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
    return gathered


def whole_state(module: nn.Module, keep: bool) -> dict[str, Tensor] | None:
    """Weights and buffers of a sharded module on the CPU, gathered one by one; None of a module that is not sharded.

    Args:
        module: every rank must call this alike.
        keep: on this rank; elsewhere nothing is kept.
    """
    if not is_sharded(module):
        return None
    state: dict[str, Tensor] = {}
    for name, tensor in module.state_dict().items():
        gathered = whole(tensor.detach())
        if keep:
            state[name] = gathered.cpu()
    return state


def dealt(count: int, rank: int, world_size: int) -> Iterator[tuple[int, bool]]:
    """Places 0 … `count` - 1 of a rank, and whether each counts.

    Every rank gets as many, some of them twice: a forward pass of sharded weights needs all ranks.
    """
    for first in range(0, count, world_size):
        yield min(first + rank, count - 1), first + rank < count


def _is_dtensor(tensor: Tensor) -> bool:
    # Without an import: torch.distributed.tensor takes a second, which runs of one process need not wait for.
    return hasattr(tensor, "full_tensor")


def _called_apart(module: nn.Module) -> list[nn.Module]:
    return [module.get_submodule(name) for name in getattr(module, "called_apart", ())]
