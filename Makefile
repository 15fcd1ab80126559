# Needs nothing but Python 3.11 or newer, make and pip.
#   make demo    train a small model, compress it, compare
#   make test    the tests
#   make lint    ruff and mypy
#   make docs    the documentation, into build/site
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint docs clean

demo: $(VENV)/.demo-installed
	$(BIN)/quantkit demo

test: $(VENV)/.dev-installed
	$(BIN)/python -m pytest -n auto --maxprocesses 8

lint: $(VENV)/.dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict quantkit kernels/quantkit_kernels

docs: $(VENV)/.dev-installed
	$(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build dist

# The stamps make every later run start at once; a changed requirement installs again.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo-installed: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[demo]'
	touch $@

$(VENV)/.dev-installed: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[dev]'
	touch $@
