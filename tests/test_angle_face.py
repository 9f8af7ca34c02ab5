"""RKD's angle loss as a module, an op and in a graph; its memory; its errors."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from angle_inputs import MASK, each_sweep, features

from affkd_kernels.angle import RKDAngleLoss, rkd_angle_loss


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
