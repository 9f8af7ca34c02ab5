"""How the C++ kernels run, which must not show: threads, processors, blocks, memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from case_inputs import Inputs, bank, mask, pair, weights
from cases import Triple, base_triples, part
from torch import Tensor

import affkd_kernels as affkd
from affkd_kernels.kernels import cpu, extension

usable, reason = cpu.available()
pytestmark = pytest.mark.skipif(not usable, reason=reason)
CAPABILITIES = extension.usable_capabilities() if usable else []
ALGORITHMS = ("dense", "tiled")

# one of each kind of normalization, together with every affinity and most losses
TRIPLES = (
    Triple(part("gram"), part("row_l2"), part("mse")),
    Triple(part("cosine", shifted=True), part("row_sum"), part("kl")),
    Triple(part("euclidean"), part("mean"), part("smooth_l1")),
    Triple(part("rbf"), part("frobenius"), part("mse")),
    Triple(part("sqeuclidean"), part("max"), part("l1")),
    Triple(part("gram"), part("frobenius", center=True), part("l1")),
    Triple(part("polynomial"), part("row_l1"), part("kl", direction="reverse")),
    Triple(part("cosine"), part("softmax", tau=0.5), part("kl")),
    Triple(part("rbf", taylor_order=2), part("none"), part("mse")),
    Triple(part("gram"), part("softmax", tau=3.0, axis="both"), part("cross_entropy")),
)


@pytest.fixture
def threads() -> Iterator[Any]:
    """Sets the number of threads, for this test only."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def evaluate(inputs: Inputs, triple: Triple, **how: Any) -> list[Tensor]:
    """The loss and the gradients of all leaves."""
    inputs, leaves = inputs.with_grad()
    loss = affkd.affinity_loss(*inputs.features, *triple.build(), **inputs.options, **how)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]


def self_inputs(rows: int, dim: int, seed: int = 0, **options: Any) -> Inputs:
    return pair(seed, rows, dim, teacher_dim=dim + 2, **options)


# one that is shared out in many blocks, a small one that is just not left to one thread, and few
# items of many features
@pytest.mark.parametrize("shape", [(300, 40), (64, 160), (40, 700)], ids=str)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("triple", TRIPLES, ids=str)
def test_one_and_two_threads_agree_to_the_bit(
    triple: Triple, algorithm: str, shape: tuple[int, int], threads: Any
) -> None:
    inputs = self_inputs(*shape).to(torch.float32)
    results = []
    for count in (1, 2):
        threads(count)
        results.append(evaluate(inputs, triple, backend="cpp", algorithm=algorithm))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("count", [3, 9])
def test_a_batch_of_matrices_is_each_matrix_alone(count: int, threads: Any) -> None:
    threads(2)
    inputs = pair(0, count, 70, 9, items="tokens", reduction="none")
    triple = TRIPLES[0]
    whole = evaluate(inputs, triple, backend="cpp", algorithm="dense")
    for n in range(count):
        one = Inputs(inputs.student[n : n + 1], inputs.teacher[n : n + 1], inputs.options)
        for batched, alone in zip(
            whole, evaluate(one, triple, backend="cpp", algorithm="dense"), strict=True
        ):
            assert torch.equal(batched[n : n + 1], alone)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("triple", TRIPLES, ids=str)
def test_every_instruction_set_computes_the_contract(
    triple: Triple, capability: str, algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFFKD_CPU_CAPABILITY", capability)
    inputs = self_inputs(37, 19)
    expected = evaluate(inputs, triple, backend="reference")
    actual = evaluate(inputs, triple, backend="cpp", algorithm=algorithm)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


# whole and torn slices of the features, on both sides of what counts as many
@pytest.mark.parametrize("rows, dim", [(3, 47), (3, 48), (37, 768), (70, 1300)])
@pytest.mark.parametrize("triple", TRIPLES, ids=str)
def test_few_items_of_many_features(triple: Triple, rows: int, dim: int) -> None:
    masked = self_inputs(rows, dim, mask=mask(1, rows), diagonal="zero")
    for inputs in (self_inputs(rows, dim), masked):
        expected = evaluate(inputs, triple, backend="reference")
        actual = evaluate(inputs, triple, backend="cpp", algorithm="dense")
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


# around what counts as few and as many, and blocks of keys that are torn
@pytest.mark.parametrize(
    "queries, keys, dim", [(1, 8, 32), (5, 39, 40), (5, 41, 40), (33, 300, 70)]
)
@pytest.mark.parametrize("triple", TRIPLES, ids=str)
def test_few_queries_facing_a_bank(
    triple: Triple, queries: int, keys: int, dim: int, threads: Any
) -> None:
    options = {"mask": mask(1, queries), "key_mask": mask(2, keys)}
    plain = bank(4, queries, dim, keys=keys, teacher_dim=dim + 2)
    for inputs in (plain, Inputs(*plain.features, {**plain.options, **options})):
        expected = evaluate(inputs, triple, backend="reference")
        actual = evaluate(inputs, triple, backend="cpp", algorithm="dense")
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    threads(1)
    alone = evaluate(plain, triple, backend="cpp", algorithm="dense")
    threads(2)
    shared = evaluate(plain, triple, backend="cpp", algorithm="dense")
    assert all(torch.equal(one, two) for one, two in zip(alone, shared, strict=True))


# what tells a shifted cosine of 0 from one that rounding left above it
OPPOSITES = (
    Triple(part("cosine", shifted=True), part("mean"), part("l1")),
    Triple(part("cosine", shifted=True), part("row_sum"), part("kl")),
    Triple(part("polynomial", offset=1.0, unit=True), part("mean"), part("mse")),
)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("triple", OPPOSITES, ids=str)
def test_a_single_feature_is_its_sign(
    triple: Triple, dtype: torch.dtype, capability: str, algorithm: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of one feature all directions are equal or opposite, and no gradient turns them."""
    monkeypatch.setenv("AFFKD_CPU_CAPABILITY", capability)
    for seed, rows in enumerate((5, 40, 130)):
        inputs = pair(seed, rows, 1, teacher_dim=1).to(dtype)
        exact, _ = evaluate(inputs.to(torch.float64), triple, backend="reference")
        loss, gradient = evaluate(inputs, triple, backend="cpp", algorithm=algorithm)
        # what sums along a row may round
        within = rows * torch.finfo(dtype).eps
        torch.testing.assert_close(loss.double(), exact, rtol=within, atol=0)
        assert not gradient.any()


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFFKD_CPU_CAPABILITY", "mmx")
    with pytest.raises(RuntimeError, match="AFFKD_CPU_CAPABILITY"):
        affkd.affinity_loss(torch.ones(2, 1), torch.ones(2, 1), backend="cpp", algorithm="dense")


# sizes around the micro-kernel's rows and panels and the sweeps' blocks
SHAPES = ((1, 1), (2, 1), (3, 19), (37, 3), (129, 1), (129, 33), (257, 5))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_self_affinity_of_any_size(shape: tuple[int, int], algorithm: str) -> None:
    for seed, triple in enumerate(TRIPLES):
        inputs = self_inputs(*shape, seed=seed)
        expected = evaluate(inputs, triple, backend="reference")
        actual = evaluate(inputs, triple, backend="cpp", algorithm=algorithm)
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10, msg=str(triple))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("sizes", [(1, 3), (3, 1), (37, 129), (300, 65), (65, 300)], ids=str)
def test_cross_affinity_of_any_size(sizes: tuple[int, int], algorithm: str) -> None:
    queries, keys = sizes
    for seed, triple in enumerate(TRIPLES):
        inputs = bank(seed, queries, 19, keys=keys, teacher_dim=3)
        expected = evaluate(inputs, triple, backend="reference")
        actual = evaluate(inputs, triple, backend="cpp", algorithm=algorithm)
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10, msg=str(triple))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_masks_that_cross_blocks(algorithm: str) -> None:
    rows = 270
    calls = (
        {"mask": mask(1, rows), "diagonal": "zero", "reduction": "batchmean"},
        {"pair_mask": mask(2, rows, rows, keep=0.3), "mask": mask(3, rows)},
        {"row_weight": weights(4, rows), "diagonal": "exclude", "mask": mask(5, rows)},
    )
    for number, triple in enumerate(base_triples()):
        options = calls[number % len(calls)]
        if triple.forbids_sparse_pairs and number % len(calls) > 0:
            continue
        inputs = pair(number, rows, 6, teacher_dim=4, **options)
        expected = evaluate(inputs, triple, backend="reference")
        actual = evaluate(inputs, triple, backend="cpp", algorithm=algorithm)
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10, msg=str(triple))


PEAK = """
import resource, sys, torch, affkd_kernels as affkd
torch.set_num_threads(1)

def step(rows):
    student = torch.randn(rows, 16, requires_grad=True)
    how = dict(backend="cpp", algorithm="tiled")
    affkd.affinity_loss(student, torch.randn(rows, 16), "rbf", "row_l2", "mse", **how).backward()

step(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(4000)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_tiled_holds_no_matrix_of_pairs() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, timeout=120
    )
    matrix_mib = 4000 * 4000 * 4 / 2**20
    assert float(done.stdout) < matrix_mib / 4


# a first call, forward and backward, in a process that has no scratch memory yet
EXTRA = """
import resource, sys, torch, affkd_kernels as affkd
torch.set_num_threads(2)
rows, dim, masked = map(int, sys.argv[2:])
loss = affkd.preset(sys.argv[1], backend="cpp", algorithm="tiled")
loss(torch.ones(8, 8, requires_grad=True), torch.ones(8, 8)).backward()

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

student, teacher = torch.randn(rows, dim, requires_grad=True), torch.randn(rows, dim)
mask = torch.arange(rows) % 8 > 0 if masked else None
before = peak()
loss(student, teacher, mask=mask).backward()
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
@pytest.mark.parametrize("masked", [0, 1])
@pytest.mark.parametrize("preset", ["sp", "pkt", "rkd_distance", "cka"])
def test_tiled_holds_no_copy_of_the_features(preset: str, masked: int) -> None:
    rows, dim = 2048, 512
    command = [sys.executable, "-c", EXTRA, preset, str(rows), str(dim), str(masked)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    # two gradients: the kernels' own, and the one that autograd hands on
    gradients_mib = 2 * rows * dim * 4 / 2**20
    assert float(done.stdout) < gradients_mib + 8


# of an affinity that is not what is stored, its columns are a copy
COLUMNS = """
import resource, sys, torch, affkd_kernels as affkd
torch.set_num_threads(1)

def step(rows, columns):
    # rows of a page each, so that memory that is taken is memory that is touched
    student, teacher, keys = (torch.randn(n, 4) for n in (rows, rows, columns))
    how = dict(backend="cpp", algorithm="dense", student_keys=keys, teacher_keys=keys)
    affkd.affinity_loss(student, teacher, "polynomial", "softmax(axis=both)", "kl", **how)

step(64, 64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(8000, 1000)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_dense_holds_two_matrices_of_pairs_and_no_copy_of_them() -> None:
    command = [sys.executable, "-c", COLUMNS]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    matrix_mib = 8000 * 1000 * 4 / 2**20
    # a block of columns at a time is copied, and turned around
    assert float(done.stdout) < 3 * matrix_mib


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("masked", [False, True])
def test_both_axes_in_one_call_are_the_mean_of_the_two(algorithm: str, masked: bool) -> None:
    options = {"mask": mask(1, 150), "key_mask": mask(2, 210)} if masked else {}
    inputs = bank(0, 150, 12, keys=210, teacher_dim=9, reduction="batchmean", **options)

    def along(axis: str) -> list[Tensor]:
        triple = Triple(part("gram"), part("softmax", tau=3.0, axis=axis), part("kl"))
        return evaluate(inputs, triple, backend="cpp", algorithm=algorithm)

    for both, row, column in zip(along("both"), along("row"), along("column"), strict=True):
        torch.testing.assert_close(both, (row + column) / 2, rtol=1e-10, atol=1e-14)


LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "every-second-row": lambda x: x.repeat_interleave(2, 0)[::2],
    "maps": lambda x: x.unflatten(1, (2, -1)),
}


@pytest.mark.parametrize("student_layout", LAYOUTS)
@pytest.mark.parametrize("teacher_layout", LAYOUTS)
def test_a_call_without_options_is_one_that_leaves_nothing_out(
    student_layout: str, teacher_layout: str
) -> None:
    inputs = self_inputs(40, 12)
    features = LAYOUTS[student_layout](inputs.student), LAYOUTS[teacher_layout](inputs.teacher)
    all_rows = torch.ones(40, dtype=torch.bool)
    for triple in TRIPLES:
        plain = evaluate(Inputs(*features), triple, backend="cpp", algorithm="dense")
        masked = evaluate(
            Inputs(*features, {"mask": all_rows}), triple, backend="cpp", algorithm="dense"
        )
        for one, other in zip(plain, masked, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


def test_backward_may_run_twice_over_one_graph() -> None:
    inputs = self_inputs(40, 12)
    student = inputs.student.detach().requires_grad_()
    loss = affkd.affinity_loss(student, inputs.teacher, *TRIPLES[0].build(), backend="cpp")
    (once,) = torch.autograd.grad(loss, student, torch.tensor(3.0).double(), retain_graph=True)
    (again,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(once, 3 * again)
