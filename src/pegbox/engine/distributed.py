"""Several processes: what they agree on, and how a model is wrapped so that any forward is synchronised.

An objective may run a model in pieces (the body without the head, twice, under a reference), but the wrappers that
reduce gradients (DDP, `fully_shard`) act on one module's forward. `Whole` is that module: its forward runs a job, and
whatever the job does with the model happens inside.

Losses are divided by totals over all processes, so the step's loss is a SUM over processes, while DDP and FSDP average
gradients: the engine multiplies by the number of processes before backward.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pegbox.errors import BadInput, RunFailed, Unsupported

__all__ = [
    "Whole",
    "agree",
    "barrier",
    "check_same_on_ranks",
    "checksum",
    "full",
    "gather_rows",
    "is_main",
    "join_processes",
    "mean_over_ranks",
    "names_everywhere",
    "rank",
    "shard",
    "sum_over_ranks",
    "world",
]


def join_processes(device: str) -> None:
    """Join the process group that a launcher (torchrun, accelerate) prepared, through accelerate; once."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        from accelerate import PartialState

        PartialState._reset_state()  # one that was made before the launcher's variables were set counts one process
        PartialState(cpu=device == "cpu" or not torch.cuda.is_available())


def world() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if world() > 1:
        dist.barrier()


def _device() -> torch.device:
    """A device that the process group can communicate on."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum over processes, on the tensor's own device."""
    if world() == 1:
        return tensor
    moved = tensor.detach().to(_device(), copy=True)
    dist.all_reduce(moved)
    return moved.to(tensor.device)


def mean_over_ranks(tensor: Tensor) -> Tensor:
    return sum_over_ranks(tensor) / world() if world() > 1 else tensor


def names_everywhere(names: Iterable[str]) -> list[str]:
    """The names that any process has, sorted. A collective call."""
    mine = sorted(names)
    if world() == 1:
        return mine
    everyone: list[list[str]] = [[] for _ in range(world())]
    dist.all_gather_object(everyone, mine)
    return sorted({name for theirs in everyone for name in theirs})


def agree(flag: bool) -> bool:
    """True everywhere if `flag` is True anywhere. A collective call: every process must make it."""
    return bool(sum_over_ranks(torch.tensor(float(flag))).item() > 0)


def gather_rows(tensor: Tensor) -> Tensor:
    """Concatenate equally shaped tensors of all processes along the first axis, in rank order."""
    if world() == 1:
        return tensor
    moved = tensor.detach().to(_device()).contiguous()
    parts = [torch.empty_like(moved) for _ in range(world())]
    dist.all_gather(parts, moved)
    return torch.cat(parts).to(tensor.device)


def check_same_on_ranks(digest: str, what: str = "the selection") -> None:
    """Compare a hexadecimal digest over all processes, before anything is wrapped.

    DDP overwrites the other processes' tensors with the first one's without a word, so selections that differ would be
    hidden. Raises `RunFailed` on every process if any two differ.
    """
    if world() == 1:
        return
    mine = torch.tensor(list(digest.encode()), dtype=torch.uint8).unsqueeze(0)
    everyone = gather_rows(mine)
    differing = [r for r in range(world()) if not torch.equal(everyone[r], everyone[0])]
    if differing:
        raise RunFailed(
            f"{what} differs between processes (ranks {differing} against rank 0). It must be a pure function of the "
            "weights, the data and the seed; see that all processes load the same files and use the same seed."
        )


def checksum(model: nn.Module) -> str:
    """A digest of the trained weights, cheap enough to compare before training: sums and absolute sums in float64."""
    import hashlib

    total = hashlib.sha256()
    for name, p in model.named_parameters():
        if p.requires_grad:
            values = full(p.detach()).double()
            total.update(f"{name} {tuple(p.shape)} {values.sum().item()!r} {values.abs().sum().item()!r}".encode())
    return total.hexdigest()


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that `fully_shard` may have split (a collective call then)."""
    gather = getattr(tensor, "full_tensor", None)
    return gather() if gather is not None else tensor


class Whole(nn.Module):
    """A model whose forward runs a job (a function without arguments), or the model itself."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *args: Any, job: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        return job() if job is not None else self.model(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Keep gradients local for a while (used by accelerate where this module is itself sharded)."""
        toggle = getattr(self, "set_requires_gradient_sync", None)
        if toggle is None:
            yield
            return
        toggle(False)
        try:
            yield
        finally:
            toggle(True)


def shard(model: nn.Module, device: str) -> Whole:
    """Split weights, gradients and optimizer state over the processes with `fully_shard`, block by block.

    accelerate's FSDP silently becomes DDP on a CPU; this calls torch directly, so that it is real there too.
    Raises `BadInput` where there is one process only, `Unsupported` for packed weights.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if world() == 1:
        raise BadInput("sharding 'full' needs several processes; start with --processes 2 or more, or leave it out.")
    packed = [n for n, p in model.named_parameters() if not p.is_floating_point()]
    if packed:
        raise Unsupported(f"Packed weights such as '{packed[0]}' can't be sharded; train without sharding.")
    mesh = init_device_mesh(device, (world(),))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    whole = Whole(model)
    fully_shard(whole, mesh=mesh)
    return whole


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of the longest ModuleList of equal layers: a model's blocks."""
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(c) for c in m}) == 1]
    return max(lists, key=len, default=[])
