# Two commands: `make demo` runs the main job, `make test` passes the tests. Both set up what they need, once.
# `make bench` measures the speed against named peers (half an hour), `make bench-full` in more detail (a night; an
# interrupted one goes on where it was). Both print one table and write results/bench-<processor>.json and pictures.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-all lint format bench bench-full clean

demo: $(VENV)/installed
	$(BIN)/mta demo --out demo

test: lint
	$(BIN)/python -m pytest -m "not slow"

test-all: lint
	$(BIN)/python -m pytest

lint: $(VENV)/installed-dev
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/installed-dev
	$(BIN)/ruff format src tests benchmarks
	$(BIN)/ruff check --fix src tests benchmarks

bench: $(VENV)/installed-dev
	$(BIN)/python -m benchmarks.speed --again

bench-full: $(VENV)/installed-dev
	$(BIN)/python -m benchmarks.speed --full

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[serve]"
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) demo dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
