"""What blocks of the CUDA kernels tell each other: statistics, origins, counts, items of NaN."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from case_inputs import Inputs, bank, mask, pair, seed_of
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

ALIGNMENT, SQUARED_MAX, DISTANCE_MEAN = SAMPLE[1], SAMPLE[4], SAMPLE[5]
# with statistics that come out of the tiles
TILED = [SAMPLE[3], SQUARED_MAX, DISTANCE_MEAN]


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_query_of_nan_is_noticed_in_every_panel(
    side: str, reduction: str, kernels: harness.Library
) -> None:
    """Where no pair of its panel takes part, and in the row losses of the other panels."""
    pairs = torch.ones(70, 40, dtype=torch.bool)
    pairs[:32] = pairs[50] = False
    inputs = bank(5, 70, 4, keys=40, teacher_dim=3, pair_mask=pairs, reduction=reduction)
    getattr(inputs, side)[1, 0] = torch.nan
    for triple in SAMPLE[0], SAMPLE[3], SAMPLE[8]:
        value, _ = with_kernels(kernels, inputs, triple, budget=1)
        expected, _ = with_reference(inputs, triple)
        assert torch.equal(value.isnan(), expected.isnan()), str(triple)


@pytest.fixture
def few_slots(kernels: harness.Library) -> Iterator[harness.Library]:
    kernels.most_slots, before = 3, kernels.most_slots
    yield kernels
    kernels.most_slots = before


@pytest.mark.parametrize(
    "one",
    [
        Call("N2-L70", lambda s: pair(s, 2, 70, 5, teacher_dim=3, items="tokens")),
        Call("B70-mask", lambda s: pair(s, 70, 5, mask=mask(s, 70))),
        Call("Q40-K70", lambda s: bank(s, 40, 5, keys=70, teacher_dim=3)),
    ],
    ids=str,
)
def test_a_statistic_of_more_tiles_than_slots(one: Call, few_slots: harness.Library) -> None:
    for triple in TILED:
        if one.allows(triple):
            inputs = one.make(seed_of(triple, one)).to(torch.float32)
            compare_with_eager(few_slots, inputs, triple)
            assert triple != SQUARED_MAX or few_slots.launches[:3] == ["gram", "rows", "product"]


def test_more_matrices_than_threads(kernels: harness.Library) -> None:
    """The scalars of a call are summed over them, each after all of its own blocks."""
    keep = mask(3, 260, 3)
    inputs = pair(3, 260, 3, 2, items="tokens", mask=keep, reduction="batchmean")
    compare(kernels, inputs, ALIGNMENT, 1e-11)
    compare_with_eager(kernels, inputs.to(torch.float32), ALIGNMENT)
    assert kernels.launches == ["gram", "means", "product"]
    scale = torch.tensor(0.7, dtype=torch.float64)
    scaled = Inputs(inputs.student, inputs.teacher, {**inputs.options, "student_scale": scale})
    compare(kernels, scaled, Triple(Part("gram"), Part("frobenius"), Part("l1")), 1e-11)


@pytest.mark.parametrize("keys", [0, 200], ids=["self", "bank"])
def test_matrices_that_take_turns_share_what_grows_with_their_pairs(
    keys: int, kernels: harness.Library
) -> None:
    """Of one more matrix the workspace has sums over its items, not a byte of every pair."""
    triple, items, sizes = SAMPLE[2], 200, []
    for matrices in (2, 4):
        shape = (matrices, items, 3)
        inputs = (
            bank(7, *shape, keys=keys, teacher_dim=5, items="tokens")
            if keys
            else pair(7, *shape, items="tokens")
        ).to(torch.float32)
        compare_with_eager(kernels, inputs, triple, budget=4 * 4 * items**2)
        assert kernels.launches == ["gram", "rows", "product"] * matrices
        sizes.append(kernels.workspace_bytes)
    assert sizes[1] - sizes[0] < 2 * items**2


@pytest.mark.parametrize("offset", [3.0, 100.0])
def test_a_common_offset_does_no_harm(offset: float, kernels: harness.Library) -> None:
    """To a distance, however large the mean is, and not more to a centered matrix than to eager."""
    inputs = pair(19, 70, 33).to(torch.float32)
    moved = Inputs(inputs.student + offset, inputs.teacher + offset)
    for triple in SAMPLE[1], SAMPLE[4], SAMPLE[5]:
        compare_with_eager(kernels, moved, triple, allowed=2)


def test_an_origin_where_the_first_items_are_masked(kernels: harness.Library) -> None:
    """Left padding: the point that all features lose is one of valid items alone."""
    first = torch.tensor([[45], [0], [69], [70]])
    keep = torch.arange(70).expand(4, 70) >= first
    inputs = pair(29, 4, 70, 33, items="tokens", mask=keep).to(torch.float32)
    student = torch.where(keep.unsqueeze(-1), inputs.student + 100, 1e30)
    moved = Inputs(student, inputs.teacher + 100, inputs.options)
    for triple in ALIGNMENT, SQUARED_MAX, DISTANCE_MEAN:
        compare_with_eager(kernels, moved, triple, allowed=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_batch_that_has_collapsed_to_a_distant_point(
    dtype: torch.dtype, kernels: harness.Library
) -> None:
    """What rounding leaves of a student without any relation counts as none."""
    inputs = pair(31, 70, 33)
    point = (1000 + 100 * inputs.student[:1]).expand(70, -1)
    collapsed = Inputs(point, inputs.teacher).to(dtype)
    for triple in ALIGNMENT, SQUARED_MAX, DISTANCE_MEAN:
        value, (gradient,) = with_kernels(kernels, collapsed, triple)
        expected, _ = with_reference(collapsed.to(torch.float64), triple)
        assert distance(value, expected) < 1e-5, str(triple)
        assert not gradient.any(), str(triple)
