# Every target sets up the environment it needs in .venv; nothing has to be installed first but
# Python (3.11 or later for the pinned environment), make and a C++ compiler.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# The first that is new enough for the pinned environment.
PYTHON ?= $(firstword $(foreach name,python3.11 python3 python3.12 python3.13,$(shell \
	$(name) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null && echo $(name))))
WORKERS ?= logical
BIN := .venv/bin
INPUTS := setup.py pyproject.toml constraints/dev.txt
# Named after what the environment was made from, so that a change of it, and nothing else (a fresh
# checkout's timestamps, say), makes a new one.
STAMP := .venv/.made-from-$(shell cat $(INPUTS) | cksum | tr ' ' '-')

# Tests run one thread per worker and never reach for a network or a display.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 MPLBACKEND=Agg

.PHONY: help setup demo test test-long lint format kernel-sheet bench-gpu bench bench-check wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## create or update the environment in .venv

$(STAMP):
	@echo "Setting up .venv (the first time: a few minutes, about 6 GB; it says nothing while it downloads) ..."
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or later found: install one, or say make setup PYTHON=/path/to/python3." >&2; exit 1; }
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[dev,experiments]' --constraint constraints/dev.txt
	@rm -f .venv/.made-from-*
	@touch $@
	@echo "Ready: $$($(BIN)/python --version), torch $$($(BIN)/python -c 'from importlib.metadata import version as v; print(v("torch"), "and rfa-fast", v("rfa-fast"))'), in .venv."

demo: setup ## train, forget a class and 64 samples, compare with retraining, draw the page
	@$(BIN)/rfa-fast demo

test: lint ## linter, types, tests with coverage (what CI runs)
	$(TEST_ENV) $(BIN)/pytest -q -n $(WORKERS) --maxprocesses 8 --dist loadfile --cov --cov-report=term

test-long: setup ## the tests that take minutes
	$(TEST_ENV) $(BIN)/pytest -q -n $(WORKERS) --maxprocesses 8 --dist load -m 'long and not gpu'

lint: setup ## linter, formatter in check mode, strict types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## apply the formatter and the linter's safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

kernel-sheet: setup ## compile every kernel for five GPUs, count its bytes, write docs/kernels.md (about 20 minutes)
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/kernel_sheet.py

bench-gpu: setup ## time the kernels on this machine's GPU against cuBLAS/cuDNN, torch.compile and PEFT
	@$(BIN)/python benchmarks/bench_gpu.py

bench: setup ## time the step against its rivals, write docs/benchmarks.md (hours; PARTS=slice,table12 ROUNDS=5 narrow it)
	@$(BIN)/python benchmarks/step_bench.py $(if $(PARTS),--parts "$(PARTS)") $(if $(ROUNDS),--rounds $(ROUNDS)) $(BENCH_OPTIONS)

bench-check: setup ## fail if the step's ratio to the bare products is 10 % worse than the committed one
	@$(BIN)/python benchmarks/step_check.py $(if $(ROUNDS),--rounds $(ROUNDS)) $(BENCH_OPTIONS)

wheel: setup ## build the source distribution and the wheel into dist/
	$(BIN)/pyproject-build --outdir dist .

clean: ## remove what builds, tests and tools left behind (not .venv)
	rm -rf build dist *.egg-info .coverage .coverage.* htmlcov .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -path ./.venv -prune -o -path ./.git -prune -o -type d -name __pycache__ -exec rm -rf {} +
