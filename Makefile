# One command each; `make help` lists them. Everything is installed into $(VENV), nothing elsewhere.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# For the targets that need CUDA: an environment of its own, with a CUDA build of torch, as PyPI's
# for Linux are. nvcc has to be of the same major version.
CUDA_VENV ?= .venv-cuda
CUDA_TORCH ?= torch==2.14.1
JOBS ?= $(shell nproc)
DEMO_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?=
# Processes that run tests at the same time; 0 runs them in one process, for a debugger. More than
# two cores need, because many tests wait; the number does not grow with the cores, because some
# tests measure how long others take.
TEST_WORKERS ?= 3

BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest --numprocesses=$(TEST_WORKERS) --dist=worksteal
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# A stamp per torch, so that another TORCH reinstalls and recompiles.
TORCH_STAMP := $(VENV)/.have-$(subst /,_,$(subst =,_,$(TORCH)))
CXX_FILES := $(shell find csrc tests/cpp tests/streams benchmarks -type f)
CMAKE := $(or $(shell command -v cmake),$(abspath $(BIN))/cmake)
CTEST := $(dir $(CMAKE))ctest

.PHONY: help demo test test-all test-clients build lint format cpp-test san san-ext bench bench-allreduce bench-hosts
.PHONY: clean build-cuda cuda-check test-gpu bench-gpu
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.built  ## train a real model on two processes, compared with torch's DDP
	$(BIN)/python examples/demo.py $(DEMO_ARGS)

test: $(VENV)/.built  ## run the quick tests of every kind, with both engines
	$(PYTEST) -m "not slow" $(TEST_ARGS)

test-all: $(VENV)/.built  ## run all tests; also those of torch, soaks, and campaigns of faults
	$(PYTEST) $(TEST_ARGS)

test-clients: $(VENV)/.clients  ## train with Accelerate, Trainer and Lightning, compared with torch's DDP
	FASTDDP_REQUIRE_CLIENTS=1 $(PYTEST) tests/clients $(TEST_ARGS)

build: $(VENV)/.built  ## install the package in place and compile its extension

lint: $(VENV)/.dev  ## check style, types, the stub of the extension, and spelling
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest fastddp._C --allowlist tests/stubtest.txt --mypy-config-file pyproject.toml
	$(BIN)/clang-format --dry-run -Werror $(filter %.cpp %.h %.cu %.cuh,$(CXX_FILES))
	$(BIN)/codespell

format: $(VENV)/.dev  ## apply the formatters and ruff's safe fixes
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(filter %.cpp %.h %.cu %.cuh,$(CXX_FILES))

# $(call ctest,<folder>,<sanitizers>)
define ctest
	$(CMAKE) -S . -B build/$(1) -DFASTDDP_SANITIZE=$(2)
	$(CMAKE) --build build/$(1) --parallel $(JOBS)
	$(CTEST) --test-dir build/$(1) --verbose --no-tests=error
endef

cpp-test: | $(CMAKE)  ## test the torch-free C++ core
	$(call ctest,cpp)

san: | $(CMAKE)  ## the same under ASan + UBSan, then under TSan
	$(call ctest,cpp-asan,address$(comma)undefined)
	$(call ctest,cpp-tsan,thread)

san-ext: $(VENV)/.built | $(CMAKE)  ## test the C++ that knows torch, by Python tests under ASan + UBSan
	CMAKE=$(CMAKE) JOBS=$(JOBS) .ci/san-ext $(BIN)/python $(TEST_ARGS)

bench: $(VENV)/.built  ## measure against torch's DDP on this machine
	$(BIN)/python -m benchmarks.step $(BENCH_ARGS)

bench-allreduce: $(VENV)/.built  ## measure an all-reduce against gloo, and MPI where mpi4py is installed
	$(BIN)/python -m benchmarks.allreduce $(BENCH_ARGS)

bench-hosts: $(VENV)/.built  ## measure two hosts over a 1 Gbit/s link of namespaces; needs root
	$(BIN)/python -m benchmarks.hosts $(BENCH_ARGS)

build-cuda:  ## install the package with its CUDA kernels into $(CUDA_VENV)
	FASTDDP_BUILD=require FASTDDP_CUDA=1 $(MAKE) build VENV=$(CUDA_VENV) TORCH="$(CUDA_TORCH)"

cuda-check:  ## build with CUDA elsewhere and check what needs no GPU, unless these sources passed
	.ci/cuda

# Without a GPU all tests would be skipped, and that would pass.
need_gpu = $(CUDA_VENV)/bin/python -c \
  "import sys, torch; torch.cuda.is_available() or sys.exit('torch sees no GPU; $@ needs one')"

test-gpu: build-cuda  ## run the tests that need a GPU
	@$(need_gpu)
	FASTDDP_REQUIRE_NATIVE=1 $(CUDA_VENV)/bin/python -m pytest -m gpu -rs $(TEST_ARGS)

bench-gpu: build-cuda  ## measure against torch's DDP on the GPUs of this machine
	@$(need_gpu)
	$(CUDA_VENV)/bin/python -m benchmarks.gpu $(BENCH_ARGS)

clean:  ## remove what was built, but no environment
	rm -rf build dist *.egg-info fastddp/_build_info.py fastddp/_C.*.so

comma := ,

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(TORCH_STAMP): | $(BIN)/python
	$(PIP) "$(TORCH)" "setuptools>=77.0.3" ninja
	@touch $@

# The source tree holds one extension: that of the environment it was last built for.
BUILT_FOR := build/.built-for
ifneq ($(shell cat $(BUILT_FOR) 2> /dev/null),$(abspath $(VENV)))
.PHONY: $(VENV)/.built
endif

$(VENV)/.built: $(TORCH_STAMP) pyproject.toml setup.py $(shell find csrc -type f)
	$(PIP) --no-build-isolation --editable ".[test,examples]"
	@mkdir -p build && echo "$(abspath $(VENV))" > $(BUILT_FOR)
	@touch $@

$(VENV)/.clients: $(VENV)/.built
	$(PIP) --no-build-isolation --editable ".[clients]"
	@touch $@

$(VENV)/.dev: $(VENV)/.built
	$(PIP) --no-build-isolation --editable ".[dev]"
	@touch $@

$(abspath $(BIN))/cmake: | $(BIN)/python
	$(PIP) "cmake>=3.22"
