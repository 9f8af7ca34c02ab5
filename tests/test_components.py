"""Components as data: shorthands, validation, registration."""

from __future__ import annotations

import dataclasses
import pickle
from typing import ClassVar

import pytest
import torch
from cases import AFFINITIES, LOSSES, NORMALIZATIONS
from torch import Tensor

import affkd_kernels as affkd
from affkd_kernels.components.base import parse_call

AXES = (
    (affkd.Affinity, AFFINITIES),
    (affkd.Normalization, NORMALIZATIONS),
    (affkd.Loss, LOSSES),
)


def test_every_component_survives_its_shorthand_and_pickle() -> None:
    for axis, parts in AXES:
        for part in parts:
            component = part.build()
            assert axis.resolve(str(component)) == component
            assert axis.resolve(part.shorthand) == component
            assert pickle.loads(pickle.dumps(component)) == component
            assert len({component, axis.resolve(part.shorthand)}) == 1


def test_components_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        affkd.RBF().gamma = 1.0  # type: ignore[misc]


def test_the_order_of_positional_options_is_the_documented_one() -> None:
    assert affkd.Gram(2.0).scale == 2.0
    assert affkd.Mean("all").over == "all"
    assert affkd.Max(True).detach is True
    assert affkd.Softmax(0.5).tau == 0.5
    assert affkd.RBF(0.7, False).unit is False


@pytest.mark.parametrize(
    "text, expected",
    [
        ("rbf", ("rbf", {})),
        (" rbf( gamma = 0.5 ) ", ("rbf", {"gamma": 0.5})),
        ("cosine(shifted=true, clamp_min=none)", ("cosine", {"shifted": True, "clamp_min": None})),
        ("softmax(axis=both)", ("softmax", {"axis": "both"})),
        ("gram(scale='1/D', clamp_min=-1)", ("gram", {"scale": "1/D", "clamp_min": -1})),
    ],
)
def test_shorthands(text: str, expected: tuple[str, dict[str, object]]) -> None:
    assert parse_call(text) == expected


@pytest.mark.parametrize(
    "text", ["", "rbf(", "rbf(0.5)", "rbf; kl", "rbf(gamma=__import__('os'))", "a.b", "rbf(**{})"]
)
def test_unreadable_shorthands(text: str) -> None:
    with pytest.raises((ValueError, TypeError)):
        affkd.Affinity.resolve(text)


def test_unknown_names_and_options_list_the_choices() -> None:
    with pytest.raises(ValueError, match="did you mean 'cosine'.*gram, cosine, sqeuclidean"):
        affkd.Affinity.resolve("cosin")
    with pytest.raises(TypeError, match="no option 'sigma'; valid options: clamp_min, gamma"):
        affkd.Affinity.resolve("rbf(sigma=1.0)")
    with pytest.raises(TypeError, match="valid names: none, row_l2"):
        affkd.Normalization.resolve(affkd.Gram())  # type: ignore[arg-type]


def test_every_axis_names_its_choices() -> None:
    names = "gram cosine sqeuclidean euclidean rbf polynomial"
    assert names.split() == [n for n, c in affkd.Affinity.choices.items() if c.builtin]
    names = "none row_l2 row_l1 row_sum softmax frobenius mean max"
    assert names.split() == [n for n, c in affkd.Normalization.choices.items() if c.builtin]
    names = "mse l1 smooth_l1 kl cross_entropy"
    assert names.split() == [n for n, c in affkd.Loss.choices.items() if c.builtin]


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """One's own component along each axis, as docs/extending.md shows."""
    for axis in (affkd.Affinity, affkd.Normalization, affkd.Loss):
        monkeypatch.setattr(axis, "choices", dict(axis.choices))

    @affkd.register_affinity
    @dataclasses.dataclass(frozen=True)
    class Laplacian(affkd.Affinity):
        name: ClassVar[str] = "laplacian"
        gamma: float = 1.0

        @property
        def nonnegative(self) -> bool:
            return True

        def matrix(self, queries: Tensor, keys: Tensor) -> Tensor:
            return torch.exp(-self.gamma * torch.cdist(queries, keys, p=1))

    @affkd.register_normalization
    @dataclasses.dataclass(frozen=True)
    class Trace(affkd.Normalization):
        name: ClassVar[str] = "trace"

        def normalize(self, affinity: Tensor, pairs: Tensor) -> Tensor:
            return affinity / affinity.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]

    @affkd.register_loss
    @dataclasses.dataclass(frozen=True)
    class Quartic(affkd.Loss):
        name: ClassVar[str] = "quartic"

        def pointwise(self, student: Tensor, teacher: Tensor) -> Tensor:
            return (student - teacher) ** 4


@pytest.mark.usefixtures("registered")
def test_registered_components_run_on_the_reference_path() -> None:
    student = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(5, 2, dtype=torch.float64)
    triple = ("laplacian(gamma=0.5)", "trace", "quartic")
    value = affkd.affinity_loss(student, teacher, *triple)

    def normalized(x: Tensor) -> Tensor:
        matrix = torch.exp(-0.5 * torch.cdist(x, x, p=1))
        return matrix / matrix.trace()

    expected = ((normalized(student) - normalized(teacher)) ** 4).mean()
    torch.testing.assert_close(value, expected)
    plan = affkd.explain_plan(student, teacher, *triple)
    assert plan.backend == "reference" and "'laplacian' is registered" in plan.reason
    with pytest.raises(RuntimeError, match="registered by the user"):
        affkd.affinity_loss(student, teacher, *triple, algorithm="factored")
    masked = affkd.affinity_loss(
        student, teacher, *triple, mask=torch.tensor([True, True, True, False, False])
    )
    torch.testing.assert_close(masked, affkd.affinity_loss(student[:3], teacher[:3], *triple))


@pytest.mark.usefixtures("registered")
def test_registration_refuses_what_cannot_work() -> None:
    with pytest.raises(ValueError, match="'laplacian' exists already"):
        affkd.register_affinity(affkd.Affinity.choices["laplacian"])
    with pytest.raises(TypeError, match="must subclass Loss"):
        affkd.register_loss(affkd.Gram)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="class attribute `name`"):
        affkd.register_loss(type("Nameless", (affkd.Loss,), {}))
    with pytest.raises(ValueError, match="compares distributions"):
        affkd.AffinityLoss("laplacian", "trace", "kl")
