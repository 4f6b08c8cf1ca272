# `make demo` and `make test` work as the first command on a fresh clone: both set up .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# One worker more than the two cores of the usual machine: tests of several processes wait half of their time.
JOBS ?= 3

SOURCES := setup.py pyproject.toml python/setup.py python/pyproject.toml CMakeLists.txt tests/constraints.txt $(shell find csrc -type f 2>/dev/null)

.PHONY: help setup browser demo test lint types docs format hooks dist bench bench-quick bench-pytest clean
help:
	@echo "make setup   .venv with both packages and their development tools"
	@echo "make demo    prune the shipped decoder to 50 %, export, reload, evaluate"
	@echo "make test    all tests that run on this machine"
	@echo "make lint    ruff, read-only          make types   mypy over the packages, benchmarks and tests"
	@echo "make format  ruff, rewriting files    make docs    the documentation as a site, in strict mode"
	@echo "make browser   Chromium for the tests of the report (Debian and Ubuntu, as root)"
	@echo "make hooks   lint, types and commit subjects checked before every commit"
	@echo "make dist    wheels and source distributions of both packages, in dist"
	@echo "make bench   kernels and whole runs, with goals and plots (GPU)"
	@echo "make bench-quick   a few kernels      make bench-pytest   the same under pytest-benchmark"

setup: $(VENV)/.ready

$(VENV)/.ready: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint tests/constraints.txt --editable . --editable './python[dev]'
	touch $@

demo: setup
	rm -rf out/demo
	$(BIN)/gisp demo --out out/demo

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

browser:
	command -v chromium || (apt-get update -q && apt-get install -qy --no-install-recommends chromium)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy --num-workers $(JOBS)

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

hooks: setup
	$(BIN)/pre-commit install --hook-type pre-commit --hook-type commit-msg

dist: setup
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m build --outdir dist python

bench: setup
	$(BIN)/gisp bench kernels --goals --plot --out out/bench/kernels.json
	$(BIN)/gisp bench embed --goals --out out/bench/embed.json
	$(BIN)/gisp bench prune --goals --plot --out out/bench/prune.json

bench-quick: setup
	$(BIN)/gisp bench kernels --quick --goals --out out/bench/kernels-quick.json

bench-pytest: setup
	$(BIN)/python -m pytest benchmarks/kernels/test_kernels.py --benchmark-group-by=group --benchmark-sort=mean $(PYTEST_ARGS)

clean:
	rm -rf build dist out *.egg-info python/build python/*.egg-info .pytest_cache .mypy_cache .ruff_cache
