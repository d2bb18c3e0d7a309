# All commands run in a virtual environment that is created on first use. Its folder is .venv, or the value of VENV.
# pip installs packages from the index that it is configured to use.

VENV ?= .venv
PYTHON ?= python3
ARGS ?=
BUDGET ?= 480
PART ?=
# The oldest version that pyproject.toml allows. Otherwise pip installs the newest version.
OLDEST_TRITON := 3.6.0
# The version of the package nvidia-cutlass. Only its headers are used, so it is installed without its dependencies.
CUTLASS := 4.2.0.0

BIN := $(VENV)/bin
SOURCES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')
RUN := $(BIN)/python -m
# The tests run in one process per core. Each process uses one thread, because the matrices in the tests are small.
# pytest-benchmark is disabled, because it measures nothing in parallel processes and prints a warning in each of them.
TESTS := OMP_NUM_THREADS=1 $(RUN) pytest -n auto --dist worksteal -p no:benchmark
# Clear this variable of the caller, so that Python writes bytecode files and later test processes can load them.
export PYTHONDONTWRITEBYTECODE :=
# The tests of the emulated CUDA kernels take about an hour. Only `make check-cuda` runs them.
UNEMULATED := --ignore tests/csrc/test_emulated.py
# These tests run separately in Triton's interpreter, because a process can either interpret or compile kernels.
IN_TRITONS_INTERPRETER := tests/efft_kernels/ops tests/efft_kernels/triton

.PHONY: help demo extension test test-long test-all check-isa check-triton check-native check-cuda lint docs dist format \
  bench bench-quick bench-gpu clean

help: ## List the targets and options
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "Options: VENV=$(VENV)  PYTHON=$(PYTHON)  BUDGET=$(BUDGET)  PART=...  ARGS=... (passed to the demo, pytest or the benchmarks)"

demo: $(VENV)/.efft-train ## Adapt, train, save and merge a small model on this machine
	$(RUN) efft_lab.demo $(ARGS)

extension: $(VENV)/.efft-dev ## Compile the libraries of csrc/ for which this machine has the tools
	@! command -v nvcc >/dev/null || $(RUN) pip install --quiet --no-deps nvidia-cutlass==$(CUTLASS)
	$(RUN) efft_kernels build

test: extension ## Run the fast tests, in minutes
	$(TESTS) -m "not slow" $(UNEMULATED) $(ARGS)

test-long: extension check-isa ## Run the tests that `make test` leaves out, except those of the emulated CUDA kernels
	@if $(BIN)/python -c "import triton" 2>/dev/null; then TRITON_INTERPRET=1 $(TESTS) $(IN_TRITONS_INTERPRETER); else \
	  echo "triton is not installed: its kernels are not tested"; fi
	$(TESTS) -m slow $(UNEMULATED) $(ARGS)

test-all: test test-long ## Run the tests of both `make test` and `make test-long`

check-isa: extension ## Test the cpu backend with each instruction set that this processor supports, except the best one
	OMP_NUM_THREADS=1 $(RUN) tests.csrc.cpu.check sets

check-triton: $(VENV)/.efft-dev ## With the oldest supported Triton, test the kernels in the interpreter and compile them
	$(RUN) pip install --quiet --upgrade --no-deps --target $(VENV)/triton-$(OLDEST_TRITON) triton==$(OLDEST_TRITON)
	PYTHONPATH=$(abspath $(VENV)/triton-$(OLDEST_TRITON)) TRITON_INTERPRET=1 $(TESTS) $(IN_TRITONS_INTERPRETER) $(ARGS)
	PYTHONPATH=$(abspath $(VENV)/triton-$(OLDEST_TRITON)) $(TESTS) tests/efft_kernels/triton $(ARGS)

check-native: $(VENV)/.efft-dev ## Run static checks on csrc/cpu, and its tests under the sanitizers, in minutes
	PATH="$(abspath $(BIN)):$$PATH" $(RUN) tests.csrc.cpu.check sanitizers $(ARGS)

check-cuda: $(VENV)/.efft-dev ## Without a GPU, test the CUDA kernels in the emulator and compile them, in about an hour
	$(RUN) pip install --quiet --no-deps nvidia-cutlass==$(CUTLASS)
	$(TESTS) tests/csrc/test_emulated.py $(ARGS)
	$(RUN) tests.csrc.emulation.build build/emulated
	for kernels in 8-1 9-1 9-3; do \
	  EFFT_EMULATION_CAPABILITY=$${kernels%-*} EFFT_SM90_GENERATION=$${kernels#*-} EFFT_EMULATED_CUDA=$(abspath build/emulated/emulated.so) \
	    $(TESTS) tests/efft_kernels/ops tests/csrc/test_emulated.py::test_the_tests_of_the_ops || exit 1; \
	done
	$(RUN) tests.csrc.resource_report --emulated build/emulated/emulated.so

lint: $(VENV)/.efft-dev ## Check style and types without changing files
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)
	$(RUN) mypy
	@if command -v actionlint >/dev/null; then actionlint; else \
	  echo "actionlint is not installed: the workflows in .github are checked only on GitHub"; fi

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

bench: extension ## Measure layers, models, memory, inference, quantization and scaling, in hours on an idle machine
	$(RUN) benchmarks ops $(ARGS)
	$(RUN) benchmarks model $(ARGS)
	$(RUN) benchmarks memory $(ARGS)
	$(RUN) benchmarks serve $(ARGS)
	$(RUN) benchmarks quantized $(ARGS)
	$(RUN) benchmarks scaling $(ARGS)

bench-quick: extension ## Measure the layers and the training step of ViT-B, in minutes on an idle machine
	$(RUN) benchmarks ops --quick $(ARGS)
	$(RUN) benchmarks model --quick $(ARGS)

bench-gpu: $(VENV)/.efft-dev ## On a GPU, run the PART (tests, speed or more; by default all) within BUDGET seconds
	$(RUN) benchmarks gpu $(if $(PART),--part $(PART)) --budget $(BUDGET) $(ARGS)

clean: ## Remove build products and caches (not the virtual environment)
	rm -rf build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find benchmarks efft_kernels python tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The file .efft-NAME records that the extra NAME is installed. Changing pyproject.toml or setup.py makes it outdated.
$(VENV)/.efft-%: pyproject.toml setup.py | $(BIN)/pip
	$(RUN) pip install --editable '.[$*]'
	@touch $@

# The target is pip and not python, because a failed `python -m venv` leaves an environment that has python but not pip.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "efft-kernels needs Python 3.10 or newer, but '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)" >&2; \
	  echo "Select another Python, for example: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
