"""MultiLoss: the sum, the named terms, and errors that name the term or the feature."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from affkd_kernels.features import FeatureCapture
from affkd_kernels.multi import MultiLoss, Term, non_finite_terms


class Offset(nn.Module):
    """A loss with a per-call option and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, student: torch.Tensor, teacher: torch.Tensor, offset: float = 0.0):
        return self.scale * (student - teacher + offset).square().mean()


@pytest.fixture
def features() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    student = {name: torch.randn(4, 3, generator=generator) for name in ("map", "pooled")}
    teacher = {name: torch.randn(4, 3, generator=generator) for name in ("map", "pooled")}
    for feature in student.values():
        feature.requires_grad_()
    return student, teacher


def test_total_is_the_sum_of_the_weighted_terms(features) -> None:
    student, teacher = features
    losses = MultiLoss(
        {"l2": (nn.MSELoss(), "map", "map"), "l1": Term(nn.L1Loss(), "pooled", "map", weight=5.0)}
    )
    total, terms = losses(student, teacher)
    first = nn.functional.mse_loss(student["map"], teacher["map"])
    second = 5.0 * nn.functional.l1_loss(student["pooled"], teacher["map"])
    torch.testing.assert_close(total, first + second)
    torch.testing.assert_close(terms, {"l2": first.detach(), "l1": second.detach()})
    assert not any(term.requires_grad for term in terms.values())

    inputs = list(student.values())
    actual = torch.autograd.grad(total, inputs)
    torch.testing.assert_close(actual, torch.autograd.grad(first + second, inputs))


def test_options_reach_their_term_alone(features) -> None:
    student, teacher = features
    losses = MultiLoss({"a": (Offset(), "map", "map"), "b": (Offset(), "map", "map")})
    _, terms = losses(student, teacher, {"b": {"offset": 2.0}})
    _, plain = losses(student, teacher)
    assert terms["a"] == plain["a"] and terms["b"] != plain["b"]


def test_parameters_of_the_terms_are_parameters_and_survive_a_copy(features) -> None:
    student, teacher = features
    losses = MultiLoss({"training": (Offset(), "map", "map"), "l2": (nn.MSELoss(), "map", "map")})
    assert [name for name, _ in losses.named_parameters()] == ["term_training.scale"]
    twin = copy.deepcopy(losses)
    with torch.no_grad():
        next(twin.parameters()).fill_(0.0)
    assert twin(student, teacher)[1]["training"] == 0
    assert losses(student, teacher)[1]["training"] != 0


def test_it_takes_captures(features) -> None:
    student, teacher = nn.Sequential(nn.Linear(3, 2)), nn.Sequential(nn.Linear(3, 2))
    x = torch.randn(4, 3)
    losses = MultiLoss({"l2": (nn.MSELoss(), "0", "0")})
    with FeatureCapture(student, ["0"]) as s, FeatureCapture(teacher, ["0"]) as t:
        difference = student(x) - teacher(x).detach()
        total, _ = losses(s, t)
    torch.testing.assert_close(total, difference.square().mean())


def test_no_terms_give_zero() -> None:
    total, terms = MultiLoss({})({}, {})
    assert total == 0 and terms == {}


def test_non_finite_terms_are_named() -> None:
    terms = {"good": torch.tensor(1.0), "nan": torch.tensor(torch.nan), "inf": -1 / torch.zeros(())}
    assert non_finite_terms(terms) == ["nan", "inf"]
    assert non_finite_terms({"good": torch.tensor(1.0)}) == non_finite_terms({}) == []


@pytest.mark.parametrize(
    ("terms", "error", "message"),
    [
        ({"a.b": (nn.MSELoss(), "x", "y")}, ValueError, "without a dot, got 'a.b'"),
        ({"a": nn.MSELoss()}, TypeError, r"terms\['a'\] must be \(loss, student name"),
        ({"a": (nn.MSELoss(), "x")}, TypeError, r"terms\['a'\] must be"),
        ({"a": (lambda s, t: 0, "x", "y")}, TypeError, "must be a torch.nn.Module, got function"),
    ],
)
def test_bad_terms(terms: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        MultiLoss(terms)


def test_bad_calls_name_the_term_and_the_feature(features) -> None:
    student, teacher = features
    with pytest.raises(ValueError, match="student has no feature 'mapp', which term 'a'.*map"):
        MultiLoss({"a": (nn.MSELoss(), "mapp", "map")})(student, teacher)
    with pytest.raises(ValueError, match="teacher has no feature 'x', .*known: map, pooled"):
        MultiLoss({"a": (nn.MSELoss(), "map", "x")})(student, teacher)
    with pytest.raises(ValueError, match="options must name terms, got 'b'; known: a"):
        MultiLoss({"a": (nn.MSELoss(), "map", "map")})(student, teacher, {"b": {}})
    with pytest.raises(ValueError, match=r"term 'a' must return a scalar, got shape \[4, 3\]"):
        MultiLoss({"a": (nn.MSELoss(reduction="none"), "map", "map")})(student, teacher)


@pytest.mark.parametrize(
    ("weight", "error"),
    [("3", TypeError), (True, TypeError), (None, TypeError), (float("nan"), ValueError)],
)
def test_a_weight_that_is_no_finite_number_is_refused(weight, error) -> None:
    with pytest.raises(error, match=r"terms\['a'\]: weight must be"):
        MultiLoss({"a": (Offset(), "map", "map", weight)})


def test_a_list_of_features_is_refused_with_where_it_comes_from(features) -> None:
    student, teacher = features
    losses = MultiLoss({"a": (Offset(), "map", "map")})
    with pytest.raises(TypeError, match="student's feature 'map'.*got a list.*repeated='all'"):
        losses({"map": [student["map"]]}, teacher)
