"""The public functions and modules: error texts, plans, defaults."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.nn.modules.loss import _Loss

import affkd_kernels as affkd
from affkd_kernels.kernels import cpu

X = torch.randn(6, 4)
LONG = torch.ones(6, dtype=torch.long)
MAPS = torch.randn(2, 3, 4, 5)
META = torch.empty(6, 4, device="meta")


@pytest.mark.parametrize(
    "error, match, call",
    [
        (TypeError, "student must be a torch.Tensor, got list", lambda: _loss([1.0], X)),
        (TypeError, "teacher must be float16.*got torch.int64", lambda: _loss(X, X.long())),
        (TypeError, "student must be float16.*complex64", lambda: _loss(X.to(torch.cfloat), X)),
        (ValueError, r"items \[6\] and \[5\]", lambda: _loss(X, X[:5])),
        (ValueError, r"student must have shape \[B, ...\]", lambda: _loss(X[0, 0], X)),
        (ValueError, r"\[N, C, H, W\] for items='pixels'", lambda: _loss(X, X, items="pixels")),
        (ValueError, "items must be one of 'samples'", lambda: _loss(X, X, items="rows")),
        (ValueError, "reduction must be one of", lambda: _loss(X, X, reduction="average")),
        (ValueError, "backend must be one of", lambda: _loss(X, X, backend="cuda")),
        (ValueError, "algorithm must be one of", lambda: _loss(X, X, algorithm="fast")),
        (ValueError, "unknown affinity 'gramm'", lambda: _loss(X, X, affinity="gramm")),
        (ValueError, "needs a non-negative", lambda: _loss(X, X, normalization="row_sum")),
        (ValueError, "valid: cosine.shifted", lambda: _loss(X, X, "gram", "mean(over=all)")),
        (ValueError, "needs normalization 'softmax'", lambda: _loss(X, X, loss="cross_entropy")),
        (ValueError, "compares distributions", lambda: _loss(X, X, loss="kl")),
        (TypeError, "weight must be a float", lambda: _loss(X, X, weight="3")),
        (ValueError, "weight must be finite", lambda: _loss(X, X, weight=float("nan"))),
        (TypeError, r"mask must be a bool.*int64; try .bool", lambda: _loss(X, X, mask=LONG)),
        (ValueError, r"mask must have shape \[6\]", lambda: _loss(X, X, mask=torch.ones(5).bool())),
        (ValueError, "key_mask needs student_keys", lambda: _loss(X, X, key_mask=X[:, 0] > 0)),
        (ValueError, "got no teacher_keys", lambda: _loss(X, X, student_keys=X)),
        (ValueError, r"\['K', 4\]", lambda: _loss(X, X, student_keys=X[:, :3], teacher_keys=X)),
        (ValueError, r"items \[6\] and \[5\]", lambda: _keys(teacher_keys=X[:5])),
        (ValueError, "needs diagonal_offset", lambda: _keys(diagonal="zero")),
        (ValueError, "diagonal_offset goes with keys", lambda: _loss(X, X, diagonal_offset=2)),
        (ValueError, "cannot go with softmax", lambda: _both(diagonal="exclude")),
        (ValueError, "pair_mask cannot go", lambda: _both(pair_mask=torch.ones(6, 6).bool())),
        (ValueError, "row_weight cannot go", lambda: _both(row_weight=torch.ones(6))),
        (ValueError, "reduction='none' needs axis", lambda: _both(reduction="none")),
        (TypeError, "row_weight must be a floating", lambda: _loss(X, X, row_weight=[1.0])),
        (ValueError, "affinity 'gram' only", lambda: _loss(X, X, "rbf", student_scale=1.0)),
        (ValueError, "0-dim floating tensor", lambda: _loss(X, X, student_scale=torch.ones(1))),
        (ValueError, "backend='reference' is dense", lambda: _reference("factored")),
        (RuntimeError, "triton.*not usable here", lambda: _loss(META, META, backend="triton")),
        (TypeError, "process_group must be a torch", lambda: _loss(X, X, process_group=object())),
        (TypeError, "unknown option 'weigth'; valid options", lambda: _loss_of(weigth=2.0)),
    ],
)  # fmt: skip
def test_errors_name_the_argument_and_what_is_valid(error: Any, match: str, call: Any) -> None:
    with pytest.raises(error, match=match):
        call()


def _loss(*args: Any, **options: Any) -> torch.Tensor:
    return affkd.affinity_loss(*args, **options)


def _loss_of(**options: Any) -> affkd.AffinityLoss:
    return affkd.AffinityLoss("gram", "row_l2", "mse", **options)


def _keys(**options: Any) -> torch.Tensor:
    return _loss(X, X, **{"student_keys": X, "teacher_keys": X, **options})


def _both(**options: Any) -> torch.Tensor:
    return _loss(X, X, "gram", "softmax(axis=both)", "kl", **options)


def _reference(algorithm: str) -> torch.Tensor:
    return _loss(X, X, backend="reference", algorithm=algorithm)


def test_devices_must_agree() -> None:
    with pytest.raises(ValueError, match="teacher must be on the student's device meta, got cpu"):
        affkd.affinity_loss(X.to("meta"), X)


def test_the_module_is_a_torch_loss_without_state() -> None:
    loss = affkd.AffinityLoss("gram", "row_l2", "mse", reduction="batchmean", weight=3.0)
    assert isinstance(loss, _Loss)
    assert not loss.state_dict() and not list(loss.parameters())
    assert repr(loss) == "AffinityLoss(gram, row_l2, mse, reduction='batchmean', weight=3.0)"
    expected = affkd.affinity_loss(
        X, 2 * X + 1, "gram", "row_l2", "mse", reduction="batchmean", weight=3.0
    )
    assert torch.equal(loss(X, 2 * X + 1), expected)


def test_the_reference_has_the_same_signature() -> None:
    options: dict[str, Any] = {
        "mask": torch.tensor([True] * 4 + [False] * 2),
        "reduction": "none",
        "weight": 0.5,
        "row_weight": torch.rand(6),
        "diagonal": "exclude",
    }
    args = (X, X + 1, "rbf(gamma=0.2)", "row_l1", "smooth_l1")
    value = affkd.reference.affinity_loss(*args, **options)
    assert torch.equal(value, affkd.affinity_loss(*args, **options, backend="reference"))


@pytest.mark.parametrize(
    "items, shape", [("samples", (2, 2)), ("tokens", (2, 3, 4, 4)), ("pixels", (2, 20, 20)),
                     ("channels", (2, 3, 3))],
)  # fmt: skip
def test_affinity_matrix_of_every_layout(items: str, shape: tuple[int, ...]) -> None:
    assert affkd.affinity_matrix(MAPS, "cosine", items=items).shape == shape


def test_affinity_matrix_is_normalized_and_differentiable() -> None:
    x = X.clone().requires_grad_()
    matrix = affkd.affinity_matrix(x, "cosine(shifted=True)", "row_sum")
    torch.testing.assert_close(matrix.sum(1), torch.ones(6))
    assert torch.autograd.grad(matrix[0, 1], x)[0].abs().sum() > 0


def test_a_number_as_scale_is_the_0_dim_tensor() -> None:
    number = affkd.affinity_loss(X, X + 1, "gram", student_scale=0.3, teacher_scale=2)
    tensor = affkd.affinity_loss(
        X, X + 1, "gram", student_scale=torch.tensor(0.3), teacher_scale=torch.tensor(2.0)
    )
    torch.testing.assert_close(number, tensor)


def test_masks_broadcast_where_a_size_is_one() -> None:
    tokens = torch.randn(2, 3, 5, 4)
    valid = torch.rand(2, 1, 5) > 0.3
    value = affkd.affinity_loss(tokens, tokens + 1, items="tokens", mask=valid)
    full = affkd.affinity_loss(tokens, tokens + 1, items="tokens", mask=valid.expand(2, 3, 5))
    assert torch.equal(value, full)


def test_a_known_plan_hides_no_wrong_layout() -> None:
    affkd.affinity_loss(X, X + 1)
    for name, features in (("student", (X.to_sparse(), X)), ("teacher", (X, X.to_sparse()))):
        with pytest.raises(TypeError, match=rf"{name} must be a dense \(strided\) tensor"):
            affkd.affinity_loss(*features)


def test_plans_follow_the_metadata() -> None:
    tall, wide = torch.randn(2000, 16), torch.randn(32, 512)
    plan = affkd.explain_plan(tall, tall, "gram", "row_l2", "mse")
    assert (plan.backend, plan.algorithm) == ("torch", "factored")
    assert affkd.explain_plan(wide, wide, "gram", "row_l2", "mse").algorithm != "factored"
    assert affkd.explain_plan(tall, tall, "rbf", "row_l2", "mse").algorithm != "factored"
    both = affkd.explain_plan(tall, tall, detach_teacher=False)
    assert both.backend == "reference" and "detach_teacher=False" in both.reason
    assert str(both).startswith("reference/dense: ")


@pytest.mark.skipif(not cpu.available()[0], reason=cpu.available()[1])
def test_matrices_of_short_features_are_kept_up_to_a_smaller_size() -> None:
    def algorithm(items: int, length: int, **options: int) -> str:
        # of metadata alone: nothing is allocated
        x = torch.empty(1).expand(items, length)
        return affkd.explain_plan(x, x, "rbf", "frobenius", "mse", **options).algorithm

    assert algorithm(1800, 128) == algorithm(2800, 129) == "dense"
    assert algorithm(2000, 128) == algorithm(3000, 129) == "tiled"
    assert algorithm(2000, 128, max_workspace_bytes=1 << 30) == "dense"


def test_a_row_weight_that_requires_grad_gets_one() -> None:
    weight = torch.rand(6, requires_grad=True)
    affkd.affinity_loss(X, X + 1, "gram", "row_l2", "mse", row_weight=weight).backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0


def test_the_import_is_light() -> None:
    """No compiler, no triton, no torchvision, no NumPy of our own, no extension."""
    code = (
        "import torch, sys; before = set(sys.modules); import affkd_kernels;"
        "new = set(sys.modules) - before;"
        "heavy = {'triton', 'torchvision', 'torch._dynamo', 'torch._inductor', 'rich', 'yaml'};"
        "print(sorted(heavy & new))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
