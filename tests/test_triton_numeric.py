"""What rounding may not do to the Triton kernels, in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from case_inputs import Inputs, bank, pair
from torch import Tensor

import affkd_kernels as affkd
from affkd_kernels.inputs import canonical_inputs
from affkd_kernels.kernels import triton as kernels
from affkd_kernels.kernels.result import Needs
from affkd_kernels.spec import make_spec

pytest.importorskip("triton")
if not kernels.available("cpu")[0]:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from triton.runtime import interpreter  # noqa: E402

from affkd_kernels.kernels.triton import plan  # noqa: E402


def results(inputs: Inputs, triple: tuple[str, str, str], **how: Any) -> list[Tensor]:
    """The loss and the gradients of the student's features."""
    inputs, leaves = inputs.with_grad()
    loss = affkd.affinity_loss(*inputs.features, *triple, **inputs.options, **how)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.fixture
def products_by_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products that round to a few other last bits in every other row of a tile.

    Those of matrix libraries do, which add up in another order at the edge of their blocks.
    """

    def create_dot(self: Any, a: Any, b: Any, acc: Any, *how: Any) -> Any:
        product = numpy.matmul(a.data, b.data, dtype=acc.data.dtype)
        product[::2] *= 1 + 2.0**-21
        return interpreter.TensorHandle(product + acc.data, acc.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.mark.parametrize("algorithm", ["dense", "tiled"])
@pytest.mark.parametrize(
    "affinity, options",
    [
        ("sqeuclidean", {}),
        ("euclidean", {"max_workspace_bytes": 0}),
        ("polynomial(degree=2, offset=-1.0)", {"diagonal": "exclude"}),
    ],
)
def test_the_two_pairs_of_a_maximum_tie_wherever_they_lie(
    affinity: str, options: dict[str, Any], algorithm: str, products_by_place: None
) -> None:
    """A_ij and A_ji lie in different tiles, and half of the gradient of their maximum in each."""
    for seed in range(2):
        inputs = pair(seed, 37, 19, teacher_dim=9, **options)
        triple = (affinity, "max", "mse")
        exact = results(inputs, triple, backend="reference")
        ours = results(inputs.to(torch.float32), triple, backend="triton", algorithm=algorithm)
        for x, y in zip(ours, exact, strict=True):
            assert (x - y).norm() < 1e-5 * y.norm()


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
@pytest.mark.parametrize("precision", ["ieee", "tf32x3", "tf32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_what_meets_the_maximum_again_is_the_same_tile(
    dtype: torch.dtype, precision: str, capability: int
) -> None:
    """Of another shape it would be another program, which may round differently."""
    for inputs in (pair(1, 64, 16), bank(1, 64, 16, keys=64, teacher_dim=8)):
        keys = {k: v for k, v in inputs.options.items() if k.endswith("keys")}
        spec = make_spec("sqeuclidean", "max", "mse")
        canonical, _ = canonical_inputs(spec, *inputs.to(dtype).features, **keys)
        form = plan.Form.of(spec, canonical, Needs(student=True), "tiled", 1.0)
        made = plan.Plan(form._replace(capability=capability, precision=precision))
        shape = made.tiles.shape
        assert made.tiles == made.gradient == made.sweep
        assert shape.mirrored == made.self_affinity
        assert not shape.mirrored or shape.rows == shape.columns


@pytest.mark.parametrize("algorithm", ["dense", "tiled"])
@pytest.mark.parametrize("triple", [("rbf", "none", "mse"), ("rbf", "frobenius", "l1")])
@pytest.mark.parametrize("keys", [0, 5])
def test_an_item_without_a_direction_turns_no_other(
    triple: tuple[str, str, str], keys: int, algorithm: str
) -> None:
    """It is at distance 1 from the directions of all others, whatever these are."""
    inputs = bank(3, 6, 4, keys=keys, teacher_dim=3) if keys else pair(3, 6, 4, teacher_dim=3)
    inputs.student[2] = 0.0
    if keys:
        inputs.options["student_keys"][1] = 0.0
    expected = results(inputs, triple, backend="reference")
    found = results(inputs, triple, backend="triton", algorithm=algorithm)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
