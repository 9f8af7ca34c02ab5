"""The published methods, as data: what `affkd_kernels.preset` builds and `describe` shows.

A formula is written with s and t, the student's and the teacher's normalized affinity; B counts
samples, L tokens or pixels, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

_SAMPLES = "features [B, ...] of the same samples; what follows dim 0 is flattened"


@dataclass(frozen=True)
class Preset:
    """One published method.

    Attributes:
        name: what `preset` is called with.
        source: authors, title, venue and year.
        formula: the loss before any weight.
        triple: affinity, normalization and loss in their shorthand; None for a loss that is no
            affinity loss (RKD's angle).
        options: the static options of `AffinityLoss` that belong to the method.
        call: what the loss takes: feature shapes, keys, masks.
        published_weight: what to pass as `weight=` to train as published; None where no figure is
            known. `preset` itself does not apply it.
        published_batch: the batch size that weight belongs to, for losses that shrink with it.
        weight_note: where the weight comes from.
        traps: where public code, or a reading of the paper, departs from this formula.
    """

    name: str
    source: str
    formula: str
    triple: tuple[str, str, str] | None
    options: Mapping[str, Any] = field(default_factory=dict)
    call: str = _SAMPLES
    published_weight: float | None = None
    published_batch: int | None = None
    weight_note: str = ""
    traps: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # `describe` hands out the entry itself: writing to it would change every later `preset`
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))

    def __reduce__(self) -> tuple[Any, ...]:
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        # a mapping proxy can be neither pickled nor copied
        return Preset, tuple({**values, "options": dict(self.options)}.values())

    @property
    def batch_free_weight(self) -> float | None:
        """The weight that goes with `reduction="batchmean"` at any batch size, or None.

        A mean over B^2 pairs is a mean over B rows divided by B, so the published weight of such a
        loss holds at its own batch size alone.
        """
        if self.published_weight is None or self.published_batch is None:
            return None
        return self.published_weight / self.published_batch

    def __str__(self) -> str:
        triple = "of its own" if self.triple is None else " / ".join(self.triple)
        options = "".join(f", {option}={value!r}" for option, value in self.options.items())
        lines = [
            f"{self.name}: {self.source}",
            f"  loss:   {self.formula}",
            f"  triple: {triple}{options}",
            f"  call:   {self.call}",
            f"  weight: {self._weight_text()}",
            *(f"  trap:   {trap}" for trap in self.traps),
        ]
        return "\n".join(lines)

    def _weight_text(self) -> str:
        if self.published_weight is None:
            return "no published figure; see suggest_weight"
        text = f"{self.published_weight:g} published"
        if self.weight_note:
            text += f" ({self.weight_note})"
        if self.batch_free_weight is not None:
            text += (
                f", at batch {self.published_batch}: the loss shrinks as 1/B; at any other batch, "
                f'reduction="batchmean" and weight={self.batch_free_weight:g}'
            )
        return text


_TABLE = (
    Preset(
        name="sp",
        source="Tung & Mori, Similarity-Preserving Knowledge Distillation, ICCV 2019",
        formula="mean_ij (s_ij - t_ij)^2, rows of X X' divided by their L2 norm",
        triple=("gram", "row_l2", "mse"),
        options={"reduction": "mean"},
        call=f"{_SAMPLES}; published on the last feature map",
        published_weight=3000.0,
        published_batch=64,
        traps=(
            "torchdistill's SPKDLoss divides rows by their L1 norm (`normalize(G, 1)` passes "
            'p = 1): normalization="row_l1" reproduces it',
            "normalizing the features instead of the rows of the product is another loss",
        ),
    ),
    Preset(
        name="sp_frobenius",
        source="a variant of Tung & Mori 2019 with one norm for the whole matrix",
        formula="sum_ij (s_ij - t_ij)^2 per matrix, X X' divided by its Frobenius norm",
        triple=("gram", "frobenius", "mse"),
        options={"reduction": "matrixmean"},
    ),
    Preset(
        name="pkt",
        source="Passalis & Tefas, Learning Deep Representations with Probabilistic Knowledge "
        "Transfer, ECCV 2018",
        formula="mean_ij t_ij log((t_ij + eps) / (s_ij + eps)), (1 + cosine) / 2 divided by its "
        "row sum",
        triple=("cosine(shifted=True)", "row_sum", "kl"),
        options={"reduction": "mean"},
        call=f"{_SAMPLES}; published on the pooled feature",
        published_weight=30000.0,
        published_batch=64,
        traps=(
            "the public code takes the mean over B^2, not the divergence per row",
            "the diagonal takes part, though a conditional probability would leave it out",
        ),
    ),
    Preset(
        name="rkd_distance",
        source="Park et al., Relational Knowledge Distillation, CVPR 2019",
        formula="mean_ij smooth_l1(s_ij - t_ij), distances divided by the mean of the positive "
        "ones; the diagonal, 0 on both sides, is counted",
        triple=("euclidean", "mean(over='positive')", "smooth_l1"),
        options={"reduction": "mean"},
        call=f"{_SAMPLES}; published on the pooled feature",
        published_weight=25.0,
        weight_note="with 50 on rkd_angle in classification; 1 and 2 in metric learning",
        traps=(
            "mmrazor's RKD L2-normalizes the features first",
            "two samples alone have one distance, so a batch of 2 teaches nothing",
        ),
    ),
    Preset(
        name="rkd_angle",
        source="Park et al., Relational Knowledge Distillation, CVPR 2019",
        formula="mean_ijk smooth_l1(psi_s - psi_t), psi_ijk the cosine at vertex j of the angle "
        "between i and k; all B^3 triples are counted",
        triple=None,
        options={"reduction": "mean"},
        call=f"{_SAMPLES}; published on the pooled feature",
        published_weight=50.0,
        weight_note="with 25 on rkd_distance in classification; 2 and 1 in metric learning",
        traps=("mmrazor's RKD L2-normalizes the features first",),
    ),
    Preset(
        name="cc",
        source="Peng et al., Correlation Congruence for Knowledge Distillation, ICCV 2019",
        formula="mean_ij (s_ij - t_ij)^2, the Gaussian kernel of unit features by its Taylor "
        "series of order 2",
        triple=("rbf(gamma=0.4, taylor_order=2)", "none", "mse"),
        options={"reduction": "mean"},
        call=f"{_SAMPLES}; published on the pooled feature",
        published_weight=100.0,
        weight_note="of Knowledge-Distillation-Zoo",
        traps=(
            "RepDistiller's CC is no affinity loss: it multiplies the differences of consecutive "
            "rows, so it compares no two samples",
            "torchdistill's CCKDLoss normalizes no features and takes the norm unsquared",
        ),
    ),
    Preset(
        name="cka",
        source="Kornblith et al., Similarity of Neural Network Representations Revisited, ICML "
        "2019, as a loss",
        formula="1 - CKA: half the squared distance of the centered X X' divided by their "
        "Frobenius norms",
        triple=("gram", "frobenius(center=True)", "mse"),
        options={"reduction": "matrixmean", "weight": 0.5},
        published_weight=0.5,
        weight_note="1 on 1 - CKA; weight=0.5, the preset's own, makes the formula equal it, and "
        "another weight replaces it",
        traps=(
            "CKA of independent features is well above 0 in a small batch (about 0.2 at B = 32)",
            "some code leaves the centering out, and some returns -CKA",
        ),
    ),
    Preset(
        name="rbf_frobenius",
        source="the Gaussian kernel of unit features with one norm for the whole matrix",
        formula="sum_ij (s_ij - t_ij)^2 per matrix, exp(-gamma |u_i - u_j|^2) divided by its "
        "Frobenius norm",
        triple=("rbf(gamma=0.4)", "frobenius", "mse"),
        options={"reduction": "matrixmean"},
    ),
    Preset(
        name="irg_edge",
        source="Liu et al., Knowledge Distillation via Instance Relationship Graph, CVPR 2019, "
        "its edge term",
        formula="mean_ij (s_ij - t_ij)^2, squared distances divided by the largest",
        triple=("sqeuclidean", "max", "mse"),
        options={"reduction": "mean"},
        published_weight=5.0,
        weight_note="of Knowledge-Distillation-Zoo, where the gradient flows through the maximum",
        traps=(
            "the authors' Caffe layer holds the maximum constant (normalization="
            '"max(detach=True)") and its gradient reaches one item of each pair only',
        ),
    ),
    Preset(
        name="gram_anchor",
        source="Siméoni et al., DINOv3, 2025: Gram anchoring",
        formula="mean_ij (s_ij - t_ij)^2 of the cosines of an image's patches",
        triple=("cosine", "none", "mse"),
        options={"reduction": "mean", "items": "tokens"},
        call="patch tokens [N, L, D], one matrix each, or [L, D]; mask [N, L]",
        published_weight=1.0,
        weight_note="scheduled up to 2",
        traps=(
            "the published code has options that drop negative entries, off in its "
            "configurations: clamp_min=0.0",
        ),
    ),
    Preset(
        name="nst",
        source="Huang & Wang, Like What You Like: Knowledge Distill via Neuron Selectivity "
        "Transfer, 2017, with the polynomial kernel of degree 2",
        formula="sum_ij (s_ij - t_ij)^2 per image over pixels, F'F / C with unit channel maps F; "
        "it equals the squared maximum mean discrepancy of the channels",
        triple=("gram(scale='1/D')", "none", "mse"),
        options={"reduction": "matrixmean", "items": "pixels"},
        call="feature maps [N, C, H, W]; channels may differ, the larger map is average-pooled",
        published_weight=50.0,
        traps=("RepDistiller holds an [N, C, C, H W] tensor; this form holds none of it",),
    ),
    Preset(
        name="ickd",
        source="Liu et al., Exploring Inter-Channel Correlation for Diversity-preserved Knowledge "
        "Distillation, ICCV 2021",
        formula="sum_ij (s_ij - t_ij)^2 / (N C) over channels, rows of F F' divided by their L2 "
        "norm",
        triple=("gram", "row_l2", "mse"),
        options={"reduction": "batchmean", "items": "channels"},
        call="feature maps [N, C, H, W] with as many channels: bring the student to the teacher's "
        "by a 1x1 convolution and batch normalization",
        published_weight=2.5,
        traps=("torchdistill's ChSimLoss divides by N once more",),
    ),
    Preset(
        name="seed",
        source="Fang et al., SEED: Self-supervised Distillation for Visual Representation, ICLR "
        "2021",
        formula="-sum_j t_ij log s_ij per row, softmax of the cosines with teacher embeddings",
        triple=("cosine", "softmax(student_tau=0.2, teacher_tau=0.0001)", "cross_entropy"),
        options={"reduction": "batchmean"},
        call="embeddings [B, D] of one length D, with student_keys = teacher_keys = "
        "FeatureBank(65536, D).keys(teacher), the batch's own first",
        published_weight=1.0,
        traps=(
            "the published code adds each row's own pair alone to the bank: a pair_mask [B, B + K] "
            "with eye(B) before ones reproduces it",
            "at a teacher temperature of 1e-4 the target is one-hot in all but name",
        ),
    ),
    Preset(
        name="compress",
        source="Abbasi Koohpayegani et al., CompRess: Self-Supervised Learning by Compressing "
        "Representations, NeurIPS 2020",
        formula="KL(t_i || s_i) per row, softmax of the cosines with a bank, temperature 0.04",
        triple=("cosine", "softmax(tau=0.04)", "kl"),
        options={"reduction": "batchmean"},
        call="embeddings [B, Ds] and [B, Dt], with student_keys, teacher_keys = "
        "FeatureBank(128000, Ds, Dt).keys()",
        published_weight=1.0,
        traps=(
            "the published student bank is filled by a moving average of the student",
            "its 1q form takes the teacher's bank for both, which needs Ds = Dt",
        ),
    ),
    Preset(
        name="minilm_v2",
        source="Wang et al., MiniLMv2: Multi-Head Self-Attention Relation Distillation for "
        "Compressing Pretrained Transformers, Findings of ACL 2021",
        formula="KL(t_i || s_i) per token, softmax of X X' / sqrt(d) in each relation head",
        triple=("gram(scale='1/sqrt(D)')", "softmax", "kl"),
        options={"reduction": "batchmean", "items": "tokens"},
        call="queries, keys or values [N, heads, L, d] with as many relation heads, once for each "
        "of the three; mask [N, 1, L], True = a token",
        published_weight=1.0,
        weight_note="on each of the three relations",
        traps=("published: the mean over each sequence, then over N; here over all valid rows",),
    ),
    Preset(
        name="clip_affinity",
        source="TinyCLIP (Wu et al., ICCV 2023) and CLIP-KD (Yang et al., CVPR 2024)",
        formula="KL(t || s) per image over texts and per text over images, averaged",
        triple=("gram", "softmax(axis='both')", "kl"),
        options={"reduction": "batchmean"},
        call="unit image embeddings [B, D], with unit text embeddings as student_keys and "
        "teacher_keys, and student_scale, teacher_scale (the logit scales, exponentiated; the "
        "student's may be learned)",
        published_weight=1.0,
        traps=(
            "TinyCLIP and open_clip take the cross-entropy, whose gradient is the same: "
            'loss="cross_entropy" gives their value',
        ),
    ),
)

PRESETS: dict[str, Preset] = {entry.name: entry for entry in _TABLE}
