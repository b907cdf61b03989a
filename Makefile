# Everything runs in .venv, which `make` builds; PYTHON needs to be 3.11 or newer.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
DEMO ?= demo

.PHONY: demo test test-slow lint bench clean

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/influence demo $(DEMO)

test: $(VENV)/.installed
	$(BIN)/python -m pytest

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed
	$(BIN)/ruff format --check influence_cli tests bench
	$(BIN)/ruff check influence_cli tests bench
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python bench/speed.py

clean:
	rm -rf $(VENV) build *.egg-info
