"""Every valid triple in every kind of call."""

from __future__ import annotations

from typing import Any

import torch
from case_inputs import Inputs, features, mask, pair, seed_of
from cases import base_triples, call, covering, valid_triples
from ranks import Ranks

import affkd_kernels as affkd

from . import EXACT, SINGLE

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
