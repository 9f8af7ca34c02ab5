"""Autocast and loss scaling of a run, and what makes its arithmetic repeatable."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from affkd_kernels.trainer import config

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """How a network computes: ``float32``, or under autocast in a half precision."""

    name: config.Precision = "float32"

    def autocast(self, device: torch.device) -> AbstractContextManager[None]:
        # without a context of its own a float32 run would obey an autocast around it
        return torch.autocast(device.type, DTYPES.get(self.name), enabled=self.name in DTYPES)

    def scaler(self, device: torch.device) -> torch.amp.GradScaler:
        """Of no effect but in float16, whose smallest gradients would become zero."""
        return torch.amp.GradScaler(device.type, enabled=self.name == "float16")


FLOAT32 = Precision()


def set_determinism(deterministic: bool) -> None:
    """Choose between algorithms that repeat to the bit and the fastest ones of a GPU."""
    if deterministic:
        # read by cuBLAS when it starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of the generators that a network on this device may draw from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
