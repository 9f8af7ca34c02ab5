"""RKD's angle loss: against its definition, at its edges, in a graph, and in bounded memory."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import pytest
import torch

from affkd_kernels.angle import REDUCTIONS, RKDAngleLoss, _reference_angles, rkd_angle_loss
from affkd_kernels.kernels import angle as kernel
from affkd_kernels.kernels import extension
from affkd_kernels.kernels.lookup import missing

DEVICE = torch.get_default_device()
UNUSABLE = "" if kernel.runs_compiled(DEVICE) else f"no compiled sweep on {DEVICE.type!r} devices"
CAPABILITIES = extension.usable_capabilities() if DEVICE.type == "cpu" and not UNUSABLE else ()
MASK = torch.tensor([[1, 1, 0, 1, 1, 1], [0, 1, 1, 0, 1, 1]], dtype=torch.bool)


@pytest.fixture(params=["eager", "compiled", "triton"])
def sweep(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What sums up the triples outside the reference."""
    unusable = {"compiled": UNUSABLE, "triton": missing("triton", DEVICE.type)}
    if unusable.get(request.param):
        pytest.skip(unusable[request.param])
    monkeypatch.setattr(kernel, "runs_compiled", lambda device: request.param == "compiled")
    monkeypatch.setattr(kernel, "runs_triton", lambda device: request.param == "triton")
    return request.param


each_sweep = pytest.mark.usefixtures("sweep")


def features(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype)


def triple_loop(student: list, teacher: list, beta: float) -> tuple[float, int]:
    """The definition in plain Python floats: the sum over one matrix, and its number of triples."""

    def direction(a: list[float], b: list[float]) -> list[float]:
        difference = [x - y for x, y in zip(a, b, strict=True)]
        length = math.sqrt(math.fsum(x * x for x in difference))
        return [x / length if length > 0 else 0.0 for x in difference]

    def psi(x: list, i: int, j: int, k: int) -> float:
        e_ij, e_kj = direction(x[i], x[j]), direction(x[k], x[j])
        return math.fsum(a * b for a, b in zip(e_ij, e_kj, strict=True))

    losses = []
    for i, j, k in itertools.product(range(len(student)), repeat=3):
        error = abs(psi(student, i, j, k) - psi(teacher, i, j, k))
        small = error < beta
        losses.append(error * error / (2 * beta) if small else error - beta / 2)
    return math.fsum(losses), len(losses)


@each_sweep
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_against_the_triple_loop(backend: str, beta: float, masked: bool) -> None:
    student, teacher = features(2, 6, 3), features(2, 6, 5, seed=1)
    student[0, 1] = student[0, 0]  # a coincident pair on one side
    mask = MASK if masked else torch.ones_like(MASK)
    sums, triples = zip(
        *(
            triple_loop(s[m].tolist(), t[m].tolist(), beta)
            for s, t, m in zip(student, teacher, mask, strict=True)
        ),
        strict=True,
    )
    divisors = {
        "sum": 1,
        "mean": sum(triples),
        "batchmean": int(mask.sum()),
        "matrixmean": 2,
    }
    for reduction in REDUCTIONS:
        actual = rkd_angle_loss(
            student,
            teacher,
            beta=beta,
            items="tokens",
            mask=mask if masked else None,
            reduction=reduction,
            weight=3.0,
            backend=backend,
        )
        expected = 3.0 * sum(sums) / divisors[reduction]
        assert actual.item() == pytest.approx(expected, rel=1e-10)


@each_sweep
@pytest.mark.parametrize("beta", [0.05, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(beta: float, masked: bool, sweep: str) -> None:
    if sweep == "triton" and DEVICE.type == "cpu" and (beta, masked) != (0.05, True):
        pytest.skip("the interpreter takes a quarter of a minute for one")
    student, teacher = features(2, 6, 3).requires_grad_(), features(2, 6, 4, seed=1)
    options = {"items": "tokens", "mask": MASK if masked else None, "beta": beta}
    torch.autograd.gradcheck(lambda x: rkd_angle_loss(x, teacher, **options), student)
    torch.autograd.gradgradcheck(
        lambda x: rkd_angle_loss(x, teacher, backend="reference", **options), student
    )


@each_sweep
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_error_is_no_larger_than_eagers(dtype: torch.dtype) -> None:
    student = features(24, 16).to(dtype).requires_grad_()
    teacher = features(24, 8, seed=1).to(dtype)
    true = rkd_angle_loss(student.double(), teacher.double(), backend="reference")
    (true_gradient,) = torch.autograd.grad(true, student)

    errors = {}
    for backend in ("auto", "reference"):
        loss = rkd_angle_loss(student, teacher, backend=backend)
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.dtype == torch.float32 and gradient.dtype == dtype
        difference = (gradient.double() - true_gradient.double()).norm() / true_gradient.norm()
        errors[backend] = abs(loss.item() - true.item()) / true.item(), difference.item()
    # both round several factors and what they return, and may be lucky there
    for fused, eager, rounded in zip(*errors.values(), (torch.float32, dtype), strict=True):
        assert fused <= max(2 * eager, 4 * torch.finfo(rounded).eps)


@each_sweep
def test_a_common_offset_and_the_scale_of_the_features_do_not_hurt() -> None:
    student, teacher = features(16, 8, dtype=torch.float32), features(16, 8, seed=1)
    expected = rkd_angle_loss(student.double(), teacher).item()
    for scale in (1e-8, 1.0, 1e25):
        actual = rkd_angle_loss(scale * student, teacher.float())
        assert actual.item() == pytest.approx(expected, rel=1e-5)
    moved = student + 1000.0
    expected = rkd_angle_loss(moved.double(), teacher, backend="reference").item()
    assert rkd_angle_loss(moved, teacher.float()).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("ratio", [10, 100, 1000, 10000])
def test_close_pairs_keep_their_angles(ratio: float) -> None:
    x = features(1, 16, 8, dtype=torch.float32)
    x[:, 8:] = x[:, :8] + x[:, 8:] / ratio
    everything = slice(None)
    fused = kernel.angles(kernel.distances(x, None, torch.float32), everything, everything)
    true = _reference_angles(x.double(), None)
    eager_error = (_reference_angles(x, None) - true).abs().max()
    assert (fused - true).abs().max() <= 2 * eager_error


@each_sweep
@pytest.mark.parametrize("ratio", [10, 100, 1000, 10000])
def test_close_pairs_keep_their_gradients(ratio: float) -> None:
    student, teacher = (features(16, 8, seed=seed, dtype=torch.float32) for seed in (0, 1))
    student[8:] = student[:8] + student[8:] / ratio
    student.requires_grad_()
    losses = [
        rkd_angle_loss(student, teacher),
        rkd_angle_loss(student.double(), teacher, backend="reference"),
    ]
    gradients = [torch.autograd.grad(loss, student)[0] for loss in losses]
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()


@pytest.mark.parametrize("entries", [1, 100, 1000, 1 << 20])
def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch, entries: int) -> None:
    student, teacher = features(3, 9, 4).requires_grad_(), features(3, 9, 5, seed=1)
    expected = rkd_angle_loss(student, teacher, items="tokens", backend="reference")
    monkeypatch.setattr(kernel, "sweep_on", lambda device: kernel.eager_sweep)
    monkeypatch.setitem(kernel.BLOCK_ENTRIES, DEVICE.type, entries)
    actual = rkd_angle_loss(student, teacher, items="tokens")
    torch.testing.assert_close(actual, expected)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (actual, expected)]
    torch.testing.assert_close(*gradients)


@each_sweep
@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_too_few_items_for_an_angle(count: int, backend: str) -> None:
    student, teacher = features(count, 4).requires_grad_(), features(count, 3, seed=1)
    loss = rkd_angle_loss(student, teacher, backend=backend)
    loss.backward()
    # with two items every angle is 0 or 1 by definition
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-30)
    torch.testing.assert_close(student.grad, torch.zeros_like(student), rtol=0, atol=1e-14)


@each_sweep
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_collapsed_batch_has_a_finite_loss_and_no_gradient(
    backend: str, dtype: torch.dtype
) -> None:
    one = features(1, 300, dtype=dtype)
    student = one.repeat(12, 1).requires_grad_()
    loss = rkd_angle_loss(student, features(12, 3, seed=1, dtype=dtype), backend=backend)
    loss.backward()
    assert loss.isfinite() and loss > 0
    assert student.grad.eq(0).all()


@each_sweep
@pytest.mark.parametrize("length", [3, 300, 20000])
def test_coincident_items_exert_no_force_on_each_other(length: int) -> None:
    student = features(12, length, dtype=torch.float32)
    student[3:7] = student[2]
    teacher = features(12, 5, seed=1, dtype=torch.float32)
    student.requires_grad_()
    fused = rkd_angle_loss(student, teacher)
    literal = rkd_angle_loss(student.double(), teacher, backend="reference")
    torch.testing.assert_close(fused.double(), literal, rtol=1e-5, atol=0)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (fused, literal)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-9)


@each_sweep
def test_a_distance_that_the_gram_matrix_cannot_resolve_is_none() -> None:
    teacher = features(12, 5, seed=1)
    gradients = []
    for distance in (0.0, 1e-10):
        student = features(12, 300)
        student[6:] = student[:6] + distance * features(6, 300, seed=2)
        student.requires_grad_()
        rkd_angle_loss(student, teacher).backward()
        gradients.append(student.grad)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-12)


@each_sweep
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("count", [1, 2, 6])
def test_bad_values_show_unless_masked(bad: float, backend: str, count: int) -> None:
    for side in range(2):
        sides = [features(count, 4), features(count, 3, seed=1)]
        clean = [x.clone() for x in sides]
        sides[side][0, 1] = bad
        assert not rkd_angle_loss(*sides, backend=backend).isfinite()

        mask = torch.arange(count) > 0
        student = sides[0].requires_grad_()
        loss = rkd_angle_loss(student, sides[1], mask=mask, backend=backend)
        loss.backward()
        expected = rkd_angle_loss(clean[0][1:], clean[1][1:], backend=backend)
        torch.testing.assert_close(loss, expected)
        assert student.grad[0].eq(0).all() and student.grad.isfinite().all()


@each_sweep
def test_overflow_is_not_a_plausible_number() -> None:
    student = features(5, 3) * 1e200
    for backend in ("auto", "reference"):
        assert not rkd_angle_loss(student, features(5, 3, seed=1), backend=backend).isfinite()


@each_sweep
def test_everything_masked_gives_zero_with_a_graph() -> None:
    student = features(5, 3).requires_grad_()
    loss = rkd_angle_loss(student, features(5, 3), mask=torch.zeros(5, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and student.grad.eq(0).all()


@each_sweep
def test_layouts_and_strides() -> None:
    maps = features(2, 4, 3, 5), features(2, 4, 3, 5, seed=1)
    by_items = {
        "samples": [x.flatten(1) for x in maps],
        "pixels": [x.flatten(2).transpose(1, 2) for x in maps],
        "channels": [x.flatten(2) for x in maps],
    }
    for items, tokens in by_items.items():
        expected = rkd_angle_loss(*tokens, items="samples" if items == "samples" else "tokens")
        student = maps[0].to(memory_format=torch.channels_last).requires_grad_()
        actual = rkd_angle_loss(student, maps[1], items=items)
        torch.testing.assert_close(actual, expected)
        (gradient,) = torch.autograd.grad(actual, student)
        (plain,) = torch.autograd.grad(
            rkd_angle_loss(student.contiguous(), maps[1], items=items, backend="reference"), student
        )
        torch.testing.assert_close(gradient, plain)
    one, teacher = features(1, 3).requires_grad_(), features(6, 3, seed=1)
    rkd_angle_loss(one.expand(6, 3) * torch.arange(6)[:, None], teacher).backward()
    assert one.grad.isfinite().all()


def test_the_teacher_is_a_constant_unless_asked() -> None:
    student, teacher = features(5, 3).requires_grad_(), features(5, 3, seed=1).requires_grad_()
    for backend in ("auto", "reference"):
        rkd_angle_loss(student, teacher, backend=backend).backward()
        assert teacher.grad is None
    rkd_angle_loss(student, teacher, detach_teacher=False).backward()
    assert teacher.grad.norm() > 0


@each_sweep
def test_autocast_does_not_round() -> None:
    student, teacher = features(9, 4, dtype=torch.float32), features(9, 4, seed=1)
    student.requires_grad_()
    for backend in ("auto", "reference"):
        plain = rkd_angle_loss(student, teacher.float(), backend=backend)
        with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
            cast = rkd_angle_loss(student, teacher.float(), backend=backend)
        assert torch.equal(plain, cast)
        gradients = [torch.autograd.grad(loss, student)[0] for loss in (plain, cast)]
        assert torch.equal(*gradients)


def loss_and_gradient(student: torch.Tensor, teacher: torch.Tensor, **options) -> list:
    student = student.detach().requires_grad_()
    loss = rkd_angle_loss(student, teacher, **options)
    return [loss.detach(), *torch.autograd.grad(loss, student)]


@each_sweep
@pytest.mark.parametrize("beta", [1e-320, 1e-40, 1e-30, 1e10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_betas(beta: float, dtype: torch.dtype) -> None:
    student, teacher = (features(9, 4, seed=seed, dtype=dtype) for seed in (0, 1))
    student[1], teacher[3] = student[0], teacher[2]
    actual = loss_and_gradient(student, teacher, beta=beta)
    limit = {"beta": beta} if beta > 1 else {"beta": 0.0}
    expected = loss_and_gradient(student.double(), teacher.double(), backend="reference", **limit)
    rtol = 1e-4 if dtype == torch.float32 else 1e-9
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=rtol, atol=rtol * other.abs().max())


# sizes around the compiled sweep's vectors, blocks and panels, and odd numbers of blocks
@pytest.mark.skipif(bool(UNUSABLE), reason=UNUSABLE)
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("count", [1, 2, 3, 17, 31, 32, 33, 63, 64, 65, 97, 130])
def test_every_instruction_set_at_any_size(
    count: int, capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFFKD_CPU_CAPABILITY", capability)
    student, teacher = features(2, count, 4), features(2, count, 5, seed=1)
    student[:, -1] = student[:, 0]
    options = {"items": "tokens", "reduction": "sum", "beta": 0.3}
    expected = loss_and_gradient(student, teacher, backend="reference", **options)
    actual = loss_and_gradient(student, teacher, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    single = loss_and_gradient(student.float(), teacher.float(), **options)
    for one, other in zip(single, expected, strict=True):
        # of three items, two of which coincide, the gradient is 0
        assert (one - other).norm() <= 1e-5 * other.norm() + 1e-12


@pytest.mark.parametrize("matrices", [1, 5])
def test_one_and_two_threads_agree_to_the_bit(matrices: int) -> None:
    student, teacher = (features(matrices, 100, 8, seed=seed).float() for seed in (0, 1))
    before = torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(loss_and_gradient(student, teacher, items="tokens"))
    torch.set_num_threads(before)
    assert all(map(torch.equal, *results))


@each_sweep
def test_repeatable_bit_for_bit() -> None:
    student, teacher = features(40, 8).float().requires_grad_(), features(40, 8, seed=1).float()
    first, second = (rkd_angle_loss(student, teacher) for _ in range(2))
    assert torch.equal(first, second)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (first, second)]
    assert torch.equal(*gradients)


def test_incoming_gradient_multiplies() -> None:
    student, teacher = features(6, 3).requires_grad_(), features(6, 3, seed=1)
    (one,) = torch.autograd.grad(rkd_angle_loss(student, teacher), student)
    (scaled,) = torch.autograd.grad(-7 * rkd_angle_loss(student, teacher), student)
    torch.testing.assert_close(scaled, -7 * one)


def test_second_derivative_raises_and_names_the_reference() -> None:
    student, teacher = features(6, 3).requires_grad_(), features(6, 3, seed=1)
    loss = rkd_angle_loss(student, teacher)
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        (gradient.square().sum() + student.sum()).backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_function_transforms() -> None:
    student, teacher = features(5, 3), features(5, 2, seed=1)

    def loss(x: torch.Tensor, backend: str = "auto") -> torch.Tensor:
        return rkd_angle_loss(x, teacher, backend=backend)

    def reference(x: torch.Tensor) -> torch.Tensor:
        return loss(x, "reference")

    gradient = torch.func.grad(loss)(student)
    (expected,) = torch.autograd.grad(loss(student.requires_grad_()), student)
    torch.testing.assert_close(gradient, expected)
    hessian = torch.autograd.functional.hessian(reference, student)
    torch.testing.assert_close(torch.func.hessian(loss)(student.detach()), hessian)
    batch = torch.stack([student, 2 * student]).detach()
    torch.testing.assert_close(torch.func.vmap(loss)(batch), torch.stack([loss(x) for x in batch]))


@each_sweep
@pytest.mark.parametrize("need_gradient", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(need_gradient: bool, masked: bool) -> None:
    student = features(2, 6, 3, dtype=torch.float32).requires_grad_(need_gradient)
    teacher = features(2, 6, 4, seed=1, dtype=torch.bfloat16)
    arguments = (student, teacher, MASK if masked else None, 0.5, need_gradient)
    torch.library.opcheck(torch.ops.affkd_kernels.rkd_angle.default, arguments)


@each_sweep
@pytest.mark.parametrize("face", ["function", "module"])
def test_one_graph_for_changing_batches(face: str) -> None:
    torch.compiler.reset()
    loss = RKDAngleLoss(weight=2.0)
    if face == "function":
        compiled = torch.compile(
            lambda s, t: rkd_angle_loss(s, t, weight=2.0),
            fullgraph=True,
            dynamic=True,
            backend="aot_eager",
        )
    else:
        compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in (5, 8, 11):
            student = features(count, 4).requires_grad_()
            teacher = features(count, 3, seed=1)
            actual, expected = compiled(student, teacher), loss(student, teacher)
            torch.testing.assert_close(actual, expected)
            gradients = [torch.autograd.grad(x, student)[0] for x in (actual, expected)]
            torch.testing.assert_close(*gradients)


# of the 1024 blocks, which are alike, the first 32 show what all of them hold
MEMORY = """
import itertools, resource, torch
from affkd_kernels.angle import rkd_angle_loss
from affkd_kernels.kernels import angle
torch.set_num_threads(1)
if not {compiled}:
    angle.runs_compiled = lambda device: False
blocks = angle.blocks
angle.blocks = lambda squared: itertools.islice(blocks(squared), 32)
def run(count):
    student = torch.randn(count, 512, requires_grad=True)
    rkd_angle_loss(student, torch.randn(count, 1024)).backward()
run(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(1024)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_peak_memory_for_a_thousand_items(sweep: str) -> None:
    if sweep == "triton":
        pytest.skip("a thousand items take the interpreter minutes")
    # one [B, B, B] tensor would be 4 GiB, one [B, B, D] tensor 2 GiB
    script = MEMORY.format(compiled=sweep == "compiled")
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    assert int(output.stdout) < 100 * 1024


def test_module_is_a_loss_without_state() -> None:
    loss = RKDAngleLoss(weight=50.0, beta=0.5, items="tokens")
    assert isinstance(loss, torch.nn.modules.loss._Loss)
    assert loss.state_dict() == {} and not list(loss.parameters())
    assert repr(loss) == ("RKDAngleLoss(beta=0.5, reduction='mean', weight=50.0, items='tokens')")
    student, teacher = features(2, 6, 3), features(2, 6, 3, seed=1)
    expected = rkd_angle_loss(student, teacher, weight=50.0, beta=0.5, items="tokens", mask=MASK)
    assert torch.equal(loss(student, teacher, MASK), expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"reduction": "none"}, ValueError, "reduction must be one of 'mean', .* got 'none'"),
        ({"backend": "cpp"}, ValueError, "backend must be one of 'auto', 'reference' .* got 'cpp'"),
        ({"items": "rows"}, ValueError, "items must be one of .* got 'rows'"),
        ({"beta": -1.0}, ValueError, "beta must be >= 0, got -1.0"),
        ({"beta": math.nan}, ValueError, "beta must be finite, got nan"),
        ({"weight": "2"}, TypeError, "weight must be a number, got str"),
        ({"detach_teacher": None}, ValueError, "detach_teacher must be one of True, False"),
    ],
)
def test_bad_options(options: dict, error: type, message: str) -> None:
    student, teacher = features(4, 3), features(4, 3)
    with pytest.raises(error, match=message):
        rkd_angle_loss(student, teacher, **options)
    with pytest.raises(error, match=message):
        RKDAngleLoss(**options)


@pytest.mark.parametrize(
    ("student", "teacher", "mask", "error", "message"),
    [
        (
            features(4, 3),
            features(5, 3),
            None,
            ValueError,
            "student and teacher must hold the same",
        ),
        (features(4, 3).int(), features(4, 3), None, TypeError, "student must be .* torch.int32"),
        (features(4, 3), None, None, TypeError, "teacher must be a torch.Tensor, got NoneType"),
        (features(4, 3), features(4, 3), torch.ones(4), TypeError, "mask must be a bool tensor"),
        (features(4, 3), features(4, 3), torch.ones(3).bool(), ValueError, "mask must have shape"),
        (features(4, 3), features(4, 3).to("meta"), None, ValueError, "student's device cpu"),
    ],
)
def test_bad_inputs(student, teacher, mask, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        rkd_angle_loss(student, teacher, mask=mask)
