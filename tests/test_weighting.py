"""suggest_weight: the ratio of gradient norms it promises, and the cases where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from affkd_kernels.weighting import suggest_weight


def norm_at(loss: torch.Tensor, at: list[torch.Tensor]) -> torch.Tensor:
    gradients = torch.autograd.grad(loss, at, retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in gradients]).norm()


@pytest.mark.parametrize("share", [1.0, 0.25])
@pytest.mark.parametrize("where", ["feature", "parameters"])
def test_weighted_gradients_have_the_share(share: float, where: str) -> None:
    torch.manual_seed(0)
    body, head = nn.Linear(4, 6), nn.Linear(6, 3)
    feature = body(torch.randn(8, 4))
    main = nn.functional.cross_entropy(head(feature), torch.arange(8) % 3)
    term = 1e-6 * (feature @ feature.T).square().mean()
    at = [feature] if where == "feature" else list(body.parameters())
    weight = suggest_weight(term, main, feature if where == "feature" else body.parameters(), share)
    ratio = norm_at(weight * term, at) / norm_at(main, at)
    torch.testing.assert_close(ratio, torch.tensor(share))

    (main + weight * term).backward()
    assert body.weight.grad is not None


def test_parameters_out_of_reach_or_frozen_are_passed_over() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    model[0].bias.requires_grad_(False)
    feature = model[0](torch.randn(8, 4))
    main, term = model[1](feature).square().sum(), feature.square().sum()
    weight = suggest_weight(term, main, model.parameters())
    at = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = norm_at(main, at) / norm_at(term, [model[0].weight])
    assert weight == pytest.approx(float(expected), rel=1e-5)


def test_half_gradients_do_not_overflow() -> None:
    x = torch.full((4,), 300.0, dtype=torch.float16, requires_grad=True)
    assert suggest_weight((x * 300).sum(), (x * 600).sum(), x) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (lambda x: (x - x).sum(), "term_loss must have a gradient.*exactly zero"),
        (lambda x: (x * 0).sqrt().sum(), "term_loss must have a finite gradient.*nan"),
        (lambda x: x.detach().sum(), "term_loss must have a graph"),
        (lambda x: x, r"term_loss must be a 0-dim tensor, got shape \[3\]"),
        (lambda x: torch.ones((), requires_grad=True) * 2, "term_loss must depend on"),
    ],
)
def test_gradients_that_cannot_be_compared(term, message: str) -> None:
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match=message):
        suggest_weight(term(x), x.square().sum(), x)


def test_main_loss_is_checked_too() -> None:
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="main_loss must have a gradient"):
        suggest_weight(x.sum(), (x - x).sum(), x)
    with pytest.raises(TypeError, match="main_loss must be a tensor, got float"):
        suggest_weight(x.sum(), 1.0, x)


@pytest.mark.parametrize("share", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_share(share: float) -> None:
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="share must be a positive number"):
        suggest_weight(x.sum(), x.sum(), x, share)


def test_nothing_to_compare_at() -> None:
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="at must hold a tensor that requires grad"):
        suggest_weight(x.sum(), x.sum(), x.detach())


def test_a_share_of_numpy_is_a_number_and_a_bool_is_none() -> None:
    x = torch.ones(3, requires_grad=True)
    weight = suggest_weight(x.sum(), x.sum(), x, np.float32(0.5))
    assert type(weight) is float and weight == pytest.approx(0.5)
    with pytest.raises(TypeError, match="share must be a positive number, got bool"):
        suggest_weight(x.sum(), x.sum(), x, True)
