"""A relational distillation loss for the trainer of sentence-transformers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from ._relation import resolve

__all__ = ["RelationalDistillationLoss"]

_COLUMNS = ("separate", "joint")


class RelationalDistillationLoss(nn.Module):
    """Matches how a batch's sentences relate to each other, not where they lie.

    So the student's embeddings may have any dimension, without a projection. As with
    ``EmbedDistillLoss``, the teacher's embeddings are computed beforehand and are the data set's
    ``label`` column.

    Args:
        model: the student.
        relation: a loss module called with (student [B, Ds], teacher [B, Dt]), or the name of a
            preset. The relation of two sentences is usually their cosine: ``"pkt"``, or
            ``AffinityLoss("cosine", "softmax(tau=0.05)", "kl", diagonal="exclude")``.
        columns: with several text columns, ``"separate"`` relates the texts within each column and
            averages the losses; ``"joint"`` makes one batch of all of them, so that a query is
            also related to every document.
        options: overrides of the preset.

    Example::

        dataset = dataset.map(lambda rows: {"label": teacher.encode(rows["text"])}, batched=True)
        loss = RelationalDistillationLoss(student, "pkt", reduction="batchmean")
        SentenceTransformerTrainer(model=student, train_dataset=dataset, loss=loss).train()
    """

    def __init__(
        self,
        model: SentenceTransformer,
        relation: nn.Module | str = "pkt",
        *,
        columns: str = "separate",
        **options: Any,
    ) -> None:
        super().__init__()
        if columns not in _COLUMNS:
            raise ValueError(f"columns must be one of {_COLUMNS}, got {columns!r}")
        self.model = model
        self.relation = resolve(relation, **options)
        self.columns = columns

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """The loss of C text columns of B sentences.

        Args:
            sentence_features: the tokens of each column.
            labels: the teacher's embeddings, [B, Dt] for all columns or [B, C, Dt].

        Raises:
            ValueError: labels of another shape, or none.
        """
        student = [self.model(features)["sentence_embedding"] for features in sentence_features]
        teacher = _by_column(labels, len(student))
        if self.columns == "joint":
            return self.relation(torch.cat(student), torch.cat(teacher))
        pairs = zip(student, teacher, strict=True)
        return torch.stack([self.relation(s, t) for s, t in pairs]).mean()

    def get_config_dict(self) -> dict[str, Any]:
        """What the trainer writes into the model card."""
        return {"relation": repr(self.relation), "columns": self.columns}


def _by_column(labels: Tensor | None, columns: int) -> list[Tensor]:
    if labels is not None and labels.dim() == 2:
        return [labels] * columns
    if labels is not None and labels.dim() == 3 and labels.shape[1] == columns:
        return list(labels.unbind(1))
    came = None if labels is None else list(labels.shape)
    raise ValueError(
        "labels must hold the teacher's embeddings, [B, Dt], or [B, C, Dt] with "
        f"C = {columns} text columns, got {came}"
    )
