"""How exact every implementation is on every triple, in float32: ``python tests/accuracy.py``.

Prints, for each affinity and implementation that runs here, how many triples keep to the rule, and
the largest errors beside those of the float32 reference. An error is relative to the reference in
float64: of the loss, and of the student's gradient in norms. The rule: at most twice the float32
reference's own error plus 1e-6. Without a GPU the Triton kernels run in Triton's interpreter.

``--every 4 --start 0 --save errors.jsonl``, and so on up to ``--start 3``, does it in parts;
``--load errors.jsonl`` then prints what all of them found.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

# the package of this checkout, installed or not
sys.path.insert(0, str(Path(__file__).parent.parent))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# the package and its tests must see the variable above
from conftest import IMPLEMENTATIONS, why_unusable  # noqa: E402
from triples import Triple, valid_triples  # noqa: E402

import affkd_kernels as affkd  # noqa: E402

SHAPE, TEACHER_LENGTH = (37, 19), 23
ALLOWED_RATIO, ALLOWED_EXTRA = 2.0, 1e-6


class Error(NamedTuple):
    loss: float
    gradient: float


class Tried(NamedTuple):
    triple: Triple
    error: Error
    reference: Error

    @property
    def passes(self) -> bool:
        pairs = zip(self.error, self.reference, strict=True)
        return all(own <= ALLOWED_RATIO * other + ALLOWED_EXTRA for own, other in pairs)


# by the number of the triple and the implementation
Results = dict[tuple[int, str], Tried]


def plain() -> tuple[Tensor, Tensor]:
    """Independent features, of length 1 on average."""
    student, teacher = long()
    return student / SHAPE[1] ** 0.5, teacher / TEACHER_LENGTH**0.5


def long() -> tuple[Tensor, Tensor]:
    """The same of length 4 and 5: some softmax rows hold little but one pair."""
    return torch.randn(SHAPE), torch.randn(SHAPE[0], TEACHER_LENGTH)


def near() -> tuple[Tensor, Tensor]:
    """A student close to its teacher."""
    teacher = torch.randn(SHAPE) / SHAPE[1] ** 0.5
    return teacher + 1e-3 * torch.randn(SHAPE), teacher


def offset() -> tuple[Tensor, Tensor]:
    """A direction common to all items, a hundred times as long as what tells them apart."""
    student, teacher = plain()
    return student + 100 / SHAPE[1] ** 0.5, teacher + 100 / TEACHER_LENGTH**0.5


DATA: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "plain": plain,
    "long": long,
    "near": near,
    "offset": offset,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python tests/accuracy.py", description=__doc__)
    parser.add_argument("--data", choices=DATA, default="plain", help="what the features are like")
    parser.add_argument("--every", type=int, default=1, help="take one of so many triples")
    parser.add_argument("--start", type=int, default=0, help="from this one on")
    parser.add_argument("--only", default="", help="implementations whose name begins so")
    parser.add_argument("--save", type=Path, help="add the errors to this file, a line each")
    parser.add_argument("--load", type=Path, help="print what was saved, and evaluate nothing")
    options = parser.parse_args(arguments)
    if options.load:
        _print(_loaded(options.load))
        return 0
    names = [
        name
        for name in IMPLEMENTATIONS
        if name.startswith(options.only) and name != "reference" and why_unusable(name) is None
    ]
    tried = {}
    for number, triple in list(enumerate(valid_triples()))[options.start :: options.every]:
        for name, result in _try(triple, names, DATA[options.data]).items():
            tried[number, name] = result
            if options.save:
                _save(options.save, number, name, result)
    _print(tried)
    return 0


def _save(path: Path, number: int, name: str, result: Tried) -> None:
    entry = [number, name, str(result.triple), *result[1:]]
    with path.open("a") as file:
        print(json.dumps(entry), file=file)


def _loaded(path: Path) -> Results:
    """What was saved, in the order of the triples; of what was found twice the last."""
    triples, tried = valid_triples(), {}
    for number, name, triple, error, reference in map(json.loads, path.read_text().splitlines()):
        if str(triples[number]) != triple:
            raise ValueError(f"{path} is of other triples: {triple} is not number {number} here")
        tried[number, name] = Tried(triples[number], Error(*error), Error(*reference))
    return dict(sorted(tried.items()))


def _try(
    triple: Triple, names: list[str], data: Callable[[], tuple[Tensor, Tensor]]
) -> dict[str, Tried]:
    torch.manual_seed(0)
    student, teacher = data()
    truth = _evaluate(triple, student.double(), teacher.double(), backend="reference")
    reference = _error(_evaluate(triple, student, teacher, backend="reference"), truth)
    results = {}
    for name in names:
        try:
            values = _evaluate(triple, student, teacher, **IMPLEMENTATIONS[name])
        except RuntimeError as error:
            # few triples have a factored form
            if "no factored form" not in str(error):
                raise
            continue
        results[name] = Tried(triple, _error(values, truth), reference)
    return results


def _evaluate(
    triple: Triple, student: Tensor, teacher: Tensor, **how: Any
) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    loss = affkd.affinity_loss(leaf, teacher, *triple.build(), **how)
    return loss.detach().double(), torch.autograd.grad(loss, leaf)[0].double()


def _error(values: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> Error:
    # where the truth is 0, as the loss between equal distributions, there is nothing to relate to
    return Error(
        *(((x - y).norm() / (y.norm() or 1.0)).item() for x, y in zip(values, truth, strict=True))
    )


def _print(tried: Results) -> None:
    """The table, and every triple that breaks the rule."""
    groups: dict[tuple[str, str], list[Tried]] = defaultdict(list)
    for (_, name), one in tried.items():
        groups[one.triple.affinity.name, name].append(one)
    print("| affinity | implementation | triples | within | loss | ref. | gradient | ref. |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for (affinity, name), results in groups.items():
        largest = [
            max(getattr(getattr(one, of), part) for one in results)
            for part in ("loss", "gradient")
            for of in ("error", "reference")
        ]
        within = sum(one.passes for one in results)
        figures = " | ".join(f"{error:.1e}" for error in largest)
        print(f"| {affinity} | {name} | {len(results)} | {within} | {figures} |")
    for (_, name), one in tried.items():
        if not one.passes:
            print(f"{name}: {one.triple}: {one.error}, the reference's {one.reference}")


if __name__ == "__main__":
    sys.exit(main())
