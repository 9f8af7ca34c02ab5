"""The registered ops, and the losses under torch.compile, torch.func and autocast."""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from case_inputs import Inputs, bank, mask, pair, weights
from cases import valid_triples
from torch._dynamo.testing import CompileCounter
from torch.library import opcheck

import affkd_kernels as affkd
from affkd_kernels.inputs import canonical_inputs
from affkd_kernels.kernels import factored
from affkd_kernels.spec import LossSpec, decode, make_spec

CALLS: dict[str, Any] = {
    "self": lambda: pair(1, 9, 5, teacher_dim=7),
    "cross-scale": lambda: bank(
        2, 6, 5, keys=9, teacher_dim=4, student_scale=torch.tensor(0.7, dtype=torch.float64)
    ),
    "masked-tokens": lambda: pair(
        3, 2, 6, 4, items="tokens", mask=mask(3, 2, 6), row_weight=weights(3, 2, 6)
    ),
}


def op_arguments(name: str, dtype: torch.dtype, grad: bool) -> tuple[LossSpec, tuple[Any, ...]]:
    inputs = CALLS[name]().to(dtype)
    static = {k: v for k, v in inputs.options.items() if k == "items"}
    per_call = {k: v for k, v in inputs.options.items() if k not in static}
    spec = make_spec("gram", "row_l2", "mse", **static)
    canonical, _ = canonical_inputs(spec, *inputs.features, **per_call)
    leaves = ("student", "student_keys", "student_scale")
    changed = {
        field: value.detach().clone().requires_grad_(grad and field in leaves)
        for field, value in canonical._asdict().items()
        if value is not None and value.is_floating_point()
    }
    return spec, tuple(canonical._replace(**changed))


@pytest.mark.parametrize("grad", [False, True], ids=["constant", "requires-grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str, dtype: torch.dtype, grad: bool) -> None:
    spec, tensors = op_arguments(name, dtype, grad)
    needs = [grad, grad and tensors[2] is not None, grad and tensors[8] is not None]
    constants = (spec.encode(), "torch", "factored")
    opcheck(torch.ops.affkd_kernels.loss_and_grad, (*tensors, *constants, needs))
    opcheck(torch.ops.affkd_kernels.row_losses, (*tensors, *constants))


def test_specs_survive_their_text() -> None:
    for triple in valid_triples():
        spec = make_spec(*triple.build(), weight=0.1, diagonal="zero", reduction="batchmean")
        assert decode(spec.encode()) == spec


TRIPLES = {
    "factored": ("gram", "row_l2", "mse"),
    "pairs": ("rbf(gamma=0.3)", "frobenius", "mse"),
    "angles": ("euclidean", "mean", "smooth_l1"),
    "softmax": ("cosine", "softmax(axis=column)", "kl"),
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("triple", TRIPLES.values(), ids=TRIPLES)
def test_one_graph_serves_all_batch_sizes(triple: tuple[str, str, str], reduction: str) -> None:
    """Marked dynamic: one graph. Unmarked, the first size gets a static graph of its own."""
    for dynamic, graphs in ((True, 1), (None, 2)):
        torch._dynamo.reset()
        counter = CompileCounter()
        loss = affkd.AffinityLoss(*triple, reduction=reduction)
        compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend=counter)
        for batch in (64, 80, 96, 100, 128):
            student = torch.randn(batch, 8, requires_grad=True)
            teacher = torch.randn(batch, 12)
            value = compiled(student, teacher)
            expected = loss(student, teacher)
            torch.testing.assert_close(value, expected)
            (gradient,) = torch.autograd.grad(value.sum(), student)
            torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), student)[0])
        assert counter.frame_count == graphs, f"dynamic={dynamic}"


def test_the_functional_face_compiles_with_shorthands_and_components() -> None:
    student, teacher = pair(5, 40, 6, teacher_dim=4).features

    def step(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        one = affkd.affinity_loss(student, teacher, "gram", affkd.RowL2(), "mse", weight=2.0)
        other = affkd.affinity_loss(student, teacher, "rbf(gamma=0.2)", reduction="batchmean")
        return one + other

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(student, teacher), step(student, teacher))


def test_inductor_runs_loss_and_backward() -> None:
    student, teacher = (x.float() for x in pair(6, 48, 8, teacher_dim=6).features)
    student.requires_grad_()
    torch._dynamo.reset()
    loss = affkd.AffinityLoss("gram", "row_l2", "mse")
    value = torch.compile(loss, fullgraph=True)(student * 2.0, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    expected = loss(student * 2.0, teacher)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_changes_nothing(reduction: str, implementation: dict[str, str]) -> None:
    student, teacher = (x.float() for x in pair(7, 64, 8, teacher_dim=6).features)
    student.requires_grad_()
    how = {"reduction": reduction, **implementation}
    expected = affkd.affinity_loss(student, teacher, "gram", "row_l2", "mse", **how)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), student)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        value = affkd.affinity_loss(student, teacher, "gram", "row_l2", "mse", **how)
    # a backward belongs outside of autocast
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected) and torch.equal(gradient, expected_gradient)


def test_under_torch_func_the_reference_runs() -> None:
    inputs = pair(8, 24, 4)
    student, teacher = inputs.features

    def loss(x: torch.Tensor, **how: str) -> torch.Tensor:
        return affkd.affinity_loss(x, teacher, "gram", "row_l2", "mse", **how)

    leaf = student.clone().requires_grad_()
    expected = torch.autograd.grad(loss(leaf, backend="reference"), leaf)[0]
    torch.testing.assert_close(torch.func.grad(loss)(student), expected)
    stacked = torch.stack((student, 2 * student))
    torch.testing.assert_close(
        torch.vmap(loss)(stacked), torch.stack([loss(student), loss(2 * student)])
    )
    with pytest.raises(RuntimeError, match="torch.func"):
        torch.func.grad(lambda x: loss(x, algorithm="factored"))(student)


def test_a_teacher_that_requires_grad_gets_none() -> None:
    student, teacher = (x.requires_grad_() for x in pair(9, 24, 4).features)
    value = affkd.affinity_loss(student, teacher, "gram", "row_l2", "mse", algorithm="factored")
    value.backward()
    assert student.grad is not None and teacher.grad is None
    constant = affkd.affinity_loss(
        student.detach(), teacher, "gram", "row_l2", "mse", algorithm="factored"
    )
    assert not constant.requires_grad


def test_only_the_gradients_that_are_wanted_are_computed(monkeypatch: Any) -> None:
    asked = []
    kernel = factored.loss_and_grad
    monkeypatch.setattr(
        factored,
        "loss_and_grad",
        lambda spec, inputs, needs, algorithm: (
            asked.append(tuple(needs)) or kernel(spec, inputs, needs, algorithm)
        ),
    )
    inputs = Inputs(*pair(10, 5, 4).features, {})
    keys = bank(10, 5, 4, keys=7, teacher_dim=4).options
    how: dict[str, Any] = {"normalization": "row_l2", "algorithm": "factored"}
    affkd.affinity_loss(*inputs.features, **how)
    affkd.affinity_loss(inputs.student.requires_grad_(), inputs.teacher, **how)
    keys["student_keys"].requires_grad_()
    affkd.affinity_loss(inputs.student.detach(), inputs.teacher, **keys, **how)
    with torch.no_grad():
        affkd.affinity_loss(inputs.student, inputs.teacher, **how)
    assert asked == [
        (False, False, False),
        (True, False, False),
        (False, True, False),
        (False, False, False),
    ]


def test_a_second_derivative_of_the_op_is_an_error() -> None:
    student, teacher = pair(11, 64, 4).features
    student.requires_grad_()
    compiled = torch.compile(affkd.AffinityLoss("gram", "row_l2", "mse"), backend="eager")
    torch._dynamo.reset()
    (gradient,) = torch.autograd.grad(compiled(student, teacher) ** 2, student, create_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        torch.autograd.grad(gradient.square().sum(), student)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_teacher_of_inference_mode(reduction: str, implementation: dict[str, str]) -> None:
    student, teacher = pair(12, 12, 4).features
    with torch.inference_mode():
        constant = teacher * 1.0
    leaf = student.requires_grad_()
    how = {"reduction": reduction, **implementation}
    value = affkd.affinity_loss(leaf, constant, "gram", "row_l2", "mse", **how)
    expected = affkd.affinity_loss(leaf, teacher, "gram", "row_l2", "mse", **how)
    gradients = (torch.autograd.grad(x.sum(), leaf)[0] for x in (value, expected))
    assert torch.equal(value, expected) and torch.equal(*gradients)


def test_a_weight_may_change_under_compile() -> None:
    student, teacher = pair(13, 64, 4).features
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda weight: affkd.affinity_loss(student, teacher, weight=weight),
        fullgraph=True,
        backend=counter,
    )
    for weight in (1.0, 2.0, 3.5):
        expected = affkd.affinity_loss(student, teacher, weight=weight)
        torch.testing.assert_close(compiled(weight), expected)
    assert counter.frame_count <= 2


def test_export_keeps_the_batch_size_open() -> None:
    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loss = affkd.AffinityLoss("gram", "row_l2", "mse")

        def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
            return self.loss(student, teacher)

    size = torch.export.Dim("batch", min=2, max=4096)
    example = pair(14, 64, 4).features
    program = torch.export.export(Step(), example, dynamic_shapes=({0: size}, {0: size}))
    other = pair(15, 7, 4).features
    torch.testing.assert_close(program.module()(*other), Step()(*other))


def test_a_spec_keeps_its_hash_in_another_process() -> None:
    spec = make_spec("gram", "row_l2", "mse")
    code = "import pickle, sys; s = pickle.load(sys.stdin.buffer); print(len({s, s.__class__("
    code += "s.affinity, s.normalization, s.loss)}))"
    run = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(spec), capture_output=True, check=True
    )
    assert run.stdout.strip() == b"1"
