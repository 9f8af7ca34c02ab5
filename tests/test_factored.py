"""What is particular to the factored form: precision near convergence, memory, coverage."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from cases import valid_triples
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import affkd_kernels as affkd
from affkd_kernels.inputs import canonical_inputs
from affkd_kernels.kernels import factored, factors, moments
from affkd_kernels.spec import make_spec

TRIPLES = [
    (a, n, "mse")
    for a in ("gram", "cosine", "cosine(shifted=True)", "sqeuclidean")
    for n in ("none", "row_l2", "frobenius", "frobenius(center=True)")
]


def relative(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y).norm() / y.norm())


@pytest.mark.parametrize("triple", TRIPLES, ids="-".join)
@pytest.mark.parametrize("noise", [1e-1, 1e-3])
def test_near_copies(triple: tuple[str, str, str], noise: float) -> None:
    """The float32 loss keeps its digits where student and teacher agree to `noise`.

    The rounding of the float32 features themselves is not the kernel's: exact means exact for them.
    """
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    student = torch.randn(600, 32, generator=generator)
    teacher = student + noise * torch.randn(600, 32, generator=generator)
    leaf = student.double().requires_grad_()
    exact = affkd.affinity_loss(leaf, teacher.double(), *triple, backend="reference")
    exact_gradient = torch.autograd.grad(exact, leaf)[0]
    student.requires_grad_()
    value = affkd.affinity_loss(student, teacher, *triple, algorithm="factored")
    eager = affkd.affinity_loss(student, teacher, *triple, backend="reference")
    gradient = torch.autograd.grad(value, student)[0]
    eager_gradient = torch.autograd.grad(eager, student)[0]
    # unit features and squared norms are rounded to float32 before the float64 moments see them
    bound = 3e-7 if triple[0] == "gram" else 3e-7 / noise
    assert relative(value.detach(), exact.detach()) < bound
    assert relative(gradient, exact_gradient) < 2 * relative(eager_gradient, exact_gradient) + 1e-6


def test_gradients_where_little_is_left() -> None:
    """Directions that nearly agree, and a diagonal that is all but everything."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(2)
    common = 10 * torch.randn(1, 1, 24, generator=generator)
    student = common + torch.randn(2, 200, 24, generator=generator)
    large = torch.randn(100, 8, generator=generator)
    large[0] *= 1e4
    cases = (
        (student, ("cosine", "none", "mse"), {"items": "tokens"}),
        (large, ("gram", "frobenius", "mse"), {"diagonal": "exclude"}),
    )
    for x, triple, options in cases:
        teacher = x + 0.1 * torch.randn(x.shape, generator=generator)
        gradients = []
        for dtype, how in (
            (torch.float64, {"backend": "reference"}),
            (torch.float32, {"backend": "reference"}),
            (torch.float32, {"algorithm": "factored"}),
        ):
            leaf = x.to(dtype).requires_grad_()
            value = affkd.affinity_loss(leaf, teacher.to(dtype), *triple, **options, **how)
            gradients.append(torch.autograd.grad(value, leaf)[0])
        exact, eager, gradient = gradients
        rows = (gradient - exact).norm(dim=-1) / exact.norm(dim=-1)
        eager_rows = (eager - exact).norm(dim=-1) / exact.norm(dim=-1)
        assert rows.max() < 2 * eager_rows.max() + 1e-6, triple


def test_row_losses_sum_to_the_loss() -> None:
    student, teacher = torch.randn(50, 6), torch.randn(50, 4)
    for triple in TRIPLES:
        rows, total = (
            affkd.affinity_loss(student, teacher, *triple, reduction=r, algorithm="factored")
            for r in ("none", "sum")
        )
        torch.testing.assert_close(rows.sum(), total)


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    student = torch.randn(3, 41, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 41, 7, dtype=torch.float64)
    for triple in TRIPLES:
        results = []
        for elements in (1 << 19, 3 * 5 * 8):
            chunk = dict.fromkeys(("cpu", "cuda"), elements)
            monkeypatch.setattr(moments, "_CHUNK_ELEMENTS", chunk)
            value = affkd.affinity_loss(
                student, teacher, *triple, items="tokens", algorithm="factored"
            )
            results.append((value, torch.autograd.grad(value, student)[0]))
        torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("keys", [False, True], ids=["self", "keys"])
def test_float32_products_are_as_good_as_eager_away_from_convergence(
    keys: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU with few float64 units computes, or one that was told not to be exact."""
    monkeypatch.setattr(factored, "product_dtype", lambda inputs: inputs.dtype)
    student, teacher = torch.randn(300, 16, requires_grad=True), torch.randn(300, 24)
    options = {"weight": 2.0}
    if keys:
        options |= {"student_keys": torch.randn(70, 16), "teacher_keys": torch.randn(70, 24)}
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    for triple in TRIPLES:
        value = affkd.affinity_loss(student, teacher, *triple, algorithm="factored", **options)
        leaf = student.detach().double().requires_grad_()
        exact = affkd.affinity_loss(leaf, teacher.double(), *triple, backend="reference", **wide)
        assert relative(value.detach(), exact.detach()) < 1e-4, triple
        gradients = torch.autograd.grad(value, student)[0], torch.autograd.grad(exact, leaf)[0]
        assert relative(*gradients) < 1e-4, triple


@pytest.mark.parametrize(
    ("precision", "capability", "dtype", "expected"),
    [
        ("ieee", (9, 0), torch.float32, torch.float64),
        ("tf32x3", (9, 0), torch.bfloat16, torch.float32),
        ("tf32", (9, 0), torch.float32, torch.float32),
        ("ieee", (12, 0), torch.float32, torch.float32),
        ("tf32", (12, 0), torch.float64, torch.float64),
    ],
)
def test_which_products_a_gpu_takes(
    precision: str,
    capability: tuple[int, int],
    dtype: torch.dtype,
    expected: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(factored, "float32_precision", lambda: precision)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with FakeTensorMode():
        features = torch.empty(8, 4, dtype=dtype, device="cuda")
    inputs, _ = canonical_inputs(make_spec(*TRIPLES[0]), features, features)
    assert factored.product_dtype(inputs) == expected
    assert factored.moment_dtype(inputs) == torch.float64


def test_which_triples_have_a_factored_form() -> None:
    supported = {
        (t.affinity.name, t.normalization.name, t.loss.name)
        for t in valid_triples()
        if factored.unsupported(make_spec(*t.build()), False) is None
    }
    assert supported == {
        (a, n, "mse")
        for a in ("gram", "cosine", "sqeuclidean")
        for n in ("none", "row_l2", "frobenius")
    }


@pytest.mark.parametrize(
    "triple, options, reason",
    [
        (("rbf", "frobenius", "mse"), {}, "rbf"),
        (("gram(clamp_min=0.0)", "row_l2", "mse"), {}, "clamp_min"),
        (("gram", "row_l1", "mse"), {}, "row_l1"),
        (("gram", "row_l2", "l1"), {}, "l1"),
        (("gram", "row_l2", "mse"), {"pair_mask": torch.ones(4, 4, dtype=torch.bool)}, "pair_mask"),
        (("gram", "frobenius(center=True)", "mse"), {"diagonal": "zero"}, "diagonal"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_has_no_factored_form_says_why(
    triple: tuple[str, str, str], options: dict[str, object], reason: str
) -> None:
    x = torch.randn(4, 2)
    with pytest.raises(RuntimeError, match=f"no factored form.*{reason}"):
        affkd.affinity_loss(x, x, *triple, algorithm="factored", **options)  # type: ignore[arg-type]
    # "auto" computes it another way
    assert affkd.affinity_loss(x, x, *triple, **options).isfinite()  # type: ignore[arg-type]


def test_the_factors_multiply_to_the_affinity() -> None:
    x, keys = torch.randn(7, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    for affinity, normalization, _ in TRIPLES:
        if normalization != "none":
            continue
        spec = make_spec(affinity, "none", "mse")
        inputs = affkd.inputs.canonical_inputs(spec, x, x, keys, keys)[0]
        side, _ = factors.factorize(spec, inputs)
        product = side.scale * side.queries @ side.keys.mT
        torch.testing.assert_close(product[0], affkd.affinity_matrix(x, affinity, keys=keys))


_PEAK = """
import resource, torch, affkd_kernels as affkd
torch.set_num_threads(1)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
small = torch.randn(64, 64, requires_grad=True)
affkd.affinity_loss(small, small.detach(), "gram", "row_l2", "mse", algorithm="factored").backward()
student, teacher = torch.randn(32768, 64, requires_grad=True), torch.randn(32768, 64)
before = peak()
affkd.affinity_loss(student, teacher, "gram", "row_l2", "mse", algorithm="factored").backward()
print((peak() - before) / student.nbytes)
"""


def test_memory_grows_with_the_features_and_not_with_the_pairs() -> None:
    """32768 samples: one B x B matrix would be 512 times the features' 8 MB."""
    run = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 8
