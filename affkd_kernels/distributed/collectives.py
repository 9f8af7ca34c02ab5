"""Collectives over rows that lie unevenly on the ranks, and their derivatives.

Every rank differentiates its own scalar. The backward of each function here is the adjoint with
respect to the *sum* of all ranks' scalars, so that averaging gradients over the ranks, as
DistributedDataParallel and FSDP do, gives the gradient of the scalars' mean. For a loss that has
the same value everywhere that mean is the loss itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..inputs import full_precision

# the names of torch >= 2.13; the old ones warn there
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Shards(NamedTuple):
    """How the rows of a global tensor lie on the ranks of a group, in rank order."""

    group: Any  # torch.distributed.ProcessGroup
    rank: int
    sizes: tuple[int, ...]  # rows of each rank

    @property
    def start(self) -> int:
        """The global index of this rank's first row."""
        return sum(self.sizes[: self.rank])

    @property
    def own(self) -> slice:
        return slice(self.start, self.start + self.sizes[self.rank])

    @property
    def total(self) -> int:
        return sum(self.sizes)


def all_gather(x: Tensor, shards: Shards) -> Tensor:
    """This rank's rows [B_own, ...] to the rows of all ranks [B, ...]; no derivative."""
    if shards.total == 0:
        return x
    boolean = x.dtype == torch.bool
    rows = (x.to(torch.uint8) if boolean else x).contiguous()
    longest = max(shards.sizes)
    # a caller's autocast refuses to concatenate dtypes that are not its own
    with full_precision(x.device.type):
        if rows.shape[0] < longest:
            # collectives move equal sizes
            padding = rows.new_zeros((longest - rows.shape[0], *rows.shape[1:]))
            rows = torch.cat((rows, padding))
        everything = rows.new_empty((longest * len(shards.sizes), *rows.shape[1:]))
        _all_gather_single(everything, rows, group=shards.group)
        if min(shards.sizes) < longest:
            parts = zip(everything.split(longest), shards.sizes, strict=True)
            everything = torch.cat([part[:size] for part, size in parts])
    return everything.bool() if boolean else everything


def reduce_scatter(x: Tensor, shards: Shards) -> Tensor:
    """All rows [B, ...] of each rank to the sum over ranks of this rank's rows [B_own, ...]."""
    if shards.total == 0:
        return x
    longest = max(shards.sizes)
    if min(shards.sizes) < longest:
        padded = x.new_zeros((len(shards.sizes), longest, *x.shape[1:]))
        for part, rows in zip(padded, x.split(shards.sizes), strict=True):
            part[: rows.shape[0]] = rows
        x = padded.flatten(0, 1)
    out = x.new_empty((longest, *x.shape[1:]))
    _reduce_scatter_single(out, x.contiguous(), group=shards.group)
    return out[: shards.sizes[shards.rank]]


def all_reduce(x: Tensor, group: Any) -> Tensor:
    """The sum over the ranks, in place; no derivative."""
    dist.all_reduce(x, group=group)
    return x


class Gather(torch.autograd.Function):
    """Own rows to all rows. The backward sums what all ranks send to the own rows.

    ``wire`` is the dtype that travels: rows that were half precision before need no more.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: Shards, wire: torch.dtype) -> Tensor:
        ctx.shards = shards
        return all_gather(x.to(wire), shards).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ReduceScatter.apply(grad, ctx.shards), None, None


class ReduceScatter(torch.autograd.Function):
    """The adjoint of `Gather`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: Shards) -> Tensor:
        ctx.shards = shards
        return reduce_scatter(x, shards)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return Gather.apply(grad, ctx.shards, grad.dtype), None


class GatherForSameLoss(Gather):
    """`Gather` for a scalar that every rank computes from all rows, and so has alike."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _SumOfEqual.apply(grad, ctx.shards), None, None


class _SumOfEqual(ReduceScatter):
    """`ReduceScatter` of what is the same on all ranks: a product, without communication."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: Shards) -> Tensor:
        ctx.shards = shards
        return x[shards.own] * len(shards.sizes)


class SumOverRanks(torch.autograd.Function):
    """The sum over the ranks of a loss [], and of a count [] beside it (one message for both)."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, count: Tensor, group: Any) -> tuple[Tensor, Tensor]:
        ctx.ranks = dist.get_world_size(group)
        with full_precision(value.device.type):
            both = all_reduce(torch.stack((value.double(), count.double())), group)
        total, count = both[0].to(value.dtype), both[1]
        ctx.mark_non_differentiable(count)
        return total, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None, None]:
        return grad * ctx.ranks, None, None


class ScaleGradient(torch.autograd.Function):
    """x, whose gradient is multiplied by ``factor``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None
