"""What a run costs: time a step, the relational terms' part of it, memory."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from affkd_kernels.trainer.objective import Relation

MEBIBYTE = 2**20


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all its work, so that a clock tells how long it took."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_milliseconds(step: Callable[[], None], device: torch.device, repeats: int) -> float:
    """Median time of a step, after some that are not counted."""
    times = []
    for _ in range(repeats + 5):
        synchronize(device)
        started = time.perf_counter()
        step()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times[5:])


def relation_milliseconds(
    relation: Relation,
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    repeats: int = 15,
) -> float:
    """Median time of the relational terms, forward and backward down to the features."""
    leaves = {path: feature.detach().requires_grad_() for path, feature in student.items()}
    device = next(iter(leaves.values())).device
    return median_milliseconds(lambda: relation(leaves, teacher)[0].backward(), device, repeats)


def peak_memory(device: torch.device) -> float | None:
    """The most memory in MiB so far: of tensors on a GPU, of the process elsewhere.

    None where the platform does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MEBIBYTE
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # in bytes on a Mac, in KiB elsewhere
    return peak / (MEBIBYTE if sys.platform == "darwin" else 1024)
