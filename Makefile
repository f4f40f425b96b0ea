# make demo   from a fresh machine to a model larger than its memory, answering
# make test   the tests that need no GPU, no large disk and no patience
#
# The first target makes .venv; PYTHON=... chooses the interpreter (3.11 or 3.12).

SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.12 python3.11; do $$p -c "$(SUPPORTED)" 2>/dev/null && { echo $$p; break; }; done)
endif

VENV := .venv
BIN := $(VENV)/bin
# Half of what pip takes is compiling modules that nobody imports: each is compiled when it first is, and kept.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile -c constraints.txt
export PYTHONDONTWRITEBYTECODE :=
READY := $(VENV)/.ready
BENCH_READY := $(VENV)/.bench-ready

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint bench-decode bench-io clean

help:
	@echo "make demo          a fresh environment, then a model larger than its memory budget, in about five minutes"
	@echo "make test          the tests"
	@echo "make lint          ruff and mypy"
	@echo "make bench-decode  seconds per token beside other libraries, under one memory limit"
	@echo "make bench-io      the I/O engine beside the disk's ceiling"
	@echo "make clean         remove .venv, caches and scratch files"

demo: $(READY)
	$(BIN)/python demo/demo.py

test: $(READY)
	$(BIN)/offload doctor --warm  # kernels are compiled once, not in every worker
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2  # threads of two workers that wait must not spin

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench-decode: $(BENCH_READY)
	$(BIN)/python benchmarks/decode.py $(ARGS)

bench-io: $(READY)
	$(BIN)/python benchmarks/engine_io.py $(FILE)

# torch comes first and alone: it is most of the download, and what follows then finds it settled.
$(READY): pyproject.toml setup.py constraints.txt
	@$(or $(PYTHON),false) -c "$(SUPPORTED)" 2>/dev/null || { \
	  echo "offload needs Python 3.11 or 3.12; $(or $(PYTHON),python3) is: $$($(or $(PYTHON),python3) --version 2>&1)"; \
	  echo "Install one of them, or name it: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@echo "Installing torch: the large one, a few minutes on a slow line"
	@$(PIP) torch
	@echo "Installing offload and what it needs"
	@$(PIP) -e '.[dev,demo]'
	@touch $@

$(BENCH_READY): $(READY)
	@echo "Installing the peers that the benchmark measures beside"
	@$(PIP) -e '.[bench]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache benchmarks/scratch demo/scratch
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
