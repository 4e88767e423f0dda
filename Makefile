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
# folders of the check for GPUs: what it brings along, and where its results go
GPU_PACK ?= gpu-pack
GPU_OUT ?= gpu-check
GPU_PYTHON ?= 3.12

BIN := $(VENV)/bin
# one worker a core, one thread a worker, and each with neighbouring tests, which share what they have trained
WORKERS ?= auto
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-slow fuzz lint bench gpu-pack gpu-check interop docs clean

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

# what the check needs on a machine that can fetch nothing, for Python GPU_PYTHON there
gpu-pack: $(VENV)/installed
	OMP_NUM_THREADS=2 $(BIN)/python tools/gpu_pack.py $(GPU_PACK) --python $(GPU_PYTHON)

# on the machine with the GPU, with the interpreter that has PyTorch for it: make gpu-check PYTHON=python3
gpu-check:
	$(PYTHON) tools/gpu_check.py --out $(GPU_OUT) $(if $(wildcard $(GPU_PACK)),--pack $(GPU_PACK) --install)

bench: $(VENV)/installed
	$(BIN)/python benchmarks/run.py $(if $(REFERENCE_PYTHON),--reference $(REFERENCE_PYTHON))

# answers to checkpoints of torchmd-net 3.1.0 against the numbers it gave; TORCHMDNET_SHARED_DATA names their folder
interop: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python tools/interop.py

docs: $(VENV)/installed-dev
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build site runs *.egg-info
