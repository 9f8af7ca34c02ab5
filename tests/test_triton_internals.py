"""What is particular about the Triton kernels, in Triton's interpreter.

That they compute the right numbers is shown by the tests that all implementations share.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from case_inputs import bank, mask, pair
from torch import Tensor

from affkd_kernels.inputs import canonical_inputs
from affkd_kernels.kernels import angle as angles
from affkd_kernels.kernels import triton as kernels
from affkd_kernels.kernels.result import LossAndGrad, Needs
from affkd_kernels.spec import make_spec

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
if not kernels.available("cpu")[0]:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from affkd_kernels.kernels.triton import (  # noqa: E402
    angle,
    call,
    choices,
    configs,
    grams,
    launch,
    multiply,
    plan,
    replay,
    rows,
    stages,
    sweeps,
    tiles,
)


def evaluate(inputs: Any, triple: tuple[str, str, str], algorithm: str, **options: Any) -> Any:
    tensors = {k: v for k, v in inputs.options.items() if isinstance(v, Tensor)}
    static = {k: v for k, v in inputs.options.items() if k not in tensors}
    spec = make_spec(*triple, **static, **options)
    canonical, _ = canonical_inputs(spec, *inputs.features, **tensors)
    needs = Needs(student=True, student_keys="student_keys" in tensors)
    return kernels.loss_and_grad(spec, canonical, needs, algorithm)


def assert_close(ours: LossAndGrad, expected: LossAndGrad, tolerance: float) -> None:
    for x, y in zip(ours, expected, strict=True):
        assert (x is None) == (y is None)
        if x is not None and y is not None:
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@triton.jit
def _log_ratio_kernel(a: Any, b: Any, out: Any, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(out + at, stages.log_ratio(tl.load(a + at), tl.load(b + at)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_logarithm_of_a_quotient_near_1_keeps_its_digits(dtype: torch.dtype) -> None:
    distances = torch.logspace(-6, 1, 256, dtype=torch.float64)
    b = torch.rand(256, dtype=torch.float64) + 0.5
    a, b = (b * (1 + distances)).to(dtype), b.to(dtype)
    out = torch.empty_like(a)
    _log_ratio_kernel[(1,)](a, b, out, COUNT=256)
    # of the numbers as rounded; a - b is exact
    exact = torch.log1p((a.double() - b.double()) / b.double())
    assert ((out.double() - exact).abs() / exact).max() < 8 * torch.finfo(dtype).eps


PANELS = [
    # bytes: V has a row of 37 or 41 numbers of 8 bytes; blocks have 32 rows
    pytest.param(lambda: pair(3, 37, 5, teacher_dim=4), 32 * 37 * 8, id="rows-of-one-matrix"),
    pytest.param(lambda: bank(4, 37, 5, keys=41, teacher_dim=4), 0, id="less-than-a-block"),
    pytest.param(
        lambda: pair(5, 3, 9, 5, items="tokens"), 2 * 9 * 9 * 8, id="some-matrices-of-several"
    ),
]


@pytest.mark.parametrize("make, limit", PANELS)
@pytest.mark.parametrize(
    "triple",
    [
        ("gram", "row_l2", "mse"),
        ("rbf", "softmax", "kl(direction='reverse')"),
        ("euclidean", "mean", "smooth_l1"),
    ],
)
def test_panels_of_any_size_give_the_same(make: Any, limit: int, triple: Any) -> None:
    whole = evaluate(make(), triple, "dense")
    assert_close(evaluate(make(), triple, "tiled", max_workspace_bytes=limit), whole, 1e-12)


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
    """Stands for a compiled kernel, which is launched with all arguments in order."""

    launches: list[Any] = []
    function, packed_metadata = "function", "metadata"

    def __init__(self, kernel: Any, n_spills: int, arguments: Any) -> None:
        self.kernel, self.n_spills, self.arguments = kernel, n_spills, arguments

    def _init_handles(self) -> None:
        pass

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *args: self.run(
            *grid, "stream", self.function, self.packed_metadata, None, None, None, *args
        )

    def run(self, x: int, y: int, z: int, *rest: Any) -> None:
        assert rest[:6] == ("stream", "function", "metadata", None, None, None)
        Compiled.launches.append(self)
        count, args = len(self.arguments), rest[6:]
        given = [at_address(*both) for both in zip(args[:count], self.arguments, strict=True)]
        self.kernel[(x, y, z)](*given, *args[count:])


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
    from affkd_kernels.kernels.triton import centering, combine, finish, gradients, prepare, product

    whole = (centering, combine, finish, gradients, grams, multiply, prepare, product, rows, sweeps)
    for module in whole:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Jitted(getattr(module, name)))
    device = types.SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: "stream"
    )
    # a workspace of bytes, all of which a kernel has to write before it reads them
    monkeypatch.setattr(replay.torch, "empty", poisoned_bytes)
    monkeypatch.setattr("triton.runtime.driver", types.SimpleNamespace(active=device))
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


class Assembled:
    """Stands for a compiled kernel that needs so many registers, and counts when it is loaded."""

    def __init__(self, needed: int, registers: int) -> None:
        self.needed, self.registers = needed, registers

    def _init_handles(self) -> None:
        self.n_spills = max(self.needed - self.registers, 0)


class Assembler:
    """Stands for a kernel of the JIT that is compiled without being launched."""

    def __init__(self, needed: int) -> None:
        self.needed = needed

    def warmup(self, *args: Any, grid: Any, maxnreg: int = 64, **choices: Any) -> Assembled:
        assert (args, grid, choices) == ((1, 2), (3,), {"HOW": 4, "num_warps": 8})
        return Assembled(self.needed, maxnreg)


@pytest.mark.parametrize("needed, registers", [(60, 64), (65, 128), (129, 168), (255, 255)])
def test_what_spills_is_compiled_with_more_registers(needed: int, registers: int) -> None:
    options = {"num_warps": 8, "maxnreg": 64}
    found = plan.compile_kernel(Assembler(needed), (3,), (1, 2), {"HOW": 4}, options)
    assert found.registers == registers


def test_what_spills_with_any_number_of_registers_stays_as_it_is() -> None:
    found = plan.compile_kernel(Assembler(300), (3,), (1, 2), {"HOW": 4}, {"num_warps": 8})
    assert found.registers == 64 and found.n_spills


def test_a_plan_holds_no_tensor() -> None:
    """It may be evicted: a captured graph of a call would go on reading what it held."""
    held = vars(plan_of(("rbf", "softmax(tau=0.1)", "kl"))).values()
    assert not [x for x in held if isinstance(x, Tensor)]


def plan_of(triple: tuple[str, str, str]) -> plan.Plan:
    spec = make_spec(*triple)
    inputs, _ = canonical_inputs(spec, *pair(9, 6, 4).features)
    return plan.Plan(plan.Form.of(spec, inputs, Needs(student=True), "dense", 1.0))


SHAPED_FOR_GPUS = [
    pytest.param(lambda: pair(11, 70, 40, teacher_dim=33), ("euclidean", "mean", "smooth_l1")),
    pytest.param(
        lambda: pair(12, 2, 40, 19, items="tokens", mask=mask(3, 2, 40)), ("cosine", "row_l1", "l1")
    ),
    pytest.param(lambda: bank(13, 35, 19, keys=600, teacher_dim=3), ("rbf", "frobenius", "mse")),
    pytest.param(
        lambda: bank(14, 3, 5, keys=1100, teacher_dim=3), ("gram", "softmax", "kl"), id="many-keys"
    ),
    pytest.param(lambda: bank(15, 33, 5, keys=260, teacher_dim=3), ("sqeuclidean", "max", "mse")),
    pytest.param(
        lambda: pair(16, 35, 19, teacher_dim=3), ("gram", "frobenius(center=True)", "smooth_l1")
    ),
]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("make, triple", SHAPED_FOR_GPUS)
def test_tiles_have_the_shapes_of_gpus(
    make: Any, triple: Any, capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the interpreter are fewer and larger."""
    expected = evaluate(make(), triple, "dense")
    monkeypatch.setattr(configs, "architecture", lambda device: (capability, 132))
    assert_close(evaluate(make(), triple, "dense"), expected, 1e-12)


class Grids(call.Call):
    """A call whose launches are not done."""

    grids: list[tuple[int, ...]] = []

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **choices: Any) -> None:
        Grids.grids.append(grid)


LARGE = [
    # matrices, queries, keys (0: a self-affinity), length
    pytest.param(1 << 18, 33, 0, 8, id="many-matrices"),
    pytest.param(1, 4, 1 << 23, 8, id="many-keys"),
    pytest.param(1, 4, 3, 1 << 24, id="long-features"),
]


@pytest.mark.parametrize("matrices, queries, keys, length", LARGE)
@pytest.mark.parametrize("algorithm", ["dense", "tiled"])
@pytest.mark.parametrize("triple", [("rbf(unit=False)", "none", "mse"), ("gram", "max", "l1")])
def test_a_gpu_takes_every_grid(
    matrices: int, queries: int, keys: int, length: int, algorithm: str, triple: Any
) -> None:
    features = torch.empty(matrices, queries, length, device="meta")
    bank = features.new_empty(matrices, keys, length) if keys else None
    spec = make_spec(*triple, items="tokens")
    inputs, _ = canonical_inputs(spec, features, features, bank, bank)
    needs = Needs(student=True, student_keys=bool(keys))
    form = plan.Form.of(spec, inputs, needs, algorithm, 1.0)
    Grids.grids = []
    launch.compute(Grids(plan.Plan(form), inputs), needs)
    assert len(Grids.grids) > 2
    for grid in Grids.grids:
        assert grid[0] < 1 << 31 and all(count < 1 << 16 for count in grid[1:])


class Masks(NamedTuple):
    query_mask: Any
    key_mask: Any


@triton.jit
def _places_kernel(masks: Any, out: Any, row: Any, column: Any, queries: Any, keys: Any,
                   HOW: tl.constexpr, SHAPE: tl.constexpr):  # fmt: skip
    tile = tiles.tile_of(masks, row * 0, row, column, queries, queries, keys, 0, HOW, SHAPE)
    at = out + tile.inner_rows[:, None] * SHAPE.columns + tile.inner_columns[None, :]
    tl.store(at, tiles.first_pair(tile) + tiles.pair_offsets(tile))


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("algorithm", ["dense", "tiled"])
@pytest.mark.parametrize("keys, length", [(1 << 27, 8), (48, 1 << 27)])
def test_addresses_inside_a_tile_of_any_batch(
    keys: int, length: int, algorithm: str, capability: int
) -> None:
    """Rows of a tile that lie 2^31 pairs, or features, apart."""
    queries = torch.empty(1, 64, length, device="meta")
    bank = queries.new_empty(1, keys, length)
    spec = make_spec("gram", "softmax", "kl", items="tokens")
    inputs, _ = canonical_inputs(spec, queries, queries, bank, bank)
    form = plan.Form.of(spec, inputs, Needs(), algorithm, 1.0)
    made = plan.Plan(form._replace(capability=capability))
    assert made.tiles.shape.wide and made.gradient.shape.wide
    shape = made.tiles.shape
    step = max(keys, length)
    out = torch.empty(shape.rows, shape.columns, dtype=torch.int64)
    first = step - shape.columns
    _places_kernel[(1,)](Masks(out, out), out, 0, first, 64, step, HOW=made.how, SHAPE=shape)
    expected = torch.arange(shape.rows)[:, None] * step + first + torch.arange(shape.columns)
    assert torch.equal(out, expected)


def test_triton_tells_kernels_apart_by_all_that_decides_their_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its cache on disk is older than this package's next version, whose stages may differ."""
    how = plan_of(("gram", "row_l2", "mse")).how

    def key(value: Any) -> str:
        function = JITFunction(_log_ratio_kernel.fn)
        function.hash = "of the source"
        return ASTSource(function, {"COUNT": "constexpr"}, {"COUNT": value}).hash()

    before = key(how)
    properties = [name for name, x in vars(choices.Choices).items() if isinstance(x, property)]
    assert len(properties) > 10
    for name in properties:
        with monkeypatch.context() as patch:
            patch.setattr(choices.Choices, name, property(lambda _: "other"))
            assert key(how) != before, name
    assert key(how) == before
    for field in dataclasses.fields(how):
        other: dict[str, Any] = {field.name: "other"}
        assert key(dataclasses.replace(how, **other)) != before, field.name


def test_products_follow_the_precision_that_is_set() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        for setting, precision in (("highest", "ieee"), ("high", "tf32x3"), ("medium", "tf32")):
            torch.set_float32_matmul_precision(setting)
            assert configs.dot_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    "dtype, beta, masked",
    [(torch.float32, 0.1, True), (torch.float32, 0.0, False), (torch.float64, 1.0, False)],
)
def test_the_sweep_over_angles(dtype: torch.dtype, beta: float, masked: bool) -> None:
    student, teacher = torch.randn(2, 2, 33, 4, dtype=torch.float64).unbind(0)
    student[0, 1] = student[0, 0]
    mask = torch.rand(2, 33) > 0.3 if masked else None
    s, t = (angles.distances(x, mask, dtype) for x in (student, teacher))
    expected, expected_slope = angles.eager_sweep(s, t, beta, True)
    loss, slope = angle.sweep(s, t, beta, True)
    tolerance = 16 * torch.finfo(dtype).eps
    assert abs(loss - expected) < tolerance * abs(expected)
    x, y = (angles.distance_gradient(s, _present(one)) for one in (slope, expected_slope))
    assert (x - y).norm() < tolerance * y.norm()
    alone, nothing = angle.sweep(s, t, beta, False)
    assert nothing is None and torch.equal(alone, loss)


def test_the_kernel_goes_to_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[Any] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    @contextlib.contextmanager
    def entering(device: torch.device) -> Iterator[None]:
        entered.append(device)
        yield

    monkeypatch.setattr(torch.cuda, "device", entering)
    for device in ("cpu", "cuda:0", "cuda:1"):
        with plan.on_device(torch.device(device)):
            pass
    assert entered == [torch.device("cuda:1")]


def test_the_sweep_over_angles_and_every_loss_choose_their_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[torch.device] = []

    @contextlib.contextmanager
    def recorded(device: torch.device) -> Iterator[None]:
        asked.append(device)
        yield
        asked.append(device)

    for module in (angle, launch):
        monkeypatch.setattr(module, "on_device", recorded)
    side = angles.distances(torch.randn(1, 3, 2), None, torch.float32)
    angle.sweep(side, side, 1.0, False)
    assert asked == [torch.device("cpu")] * 2
    evaluate(pair(10, 4, 2), ("gram", "none", "mse"), "dense")
    assert len(asked) == 4


def _present(x: Tensor | None) -> Tensor:
    assert x is not None
    return x
