"""Who calls, from which thread or process, must not show in the result."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from case_inputs import Inputs, pair
from cases import Triple, part
from torch import Tensor

import affkd_kernels as affkd
from affkd_kernels.kernels import cpu

usable, reason = cpu.available()
pytestmark = pytest.mark.skipif(not usable, reason=reason)

TRIPLES = (
    Triple(part("gram"), part("row_l2"), part("mse")),
    Triple(part("rbf"), part("frobenius", center=True), part("l1")),
    Triple(part("cosine"), part("softmax", tau=0.5, axis="both"), part("kl")),
    Triple(part("euclidean"), part("mean"), part("smooth_l1")),
)
CALLS = [
    (pair(seed, rows, 24, teacher_dim=10).to(torch.float32), triple, algorithm)
    for seed, rows in enumerate((70, 300))
    for triple in TRIPLES
    for algorithm in ("dense", "tiled")
]


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def evaluate(inputs: Inputs, triple: Triple, algorithm: str) -> list[Tensor]:
    student = inputs.student.detach().requires_grad_()
    how = {"backend": "cpp", "algorithm": algorithm}
    loss = affkd.affinity_loss(student, inputs.teacher, *triple.build(), **how)
    return [loss.detach(), *torch.autograd.grad(loss, student)]


def evaluate_all() -> list[Tensor]:
    return [result for call in CALLS for result in evaluate(*call)]


@pytest.mark.parametrize("kernel_threads", [1, 2])
def test_python_threads_that_call_at_once_do_not_disturb_each_other(kernel_threads: int) -> None:
    torch.set_num_threads(1)
    expected = evaluate_all()
    callers = 4
    together = Barrier(callers, timeout=60)

    def call_repeatedly(_: int) -> bool:
        # the number of threads belongs to the thread that calls
        torch.set_num_threads(kernel_threads)
        equal = True
        for _round in range(3):
            together.wait()
            equal &= all(map(torch.equal, evaluate_all(), expected))
        return equal

    with ThreadPoolExecutor(callers) as pool:
        assert all(pool.map(call_repeatedly, range(callers)))


def test_the_number_of_threads_may_change_between_calls() -> None:
    results = []
    for count in (2, 1, 3, 2):
        torch.set_num_threads(count)
        results.append(evaluate_all())
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


FORK = """
import os, signal, sys, torch, affkd_kernels as affkd

def evaluate():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 700, 48, generator=generator).unbind()
    student.requires_grad_()
    results = []
    for algorithm in ("dense", "tiled"):
        how = dict(backend="cpp", algorithm=algorithm)
        loss = affkd.affinity_loss(student, teacher, "rbf", "row_l2", "mse", **how)
        results += [loss.detach(), *torch.autograd.grad(loss, student)]
    return results

torch.set_num_threads(int(sys.argv[1]))
before = evaluate()
child = os.fork()
if child == 0:
    signal.alarm(30)  # a child that hangs does not outlive the test
    torch.set_num_threads(1)
    os._exit(0 if all(map(torch.equal, before, evaluate())) else 1)
failed = os.waitpid(child, 0)[1] != 0
sys.exit(failed or not all(map(torch.equal, before, evaluate())))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_child_computes_with_one_thread(threads: int) -> None:
    """As the workers of a DataLoader do: torch's own pool of threads does not survive a fork."""
    command = [sys.executable, "-c", FORK, str(threads)]
    subprocess.run(command, check=True, timeout=60)
