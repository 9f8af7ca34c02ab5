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
CENTERED = ("gram", "frobenius(center=True)")
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def inputs_of(items: int, keys: int = 0, dtype: torch.dtype = torch.float32) -> Inputs:
    x = torch.ones(1, items, 8, dtype=dtype)
    k = torch.ones(1, keys, 8, dtype=dtype)
    return Inputs(x, x, k, k) if keys else Inputs(x, x)


def launches(stand_in: StandIn, inputs: Inputs, *triple: Any, **options: Any) -> list[str]:
    """Of loss and all gradients."""
    needs = Needs(True, inputs.student_keys is not None, inputs.student_scale is not None)
    cuda.loss_and_grad(make_spec(*triple, **options), inputs, needs, "dense")
    return stand_in.launches()


@each_dtype
@pytest.mark.parametrize("keys", [0, 37], ids=["self", "bank"])
def test_every_triple_takes_three_launches(
    keys: int, dtype: torch.dtype, stand_in: StandIn
) -> None:
    def taken(triple: Triple) -> int:
        offset = {"diagonal_offset": 3} if keys else {}
        return len(launches(stand_in, inputs_of(64, keys, dtype), *triple.build(), **offset))

    assert {taken(triple) for triple in valid_triples()} == {3}


@pytest.mark.parametrize("keys", [0, 37], ids=["self", "bank"])
def test_a_loss_alone_takes_two(keys: int, stand_in: StandIn) -> None:
    for triple in (("gram", "row_l2", "mse"), ("rbf", "max", "l1"), (*CENTERED, "l1")):
        cuda.loss_and_grad(make_spec(*triple), inputs_of(64, keys), Needs(False), "dense")
        assert stand_in.launches() == ["gram", "rows"]


def masked(inputs: Inputs) -> Inputs:
    key_mask = None if inputs.student_keys is None else inputs.student_keys[..., 0] > 0
    return inputs._replace(mask=inputs.student[..., 0] > 0, key_mask=key_mask)


VARIANTS = {
    "plain": lambda x: x,
    "masked": masked,
    "weighted": lambda x: x._replace(row_weight=x.student[..., 0]),
    "scaled": lambda x: x._replace(student_scale=x.student[0, 0, 0]),
    "matrices": lambda x: Inputs(*(y if y is None else y.expand(3, -1, -1) for y in x[:4])),
}


@each_dtype
@pytest.mark.parametrize("keys", [0, 1500], ids=["self", "bank"])
@pytest.mark.parametrize("items", [3, 512, 513, 1024, 4096])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_centered_takes_three_launches(
    variant: str, items: int, keys: int, dtype: torch.dtype, stand_in: StandIn
) -> None:
    """At any size that the workspace holds, however the loss is called."""
    inputs = VARIANTS[variant](inputs_of(items, keys, dtype))
    for loss in ("mse", "l1"):
        for diagonal in ("keep", "zero"):
            options = {"diagonal": diagonal, "diagonal_offset": 0 if keys else None}
            taken = launches(stand_in, inputs, *CENTERED, loss, **options)
            closed = not keys and dtype == torch.float32 and loss == "mse" and diagonal == "keep"
            has_form = closed and variant in ("plain", "masked", "matrices")
            assert taken == (ALIGNMENT if has_form else EVERYDAY), (loss, diagonal)


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
