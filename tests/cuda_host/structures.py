"""The structures of csrc/settings.h and csrc/cuda/params.cuh, field by field.

`harness.Library` compares their sizes with the compiler's.
"""

from __future__ import annotations

import ctypes
from typing import Any

_I64, _F64, _POINTER, _BOOL = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p, ctypes.c_bool


def _structure(name: str, *fields: tuple[str, Any]) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields)})


def _same(names: str, kind: Any) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


Settings = _structure(
    "Settings",
    ("pair", _I64), ("unit", _BOOL), ("order", _I64), ("clamped", _BOOL),
    *_same("normalization loss diagonal algorithm", _I64),
    *_same("student_scale teacher_scale offset affinity_eps clamp_min statistic_eps", _F64),
    *_same("student_tau teacher_tau beta log_eps", _F64),
)  # fmt: skip
FeatureView = _structure(
    "FeatureView", ("data", _POINTER), *_same("storage dim matrix item feature", _I64)
)
MaskView = _structure("MaskView", ("data", _POINTER), *_same("matrix item", _I64))
PairMaskView = _structure("PairMaskView", ("data", _POINTER), *_same("matrix query key", _I64))
WeightView = _structure("WeightView", ("data", _POINTER), *_same("storage matrix item", _I64))
ScalarView = _structure("ScalarView", ("data", _POINTER), ("storage", _I64))
Workspace = _structure("Workspace", *_same(" ".join(f"p{i}" for i in range(18)), _POINTER))
Panel = _structure("Panel", *_same("matrix_begin matrices row_begin rows", _I64))
Task = _structure("Task", ("panel", Panel), *_same(" ".join(f"b{i}" for i in range(8)), _BOOL))
Params = _structure(
    "Params",
    ("settings", Settings),
    ("precision", _I64),
    *_same("wide self has_diagonal columns", _BOOL),
    *_same("diagonal_offset reduction", _I64),
    ("weight", _F64),
    *_same("matrices queries keys", _I64),
    *_same("student teacher student_keys teacher_keys", FeatureView),
    *_same("mask key_mask", MaskView),
    ("pair_mask", PairMaskView),
    ("row_weight", WeightView),
    *_same("student_scale teacher_scale", ScalarView),
    *_same("loss query_gradient key_gradient scale_gradient row_losses", _POINTER),
    ("counts", _BOOL),
    *_same("loss_scale column_scale taylor_factor", _F64),
    *_same("item_blocks row_blocks line_blocks state_slots", _I64),
    ("largest", Panel),
    ("work", Workspace),
    ("task", Task),
)
