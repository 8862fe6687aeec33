# make demo | dev | test | lint | bench | docs. Needs Python >= 3.11 and make; everything else goes
# into .venv.

PYTHON ?= python3
HOST   ?= 127.0.0.1
PORT   ?= 3000
ONLY   ?=
VENV   := .venv
BIN    := $(VENV)/bin

# An empty one counts as not set: Dagster itself would keep its history in a temporary folder.
ifeq ($(strip $(DAGSTER_HOME)),)
override DAGSTER_HOME := $(CURDIR)/.dagster
endif
export DAGSTER_HOME
export DAGSTER_DISABLE_TELEMETRY := 1
export DBT_SEND_ANONYMOUS_USAGE_STATS := false

.DEFAULT_GOAL := help
.PHONY: help install install-dev demo dev migrate doctor test test-slow lint format bench docs \
  screenshots clean clean-store

help:  ## show these lines
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# An environment without pip is half made: by a Python without ensurepip, or by one that was stopped.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "posterpipe needs Python 3.11 or newer: name one with make PYTHON=/path/to/python3"; exit 1; }
	@echo "$(PYTHON) -m venv $(VENV)"
	@trap 'rm -rf $(VENV); exit 1' INT TERM; \
	$(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip --version > /dev/null || { \
	  rm -rf $(VENV); \
	  echo "no environment with pip could be made; on Debian and Ubuntu: apt install python3-venv"; \
	  exit 1; }

# The stamps are newer than pyproject.toml where its packages are installed. The last line of the first
# writes the manifest that posterpipe.definitions reads, so that loading it takes no detour through dbt.
$(VENV)/installed: pyproject.toml | $(BIN)/pip
	@echo "installing the packages: some gigabytes, minutes on a slow line"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	$(BIN)/python -m posterpipe.defs.dbt_reports
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

install: $(VENV)/installed  ## create .venv with the pinned packages
install-dev: $(VENV)/installed-dev  ## the same, and what tests and checks need

demo: install  ## the whole graph on the starter posters, then the leaderboard
	@$(BIN)/posterpipe demo

# Posters, captions and prompts are watched and what is cheap follows at once; the training follows
# its schedule.
dev: install  ## Dagster UI on http://127.0.0.1:3000; sensors and schedules are on
	@$(BIN)/python -m posterpipe.home $(HOST) $(PORT)
	$(BIN)/dagster dev --host $(HOST) --port $(PORT) --workspace workspace.yaml

migrate: install  ## bring Dagster's history up to date after an upgrade; the services stopped
	@$(BIN)/python -m posterpipe.home
	$(BIN)/dagster instance migrate

doctor: install  ## what this machine has, and what is missing
	@$(BIN)/posterpipe doctor

# A thread a worker, since the teams of threads of several workers wait for each other; a file a worker,
# since what its tests share is built once then.
test: install-dev  ## the tests (slow ones left out)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder \
		-m "not slow" $(ARGS)

test-slow: install-dev  ## the slow tests
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: install-dev  ## formatting, lint, types, and that Dagster can load the definitions
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/dg check defs

format: install-dev  ## put the formatting right
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# With FILE=1 the figures take the place of this machine's in benchmarks/results and the pages.
bench: install-dev  ## benchmarks: ONLY=name PEER_SCRIPT=path STRICT=1 FILE=1; see docs/benchmarks.md
	$(BIN)/python -m benchmarks $(if $(ONLY),--only $(ONLY)) \
	  $(if $(PEER_SCRIPT),--peer-script '$(PEER_SCRIPT)') $(if $(STRICT),--strict) $(if $(FILE),--file)

# Each leaves a page that is as it should be as it is. The README's block of `make demo` is kept by hand.
docs: install-dev  ## the reference, from docstrings, and the blocks of the pages that follow from code and results
	$(BIN)/python -m docs.tools.pages
	$(BIN)/python -m docs.tools.training_settings
	$(BIN)/python -m posterpipe.starter.cards
	$(BIN)/python -c 'from benchmarks.__main__ import update_pages; update_pages()'
	$(BIN)/python -m docs.tools.reference

screenshots: install-dev  ## the pictures of README and docs, of the real thing; needs a finished make demo
	$(BIN)/python -m docs.tools.screenshots $(ARGS)

clean:  ## remove .venv, caches and builds; the store and its runs stay (see clean-store)
	rm -rf $(VENV) dbt_like_reports/target dbt_like_reports/logs docs/_build
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info

# Trained checkpoints and scores cannot be made again at once. The saves of the starter models'
# training, which takes hours, stay.
clean-store:  ## list the store (checkpoints, scores) and Dagster's home; YES=1 removes them
	@store="$${POSTERPIPE_STORE:-data/store}"; \
	for found in "$$store" "$$DAGSTER_HOME"; do \
	  if [ -d "$$found" ]; then \
	    find "$$found" -mindepth 1 -maxdepth 1 ! -name starter_training -exec du -sh {} +; \
	  fi; \
	done; \
	if [ "$(YES)" != 1 ]; then \
	  echo "Nothing is removed yet: make clean-store YES=1 removes all of this."; exit; \
	fi; \
	for found in "$$store" "$$DAGSTER_HOME"; do \
	  if [ -d "$$found" ]; then \
	    find "$$found" -mindepth 1 -maxdepth 1 ! -name starter_training -exec rm -rf {} +; \
	  fi; \
	done; \
	echo "Removed."
