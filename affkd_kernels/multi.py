"""Several named loss terms on several features: one total, and every term by name."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["MultiLoss", "Term", "non_finite_terms"]


class Term(NamedTuple):
    """One term of a `MultiLoss`.

    Args:
        loss: a module called as `loss(student_feature, teacher_feature)`; it returns a scalar.
        student, teacher: the names of the features it takes.
        weight: multiplies what the module returns.
    """

    loss: nn.Module
    student: str
    teacher: str
    weight: float = 1.0


class MultiLoss(nn.Module):
    """A weighted sum of named losses, each on its own pair of features.

    Parameters that a term's module has (a projection, say) are parameters of this module.

    Args:
        terms: `{"name": Term(...)}`, or plain tuples in `Term`'s order.

    Raises:
        TypeError, ValueError: an entry that is no term, a name that holds a dot, or a weight that
            is no finite number.

    Example::

        losses = MultiLoss({
            "sp": (affkd.preset("sp", weight=3000.0), "map", "map"),
            "rkd": Term(affkd.preset("rkd_distance"), "pooled", "pooled", weight=25.0),
        })
        with FeatureCapture(student, taps) as s, FeatureCapture(teacher, taps) as t:
            ...
            total, terms = losses(s, t)
    """

    def __init__(self, terms: Mapping[str, Term | tuple[Any, ...]]) -> None:
        super().__init__()
        self.terms = {name: _read_term(name, term) for name, term in terms.items()}
        # registered under a prefix, so that a term may be called "keys", "training" or the like
        for name, term in self.terms.items():
            self.add_module(f"term_{name}", term.loss)

    def forward(
        self,
        student: Mapping[str, Tensor],
        teacher: Mapping[str, Tensor],
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The total, and the terms it is the sum of.

        Args:
            student, teacher: features by name: dicts, or `FeatureCapture` objects.
            options: keyword arguments for single terms, by name: `{"seed": {"student_keys": ...}}`.

        Returns:
            The total, a 0-dim tensor with its graph, and `{"name": value}`, each weighted,
            detached and still on its device: nothing here waits for the device.

        Raises:
            TypeError: a feature that is no tensor.
            ValueError: a feature that is missing, options for an unknown term, or a term that is
                not a scalar.
        """
        options = options or {}
        for name in options:
            if name not in self.terms:
                raise ValueError(
                    f"options must name terms, got {name!r}; {_known(name, self.terms)}"
                )
        values = {
            name: self._value(name, student, teacher, options.get(name, {})) for name in self.terms
        }
        total = torch.stack(list(values.values())).sum() if values else torch.zeros(())
        return total, {name: value.detach() for name, value in values.items()}

    def _value(
        self,
        name: str,
        student: Mapping[str, Tensor],
        teacher: Mapping[str, Tensor],
        options: Mapping[str, Any],
    ) -> Tensor:
        term = self.terms[name]
        student_feature = _feature("student", name, term.student, student)
        teacher_feature = _feature("teacher", name, term.teacher, teacher)
        value = getattr(self, f"term_{name}")(student_feature, teacher_feature, **options)
        if value.ndim:
            raise ValueError(
                f"term {name!r} must return a scalar, got shape {list(value.shape)}; "
                "reduction='none' has no place in a sum of terms"
            )
        return term.weight * value

    def extra_repr(self) -> str:
        return "\n".join(
            f"{name}: {term.weight} x loss({term.student!r}, {term.teacher!r})"
            for name, term in self.terms.items()
        )


def non_finite_terms(terms: Mapping[str, Tensor]) -> list[str]:
    """The names of the terms that are infinite or NaN, to tell a user which loss broke a run.

    It waits for the device once, however many terms there are.
    """
    if not terms:
        return []
    finite = torch.stack([value.isfinite().all() for value in terms.values()]).tolist()
    return [name for name, is_finite in zip(terms, finite, strict=True) if not is_finite]


def _read_term(name: str, term: Any) -> Term:
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"terms must have non-empty names without a dot, got {name!r}")
    if not isinstance(term, tuple) or not 3 <= len(term) <= 4:
        raise TypeError(
            f"terms[{name!r}] must be (loss, student name, teacher name[, weight]), got {term!r}"
        )
    term = Term(*term)
    if not isinstance(term.loss, nn.Module):
        raise TypeError(
            f"terms[{name!r}]: loss must be a torch.nn.Module, got {type(term.loss).__name__}"
        )
    if isinstance(term.weight, bool) or not isinstance(term.weight, numbers.Real):
        raise TypeError(f"terms[{name!r}]: weight must be a number, got {term.weight!r}")
    if not math.isfinite(term.weight):
        raise ValueError(f"terms[{name!r}]: weight must be finite, got {term.weight}")
    return term


def _feature(side: str, term: str, name: str, features: Mapping[str, Tensor]) -> Tensor:
    if name not in features:
        raise ValueError(
            f"{side} has no feature {name!r}, which term {term!r} takes; {_known(name, features)}"
        )
    feature = features[name]
    if not isinstance(feature, Tensor):
        raise TypeError(
            f"{side}'s feature {name!r}, which term {term!r} takes, must be a tensor, got a "
            f"{type(feature).__name__}; a FeatureCapture with repeated='all' gives lists"
        )
    return feature


def _known(name: str, names: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(names), n=3)
    return f"close to it: {', '.join(close)}" if close else f"known: {', '.join(names)}"
