"""The reference against formulas of the papers and against matrices worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from case_inputs import features
from torch import Tensor

from affkd_kernels import reference

# student rows and their Gram matrix:        teacher rows and their Gram matrix:
#   1 0        1 0 1                           2 0        4 0 2
#   0 1        0 1 1                           0 1        0 1 2
#   1 1        1 1 2                           1 2        2 2 5
STUDENT = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
TEACHER = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 2.0]], dtype=torch.float64)


def by_hand(*components: str, **options: object) -> float:
    return reference.affinity_loss(STUDENT, TEACHER, *components, **options).item()


def test_gram_by_hand() -> None:
    # differences 3 0 1 | 0 0 1 | 1 1 3: squares add up to 9 + 1 + 1 + 1 + 1 + 9 = 22
    assert by_hand("gram", "none", "mse", reduction="sum") == 22.0
    assert by_hand("gram", "none", "mse") == pytest.approx(22 / 9)
    assert by_hand("gram", "none", "l1", reduction="sum") == 10.0
    # smooth l1 at beta 1: 3 - .5, .5 | .5 | .5, .5, 3 - .5
    assert by_hand("gram", "none", "smooth_l1", reduction="sum") == 7.0
    # off the diagonal the squares are 1, 1, 1, 1; zeroed they still count
    assert by_hand("gram", "none", "mse", diagonal="exclude") == pytest.approx(4 / 6)
    assert by_hand("gram", "none", "mse", diagonal="zero") == pytest.approx(4 / 9)
    rows = reference.affinity_loss(STUDENT, TEACHER, "gram", reduction="none", weight=2.0)
    assert rows.tolist() == [20.0, 2.0, 22.0]


def test_row_l1_by_hand() -> None:
    # row sums 2, 2, 4 and 6, 3, 9
    #   1/2 0 1/2     2/3 0 1/3
    #   0 1/2 1/2     0 1/3 2/3
    #   1/4 1/4 1/2   2/9 2/9 5/9
    # |differences|: 1/6 + 1/6, 1/6 + 1/6, 1/36 + 1/36 + 2/36
    expected = 4 / 6 + 4 / 36
    assert by_hand("gram", "row_l1", "l1", reduction="sum") == pytest.approx(expected)


def test_row_l2_by_hand() -> None:
    # row norms sqrt 2, sqrt 2, sqrt 6 and sqrt 20, sqrt 5, sqrt 33; |p - q|^2 = 2 - 2 p.q
    # p.q: (4 + 2) / sqrt 40, (1 + 2) / sqrt 10, (2 + 2 + 10) / sqrt 198
    cosines = 6 / math.sqrt(40) + 3 / math.sqrt(10) + 14 / math.sqrt(198)
    assert by_hand("gram", "row_l2", "mse", reduction="sum") == pytest.approx(6 - 2 * cosines)


def test_frobenius_by_hand() -> None:
    # |A_s|^2 = 10, |A_t|^2 = 16 + 1 + 25 + 4 * 4 = 58, <A_s, A_t> = 4 + 1 + 10 + 4 * 2 = 23
    expected = 2 - 2 * 23 / math.sqrt(580)
    assert by_hand("gram", "frobenius", "mse", reduction="sum") == pytest.approx(expected)


def test_centered_frobenius_by_hand() -> None:
    # student means: rows 2/3, 2/3, 4/3, grand 8/9; H A H in ninths:
    #   5 -4 -1 | -4 5 -1 | -1 -1 2: squares 25 + 16 + 1 + 16 + 25 + 1 + 1 + 1 + 4 = 90
    # teacher means: rows 2, 1, 3, grand 2; H A H:
    #   2 -1 -1 | -1 1 0 | -1 0 1: squares 4 + 1 + 1 + 1 + 1 + 1 + 1 = 10
    # inner product in ninths: 10 + 4 + 1 + 4 + 5 + 1 + 2 = 27
    expected = 2 - 2 * 27 / math.sqrt(90 * 10)
    assert by_hand("gram", "frobenius(center=True)", reduction="sum") == pytest.approx(expected)


def test_mean_and_max_by_hand() -> None:
    # positive entries: student 1 1 1 1 1 1 2 with mean 8/7, teacher 4 2 1 2 2 2 5 with mean 18/7
    # P_s = 7/8 of A_s, P_t = 7/18 of A_t; in 72nds of 7: 9 A_s - 4 A_t
    #   -7 0 1 | 0 5 1 | 1 1 -2
    expected = (49 + 1 + 25 + 1 + 1 + 1 + 4) * (7 / 72) ** 2
    assert by_hand("gram", "mean", "mse", reduction="sum") == pytest.approx(expected)
    # over the maxima 2 and 5, in tenths 5 A_s - 2 A_t: -3 0 1 | 0 3 1 | 1 1 0
    assert by_hand("gram", "max", "l1", reduction="sum") == pytest.approx(1.0)


def test_means_of_squared_distances_by_hand() -> None:
    # squared distances: student 2, 1, 1 and teacher 5, 5, 2, each twice
    # off the diagonal the means are 4/3 and 4: P 3/2, 3/4, 3/4 and 5/4, 5/4, 1/2
    offdiag = 2 * (1 / 4 + 1 / 2 + 1 / 4)
    assert by_hand("sqeuclidean", "mean(over=offdiag)", "l1", reduction="sum") == pytest.approx(
        offdiag
    )
    assert by_hand("sqeuclidean", "mean", "l1", reduction="sum") == pytest.approx(offdiag)
    # over all nine entries the means are 2/3 as large
    assert by_hand("sqeuclidean", "mean(over=all)", "l1", reduction="sum") == pytest.approx(
        offdiag * 3 / 2
    )


def test_rkd_distance_by_hand() -> None:
    # distances sqrt 2, 1, 1 and sqrt 5, sqrt 5, sqrt 2; every difference stays below beta = 1
    student = [math.sqrt(2), 1.0, 1.0]
    teacher = [math.sqrt(5), math.sqrt(5), math.sqrt(2)]
    pairs = zip(student, teacher, strict=True)
    scaled = [(s * 3 / sum(student), t * 3 / sum(teacher)) for s, t in pairs]
    expected = 2 * sum(0.5 * (s - t) ** 2 for s, t in scaled) / 9
    assert by_hand("euclidean", "mean", "smooth_l1") == pytest.approx(expected)


def test_softmax_kl_by_hand() -> None:
    # logits log 1, log 3 against log 1, log 1: KL((1/2, 1/2) || (1/4, 3/4))
    student = torch.tensor([[1.0]])
    keys = torch.tensor([[0.0], [math.log(3.0)]])
    options = {"student_keys": keys, "teacher_keys": torch.zeros(2, 1)}

    def value(loss: str) -> float:
        return reference.affinity_loss(student, student, "gram", "softmax", loss, **options).item()

    forward = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    reverse = 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)
    assert value("kl") * 2 == pytest.approx(forward, rel=1e-6)
    assert value("kl(direction=reverse)") * 2 == pytest.approx(reverse, rel=1e-6)
    assert value("kl(direction=symmetric)") * 2 == pytest.approx(forward + reverse, rel=1e-6)
    # - 1/2 log 1/4 - 1/2 log 3/4
    expected = 0.5 * math.log(4) + 0.5 * math.log(4 / 3)
    assert value("cross_entropy") * 2 == pytest.approx(expected, rel=1e-6)


def test_rbf_and_polynomial_by_hand() -> None:
    # unit rows e1, e2, (1, 1) / sqrt 2: squared distances 2, 2 - sqrt 2, 2 - sqrt 2
    # against teacher rows all alike, whose affinities are 1
    alike = torch.ones(3, 2)
    student = [math.exp(-0.4 * d) for d in (2.0, 2 - math.sqrt(2), 2 - math.sqrt(2))]
    loss = reference.affinity_loss(STUDENT, alike, "rbf", "none", "l1", reduction="sum")
    assert loss.item() == pytest.approx(2 * sum(1 - a for a in student), rel=1e-6)
    # order 2 at inner products 1, 1/sqrt 2 and 0: e^-.8 (1 + .8 g + .32 g^2)
    series = [1 + 0.8 * g + 0.32 * g * g for g in (1.0, 0.0, math.sqrt(0.5), math.sqrt(0.5))]
    loss = reference.affinity_loss(
        STUDENT, torch.ones(3, 2), "rbf(taylor_order=2)", "none", "l1", reduction="sum"
    )
    expected = 2 * math.exp(-0.8) * sum(series[0] - value for value in series[1:])
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    # (g + 1)^3 of the student Gram matrix against 1^3 of a zero teacher:
    # 1 -> 7 (six times), 0 -> 0 (twice), 2 -> 26
    loss = reference.affinity_loss(
        STUDENT, torch.zeros(3, 1), "polynomial(degree=3, offset=1)", "none", "l1", reduction="sum"
    )
    assert loss.item() == 6 * 7 + 26


def hsic(kernel: Tensor, other: Tensor) -> Tensor:
    """tr(K H L H) (Gretton et al. 2005, up to the constant that CKA divides out)."""
    n = len(kernel)
    h = torch.eye(n, dtype=kernel.dtype) - 1 / n
    return torch.trace(kernel @ h @ other @ h)


def cka(kernel: Tensor, other: Tensor) -> Tensor:
    return hsic(kernel, other) / torch.sqrt(hsic(kernel, kernel) * hsic(other, other))


def test_centered_frobenius_is_one_minus_cka() -> None:
    x, y = features(1, 8, 5), features(2, 8, 3)
    loss = reference.affinity_loss(
        x, y, "gram", "frobenius(center=True)", reduction="matrixmean", weight=0.5
    )
    torch.testing.assert_close(loss, 1 - cka(x @ x.T, y @ y.T), rtol=1e-12, atol=1e-14)
    # the feature form of linear CKA (Kornblith et al. 2019, eq. 4)
    x, y = x - x.mean(0), y - y.mean(0)
    feature_form = (y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
    torch.testing.assert_close(loss, 1 - feature_form, rtol=1e-12, atol=1e-14)


def test_centered_frobenius_of_rbf_is_one_minus_kernel_cka() -> None:
    x, y = features(3, 7, 4), features(4, 7, 4)
    kernels = (torch.exp(-0.3 * torch.cdist(z, z) ** 2) for z in (x, y))
    loss = reference.affinity_loss(
        x,
        y,
        "rbf(gamma=0.3, unit=False)",
        "frobenius(center=True)",
        reduction="matrixmean",
        weight=0.5,
    )
    torch.testing.assert_close(loss, 1 - cka(*kernels), rtol=1e-10, atol=1e-13)


def unit_maps(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x.flatten(2), dim=2).reshape(x.shape)


def nst(student: Tensor, teacher: Tensor) -> Tensor:
    return reference.affinity_loss(
        unit_maps(student),
        unit_maps(teacher),
        "gram(scale='1/D')",
        items="pixels",
        reduction="matrixmean",
    )


def test_nst_is_a_difference_of_spatial_gram_matrices() -> None:
    student, teacher = features(5, 2, 6, 3, 2), features(6, 2, 4, 3, 2)
    difference = sum(
        torch.einsum("nchw,ncuv->nhwuv", unit_maps(x), unit_maps(x)) / x.shape[1] * sign
        for x, sign in ((student, 1), (teacher, -1))
    )
    expected = difference.square().sum() / 2
    torch.testing.assert_close(nst(student, teacher), expected, rtol=1e-12, atol=0)


def test_nst_is_the_maximum_mean_discrepancy_of_a_squared_kernel() -> None:
    """Huang & Wang 2017, eq. 4 with k(x, y) = (x.y)^2 over the channel maps."""
    student, teacher = features(7, 1, 6, 3, 3), features(8, 1, 4, 3, 3)
    f, g = (unit_maps(x).flatten(2)[0] for x in (student, teacher))
    kernel_means = [(a @ b.T).square().mean() for a, b in ((f, f), (g, g), (f, g))]
    expected = kernel_means[0] + kernel_means[1] - 2 * kernel_means[2]
    torch.testing.assert_close(nst(student, teacher), expected, rtol=1e-12, atol=0)


def test_sp_from_row_sums() -> None:
    """Tung & Mori 2019: rows of unit length, so only their angles count; no B x B matrix needed."""
    x, y = features(9, 7, 5), features(10, 7, 3)

    def row_products(a: Tensor, b: Tensor) -> Tensor:
        # sum_j (a_i.a_j) (b_i.b_j) = a_i (sum_j a_j b_j') b_i'
        return torch.einsum("id,de,ie->i", a, a.T @ b, b)

    cosines = row_products(x, y) / (row_products(x, x) * row_products(y, y)).sqrt()
    expected = (2 - 2 * cosines).sum() / 7**2
    torch.testing.assert_close(
        reference.affinity_loss(x, y, "gram", "row_l2", "mse"), expected, rtol=1e-11, atol=0
    )


def test_pkt_with_its_closed_form_row_sum() -> None:
    """Passalis & Tefas 2018, with sum_j (1 + u_i.u_j) / 2 = (B + u_i.sum_j u_j) / 2."""
    probabilities = []
    for x in (features(11, 6, 5), features(12, 6, 4)):
        u = x / x.norm(dim=1, keepdim=True)
        row_sum = (6 + u @ u.sum(0)) / 2
        probabilities.append((1 + u @ u.T) / 2 / row_sum.unsqueeze(1))
    p, q = probabilities
    expected = (q * ((q + 1e-7) / (p + 1e-7)).log()).mean()
    loss = reference.affinity_loss(
        features(11, 6, 5), features(12, 6, 4), "cosine(shifted=True)", "row_sum", "kl"
    )
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-14)


def test_clip_style_both_axes() -> None:
    """Image x text logits against the teacher's, as cross-entropies of rows and of columns."""
    image, text = features(13, 5, 4), features(14, 5, 4)
    t_image, t_text = features(15, 5, 3), features(16, 5, 3)
    student, teacher = 3.0 * image @ text.T, 2.0 * t_image @ t_text.T

    def cross_entropy(s: Tensor, t: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(s, t.softmax(1))

    expected = (cross_entropy(student, teacher) + cross_entropy(student.T, teacher.T)) / 2
    loss = reference.affinity_loss(
        image,
        t_image,
        "gram",
        "softmax(axis=both)",
        "cross_entropy",
        reduction="batchmean",
        student_keys=text,
        teacher_keys=t_text,
        student_scale=torch.tensor(3.0),
        teacher_scale=torch.tensor(2.0),
    )
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
