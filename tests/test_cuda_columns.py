"""A softmax of rows and of columns in one call of the CUDA kernels, two gradients in one launch."""

from __future__ import annotations

import pytest
import torch
from case_inputs import Inputs, bank, mask, own_keys
from cases import Call, Part, Triple
from cuda_host import harness
from cuda_host.comparison import (
    SAMPLE,
    compare,
    compare_with_eager,
    distance,
    with_kernels,
    with_reference,
)
from stand_in import StandIn

from affkd_kernels.inputs import Inputs as CanonicalInputs
from affkd_kernels.kernels import cuda
from affkd_kernels.kernels.result import Needs
from affkd_kernels.spec import make_spec

BOTH = (("tau", 0.5), ("axis", "both"))
TRIPLES = [
    Triple(Part("gram"), Part("softmax", BOTH), Part("kl")),
    Triple(Part("cosine"), Part("softmax", BOTH), Part("cross_entropy")),
    Triple(Part("rbf"), Part("softmax", BOTH), Part("mse")),
    Triple(Part("euclidean"), Part("softmax", BOTH), Part("kl", (("direction", "reverse"),))),
]


def scaled(inputs: Inputs) -> Inputs:
    scale = torch.tensor(0.7, dtype=inputs.student.dtype)
    return Inputs(*inputs.features, {**inputs.options, "student_scale": scale})


CALLS = [
    Call("Q37-K70", lambda s: bank(s, 37, 19, keys=70, teacher_dim=3, reduction="batchmean")),
    Call("Q70-K3", lambda s: bank(s, 70, 5, keys=3, teacher_dim=1, mask=mask(s, 70))),
    Call(
        "masks",
        lambda s: bank(
            s, 37, 19, keys=70, teacher_dim=3, mask=mask(s, 37), key_mask=mask(s + 1, 70),
            reduction="batchmean",
        ),
    ),
    Call("N3", lambda s: bank(s, 3, 37, 5, keys=45, teacher_dim=8, items="tokens")),
    Call(
        "diagonal",
        lambda s: own_keys(bank(s, 37, 5, keys=70, teacher_dim=3, diagonal="zero"), 29),
    ),
]  # fmt: skip


@pytest.mark.parametrize("one", CALLS, ids=str)
def test_rows_and_columns_in_three_launches(one: Call, kernels: harness.Library) -> None:
    for seed, triple in enumerate(TRIPLES):
        inputs = one.make(seed)
        compare(kernels, inputs, triple, 1e-11)
        assert kernels.launches == ["gram", "rows", "product"]
        compare(kernels, inputs, triple, 1e-11, budget=1)
        for precision in ("ieee", "tf32x3"):
            compare_with_eager(kernels, inputs.to(torch.float32), triple, precision=precision)


def test_the_scale_of_rows_and_columns_learns(kernels: harness.Library) -> None:
    for one in CALLS[:3]:
        compare(kernels, scaled(one.make(3)), TRIPLES[0], 1e-11)
        assert kernels.launches == ["gram", "rows", "product"]


def test_rows_and_columns_far_from_the_origin(kernels: harness.Library) -> None:
    inputs = bank(23, 70, 33, keys=45, teacher_dim=20).map(lambda x: (x + 100).to(torch.float32))
    triple = Triple(Part("gram"), Part("softmax", (("tau", 20.0), ("axis", "both"))), Part("kl"))
    value, _ = with_kernels(kernels, inputs, triple)
    exact, _ = with_reference(inputs.to(torch.float64), triple)
    assert distance(value, exact) < 2e-6


@pytest.mark.parametrize("side", ["student", "student_keys", "teacher", "teacher_keys"])
def test_an_item_of_nan_is_noticed_in_rows_and_columns(side: str, kernels: harness.Library) -> None:
    inputs = bank(5, 70, 4, keys=40, teacher_dim=3)
    broken = inputs.options[side] if "keys" in side else getattr(inputs, side)
    broken[33, 0] = torch.nan
    for triple in TRIPLES:
        assert with_kernels(kernels, inputs, triple)[0].isnan()


def test_two_gradients_take_one_launch(kernels: harness.Library) -> None:
    for triple in SAMPLE:
        if "center" not in str(triple):
            one = Call("Q37-K70", lambda s: bank(s, 37, 70, keys=70, teacher_dim=3))
            compare(kernels, one.make(7), triple, 1e-11)
            assert kernels.launches == ["gram", "rows", "product"], str(triple)


@pytest.mark.parametrize(
    "normalization, changes",
    [
        ("softmax", {"student_keys": None, "teacher_keys": None}),
        ("row_l2", {}),
        ("softmax", {"row_weight": torch.ones(1, 3)}),
        ("softmax", {"pair_mask": torch.ones(1, 3, 4, dtype=torch.bool)}),
    ],
    ids=["self", "row_l2", "row_weight", "pair_mask"],
)
def test_columns_that_do_not_count_are_refused(
    normalization: str, changes: dict[str, torch.Tensor | None], stand_in: StandIn
) -> None:
    """By the operator, whoever calls it."""
    query, key = torch.ones(1, 3, 2), torch.ones(1, 4, 2)
    inputs = CanonicalInputs(query, query, key, key)._replace(**changes)
    spec = make_spec("gram", normalization, "mse")
    choices, numbers = cuda._options(spec, inputs, Needs(), "dense", columns=True)
    with pytest.raises(RuntimeError, match="columns count beside rows only in a softmax"):
        torch.ops.affkd_kernels.cuda_loss_and_grad(*inputs, [*choices, 0], numbers)
