"""Published methods by name: :func:`preset`, :func:`list_presets` and :func:`describe`."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.loss import _Loss

from .angle import RKDAngleLoss
from .components import Affinity, Loss, Normalization
from .components.base import Component
from .functional import PER_CALL
from .modules import AffinityLoss
from .published import PRESETS, Preset
from .spec import LossSpec

__all__ = ["NSTLoss", "describe", "list_presets", "preset"]

_AXES: dict[str, type[Component]] = {
    "affinity": Affinity,
    "normalization": Normalization,
    "loss": Loss,
}
_OPTIONS = [
    *(field.name for field in dataclasses.fields(LossSpec) if field.name not in _AXES),
    "process_group",
]


class NSTLoss(AffinityLoss):
    """Neuron selectivity transfer: an affinity loss over pixels with unit channel maps.

    Built by `preset("nst")`. It takes feature maps [N, C, H, W], any two channel counts and map
    sizes; the larger map is average-pooled to the smaller, then each channel map is divided by its
    norm (a map of zeros stays zeros, with gradient 0).
    """

    def forward(
        self, student: Tensor, teacher: Tensor, mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """The loss of student [N, Cs, Hs, Ws] against teacher [N, Ct, Ht, Wt]."""
        for name, maps in (("student", student), ("teacher", teacher)):
            if maps.ndim != 4:
                raise ValueError(f"{name} must have shape [N, C, H, W], got {list(maps.shape)}")
        pairs = zip(student.shape[2:], teacher.shape[2:], strict=True)
        height, width = (min(pair) for pair in pairs)
        student, teacher = (_unit_maps(x, height, width) for x in (student, teacher))
        return super().forward(student, teacher, mask, **options)


def preset(name: str, **overrides: Any) -> _Loss:
    """A published method as a loss module: an `AffinityLoss` (`rkd_angle`: an `RKDAngleLoss`).

    The module computes the method's formula; pass `weight=` to weight it (`describe(name)` has the
    published figure).

    Args:
        name: one of `list_presets()`.
        overrides: options of `AffinityLoss` (`weight`, `reduction`, `items`, `backend`, ...),
            options of the preset's components (`gamma`, `tau`, `beta`, ...), or whole components
            (`normalization="row_l1"`). `weight` replaces the preset's own, which is 1 except for
            `cka` (0.5, which makes the formula 1 - CKA).

    Raises:
        ValueError: an unknown name, an invalid value, or an option that two components have.
        TypeError: an override that the preset does not have; the message lists those it has.

    Example::

        criterion = affkd.preset("sp", reduction="batchmean", weight=46.875)
    """
    entry = describe(name)
    if name == "nst" and "items" in overrides:
        raise TypeError(
            "preset 'nst' has no option 'items': its items are pixels, because it divides each "
            "channel map by its norm; for other items take AffinityLoss(\"gram(scale='1/D')\")"
        )
    if entry.triple is None:
        _check_known(name, overrides, list(inspect.signature(RKDAngleLoss).parameters))
        return RKDAngleLoss(**{**entry.options, **overrides})
    components: dict[str, Any] = {
        axis: base.resolve(overrides.get(axis, shorthand))
        for (axis, base), shorthand in zip(_AXES.items(), entry.triple, strict=True)
    }
    options = dict(entry.options)
    changes: dict[str, dict[str, Any]] = {axis: {} for axis in _AXES}
    for option, value in overrides.items():
        if option in _OPTIONS:
            options[option] = value
        elif option not in _AXES:
            changes[_owner(name, option, components)][option] = value
    changed = {axis: dataclasses.replace(components[axis], **changes[axis]) for axis in _AXES}
    module = NSTLoss if name == "nst" else AffinityLoss
    return module(**changed, **options)


def list_presets() -> list[str]:
    """The names of all presets."""
    return list(PRESETS)


def describe(name: str) -> Preset:
    """What a preset computes, where it comes from, its weight and how to call it; print it.

    Raises:
        TypeError: a name that is no string.
        ValueError: an unknown name; the message lists the valid ones.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string such as 'sp', got {name!r}")
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"unknown preset {name!r}{hint}; valid names: {', '.join(PRESETS)}")
    return PRESETS[name]


def _owner(name: str, option: str, components: dict[str, Any]) -> str:
    """The axis whose component has the option."""
    axes: dict[str, list[str]] = {}
    for axis, component in components.items():
        for field in dataclasses.fields(component):
            axes.setdefault(field.name, []).append(axis)
    _check_known(name, [option], [*_OPTIONS, *_AXES, *axes])
    if len(axes[option]) > 1:
        raise ValueError(
            f"preset {name!r} has {option!r} in its {' and its '.join(axes[option])}; override "
            f"the component itself: {axes[option][0]}=..."
        )
    component = components[axes[option][0]]
    sides = [getattr(component, f"{side}_{option}", None) for side in ("student", "teacher")]
    if None not in sides:
        raise ValueError(
            f"preset {name!r} has a {option} for each side; override student_{option} or "
            f"teacher_{option}, got {option}"
        )
    return axes[option][0]


def _check_known(name: str, options: Iterable[str], valid: list[str]) -> None:
    for option in options:
        if option in valid:
            continue
        call = " (pass it when calling the loss)" if option in PER_CALL else ""
        raise TypeError(
            f"preset {name!r} has no option {option!r}{call}; valid options: "
            f"{', '.join(dict.fromkeys(valid))}"
        )


def _unit_maps(maps: Tensor, height: int, width: int) -> Tensor:
    """[N, C, H, W] pooled to [N, C, height, width], each channel map of unit norm or zero."""
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    if maps.shape[2:] != (height, width):
        maps = torch.nn.functional.adaptive_avg_pool2d(maps, (height, width))
    norm = torch.linalg.vector_norm(maps, dim=(2, 3), keepdim=True)
    # a norm that overflowed would give a plausible map of zeros
    return maps / norm.masked_fill(norm <= 1e-12, 1).masked_fill(norm.isinf(), math.nan)
