"""Which module computes a backend on a device: found, and imported, when first asked for."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

# modules of this package that run on one type of device; the factored form runs on all
_MODULES = {
    ("cpp", "cpu"): ".cpu",
    ("cpp", "cuda"): ".cuda",
    # on a CPU in Triton's interpreter alone, which is for tests
    ("triton", "cpu"): ".triton",
    ("triton", "cuda"): ".triton",
    ("triton", "xpu"): ".triton",
}
# what has been asked for so far
loaded: dict[tuple[str, str], ModuleType] = {}


def module_of(backend: str, device_type: str) -> ModuleType:
    """The module with ``loss_and_grad`` and ``row_losses`` of a backend on a device."""
    key = (backend, device_type)
    found = loaded.get(key)
    if found is None:
        name = ".factored" if backend == "torch" else _MODULES[key]
        found = loaded[key] = importlib.import_module(name, __package__)
    return found


def missing(backend: str, device_type: str) -> str | None:
    """Why the kernels of ``"cpp"`` or ``"triton"`` cannot run on a device, None where they can."""
    if (backend, device_type) not in _MODULES:
        return f"there are no {backend} kernels for {device_type!r} devices"
    # tensors of a device that is not here are fake: they are planned for where they will be real
    if device_type != "cpu" and not _present(device_type):
        return None
    usable, reason = module_of(backend, device_type).available(device_type)
    return None if usable else reason


@functools.cache
def _present(device_type: str) -> bool:
    return bool(getattr(torch, device_type).is_available())


# a constant of a compiled graph; see spec._intern
missing._dynamo_marked_constant = True  # type: ignore[attr-defined]
