# Two commands for users: make demo, make test. The rest is for contributors.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint clean

demo: .venv/.installed
	$(BIN)/moeplan demo --out demo-out

test: .venv/.installed-test
	$(BIN)/python -m pytest -n 2

lint: .venv/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Each stamp is made once; a second run installs nothing.
.venv/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "moeplan needs Python 3.11 or newer -- run: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.installed: pyproject.toml constraints.txt | .venv/.python
	@echo "Installing moeplan into .venv (once; a minute or two) ..."
	$(PIP) -e .
	@touch $@

.venv/.installed-test: .venv/.installed
	@echo "Installing the test dependencies, with torch, into .venv (once) ..."
	$(PIP) -e '.[test]'
	@touch $@

.venv/.installed-lint: .venv/.installed-test
	$(PIP) -e '.[test,lint]'
	@touch $@

clean:
	rm -rf .venv demo-out build dist
