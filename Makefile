# Each target makes .venv when it is missing, and installs again when pyproject.toml or constraints.txt changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed.stamp

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-gpu test-slow test-cluster chaos check bench bench-scaling bench-search bench-search-quality bench-autoscale clean

help: ## Say what there is to make.
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do printf '  make %-20s %s\n' "$$name" "$$text"; done

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "tunefleet needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# torch by itself first: packages that look for it while they are built then find it, at the version of the constraints.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

install: $(INSTALLED) ## Make .venv with everything in it.

quickstart: $(INSTALLED) ## Fine-tune a small model on this machine, from nothing, and show the result.
	$(BIN)/python jobs/quickstart.py

test: $(INSTALLED) ## Every test that takes less than a minute.
	$(BIN)/python -m pytest -m 'not slow and not gpu and not chaos and not cluster'

test-gpu: $(INSTALLED) ## The tests that need a GPU; without one they say so and do nothing.
	$(BIN)/python -m pytest -m gpu

chaos: $(INSTALLED) ## Twenty runs that are killed on the way: a table of what each kill cost (about an hour).
	$(BIN)/python -m pytest -m chaos tests/chaos

test-slow: $(INSTALLED) ## The long tests; those of `search: bohb` need `pip install -e '.[bohb]'`, and a C compiler for it.
	$(BIN)/python -m pytest -m 'slow and not gpu and not chaos and not cluster'

test-cluster: $(INSTALLED) ## Searches on Ray's own autoscaler, from no node to the most and back.
	$(BIN)/python -m pytest -m cluster tests/search/autoscaled

check: $(INSTALLED) ## Style, types, and which way imports point.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(INSTALLED) ## Speed beside the peers; makes their environments by itself.
	$(BIN)/python benchmarks/llamafactory.py

bench-scaling: $(INSTALLED) ## Tokens per second and bytes sent, on one and two workers, for every method and engine.
	$(BIN)/python benchmarks/scaling.py

bench-search: $(INSTALLED) ## What short trials cost beside their training: warm, cold, and in Ray Tune's own way.
	$(BIN)/python benchmarks/search.py

bench-search-quality: $(INSTALLED) ## What searches find, beside trying everything; after `make quickstart`.
	$(BIN)/python benchmarks/search_quality.py

bench-autoscale: $(INSTALLED) ## Node-seconds of a search on an autoscaled cluster, beside plain Ray Tune.
	$(BIN)/python benchmarks/autoscale.py

clean: ## Remove caches and the quickstart's files; .venv and outputs/ stay.
	rm -rf .quickstart .mypy_cache .ruff_cache .pytest_cache .import_linter_cache dist
	find . -name __pycache__ -not -path './$(VENV)*' -type d -prune -exec rm -rf {} +
