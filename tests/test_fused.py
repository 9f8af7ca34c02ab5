"""Every fused implementation against the reference: the same checks, whatever the kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from case_inputs import Inputs, bank, mask, own_keys, pair, seed_of
from cases import AFFINITIES, Call, Part, Triple, call, covering, valid_triples
from edges import EDGES, LAYOUTS, Edge
from interpreter import interpreted, spread
from torch import Tensor

import affkd_kernels as affkd
from affkd_kernels.kernels import factored
from affkd_kernels.spec import make_spec


def computes(fused: dict[str, str], triple: Triple, inputs: Inputs) -> bool:
    """Whether the implementation covers the call: the factored form exists for some triples."""
    if fused["algorithm"] != "factored":
        return True
    static = {k: v for k, v in inputs.options.items() if k in ("diagonal", "diagonal_offset")}
    spec = make_spec(*triple.build(), **static)
    return factored.unsupported(spec, "pair_mask" in inputs.options) is None


def loss_and_gradients(
    inputs: Inputs, triple: Triple, **how: str
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss and the gradients of a weighted sum of it (row losses get unequal weights)."""
    inputs, leaves = inputs.with_grad()
    value = affkd.affinity_loss(*inputs.features, *triple.build(), **inputs.options, **how)
    weights = torch.linspace(0.5, 1.5, max(value.numel(), 1), dtype=value.dtype)
    gradients = torch.autograd.grad((value * weights[: value.numel()].view_as(value)).sum(), leaves)
    return value.detach(), gradients


def distance(x: Tensor, y: Tensor) -> float:
    """|x - y| / |y|, or |x - y| / 1e-5 where y is smaller: many gradients vanish identically."""
    scale = y.double().norm().clamp(min=1e-5)
    return float((x.double() - y.double()).norm() / scale)


BY_AFFINITY = [
    (part, [(t, c) for t, c in covering(valid_triples(), calls_each=3) if t.affinity == part])
    for part in AFFINITIES
]


each_affinity = pytest.mark.parametrize(
    "part, pairs", BY_AFFINITY, ids=[str(part) for part, _ in BY_AFFINITY]
)


@each_affinity
def test_every_triple_in_float64(
    part: Part,
    pairs: list[tuple[Triple, Call]],
    fused: dict[str, str],
    poisoned_memory: Any,
    tally: Callable[..., None],
) -> None:
    compared = compare_in_float64(spread(pairs, fused, 32, part), fused)
    if not compared:
        pytest.skip(f"no {part} triple has this form")
    tally(f"fused calls compared in float64 ({'/'.join(fused.values())})", compared)


@pytest.mark.all_triples
@each_affinity
def test_every_triple_in_the_interpreter(
    part: Part,
    pairs: list[tuple[Triple, Call]],
    fused: dict[str, str],
    tally: Callable[..., None],
) -> None:
    if not interpreted(fused):
        pytest.skip("test_every_triple_in_float64 leaves nothing out")
    # a third of the calls, and yet every triple: it comes with three calls in a row
    compared = compare_in_float64(pairs[seed_of(fused["algorithm"]) % 3 :: 3], fused)
    tally(f"triples compared in the interpreter ({'/'.join(fused.values())})", compared)


def compare_in_float64(pairs: Sequence[tuple[Triple, Call]], fused: dict[str, str]) -> int:
    """Loss and gradients of all calls that the implementation covers; returns their number."""
    compared = 0
    for triple, one in pairs:
        inputs = one.make(seed_of(triple, one))
        if not computes(fused, triple, inputs):
            continue
        value, gradients = loss_and_gradients(inputs, triple, **fused)
        expected, expected_gradients = loss_and_gradients(inputs, triple, backend="reference")
        where = f"{triple} {one}"
        assert value.shape == expected.shape and value.dtype == expected.dtype, where
        assert distance(value, expected) < 1e-11, where
        for x, y in zip(gradients, expected_gradients, strict=True):
            assert x.shape == y.shape and x.dtype == y.dtype, where
            assert distance(x, y) < 1e-9, where
        compared += 1
    return compared


ODD_SHAPES = [
    call("self"),
    Call("B1-D1", lambda s: pair(s, 1, 1)),
    Call("B2-D3", lambda s: pair(s, 2, 3)),
    Call("B3-D1", lambda s: pair(s, 3, 1, teacher_dim=19)),
    Call("B37-D19", lambda s: pair(s, 37, 19, teacher_dim=3)),
    Call("B129-D19", lambda s: pair(s, 129, 19)),
    Call("B129-mask", lambda s: pair(s, 129, 3, teacher_dim=19, mask=mask(s, 129))),
    Call("Q37-K129", lambda s: bank(s, 37, 19, keys=129, teacher_dim=3)),
    Call("Q129-K3", lambda s: bank(s, 129, 3, keys=3, teacher_dim=1)),
    Call("Q37-K70-own", lambda s: own_keys(bank(s, 37, 5, keys=70, teacher_dim=3), 29)),
    Call("N3-L37", lambda s: pair(s, 3, 37, 5, teacher_dim=3, items="tokens")),
]  # fmt: skip
SAMPLE = [
    Triple(Part(a), Part(n, o), Part(loss))
    for a, n, o, loss in (
        ("gram", "row_l2", (), "mse"),
        ("gram", "frobenius", (("center", True),), "mse"),
        ("cosine", "none", (), "mse"),
        ("sqeuclidean", "frobenius", (), "mse"),
        ("sqeuclidean", "max", (), "mse"),
        ("euclidean", "mean", (), "smooth_l1"),
        ("rbf", "frobenius", (("center", True),), "l1"),
        ("rbf", "row_sum", (), "kl"),
        ("polynomial", "row_l1", (), "smooth_l1"),
        ("gram", "softmax", (), "kl"),
        ("cosine", "softmax", (("axis", "column"),), "cross_entropy"),
    )
]


@pytest.mark.parametrize("one", ODD_SHAPES, ids=str)
def test_odd_shapes(one: Call, fused: dict[str, str], poisoned_memory: Any) -> None:
    for triple in spread(SAMPLE, fused, 11, one):
        inputs = one.make(seed_of(triple, one))
        if not computes(fused, triple, inputs):
            continue
        value, gradients = loss_and_gradients(inputs, triple, **fused)
        expected, expected_gradients = loss_and_gradients(inputs, triple, backend="reference")
        assert distance(value, expected) < 1e-10, triple
        for x, y in zip(gradients, expected_gradients, strict=True):
            assert distance(x, y) < 1e-8, triple


@pytest.mark.parametrize("one", EDGES, ids=str)
def test_edges(one: Edge, fused: dict[str, str], tally: Callable[..., None]) -> None:
    """Finite where the reference is, non-finite where it is, zero where it is exactly zero."""
    for triple in spread(SAMPLE, fused, 6, one):
        inputs = one.make(seed_of(triple, one))
        if not one.allows(triple) or not computes(fused, triple, inputs):
            continue
        value, gradients = loss_and_gradients(inputs, triple, **fused)
        expected, expected_gradients = loss_and_gradients(inputs, triple, backend="reference")
        assert bool(value.isfinite().all()) == bool(expected.isfinite().all()), triple
        if not expected.isfinite().all():
            continue
        exact = expected.dtype == torch.float64
        assert distance(value, expected) < (1e-9 if exact else 1e-4), triple
        for x, y in zip(gradients, expected_gradients, strict=True):
            assert torch.equal(x.isfinite(), y.isfinite()), triple
            if one.outcome == "zero":
                assert not x.any() and not value.any(), triple
            if one.outcome == "masked":
                masked = (y == 0).all(-1)
                assert not x[masked].any(), triple
            if exact:
                # features 1e4 times their spread: the reference's own centering loses 8 digits
                assert distance(x, y) < (1e-4 if one.name == "common-offset" else 1e-6), triple
        tally(f"edges compared ({'/'.join(fused.values())})")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_features_and_of_incoming_gradients(layout: str, fused: dict[str, str]) -> None:
    triple = Triple(Part("gram"), Part("row_l2"), Part("mse"))
    inputs = pair(3, 12, 8, teacher_dim=6)
    expected, expected_gradients = loss_and_gradients(inputs, triple, **fused)
    strided = Inputs(LAYOUTS[layout](inputs.student), LAYOUTS[layout](inputs.teacher))
    assert torch.equal(strided.student, inputs.student)
    leaf = strided.student.detach().requires_grad_()
    value = affkd.affinity_loss(leaf, strided.teacher, *triple.build(), **fused)
    (gradient,) = torch.autograd.grad(0.5 * value, leaf)
    assert distance(value.detach(), expected) < 1e-12
    assert distance(gradient, expected_gradients[0]) < 1e-12


def test_incoming_gradients_of_row_losses(fused: dict[str, str]) -> None:
    """Expanded, transposed and zero-strided ones, as sum() and cat() make them."""
    triple = Triple(Part("gram"), Part("row_l2"), Part("mse"))
    inputs, (student,) = pair(5, 3, 7, 4, items="tokens", reduction="none").with_grad()
    rows = affkd.affinity_loss(*inputs.features, *triple.build(), **inputs.options, **fused)
    incoming = torch.rand(7, 3, dtype=rows.dtype)
    for gradient in (incoming.t(), incoming[:1, :1].expand(3, 7), incoming[:, :1].t().expand(3, 7)):
        (strided,) = torch.autograd.grad(rows, student, gradient, retain_graph=True)
        (dense,) = torch.autograd.grad(rows, student, gradient.contiguous(), retain_graph=True)
        assert torch.equal(strided, dense)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_inputs_are_computed_in_float32(dtype: torch.dtype, fused: dict[str, str]) -> None:
    triple = Triple(Part("gram"), Part("row_l2"), Part("mse"))
    inputs = pair(7, 33, 16, teacher_dim=9).to(dtype)
    value, (gradient,) = loss_and_gradients(inputs, triple, **fused)
    exact, (exact_gradient,) = loss_and_gradients(
        inputs.to(torch.float64), triple, backend="reference"
    )
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    assert distance(value, exact) < 1e-5
    assert distance(gradient, exact_gradient) < 2 * torch.finfo(dtype).eps


def test_a_loss_scale_reaches_the_gradient_before_half_precision_does(
    fused: dict[str, str],
) -> None:
    inputs = pair(9, 33, 16).to(torch.float16)
    student = inputs.student.requires_grad_()
    triple = ("gram", "row_l2", "mse")
    tiny = affkd.affinity_loss(student, inputs.teacher, *triple, weight=1e-5, **fused)
    (scaled,) = torch.autograd.grad(65536.0 * tiny, student)
    assert (scaled != 0).float().mean() > 0.9


def test_two_calls_agree_bitwise(fused: dict[str, str]) -> None:
    inputs = pair(11, 40 if interpreted(fused) else 150, 24).to(torch.float32)
    for triple in spread(SAMPLE, fused, 4, "bitwise"):
        if not computes(fused, triple, inputs):
            continue
        first, first_gradients = loss_and_gradients(inputs, triple, **fused)
        second, second_gradients = loss_and_gradients(inputs, triple, **fused)
        assert torch.equal(first, second), triple
        assert all(map(torch.equal, first_gradients, second_gradients)), triple


def test_deterministic_algorithms_are_all_there_are(fused: dict[str, str]) -> None:
    """Also, torch then fills what it allocates with NaN."""
    inputs = pair(12, 40, 24).to(torch.float32)
    for triple in spread(SAMPLE, fused, 4, "deterministic"):
        if not computes(fused, triple, inputs):
            continue
        expected, expected_gradients = loss_and_gradients(inputs, triple, **fused)
        torch.use_deterministic_algorithms(True)
        try:
            value, gradients = loss_and_gradients(inputs, triple, **fused)
        finally:
            torch.use_deterministic_algorithms(False)
        assert torch.equal(value, expected), triple
        assert all(map(torch.equal, gradients, expected_gradients)), triple


@pytest.mark.parametrize("near_copy", [False, True], ids=["random", "near-copy"])
def test_float32_error_is_the_reference_s_own(near_copy: bool, fused: dict[str, str]) -> None:
    """At most twice the eager float32 error (plus 1e-6), in loss and gradient."""
    for triple in spread(SAMPLE, fused, 6, near_copy):
        inputs = pair(13, 96, 40)
        if near_copy:
            inputs = Inputs(inputs.student, inputs.student + 0.01 * inputs.teacher)
        inputs = inputs.to(torch.float32)
        if not computes(fused, triple, inputs):
            continue
        exact, (exact_gradient,) = loss_and_gradients(
            inputs.to(torch.float64), triple, backend="reference"
        )
        eager, (eager_gradient,) = loss_and_gradients(inputs, triple, backend="reference")
        value, (gradient,) = loss_and_gradients(inputs, triple, **fused)
        assert distance(value, exact) <= 2 * distance(eager, exact) + 1e-6, triple
        allowed = 2 * distance(eager_gradient, exact_gradient) + 1e-6
        assert distance(gradient, exact_gradient) <= allowed, triple


def test_a_second_derivative_is_an_error_that_names_the_reference(fused: dict[str, str]) -> None:
    inputs, (student,) = pair(15, 6, 4).with_grad()
    for reduction in ("mean", "none"):
        value = affkd.affinity_loss(*inputs.features, reduction=reduction, **fused).sum()
        (gradient,) = torch.autograd.grad(value, student, create_graph=True)
        with pytest.raises(RuntimeError, match='backend="reference"'):
            torch.autograd.grad(gradient.sum(), student)


def test_an_in_place_change_after_the_call_is_no_error(fused: dict[str, str]) -> None:
    """The gradient exists already: an in-place ReLU behind the captured feature may follow."""
    leaf = pair(17, 6, 4).student.requires_grad_()
    teacher = pair(18, 6, 4).teacher
    feature = leaf * 1.0
    value = affkd.affinity_loss(feature, teacher, "gram", "row_l2", "mse", **fused)
    feature.relu_()
    value.backward()
    expected = affkd.affinity_loss(leaf, teacher, "gram", "row_l2", "mse", backend="reference")
    assert distance(leaf.grad, torch.autograd.grad(expected, leaf)[0]) < 1e-10


def test_keys_that_are_the_queries_are_still_keys(fused: dict[str, str]) -> None:
    """A cross-affinity with the same tensor on both sides, and another teacher side."""
    student, teacher, teacher_keys = torch.randn(3, 2, 20, 4, dtype=torch.float64).unbind(0)
    student.requires_grad_()
    for normalization in ("none", "row_l2", "frobenius", "frobenius(center=True)"):
        results = []
        for how in (fused, {"backend": "reference"}):
            value = affkd.affinity_loss(
                student, teacher, "gram", normalization, "mse", items="tokens",
                student_keys=student, teacher_keys=teacher_keys, **how,
            )  # fmt: skip
            results.append((value, torch.autograd.grad(value, student)[0]))
        torch.testing.assert_close(results[0], results[1])


def test_features_of_length_zero(fused: dict[str, str], poisoned_memory: Any) -> None:
    empty = torch.zeros(5, 0, dtype=torch.float64, requires_grad=True)
    teacher, teacher_keys = torch.randn(2, 7, 4, dtype=torch.float64).unbind(0)
    keys = {"student_keys": torch.zeros(7, 0).double(), "teacher_keys": teacher_keys}
    for options in ({}, keys):
        value = affkd.affinity_loss(empty, teacher[:5], **options, **fused)
        expected = affkd.affinity_loss(empty, teacher[:5], **options, backend="reference")
        torch.testing.assert_close(value, expected)
        assert torch.autograd.grad(value, empty)[0].shape == (5, 0)


def test_a_shifted_cosine_is_never_negative(fused: dict[str, str]) -> None:
    """Opposite directions: rounding must not give a probability below 0 and a NaN for its log."""
    triple = ("cosine(shifted=True)", "row_sum", "kl")
    if fused["algorithm"] == "factored":
        pytest.skip("no pkt triple has this form")
    for _ in range(5 if interpreted(fused) else 50):
        x, teacher = torch.randn(1, 512), torch.randn(2, 512)
        student = torch.cat((x, -3 * x)).requires_grad_()
        for how in (fused, {"backend": "reference"}):
            value = affkd.affinity_loss(student, teacher, *triple, **how)
            assert value.isfinite() and torch.autograd.grad(value, student)[0].isfinite().all()


def test_of_a_single_feature_only_the_sign_is_left(fused: dict[str, str]) -> None:
    """Opposite items are at -1: almost there, and shifted, they would be positive entries."""
    for affinity in (Part("cosine", (("shifted", True),)), Part("cosine"), Part("rbf")):
        triple = Triple(affinity, Part("mean"), Part("smooth_l1"))
        for inputs in (pair(21, 40, 1), bank(22, 40, 1, keys=37, teacher_dim=1)):
            inputs = inputs.to(torch.float32)
            if not computes(fused, triple, inputs):
                continue
            exact, _ = loss_and_gradients(inputs.to(torch.float64), triple, backend="reference")
            value, gradients = loss_and_gradients(inputs, triple, **fused)
            assert distance(value, exact) < 1e-6, triple
            assert not any(gradient.any() for gradient in gradients), triple


def test_what_takes_part_in_nothing_shows_nowhere(fused: dict[str, str]) -> None:
    nan = torch.full((1, 3), torch.nan, dtype=torch.float64, requires_grad=True)
    alone = affkd.affinity_loss(nan, nan.detach(), diagonal="exclude", **fused)
    assert alone == 0 and not torch.autograd.grad(alone, nan)[0].any()
    student, teacher = pair(20, 4, 3).features
    student = student.index_fill(0, torch.tensor([1]), torch.nan)
    valid = torch.tensor([True, True, False, True])
    weight = torch.tensor([1.0, 1.0, torch.nan, 1.0]).double()
    rows = affkd.affinity_loss(
        student, teacher, "gram", "row_l2", "mse", mask=valid, row_weight=weight,
        reduction="none", **fused,
    )  # fmt: skip
    assert rows.isnan().tolist() == [True, True, False, True] and rows[2] == 0
