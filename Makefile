# Every target works from a fresh clone: it creates the environment it needs first.
# `make help` lists the targets.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= auto
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# what an editable install is made of: a change here, and only here, installs again
SOURCES := pyproject.toml $(wildcard setup.py MANIFEST.in) $(shell find csrc -type f 2>/dev/null)
GPU_TESTS := $(wildcard tests/test_gpu_*.py) tests/test_fused.py $(wildcard tests/test_angle*.py) \
	tests/test_factored.py tests/test_ops.py tests/test_benchmarks_gpu.py
# beside, never over, the library that is installed
SANITIZED := build/sanitize/affkd_kernels/_cpu.abi3.so

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-all gpu-check sanitize lint type format wheel bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

venv: $(VENV)/.stamp-test ## the environment with everything the tests need

demo: $(VENV)/.stamp-demo ## train a teacher and tiny students on 5,000 MNIST images, print the table
	$(BIN)/affkd demo

test: $(VENV)/.stamp-test ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) tests

test-all: $(VENV)/.stamp-test ## the same, every triple in Triton's interpreter included
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "" tests

# with the machine's own Python, torch and nvcc: a machine with a GPU may have no network
gpu-check: ## on a machine with a GPU: build, test, look for races, measure
	AFFKD_BUILD_CUDA=1 $(PYTHON) setup.py --quiet build_ext --inplace
	CUBLAS_WORKSPACE_CONFIG=:4096:8 $(PYTHON) -m pytest --device cuda $(GPU_TESTS)
	for tool in memcheck racecheck initcheck synccheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
		--kernel-name kernel_substring=affkd $(PYTHON) -m pytest --device cuda \
		-k "cpp and (odd_shapes or edges)" tests/test_fused.py || exit 1; \
	done
	$(PYTHON) -m benchmarks.run --suite gpu --json build/gpu.json

# no capturing: the report must come out although the process that makes it dies of it
sanitize: $(SANITIZED) ## the tests of the C++ kernels under sanitizers, races between CUDA threads included
	LD_PRELOAD="$(foreach name,asan ubsan,$(shell $(CXX) -print-file-name=lib$(name).so))" \
	ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:max_malloc_fill_size=1073741824:malloc_fill_byte=255 \
	UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 AFFKD_CPU_LIBRARY=$(CURDIR)/$(SANITIZED) \
	$(BIN)/python -m pytest --capture=no -m "not slow" -k "cpu or cpp or angle" \
		tests/test_fused.py $(wildcard tests/test_angle*.py tests/test_cpu_*.py)
	AFFKD_CUDA_HOST_EVERY=11 $(BIN)/python -m pytest -k "Sanitizers or barrier" tests/test_cuda_host.py \
		tests/test_cuda_barriers.py

$(SANITIZED): $(SOURCES) | $(VENV)/.stamp-test
	AFFKD_SANITIZE=1 AFFKD_BUILD_CPU=1 $(BIN)/python setup.py --quiet build_ext \
		--build-lib build/sanitize --build-temp build/sanitize/objects

lint: $(VENV)/.stamp-test ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(VENV)/.stamp-test ## mypy on the package
	$(BIN)/mypy

format: $(VENV)/.stamp-dev ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs -r $(BIN)/clang-format -i

wheel: $(VENV)/.stamp-test ## build a wheel into dist/
	$(BIN)/python -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .

bench: $(VENV)/.stamp-bench ## run the benchmarks
	$(BIN)/python -m benchmarks.run

clean: ## remove what builds and tests leave; the environment stays
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch goes in before the package and the build runs in this environment: an isolated build
# would download a second torch only to compile against it
$(VENV)/.stamp-%: $(SOURCES) | $(BIN)/python
	@echo "installing torch and the package with [$*] into $(VENV): some minutes the first time"
	@$(PIP_INSTALL) --upgrade "setuptools>=77" wheel ninja
	@$(PIP_INSTALL) "torch>=2.10" torchvision
	@$(PIP_INSTALL) --no-build-isolation -e ".[$*]"
	@touch $@
