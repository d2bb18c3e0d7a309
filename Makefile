# Everything runs in a virtual environment that is made on first use: .venv, or the one named by VENV=/path.
# Packages come from wherever pip is configured to look.

VENV ?= .venv
PYTHON ?= python3
ARGS ?=
BUDGET ?= 480
# The least version in pyproject.toml; the newest is what pip installs.
OLDEST_TRITON := 3.6.0
# Only the headers are needed, not the dependencies of the package.
CUTLASS := 4.2.0.0

BIN := $(VENV)/bin
SOURCES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')
RUN := $(BIN)/python -m
# One process per core, each with one thread: the tests' matrices are small. pytest-benchmark measures nothing then, and
# every process would warn of it.
TESTS := OMP_NUM_THREADS=1 $(RUN) pytest -n auto --dist worksteal -p no:benchmark
# Each process of the tests reads what an earlier one compiled, whatever the caller's environment says.
export PYTHONDONTWRITEBYTECODE :=
# The emulated CUDA kernels take a quarter of an hour: `make check-cuda` runs them.
UNEMULATED := --ignore tests/csrc/test_emulated.py
# Triton decides once per process whether it interprets or compiles.
IN_TRITONS_INTERPRETER := tests/efft_kernels/ops tests/efft_kernels/triton

.PHONY: help demo extension test test-long test-all check-isa check-triton check-native check-cuda lint docs dist format \
  bench bench-quick bench-gpu clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "Options: VENV=$(VENV)  PYTHON=$(PYTHON)  BUDGET=$(BUDGET)  ARGS=... (passed to the demo, to pytest, to the benchmarks)"

demo: $(VENV)/.efft-train ## Adapt, train, save and merge a small model on this machine
	$(RUN) efft_lab.demo $(ARGS)

extension: $(VENV)/.efft-dev ## Compile csrc/, as far as this machine has the tools
	@! command -v nvcc >/dev/null || $(RUN) pip install --quiet --no-deps nvidia-cutlass==$(CUTLASS)
	$(RUN) efft_kernels build

test: extension ## Run the fast tests, which take minutes
	$(TESTS) -m "not slow" $(UNEMULATED) $(ARGS)

test-long: extension check-isa ## Run what `make test` leaves out, except the emulated CUDA kernels
	@if $(BIN)/python -c "import triton" 2>/dev/null; then TRITON_INTERPRET=1 $(TESTS) $(IN_TRITONS_INTERPRETER); else \
	  echo "triton is not installed: its kernels are not tested"; fi
	$(TESTS) -m slow $(UNEMULATED) $(ARGS)

test-all: test test-long ## Run the tests of both `make test` and `make test-long`

check-isa: extension ## Run tests of the cpu backend with each instruction set that this processor supports, except the best
	OMP_NUM_THREADS=1 $(RUN) tests.csrc.cpu.check sets

check-triton: $(VENV)/.efft-dev ## Run the interpreter's tests and the resource report with the oldest Triton supported
	$(RUN) pip install --quiet --upgrade --no-deps --target $(VENV)/triton-$(OLDEST_TRITON) triton==$(OLDEST_TRITON)
	PYTHONPATH=$(abspath $(VENV)/triton-$(OLDEST_TRITON)) TRITON_INTERPRET=1 $(TESTS) $(IN_TRITONS_INTERPRETER) $(ARGS)
	PYTHONPATH=$(abspath $(VENV)/triton-$(OLDEST_TRITON)) $(TESTS) tests/efft_kernels/triton $(ARGS)

check-native: $(VENV)/.efft-dev ## Static checks of csrc/cpu, and its tests under the sanitizers: minutes
	PATH="$(abspath $(BIN)):$$PATH" $(RUN) tests.csrc.cpu.check sanitizers $(ARGS)

check-cuda: $(VENV)/.efft-dev ## Run the CUDA kernels in the emulator, compile and report on them: no GPU, half an hour
	$(RUN) pip install --quiet --no-deps nvidia-cutlass==$(CUTLASS)
	$(RUN) pytest tests/csrc/test_emulated.py $(ARGS)
	$(RUN) tests.csrc.emulation.build build/emulated
	for capability in 8 9; do \
	  EFFT_EMULATION_CAPABILITY=$$capability EFFT_EMULATED_CUDA=$(abspath build/emulated/emulated.so) \
	    $(TESTS) tests/efft_kernels/ops tests/csrc/test_emulated.py::test_the_tests_of_the_ops || exit 1; \
	done
	$(RUN) tests.csrc.resource_report

lint: $(VENV)/.efft-dev ## Check style and types, change nothing
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)
	$(RUN) mypy
	@if command -v actionlint >/dev/null; then actionlint; else \
	  echo "actionlint is not installed: the workflows in .github are checked where they run"; fi

docs: $(VENV)/.efft-dev ## Build the documentation into build/site
	$(BIN)/mkdocs build

dist: $(VENV)/.efft-dev ## Build the source distribution and the pure wheel into dist/, and check their metadata
	$(RUN) pip install --quiet 'twine>=6'
	EFFT_BUILD_EXT=none $(RUN) build --outdir dist
	$(RUN) twine check --strict dist/*

format: $(VENV)/.efft-dev ## Format the code and apply safe fixes
	$(RUN) ruff check --fix
	$(RUN) ruff format
	$(BIN)/clang-format -i $(SOURCES)

bench: extension ## Measure layers, models, memory, inference, quantized bases and scaling: hours, alone on the machine
	$(RUN) benchmarks ops $(ARGS)
	$(RUN) benchmarks model $(ARGS)
	$(RUN) benchmarks memory $(ARGS)
	$(RUN) benchmarks serve $(ARGS)
	$(RUN) benchmarks quantized $(ARGS)
	$(RUN) benchmarks scaling $(ARGS)

bench-quick: extension ## Measure ViT-B's layers and its training step, in minutes
	$(RUN) benchmarks ops --quick $(ARGS)
	$(RUN) benchmarks model --quick $(ARGS)

bench-gpu: $(VENV)/.efft-dev ## On a GPU, within BUDGET seconds: build, GPU tests, benchmarks by importance
	$(RUN) benchmarks gpu --budget $(BUDGET) $(ARGS)

clean: ## Remove build products and caches (not the virtual environment)
	rm -rf build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find benchmarks efft_kernels python tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp says that the extra in its name is installed; editing the metadata makes it stale.
$(VENV)/.efft-%: pyproject.toml setup.py | $(BIN)/pip
	$(RUN) pip install --editable '.[$*]'
	@touch $@

# pip, not python, is the target: a failed `python -m venv` leaves a python without pip behind.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "efft-kernels needs Python 3.10 or newer, but '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)" >&2; \
	  echo "Name another one, for example: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
