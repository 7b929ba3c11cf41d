# Any Python from 3.10 to 3.12; it is only asked to make .venv.
PYTHON ?= python3
VENV_PYTHON := .venv/bin/python

.PHONY: setup demo test lint

setup:
	@$(PYTHON) tools/setup_env.py

demo: setup
	$(VENV_PYTHON) tools/demo.py

# ARGS goes to pytest: make test ARGS='-k fusion -m "not slow"'
test: setup
	$(VENV_PYTHON) -m pytest $(ARGS)

lint: setup
	$(VENV_PYTHON) -m ruff check
	$(VENV_PYTHON) -m ruff format --check
