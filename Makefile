# `make demo` and `make test` do all their own set-up: they need Python >= 3.10 and make, nothing else.
# FASTDPO_PEERS=required: that packages which tests compare with are missing is then a failure, not a skip (tests/peers.py).
# PYTHON picks another interpreter, CONSTRAINTS other versions of what is installed (constraints-newest.txt,
# constraints-oldest.txt), each in an environment of its own; VENV names its place:
#   make test PYTHON=python3.12 VENV=/tmp/venv      make test CONSTRAINTS=constraints-newest.txt
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV ?= .venv$(patsubst %,-%,$(patsubst constraints-%,%,$(filter-out constraints,$(basename $(notdir $(CONSTRAINTS))))))
BIN := $(VENV)/bin
# Of pytest-xdist: tests run on one thread each; the tests of a module stay together, for what they share.
PROCESSES ?= --numprocesses 2 --dist loadfile
STAMP := $(VENV)/.installed

.PHONY: demo test test-all test-portable fuzz faults soak aot docs docs-serve wheel lint format clean

# The stamp is rebuilt only when what is installed could have changed, so that second runs reuse the environment.
$(STAMP): pyproject.toml setup.py $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit("fastdpo needs Python >= 3.10, $(PYTHON) is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/fastdpo demo

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	FASTDPO_PEERS=required $(BIN)/python -m pytest -m "not slow" $(PROCESSES)

test-all: $(STAMP)
	FASTDPO_PEERS=required $(BIN)/python -m pytest $(PROCESSES)

# The tests of numbers under the arithmetic of other machines, as far as this one can do it; PORTABLE="--list" names it.
test-portable: $(STAMP)
	$(BIN)/python tests/portable.py $(PORTABLE)

# Random cases by the thousand: FUZZ_EXAMPLES of each strategy, at most FUZZ_SECONDS of each; a failure names the seed
# that brings it back (make fuzz FUZZ_SEED=...), and FUZZ_LOG gets a line for each strategy with its number of cases.
FUZZ_EXAMPLES ?= 10000
FUZZ_SECONDS ?= 300
FUZZ_SEED ?= $(shell date +%s)
FUZZ_LOG ?= /tmp/fastdpo-fuzz-$(FUZZ_SEED).jsonl
fuzz: $(STAMP)
	FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) FUZZ_SECONDS=$(FUZZ_SECONDS) FUZZ_SEED=$(FUZZ_SEED) FUZZ_LOG=$(FUZZ_LOG) \
		FASTDPO_PEERS=required $(BIN)/python -m pytest tests/fuzz $(PROCESSES) && cat $(FUZZ_LOG)

# Runs killed at random moments and resumed; FAULTS="--seed 7 --moments 100" chooses others.
faults: $(STAMP)
	$(BIN)/python tests/faults/random_moments.py $(FAULTS)

# A long run that is watched for growth, with a report; SOAK="--steps 500 --data rows --workers 2" chooses another.
SOAK ?= --report /tmp/fastdpo-soak.html
soak: $(STAMP)
	$(BIN)/python tests/faults/soak.py $(SOAK)

# What the kernels compile to, with three releases of Triton in folders of their own; no GPU needed.
aot: $(STAMP)
	$(BIN)/python tests/kernels/aot_table.py $(AOT)

# The site of documentation, in site/; a link that leads nowhere is an error (not with --quiet, which hides warnings from
# MkDocs too). `make docs-serve` shows it while you write.
$(VENV)/.docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[docs]"
	touch $@

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

docs-serve: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

# The wheel and the sdist, in dist/, each tried in an empty environment. Minutes: the demo runs twice.
wheel:
	PYTHON=$(PYTHON) bash tests/from_wheel.sh $(CONSTRAINTS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .venv-newest .venv-oldest .venv-triton-* build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
