# Every target makes .venv and installs what it needs, with the exact versions of constraints.txt.
PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
INSTALL = @echo "installing into $(VENV), which takes some minutes" && $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help venv quickstart check docs test

help:  ## lists the targets
	@sed -n 's/^\([a-z]*\):.*##/\1\t/p' $(MAKEFILE_LIST) | expand -t 14

venv: $(VENV)/.dev  ## makes .venv with all dependencies of evaluation and development

quickstart: $(VENV)/.eval  ## writes training pairs, trains a small embedder from scratch, exports it, and writes a report
	$(BIN)/python -m jaxembed.data packages data/packages
	$(BIN)/python -m jaxembed.train configs/quickstart.yaml
	test -d runs/quickstart/export || $(BIN)/python -m jaxembed.export runs/quickstart runs/quickstart/export
	$(BIN)/python -m jaxembed.report runs/quickstart runs/quickstart/report.html

check: $(VENV)/.dev  ## ruff (lint and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.dev  ## builds the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

test: $(VENV)/.dev  ## the checks, then the tests, offline
	$(MAKE) --jobs=2 check docs
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# These files record what was installed, and when.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.eval: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[eval,report]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[eval,report,plots,data,dev,docs]'
	touch $@ $(VENV)/.eval
