"""Every call of docs/migration.md against the peer's formula, reimplemented here, or its code."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import affkd_kernels as affkd

PAGE = Path(__file__).parent.parent / "docs" / "migration.md"
# the peer adds 1e-7 to the norm, which moves the digits from there on
TOLERANCE = {"PKT": 1e-5, "PKTLoss": 1e-5}


def rows() -> dict[tuple[str, str], str]:
    """{(section, their loss): our call} of the page's tables."""
    found, section = {}, ""
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ").split()[0]
        elif line.startswith("| `"):
            name, call = (cell.strip() for cell in line.strip("| ").split(" | ")[:2])
            found[section, name.replace("`", "")] = call.strip("`")
    return found


def inputs() -> SimpleNamespace:
    """One set of tensors under the names that the page uses."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    student, teacher = randn(8, 5).requires_grad_(), randn(8, 7)
    return SimpleNamespace(
        student=student,
        teacher=teacher,
        unit_student=F.normalize(student),
        unit_teacher=F.normalize(teacher),
        student_maps=randn(3, 4, 5, 6).requires_grad_(),
        teacher_maps=randn(3, 4, 5, 6),
        student_first=randn(3, 4, 5, 6).requires_grad_(),
        student_second=randn(3, 2, 5, 6).requires_grad_(),
        teacher_first=randn(3, 4, 5, 6),
        teacher_second=randn(3, 2, 5, 6),
    )


def similarity(x: SimpleNamespace) -> torch.Tensor:
    s, t = (F.normalize(f @ f.T) for f in (x.student, x.teacher))
    return (t - s).pow(2).sum() / len(s) ** 2


def pkt(x: SimpleNamespace) -> torch.Tensor:
    def probabilities(f: torch.Tensor) -> torch.Tensor:
        f = f / (f.pow(2).sum(1, keepdim=True).sqrt() + 1e-7)
        shifted = (f @ f.T + 1) / 2
        return shifted / shifted.sum(1, keepdim=True)

    s, t = probabilities(x.student), probabilities(x.teacher)
    return (t * ((t + 1e-7) / (s + 1e-7)).log()).mean()


def rkd(x: SimpleNamespace) -> torch.Tensor:
    def distances(f: torch.Tensor) -> torch.Tensor:
        squares = f.pow(2).sum(1)
        d = (squares[:, None] + squares - 2 * f @ f.T).clamp(min=1e-12).sqrt()
        d = d * (1 - torch.eye(len(f), dtype=f.dtype))
        return d / d[d > 0].mean()

    def angles(f: torch.Tensor) -> torch.Tensor:
        e = F.normalize(f[None] - f[:, None], dim=2)
        return e @ e.mT

    return 25 * F.smooth_l1_loss(distances(x.student), distances(x.teacher)) + (
        50 * F.smooth_l1_loss(angles(x.student), angles(x.teacher))
    )


def nst(x: SimpleNamespace) -> torch.Tensor:
    s, t = (F.normalize(f.flatten(2), dim=2) for f in (x.student_maps, x.teacher_maps))

    def poly(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return ((a[:, :, None] * b[:, None]).sum(3) ** 2).mean((1, 2))

    return (poly(t, t) + poly(s, s) - 2 * poly(s, t)).mean()


def fsp_matrix(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return (first.flatten(2)[:, :, None] * second.flatten(2)[:, None]).mean(3)


def fsp(x: SimpleNamespace) -> torch.Tensor:
    s = fsp_matrix(x.student_first, x.student_second)
    return (s - fsp_matrix(x.teacher_first, x.teacher_second)).pow(2).mean()


def spkd(x: SimpleNamespace) -> torch.Tensor:
    s, t = (F.normalize(f @ f.T, 1) for f in (x.student, x.teacher))
    return (t - s).norm() ** 2 / len(s) ** 2


def cckd_bilinear(x: SimpleNamespace) -> torch.Tensor:
    return torch.dist(x.student @ x.student.T, x.teacher @ x.teacher.T) / len(x.student) ** 2


def cckd_gaussian(x: SimpleNamespace) -> torch.Tensor:
    def series(f: torch.Tensor) -> torch.Tensor:
        g = f @ f.T
        return torch.exp(torch.tensor(-0.8, dtype=f.dtype)) * (1 + 0.8 * g + 0.32 * g**2)

    return torch.dist(series(x.unit_student), series(x.unit_teacher)) / len(x.student) ** 2


def chsim(x: SimpleNamespace) -> torch.Tensor:
    s, t = (f.flatten(2) for f in (x.student_maps, x.teacher_maps))
    s, t = (F.normalize(f @ f.mT, dim=2) for f in (s, t))
    return (s - t).pow(2).sum() / (s.shape[1] * len(s) ** 2)


def channel_affinity(x: SimpleNamespace) -> torch.Tensor:
    s, t = (F.normalize(f.flatten(2), dim=2) for f in (x.student_maps, x.teacher_maps))
    s, t = (f[:, :, :, None] * f[:, :, None] for f in (s, t))
    return ((s - t) / s.shape[-1]).norm(dim=(2, 3)).sum(1).mean()


def unsquared_fsp(x: SimpleNamespace) -> torch.Tensor:
    s = fsp_matrix(x.student_first, x.student_second)
    return (s - fsp_matrix(x.teacher_first, x.teacher_second)).norm(dim=1).sum() / len(s)


FORMULAS: dict[tuple[str, str], Callable[[SimpleNamespace], torch.Tensor]] = {
    ("RepDistiller", "Similarity"): similarity,
    ("RepDistiller", "PKT"): pkt,
    ("RepDistiller", "RKDLoss"): rkd,
    ("RepDistiller", "NSTLoss"): nst,
    ("RepDistiller", "FSP"): fsp,
    ("torchdistill", "SPKDLoss"): spkd,
    ("torchdistill", "PKTLoss"): pkt,
    ("torchdistill", "RKDLoss"): rkd,
    ("torchdistill", "CCKDLoss (bilinear)"): cckd_bilinear,
    ("torchdistill", "CCKDLoss (gaussian)"): cckd_gaussian,
    ("torchdistill", "ChSimLoss"): chsim,
    ("torchdistill", "AffinityLoss"): channel_affinity,
    ("torchdistill", "FSPLoss"): unsquared_fsp,
}
# torchdistill's class, its arguments, and the names of the inputs it is called with
PATHS = {"student_output_path": "f", "teacher_output_path": "f"}
MODULES = {"student_module_path": "f", "teacher_module_path": "f"}
LINEAR = {"student_linear_path": "f", "teacher_linear_path": "f", "reduction": "batchmean"}
LAYER = {"io": "output", "path": "f"}
FIRST, SECOND = {"io": "output", "path": "first"}, {"io": "output", "path": "second"}
FSP_PAIR = {
    "student_first": FIRST,
    "student_second": SECOND,
    "teacher_first": FIRST,
    "teacher_second": SECOND,
}
TORCHDISTILL = {
    "SPKDLoss": ("SPKDLoss", {**PATHS, "reduction": "batchmean"}, ""),
    "PKTLoss": (
        "PKTLoss",
        {**MODULES, "student_module_io": "output", "teacher_module_io": "output"},
        "",
    ),
    "RKDLoss": (
        "RKDLoss",
        {**PATHS, "dist_factor": 25.0, "angle_factor": 50.0, "reduction": "mean"},
        "",
    ),
    "CCKDLoss (bilinear)": ("CCKDLoss", {**LINEAR, "kernel_config": {"type": "bilinear"}}, ""),
    "CCKDLoss (gaussian)": (
        "CCKDLoss",
        {**LINEAR, "kernel_config": {"type": "gaussian", "gamma": 0.4, "max_p": 2}},
        "unit_",
    ),
    "ChSimLoss": (
        "ChSimLoss",
        {"feature_pairs": {"p": {"student": LAYER, "teacher": LAYER}}},
        "_maps",
    ),
    "AffinityLoss": ("AffinityLoss", MODULES, "_maps"),
    "FSPLoss": ("FSPLoss", {"fsp_pairs": {"p": FSP_PAIR}}, "_first"),
}


def test_the_page_and_the_formulas_name_the_same_losses() -> None:
    with_call = {key for key, call in rows().items() if call != "none"}
    assert with_call == set(FORMULAS)
    assert {name for section, name in with_call if section == "torchdistill"} == set(TORCHDISTILL)


def assert_same(
    x: SimpleNamespace, actual: torch.Tensor, expected: torch.Tensor, rtol: float
) -> None:
    # a torchdistill loss accumulates in float32 whatever its inputs
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=0, check_dtype=False)
    sources = [f for f in vars(x).values() if f.requires_grad and f.is_leaf]
    pairs = zip(
        *(
            torch.autograd.grad(loss, sources, allow_unused=True, retain_graph=True)
            for loss in (actual, expected)
        ),
        strict=True,
    )
    compared = 0
    for ours, theirs in pairs:
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            assert (ours - theirs).norm() <= 10 * rtol * theirs.norm()
            compared += 1
    assert compared


def ours(section: str, name: str, x: SimpleNamespace) -> torch.Tensor:
    return eval(rows()[section, name], {"affkd": affkd}, vars(x))


@pytest.mark.parametrize(("section", "name"), FORMULAS)
def test_our_call_gives_the_peers_formula(section: str, name: str) -> None:
    x = inputs()
    expected = FORMULAS[section, name](x)
    assert_same(x, ours(section, name, x), expected, TOLERANCE.get(name, 1e-9))


@pytest.mark.parametrize("name", TORCHDISTILL)
def test_our_call_gives_what_torchdistill_gives(name: str) -> None:
    losses = pytest.importorskip("torchdistill.losses.mid_level")
    class_name, arguments, kind = TORCHDISTILL[name]
    x = inputs()

    def layers(side: str) -> dict[str, dict[str, torch.Tensor]]:
        if kind == "_first":
            first, second = (getattr(x, f"{side}_{layer}") for layer in ("first", "second"))
            return {"first": {"output": first}, "second": {"output": second}}
        feature = getattr(x, f"{kind}{side}" if kind == "unit_" else f"{side}{kind}")
        return {"f": {"output": feature}}

    expected = getattr(losses, class_name)(**arguments)(layers("student"), layers("teacher"))
    assert_same(x, ours("torchdistill", name, x), expected, TOLERANCE.get(name, 1e-6))


def test_repdistillers_correlation_compares_no_two_samples_of_one_network() -> None:
    def correlation(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        delta = (s - t).abs()
        return (delta[:-1] * delta[1:]).sum(1).mean()

    s = torch.randn(6, 4, dtype=torch.float64)
    t = torch.randn(6, 4, dtype=torch.float64)
    order = torch.tensor([0, 2, 4, 1, 3, 5])
    # an affinity loss does not depend on the order of the samples; this one does
    assert not torch.isclose(correlation(s, t), correlation(s[order], t[order]))
    torch.testing.assert_close(affkd.preset("cc")(s, t), affkd.preset("cc")(s[order], t[order]))


def test_links_of_the_page_name_presets() -> None:
    named = re.findall(r'preset\("(\w+)"', PAGE.read_text())
    assert named and set(named) <= set(affkd.list_presets())
