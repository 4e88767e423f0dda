# make quickstart   train on the embedded data set and simulate a molecule with the result
# make test         install what the tests need and run them
#
# PYTHON picks the interpreter, TORCH the PyTorch that pip installs, REFERENCE_PYTHON the one with torchmd-net 3.1.0.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
# how long `make fuzz` tries odd settings, structures and model files
FUZZ_SECONDS ?= 300
REFERENCE_PYTHON ?=

BIN := $(VENV)/bin
# one worker a core, one thread a worker, and each with neighbouring tests, which share what they have trained
WORKERS ?= auto
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-slow fuzz lint bench interop docs clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -4

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable ".[dev,docs]"
	touch $@

quickstart: $(VENV)/installed
	$(BIN)/python examples/quickstart.py --output runs/quickstart

test: $(VENV)/installed
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/installed
	$(PYTEST) -m slow

fuzz: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/run.py --seconds $(FUZZ_SECONDS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/codespell torchmdnet tests docs examples tools benchmarks README.md CHANGELOG.md

bench: $(VENV)/installed
	$(BIN)/python benchmarks/run.py $(if $(REFERENCE_PYTHON),--reference $(REFERENCE_PYTHON))

# answers to checkpoints of torchmd-net 3.1.0 against the numbers it gave; TORCHMDNET_SHARED_DATA names their folder
interop: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python tools/interop.py

docs: $(VENV)/installed-dev
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build site runs *.egg-info
