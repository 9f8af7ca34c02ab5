"""What holds on several ranks: the loss and gradients of one process. Run by `ranks.py`."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from case_inputs import Inputs, features, mask, pair, seed_of, weights
from cases import base_triples, call, covering, valid_triples
from ranks import Ranks
from torch import Tensor, nn

import affkd_kernels as affkd
from affkd_kernels.distributed import gather_rows

EXACT = 1e-12  # relative, float64
SINGLE = 2e-5  # relative, float32: sums of some hundred terms in another order

# per row of the batch, on every rank its own; what is not named here every rank holds alike
_PER_ROW = ("mask", "row_weight", "pair_mask")


def compare(ranks: Ranks, what: str, inputs: Inputs, triple: Any, within: float = EXACT) -> None:
    """One call over all ranks against the same call in this process."""
    one, one_leaves = inputs.with_grad()
    whole = affkd.affinity_loss(*one.features, *triple.build(), **one.options)
    rows_of_keys = triple.axis == "column" and "student_keys" in inputs.options
    own = ranks.own(ranks.sizes(len(inputs.student), seed_of(what)))
    part, leaves = own_part(inputs, own, rows_of_keys).with_grad()
    loss = affkd.affinity_loss(
        *part.features, *triple.build(), **part.options, process_group=ranks.group
    )
    objective, one_objective, factor = loss, whole, 1 / ranks.size
    if inputs.options.get("reduction") == "none":
        # each rank differentiates a scalar of its own; the sum over ranks is what one process has
        rows = slice(None) if rows_of_keys else own
        coefficients = features(3, *whole.shape).to(whole)
        objective = (loss * coefficients[rows]).sum()
        one_objective = (whole * coefficients).sum() * (ranks.size if rows_of_keys else 1)
        whole, factor = whole[rows], 1.0
    ranks.equal(f"loss: {what}", loss.detach(), whole.detach(), whole.detach(), within)
    objective.backward()
    one_objective.backward()
    wanted = one_leaves[0].grad
    ranks.equal(f"gradient: {what}", leaves[0].grad * factor, wanted[own], wanted, within)
    for leaf, one_leaf in zip(leaves[1:], one_leaves[1:], strict=True):
        want = one_leaf.grad
        if leaf.dim() and inputs.options.get("items", "samples") != "samples":
            # keys of a rank's own matrices
            got, want = leaf.grad * factor, want[own]
        else:
            got = ranks.sum(leaf.grad) * factor
        # a scale's gradient may be 0 but for the rounding of terms as large as the loss
        scale = want if want.dim() else torch.stack((want, whole.detach().sum()))
        ranks.equal(f"gradient of keys: {what}", got, want, scale, within)


def own_part(inputs: Inputs, own: slice, rows_of_keys: bool = False) -> Inputs:
    """This rank's part of a call: its rows, or for other items than samples its matrices."""
    per_row = [*_PER_ROW] if not rows_of_keys else ["mask", "pair_mask"]
    if inputs.options.get("items", "samples") != "samples":
        per_row += ["row_weight", "key_mask", "student_keys", "teacher_keys"]
    options = {k: v[own] if k in per_row else v for k, v in inputs.options.items()}
    return Inputs(inputs.student[own], inputs.teacher[own], options)


def check_every_kind_of_call(ranks: Ranks) -> None:
    """Every call meets every variant of every component."""
    chosen = covering(valid_triples()[:: 4 if ranks.size == 2 else 9], calls_each=1)
    for triple, one in chosen:
        if one.name != "one-matrix-of-tokens":
            what = f"{triple} {one}"
            compare(ranks, what, one.make(seed_of(what)), triple)


def check_every_base_triple(ranks: Ranks) -> None:
    """Of one large enough batch, without any option."""
    for triple in base_triples():
        compare(ranks, f"{triple}", pair(seed_of(triple), 9, 4, teacher_dim=3), triple)


def check_float32(ranks: Ranks) -> None:
    for triple in base_triples()[::7]:
        inputs = pair(seed_of(triple), 24, 8, teacher_dim=6).to(torch.float32)
        compare(ranks, f"float32 {triple}", inputs, triple, SINGLE)


def check_factored(ranks: Ranks) -> None:
    """Moments travel instead of rows."""
    factored = [
        triple
        for triple in valid_triples()
        if triple.affinity.name in ("gram", "cosine", "sqeuclidean")
        and triple.affinity.get("clamp_min") is None
        and triple.normalization.name in ("none", "row_l2", "frobenius")
        and triple.loss.name == "mse"
    ]
    names = ("self", "self-sum", "self-batchmean", "mask", "row-weight-mask-batchmean")
    for triple in factored:
        centered = bool(triple.normalization.get("center"))
        for name in (*names, "diagonal-zero", "diagonal-exclude"):
            if not (centered and name.startswith("diagonal")):
                inputs = call(name).make(seed_of(triple, name))
                inputs.options["algorithm"] = "factored"
                compare(ranks, f"factored {triple} {name}", inputs, triple)


def check_reference(ranks: Ranks) -> None:
    for triple in base_triples()[::5]:
        inputs = pair(seed_of(triple), 7, 3, backend="reference", mask=mask(1, 7))
        compare(ranks, f"reference {triple}", inputs, triple)


def check_ranks_without_rows_or_valid_rows(ranks: Ranks) -> None:
    """A rank with rows that are all masked, one with none at all, and a batch of nothing."""
    last = ranks.size - 1
    for name in affkd.list_presets():
        if affkd.describe(name).triple is None or name in ("nst", "ickd"):
            continue
        for sizes in ([5] * last + [0], [0] * last + [5], [4] * ranks.size, [0] * ranks.size):
            own = ranks.own(sizes)
            s, t = features(1, sum(sizes), 4), features(2, sum(sizes), 4)
            valid = torch.ones(sum(sizes), dtype=torch.bool)
            if min(sizes) == 4:
                # all rows of rank 0, which hold NaN
                valid[:4] = False
                s[:4] = torch.nan
            criterion = affkd.preset(name, items="samples")
            one = s.clone().requires_grad_()
            whole = call_preset(name, criterion, one, t, valid)
            whole.backward()
            mine = s[own].clone().requires_grad_()
            criterion.process_group = ranks.group
            loss = call_preset(name, criterion, mine, t[own], valid[own])
            loss.backward()
            what = f"{name} {sizes}"
            ranks.equal(f"loss: {what}", loss.detach(), whole.detach(), whole.detach(), EXACT)
            got = mine.grad / ranks.size
            ranks.equal(f"gradient: {what}", got, one.grad[own], one.grad, EXACT)


def call_preset(
    name: str, criterion: nn.Module, student: Tensor, teacher: Tensor, valid: Tensor | None
) -> Tensor:
    """Keys for those presets that need some."""
    options: dict[str, Any] = {}
    if name in ("seed", "compress", "clip_affinity"):
        options["student_keys"] = features(5, 8, student.shape[1])
        options["teacher_keys"] = features(6, 8, teacher.shape[1])
    return criterion(student, teacher, valid, **options)


def check_presets_in_their_own_layout(ranks: Ranks) -> None:
    maps = ("nst", "ickd")
    for name in affkd.list_presets():
        shape = (7, 3, 4, 4) if name in maps else (7, 5, 3) if "tokens" in layout(name) else (7, 6)
        s, t = features(1, *shape), features(2, *shape)
        own = ranks.own(ranks.sizes(7, seed_of(name)))
        one = s.clone().requires_grad_()
        if name in ("seed", "compress", "clip_affinity"):
            whole = call_preset(name, affkd.preset(name), one, t, None)
        else:
            whole = affkd.preset(name)(one, t)
        whole.backward()
        mine = s[own].clone().requires_grad_()
        criterion = affkd.preset(name, process_group=ranks.group)
        loss = call_preset(name, criterion, mine, t[own], None)
        loss.backward()
        ranks.equal(f"loss: {name}", loss.detach(), whole.detach(), whole.detach(), EXACT)
        got = mine.grad / ranks.size
        ranks.equal(f"gradient: {name}", got, one.grad[own], one.grad, EXACT)


def layout(name: str) -> str:
    return str(affkd.describe(name).options.get("items", "samples"))


def check_angle(ranks: Ranks) -> None:
    for reduction in ("mean", "batchmean", "matrixmean", "sum"):
        for shape, items in (((7, 4), "samples"), ((5, 4, 3), "tokens")):
            for valid in (None, mask(4, *shape[:-1])):
                s, t = features(1, *shape), features(2, *shape)
                own = ranks.own(ranks.sizes(shape[0], 4))
                options: dict[str, Any] = {"reduction": reduction, "items": items}
                one = s.clone().requires_grad_()
                whole = affkd.rkd_angle_loss(one, t, mask=valid, **options)
                mine = s[own].clone().requires_grad_()
                criterion = affkd.RKDAngleLoss(**options, process_group=ranks.group)
                loss = criterion(mine, t[own], None if valid is None else valid[own])
                whole.backward()
                loss.backward()
                what = f"angle {reduction} {items}"
                ranks.equal(f"loss: {what}", loss.detach(), whole.detach(), whole.detach(), EXACT)
                got = mine.grad / ranks.size
                ranks.equal(f"gradient: {what}", got, one.grad[own], one.grad, EXACT)


def check_contrast_of_two_gathered_modalities(ranks: Ranks) -> None:
    """CLIP: each rank has some images and their texts, and the softmax runs over all of both."""
    scale = torch.tensor(3.0, dtype=torch.float64)
    images, texts = (features(i, 9, 5) for i in (1, 2))
    targets = [features(i, 9, 4) for i in (3, 4)]
    own = ranks.own(ranks.sizes(9, 5))
    one = [x.clone().requires_grad_() for x in (images, texts, scale)]
    criterion = affkd.preset("clip_affinity")
    whole = criterion(
        one[0], targets[0], student_keys=one[1], teacher_keys=targets[1], student_scale=one[2]
    )
    whole.backward()
    mine = [x.clone().requires_grad_() for x in (images[own], texts[own], scale)]
    criterion.process_group = ranks.group
    loss = criterion(
        mine[0],
        targets[0][own],
        student_keys=gather_rows(mine[1], ranks.group),
        teacher_keys=gather_rows(targets[1][own], ranks.group),
        student_scale=mine[2],
    )
    loss.backward()
    ranks.equal("loss: clip", loss.detach(), whole.detach(), whole.detach(), EXACT)
    for got, want in zip(mine[:2], one[:2], strict=True):
        ranks.equal("gradient: clip", got.grad / ranks.size, want.grad[own], want.grad, EXACT)
    got = ranks.sum(mine[2].grad) / ranks.size
    ranks.equal("gradient of scale: clip", got, one[2].grad, one[2].grad, EXACT)


def check_options_that_only_some_ranks_give(ranks: Ranks) -> None:
    """A mask or weights on the last rank alone, as a padded last batch has them."""
    s, t = features(1, 6 * ranks.size, 4), features(2, 6 * ranks.size, 4)
    own = ranks.own([6] * ranks.size)
    last = ranks.rank == ranks.size - 1
    valid = torch.ones(len(s), dtype=torch.bool)
    valid[-4:] = False
    row_weight = torch.ones(len(s), dtype=torch.float64)
    row_weight[-6:] = weights(3, 6)
    pairs = torch.ones(len(s), len(s), dtype=torch.bool)
    pairs[-6:] = mask(7, 6, len(s), keep=0.5)
    for option, whole in (("mask", valid), ("row_weight", row_weight), ("pair_mask", pairs)):
        for triple in (("gram", "row_l2", "mse"), ("rbf", "frobenius", "l1")):
            want = affkd.affinity_loss(s, t, *triple, **{option: whole})
            given = {option: whole[own]} if last else {}
            got = affkd.affinity_loss(s[own], t[own], *triple, **given, process_group=ranks.group)
            ranks.equal(f"loss: {option} on one rank", got, want, want, EXACT)


def check_banks_of_different_sizes(ranks: Ranks) -> None:
    """Each rank's rows against its own bank, first the batch's own: the mean over all rows."""
    sizes = ranks.sizes(8, 1)
    losses = []
    for rank, size in enumerate(sizes):
        s, t, bank = (features(10 * rank + i, n, 4) for i, n in enumerate((size, size, 7)))
        keys = torch.cat((t, bank))
        losses.append(
            affkd.preset("seed", reduction="none")(s, t, student_keys=keys, teacher_keys=keys)
        )
        if rank == ranks.rank:
            got = affkd.preset("seed", process_group=ranks.group)(
                s, t, student_keys=keys, teacher_keys=keys
            )
    want = torch.cat(losses).mean()
    ranks.equal("loss: banks", got, want, want, EXACT)


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


def check_errors_are_raised_on_every_rank(ranks: Ranks) -> None:
    """Nobody waits for a rank whose arguments are wrong, and the group can go on."""
    first = ranks.rank == 0
    x = features(1, 4, 3)
    for arguments, mine, others in (
        ({"student": features(1, 4, 5)}, "student must have the same feature length", ...),
        ({"student": x.float()}, "student must have the same dtype", ...),
        ({"student": x.clone().requires_grad_()}, "the same of student, student_keys", ...),
        ({"teacher": features(1, 3, 3)}, "must hold the same items", "arguments of rank 0"),
        ({"mask": torch.ones(4)}, "mask must be a bool", "arguments of rank 0"),
        ({"student_keys": x, "teacher_keys": x}, "student_keys must be given on every", ...),
        ({"pair_mask": torch.ones(4, 3).bool()}, "pair_mask must have a column for each", ...),
        ({"pair_mask": torch.ones(3, 8).bool()}, "pair_mask must have shape", "arguments of rank"),
    ):
        call = {"student": x, "teacher": x, **(arguments if first else {})}
        expected = mine if first or others is ... else others
        _raises(expected, lambda call=call: affkd.affinity_loss(**call, process_group=ranks.group))
    keys = features(2, 5 if first else 6, 3)
    call = {"student": x, "teacher": x, "student_keys": keys, "teacher_keys": keys}
    _raises(
        "student_keys must be the same on every rank",
        lambda: affkd.affinity_loss(**call, normalization="frobenius", process_group=ranks.group),
    )
    ranks.sum(torch.ones(()))


def _raises(text: str, function: Any) -> None:
    try:
        function()
    except (TypeError, ValueError, RuntimeError) as error:
        assert text in str(error), f"expected {text!r}, got {error}"
    else:
        raise AssertionError(f"nothing raised, expected {text!r}")


def check_groups_of_some_ranks(ranks: Ranks) -> None:
    """A group of one rank is one process; of a pair, those two."""
    import torch.distributed as dist

    x, y = features(ranks.rank, 4, 3), features(ranks.rank + 50, 4, 3)
    groups = [dist.new_group([rank]) for rank in range(ranks.size)]
    alone = affkd.affinity_loss(x, y, "rbf", "max", "mse", process_group=groups[ranks.rank])
    assert torch.equal(alone, affkd.affinity_loss(x, y, "rbf", "max", "mse"))
    pair_of_ranks = [ranks.size - 2, ranks.size - 1]
    group = dist.new_group(pair_of_ranks)
    if ranks.rank not in pair_of_ranks:
        _raises("process_group must be", lambda: affkd.affinity_loss(x, y, process_group=group))
        return
    both = [torch.cat([features(rank + i, 4, 3) for rank in pair_of_ranks]) for i in (0, 50)]
    want = affkd.affinity_loss(*both, "rbf", "row_l2", "mse")
    got = affkd.affinity_loss(x, y, "rbf", "row_l2", "mse", process_group=group)
    ranks.equal("loss: some ranks", got, want, want, EXACT)


def check_what_a_rank_holds(ranks: Ranks) -> None:
    """Row-wise forms ask for own rows x all columns, factored ones for no rows of others."""
    from affkd_kernels import functional
    from affkd_kernels.distributed import collectives

    shapes: list[Any] = []
    gathered: list[int] = []
    evaluate, gather = functional.evaluate, collectives._all_gather_single

    def watched(spec: Any, *tensors: Any) -> Tensor:
        student, _, keys = tensors[:3]
        shapes.append((student.shape[1], None if keys is None else keys.shape[1]))
        return evaluate(spec, *tensors)

    def counted(out: Tensor, x: Tensor, group: Any) -> Any:
        gathered.append(out.numel() if out.is_floating_point() else 0)
        return gather(out, x, group=group)

    s, t = features(1, 40 * ranks.size, 3), features(2, 40 * ranks.size, 2)
    own = ranks.own([40] * ranks.size)
    functional.evaluate, collectives._all_gather_single = watched, counted
    try:
        for triple in (("rbf", "row_l2", "mse"), ("gram", "row_l2", "mse")):
            spec = affkd.AffinityLoss(*triple).spec
            tensors = (s[own], t[own], *[None] * 8)
            from affkd_kernels.distributed import losses

            losses.evaluate(spec, ranks.group, tensors)
    finally:
        functional.evaluate, collectives._all_gather_single = evaluate, gather
    assert shapes == [(40, 40 * ranks.size)], shapes
    assert sum(gathered) == len(s) * (3 + 2), gathered


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
