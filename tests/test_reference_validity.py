"""What is refused, with which error, and that the text names the argument and what is valid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from case_inputs import features, pair
from cases import (
    AFFINITIES,
    INVALID_COMPONENTS,
    LOSSES,
    NORMALIZATIONS,
    Part,
    Triple,
    call,
    invalid_triples,
    valid_triples,
    why_invalid,
)

import affkd_kernels as affkd
from affkd_kernels import components, reference

X, Y = pair(1, 4, 3).features
EYE = torch.eye(4, dtype=torch.bool)
ONES = torch.ones(4, dtype=torch.float64)


def test_every_valid_triple_constructs(tally: Callable[..., None]) -> None:
    for triple in valid_triples():
        components.check_triple(*triple.build())
        affkd.AffinityLoss(*triple.build())
    tally("valid triples constructed", len(valid_triples()))


def test_every_invalid_triple_raises_at_construction(tally: Callable[..., None]) -> None:
    for triple in invalid_triples():
        at_fault = getattr(triple, why_invalid(triple))
        # the remedy: another normalization, or an affinity that is not negative
        pattern = rf"(?s){at_fault.name}.*(softmax|non-negative)"
        with pytest.raises(ValueError, match=pattern):
            affkd.AffinityLoss(*triple.build())
        with pytest.raises(ValueError, match=pattern):
            affkd.affinity_loss(X, Y, *triple.build())
    tally("invalid triples refused", len(invalid_triples()))


@pytest.mark.parametrize("part", INVALID_COMPONENTS, ids=str)
def test_invalid_options_raise_and_are_named(part: Part) -> None:
    option, value = part.options[0]
    with pytest.raises((TypeError, ValueError)) as caught:
        part.build()
    assert part.name in str(caught.value)
    assert option in str(caught.value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("part", [*AFFINITIES, *NORMALIZATIONS, *LOSSES], ids=str)
def test_shorthands_are_the_components(part: Part) -> None:
    bases = (components.Affinity, components.Normalization, components.Loss)
    base = next(base for base in bases if isinstance(part.build(), base))
    assert base.resolve(part.shorthand) == part.build()
    assert hash(base.resolve(part.shorthand)) == hash(part.build())


@pytest.mark.parametrize(
    ("argument", "name", "valid"),
    [
        ("affinity", "gramm", "gram"),
        ("normalization", "row_l3", "row_l2"),
        ("loss", "huber", "smooth_l1"),
    ],
)
def test_unknown_names(argument: str, name: str, valid: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s){argument}.*{name}.*{valid}"):
        affkd.affinity_loss(X, Y, **{argument: name})


@pytest.mark.parametrize(
    "shorthand", ["rbf(gamma=0.4", "rbf(0.4)", "rbf(sigma=1.0)", "rbf(gamma=open('x'))", "rbf;gram"]
)
def test_unreadable_shorthands(shorthand: str) -> None:
    with pytest.raises((TypeError, ValueError), match="rbf"):
        affkd.affinity_loss(X, Y, shorthand)


# what a call gets, the error, and pieces of its text: the argument, what came, what is valid
BAD_CALLS: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "reduction": ({"reduction": "avg"}, ValueError, ("reduction", "'avg'", "batchmean")),
    "items": ({"items": "pixel"}, ValueError, ("items", "'pixel'", "pixels")),
    "diagonal": ({"diagonal": "drop"}, ValueError, ("diagonal", "'drop'", "exclude")),
    "backend": ({"backend": "cuda"}, ValueError, ("backend", "'cuda'", "reference")),
    "algorithm": ({"algorithm": "fast"}, ValueError, ("algorithm", "'fast'", "tiled")),
    "weight": ({"weight": "3"}, TypeError, ("weight", "str", "float")),
    "weight-nan": ({"weight": float("nan")}, ValueError, ("weight", "nan", "finite")),
    "no-tensor": ({"student": [[1.0]]}, TypeError, ("student", "list", "Tensor")),
    "integers": ({"student": torch.ones(4, 3).long()}, TypeError, ("student", "int64", "float32")),
    "complex": (
        {"teacher": torch.ones(4, 3, dtype=torch.complex64)},
        TypeError,
        ("teacher", "complex64", "float32"),
    ),
    "rank": ({"student": torch.tensor(1.0)}, ValueError, ("student", "[]", "[B, ...]")),
    "tokens-rank": ({"student": ONES, "items": "tokens"}, ValueError, ("student", "[4]", "L, D")),
    "pixels-rank": ({"items": "pixels"}, ValueError, ("student", "[4, 3]", "[N, C, H, W]")),
    "other-batch": ({"teacher": Y[:3]}, ValueError, ("teacher", "[4]", "[3]")),
    "one-bank": ({"student_keys": X}, ValueError, ("teacher_keys", "student_keys")),
    "key-length": (
        {"student_keys": features(2, 5, 2), "teacher_keys": features(3, 5, 3)},
        ValueError,
        ("student_keys", "[5, 2]", "3"),
    ),
    "key-count": (
        {"student_keys": features(2, 5, 3), "teacher_keys": features(3, 6, 3)},
        ValueError,
        ("teacher_keys", "[5]", "[6]"),
    ),
    "mask-shape": ({"mask": EYE[0, :3]}, ValueError, ("mask", "[3]", "[4]")),
    "mask-dtype": ({"mask": ONES}, TypeError, ("mask", "float64", "bool")),
    "key-mask-alone": ({"key_mask": EYE[0]}, ValueError, ("key_mask", "student_keys")),
    "pair-mask-shape": ({"pair_mask": EYE[:2]}, ValueError, ("pair_mask", "[2, 4]", "[4, 4]")),
    "row-weight-shape": ({"row_weight": ONES[:3]}, ValueError, ("row_weight", "[3]", "[4]")),
    "row-weight-dtype": ({"row_weight": EYE[0]}, TypeError, ("row_weight", "bool", "float")),
    "scale-affinity": (
        {"affinity": "cosine", "student_scale": ONES[0]},
        ValueError,
        ("student_scale", "cosine", "gram"),
    ),
    "scale-shape": ({"student_scale": ONES}, ValueError, ("student_scale", "[4]", "0-dim")),
    "no-diagonal": (
        {"student_keys": X, "teacher_keys": Y, "diagonal": "zero"},
        ValueError,
        ("diagonal", "'zero'", "diagonal_offset", "keep"),
    ),
    "center-exclude": (
        {"normalization": "frobenius(center=True)", "diagonal": "exclude"},
        ValueError,
        ("diagonal", "exclude", "center", "zero"),
    ),
    "center-pair-mask": (
        {"normalization": "frobenius(center=True)", "pair_mask": EYE},
        ValueError,
        ("pair_mask", "center"),
    ),
    "column-exclude": (
        {"normalization": "softmax(axis=column)", "diagonal": "exclude"},
        ValueError,
        ("diagonal", "exclude", "column", "zero"),
    ),
    "column-pair-mask": (
        {"normalization": "softmax(axis=column)", "pair_mask": EYE},
        ValueError,
        ("pair_mask", "column"),
    ),
    "both-pair-mask": (
        {"normalization": "softmax(axis=both)", "pair_mask": EYE},
        ValueError,
        ("pair_mask", "both"),
    ),
    "both-row-weight": (
        {"normalization": "softmax(axis=both)", "row_weight": ONES},
        ValueError,
        ("row_weight", "both", "row", "column"),
    ),
    "both-none": (
        {"normalization": "softmax(axis=both)", "reduction": "none"},
        ValueError,
        ("none", "both", "row", "column"),
    ),
    "other-device": (
        {"teacher": torch.ones(4, 3, device="meta")},
        ValueError,
        ("teacher", "meta", "cpu"),
    ),
    "mask-device": (
        {"mask": torch.ones(4, dtype=torch.bool, device="meta")},
        ValueError,
        ("mask", "meta", "cpu"),
    ),
}


@pytest.mark.parametrize("face", [affkd.affinity_loss, reference.affinity_loss])
@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(name: str, face: Callable[..., torch.Tensor]) -> None:
    arguments, error, pieces = BAD_CALLS[name]
    with pytest.raises(error) as caught:
        face(**{"student": X, "teacher": Y, **arguments})
    for piece in pieces:
        assert piece in str(caught.value)


STATIC = ("reduction", "items", "diagonal", "backend", "algorithm", "weight", "center-exclude")


@pytest.mark.parametrize("name", [*STATIC, "column-exclude", "both-none"])
def test_what_does_not_depend_on_the_call_raises_at_construction(name: str) -> None:
    arguments, error, pieces = BAD_CALLS[name]
    with pytest.raises(error) as caught:
        affkd.AffinityLoss(**{"affinity": "gram", "normalization": "none", **arguments})
    for piece in pieces:
        assert piece in str(caught.value)


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="maskk"):
        affkd.affinity_loss(X, Y, maskk=EYE[0])
    with pytest.raises(TypeError, match="maskk"):
        reference.affinity_loss(X, Y, maskk=EYE[0])


def test_a_shape_error_of_tokens_names_the_sequence_lengths() -> None:
    inputs = call("tokens").make(1)
    with pytest.raises(ValueError, match=r"(?s)teacher.*\[2, 5\].*\[2, 4\]"):
        affkd.affinity_loss(inputs.student, inputs.teacher[:, :4], items="tokens")


def test_the_enumeration_is_complete() -> None:
    total = len(AFFINITIES) * len(NORMALIZATIONS) * len(LOSSES)
    valid, invalid = set(valid_triples()), set(invalid_triples())
    assert len(valid) + len(invalid) == total
    assert not valid & invalid
    assert len({str(triple) for triple in valid}) == len(valid)
    assert all(isinstance(triple, Triple) for triple in valid)


def test_nonnegativity_is_what_the_contract_lists() -> None:
    from cases import is_nonnegative

    for part in AFFINITIES:
        assert part.build().nonnegative == is_nonnegative(part), str(part)
