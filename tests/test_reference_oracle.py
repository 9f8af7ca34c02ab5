"""The reference against the oracle: two readings of the contract, one number."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import oracle
import pytest
import torch
from case_inputs import seed_of
from cases import CALLS, Call, Triple, base_triples, covering, valid_triples

from affkd_kernels import reference

COVERED: dict[Triple, list[Call]] = defaultdict(list)
for _triple, _call in covering(valid_triples()):
    COVERED[_triple].append(_call)


def assert_agrees(triple: Triple, call: Call) -> None:
    inputs = call.make(seed_of(triple, call))
    expected = oracle.affinity_loss(*inputs.features, *triple, **inputs.options)
    actual = reference.affinity_loss(*inputs.features, *triple.build(), **inputs.options)
    torch.testing.assert_close(
        actual,
        torch.as_tensor(expected, dtype=torch.float64),
        rtol=1e-9,
        atol=1e-12,
        msg=lambda text: f"{triple} called as {call}: {text}",
    )


@pytest.mark.parametrize("triple", COVERED, ids=str)
def test_every_triple(triple: Triple, tally: Callable[..., None]) -> None:
    for call in COVERED[triple]:
        assert_agrees(triple, call)
    tally("triples compared with the oracle")


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_every_call(call: Call, tally: Callable[..., None]) -> None:
    triples = [triple for triple in base_triples() if call.allows(triple)]
    for triple in triples:
        assert_agrees(triple, call)
    tally("pairs of (bare triple, call) compared with the oracle", len(triples))


def test_every_triple_is_covered() -> None:
    assert set(COVERED) == set(valid_triples())
