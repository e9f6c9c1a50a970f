# make test     run the fast tests, in parallel
# make test-all run all tests: those, then the slow ones
# make docs     build the documentation as a site, in build/site
# make lint     check style and types
# make sudoku   train the small Sudoku recipe
#
# Each sets up .venv first: PYTHON makes it, TORCH is installed into it before anything else.

PYTHON ?= python3
TORCH ?= torch==2.13.0

BIN := .venv/bin
# Of each of the processes that tests run in: they are as many as there are cores.
ONE_THREAD := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}
# Slow tests often wait, for processes that are lost and for timeouts: one more than there are cores.
SLOW_WORKERS := $$(( $$(getconf _NPROCESSORS_ONLN) + 1 ))
STAMP := .venv/.installed
# What an editable installation is built from; Python sources need no reinstallation.
BUILD_INPUTS := pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*.cu csrc/*.h)

.PHONY: test test-slow test-all lint docs sudoku
.DEFAULT_GOAL := test

test: $(STAMP)
	@$(ONE_THREAD) $(BIN)/python -m pytest -n auto -m "not slow" --durations 10

test-slow: $(STAMP)
	@$(ONE_THREAD) $(BIN)/python -m pytest -n $(SLOW_WORKERS) -m slow --durations 10

test-all: test test-slow

docs: $(STAMP)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

lint: $(STAMP)
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/mypy --no-error-summary

sudoku: $(STAMP)
	@$(BIN)/egspo train recipes/sudoku_tiny.yaml

$(STAMP): $(BUILD_INPUTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "egspo needs Python 3.11 or newer: make PYTHON=/path/to/python ..." >&2; exit 1; }
	@echo "Setting up .venv with $(TORCH)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install -qq "$(TORCH)"
	@$(BIN)/pip install -qq --editable ".[dev]"
	@touch $@
