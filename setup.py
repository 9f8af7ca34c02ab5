"""Builds the C++ kernels beside the pure Python package; pyproject.toml holds everything else.

AFFKD_BUILD_CPU=auto|0|1 (default auto): with ``auto`` the package installs without the kernels
where they cannot be built, and says why; with ``1`` that is an error. AFFKD_BUILD_CUDA is reserved.
AFFKD_SANITIZE=0|1 (default 0): ``1`` builds with AddressSanitizer and UndefinedBehaviorSanitizer,
for ``make sanitize``.
"""

from __future__ import annotations

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# the oldest torch whose binary interface the extension needs: 2.10
TORCH_TARGET = "0x020a000000000000"
X86 = platform.machine().lower() in ("x86_64", "amd64")
FLAGS = ["-std=c++17", "-O3", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-g0"]
SANITIZER_FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# the same kernels once per instruction set; which one runs is decided at run time
CAPABILITY_FLAGS = {
    "csrc/cpu/kernels_baseline.cpp": [],
    "csrc/cpu/kernels_avx2.cpp": ["-mavx2", "-mfma"],
    "csrc/cpu/kernels_avx512.cpp": [
        *("-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mfma"),
        "-mprefer-vector-width=512",
    ],
}
SOURCES = [
    *("csrc/ops.cpp", "csrc/angle.cpp"),
    *("csrc/cpu/arena.cpp", "csrc/cpu/batch.cpp", "csrc/cpu/capability.cpp"),
]


def requested(name: str) -> str:
    value = os.environ.get(name, "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{name} must be auto, 0 or 1, got {value!r}")
    return value


def sanitized() -> bool:
    value = os.environ.get("AFFKD_SANITIZE", "0")
    if value not in ("0", "1"):
        raise SystemExit(f"AFFKD_SANITIZE must be 0 or 1, got {value!r}")
    return value == "1"


def cpu_extension() -> Extension:
    """The extension, or an exception that says what is missing."""
    try:
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError as error:
        raise RuntimeError(
            f"torch cannot be imported here ({error}); "
            "install it and use pip install --no-build-isolation"
        ) from error
    kernels = [
        source for source in CAPABILITY_FLAGS if X86 or source == "csrc/cpu/kernels_baseline.cpp"
    ]
    return Extension(
        "affkd_kernels._cpu",
        SOURCES + kernels,
        depends=[str(header) for header in Path("csrc").rglob("*.h")],
        include_dirs=include_paths(),
        library_dirs=library_paths(),
        libraries=["torch", "torch_cpu"],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET)] + [("AFFKD_X86", None)] * X86,
        language="c++",
        py_limited_api=True,
    )


class BuildKernels(build_ext):
    """Compiles the sources side by side, each with the flags of its instruction set."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            if requested("AFFKD_BUILD_CPU") == "1":
                raise
            skip(error)
            self.extensions = []

    def build_extension(self, extension: Extension) -> None:
        # line numbers for the reports; -O1 halves the time that instrumented code takes to compile
        checks = [*SANITIZER_FLAGS, "-O1", "-g1"] if sanitized() else []

        def compile_source(source: str) -> list[str]:
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                include_dirs=extension.include_dirs,
                macros=extension.define_macros,
                depends=extension.depends,
                extra_postargs=FLAGS + CAPABILITY_FLAGS.get(source, []) + checks,
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = list(pool.map(compile_source, extension.sources))
        self.compiler.link_shared_object(
            [name for names in compiled for name in names],
            self.get_ext_fullpath(extension.name),
            libraries=extension.libraries,
            library_dirs=extension.library_dirs,
            extra_postargs=checks,
            target_lang="c++",
        )


def skip(reason: Exception) -> None:
    print(
        f"affkd_kernels: installing without the C++ CPU kernels: {reason}\n"
        "affkd_kernels: AFFKD_BUILD_CPU=1 makes this an error, AFFKD_BUILD_CPU=0 does not try",
        file=sys.stderr,
    )


def extensions() -> list[Extension]:
    choice = requested("AFFKD_BUILD_CPU")
    requested("AFFKD_BUILD_CUDA")
    if choice == "0":
        return []
    try:
        return [cpu_extension()]
    except RuntimeError as error:
        if choice == "1":
            raise SystemExit(f"affkd_kernels: {error}") from error
        skip(error)
        return []


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
