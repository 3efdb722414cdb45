# Everything from a fresh machine. `make demo` and `make test` set up what they need.
.PHONY: demo test lint bench gpu clean help

PYTHON ?= python3
TEXT ?=
END ?= 1800
PARTS ?=
CONSTRAINTS ?= constraints.txt
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BUILT := $(VENV)/.built
BENCHMARKS := kernels product finish overhead batch step training accuracy convergence reduce whole scale parallel plan registers
SOURCES := $(wildcard csrc/*) setup.py accumkern/version.py

help:
	@echo "make demo [TEXT=folder]   train a small GPT in stock bf16, FP32 + autocast and accumkern, and compare"
	@echo "make test                 lint, types and all tests; with CONSTRAINTS=constraints-floor.txt, on the oldest torch"
	@echo "make bench                the CPU benchmarks; writes benchmarks/results/"
	@echo "make gpu [END=1800]       GPU tests and benchmarks within so many seconds, with the python3 that has torch;"
	@echo "                          installs nothing, writes gpu-run/. Some of its parts: PARTS=tests,memcheck,kernels"
	@echo "make lint                 ruff, mypy and the import contract alone"
	@echo "make clean                remove what the others made"

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) torch
	ACCUMKERN_BUILD=0 $(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[test]'
	$(BIN)/python -m pip install --quiet pybind11 setuptools
	touch $@

$(BUILT): $(INSTALLED) $(SOURCES)
	rm -f accumkern/backends/_C.*.so
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

demo: $(BUILT)
	$(BIN)/python examples/demo.py --text "$(TEXT)" --output demo

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# A process for each core takes file after file. Each has one thread, and threads of the processes that the tests start
# do not wait for one another by spinning, which would take the cores from the others. Files are UTF-8 in any locale.
test: export OMP_WAIT_POLICY ?= passive
test: export OMP_NUM_THREADS ?= 1
test: export PYTHONUTF8 ?= 1
test: $(BUILT) lint
	$(BIN)/python -m accumkern doctor
	$(BIN)/python -m pytest --numprocesses $(shell nproc) --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# Each script writes one result file; one that fails does not keep the others from running, but make says so.
bench: $(BUILT)
	failed=; for name in $(BENCHMARKS); do \
	$(BIN)/python benchmarks/bench_$$name.py --device cpu || failed="$$failed $$name"; \
	done; test -z "$$failed" || { echo "failed:$$failed" >&2; exit 1; }
	$(BIN)/python benchmarks/report.py

# A GPU machine may have no network: its own python3 has torch, triton, pybind11, rich and pytest, and nvcc is on PATH.
gpu:
	$(PYTHON) benchmarks/gpu.py --end $(END) --parts "$(PARTS)"

clean:
	rm -rf $(VENV) build demo dist gpu-run *.egg-info accumkern/backends/_C.*.so .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
