"""The CUDA kernels on a CPU: builds them with the host's compiler, and calls them as the op would.

`Library.loss_and_grad` and `row_losses` take the arguments of the functions of the same names in
`affkd_kernels.kernels.cuda`, and CPU tensors.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from affkd_kernels.inputs import Inputs
from affkd_kernels.kernels.options import static_options
from affkd_kernels.kernels.result import LossAndGrad, Needs
from affkd_kernels.spec import LossSpec

from .structures import (
    FeatureView,
    MaskView,
    PairMaskView,
    Params,
    ScalarView,
    Settings,
    WeightView,
)

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
PHASES = ("gram", "means", "statistics", "count", "rows", "center", "product")
WORKERS = 2
PRECISIONS = ("ieee", "tf32x3", "tf32")
# what a GPU always has, and only where the sources ask for it
FUSED = ["-mfma", "-ffp-contract=off"]
_STORAGES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_NO_BUDGET = 2**62
_STUDENT = Needs()
_I64, _F64, _POINTER, _BOOL = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p, ctypes.c_bool


def why_unusable() -> str | None:
    """The reason for not building the kernels here, None if that works."""
    if COMPILER is None:
        return "there is no C++ compiler"
    return None if sys.platform == "linux" else "the fibers are those of Linux"


def has_fused_multiply_add() -> bool:
    """Whether this is an x86 processor with FMA; others have it without a flag, or not at all."""
    information = Path("/proc/cpuinfo")
    return information.exists() and " fma " in information.read_text()


def build(source: str = "driver.cpp", sanitizer: str = "") -> Path:
    """A program of this folder with the kernels in it, once for every state of their sources."""
    assert COMPILER is not None
    flags = ["-std=c++20", "-O1", "-pthread", f"-I{HERE}", f"-I{CSRC / 'cuda'}"]
    flags += FUSED if has_fused_multiply_add() else []
    flags += ["-fPIC", "-shared"] if source == "driver.cpp" else []
    flags += [f"-fsanitize={sanitizer}", "-g"] if sanitizer else []
    digest = hashlib.sha256(" ".join([COMPILER, source, *flags]).encode())
    for path in sorted([*HERE.iterdir(), *CSRC.glob("*.h"), *CSRC.glob("cuda/*.cuh")]):
        if path.suffix in (".h", ".cpp", ".cuh"):
            digest.update(path.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"affkd-cuda-host-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    target = folder / digest.hexdigest()[:24]
    if not target.exists():
        unfinished = target.with_suffix(f".{os.getpid()}")
        command = [COMPILER, *flags, str(HERE / source), "-o", str(unfinished)]
        subprocess.run(command, check=True)
        unfinished.replace(target)
    return target


def barriers() -> list[str]:
    """Every barrier in the bodies of the kernels, as FILE:LINE."""
    return [
        f"{path.name}:{number}"
        for path in sorted(CSRC.glob("cuda/*.cuh"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if "__syncthreads" in line
    ]


def stress(sanitizer: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run stress.cpp under a sanitizer, which ends it with 66 if it has anything to report."""
    command = [str(build("stress.cpp", sanitizer)), *arguments]
    if sanitizer == "thread" and (setarch := shutil.which("setarch")):
        # it does not bear with memory at random addresses
        command = [setarch, "-R", *command]
    options = "halt_on_error=1:exitcode=66"
    environment = {
        **os.environ,
        "ASAN_OPTIONS": f"{options}:detect_leaks=0:detect_stack_use_after_return=0",
        "TSAN_OPTIONS": options,
        "UBSAN_OPTIONS": options,
    }
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=1200, check=False
    )


@functools.cache
def met() -> dict[str, list[str]]:
    """The cases of stress_calls.h that meet each barrier."""
    found: dict[str, list[str]] = {}
    for line in stress("", "reach").stdout.splitlines():
        site, case = line.split()
        found.setdefault(Path(site).name, []).append(case)
    return found


class Library:
    """The kernels of one build."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        for name in ("params_size", "prepare", "run"):
            getattr(self._library, name).restype = _I64
        assert self._library.params_size() == ctypes.sizeof(Params)
        self.launches: list[str] = []
        self.workspace_bytes = 0  # of the last call
        self.most_slots = 4096

    def limit_workers(self, count: int) -> None:
        """How many blocks run at a time, WORKERS unless told."""
        self._library.limit_workers(_I64(count))

    def loss_and_grad(
        self,
        spec: LossSpec,
        inputs: Inputs,
        needs: Needs = _STUDENT,
        precision: str = "ieee",
        budget: int = _NO_BUDGET,
    ) -> LossAndGrad:
        """As the op's function of this name; `budget` bounds the bytes of the pairs held.

        In float, a statistic that comes out of the tiles has at most `most_slots` parts.
        """
        axis = "row" if inputs.student_keys is None else spec.axis
        if axis == "row":
            return self._call(spec, inputs, needs, precision, budget, 1.0, False)
        if axis == "both" and budget == _NO_BUDGET:
            return self._call(spec, inputs, needs, precision, budget, 0.5, False, columns=True)
        traded = Needs(needs.student_keys, needs.student, needs.student_scale)
        factor = 0.5 if axis == "both" else 1.0
        by_column = self._call(spec, inputs.exchanged(), traded, precision, budget, factor, True)
        by_column = by_column._replace(
            grad_student=by_column.grad_student_keys, grad_student_keys=by_column.grad_student
        )
        if axis == "column":
            return by_column
        by_row = self._call(spec, inputs, needs, precision, budget, factor, False)
        return LossAndGrad(*(None if a is None else a + b for a, b in zip(by_row, by_column)))  # noqa: B905

    def row_losses(
        self, spec: LossSpec, inputs: Inputs, precision: str = "ieee", budget: int = _NO_BUDGET
    ) -> Tensor:
        exchanged = spec.axis == "column" and inputs.student_keys is not None
        inputs = inputs.exchanged() if exchanged else inputs
        rows = torch.full(inputs.student.shape[:2], torch.nan, dtype=inputs.dtype)
        self._call(spec, inputs, Needs(False), precision, budget, 1.0, exchanged, rows)
        return rows

    def angle(
        self, distances: Sequence[Tensor], beta: float, need_slope: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """The op cuda_angle: squared and inverse distances of student, then of teacher."""
        matrices, items = distances[0].shape[:2]
        loss = torch.full((), torch.nan, dtype=torch.float64)
        slope = torch.full_like(distances[0], torch.nan) if need_slope else None
        views = (_POINTER * 4)(*(x.data_ptr() for x in distances))
        self._library.run_angle(
            views, _I64(matrices), _I64(items), _F64(beta),
            _BOOL(distances[1].dtype == torch.float64),
            None if slope is None else _POINTER(slope.data_ptr()), _POINTER(loss.data_ptr()),
        )  # fmt: skip
        return loss, slope

    def _call(
        self,
        spec: LossSpec,
        inputs: Inputs,
        needs: Needs,
        precision: str,
        budget: int,
        factor: float,
        exchanged: bool,
        rows: Tensor | None = None,
        columns: bool = False,
    ) -> LossAndGrad:
        dtype = inputs.dtype

        def unwritten(like: Tensor | None, wanted: bool) -> Tensor | None:
            return (
                torch.full(like.shape, torch.nan, dtype=dtype)
                if wanted and like is not None
                else None
            )

        scalar = torch.empty(())
        result = LossAndGrad(
            torch.full((), torch.nan, dtype=dtype),
            unwritten(inputs.student, needs.student),
            unwritten(inputs.student_keys, needs.student_keys),
            unwritten(scalar, needs.student_scale),
        )
        params = pack(spec, inputs, needs, precision, factor, exchanged)
        params.columns = columns
        params.loss = result.loss.data_ptr()
        outputs = ("query_gradient", "key_gradient", "scale_gradient", "row_losses")
        for name, tensor in zip(outputs, (*result[1:], rows), strict=True):
            setattr(params, name, None if tensor is None else tensor.data_ptr())
        size = self._library.prepare(ctypes.byref(params), _I64(budget))
        if not params.wide:
            params.state_slots = min(params.state_slots, self.most_slots)
        self.workspace_bytes = size
        # not a number it is not told
        workspace = torch.full((size + 256,), 0xFF, dtype=torch.uint8)
        aligned = (workspace.data_ptr() + 255) // 256 * 256
        phases = (ctypes.c_int32 * 1024)()
        count = self._library.run(ctypes.byref(params), _POINTER(aligned), _I64(1024), phases)
        self.launches = [PHASES[phase] for phase in phases[: min(count, 1024)]]
        return result


def pack(
    spec: LossSpec, inputs: Inputs, needs: Needs, precision: str, factor: float, exchanged: bool
) -> Any:
    """The arguments as csrc/cuda/ops.cpp packs them."""
    self_affinity = inputs.student_keys is None
    dims = (inputs.student.shape[-1], inputs.teacher.shape[-1])
    choices, numbers = static_options(
        spec, needs, "dense", factor, exchanged, not self_affinity, dims
    )
    settings = Settings(*choices[:7], choices[10], *numbers[:10])
    keys = inputs.student if inputs.student_keys is None else inputs.student_keys
    teacher_keys = inputs.teacher if inputs.teacher_keys is None else inputs.teacher_keys
    return Params(
        settings=settings,
        precision=PRECISIONS.index(precision),
        wide=inputs.dtype == torch.float64,
        self=self_affinity,
        has_diagonal=bool(choices[7]),
        diagonal_offset=choices[8],
        reduction=choices[9],
        weight=numbers[10],
        matrices=inputs.student.shape[0],
        queries=inputs.student.shape[1],
        keys=keys.shape[1],
        student=_features(inputs.student),
        teacher=_features(inputs.teacher),
        student_keys=_features(keys),
        teacher_keys=_features(teacher_keys),
        mask=_view(MaskView, inputs.mask),
        key_mask=_view(MaskView, inputs.mask if self_affinity else inputs.key_mask),
        pair_mask=_view(PairMaskView, inputs.pair_mask),
        row_weight=_view(WeightView, inputs.row_weight, storage=True),
        student_scale=_view(ScalarView, inputs.student_scale, storage=True),
        teacher_scale=_view(ScalarView, inputs.teacher_scale, storage=True),
    )


def _features(x: Tensor) -> Any:
    return FeatureView(x.data_ptr(), _STORAGES.index(x.dtype), x.shape[2], *x.stride())


def _view(kind: Any, x: Tensor | None, storage: bool = False) -> Any:
    if x is None:
        return kind()
    stored: Sequence[int] = [_STORAGES.index(x.dtype)] if storage else []
    return kind(x.data_ptr(), *stored, *x.stride())
