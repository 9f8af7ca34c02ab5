"""The instruments of the other tests: poisoned memory, coverings, kinks and finite differences."""

from __future__ import annotations

from collections import Counter

import differences
import numpy as np
import pytest
import torch
from case_inputs import pair
from cases import CALLS, Part, base_triples, call, covering, part, valid_triples


def allocate_as(module: str) -> list[torch.Tensor]:
    """What code of a module of this name gets from uninitialized allocations."""
    source = (
        "import torch\n"
        "x = torch.zeros(2)\n"
        "made = [torch.empty(3), torch.empty_like(x), x.new_empty(4), torch.empty(2, dtype=int)]\n"
    )
    namespace = {"__name__": module}
    exec(source, namespace)
    return namespace["made"]


def test_poisoned_memory_is_nan_inside_the_package(poisoned_memory: Counter[str]) -> None:
    *floats, integers = allocate_as("affkd_kernels.kernels.example")
    assert all(x.isnan().all() for x in floats)
    assert (integers == torch.iinfo(torch.int64).min).all()
    assert poisoned_memory == {"empty": 2, "empty_like": 1, "new_empty": 1}


def test_poisoned_memory_leaves_others_alone(poisoned_memory: Counter[str]) -> None:
    allocate_as("affkd_kernels_of_another_name")
    allocate_as("elsewhere")
    assert not poisoned_memory


def test_covering_meets_every_pair_of_a_component_and_a_call() -> None:
    met = {
        (one.name, component) for triple, one in covering(valid_triples()) for component in triple
    }
    possible = {
        (one.name, component)
        for triple in valid_triples()
        for one in CALLS
        if one.allows(triple)
        for component in triple
    }
    missing = possible - met
    # scales go with a Gram affinity alone, and its triples are too few for all of them
    assert all(name.startswith("scales") for name, _ in missing)
    assert len(missing) <= 2


def test_every_call_allows_a_triple_and_is_what_it_says() -> None:
    for one in CALLS:
        assert any(one.allows(triple) for triple in base_triples()), one
        assert call(one.name) is one
    assert len({one.name for one in CALLS}) == len(CALLS)


def test_inputs_repeat() -> None:
    for one in CALLS:
        first, second, other = one.make(1), one.make(1), one.make(2)
        assert torch.equal(first.student, second.student)
        assert not torch.equal(first.student, other.student)


def test_numerical_gradient() -> None:
    x = torch.tensor([[1.0, 2.0]])
    gradient = differences.numerical_gradient(lambda x: float((x**3).sum()), x)
    np.testing.assert_allclose(gradient, [[3.0, 12.0]], rtol=1e-8)


@pytest.mark.parametrize(
    ("affinity", "normalization", "loss", "expected"),
    [
        # items 1 and 2: products 1, 2, 2, 4; the teacher's are all 4
        (part("gram"), part("none"), part("mse"), np.inf),
        (part("gram"), part("row_l1"), part("mse"), 1.0),
        (part("gram", clamp_min=1.25), part("none"), part("mse"), 0.25),
        # a tenth of the maximum is nearer than the second largest entry
        (part("gram"), part("max"), part("mse"), 0.4),
        # differences 3, 2, 2 over the largest P; 4 against 4 is left out
        (part("gram"), part("none"), part("l1"), 2.0 / 4.0),
        (part("gram"), part("none"), part("smooth_l1"), 1.0 / 4.0),
    ],
    ids=str,
)
def test_distance_to_kink(affinity: Part, normalization: Part, loss: Part, expected: float) -> None:
    student, teacher = torch.tensor([[1.0], [2.0]]), torch.full((2, 1), 2.0)
    distance = differences.distance_to_kink(student, teacher, affinity, normalization, loss)
    assert distance == pytest.approx(expected)


def test_a_constant_diagonal_is_at_no_kink_and_a_moving_maximum_is() -> None:
    inputs = pair(1, 4, 3)
    # 1 against 1 along the diagonal, for ever
    cosine = (part("cosine"), part("max", detach=True), part("l1"))
    assert differences.distance_to_kink(*inputs.features, *cosine) > 1e-6
    # the largest entry is 1 on both sides, and a detached maximum lets it move
    gram = (part("gram"), part("max", detach=True), part("l1"))
    same = differences.distance_to_kink(inputs.student, inputs.student, *gram)
    assert same < 1e-12
