"""RKD's angle loss and its gradient in one sweep over the vertices.

With a_ij = |x_i - x_j|^2 the cosine of the angle at vertex j between i and k is

    psi_ijk = (a_ij + a_kj - a_ik) / (2 sqrt(a_ij a_kj)),

so the loss is a function of the squared distances alone. Its derivative V_ij = d L / d a_ij, with
W = d L / d psi, needs no more than sums of what the forward has at hand:

    V_ij = sum_k W_ijk (1 / sqrt(a_ij a_kj) - psi_ijk / a_ij) - sum_v W_ivj / (2 sqrt(a_iv a_jv)),

and the gradient is that of any squared distance, dX = 2 (diag((V + V') 1) X - (V + V') X). Memory:
O(L^2) and a block of a few vertices; arithmetic: O(L^3), whatever the feature length. The sweep is
a kernel (csrc/cpu/angle.h, csrc/cuda/angle.cuh, triton/angle.py) where there is one for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .lookup import missing

# distances up to this count as 0: the two items coincide
COINCIDENT = 1e-12
# what a Gram matrix resolves of |x_i - x_j|^2, in units of epsilon * (|x_i|^2 + |x_j|^2)
RESOLUTION = 16
# entries of one block, some 30 bytes each: near a CPU's cache, and within 64 MiB elsewhere
BLOCK_ENTRIES = {"cpu": 1 << 18}
DEFAULT_BLOCK_ENTRIES = 1 << 21


class Distances(NamedTuple):
    """The squared distances of one side, scaled so that the largest of a matrix is 1."""

    points: Tensor  # [N, L, D], centered, in the wide dtype
    scale: Tensor  # [N, 1, 1], in the wide dtype
    squared: Tensor  # [N, L, L], in the wide dtype
    inverse: Tensor  # [N, L, L], 1 / distance, and 0 where coincident or masked


def angle_sum(
    student: Tensor, teacher: Tensor, mask: Tensor | None, beta: float, need_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The sum of smooth_l1(psi_s, psi_t) over all triples of all matrices, and its gradient.

    Args:
        student, teacher: [N, L, Ds] and [N, L, Dt], any floating dtype.
        mask: [N, L] bool, True = valid.
        beta: of smooth L1; 0 gives L1.
        need_gradient: whether to compute the gradient with respect to `student`.

    Returns:
        The sum [], and the gradient [N, L, Ds] ([0] if not needed), both in float32, or float64 if
        a side is.
    """
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    # a caller's autocast would round the row sums below to half precision
    with torch.autocast(student.device.type, enabled=False):
        s, t = distances(student, mask, dtype), distances(teacher, mask, dtype)
        total, slope = sweep_on(student.device)(s, t, beta, need_gradient)
        gradient = s.inverse.new_empty(0) if slope is None else distance_gradient(s, slope)
        return total.to(dtype), gradient.to(dtype)


Sweep = Callable[[Distances, Distances, float, bool], tuple[Tensor, "Tensor | None"]]


def sweep_on(device: torch.device) -> Sweep:
    """The best sweep for tensors of this device."""
    if runs_compiled(device):
        return compiled_sweep
    if runs_triton(device):
        from .triton import angle

        return angle.sweep
    return eager_sweep


def runs_compiled(device: torch.device) -> bool:
    """Whether a C++ kernel does the sweep on this device."""
    return device.type in ("cpu", "cuda") and missing("cpp", device.type) is None


def runs_triton(device: torch.device) -> bool:
    """Whether a Triton kernel does the sweep on this device; its interpreter is for tests alone."""
    return device.type in ("cuda", "xpu") and missing("triton", device.type) is None


def compiled_sweep(
    s: Distances, t: Distances, beta: float, need_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """What `eager_sweep` returns, by a kernel: each pair (i, k) once, in registers."""
    ops = torch.ops.affkd_kernels
    kernel = ops.cuda_angle if s.squared.is_cuda else ops.cpu_angle
    total, slope = kernel(s.squared, s.inverse, t.squared, t.inverse, beta, need_slope)
    return total, slope if need_slope else None


def eager_sweep(
    s: Distances, t: Distances, beta: float, need_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """The loss [] and, if needed, V = d L / d squared distance [N, L, L], up to symmetry."""
    total = torch.zeros((), dtype=s.points.dtype, device=s.points.device)
    slope = torch.zeros_like(s.inverse) if need_slope else None
    for matrices, vertices in blocks(s.squared):
        total += vertex_block(s, t, matrices, vertices, beta, slope)
    return total, slope


def distances(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Distances:
    """[N, L, D] to its distances, the inverse ones in `dtype`.

    The L^2 part runs in float64: a^2 + b^2 - 2ab loses the digits that two close items differ in,
    and they are what the angle is made of. Next to L^3 it costs nothing.
    """
    wide = torch.float64 if x.device.type != "mps" else torch.float32
    points = centered(x.to(wide), mask)
    gram = points @ points.mT
    norms = gram.diagonal(dim1=1, dim2=2)
    norms = norms.unsqueeze(2) + norms.unsqueeze(1)  # [N, L, L]
    squared = gram.mul_(-2).add_(norms)
    floor = norms.mul_(RESOLUTION * torch.finfo(wide).eps).clamp_(min=COINCIDENT**2)
    # false for NaN, which stays
    coincident = squared <= floor
    if mask is not None:
        coincident |= ~(mask.unsqueeze(2) & mask.unsqueeze(1))
    squared.masked_fill_(coincident, 0)
    # angles have no scale: with this one, float32 holds the squares of any features
    scale = squared.amax((1, 2), keepdim=True) if squared.shape[1] else squared.sum((1, 2), True)
    scale = scale.masked_fill(scale == 0, 1)
    squared /= scale
    inverse = squared.rsqrt().masked_fill_(coincident, 0)
    return Distances(points, scale, squared, inverse.to(dtype))


def centered(x: Tensor, mask: Tensor | None) -> Tensor:
    """x minus the mean of its valid items [N, L, D]; masked items become 0."""
    if mask is None:
        return x - x.mean(1, keepdim=True)
    valid = mask.unsqueeze(2)
    x = torch.where(valid, x, 0)
    return torch.where(valid, x - x.sum(1, True) / valid.sum(1, True).clamp(min=1), 0)


def blocks(squared: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of matrices and of vertices whose [matrices, vertices, L, L] fits one block."""
    count, length = squared.shape[:2]
    entries = BLOCK_ENTRIES.get(squared.device.type, DEFAULT_BLOCK_ENTRIES)
    vertices = min(max(entries // max(length * length, 1), 1), max(length, 1))
    matrices = max(entries // max(vertices * length * length, 1), 1)
    for first_matrix in range(0, count, matrices):
        for first_vertex in range(0, length, vertices):
            yield (
                slice(first_matrix, first_matrix + matrices),
                slice(first_vertex, first_vertex + vertices),
            )


def vertex_block(
    s: Distances,
    t: Distances,
    matrices: slice,
    vertices: slice,
    beta: float,
    slope: Tensor | None,
) -> Tensor:
    """The loss of some vertices; adds d L / d squared distance to `slope` [N, L, L] if given."""
    psi = angles(s, matrices, vertices)
    error = torch.sub(psi, angles(t, matrices, vertices))
    # smooth L1 is w e - beta w^2 / 2 with its own derivative w; a beta that underflows is none
    tiny = torch.finfo(error.dtype).tiny
    weight = error.sign() if beta < tiny else (error / beta).clamp_(-1, 1)
    flat = weight.flatten()
    loss = torch.dot(flat, error.flatten()) - 0.5 * beta * torch.dot(flat, flat)
    if slope is not None:
        inverse = s.inverse[matrices, vertices]  # [n, v, L]
        turn = psi.mul_(weight).sum(3)
        weight *= inverse.unsqueeze(3)
        pull = (weight @ inverse.unsqueeze(3)).squeeze(3)
        weight *= inverse.unsqueeze(2)
        slope[matrices, vertices] += pull - inverse.square() * turn
        slope[matrices] -= 0.5 * weight.sum(1)
    return loss


def angles(side: Distances, matrices: slice, vertices: slice) -> Tensor:
    """psi [n, v, L, L] of some vertices, symmetric in its last two dimensions."""
    near = side.squared[matrices, vertices]  # [n, v, L]
    inverse = side.inverse[matrices, vertices]
    # in the wide dtype: of two items close to each other the sum keeps only what the third adds
    psi = near.unsqueeze(3) + near.unsqueeze(2)
    psi -= side.squared[matrices].unsqueeze(1)
    psi = psi.to(inverse.dtype)
    psi *= (0.5 * inverse).unsqueeze(3)
    psi *= inverse.unsqueeze(2)
    return psi


def distance_gradient(side: Distances, slope: Tensor) -> Tensor:
    """d L / d x [N, L, D] from V = d L / d squared distance [N, L, L]."""
    pull = slope.to(side.points.dtype)
    pull = (pull + pull.mT).div_(side.scale)
    return 2 * (pull.sum(2, keepdim=True) * side.points - pull @ side.points)
