"""What there is to test: triples (from `triples.py`) and calls. Data only, no test.

A `Call` says how the loss is called (shapes, masks, diagonal, reduction) and makes float64 `Inputs`
from a seed:

    for triple, call in covering(valid_triples()):
        inputs = call.make(seed)
        affkd_kernels.affinity_loss(*inputs.features, *triple.build(), **inputs.options)

Inputs that must not surprise (section 6 of the contract) are in `edges.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from case_inputs import Inputs, bank, mask, own_keys, pair, weights
from triples import (
    AFFINITIES,
    INVALID_COMPONENTS,
    LOSSES,
    NORMALIZATIONS,
    Part,
    Triple,
    base_triples,
    invalid_triples,
    is_nonnegative,
    part,
    valid_triples,
    why_invalid,
)

__all__ = [
    "AFFINITIES",
    "CALLS",
    "INVALID_COMPONENTS",
    "LOSSES",
    "NORMALIZATIONS",
    "Call",
    "Part",
    "Triple",
    "base_triples",
    "call",
    "covering",
    "invalid_triples",
    "is_nonnegative",
    "part",
    "valid_triples",
    "why_invalid",
]


@dataclass(frozen=True)
class Call:
    """A named way to call the loss."""

    name: str
    make: Callable[[int], Inputs]

    def __str__(self) -> str:
        return self.name

    def allows(self, triple: Triple) -> bool:
        """Whether the contract lets this call carry this triple."""
        options = _options_of(self)
        sparse = "pair_mask" in options or options.get("diagonal") == "exclude"
        if sparse and triple.forbids_sparse_pairs:
            return False
        per_row = "row_weight" in options or options.get("reduction") == "none"
        if per_row and triple.axis == "both":
            return False
        # per-row weights are per key there
        if "row_weight" in options and "student_keys" in options and triple.axis == "column":
            return False
        return triple.affinity.name == "gram" or "student_scale" not in options


@cache
def _options_of(one: Call) -> dict[str, Any]:
    return one.make(0).options


def _padded(seed: int, **options: Any) -> Inputs:
    """Three sequences of different lengths, one of them empty."""
    lengths = torch.tensor([4, 0, 3])
    valid = torch.arange(5) < lengths[:, None]
    return pair(seed, 3, 5, 3, teacher_dim=4, items="tokens", mask=valid, **options)


def _scales(seed: int, **options: Any) -> Inputs:
    scales = {
        "student_scale": torch.tensor(0.4, dtype=torch.float64),
        "teacher_scale": torch.tensor(0.9, dtype=torch.float64),
    }
    return bank(seed, 5, 4, keys=5, teacher_dim=3, **scales, **options)


CALLS = (
    Call("self", lambda s: pair(s, 6, 4, teacher_dim=5)),
    Call("self-sum", lambda s: pair(s, 5, 3, reduction="sum", weight=0.3)),
    Call("self-batchmean", lambda s: pair(s, 5, 4, teacher_dim=2, reduction="batchmean")),
    Call("self-matrixmean", lambda s: pair(s, 5, 4, reduction="matrixmean", weight=2.0)),
    Call("self-none", lambda s: pair(s, 5, 4, reduction="none", weight=2.0)),
    Call("images", lambda s: pair(s, 4, 2, 2, 3)),
    Call("one-matrix-of-tokens", lambda s: pair(s, 5, 3, items="tokens")),
    Call("tokens", lambda s: pair(s, 2, 5, 3, teacher_dim=4, items="tokens")),
    Call(
        "heads-batchmean",
        lambda s: pair(s, 2, 2, 4, 3, items="tokens", reduction="batchmean"),
    ),
    Call("tokens-none", lambda s: pair(s, 2, 4, 3, items="tokens", reduction="none")),
    Call(
        "pixels-matrixmean",
        lambda s: pair(s, 2, 3, 2, 3, items="pixels", reduction="matrixmean"),
    ),
    Call(
        "channels-batchmean",
        lambda s: pair(s, 2, 4, 2, 2, items="channels", reduction="batchmean"),
    ),
    Call("mask", lambda s: pair(s, 6, 4, teacher_dim=3, mask=mask(s, 6))),
    Call(
        "mask-none-zero",
        lambda s: pair(s, 6, 4, mask=mask(s, 6), reduction="none", diagonal="zero"),
    ),
    Call("padded", lambda s: _padded(s)),
    Call("padded-batchmean", lambda s: _padded(s, reduction="batchmean")),
    Call(
        "padded-matrixmean-exclude",
        lambda s: _padded(s, reduction="matrixmean", diagonal="exclude"),
    ),
    Call("row-weight", lambda s: pair(s, 6, 4, row_weight=weights(s, 6))),
    Call(
        "row-weight-mask-batchmean",
        lambda s: pair(s, 6, 4, row_weight=weights(s, 6), mask=mask(s, 6), reduction="batchmean"),
    ),
    Call("diagonal-zero", lambda s: pair(s, 6, 4, diagonal="zero")),
    Call("diagonal-exclude", lambda s: pair(s, 6, 4, teacher_dim=3, diagonal="exclude")),
    Call(
        "pair-mask",
        lambda s: pair(s, 6, 4, pair_mask=mask(s, 6, 6, keep=0.5), reduction="batchmean"),
    ),
    Call(
        "pair-mask-exclude-mask-tokens",
        lambda s: pair(
            s, 2, 5, 3, items="tokens", pair_mask=mask(s, 2, 5, 5, keep=0.5), mask=mask(s, 2, 5),
            diagonal="exclude",
        ),
    ),
    Call("cross", lambda s: bank(s, 5, 4, keys=7, teacher_dim=3)),
    Call(
        "cross-tall-batchmean",
        lambda s: bank(s, 6, 3, keys=4, teacher_dim=5, reduction="batchmean"),
    ),
    Call(
        "cross-masks-none",
        lambda s: bank(
            s, 5, 4, keys=6, teacher_dim=3, mask=mask(s, 5), key_mask=mask(s + 1, 6),
            reduction="none",
        ),
    ),
    Call(
        "cross-masks-batchmean",
        lambda s: bank(
            s, 5, 4, keys=6, teacher_dim=3, mask=mask(s, 5), key_mask=mask(s + 1, 6),
            reduction="batchmean",
        ),
    ),
    Call(
        "cross-pair-mask",
        lambda s: bank(s, 5, 4, keys=6, teacher_dim=3, pair_mask=mask(s, 5, 6, keep=0.4)),
    ),
    Call(
        "cross-row-weight",
        lambda s: bank(s, 5, 4, keys=6, teacher_dim=3, row_weight=weights(s, 5)),
    ),
    Call(
        "cross-tokens",
        lambda s: bank(
            s, 2, 4, 3, keys=5, teacher_dim=2, items="tokens", key_mask=mask(s, 2, 5),
            reduction="batchmean",
        ),
    ),
    Call("gathered-keep", lambda s: own_keys(bank(s, 4, 3, keys=7, teacher_dim=4), 2)),
    Call(
        "gathered-zero",
        lambda s: own_keys(bank(s, 4, 3, keys=7, teacher_dim=4, diagonal="zero"), 2),
    ),
    Call(
        "gathered-exclude",
        lambda s: own_keys(bank(s, 4, 3, keys=6, teacher_dim=4, diagonal="exclude"), 1),
    ),
    Call("scales", _scales),
    Call("scales-batchmean", lambda s: _scales(s, reduction="batchmean")),
)  # fmt: skip


def call(name: str) -> Call:
    return next(one for one in CALLS if one.name == name)


def covering(triples: Iterable[Triple], calls_each: int = 4) -> list[tuple[Triple, Call]]:
    """Triples with calls, so that every call meets every variant of every component it may.

    A greedy pairwise covering: each triple takes the `calls_each` calls that its components have
    met least so far, and the order of `CALLS`, rotated, settles a tie. The same on every run.
    """
    met: Counter[tuple[str, Part]] = Counter()
    chosen: list[tuple[Triple, Call]] = []
    for number, triple in enumerate(triples):
        rotated = [CALLS[(number + i) % len(CALLS)] for i in range(len(CALLS))]
        usable = [one for one in rotated if one.allows(triple)]

        def familiarity(one: Call, triple: Triple = triple) -> tuple[int, int]:
            counts = [met[one.name, component] for component in triple]
            return min(counts), sum(counts)

        for one in sorted(usable, key=familiarity)[:calls_each]:
            chosen.append((triple, one))
            met.update((one.name, component) for component in triple)
    return chosen
