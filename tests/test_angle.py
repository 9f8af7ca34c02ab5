"""RKD's angle loss: value and gradient against the definition, on every way to sum it up."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from angle_inputs import DEVICE, MASK, each_sweep, features, loss_and_gradient

from affkd_kernels.angle import REDUCTIONS, _reference_angles, rkd_angle_loss
from affkd_kernels.kernels import angle as kernel
from affkd_kernels.kernels import extension

UNUSABLE = "" if kernel.runs_compiled(DEVICE) else f"no compiled sweep on {DEVICE.type!r} devices"
CAPABILITIES = extension.usable_capabilities() if DEVICE.type == "cpu" and not UNUSABLE else ()


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
