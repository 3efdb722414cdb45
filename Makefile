# Everything from a fresh machine. `make demo` and `make test` set up what they need.
.PHONY: demo test lint bench gpu clean help

# Threads that wait for one another by spinning crawl where something else keeps a core busy.
export OMP_WAIT_POLICY ?= passive

PYTHON ?= python3
TEXT ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BUILT := $(VENV)/.built
BENCHMARKS := $(wildcard $(patsubst %,benchmarks/bench_%.py,kernels finish overhead training accuracy convergence reduce registers))
SOURCES := $(wildcard csrc/*) setup.py accumkern/__init__.py

help:
	@echo "make demo [TEXT=folder]   train a small GPT with stock and with accumkern accumulation, and compare"
	@echo "make test                 lint, types and all tests"
	@echo "make bench                the CPU benchmarks; writes benchmarks/results/"
	@echo "make gpu                  GPU tests and benchmarks, with the python3 that has torch; installs nothing"
	@echo "make lint                 ruff and mypy alone"
	@echo "make clean                remove what the others made"

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	ACCUMKERN_BUILD=0 $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	$(BIN)/python -m pip install --quiet pybind11 setuptools
	touch $@

$(BUILT): $(INSTALLED) $(SOURCES)
	rm -f accumkern/_C.*.so
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

demo: $(BUILT)
	$(BIN)/python examples/demo.py --text "$(TEXT)" --output demo

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: $(BUILT) lint
	$(BIN)/python -m accumkern doctor
	$(BIN)/python -m pytest

# Each script writes one result file; one that fails does not keep the others from running, but make says so.
bench: $(BUILT)
	failed=; for script in $(BENCHMARKS); do \
		$(BIN)/python $$script --device cpu || failed="$$failed $$script"; \
	done; $(BIN)/python benchmarks/report.py && test -z "$$failed" || { echo "failed:$$failed" >&2; exit 1; }

# A GPU machine may have no network: its own python3 has torch, triton, pybind11, rich and pytest, and nvcc is on PATH.
gpu:
	ACCUMKERN_BUILD=cuda $(PYTHON) setup.py --quiet build_ext --inplace
	$(PYTHON) -m accumkern doctor
	$(PYTHON) -m pytest -m gpu --override-ini addopts= -q
	failed=; for script in $(BENCHMARKS); do \
		$(PYTHON) $$script --device cuda || failed="$$failed $$script"; \
	done; test -z "$$failed" || { echo "failed:$$failed" >&2; exit 1; }

clean:
	rm -rf $(VENV) build demo dist *.egg-info accumkern/_C.*.so .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
