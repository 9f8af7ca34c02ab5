"""How many launches a call of the CUDA kernels takes: what docs/performance.md says, and why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Triple, valid_triples
from stand_in import StandIn

from affkd_kernels import list_presets, preset
from affkd_kernels.inputs import Inputs
from affkd_kernels.kernels import cuda
from affkd_kernels.kernels.result import Needs
from affkd_kernels.spec import make_spec

EVERYDAY = ["gram", "rows", "product"]
ALIGNMENT = ["gram", "means", "product"]
SWEPT = ["gram", "means", "statistics", "rows"]
CENTERED = ("gram", "frobenius(center=True)")


def inputs_of(items: int, keys: int = 0, dtype: torch.dtype = torch.float32) -> Inputs:
    x = torch.ones(1, items, 8, dtype=dtype)
    k = torch.ones(1, keys, 8, dtype=dtype)
    return Inputs(x, x, k, k) if keys else Inputs(x, x)


def launches(stand_in: StandIn, inputs: Inputs, *triple: Any, **options: Any) -> list[str]:
    """Of loss and all gradients."""
    needs = Needs(True, inputs.student_keys is not None, inputs.student_scale is not None)
    cuda.loss_and_grad(make_spec(*triple, **options), inputs, needs, "dense")
    return stand_in.launches()


@pytest.mark.parametrize("keys", [0, 37], ids=["self", "bank"])
def test_every_triple_takes_three_launches(keys: int, stand_in: StandIn) -> None:
    def taken(triple: Triple) -> int:
        offset = {"diagonal_offset": 3} if keys else {}
        return len(launches(stand_in, inputs_of(64, keys), *triple.build(), **offset))

    assert {taken(triple) for triple in valid_triples()} == {3}


@pytest.mark.parametrize("keys", [0, 37], ids=["self", "bank"])
def test_a_loss_alone_takes_two(keys: int, stand_in: StandIn) -> None:
    for triple in (("gram", "row_l2", "mse"), ("rbf", "max", "l1"), (*CENTERED, "l1")):
        cuda.loss_and_grad(make_spec(*triple), inputs_of(64, keys), Needs(False), "dense")
        assert stand_in.launches() == ["gram", "rows"]


@pytest.mark.parametrize(
    "items, dtype, loss, expected",
    [
        (512, torch.float32, "l1", EVERYDAY),
        (513, torch.float32, "l1", [*SWEPT, "means", "center", "product"]),
        (64, torch.float64, "l1", [*SWEPT, "means", "center", "product"]),
        (64, torch.float64, "mse", [*SWEPT, "product"]),
        (64, torch.float32, "mse", ALIGNMENT),
        (4096, torch.bfloat16, "mse", ALIGNMENT),
    ],
)
def test_what_is_centered(
    items: int, dtype: torch.dtype, loss: str, expected: list[str], stand_in: StandIn
) -> None:
    assert launches(stand_in, inputs_of(items, dtype=dtype), *CENTERED, loss) == expected


def test_a_centered_scale_that_learns(stand_in: StandIn) -> None:
    """Its gradient takes dA after it was centered, which is nowhere otherwise."""
    inputs = inputs_of(64)._replace(student_scale=torch.tensor(0.5))
    expected = ["gram", "rows", "means", "center", "product"]
    assert launches(stand_in, inputs, *CENTERED, "l1") == expected
    assert launches(stand_in, inputs, *CENTERED, "mse") == EVERYDAY


def test_a_matrix_beyond_the_workspace_is_worked_on_in_panels(stand_in: StandIn) -> None:
    spec = make_spec("gram", "row_l2", "mse", max_workspace_bytes=0)
    for algorithm, panels in (("tiled", 4), ("dense", 1)):
        cuda.loss_and_grad(spec, inputs_of(128), Needs(), algorithm)
        assert stand_in.launches().count("gram") == panels


@pytest.mark.parametrize(
    "name",
    [name for name in list_presets() if name not in ("rkd_angle", "seed", "compress", "nst")],
)
def test_a_self_affinity_of_a_preset(name: str, stand_in: StandIn) -> None:
    cuda.loss_and_grad(preset(name).spec, inputs_of(64), Needs(), "dense")
    assert len(stand_in.launches()) == 3
