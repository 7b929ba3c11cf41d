# Any Python from 3.10 to 3.12; it is only asked to make the environment.
PYTHON ?= python3
# What is installed: requirements/STACK.txt (openmmlab, wheels, oldest, newest, onedl). openmmlab lies in .venv, any other
# stack in .venv-STACK.
STACK ?= openmmlab
VENV := $(if $(filter openmmlab,$(STACK)),.venv,.venv-$(STACK))

.PHONY: setup demo test test-avx2 torture test-mmpose lint docs audit

setup:
	@$(PYTHON) tools/setup_env.py $(STACK)

demo: setup
	$(VENV)/bin/python tools/demo.py

# ARGS goes to pytest: make test ARGS='-k fusion -m "not slow"'
test: setup
	$(VENV)/bin/python -m pytest $(ARGS)

# The tests as on an x86-64 processor without AVX-512, on any that has AVX2. ONNX Runtime has no such switch.
test-avx2: setup
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 TORCHINDUCTOR_CACHE_DIR=build/inductor-avx2 $(VENV)/bin/python -m pytest $(ARGS)

# Tries to break the package for a quarter of an hour, and counts what was lost: docs/reliability.md
torture: setup
	$(VENV)/bin/python -m pytest tests/torture --torture $(ARGS)

# MMPose, beside the environment: CONTRIBUTING.md says why
test-mmpose: setup
	$(VENV)/bin/python -m pip install -q --no-deps --upgrade --target build/mmpose mmpose==1.3.2 json-tricks munkres
	PYTHONPATH=build/mmpose $(VENV)/bin/python -m pytest tests/test_other_libraries.py -k mmpose $(ARGS)

lint: setup
	$(VENV)/bin/python -m ruff check
	$(VENV)/bin/python -m ruff format --check

# The documents as a site, in build/site. A link that leads nowhere is an error.
docs: .venv-docs/ready
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict
	@echo build/site/index.html

.venv-docs/ready: docs/requirements.txt
	$(PYTHON) -m venv --clear .venv-docs
	.venv-docs/bin/pip install --quiet --requirement docs/requirements.txt
	@touch $@

# Unsafe calls in the code, and known faults of what it stands on; the latter asks the package index.
audit: setup
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install -q bandit pip-audit
	.venv-audit/bin/python -m bandit -q -c pyproject.toml -r repvit_mm repvit_mm_cli tools examples setup.py
	.venv-audit/bin/python -m pip_audit --path $$($(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
