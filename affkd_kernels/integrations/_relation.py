"""What every adapter takes as its relation: a loss module, or a preset's name."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..presets import preset


def resolve(relation: nn.Module | str, **options: Any) -> nn.Module:
    """The loss module ``relation(student_features, teacher_features)``.

    Args:
        relation: a module, returned as it is, or the name of a preset.
        options: overrides of the preset.

    Raises:
        TypeError: neither a module nor a name, or options for a finished module.
        ValueError: an unknown preset.
    """
    if isinstance(relation, str):
        return preset(relation, **options)
    if not isinstance(relation, nn.Module):
        raise TypeError(
            "relation must be a loss module such as affkd.AffinityLoss(...), or the name of a "
            f"preset such as 'pkt', got {type(relation).__name__}"
        )
    if options:
        raise TypeError(f"options go with a preset's name, not with a module: {sorted(options)}")
    return relation
