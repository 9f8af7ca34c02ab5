"""What a transformation of the features must not change, for every triple that promises it."""

from __future__ import annotations

import pytest
import torch
from case_inputs import Inputs, pair, seed_of
from cases import Part, Triple, base_triples, part, valid_triples
from torch import Tensor

from affkd_kernels import reference

B, D = 6, 4


def inputs_for(*names: object) -> Inputs:
    return pair(seed_of(*names), B, D, teacher_dim=3)


def loss_of(triple: Triple, student: Tensor, teacher: Tensor, **options: object) -> Tensor:
    return reference.affinity_loss(student, teacher, *triple.build(), **options)


def assert_same(actual: Tensor, expected: Tensor, triple: Triple) -> None:
    torch.testing.assert_close(
        actual, expected, rtol=1e-9, atol=1e-12, msg=lambda text: f"{triple}: {text}"
    )


def rotation(seed: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


def treats_sides_alike(triple: Triple) -> bool:
    options = [name for part in triple for name, _ in part.options]
    return not any(name.startswith(("student_", "teacher_")) for name in options)


def is_homogeneous(affinity: Part) -> bool:
    """Whether A scales with a power of the features' scale."""
    if affinity.get("clamp_min") or affinity.name == "rbf":
        return False
    return not affinity.get("offset")


def divides_by_a_homogeneous_statistic(normalization: Part) -> bool:
    return normalization.name not in ("none", "softmax")


def test_permutation_of_the_items() -> None:
    order = torch.randperm(B)
    for triple in valid_triples():
        inputs = inputs_for(triple)
        student, teacher = (x[order] for x in inputs.features)
        assert_same(loss_of(triple, student, teacher), loss_of(triple, *inputs.features), triple)


def test_permutation_permutes_row_losses_and_gradients() -> None:
    order = torch.randperm(B)
    for triple in base_triples():
        inputs = inputs_for(triple)
        results = []
        for index in (order, torch.arange(B)):
            student = inputs.student[index].requires_grad_()
            rows = loss_of(triple, student, inputs.teacher[index], reduction="none")
            results.append((rows, torch.autograd.grad(rows.sum(), student)[0]))
        for permuted, plain in zip(*results, strict=True):
            assert_same(permuted, plain[order], triple)


def test_equal_features_have_no_loss_and_no_gradient() -> None:
    for triple in valid_triples():
        if not treats_sides_alike(triple) or triple.loss.name == "cross_entropy":
            continue
        if triple.loss.name == "kl":
            # the eps inside the logarithms moves the minimum by about itself
            triple = triple._replace(loss=part("kl", **dict(triple.loss.options), eps=1e-15))
        teacher = inputs_for(triple).student
        student = teacher.clone().requires_grad_()
        loss = loss_of(triple, student, teacher)
        assert loss.item() == pytest.approx(0.0, abs=1e-14), str(triple)
        assert torch.autograd.grad(loss, student)[0].abs().max() < 1e-10, str(triple)


def test_cross_entropy_of_equal_features_is_the_entropy() -> None:
    x = inputs_for("entropy").student
    p = (x @ x.T).softmax(1)
    loss = reference.affinity_loss(x, x, "gram", "softmax", "cross_entropy", reduction="batchmean")
    torch.testing.assert_close(loss, -(p * p.log()).sum() / B)


def test_different_features_have_a_loss_and_a_gradient() -> None:
    """The other invariances would hold for a loss that is 0, too."""
    for triple in valid_triples():
        inputs, (student,) = inputs_for(triple).with_grad()
        loss = loss_of(triple, *inputs.features)
        gradient = torch.autograd.grad(loss, student)[0]
        assert loss.abs() > 1e-9 and gradient.abs().max() > 1e-9, str(triple)


def test_rotation_of_either_side() -> None:
    for triple in valid_triples():
        inputs = inputs_for(triple)
        student = inputs.student @ rotation(1, D)
        teacher = inputs.teacher @ rotation(2, 3)
        assert_same(loss_of(triple, student, teacher), loss_of(triple, *inputs.features), triple)


def test_scale_of_either_side_where_the_statistic_takes_it_out() -> None:
    seen = set()
    for triple in valid_triples():
        if not is_homogeneous(triple.affinity):
            continue
        if not divides_by_a_homogeneous_statistic(triple.normalization):
            continue
        seen.add((triple.affinity.name, triple.normalization.name))
        inputs = inputs_for(triple)
        scaled = loss_of(triple, 3.0 * inputs.student, 0.25 * inputs.teacher)
        assert_same(scaled, loss_of(triple, *inputs.features), triple)
    # RKD's distance and CKA among them
    assert {("euclidean", "mean"), ("gram", "frobenius")} <= seen


def test_length_of_every_row_where_only_directions_count() -> None:
    lengths = torch.rand(B, 1, dtype=torch.float64) + 0.5
    unit = [
        triple
        for triple in valid_triples()
        if triple.affinity.name == "cosine"
        or triple.affinity.get("unit")
        or (triple.affinity.name == "rbf" and triple.affinity.get("unit") is None)
    ]
    for triple in unit:
        inputs = inputs_for(triple)
        scaled = loss_of(triple, lengths * inputs.student, 2.0 * lengths * inputs.teacher)
        assert_same(scaled, loss_of(triple, *inputs.features), triple)
    assert len(unit) > 100


def moves_with_the_origin(triple: Triple) -> bool:
    distance = triple.affinity.name in ("sqeuclidean", "euclidean") or (
        triple.affinity.name == "rbf" and triple.affinity.get("unit") is False
    )
    centered = triple.affinity == Part("gram") and bool(triple.normalization.get("center"))
    return not (distance or centered)


@pytest.mark.parametrize("shift", [1.0, 100.0])
def test_translation_where_only_differences_count(shift: float) -> None:
    for triple in valid_triples():
        if moves_with_the_origin(triple):
            continue
        inputs = inputs_for(triple)
        moved = loss_of(triple, inputs.student + shift, inputs.teacher - shift)
        torch.testing.assert_close(
            moved, loss_of(triple, *inputs.features), rtol=1e-8, atol=1e-10, msg=str(triple)
        )


def test_translation_matters_elsewhere() -> None:
    """The exceptions above are exceptions: a shift changes every other bare triple."""
    for triple in base_triples():
        if not moves_with_the_origin(triple):
            continue
        inputs = inputs_for(triple)
        moved = loss_of(triple, inputs.student + 1.0, inputs.teacher)
        assert (moved - loss_of(triple, *inputs.features)).abs() > 1e-9, str(triple)


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "matrixmean", "sum", "none"])
def test_weight_multiplies_every_reduction(reduction: str) -> None:
    inputs = inputs_for(reduction)
    plain, weighted = (
        reference.affinity_loss(
            *inputs.features, "cosine", "row_l2", reduction=reduction, weight=weight
        )
        for weight in (1.0, -2.5)
    )
    torch.testing.assert_close(weighted, -2.5 * plain)


def test_reductions_are_one_sum_over_different_counts() -> None:
    inputs = inputs_for("reductions")
    valid = torch.tensor([True] * 4 + [False] * 2)

    def value(reduction: str) -> Tensor:
        return reference.affinity_loss(
            *inputs.features, mask=valid, diagonal="exclude", reduction=reduction
        )

    total = value("none").sum()
    counts = {
        "sum": 1,
        "mean": 4 * 3,
        "batchmean": 4,
        "matrixmean": 1,
    }
    for reduction, count in counts.items():
        torch.testing.assert_close(value(reduction), total / count)
