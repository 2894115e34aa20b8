# make quickstart          install what users need, build a mixture of the bundled language model, print its verdict
# make quickstart-images   the same for the bundled image classifier
# make test                install what developers need; lint, types, tests
# make format              let ruff fix what it can
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: quickstart quickstart-images test lint types unit format clean

quickstart: $(VENV)/.installed
	$(BIN)/moqe quickstart out/quickstart

quickstart-images: $(VENV)/.vision
	$(BIN)/moqe quickstart out/quickstart-images --task image-classification

test: lint types unit

lint: $(VENV)/.developer
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.developer
	$(BIN)/mypy

unit: $(VENV)/.developer
	$(BIN)/python -m pytest --numprocesses 2

format: $(VENV)/.developer
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "MoQE needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable .
	touch $@

$(VENV)/.vision: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[vision]'
	touch $@

$(VENV)/.developer: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) out dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
