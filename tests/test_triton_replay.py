"""Later calls of a form launch again what the first one compiled, on tensors of their own."""

from __future__ import annotations

import ctypes
import dataclasses
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from case_inputs import bank, mask, pair
from torch import Tensor
from triton_calls import assert_close, evaluate

from affkd_kernels.inputs import canonical_inputs
from affkd_kernels.kernels import triton as kernels
from affkd_kernels.kernels.result import Needs
from affkd_kernels.kernels.triton import (
    centering,
    combine,
    finish,
    gradients,
    grams,
    multiply,
    plan,
    prepare,
    product,
    replay,
    rows,
    sweeps,
)
from affkd_kernels.spec import make_spec

MODULES = (centering, combine, finish, gradients, grams, multiply, prepare, product, rows, sweeps)


def at_address(argument: Any, like: Any) -> Any:
    """An argument of a launch, with tensors where it has addresses: as many as `like` has.

    Of one entry each, as the interpreter, which knows no bounds, tells storages by their address.
    """
    if isinstance(like, tuple):
        entries = [at_address(*both) for both in zip(argument, like, strict=True)]
        return type(like)(*entries) if hasattr(like, "_fields") else tuple(entries)
    if not isinstance(like, Tensor) or isinstance(argument, Tensor) or not like.numel():
        return like if isinstance(like, Tensor) and not like.numel() else argument
    buffer = (ctypes.c_char * like.element_size()).from_address(argument)
    return torch.frombuffer(buffer, dtype=like.dtype)


class Compiled:
    """Stands for a compiled kernel, which Triton launches with all arguments in order."""

    launches: list[Any] = []
    metadata = types.SimpleNamespace(target=types.SimpleNamespace(backend="interpreter"))

    def __init__(self, kernel: Any, n_spills: int, arguments: Any) -> None:
        self.kernel, self.n_spills, self.arguments = kernel, n_spills, arguments

    def _init_handles(self) -> None:
        pass

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def launch(*args: Any) -> None:
            Compiled.launches.append(self)
            count = len(self.arguments)
            given = [at_address(*both) for both in zip(args[:count], self.arguments, strict=True)]
            self.kernel[grid](*given, *args[count:])

        return launch


class Jitted:
    """Stands for a kernel of the JIT, all of whose first compilations spill."""

    compiled = 0

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def warmup(self, *args: Any, grid: Any, **choices: Any) -> Compiled:
        Jitted.compiled += 1
        return Compiled(self.kernel, 0 if "maxnreg" in choices else 8, args)


_empty = torch.empty


def poisoned_bytes(*args: Any, **options: Any) -> Tensor:
    x = _empty(*args, **options)
    return x.fill_(0xFF) if x.dtype == torch.uint8 else x


@pytest.fixture
def jitted_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in MODULES:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Jitted(getattr(module, name)))
    # a workspace of bytes, all of which a kernel has to write before it reads them
    monkeypatch.setattr(replay.torch, "empty", poisoned_bytes)
    Jitted.compiled = 0
    Compiled.launches = []
    plan.make_plan.cache_clear()
    yield
    plan.make_plan.cache_clear()


REPEATED = [
    # inputs from a seed, triple, algorithm, launches of loss and gradients
    pytest.param(
        lambda seed: bank(seed, 18, 5, keys=7, teacher_dim=4),
        ("cosine", "frobenius(center=True)", "l1"), "dense", None, id="centered-dense",
    ),
    pytest.param(
        lambda seed: bank(seed, 18, 5, keys=7, teacher_dim=4),
        ("cosine", "frobenius(center=True)", "l1"), "tiled", None, id="centered-tiled",
    ),
    pytest.param(
        lambda seed: bank(seed, 18, 5, keys=7, teacher_dim=4),
        ("gram", "frobenius(center=True)", "l1"), "dense", 12, id="centered-features",
    ),
    pytest.param(
        lambda seed: pair(seed, 18, 5, teacher_dim=4), ("euclidean", "mean", "smooth_l1"),
        "dense", 3, id="self",
    ),
    pytest.param(
        lambda seed: bank(seed, 18, 5, keys=7, teacher_dim=4), ("cosine", "softmax", "kl"),
        "dense", 4, id="cross",
    ),
    pytest.param(
        lambda seed: pair(seed, 2, 18, 5, items="tokens", mask=mask(seed, 2, 18)),
        ("rbf(unit=False)", "row_sum", "kl"), "dense", 3, id="masked",
    ),
]  # fmt: skip


@pytest.mark.parametrize("make, triple, algorithm, count", REPEATED)
def test_every_call_launches_what_the_first_compiled(
    make: Any, triple: Any, algorithm: str, count: int | None, jitted_kernels: None
) -> None:
    """With the new call's tensors in place of the first one's, all of which still exist."""
    first = evaluate(make(6), triple, algorithm)
    launched, compiled = Compiled.launches, Jitted.compiled
    assert len(launched) == count if count else len(launched) > 5
    assert compiled == 2 * len(launched)
    # two binaries of a kernel may round differently: not even the first call takes what spills
    assert not any(one.n_spills for one in launched)
    Compiled.launches = []
    other = evaluate(make(7), triple, algorithm)
    again = evaluate(make(6), triple, algorithm)
    assert Compiled.launches == 2 * launched and Jitted.compiled == compiled
    assert all(x is y is None or torch.equal(x, y) for x, y in zip(again, first, strict=True))
    plan.make_plan.cache_clear()
    assert_close(other, evaluate(make(7), triple, algorithm), 0)
    assert not torch.equal(other.loss, first.loss)


@pytest.mark.parametrize("algorithm", ["dense", "tiled"])
def test_later_calls_read_what_has_to_be_copied_anew(algorithm: str, jitted_kernels: None) -> None:
    """Columns in place of rows, a weight of another dtype, scales; and one tensor on both sides."""
    spec = make_spec("gram", "row_l2", "mse", reduction="none")
    needs = Needs(student=True, student_scale=True)

    def inputs(seed: int, *, alike: bool) -> Any:
        student, teacher = torch.randn(2, 5, 18, generator=torch.manual_seed(seed)).mT.unbind(0)
        canonical, _ = canonical_inputs(
            spec, student, student if alike else teacher, row_weight=torch.rand(18).half(),
            student_scale=torch.rand(()), teacher_scale=torch.rand(()),
        )  # fmt: skip
        return canonical

    for calls, alike in enumerate((True, False, False)):
        given = inputs(calls, alike=alike)
        ours = kernels.loss_and_grad(spec, given, needs, algorithm)
        losses = kernels.row_losses(spec, given, algorithm)
        compiled = Jitted.compiled
        plan.make_plan.cache_clear()
        assert_close(kernels.loss_and_grad(spec, given, needs, algorithm), ours, 0)
        assert torch.equal(kernels.row_losses(spec, given, algorithm), losses)
        torch.testing.assert_close(losses.sum(), ours.loss)
        # only where there is no plan, and in the first call
        assert Jitted.compiled > compiled


def test_other_strides_or_alignments_are_compiled_anew(jitted_kernels: None) -> None:
    triple = ("gram", "row_l2", "mse")
    inputs = pair(8, 18, 4)
    evaluate(inputs, triple, "dense")
    compiled = Jitted.compiled
    wide = torch.nn.functional.pad(inputs.student, (0, 4))[:, :4]
    shifted = torch.nn.functional.pad(inputs.student.flatten(), (1, 0))[1:].view(18, 4)
    assert shifted.data_ptr() % 16 == 8
    for plans, student in enumerate((wide, shifted), start=2):
        evaluate(dataclasses.replace(inputs, student=student), triple, "dense")
        assert Jitted.compiled == plans * compiled
