"""What this machine can run, and whether each backend computes the right thing on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import affkd_kernels as affkd
from affkd_kernels.kernels import cuda, extension
from affkd_kernels.trainer.run_folder import environment

# one triple of each kind of statistic, with a sharp and a smooth loss among them
TRIPLES = (
    ("gram", "row_l2", "mse"),
    ("gram", "frobenius(center=True)", "mse"),
    ("cosine(shifted=True)", "row_sum", "kl"),
    ("euclidean", "mean", "smooth_l1"),
    ("rbf(gamma=0.4)", "frobenius", "mse"),
    ("sqeuclidean", "max", "l1"),
    ("cosine", "softmax(tau=0.1)", "cross_entropy"),
)
# (backend, algorithm): the ways to compute a triple
IMPLEMENTATIONS = (
    ("reference", "dense"),
    ("torch", "factored"),
    ("cpp", "dense"),
    ("cpp", "tiled"),
    ("triton", "dense"),
    ("triton", "tiled"),
)
TOLERANCE = 1e-4  # of float32 against float64, relative to the largest entry


@dataclass
class Check:
    """What one implementation did with the triples on one device."""

    device: str
    backend: str
    algorithm: str
    errors: list[float] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> bool:
        # not (a <= b): a NaN is wrong too
        return any(not error <= TOLERANCE for error in self.errors)

    @property
    def verdict(self) -> str:
        if not self.errors:
            return "not usable"
        return "WRONG" if self.wrong else "right"


def doctor() -> int:
    """Print versions and a check of every backend; 1 where one of them is wrong, else 0."""
    console = Console()
    facts = environment()
    for name in ("python", "platform", "cores", "threads", "cuda", "gpus"):
        console.print(f"{name:>10}  {facts[name]}", markup=False, highlight=False)
    for name, version in facts["packages"].items():
        console.print(f"{name:>14}  {version or 'not installed'}", highlight=False)
    for name, state in libraries().items():
        console.print(f"{name:>14}  {state}", markup=False, highlight=False, soft_wrap=True)
    checks = check_all()
    console.print(_table(checks))
    # one reason a backend, since its algorithms are missing for the same one
    for reason in {c.backend: c.refusals[0] for c in checks if not c.errors}.values():
        console.print(reason, markup=False, highlight=False, soft_wrap=True)
    return int(any(check.wrong for check in checks))


def libraries() -> dict[str, str]:
    """What the compiled libraries hold, or why they cannot be used here."""
    capabilities = ", ".join(extension.usable_capabilities())
    architectures = ", ".join(f"sm_{number}" for number in extension.cuda_architectures())
    cuda_state = extension.load_cuda() or f"for {architectures} and newer"
    if not extension.load_cuda() and not cuda.available()[0]:
        cuda_state += f"; loaded, not used: {cuda.available()[1]}"
    return {
        "C++ for CPUs": extension.load() or f"for {capabilities}",
        "C++ for GPUs": cuda_state,
    }


def check_all() -> list[Check]:
    """Every implementation on every device, each against float64 on the CPU."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    checks = [Check(device, *way) for device, way in product(devices, IMPLEMENTATIONS)]
    for triple in TRIPLES:
        student, teacher = _features()
        expected = _loss_and_gradient(student, teacher, triple, *IMPLEMENTATIONS[0])
        for check in checks:
            _try(check, triple, student, teacher, expected)
    return checks


def _features() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((96, 17), (96, 33))
    student, teacher = (torch.randn(shape, generator=generator).double() for shape in shapes)
    return student, teacher


def _loss_and_gradient(
    student: Tensor, teacher: Tensor, triple: tuple[str, str, str], backend: str, algorithm: str
) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    loss = affkd.affinity_loss(leaf, teacher, *triple, backend=backend, algorithm=algorithm)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach().double().cpu(), gradient.double().cpu()


def _try(
    check: Check,
    triple: tuple[str, str, str],
    student: Tensor,
    teacher: Tensor,
    expected: tuple[Tensor, Tensor],
) -> None:
    try:
        found = _loss_and_gradient(
            student.to(check.device, torch.float32),
            teacher.to(check.device, torch.float32),
            triple,
            check.backend,
            check.algorithm,
        )
    except RuntimeError as refusal:
        check.refusals.append(str(refusal))
        return
    differences = [
        ((got - right).abs().max() / right.abs().max()).item()
        for got, right in zip(found, expected, strict=True)
    ]
    check.errors.extend(differences)


def _table(checks: list[Check]) -> Table:
    table = Table("device", "backend", "algorithm", "triples", "largest error", "verdict")
    for check in checks:
        triples = f"{len(check.errors) // 2} of {len(TRIPLES)}"
        error = f"{max(check.errors):.1e}" if check.errors else "-"
        table.add_row(check.device, check.backend, check.algorithm, triples, error, check.verdict)
    return table
