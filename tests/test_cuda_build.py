"""The build decides about the CUDA kernels by nvcc and torch, and goes on without them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from setuptools import Distribution

from affkd_kernels.kernels import extension

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, in an environment that asks for nothing."""
    for name in ("CUDA_HOME", "AFFKD_BUILD_CUDA", "AFFKD_CUDA_ARCHITECTURES", "AFFKD_SANITIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(ROOT)
    specification = importlib.util.spec_from_file_location("affkd_setup", ROOT / "setup.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CUDA toolkit of release 13.0 that knows two architectures and compiles nothing."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        '  --version) echo "Cuda compilation tools, release 13.0, V13.0.88";;\n'
        "  --list-gpu-code) echo sm_75; echo sm_80; echo sm_90;;\n"
        "  *) exit 1;;\n"
        "esac\n"
    )
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    return nvcc


@pytest.fixture
def torch_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.1")


def libraries(build: ModuleType) -> list[str]:
    return [kernels.name for kernels in build.extensions()]


def test_nvcc_of_cuda_home_comes_first(
    build: ModuleType, toolkit: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert build.find_nvcc() == toolkit
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", str(toolkit.parent), prepend=os.pathsep)
    assert build.find_nvcc() == toolkit


@pytest.mark.usefixtures("torch_of_cuda")
def test_both_libraries_are_built_where_nvcc_is(build: ModuleType, toolkit: Path) -> None:
    assert libraries(build) == ["affkd_kernels._cpu", "affkd_kernels._cuda"]
    assert build.cuda_kernels().architectures == ["80", "90"]


@pytest.mark.usefixtures("torch_of_cuda")
def test_the_code_runs_on_every_card_from_the_oldest_on(build: ModuleType) -> None:
    assert build.code_flags(["80", "90", "120"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_80,code=compute_80",
    ]


@pytest.mark.usefixtures("torch_of_cuda")
def test_architectures_can_be_chosen(
    build: ModuleType, toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFFKD_CUDA_ARCHITECTURES", "90")
    assert build.cuda_kernels().architectures == ["90"]
    monkeypatch.setenv("AFFKD_CUDA_ARCHITECTURES", "90;120")
    with pytest.raises(SystemExit, match="sm_75, sm_80, sm_90 .* got '90;120'"):
        build.cuda_kernels()


@pytest.mark.usefixtures("torch_of_cuda")
def test_what_changes_while_nvcc_runs_is_compiled_the_next_time(
    build: ModuleType, toolkit: Path, tmp_path: Path
) -> None:
    header, source, runs = (tmp_path / name for name in ("a.cuh", "a.cu", "runs"))
    for path in (header, source, runs):
        path.touch()
    kernels = build.cuda_kernels()
    kernels.depends = [str(header)]
    command = build.BuildKernels(Distribution())
    command.build_temp, command.force = str(tmp_path / "objects"), False

    def compile_with(nvcc: str) -> int:
        """How often nvcc has run after another build; its last argument is what it makes."""
        toolkit.write_text(f'#!/bin/sh\necho >> {runs}; for last; do :; done; {nvcc} > "$last"\n')
        command.compile_cuda(str(source), kernels)
        return len(runs.read_text().splitlines())

    assert compile_with(f"echo changed >> {header}; sleep 0.1; echo") == 1
    assert [compile_with("echo") for _ in range(3)] == [2, 2, 2]
    header.write_text("")
    # a compiler that fails leaves nothing that would pass for the new state
    with pytest.raises(Exception, match="nvcc"):
        compile_with("exit 1;")
    assert [compile_with("echo") for _ in range(2)] == [4, 4]
    source.write_text("// as old as the object, with a clock that goes wrong")
    os.utime(source, (0, 0))
    assert compile_with("echo") == 5


def no_nvcc(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    monkeypatch.setenv("CUDA_HOME", str(folder / "nothing"))
    return "there is no .*nothing/bin/nvcc"


def torch_without_cuda(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    monkeypatch.setattr(torch.version, "cuda", None)
    return "is not a CUDA build"


def torch_of_another_cuda(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    return "nvcc is of CUDA 13.0 and torch of 12.8"


@pytest.mark.usefixtures("torch_of_cuda", "toolkit")
@pytest.mark.parametrize("lack", [no_nvcc, torch_without_cuda, torch_of_another_cuda])
def test_without_what_it_takes_the_package_installs_all_the_same(
    lack, build: ModuleType, monkeypatch, tmp_path: Path, capsys
) -> None:
    reason = lack(monkeypatch, tmp_path)
    assert libraries(build) == ["affkd_kernels._cpu"]
    told = capsys.readouterr().err
    assert "without the C++ CUDA kernels" in told and "AFFKD_BUILD_CUDA=1" in told
    monkeypatch.setenv("AFFKD_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match=reason):
        build.extensions()


@pytest.mark.usefixtures("torch_of_cuda", "toolkit")
@pytest.mark.parametrize("name, value", [("AFFKD_BUILD_CUDA", "0"), ("AFFKD_SANITIZE", "1")])
def test_the_cuda_kernels_are_not_tried(
    name: str, value: str, build: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv(name, value)
    assert libraries(build) == ["affkd_kernels._cpu"]
    assert not capsys.readouterr().err


def test_a_choice_that_is_none_is_named(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFFKD_BUILD_CUDA", "yes")
    with pytest.raises(SystemExit, match="AFFKD_BUILD_CUDA must be auto, 0 or 1, got 'yes'"):
        build.extensions()


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is not a CUDA build")
@pytest.mark.parametrize("choice", ["auto", "1"])
def test_a_compiler_that_fails_is_an_error_only_where_the_kernels_were_asked_for(
    choice: str, toolkit: Path, tmp_path: Path
) -> None:
    nvcc = toolkit.read_text().replace("13.0", torch.version.cuda or "")
    toolkit.write_text(nvcc)
    environment = {**os.environ, "CXX": "false", "AFFKD_BUILD_CPU": "0", "AFFKD_BUILD_CUDA": choice}
    command = ["setup.py", "--quiet", "build_ext", f"--build-lib={tmp_path}"]
    done = subprocess.run(
        [sys.executable, *command, f"--build-temp={tmp_path / 'objects'}"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode != 0) == (choice == "1")
    assert ("without the C++ CUDA kernels" in done.stderr) == (choice == "auto")
    assert not list(tmp_path.rglob("*.so"))


def test_doctor_says_why_there_are_no_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    doctor = pytest.importorskip("affkd_kernels.trainer.doctor")
    monkeypatch.setattr(extension, "load_cuda", lambda: "there is no nvcc")
    assert doctor.libraries()["C++ for GPUs"] == "there is no nvcc"
