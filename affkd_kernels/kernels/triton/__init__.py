"""The Triton kernels: loss and gradient of every valid triple on a GPU, in one call.

The parts, from the outside in:

- ``launch``: the entry points; ``plan``: what calls of one form share; ``replay``: how a call is
  done again, with ``arguments`` that lie ready; ``configs``: tile sizes by architecture; ``ahead``:
  the same launches written down, to be compiled without a GPU.
- ``call``: the launches up to the loss; ``stash``: those of an everyday batch, three of them;
  ``panels``: those of any other's backward.
- ``grams``, ``rows``, ``multiply``: the kernels of an everyday batch.
- ``prepare``, ``sweeps``, ``gradients``, ``product``: kernels over items and pairs;
  ``combine``, ``centering``, ``finish``: small kernels between them; ``angle``: RKD's angle loss.
- ``runs``, ``tiles``, ``affinities``, ``stages`` and ``scalings``: what these kernels are made of;
  ``choices``, ``items`` and ``layout``: what they are compiled for and given; ``toolchain``:
  whether they can be compiled.

Importing this module imports no Triton. Without a GPU the kernels run in Triton's interpreter where
TRITON_INTERPRET=1 was set before Triton was imported.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from ...inputs import Inputs
from ...spec import LossSpec
from ..result import LossAndGrad, Needs

_DEVICES = ("cuda", "xpu")


@functools.cache
def available(device_type: str) -> tuple[bool, str]:
    """Whether the kernels can run on this type of device, or why not.

    The first question about a device that is there builds Triton's launcher: a second, once.
    """
    if importlib.util.find_spec("triton") is None:
        return False, "Triton is not installed (pip install triton)"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True, ""
    if device_type not in _DEVICES:
        return False, f"Triton has no kernels for {device_type!r} devices"
    if device_type == "cuda" and not torch.cuda.is_available():
        return False, "PyTorch finds no CUDA device"
    if device_type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability()
        if major < 8:
            return False, f"this GPU has compute capability {major}.{minor}, and 8.0 is needed"
    from . import toolchain

    reason = toolchain.missing()
    return reason is None, reason or ""


def loss_and_grad(spec: LossSpec, inputs: Inputs, needs: Needs, algorithm: str) -> LossAndGrad:
    """The loss and the gradients that ``needs`` asks for.

    Args:
        spec: a triple of the contract's own components, with reduction, weight and diagonal;
            reduction ``"none"`` gives the sum of the row losses.
        inputs: canonical tensors of any strides and floating dtypes, with at least one pair.
        needs: which of student, student_keys and student_scale get a gradient.
        algorithm: ``"dense"`` holds both affinity matrices, ``"tiled"`` neither.
    """
    return _entry_points().loss_and_grad(spec, inputs, needs, algorithm)


def row_losses(spec: LossSpec, inputs: Inputs, algorithm: str) -> Tensor:
    """The weighted row losses [N, Q], or [N, K] of a softmax over columns; no gradients.

    Arguments are those of :func:`loss_and_grad`.
    """
    return _entry_points().row_losses(spec, inputs, algorithm)


@functools.cache
def _entry_points() -> ModuleType:
    """The module that imports Triton."""
    from . import launch

    return launch
