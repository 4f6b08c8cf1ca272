# `make demo` and `make test` work as the first command on a fresh clone: both set up .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2

SOURCES := setup.py pyproject.toml CMakeLists.txt tests/constraints.txt $(shell find csrc -type f 2>/dev/null)

.PHONY: help setup demo test lint types format bench clean
help:
	@echo "make demo    prune the shipped decoder to 50 %, export, reload, evaluate"
	@echo "make test    all tests that run on this machine"
	@echo "make lint    ruff, read-only          make types   mypy"
	@echo "make format  ruff, rewriting files    make bench   kernel benchmark (GPU)"

setup: $(VENV)/.ready

$(VENV)/.ready: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint tests/constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	rm -rf out/demo
	$(BIN)/gisp demo --out out/demo

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(PYTEST_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python -m benchmarks.kernels --out out/kernels.json

clean:
	rm -rf build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache
