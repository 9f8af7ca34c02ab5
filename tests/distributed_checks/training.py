"""Training: DDP and FSDP, half precision, compiled students, constants and second derivatives."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from case_inputs import features
from ranks import Ranks
from torch import Tensor, nn

import affkd_kernels as affkd

from . import EXACT, SINGLE


class Student(nn.Module):
    """Gives what a loss on features takes, and a second path, as a classifier would be."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.body(x)
        return hidden, self.head(hidden)


TERMS = (
    ("row_l2", {"affinity": "gram", "reduction": "batchmean"}),
    ("mean", {"affinity": "euclidean", "loss": "smooth_l1"}),
    ("row_sum", {"affinity": "cosine(shifted=True)", "loss": "kl", "weight": 7.0}),
    ("frobenius(center=True)", {"affinity": "gram", "algorithm": "factored"}),
)


def training_loss(
    outputs: tuple[Tensor, Tensor], teacher: Tensor, group: Any, divisor: float
) -> Tensor:
    hidden, logits = outputs
    terms = {
        f"term_{i}": (
            affkd.AffinityLoss(normalization=normalization, process_group=group, **options),
            *("hidden", "hidden"),
        )
        for i, (normalization, options) in enumerate(TERMS)
    }
    total, _ = affkd.MultiLoss(terms)({"hidden": hidden}, {"hidden": teacher})
    return total + logits.square().sum() / divisor


def check_training_steps(ranks: Ranks) -> None:
    """Parameter gradients under DDP and FSDP are those of one process with the whole batch."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    sizes = ranks.sizes(14, 2)
    own = ranks.own(sizes)
    x, teacher = features(1, 14, 6), features(2, 14, 5)
    torch.manual_seed(0)
    single = Student().double()
    weights_of_all = {k: v.clone() for k, v in single.state_dict().items()}
    training_loss(single(x), teacher, None, divisor=14).backward()

    def fresh() -> Student:
        student = Student().double()
        student.load_state_dict(weights_of_all)
        return student

    # a rank's own mean, scaled so that averaging over ranks gives the mean over the batch
    divisor = 14 / ranks.size
    replicated = DistributedDataParallel(fresh(), process_group=ranks.group)
    sharded = fresh()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mesh = init_device_mesh("cpu", (ranks.size,))
        fully_shard(sharded.body, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
    for name, student in (("DDP", replicated), ("FSDP", sharded)):
        training_loss(student(x[own]), teacher[own], ranks.group, divisor).backward()
        parameters = (student.module if name == "DDP" else student).named_parameters()
        wanted = dict(single.named_parameters())
        for parameter, value in parameters:
            gradient = value.grad.full_tensor() if name == "FSDP" else value.grad
            want = wanted[parameter].grad
            ranks.equal(f"gradient of parameters, {name}: {parameter}", gradient, want, want, EXACT)


HALF_TRIPLES = (("gram", "row_l2", "mse"), ("cosine", "softmax", "kl"), ("rbf", "max", "l1"))


def check_half_precision(ranks: Ranks) -> None:
    """Rows travel in half precision and are summed in float32, as one process does it."""
    own = ranks.own(ranks.sizes(12, 3))
    for dtype in (torch.bfloat16, torch.float16):
        s, t = features(1, 12, 8).to(dtype), features(2, 12, 6).to(dtype)
        for triple in HALF_TRIPLES:
            one = s.clone().requires_grad_()
            whole = affkd.affinity_loss(one, t, *triple, reduction="sum")
            (64 * whole).backward()
            mine = s[own].clone().requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = affkd.affinity_loss(
                    mine, t[own], *triple, reduction="sum", process_group=ranks.group
                )
            (64 * loss).backward()
            assert loss.dtype == torch.float32 and mine.grad.dtype == dtype
            ranks.equal(f"loss: {dtype}", loss.detach(), whole.detach(), whole.detach(), SINGLE)
            # rounded once here and once there, to the dtype's own precision
            got, want = mine.grad.float() / ranks.size, one.grad[own].float()
            within = torch.finfo(dtype).eps
            ranks.equal(f"gradient: {dtype}", got, want, one.grad.float(), within)


def check_constants(ranks: Ranks) -> None:
    """No graph without grad; a teacher that requires grad stays a constant, unless asked."""
    own = ranks.own(ranks.sizes(8, 3))
    s, t = features(1, 8, 4), features(2, 8, 3)
    for triple in (("gram", "row_l2", "mse"), ("rbf", "frobenius", "l1"), ("rbf", "none", "mse")):
        options = {"process_group": ranks.group}
        want = affkd.affinity_loss(s, t, *triple)
        with torch.no_grad():
            student = s[own].clone().requires_grad_()
            loss = affkd.affinity_loss(student, t[own], *triple, **options)
        assert not loss.requires_grad
        ranks.equal("loss: no_grad", loss, want, want, EXACT)
        if ranks.rank == 0:
            # nobody differentiates: what requires grad may differ
            student.requires_grad_(False)
        for algorithm in ("auto", "factored") if triple[0] == "gram" else ("auto",):
            with torch.no_grad():
                loss = affkd.affinity_loss(student, t[own], *triple, algorithm=algorithm, **options)
            ranks.equal("loss: no_grad", loss, want, want, EXACT)
        student.requires_grad_()
        teacher = t[own].clone().requires_grad_()
        assert not affkd.affinity_loss(s[own], teacher, *triple, **options).requires_grad
        with torch.inference_mode():
            frozen = t[own].clone()
        affkd.affinity_loss(student, frozen, *triple, **options).backward()

        one = [x.clone().requires_grad_() for x in (s, t)]
        mine = [x[own].clone().requires_grad_() for x in (s, t)]
        affkd.affinity_loss(*one, *triple, detach_teacher=False).backward()
        affkd.affinity_loss(*mine, *triple, detach_teacher=False, **options).backward()
        for got, wanted in zip(mine, one, strict=True):
            what = "gradient: teacher with a gradient"
            ranks.equal(what, got.grad / ranks.size, wanted.grad[own], wanted.grad, EXACT)


def check_second_derivative_of_the_reference(ranks: Ranks) -> None:
    own = ranks.own(ranks.sizes(6, 3))
    s, t = features(1, 6, 3), features(2, 6, 3)
    direction = features(4, 6, 3)

    def curvature(loss: Any, x: Tensor, y: Tensor, direction: Tensor, **options: Any) -> Tensor:
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(x, y, **options), x, create_graph=True)
        (second,) = torch.autograd.grad((slope * direction).sum(), x)
        return second

    for triple in (("gram", "row_l2", "mse"), ("rbf", "frobenius", "mse")):
        loss = affkd.AffinityLoss(*triple, reduction="sum", backend="reference")
        want = curvature(loss, s, t, direction)
        loss.process_group = ranks.group
        got = curvature(loss, s[own], t[own], direction[own])
        # each rank's slope is that of the sum over ranks
        ranks.equal(f"second derivative: {triple}", got / ranks.size, want[own], want, EXACT)


def check_compiled_students(ranks: Ranks) -> None:
    """The loss breaks the graph, and computes the same."""
    own = ranks.own([4] * ranks.size)
    x, t = features(1, 4 * ranks.size, 6), features(2, 4 * ranks.size, 4)
    student = nn.Linear(6, 5).double()
    criterion = affkd.AffinityLoss("gram", "row_l2", "mse", process_group=ranks.group)
    angles = affkd.RKDAngleLoss(process_group=ranks.group)

    def step(x: Tensor, t: Tensor) -> Tensor:
        hidden = student(x)
        return criterion(hidden, t) + angles(hidden, t)

    want = step(x[own], t[own])
    got = torch.compile(step, backend="aot_eager")(x[own], t[own])
    ranks.equal("loss: compiled", got.detach(), want.detach(), want.detach(), EXACT)
    (slope,) = torch.autograd.grad(want, student.weight)
    (compiled,) = torch.autograd.grad(got, student.weight)
    ranks.equal("gradient: compiled", compiled, slope, slope, EXACT)
