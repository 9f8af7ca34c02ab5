"""How much of a check the Triton kernels do where no GPU is: their interpreter is slow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from case_inputs import seed_of

T = TypeVar("T")


def interpreted(how: dict[str, str]) -> bool:
    return how.get("backend") == "triton" and torch.get_default_device().type == "cpu"


def spread(items: Sequence[T], how: dict[str, str], every: int, *where: object) -> Sequence[T]:
    """All items; for the interpreter every n-th, from a start that differs between the callers.

    Args:
        items: what a test loops over.
        how: the backend and algorithm asked for.
        every: one of so many items.
        where: what tells this loop from others over the same items.
    """
    if not interpreted(how):
        return items
    return items[seed_of(how["algorithm"], *where) % every :: every]
