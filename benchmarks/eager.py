"""The losses as their users write them: plain differentiable PyTorch, one function a method.

They are the baselines, and, in float64, the truth. Every function takes ``(student, teacher)`` and
what the method needs besides, with the names of :func:`affkd_kernels.affinity_loss`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Scale = Tensor | float


def sp(student: Tensor, teacher: Tensor) -> Tensor:
    """Similarity-preserving distillation (Tung & Mori, ICCV 2019)."""
    gram_s, gram_t = _gram(student.flatten(1)), _gram(teacher.flatten(1))
    return F.mse_loss(F.normalize(gram_s), F.normalize(gram_t))


def sp_features(student: Tensor, teacher: Tensor) -> Tensor:
    """The same through D x D products: no B x B matrix, at the price of cancellation."""
    s, t = student.flatten(1), teacher.flatten(1)
    own = ((s @ (s.T @ s)) * s).sum(1)
    other = ((t @ (t.T @ t)) * t).sum(1)
    cross = ((s @ (s.T @ t)) * t).sum(1)
    return (2 - 2 * cross / (own * other).sqrt()).mean() / len(s)


def sp_frobenius(student: Tensor, teacher: Tensor) -> Tensor:
    """Similarity-preserving distillation with one norm for the whole matrix."""
    gram_s, gram_t = _gram(student.flatten(1)), _gram(teacher.flatten(1))
    return (gram_s / gram_s.norm() - gram_t / gram_t.norm()).square().sum()


def pkt(student: Tensor, teacher: Tensor, eps: float = 1e-7) -> Tensor:
    """Probabilistic knowledge transfer (Passalis & Tefas, ECCV 2018)."""
    p_s, p_t = (_conditional_probabilities(x.flatten(1), eps) for x in (student, teacher))
    return (p_t * ((p_t + eps) / (p_s + eps)).log()).mean()


def _conditional_probabilities(x: Tensor, eps: float) -> Tensor:
    x = x / (x.norm(dim=1, keepdim=True) + eps)
    similarity = (_gram(x) + 1) / 2
    return similarity / similarity.sum(1, keepdim=True)


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Relational distillation of distances (Park et al., CVPR 2019), without indexing by masks."""
    s, t = (_mean_distance_one(x.flatten(1)) for x in (student, teacher))
    return F.smooth_l1_loss(s, t)


def _mean_distance_one(x: Tensor) -> Tensor:
    off_diagonal = 1 - torch.eye(len(x), dtype=x.dtype, device=x.device)
    distances = _squared_distances(x).clamp(min=1e-12).sqrt() * off_diagonal
    return distances / (distances.sum() / (distances > 0).sum())


def rkd_distance_published(student: Tensor, teacher: Tensor) -> Tensor:
    """The same with the operations of the published code: indexed writes, a boolean mask."""
    with torch.no_grad():
        t = _published_distances(teacher.flatten(1))
        t = t / t[t > 0].mean()
    s = _published_distances(student.flatten(1))
    return F.smooth_l1_loss(s / s[s > 0].mean(), t)


def _published_distances(x: Tensor) -> Tensor:
    distances = _squared_distances(x).clamp(min=1e-12).sqrt().clone()
    distances[range(len(x)), range(len(x))] = 0
    return distances


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Relational distillation of angles (Park et al., CVPR 2019): [B, B, D] and [B, B, B]."""
    with torch.no_grad():
        angles_t = _angles(teacher.flatten(1))
    return F.smooth_l1_loss(_angles(student.flatten(1)), angles_t)


def _angles(x: Tensor) -> Tensor:
    directions = F.normalize(x.unsqueeze(0) - x.unsqueeze(1), dim=2)
    return torch.bmm(directions, directions.transpose(1, 2))


def cc(student: Tensor, teacher: Tensor, gamma: float = 0.4, order: int = 2) -> Tensor:
    """Correlation congruence with a Taylor-expanded Gaussian (Peng et al., ICCV 2019)."""
    s, t = (_taylor_rbf(x.flatten(1), gamma, order) for x in (student, teacher))
    return F.mse_loss(s, t)


def _taylor_rbf(x: Tensor, gamma: float, order: int) -> Tensor:
    similarity = _gram(F.normalize(x))
    kernel = torch.zeros_like(similarity)
    for p in range(order + 1):
        kernel = kernel + (2 * gamma) ** p / math.factorial(p) * similarity**p
    return math.exp(-2 * gamma) * kernel


def cka(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - linear CKA (Kornblith et al., ICML 2019), through centered Gram matrices."""
    gram_s, gram_t = (_gram(_centered(x.flatten(1))) for x in (student, teacher))
    return 1 - (gram_s * gram_t).sum() / (gram_s.norm() * gram_t.norm())


def cka_features(student: Tensor, teacher: Tensor) -> Tensor:
    """The same through D x D products, which many write for large batches."""
    s, t = _centered(student.flatten(1)), _centered(teacher.flatten(1))
    return 1 - (s.T @ t).square().sum() / ((s.T @ s).norm() * (t.T @ t).norm())


def rbf_frobenius(student: Tensor, teacher: Tensor, gamma: float = 0.4) -> Tensor:
    """A Gaussian kernel of unit features with one norm for the whole matrix."""
    kernels = (
        (-gamma * _squared_distances(F.normalize(x.flatten(1)))).exp() for x in (student, teacher)
    )
    s, t = (kernel / kernel.norm() for kernel in kernels)
    return (s - t).square().sum()


def irg_edge(student: Tensor, teacher: Tensor) -> Tensor:
    """The edge term of instance relationship graphs (Liu et al., CVPR 2019)."""
    s, t = (_squared_distances(x.flatten(1)) for x in (student, teacher))
    return F.mse_loss(s / s.max(), t / t.max())


def gram_anchor(student: Tensor, teacher: Tensor) -> Tensor:
    """Gram anchoring of patch tokens [N, L, D] (DINOv3, 2025); [L, D] is one matrix."""
    s, t = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    return F.mse_loss(s @ s.mT, t @ t.mT)


def nst(student: Tensor, teacher: Tensor) -> Tensor:
    """Neuron selectivity transfer, polynomial kernel (Huang & Wang, 2017), of maps of one size."""
    s, t = (F.normalize(x.flatten(2), dim=2) for x in (student, teacher))  # [N, C, H W]
    kernels = ((a @ b.mT).square().mean() for a, b in ((t, t), (s, s), (s, t)))
    own, other, cross = kernels
    return own + other - 2 * cross


def ickd(student: Tensor, teacher: Tensor) -> Tensor:
    """Inter-channel correlation (Liu et al., ICCV 2021) of maps with as many channels."""
    s, t = student.flatten(2), teacher.flatten(2)
    difference = F.normalize(s @ s.mT, dim=2) - F.normalize(t @ t.mT, dim=2)
    return difference.square().sum() / (s.shape[0] * s.shape[1])


def seed(student: Tensor, teacher: Tensor, *, student_keys: Tensor, teacher_keys: Tensor) -> Tensor:
    """SEED (Fang et al., ICLR 2021); the keys are of unit length, the batch's own first."""
    logits_s = F.normalize(student) @ student_keys.T / 0.2
    p_t = (F.normalize(teacher) @ teacher_keys.T / 1e-4).softmax(1)
    return -(p_t * logits_s.log_softmax(1)).sum(1).mean()


def compress(
    student: Tensor, teacher: Tensor, *, student_keys: Tensor, teacher_keys: Tensor
) -> Tensor:
    """CompRess (Abbasi Koohpayegani et al., NeurIPS 2020); the keys are of unit length."""
    logits_s = F.normalize(student) @ student_keys.T / 0.04
    logits_t = F.normalize(teacher) @ teacher_keys.T / 0.04
    return F.kl_div(logits_s.log_softmax(1), logits_t.softmax(1), reduction="batchmean")


def minilm_v2(student: Tensor, teacher: Tensor, *, mask: Tensor) -> Tensor:
    """MiniLMv2 (Wang et al., 2021) of [N, heads, L, d] with mask [N, 1, L], True = a token."""
    padding = ~mask.unsqueeze(-2)  # [N, 1, 1, L]
    log_s, log_t = (
        (x @ x.mT / math.sqrt(x.shape[-1])).masked_fill(padding, -1e9).log_softmax(-1)
        for x in (student, teacher)
    )
    rows = F.kl_div(log_s, log_t, log_target=True, reduction="none").sum(-1)  # [N, heads, L]
    return (rows * mask).sum() / (mask.sum() * student.shape[1])


def clip_affinity(
    student: Tensor,
    teacher: Tensor,
    *,
    student_keys: Tensor,
    teacher_keys: Tensor,
    student_scale: Scale,
    teacher_scale: Scale,
) -> Tensor:
    """Affinity mimicking of image [B, D] and text keys [B, D] (TinyCLIP, ICCV 2023)."""
    logits_s = student_scale * student @ student_keys.T
    logits_t = teacher_scale * teacher @ teacher_keys.T
    of_texts = F.kl_div(logits_s.log_softmax(1), logits_t.softmax(1), reduction="batchmean")
    of_images = F.kl_div(logits_s.log_softmax(0), logits_t.softmax(0), reduction="sum")
    return (of_texts + of_images / logits_s.shape[1]) / 2


def _gram(x: Tensor) -> Tensor:
    return x @ x.T


def _centered(x: Tensor) -> Tensor:
    return x - x.mean(0)


def _squared_distances(x: Tensor) -> Tensor:
    squares = x.square().sum(1)
    return (squares.unsqueeze(1) + squares - 2 * x @ x.T).clamp(min=0)
