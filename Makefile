# Each target sets up what it needs; `make demo` and `make test` are all a new user types.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint benchmark clean

demo: $(VENV)/.examples
	$(BIN)/compress run pipelines/digits.yaml

test: $(VENV)/.dev
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

# torch goes first and alone, pinned: nothing that follows may then pull another build of it.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	touch $@

$(VENV)/.examples: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[examples]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ $(VENV)/.examples

# The committed numbers. MNIST is a directory with train.npz and test.npz.
MNIST ?= ../shared/data/mnist
benchmark: $(VENV)/.dev
	$(BIN)/python benchmarks/fit.py
	$(BIN)/python benchmarks/latency.py
	$(BIN)/python benchmarks/headline.py pipelines/digits.yaml
	$(BIN)/python benchmarks/startup.py runs/digits pipelines/digits.yaml
	$(BIN)/python benchmarks/headline.py pipelines/mnist.yaml --set task.data_dir=$(MNIST)

clean:
	rm -rf $(VENV) runs
