"""Laws between calls, over random shapes: masks slice, batches loop, columns are rows of A'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from case_inputs import features
from cases import base_triples, part, valid_triples
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from affkd_kernels import affinity_matrix, reference

TRIPLES = st.sampled_from(base_triples())
SEEDS = st.integers(0, 9_999)
SIZES = st.integers(1, 6)
LENGTHS = st.integers(1, 5)
REDUCTIONS = st.sampled_from(["sum", "mean", "batchmean", "matrixmean"])
# nothing here asks for a derivative, so a kink is as good as any other point
ALL_TRIPLES = st.sampled_from(valid_triples())


def loss_of(triple: Any, student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    return reference.affinity_loss(student, teacher, *triple.build(), **options)


def assert_same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@given(ALL_TRIPLES, SEEDS, st.lists(st.booleans(), min_size=1, max_size=7), LENGTHS, REDUCTIONS)
def test_a_mask_is_a_slice(
    triple: Any, seed: int, valid: list[bool], length: int, reduction: str
) -> None:
    mask = torch.tensor(valid)
    student, teacher = features(seed, len(valid), length), features(seed + 1, len(valid), 3)
    whole = student.clone().requires_grad_()
    masked = loss_of(triple, whole, teacher, mask=mask, reduction=reduction)
    sliced = student[mask].clone().requires_grad_()
    expected = loss_of(triple, sliced, teacher[mask], reduction=reduction)
    assert_same(masked, expected)
    (gradient,) = torch.autograd.grad(masked, whole)
    assert_same(gradient[mask], torch.autograd.grad(expected, sliced)[0])
    assert (gradient[~mask] == 0).all()


@given(TRIPLES, SEEDS, SIZES, st.lists(st.booleans(), min_size=1, max_size=7), LENGTHS)
def test_a_key_mask_is_a_slice(
    triple: Any, seed: int, queries: int, valid: list[bool], length: int
) -> None:
    key_mask = torch.tensor(valid)
    rows = features(seed, queries, length), features(seed + 1, queries, 2)
    keys = features(seed + 2, len(valid), length), features(seed + 3, len(valid), 2)
    masked = loss_of(triple, *rows, student_keys=keys[0], teacher_keys=keys[1], key_mask=key_mask)
    s_keys, t_keys = (x[key_mask] for x in keys)
    assert_same(masked, loss_of(triple, *rows, student_keys=s_keys, teacher_keys=t_keys))


@given(TRIPLES, SEEDS, st.lists(st.integers(0, 5), min_size=1, max_size=4), LENGTHS)
def test_a_padded_batch_is_a_loop_over_its_sequences(
    triple: Any, seed: int, lengths: list[int], length: int
) -> None:
    n, longest = len(lengths), max(lengths)
    student, teacher = features(seed, n, longest, length), features(seed + 1, n, longest, 2)
    mask = torch.arange(longest) < torch.tensor(lengths).unsqueeze(1)

    def batched(reduction: str) -> Tensor:
        return loss_of(triple, student, teacher, items="tokens", mask=mask, reduction=reduction)

    total = sum(
        loss_of(triple, student[i, :count], teacher[i, :count], reduction="sum")
        for i, count in enumerate(lengths)
    )
    assert_same(batched("sum"), total)
    assert_same(batched("matrixmean"), total / n)
    assert_same(batched("batchmean"), total / max(sum(lengths), 1))
    assert_same(batched("mean"), total / max(sum(count**2 for count in lengths), 1))


@given(TRIPLES, SEEDS, st.sampled_from(["pixels", "channels"]), LENGTHS, REDUCTIONS)
def test_feature_maps_are_tokens(
    triple: Any, seed: int, items: str, channels: int, reduction: str
) -> None:
    student = features(seed, 2, channels, 2, 3)
    teacher = features(seed + 1, 2, channels if items == "channels" else 3, 2, 3)

    def tokens(x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2) if items == "pixels" else x.flatten(2)

    maps = loss_of(triple, student, teacher, items=items, reduction=reduction)
    expected = loss_of(
        triple, tokens(student), tokens(teacher), items="tokens", reduction=reduction
    )
    assert_same(maps, expected)


@given(
    SEEDS,
    SIZES,
    SIZES,
    st.sampled_from(["mse", "l1", "kl", "kl(direction=reverse)", "cross_entropy"]),
    st.sampled_from(["gram", "cosine", "euclidean", "rbf"]),
    st.booleans(),
    st.none() | st.integers(-2, 2),
    st.sampled_from(["sum", "mean", "batchmean", "matrixmean", "none"]),
)
def test_columns_are_the_rows_of_swapped_arguments(
    seed: int,
    q: int,
    k: int,
    loss: str,
    affinity: str,
    masked: bool,
    offset: int | None,
    reduction: str,
) -> None:
    student, teacher = features(seed, q, 3), features(seed + 1, q, 2)
    s_keys, t_keys = features(seed + 2, k, 3), features(seed + 3, k, 2)
    masks: dict[str, Tensor] = {}
    if masked:
        masks = {"mask": torch.arange(q) % 2 == 0, "key_mask": torch.arange(k) % 3 != 1}
    diagonal = "keep" if offset is None else "zero"
    column = reference.affinity_loss(
        student,
        teacher,
        affinity,
        "softmax(axis=column, tau=0.7)",
        loss,
        student_keys=s_keys,
        teacher_keys=t_keys,
        reduction=reduction,
        diagonal=diagonal,
        diagonal_offset=offset,
        **masks,
    )
    swapped = {"mask": masks.get("key_mask"), "key_mask": masks.get("mask")}
    row = reference.affinity_loss(
        s_keys,
        t_keys,
        affinity,
        "softmax(tau=0.7)",
        loss,
        student_keys=student,
        teacher_keys=teacher,
        reduction=reduction,
        diagonal=diagonal,
        diagonal_offset=None if offset is None else -offset,
        **swapped,
    )
    assert_same(column, row)


@given(SEEDS, SIZES, SIZES, st.sampled_from(["mse", "kl", "cross_entropy"]), REDUCTIONS)
def test_both_is_the_mean_of_row_and_column(
    seed: int, q: int, k: int, loss: str, reduction: str
) -> None:
    rows = features(seed, q, 3), features(seed + 1, q, 2)
    keys = {"student_keys": features(seed + 2, k, 3), "teacher_keys": features(seed + 3, k, 2)}
    row, column, both = (
        reference.affinity_loss(
            *rows, "gram", f"softmax(axis={axis})", loss, reduction=reduction, weight=3.0, **keys
        )
        for axis in ("row", "column", "both")
    )
    assert_same(both, (row + column) / 2)


@given(TRIPLES, SEEDS, st.integers(1, 5))
def test_a_self_affinity_is_the_cross_affinity_with_its_own_keys(
    triple: Any, seed: int, size: int
) -> None:
    student, teacher = features(seed, size, 3), features(seed + 1, size, 2)
    keys = {"student_keys": student, "teacher_keys": teacher, "diagonal_offset": 0}
    for diagonal in ("keep", "zero", "exclude"):
        alone = loss_of(triple, student, teacher, diagonal=diagonal)
        assert_same(alone, loss_of(triple, student, teacher, diagonal=diagonal, **keys))


@given(TRIPLES, SEEDS, st.integers(2, 5))
def test_excluding_the_diagonal_is_a_pair_mask(triple: Any, seed: int, size: int) -> None:
    student, teacher = features(seed, size, 3), features(seed + 1, size, 2)
    off_diagonal = ~torch.eye(size, dtype=torch.bool)
    excluded = loss_of(triple, student, teacher, diagonal="exclude")
    assert_same(excluded, loss_of(triple, student, teacher, pair_mask=off_diagonal))


@given(TRIPLES, SEEDS, SIZES, SIZES, REDUCTIONS)
def test_a_full_mask_is_no_mask(triple: Any, seed: int, q: int, k: int, reduction: str) -> None:
    rows = features(seed, q, 3), features(seed + 1, q, 2)
    keys = {"student_keys": features(seed + 2, k, 3), "teacher_keys": features(seed + 3, k, 2)}
    full = {
        "mask": torch.ones(q, dtype=torch.bool),
        "key_mask": torch.ones(k, dtype=torch.bool),
        "pair_mask": torch.ones(q, k, dtype=torch.bool),
        "row_weight": torch.ones(q),
    }
    plain = loss_of(triple, *rows, reduction=reduction, **keys)
    assert_same(loss_of(triple, *rows, reduction=reduction, **keys, **full), plain)


@given(TRIPLES, SEEDS, SIZES, st.integers(0, 6), REDUCTIONS)
def test_row_weights_of_zero_drop_losses_and_no_counts(
    triple: Any, seed: int, q: int, kept: int, reduction: str
) -> None:
    assume(kept <= q)
    rows = features(seed, q, 3), features(seed + 1, q, 2)
    weights = (torch.arange(q) < kept).double()
    losses = loss_of(triple, *rows, reduction="none")
    counts = {"sum": 1, "mean": q * q, "batchmean": q, "matrixmean": 1}
    weighted = loss_of(triple, *rows, reduction=reduction, row_weight=weights)
    assert_same(weighted, losses[:kept].sum() / counts[reduction])


@given(TRIPLES, SEEDS, SIZES, SIZES)
def test_the_matrix_to_look_at_is_the_one_in_the_loss(
    triple: Any, seed: int, q: int, k: int
) -> None:
    affinity, normalization, _ = triple.build()
    rows = features(seed, q, 3), features(seed + 1, q, 3)
    keys = features(seed + 2, k, 3), features(seed + 3, k, 3)
    s, t = (
        affinity_matrix(x, affinity, normalization, keys=y) for x, y in zip(rows, keys, strict=True)
    )
    loss = reference.affinity_loss(
        *rows, affinity, normalization, "mse", student_keys=keys[0], teacher_keys=keys[1]
    )
    assert s.shape == (q, k)
    assert_same(loss, (s - t).square().mean())


@pytest.mark.parametrize("axis", ["row", "column"])
def test_softmax_sums_to_one_over_its_axis(axis: str) -> None:
    x = features(1, 5, 3)
    matrix = affinity_matrix(x, "gram", part("softmax", axis=axis).build(), keys=features(2, 4, 3))
    sums = matrix.sum(1 if axis == "row" else 0)
    assert_same(sums, torch.ones_like(sums))
