"""Section 6 of the contract on the reference: finite, defined, never silent."""

from __future__ import annotations

from collections.abc import Callable

import oracle
import pytest
import torch
from case_inputs import Inputs, pair, seed_of
from cases import Triple, base_triples, call, valid_triples
from edges import EDGES, LAYOUTS, Edge, edge, edges_with_outcome, expanded_pair
from torch import Tensor

from affkd_kernels import reference

# every triple meets a few edges, and every bare triple meets all
EDGES_EACH = 4


def loss_and_gradients(triple: Triple, inputs: Inputs) -> tuple[Tensor, list[Tensor]]:
    inputs, leaves = inputs.with_grad()
    loss = reference.affinity_loss(*inputs.features, *triple.build(), **inputs.options)
    assert loss.requires_grad
    gradients = torch.autograd.grad(loss, leaves)
    assert [g.shape for g in gradients] == [leaf.shape for leaf in leaves]
    assert [g.dtype for g in gradients] == [leaf.dtype for leaf in leaves]
    return loss, list(gradients)


def assert_outcome(triple: Triple, one: Edge) -> None:
    inputs = one.make(seed_of(triple, one))
    loss, gradients = loss_and_gradients(triple, inputs)
    where = f"{triple} on {one}: loss {loss.item()}"
    if one.outcome == "nonfinite":
        assert not loss.isfinite(), where
        return
    assert loss.isfinite(), where
    if one.outcome == "half":
        return
    for gradient in gradients:
        assert gradient.isfinite().all(), f"{where}, gradient {gradient}"
    if one.outcome == "zero":
        assert loss == 0, where
        assert all((gradient == 0).all() for gradient in gradients), where
    if one.outcome == "masked":
        assert (gradients[0][~inputs.options["mask"]] == 0).all(), where
        if "key_mask" in inputs.options:
            assert (gradients[1][~inputs.options["key_mask"]] == 0).all(), where


@pytest.mark.parametrize("one", EDGES, ids=str)
def test_every_edge_with_every_bare_triple(one: Edge, tally: Callable[..., None]) -> None:
    triples = [triple for triple in base_triples() if one.allows(triple)]
    for triple in triples:
        assert_outcome(triple, one)
    tally("pairs of (bare triple, edge) with the outcome of section 6", len(triples))


@pytest.mark.parametrize("number", range(EDGES_EACH))
def test_every_triple_at_some_edges(number: int, tally: Callable[..., None]) -> None:
    for position, triple in enumerate(valid_triples()):
        usable = [one for one in EDGES if one.allows(triple)]
        one = usable[(position * EDGES_EACH + number) % len(usable)]
        assert_outcome(triple, one)
        tally("pairs of (triple, edge) with the outcome of section 6")


@pytest.mark.parametrize("one", edges_with_outcome("finite"), ids=str)
def test_finite_edges_against_the_oracle(one: Edge, tally: Callable[..., None]) -> None:
    for triple in base_triples():
        if not one.allows(triple):
            continue
        inputs = one.make(seed_of(triple, one))
        loss = reference.affinity_loss(*inputs.features, *triple.build(), **inputs.options)
        expected = oracle.affinity_loss(*inputs.features, *triple, **inputs.options)
        assert loss.item() == pytest.approx(expected, rel=1e-7, abs=1e-12), str(triple)
        tally("pairs of (bare triple, finite edge) compared with the oracle")


def test_a_half_gram_matrix_beyond_65504_is_right(tally: Callable[..., None]) -> None:
    """Loss and gradient are those of the same numbers in float64, up to float32 inside.

    A softmax of products around 1e5 leaves float32 no digit to compare, so it is left out.
    """
    for triple in base_triples():
        if triple.normalization.name == "softmax":
            continue
        half = edge("half-overflow").make(seed_of(triple))
        loss, (gradient,) = loss_and_gradients(triple, half)
        exact, (exact_gradient,) = loss_and_gradients(triple, half.to(torch.float64))
        torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=1e-9)
        # compared as float16, where what is too large is inf on both sides
        largest = exact_gradient.abs().max().clamp(max=65504.0).item()
        torch.testing.assert_close(
            gradient, exact_gradient.half(), rtol=2e-3, atol=2e-3 * largest, msg=str(triple)
        )
        tally("bare triples on a half Gram matrix beyond 65504")


@pytest.mark.parametrize(
    "affinity", ["cosine", "cosine(shifted=True)", "rbf", "polynomial(unit=True)"]
)
@pytest.mark.parametrize("norm", [0.0, 1e-13])
def test_a_row_too_short_for_a_direction_has_gradient_zero(affinity: str, norm: float) -> None:
    inputs = pair(1, 5, 4)
    student = inputs.student.clone()
    student[2] *= norm
    student.requires_grad_()
    reference.affinity_loss(student, inputs.teacher, affinity).backward()
    assert (student.grad[2] == 0).all()
    assert (student.grad[[0, 1, 3, 4]].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("exponent", [9, 12, 15, 18, 19, 20, 22, 25, 30, 37])
def test_what_overflows_inside_float32_is_not_a_plausible_number(exponent: int) -> None:
    """Features that float32 holds, and whose squares or statistics it does not."""
    for triple in base_triples():
        inputs = pair(seed_of(triple), 6, 4).map(lambda x: (x * 10.0**exponent).float())
        loss = reference.affinity_loss(*inputs.features, *triple.build())
        exact = reference.affinity_loss(*inputs.to(torch.float64).features, *triple.build())
        if loss.isfinite():
            assert loss.item() == pytest.approx(exact.item(), rel=1e-3, abs=1e-9), str(triple)


@pytest.mark.parametrize("affinity", ["sqeuclidean", "euclidean", "rbf(unit=False)"])
def test_two_coincident_rows_exert_no_force_on_each_other(affinity: str) -> None:
    """Alone in the batch they have gradient 0; the teacher's distance cannot tell them apart."""
    inputs = pair(2, 2, 4)
    student = inputs.student[:1].expand(2, 4).clone().requires_grad_()
    loss = reference.affinity_loss(student, inputs.teacher, affinity)
    loss.backward()
    assert loss > 0
    assert (student.grad == 0).all()


@pytest.mark.parametrize("normalization", ["none", "row_l2", "mean", "max", "frobenius"])
def test_a_collapsed_student_has_gradient_zero_under_distances(normalization: str) -> None:
    inputs = edge("collapsed-student").make(3)
    for affinity in ("sqeuclidean", "euclidean", "rbf"):
        student = inputs.student.clone().requires_grad_()
        reference.affinity_loss(student, inputs.teacher, affinity, normalization).backward()
        assert student.grad.abs().max() <= 1e-12


@pytest.mark.parametrize("rows", range(3, 20))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_centered_norm_of_rounding_alone_counts_as_zero(dtype: torch.dtype, rows: int) -> None:
    """Of equal rows nothing is left but rounding, and it is large where the features are.

    Whether anything is left depends on the number of rows and the order of the sums.
    """
    first = 1e4 * pair(3, 1, 7).student
    student = first.expand(rows, 7).to(dtype).clone().requires_grad_()
    teacher = pair(4, rows, 3).student.to(dtype)
    loss = reference.affinity_loss(
        student, teacher, "gram", "frobenius(center=True)", reduction="sum"
    )
    loss.backward()
    # P_s = 0, and |P_t| = 1
    assert loss.item() == pytest.approx(1.0, rel=1e-6)
    assert (student.grad == 0).all()


def test_the_diagonal_of_distances_is_exactly_zero() -> None:
    x = (1000.0 + pair(4, 6, 5).student).float()
    for affinity in ("sqeuclidean", "euclidean"):
        target = torch.zeros_like(x)
        only_diagonal = torch.eye(6, dtype=torch.bool)
        loss = reference.affinity_loss(x, target, affinity, "none", "l1", pair_mask=only_diagonal)
        assert loss == 0


@pytest.mark.parametrize(
    "triple",
    [
        ("gram", "row_l2", "mse"),
        ("gram", "frobenius", "mse"),
        ("cosine(shifted=True)", "row_sum", "kl"),
        ("euclidean", "mean", "smooth_l1"),
        ("gram", "frobenius(center=True)", "mse"),
        ("gram", "softmax", "kl"),
    ],
    ids="-".join,
)
def test_one_row_tells_nothing_where_it_is_normalized(triple: tuple[str, str, str]) -> None:
    loss = reference.affinity_loss(*edge("one-row").make(5).features, *triple)
    assert loss.item() == pytest.approx(0.0, abs=1e-15)


def test_one_row_of_a_plain_gram_matrix() -> None:
    # A_s = 3^2 + 4^2 = 25, A_t = 2^2 = 4, (25 - 4)^2
    student, teacher = torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0]])
    assert reference.affinity_loss(student, teacher, "gram") == 441.0


def test_an_empty_loss_without_gradients() -> None:
    """Whether or not anything requires grad, nothing to compare is 0.0."""
    loss = reference.affinity_loss(torch.zeros(0, 3), torch.zeros(0, 2))
    assert loss == 0 and loss.dim() == 0 and not loss.requires_grad


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["self", "tokens", "pixels-matrixmean", "cross-masks-batchmean"])
def test_layouts(layout: str, name: str) -> None:
    plain, leaves = call(name).make(6).with_grad()
    expected = reference.affinity_loss(*plain.features, "cosine", "row_l2", **plain.options)
    gradients = torch.autograd.grad(expected, leaves)
    strided, leaves = call(name).make(6).map(LAYOUTS[layout]).with_grad()
    loss = reference.affinity_loss(*strided.features, "cosine", "row_l2", **strided.options)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), gradients, rtol=1e-10, atol=1e-14)


def test_expanded_features() -> None:
    inputs = expanded_pair(7)
    inner = inputs.student[:1].clone().requires_grad_()
    loss = reference.affinity_loss(inner.expand(5, 4), inputs.teacher, "gram", "row_l2")
    loss.backward()
    copied = inputs.student.contiguous().requires_grad_()
    expected = reference.affinity_loss(copied, inputs.teacher.contiguous(), "gram", "row_l2")
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(inner.grad, copied.grad.sum(0, keepdim=True))


def test_expanded_and_strided_incoming_gradients() -> None:
    inputs = pair(8, 6, 4)
    incoming = torch.randn(6, 2, dtype=torch.float64)[:, 0]
    for gradient in (torch.ones(1, dtype=torch.float64).expand(6), incoming):
        results = []
        for one in (gradient, gradient.contiguous()):
            student = inputs.student.clone().requires_grad_()
            rows = reference.affinity_loss(student, inputs.teacher, "cosine", reduction="none")
            rows.backward(one)
            results.append(student.grad)
        torch.testing.assert_close(*results)


def test_changed_data_in_the_same_tensor_gives_a_fresh_result() -> None:
    inputs = pair(9, 5, 4)
    first = reference.affinity_loss(*inputs.features)
    inputs.student.mul_(2.0)
    assert reference.affinity_loss(*inputs.features) != first


def test_inputs_are_left_alone() -> None:
    for name in ("self", "cross-masks-batchmean", "padded", "diagonal-zero"):
        inputs = call(name).make(10)
        before = inputs.map(torch.clone)
        for triple in base_triples()[::7]:
            if call(name).allows(triple):
                reference.affinity_loss(*inputs.features, *triple.build(), **inputs.options)
        for x, y in zip(inputs.features, before.features, strict=True):
            assert torch.equal(x, y)
        for key, value in before.options.items():
            if isinstance(value, Tensor):
                assert torch.equal(value, inputs.options[key])
