# Each target sets up what it needs; `make demo` and `make test` are all a new user types.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check lint benchmark studies clean

demo: $(VENV)/.examples
	$(BIN)/compress run pipelines/digits.yaml

# A process of tests on each core, with one thread each; the tests of a file share what they make once.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

# The linters, and the tests that what changed since main needs; `make check ROOM=pruning` takes those of a room.
check: lint
	OMP_NUM_THREADS=1 $(BIN)/python tests/affected.py $(ROOM)

lint: $(VENV)/.dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

# The generated parts of README and docs/, and the schema for editors.
.PHONY: docs
docs: $(VENV)/.dev
	$(BIN)/python docs/update.py

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

$(VENV)/.peers: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,peers]'
	touch $@

# The committed numbers. MNIST is a directory with train.npz and test.npz; CIFAR10 has train/CLASS/*.jpg and test/;
# WEIGHTS has resnet20_cifar10.safetensors and resnet56_cifar10.safetensors. The suite goes on where it was stopped.
MNIST ?= ../shared/data/mnist
CIFAR10 ?= ../shared/data/cifar10_jpeg
WEIGHTS ?= ../shared/data/weights
benchmark: $(VENV)/.peers
	$(BIN)/python benchmarks/suite.py $(MNIST) $(CIFAR10) $(WEIGHTS)
	$(BIN)/python benchmarks/cost.py $(MNIST)

studies: demo $(VENV)/.peers
	$(BIN)/python benchmarks/fit.py
	$(BIN)/python benchmarks/latency.py
	$(BIN)/python benchmarks/startup.py runs/digits pipelines/digits.yaml
	$(BIN)/python benchmarks/bench.py runs/digits
	$(BIN)/python benchmarks/distillation.py $(CIFAR10) $(WEIGHTS)/resnet56_cifar10.safetensors
	$(BIN)/python benchmarks/distillation_cost.py $(CIFAR10) $(WEIGHTS)/resnet56_cifar10.safetensors
	$(BIN)/python benchmarks/pruning.py $(CIFAR10) $(WEIGHTS)/resnet56_cifar10.safetensors
	$(BIN)/python benchmarks/sparsity.py $(MNIST) $(CIFAR10) $(WEIGHTS)/resnet56_cifar10.safetensors
	$(BIN)/python benchmarks/quantization.py $(MNIST) $(CIFAR10) $(WEIGHTS)
	$(BIN)/python benchmarks/qat_cost.py
	$(BIN)/python benchmarks/transformer_int8.py

clean:
	rm -rf $(VENV) runs
