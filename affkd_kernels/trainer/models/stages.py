"""The maps of a network that a term on ``stages`` compares, one pair of maps after the other."""

from __future__ import annotations

# how a term asks for them
STAGES = "stages"


def _maps(*numbers: int) -> tuple[str, ...]:
    return tuple(f"features.maps.stage{number}" for number in numbers)


# the maps that the published comparison (RepDistiller) takes of its networks: what the stem returns
# is left out, and of VGG the first stage stands for it; MobileNetV2 has one for each size
STAGES_OF: dict[str, tuple[str, ...]] = {
    **{f"resnet{depth}": _maps(1, 2, 3) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": _maps(1, 2, 3) for depth in (8, 32)},
    "resnet50": _maps(1, 2, 3, 4),
    **{f"wrn_{d}_{w}": _maps(1, 2, 3) for d, w in ((16, 1), (16, 2), (40, 1), (40, 2))},
    "vgg8": _maps(2, 3, 4, 5),
    "vgg13": _maps(2, 3, 4, 5),
    "mobilenet_v2_half": _maps(2, 3, 5, 7),
    "shufflenet_v1": _maps(1, 2, 3),
    "shufflenet_v2": _maps(1, 2, 3),
}


def stage_pairs(student: str, teacher: str) -> list[tuple[str, str]]:
    """Dotted paths of the maps of a student and a teacher that belong together, from the first.

    Raises:
        ValueError: a network whose stages are not known, or networks of different numbers of them.
    """
    for side, name in (("student", student), ("teacher", teacher)):
        if name not in STAGES_OF:
            raise ValueError(
                f"a term compares {STAGES!r}, but those of the {side} {name!r} are not known; name "
                "one module a term, or enter them in affkd_kernels.trainer.models.STAGES_OF, which "
                f"has {', '.join(sorted(STAGES_OF))}"
            )
    ours, theirs = STAGES_OF[student], STAGES_OF[teacher]
    if len(ours) != len(theirs):
        raise ValueError(
            f"a term compares {STAGES!r}, but the student {student!r} has {len(ours)} and the "
            f"teacher {teacher!r} has {len(theirs)}; name one module a term"
        )
    return list(zip(ours, theirs, strict=True))
