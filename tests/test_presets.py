"""Presets: each against its formula written out, their options, and what `describe` says."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from affkd_kernels import AffinityLoss
from affkd_kernels.angle import RKDAngleLoss, rkd_angle_loss
from affkd_kernels.bank import FeatureBank
from affkd_kernels.presets import describe, list_presets, preset

NAMES = [
    "sp",
    "sp_frobenius",
    "pkt",
    "rkd_distance",
    "rkd_angle",
    "cc",
    "cka",
    "rbf_frobenius",
    "irg_edge",
    "gram_anchor",
    "nst",
    "ickd",
    "seed",
    "compress",
    "minilm_v2",
    "clip_affinity",
]


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def assert_same(student: torch.Tensor, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """The value and the gradient with respect to the student."""
    torch.testing.assert_close(actual, expected)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (actual, expected)]
    torch.testing.assert_close(*gradients)


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=-1, keepdim=True)


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    return features(7, 5).requires_grad_(), features(7, 4, seed=1)


def row_l2(x):
    gram = x @ x.T
    return gram / gram.norm(dim=1, keepdim=True)


def frobenius(x):
    return x @ x.T / (x @ x.T).norm()


def gaussian(x):
    kernel = torch.exp(-0.4 * torch.cdist(unit(x), unit(x)) ** 2)
    return kernel / kernel.norm()


def taylor(x):
    cosine = unit(x) @ unit(x).T
    return torch.exp(torch.tensor(-0.8)) * (1 + 0.8 * cosine + 0.32 * cosine**2)


def largest(x):
    squared = (x[:, None] - x).square().sum(-1)
    return squared / squared.max()


def probabilities(x):
    shifted = (unit(x) @ unit(x).T + 1) / 2
    return shifted / shifted.sum(1, keepdim=True)


def mean_distance(x):
    distance = (x[:, None] - x + 1e-30).norm(dim=-1)
    off_diagonal = ~torch.eye(len(x), dtype=torch.bool)
    return torch.where(off_diagonal, distance, 0) / distance[off_diagonal].mean()


def mse(s, t):
    return (s - t).square().mean()


def squares(s, t):
    return (s - t).square().sum()


def mean_kl(s, t):
    return (t * ((t + 1e-7).log() - (s + 1e-7).log())).mean()


@pytest.mark.parametrize(
    ("name", "relation", "loss"),
    [
        ("sp", row_l2, mse),
        ("sp_frobenius", frobenius, squares),
        ("pkt", probabilities, mean_kl),
        ("rkd_distance", mean_distance, F.smooth_l1_loss),
        ("cc", taylor, mse),
        ("rbf_frobenius", gaussian, squares),
        ("irg_edge", largest, mse),
    ],
)
def test_losses_between_samples(pair, name: str, relation, loss) -> None:
    student, teacher = pair
    assert_same(student, preset(name)(student, teacher), loss(relation(student), relation(teacher)))


def test_cka_is_one_minus_cka(pair) -> None:
    student, teacher = pair
    s, t = student - student.mean(0), teacher - teacher.mean(0)
    cka = (s.T @ t).square().sum() / ((s.T @ s).norm() * (t.T @ t).norm())
    assert_same(student, preset("cka")(student, teacher), 1 - cka)


def test_rkd_angle(pair) -> None:
    student, teacher = pair
    loss = preset("rkd_angle", weight=50.0, beta=0.5)
    assert isinstance(loss, RKDAngleLoss)
    assert_same(
        student, loss(student, teacher), rkd_angle_loss(student, teacher, weight=50, beta=0.5)
    )


@pytest.mark.parametrize("lead", [(), (3,)])
def test_gram_anchor(lead: tuple) -> None:
    student, teacher = features(*lead, 6, 4).requires_grad_(), features(*lead, 6, 5, seed=1)
    expected = mse(unit(student) @ unit(student).mT, unit(teacher) @ unit(teacher).mT)
    assert_same(student, preset("gram_anchor")(student, teacher), expected)


@pytest.mark.parametrize("teacher_size", [(4, 3), (8, 6), (2, 6)])
def test_nst_is_the_maximum_mean_discrepancy_of_the_channels(teacher_size: tuple) -> None:
    student = features(2, 5, 4, 3).requires_grad_()
    teacher = features(2, 7, *teacher_size, seed=1)
    size = tuple(map(min, student.shape[2:], teacher.shape[2:]))
    s, t = (unit(F.adaptive_avg_pool2d(x, size).flatten(2)) for x in (student, teacher))

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b.mT).square().mean((1, 2))

    expected = (kernel(t, t) + kernel(s, s) - 2 * kernel(s, t)).mean()
    assert_same(student, preset("nst")(student, teacher), expected)


def test_nst_with_dead_channels_and_half_inputs() -> None:
    student = features(2, 5, 4, 3)
    student[:, 1] = 0
    student.requires_grad_()
    loss = preset("nst")(student, features(2, 5, 4, 3, seed=1))
    loss.backward()
    assert student.grad.isfinite().all() and student.grad[:, 1].eq(0).all()

    half = features(2, 5, 4, 3).half().requires_grad_()
    loss = preset("nst")(half, features(2, 5, 8, 6, seed=1).half())
    loss.backward()
    assert loss.dtype == torch.float32 and half.grad.dtype == torch.float16
    with pytest.raises(ValueError, match=r"teacher must have shape \[N, C, H, W\], got \[2, 5\]"):
        preset("nst")(half, half[:, :, 0, 0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e300])
def test_nst_shows_bad_values(bad: float) -> None:
    student = features(2, 5, 4, 3)
    student[0, 0] = bad
    assert not preset("nst")(student, features(2, 5, 4, 3, seed=1)).isfinite()


def test_ickd() -> None:
    student, teacher = features(3, 5, 4, 2).requires_grad_(), features(3, 5, 6, 6, seed=1)
    s, t = (F.normalize(x.flatten(2) @ x.flatten(2).mT, dim=2) for x in (student, teacher))
    assert_same(student, preset("ickd")(student, teacher), squares(s, t) / (3 * 5))


def test_seed_with_the_whole_batch_and_as_published() -> None:
    student, teacher = features(4, 6).requires_grad_(), features(4, 6, seed=1)
    bank = FeatureBank(10, 6, dtype=torch.float64)
    bank.push(features(10, 6, seed=2))
    keys = bank.keys(teacher)
    loss = preset("seed", teacher_tau=0.07)

    def cross_entropy(logits_s: torch.Tensor, logits_t: torch.Tensor) -> torch.Tensor:
        target = torch.softmax(logits_t / 0.07, 1)
        return -(target * torch.log_softmax(logits_s / 0.2, 1)).sum() / len(logits_s)

    s, t, k = unit(student), unit(teacher), unit(keys)
    expected = cross_entropy(s @ k.T, t @ k.T)
    assert_same(student, loss(student, teacher, student_keys=keys, teacher_keys=keys), expected)

    own = torch.ones(4, 14, dtype=torch.bool)
    own[:, :4] = torch.eye(4, dtype=torch.bool)
    actual = loss(student, teacher, student_keys=keys, teacher_keys=keys, pair_mask=own)
    s, queue = unit(student), k[4:]
    published = cross_entropy(
        torch.cat([(s * t).sum(1, keepdim=True), s @ queue.T], 1),
        torch.cat([(t * t).sum(1, keepdim=True), t @ queue.T], 1),
    )
    assert_same(student, actual, published)


def test_compress() -> None:
    student, teacher = features(4, 3).requires_grad_(), features(4, 6, seed=1)
    bank = FeatureBank(9, 3, 6, dtype=torch.float64)
    bank.push(features(9, 3, seed=2), features(9, 6, seed=3))
    student_keys, teacher_keys = bank.keys()
    actual = preset("compress")(
        student, teacher, student_keys=student_keys, teacher_keys=teacher_keys
    )
    log_s = torch.log_softmax(unit(student) @ unit(student_keys).T / 0.04, 1)
    t = torch.softmax(unit(teacher) @ unit(teacher_keys).T / 0.04, 1)
    assert_same(student, actual, F.kl_div(log_s, t, reduction="batchmean"))


def test_minilm_v2_leaves_padding_out() -> None:
    lengths, heads = (5, 3), 2
    student = features(2, heads, 5, 4).requires_grad_()
    teacher = features(2, heads, 5, 6, seed=1)
    mask = torch.arange(5) < torch.tensor(lengths)[:, None, None]  # [N, 1, L]
    total = student.new_zeros(())
    for n, length in enumerate(lengths):
        s, t = student[n, :, :length], teacher[n, :, :length]
        log_s = torch.log_softmax(s @ s.mT / 4**0.5, -1)
        total = total + F.kl_div(log_s, torch.softmax(t @ t.mT / 6**0.5, -1), reduction="sum")
    expected = total / (heads * sum(lengths))
    assert_same(student, preset("minilm_v2")(student, teacher, mask), expected)


@pytest.mark.parametrize("loss", ["kl", "cross_entropy"])
def test_clip_affinity_with_a_learned_scale(loss: str) -> None:
    image, text = (unit(features(5, 4, seed=seed)) for seed in (0, 1))
    teacher_image, teacher_text = (unit(features(5, 6, seed=seed)) for seed in (2, 3))
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    actual = preset("clip_affinity", loss=loss)(
        image,
        teacher_image,
        student_keys=text,
        teacher_keys=teacher_text,
        student_scale=scale,
        teacher_scale=20.0,
    )
    expected = scale.new_zeros(())
    for direction in (lambda x: x, lambda x: x.T):
        log_s = torch.log_softmax(direction(scale * image @ text.T), 1)
        t = torch.softmax(direction(20.0 * teacher_image @ teacher_text.T), 1)
        constant = (t * t.log()).sum() if loss == "kl" else 0
        expected = expected + (constant - (t * log_s).sum()) / (2 * 5)
    assert_same(scale, actual, expected)


def test_the_table_is_complete_and_readable() -> None:
    assert list_presets() == NAMES
    for name in NAMES:
        text = str(describe(name))
        assert text.startswith(f"{name}: ") and "weight:" in text
        assert describe(name).source and describe(name).formula
        module = preset(name)
        assert isinstance(module, torch.nn.modules.loss._Loss) and module.state_dict() == {}
        assert isinstance(module, AffinityLoss) or name == "rkd_angle"


@pytest.mark.parametrize(
    ("name", "published", "batch_free"),
    [("sp", 3000.0, 46.875), ("pkt", 30000.0, 468.75), ("rkd_distance", 25.0, None)],
)
def test_weights(pair, name: str, published: float, batch_free: float | None) -> None:
    entry = describe(name)
    assert entry.published_weight == published and entry.batch_free_weight == batch_free
    if batch_free is None:
        return
    assert f"{published:g} published, at batch 64" in str(entry)
    assert f"weight={batch_free:g}" in str(entry)
    # at the published batch size the two weights are one and the same loss
    student, teacher = features(64, 5).requires_grad_(), features(64, 4, seed=1)
    batchmean = preset(name, reduction="batchmean", weight=batch_free)(student, teacher)
    assert_same(student, batchmean, preset(name, weight=published)(student, teacher))


def test_published_weight_is_the_weight_to_pass(pair) -> None:
    for name in NAMES:
        weight = describe(name).published_weight
        if weight is not None:
            assert preset(name, weight=weight) is not None
    assert preset("cka", weight=describe("cka").published_weight)(*pair) == preset("cka")(*pair)


def test_overrides_reach_components_and_options() -> None:
    spec = preset("cc", gamma=0.1, taylor_order=3, weight=7.0, reduction="sum").spec
    assert str(spec.affinity) == "rbf(gamma=0.1, taylor_order=3)"
    assert (spec.weight, spec.reduction) == (7.0, "sum")
    assert str(preset("cc", unit=False, taylor_order=None).spec.affinity) == "rbf(unit=False)"
    assert preset("compress", tau=0.1).spec.normalization.tau == 0.1
    assert preset("seed", student_tau=0.1).spec.normalization.teacher_tau == 1e-4
    assert str(preset("sp", normalization="row_l1").spec.normalization) == "row_l1"
    assert str(preset("seed", normalization="softmax", tau=0.3).spec.normalization) == (
        "softmax(tau=0.3)"
    )
    assert preset("rkd_distance", beta=0.5, backend="reference").spec.loss.beta == 0.5
    # the table itself is not touched
    assert str(preset("cc").spec.affinity) == "rbf(taylor_order=2)"


@pytest.mark.parametrize(
    ("name", "overrides", "error", "message"),
    [
        ("spp", {}, ValueError, r"unknown preset 'spp' \(did you mean 'sp'\?\); valid names: sp, "),
        ("sp", {"gamma": 1.0}, TypeError, "'sp' has no option 'gamma'; valid options: reduction,"),
        ("sp", {"mask": None}, TypeError, r"no option 'mask' \(pass it when calling the loss\)"),
        ("rkd_angle", {"tau": 1.0}, TypeError, "'rkd_angle' has no option 'tau'.*beta"),
        ("pkt", {"eps": 1e-6}, ValueError, "'eps' in its affinity and its normalization and its"),
        ("seed", {"tau": 0.1}, ValueError, "override student_tau or teacher_tau, got tau"),
        ("sp", {"reduction": "avg"}, ValueError, "reduction must be one of .* got 'avg'"),
        ("sp", {"loss": "kl"}, ValueError, "kl"),
        ("cc", {"gamma": -1.0}, ValueError, "gamma"),
    ],
)
def test_bad_overrides(name: str, overrides: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        preset(name, **overrides)


PAGE = (Path(__file__).parent.parent / "docs" / "presets.md").read_text()


def test_the_page_has_the_table() -> None:
    lines = [line for line in PAGE.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert [row[0] for row in cells] == [f"`{name}`" for name in NAMES]
    for name, row in zip(NAMES, cells, strict=True):
        entry = describe(name)
        assert row[1] == (" / ".join(entry.triple) if entry.triple else "of its own")
        assert row[2] == ", ".join(f"{key}={value!r}" for key, value in entry.options.items())
        weight = "none" if entry.published_weight is None else f"{entry.published_weight:g}"
        batch = f" at batch {entry.published_batch}" if entry.published_batch else ""
        assert row[3] == weight + batch


def test_the_examples_of_the_page_run(capsys: pytest.CaptureFixture) -> None:
    namespace: dict = {}
    examples = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(examples) >= 7
    for example in examples:
        exec(compile(example, "docs/presets.md", "exec"), namespace)
    assert capsys.readouterr().out.startswith("sp: Tung & Mori")


def test_the_entry_that_describe_hands_out_cannot_be_written_to() -> None:
    entry = describe("sp")
    with pytest.raises(TypeError):
        entry.options["reduction"] = "sum"  # type: ignore[index]
    for twin in (copy.deepcopy(entry), pickle.loads(pickle.dumps(entry))):
        assert twin == entry and twin is not entry
    assert dataclasses.replace(entry, name="other").options == entry.options


@pytest.mark.parametrize("name", [["sp"], None, 3])
def test_a_name_that_is_no_string_is_refused(name) -> None:
    with pytest.raises(TypeError, match="name must be a string such as 'sp'"):
        describe(name)


def test_nst_is_about_pixels_alone() -> None:
    with pytest.raises(TypeError, match="'nst' has no option 'items'"):
        preset("nst", items="tokens")
