"""Builds the compiled kernels beside the pure Python package; pyproject.toml holds everything else.

AFFKD_BUILD_CPU=auto|0|1 and AFFKD_BUILD_CUDA=auto|0|1 (default auto): with ``auto`` the package
installs without the kernels that cannot be built, and says why; with ``1`` that is an error.
AFFKD_CUDA_ARCHITECTURES="80;90" compiles for these GPU architectures instead of all.
AFFKD_SANITIZE=0|1 (default 0): ``1`` builds the CPU kernels alone, with AddressSanitizer and
UndefinedBehaviorSanitizer, for ``make sanitize``.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# the oldest torch whose binary interface the extensions need: 2.10
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
CPU_SOURCES = [
    *("csrc/ops.cpp", "csrc/angle.cpp"),
    *("csrc/cpu/arena.cpp", "csrc/cpu/batch.cpp", "csrc/cpu/capability.cpp"),
]
# torch's headers go through the host compiler alone, once; nvcc would read them per architecture
CUDA_SOURCES = [
    *("csrc/cuda/ops.cpp", "csrc/cuda/angle.cpp", "csrc/cuda/device.cpp"),
    "csrc/cuda/launch.cu",
]
# machine code for one card of each generation runs on all of it; PTX of the oldest lets the driver
# compile for whatever is not among them
CUDA_ARCHITECTURES = ("80", "90", "100", "120")
NVCC_FLAGS = [
    *("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden,-fno-math-errno"),
    *("-Xfatbin", "-compress-all"),
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


class Kernels(Extension):
    """One library of kernels."""

    def __init__(self, name: str, variable: str, sources: list[str], libraries: list[str]) -> None:
        try:
            from torch.utils.cpp_extension import include_paths, library_paths
        except ImportError as error:
            raise RuntimeError(
                f"torch cannot be imported here ({error}); "
                "install it and use pip install --no-build-isolation"
            ) from error
        super().__init__(
            f"affkd_kernels.{name}",
            sources,
            depends=[
                str(header) for end in ("h", "cuh") for header in Path("csrc").rglob(f"*.{end}")
            ],
            include_dirs=include_paths(),
            library_dirs=library_paths(),
            libraries=libraries,
            define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET)],
            language="c++",
            py_limited_api=True,
        )
        self.variable = variable  # of the environment, that asks for this library
        self.nvcc: Path | None = None
        self.architectures: list[str] = []


def cpu_kernels() -> Kernels:
    """The CPU kernels, or an exception that says what is missing."""
    per_capability = [
        source for source in CAPABILITY_FLAGS if X86 or source == "csrc/cpu/kernels_baseline.cpp"
    ]
    sources = CPU_SOURCES + per_capability
    kernels = Kernels("_cpu", "AFFKD_BUILD_CPU", sources, ["torch", "torch_cpu"])
    kernels.define_macros += [("AFFKD_X86", None)] * X86
    return kernels


def cuda_kernels() -> Kernels:
    """The CUDA kernels, or an exception that says what is missing.

    Whether there is a GPU does not matter: the machines that build images have none.
    """
    libraries = ["torch", "torch_cpu", "torch_cuda"]
    kernels = Kernels("_cuda", "AFFKD_BUILD_CUDA", CUDA_SOURCES, libraries)
    import torch

    if torch.version.cuda is None:
        raise RuntimeError(f"torch {torch.__version__} is not a CUDA build")
    kernels.nvcc = find_nvcc()
    release = nvcc_release(kernels.nvcc)
    major = release.partition(".")[0]
    if torch.version.cuda.partition(".")[0] != major:
        raise RuntimeError(
            f"{kernels.nvcc} is of CUDA {release} and torch of {torch.version.cuda}, which "
            "brings another runtime library"
        )
    kernels.architectures = architectures(kernels.nvcc)
    kernels.define_macros += [
        ("USE_CUDA", None),
        ("AFFKD_CUDA_ARCHITECTURES", ",".join(kernels.architectures)),
        ("AFFKD_CUDA_MAJOR", major),
    ]
    return kernels


def find_nvcc() -> Path:
    """nvcc of CUDA_HOME where that is set, else of PATH, else of the usual place."""
    home = os.environ.get("CUDA_HOME")
    on_path = None if home else shutil.which("nvcc")
    nvcc = Path(on_path) if on_path else Path(home or "/usr/local/cuda", "bin", "nvcc")
    if not nvcc.is_file():
        raise RuntimeError(f"there is no {nvcc}" + ("" if home else " and no nvcc on PATH"))
    return nvcc


def nvcc_release(nvcc: Path) -> str:
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", answer)
    if found is None:
        raise RuntimeError(f"{nvcc} --version does not tell a release: {answer!r}")
    return found[1]


def architectures(nvcc: Path) -> list[str]:
    """The architectures to compile for: those asked for, or all that this nvcc knows."""
    asked = os.environ.get("AFFKD_CUDA_ARCHITECTURES")
    command = [nvcc, "--list-gpu-code"]
    known = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    if not asked:
        return [number for number in CUDA_ARCHITECTURES if f"sm_{number}" in known]
    unknown = [number for number in asked.split(";") if f"sm_{number}" not in known]
    if unknown:
        raise SystemExit(
            f"AFFKD_CUDA_ARCHITECTURES must list some of {', '.join(known)} by number, "
            f"separated by semicolons, got {asked!r}"
        )
    return asked.split(";")


class BuildKernels(build_ext):
    """Compiles the sources of each library side by side."""

    def build_extensions(self) -> None:
        built = []
        for kernels in self.extensions:
            try:
                self.build_extension(kernels)
                built.append(kernels)
            except Exception as error:
                if requested(kernels.variable) == "1":
                    raise
                skip(kernels.variable, error)
        # an editable install copies what is listed here
        self.extensions = built

    def build_extension(self, kernels: Kernels) -> None:
        def compile_source(source: str) -> str:
            if source.endswith(".cu"):
                return self.compile_cuda(source, kernels)
            return self.compile_cpp(source, kernels)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_source, kernels.sources))
        target = self.get_ext_fullpath(kernels.name)
        if kernels.nvcc is not None:
            self.link_cuda(objects, target, kernels)
            return
        self.compiler.link_shared_object(
            objects,
            target,
            libraries=kernels.libraries,
            library_dirs=kernels.library_dirs,
            extra_postargs=SANITIZER_FLAGS if sanitized() else [],
            target_lang="c++",
        )

    def compile_cpp(self, source: str, kernels: Kernels) -> str:
        # line numbers for the reports; -O1 halves the time that instrumented code takes to compile
        checks = [*SANITIZER_FLAGS, "-O1", "-g1"] if sanitized() else []
        (name,) = self.compiler.compile(
            [source],
            output_dir=self.build_temp,
            include_dirs=kernels.include_dirs,
            macros=kernels.define_macros,
            depends=kernels.depends,
            extra_postargs=FLAGS + CAPABILITY_FLAGS.get(source, []) + checks,
        )
        return name

    def compile_cuda(self, source: str, kernels: Kernels) -> str:
        """Compiled once for all architectures, and again when what it is made from differs."""
        folder = Path(self.build_temp, "-".join(["sm", *kernels.architectures]))
        target = folder / Path(source).with_suffix(".o")
        stamp = target.with_suffix(".inputs")
        flags = [*NVCC_FLAGS, *code_flags(kernels.architectures)]
        # read before nvcc starts: what changes while it runs will differ the next time
        inputs = digest([*flags, str(kernels.nvcc)], [source, *kernels.depends])
        if self.force or not (target.exists() and stamp.exists() and stamp.read_text() == inputs):
            target.parent.mkdir(parents=True, exist_ok=True)
            stamp.unlink(missing_ok=True)
            threads = f"--threads={os.cpu_count()}"
            self.run_nvcc(kernels, [*flags, threads, "-c", source, "-o", str(target)])
            stamp.write_text(inputs)
        return str(target)

    def link_cuda(self, objects: list[str], target: str, kernels: Kernels) -> None:
        """By nvcc, which knows where its runtime library is."""
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        folders = [f"-L{folder}" for folder in kernels.library_dirs]
        libraries = [f"-l{library}" for library in kernels.libraries]
        command = ["-shared", "-cudart=shared", *objects, *folders, *libraries, "-o", target]
        self.run_nvcc(kernels, command)

    def run_nvcc(self, kernels: Kernels, arguments: list[str]) -> None:
        host_compiler = os.environ.get("CXX", "").split()[:1]
        self.spawn([str(kernels.nvcc), *(f"-ccbin={name}" for name in host_compiler), *arguments])


def digest(arguments: list[str], files: list[str]) -> str:
    """Of a command's arguments and of the names and contents of the files it reads."""
    found = hashlib.sha256("\0".join(arguments).encode())
    for name in sorted(files):
        found.update(f"\0{name}\0".encode() + Path(name).read_bytes())
    return found.hexdigest()


def code_flags(architectures: list[str]) -> list[str]:
    oldest = min(architectures, key=int)
    codes = [(number, f"sm_{number}") for number in architectures]
    codes.append((oldest, f"compute_{oldest}"))
    return [f"-gencode=arch=compute_{number},code={code}" for number, code in codes]


def skip(variable: str, reason: Exception) -> None:
    device = variable.rpartition("_")[2]
    print(
        f"affkd_kernels: installing without the C++ {device} kernels: {reason}\n"
        f"affkd_kernels: {variable}=1 makes this an error, {variable}=0 does not try",
        file=sys.stderr,
    )


def extensions() -> list[Kernels]:
    """What was asked for and can be built here."""
    found = []
    for variable, kernels in (("AFFKD_BUILD_CPU", cpu_kernels), ("AFFKD_BUILD_CUDA", cuda_kernels)):
        choice = requested(variable)
        if choice == "0" or (sanitized() and kernels is cuda_kernels):
            continue
        try:
            found.append(kernels())
        except RuntimeError as error:
            if choice == "1":
                raise SystemExit(f"affkd_kernels: {error}") from error
            skip(variable, error)
    return found


# the tests look at the functions above
if __name__ == "__main__":
    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildKernels},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
