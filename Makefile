# Everything a fresh checkout needs, in its own .venv. `make demo` and `make test` are the two commands to know.
PYTHON ?= python3
TORCH ?= torch==2.13.0+cpu
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: help setup demo test test-slow test-browser notebooks lint format docs wheel clean

help:
	@echo "make demo         fine-tune a real model in three ways and write the page that compares them (about 20 minutes)"
	@echo "make test         quick tests (at most 10 minutes on 2 cores)"
	@echo "make test-slow    everything else: real models and data, browsers, several processes"
	@echo "make lint         ruff, mypy, import-linter"
	@echo "make docs         the site, into site/"
	@echo "make wheel        the package, into dist/"

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt tools/install-torch
	$(PYTHON) -c 'import sys; sys.exit("pegbox needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	tools/install-torch $(BIN)/pip "$(TORCH)"
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/pegbox demo --out demo

test: setup
	$(BIN)/pytest -n $(WORKERS) --dist loadfile

test-slow: setup
	$(BIN)/pytest -m 'slow or real or browser or distributed_slow'

test-browser: setup
	$(BIN)/pytest -m browser

notebooks: setup
	$(BIN)/pytest -m slow tests/docs/test_notebooks.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup
	$(BIN)/pip install -q -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict

wheel: setup
	$(BIN)/pip install -q -c constraints.txt build
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache
