# `make demo` shows the main job; `make loop` what goes on around training; `make test` runs every test; `make lint` what CI also asks for.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check

.PHONY: demo loop test lint bench docs clean

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

loop: $(VENV)/.developing
	$(BIN)/python examples/training_loop.py

test: $(VENV)/.developing
	$(BIN)/python -m pytest -n auto --dist loadgroup

lint: $(VENV)/.developing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.developing
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/performance.py

docs: $(VENV)/.developing
	$(BIN)/python docs/make_cli.py

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip

$(VENV)/.installed: $(VENV)/bin/pip pyproject.toml constraints.txt hatch_build.py registry/merge/kernel.c registry/merge/kernel_loops.h
	$(PIP) install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.developing: $(VENV)/.installed $(VENV)/clients/hub-0.36/.made $(VENV)/clients/hub-2/.made
	$(PIP) install --quiet -c constraints.txt -e ".[team,plot]" --group test --group lint
	touch $@

# The Hub's own clients, old and new, each with what it wants: the tests of the Hub endpoint run them.
$(VENV)/clients/hub-0.36/.made: HUB := huggingface_hub==0.36.2 hf_transfer
$(VENV)/clients/hub-2/.made: HUB := huggingface_hub==2.4.0
$(VENV)/clients/%/.made: $(VENV)/bin/pip
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip --disable-pip-version-check install --quiet -c constraints.txt $(HUB)
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
