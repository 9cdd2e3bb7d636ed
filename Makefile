# make demo    the main job on the model that comes with the project
# make test    the whole test suite
# make lint    ruff and mypy
# make tables  tables and plots of the documents, from docs/benchmarks/*.jsonl
# make test-matrix    loading, generating, saving and compiling on the oldest supported transformers and Triton too
#
# All of them make the environment .venv first if there is none. PYTHON names the interpreter to make it with.

PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
# torch first and alone: the build that the package index offers for this machine is then kept
INSTALL = $(1)/bin/pip install --quiet --upgrade pip && $(1)/bin/pip install --quiet torch==2.13.0
TEST = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -q -n 2 --dist loadfile

.PHONY: demo test lint test-matrix tables

demo: $(VENV)/installed
	$(VENV)/bin/quantkit demo

test: $(VENV)/installed
	$(call TEST,$(VENV))

lint: $(VENV)/installed
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

test-matrix: test $(OLDEST)/installed
	$(call TEST,$(OLDEST))

tables: $(VENV)/installed
	$(VENV)/bin/python scripts/tables.py
	$(VENV)/bin/python scripts/plots.py

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(call INSTALL,$(VENV))
	$(VENV)/bin/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

$(OLDEST)/installed: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(call INSTALL,$(OLDEST))
	$(OLDEST)/bin/pip install --quiet transformers==5.17.0 triton==3.6.0 -e '.[dev]'
	touch $@
