"""Arguments of single ranks, wrong ones too, groups of some ranks, and what travels."""

from __future__ import annotations

from typing import Any

import torch
from case_inputs import features, mask, weights
from ranks import Ranks
from torch import Tensor

import affkd_kernels as affkd

from . import EXACT


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
