# Each target sets up what it needs: a virtual environment in .venv, and the pinned packages of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

PEERS := .venv-peers
PEERS_STAMP := $(PEERS)/.installed

.PHONY: demo test lint install bench bench-peers clean

demo: $(STAMP)
	$(BIN)/clevagent demo

test: $(STAMP)
	$(BIN)/pytest $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python benchmarks/hot_paths.py
	$(BIN)/python benchmarks/ceilings.py
	$(BIN)/python benchmarks/ledgers.py
	$(BIN)/python -m benchmarks.results

# ClevAgent beside others, in an environment of their own; the table of README.md follows.
bench-peers: $(PEERS_STAMP)
	$(PEERS)/bin/python -m benchmarks.peers.ceilings
	$(PEERS)/bin/python -m benchmarks.peers.costs
	$(PEERS)/bin/python -m benchmarks.results --readme

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt scripts/setup.sh
	PYTHON=$(PYTHON) sh scripts/setup.sh $(VENV)
	touch $@

$(PEERS_STAMP): pyproject.toml constraints.txt benchmarks/peers/requirements.txt scripts/peers.sh
	PYTHON=$(PYTHON) sh scripts/peers.sh $(PEERS)
	touch $@

clean:
	rm -rf $(VENV) $(PEERS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
