"""The published methods: ranks without rows, their own layouts, banks and two modalities."""

from __future__ import annotations

from typing import Any

import torch
from case_inputs import features, mask, seed_of
from ranks import Ranks
from torch import Tensor, nn

import affkd_kernels as affkd
from affkd_kernels.distributed import gather_rows

from . import EXACT


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
