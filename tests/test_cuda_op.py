"""The CUDA operators up to the launches: what Python and csrc/cuda/ops.cpp hand to the kernels."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_host import harness
from stand_in import PHASES, StandIn
from torch import Tensor

from affkd_kernels import affinity_loss
from affkd_kernels.inputs import Inputs
from affkd_kernels.kernels import angle, cuda, lookup, options
from affkd_kernels.kernels.result import Needs
from affkd_kernels.spec import LossSpec, make_spec

CSRC = Path(__file__).resolve().parent.parent / "csrc"
STORAGES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def call(spec: LossSpec, inputs: Inputs, *needs: bool, algorithm: str = "dense"):
    return cuda.loss_and_grad(spec, inputs, Needs(*needs or (True,)), algorithm)


def strided(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without one contiguous dimension."""
    x = torch.ones(*(2 * size + 1 for size in reversed(shape))).to(dtype)
    return x.permute(*reversed(range(len(shape))))[tuple(slice(1, None, 2) for _ in shape)]


def cross_inputs() -> Inputs:
    return Inputs(
        strided(2, 3, 5, dtype=torch.bfloat16), strided(2, 3, 7),
        strided(2, 4, 5), strided(2, 4, 7, dtype=torch.float16),
        strided(2, 3, dtype=torch.bool), strided(2, 4, dtype=torch.bool),
        strided(2, 3, 4, dtype=torch.bool), strided(2, 3),
        torch.tensor(2.0, dtype=torch.bfloat16), torch.tensor(3.0, dtype=torch.float64),
    )  # fmt: skip


AXES = {
    "student": ("matrix", "item", "feature"),
    "teacher": ("matrix", "item", "feature"),
    "student_keys": ("matrix", "item", "feature"),
    "teacher_keys": ("matrix", "item", "feature"),
    "mask": ("matrix", "item"),
    "key_mask": ("matrix", "item"),
    "pair_mask": ("matrix", "query", "key"),
    "row_weight": ("matrix", "item"),
    "student_scale": (),
    "teacher_scale": (),
}


@pytest.mark.parametrize("name", AXES)
def test_every_tensor_arrives_as_it_is(name: str, stand_in: StandIn) -> None:
    inputs = cross_inputs()
    call(make_spec("gram", "row_l2", "mse"), inputs)
    tensor, seen = getattr(inputs, name), stand_in.fields()
    assert seen[f"{name}.data"] == tensor.data_ptr()
    assert [seen[f"{name}.{axis}"] for axis in AXES[name]] == list(tensor.stride())
    if tensor.dtype != torch.bool:
        assert STORAGES[int(seen[f"{name}.storage"])] == tensor.dtype


def test_sizes(stand_in: StandIn) -> None:
    call(make_spec("gram", "row_l2", "mse"), cross_inputs())
    seen = stand_in.fields()
    names = ("matrices", "queries", "keys", "student.dim", "teacher.dim", "self", "wide")
    assert [seen[name] for name in names] == [2, 3, 4, 5, 7, 0, 0]


def test_a_self_affinity_has_its_items_on_both_sides(stand_in: StandIn) -> None:
    inputs = cross_inputs()._replace(
        student_keys=None, teacher_keys=None, key_mask=None, pair_mask=None
    )
    call(make_spec("gram", "row_l2", "mse"), inputs)
    seen = stand_in.fields()
    assert seen["self"] and seen["keys"] == seen["queries"] == 3
    assert seen["student_keys.data"] == seen["student.data"]
    assert seen["key_mask.data"] == seen["mask.data"] == inputs.mask.data_ptr()  # type: ignore[union-attr]


def test_what_is_not_given_is_null(stand_in: StandIn) -> None:
    call(make_spec("gram", "row_l2", "mse"), Inputs(torch.ones(1, 3, 2), torch.ones(1, 3, 2)))
    seen = stand_in.fields()
    for name in ("mask", "key_mask", "pair_mask", "row_weight", "student_scale", "teacher_scale"):
        assert seen[f"{name}.data"] == 0


@pytest.mark.parametrize("name", ["student", "teacher", "student_keys", "teacher_keys"])
def test_one_tensor_of_float64_makes_it_float64(name: str, stand_in: StandIn) -> None:
    inputs = cross_inputs()
    inputs = inputs._replace(**{name: getattr(inputs, name).double()})
    result = call(make_spec("gram", "row_l2", "mse"), inputs, True, True, True)
    assert stand_in.fields()["wide"]
    assert {tensor.dtype for tensor in result} == {torch.float64}


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3]
)
def test_only_the_gradients_asked_for_are_made(needs: tuple[bool, ...], stand_in: StandIn) -> None:
    inputs = cross_inputs()
    result = call(make_spec("gram", "row_l2", "mse"), inputs, *needs)
    seen = stand_in.fields()
    sources = (inputs.student, inputs.student_keys, inputs.student_scale)
    names = ("query_gradient", "key_gradient", "scale_gradient")
    assert seen["loss"] == result.loss.data_ptr() and result.loss.shape == ()
    for gradient, source, name, need in zip(result[1:], sources, names, needs, strict=True):
        assert (gradient is not None) == need == bool(seen[name])
        if gradient is not None and source is not None:
            assert gradient.shape == source.shape and gradient.dtype == torch.float32
            assert gradient.is_contiguous() and gradient.data_ptr() == seen[name]


def test_row_losses(stand_in: StandIn) -> None:
    spec = make_spec("cosine", "softmax(axis='column')", "kl", reduction="none")
    inputs = cross_inputs()._replace(student_scale=None, teacher_scale=None, pair_mask=None)
    rows = cuda.row_losses(spec, inputs._replace(row_weight=strided(2, 4)), "dense")
    seen = stand_in.fields()
    assert rows.shape == (2, 4) and rows.data_ptr() == seen["row_losses"]
    assert not any(seen[name] for name in ("query_gradient", "key_gradient", "scale_gradient"))
    assert seen["student.data"] == inputs.student_keys.data_ptr()  # type: ignore[union-attr]


def test_the_numbers_arrive_where_they_belong(stand_in: StandIn) -> None:
    spec = make_spec(
        "polynomial(degree=3, scale=2.5, offset=0.25, clamp_min=0.125)", "row_l1(eps=1e-5)",
        "kl(eps=1e-4)", weight=7.0, diagonal="zero", diagonal_offset=-2, reduction="batchmean",
    )  # fmt: skip
    call(spec, cross_inputs()._replace(student_scale=None, teacher_scale=None))
    seen = stand_in.fields()
    expected = {
        "pair": 5, "order": 3, "clamped": 1, "normalization": 2, "loss": 3, "diagonal": 1,
        "student_scale": 2.5, "teacher_scale": 2.5, "offset": 0.25, "clamp_min": 0.125,
        "statistic_eps": 1e-5, "log_eps": 1e-4,
    }  # fmt: skip
    assert {name: seen[f"settings.{name}"] for name in expected} == expected
    call_level = ("weight", "has_diagonal", "diagonal_offset", "reduction")
    assert [seen[name] for name in call_level] == [7.0, 1, -2, 1]


def test_both_temperatures_and_the_weight_of_both_axes(stand_in: StandIn) -> None:
    normalization = "softmax(student_tau=0.5, teacher_tau=0.25, axis='both')"
    spec = make_spec("gram", normalization, "kl", weight=3.0, diagonal="zero", diagonal_offset=1)
    inputs = cross_inputs()._replace(row_weight=None, pair_mask=None)
    call(spec, inputs, True, True, True)
    seen = stand_in.fields()
    assert (seen["settings.student_tau"], seen["settings.teacher_tau"]) == (0.5, 0.25)
    assert (seen["weight"], seen["diagonal_offset"], seen["columns"]) == (1.5, 1, 1)
    assert seen["student.data"] == inputs.student.data_ptr()
    assert stand_in.launches() == ["gram", "rows", "product"]


def test_columns_that_the_workspace_does_not_hold_take_a_call_of_their_own(
    stand_in: StandIn,
) -> None:
    spec = make_spec(
        "gram", "softmax(axis='both')", "kl", weight=3.0, diagonal="zero", diagonal_offset=1,
        max_workspace_bytes=4 * 2 * 3 * 4 * 4 - 1,
    )  # fmt: skip
    inputs = cross_inputs()._replace(row_weight=None, pair_mask=None)
    gradients = call(spec, inputs, True, True, True, algorithm="tiled")
    seen = stand_in.fields()  # of the second call, where queries and keys have traded places
    assert (seen["weight"], seen["diagonal_offset"], seen["columns"]) == (1.5, -1, 0)
    assert seen["student.data"] == inputs.student_keys.data_ptr()  # type: ignore[union-attr]
    assert gradients.grad_student.shape == inputs.student.shape  # type: ignore[union-attr]
    assert gradients.grad_student_keys.shape == inputs.student_keys.shape  # type: ignore[union-attr]


@pytest.mark.parametrize("setting, expected", [("highest", 0), ("high", 1), ("medium", 2)])
def test_products_are_as_exact_as_torch_was_told(
    setting: str, expected: int, stand_in: StandIn
) -> None:
    torch.set_float32_matmul_precision(setting)
    try:
        call(make_spec("gram", "row_l2", "mse"), cross_inputs())
    finally:
        torch.set_float32_matmul_precision("highest")
    assert stand_in.fields()["precision"] == expected


@pytest.fixture
def computing(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """`backend="cpp"` on CPU tensors is what it is on CUDA tensors, with a CPU for the GPU."""
    monkeypatch.setitem(lookup.loaded, ("cpp", "cpu"), cuda)
    stand_in.compute(ctypes.CDLL(str(harness.build())))
    yield stand_in
    stand_in.compute(None)


@pytest.mark.parametrize("shape", [(37, 5), (2, 37, 5)])
def test_the_prepared_call_is_the_whole_call(shape: tuple[int, ...], computing: StandIn) -> None:
    spec = make_spec("cosine", "row_l2", "mse")
    student, teacher = torch.rand(shape), torch.rand(shape)
    inputs = Inputs(student.reshape(-1, 37, 5), teacher.reshape(-1, 37, 5))
    prepared = cuda.plain_call(spec, inputs, "dense")
    assert prepared is not None
    loss, gradient = prepared(student, teacher, True)
    expected = call(spec, inputs)
    assert loss.equal(expected.loss) and gradient is not None and gradient.shape == shape
    assert gradient.reshape(-1, 37, 5).equal(expected.grad_student)
    assert prepared(student, teacher, False)[1] is None
    half = inputs._replace(student=inputs.student.half())
    assert cuda.plain_call(spec, half, "dense") is None


CALLS = {
    "self": ("gram", "row_l2", "mse", {}),
    "statistic of the matrix": ("euclidean", "mean", "smooth_l1", {}),
    "per axis": ("gram", "softmax(axis='both')", "kl", {"keys": 5, "mask": True, "scale": 0.5}),
    "row losses": ("cosine", "softmax(tau=0.1)", "cross_entropy", {"reduction": "none"}),
    "panels": (
        "rbf", "frobenius", "mse",
        {"algorithm": "tiled", "max_workspace_bytes": 0, "keys": 40, "diagonal": "exclude",
         "diagonal_offset": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_operator_computes_what_the_reference_does(
    name: str, dtype: torch.dtype, computing: StandIn
) -> None:
    *triple, given = CALLS[name]
    given = {"algorithm": "dense", **given}
    results = {}
    for backend in ("cpp", "reference"):
        leaves, features, chosen = features_of_a_call(given, dtype)
        if backend == "reference":
            chosen["algorithm"] = "auto"
        loss = affinity_loss(*features, *triple, backend=backend, items="tokens", **chosen)
        results[backend] = [loss, *torch.autograd.grad(loss.cos().sum(), leaves)]
    # half precision rounds the gradients, not what they are made of
    bound = 1e-9 if dtype == torch.float64 else 1e-2
    for found, expected in zip(*results.values(), strict=True):
        assert (found - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_angle_operator_computes_what_the_reference_does(
    dtype: torch.dtype, computing: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sweep(s: Any, t: Any, beta: float, need_slope: bool) -> tuple[Tensor, Tensor]:
        sides = (s.squared, s.inverse, t.squared, t.inverse)
        return torch.ops.affkd_kernels.cuda_angle(*sides, beta, need_slope)

    monkeypatch.setattr(angle, "runs_compiled", lambda device: True)
    monkeypatch.setattr(angle, "compiled_sweep", sweep)
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(2, 19, d, generator=generator).to(dtype) for d in (5, 7))
    mask = torch.rand(2, 19, generator=generator) < 0.8
    found = angle.angle_sum(student, teacher, mask, 0.5, True)
    monkeypatch.setattr(angle, "runs_compiled", lambda device: False)
    expected = angle.angle_sum(student.double(), teacher.double(), mask, 0.5, True)
    bound = 1e-9 if dtype == torch.float64 else 1e-5
    for x, y in zip(found, expected, strict=True):
        assert (x - y).abs().max() <= bound * y.abs().max()


def features_of_a_call(given: dict, dtype: torch.dtype) -> tuple[list, list, dict]:
    """Leaves that want a gradient, student and teacher, and the other arguments of a call."""
    generator = torch.Generator().manual_seed(7)

    def items(count: int, length: int) -> Tensor:
        return torch.randn(2, count, length, generator=generator).to(dtype)

    chosen = dict(given)
    keys, mask, scale = (chosen.pop(option, None) for option in ("keys", "mask", "scale"))
    leaves, teacher = [items(37, 5).requires_grad_()], items(37, 9)
    if keys:
        leaves.append(items(keys, 5).requires_grad_())
        chosen.update(student_keys=leaves[-1], teacher_keys=items(keys, 9))
    if mask:
        chosen.update(mask=torch.rand(2, 37, generator=generator) < 0.7)
    if scale:
        leaves.append(torch.tensor(scale, requires_grad=True))
        chosen.update(student_scale=leaves[-1], teacher_scale=0.75)
    return leaves, [leaves[0], teacher], chosen


def enumerators(header: str, name: str) -> tuple[str, ...]:
    text = re.sub("//.*", "", (CSRC / header).read_text())
    (body,) = re.findall(rf"enum class {name}[^{{]*{{(.*?)}}", text, re.DOTALL)
    return tuple(re.findall(r"\w+", body))


@pytest.mark.parametrize(
    "header, name, python",
    [
        ("settings.h", "PairFunction", options.PAIR_FUNCTIONS),
        ("settings.h", "Normalization", options.NORMALIZATIONS),
        ("settings.h", "Loss", options.LOSSES),
        ("settings.h", "Diagonal", options.DIAGONALS),
        ("settings.h", "Reduction", options.REDUCTIONS),
        ("settings.h", "Algorithm", options.ALGORITHMS),
        ("cuda/params.cuh", "Precision", cuda.PRECISIONS),
        ("cuda/params.cuh", "Phase", PHASES),
    ],
)
def test_names_are_in_the_order_of_the_enumerations(
    header: str, name: str, python: tuple[str, ...]
) -> None:
    assert enumerators(header, name) == python


def test_options_that_were_not_packed_here_are_refused(stand_in: StandIn) -> None:
    x = torch.ones(1, 3, 2)
    with pytest.raises(RuntimeError, match="malformed options"):
        torch.ops.affkd_kernels.cuda_loss_and_grad(*Inputs(x, x), [0], [0.0])
