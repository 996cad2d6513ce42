# Each target sets up what it needs: virtual environments, with the pinned versions of the constraints files.
#   .venv         the newest clients of OpenAI and Anthropic, LangChain, LangGraph
#   .venv-crewai  everything, with the older clients that CrewAI asks for
#   .venv-oldest  the oldest versions that are supported
#   .venv-peers, .venv-transparency  see bench-peers and transparency
#   .nox          one for each version of Python; see noxfile.py
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

CREWAI := .venv-crewai
CREWAI_STAMP := $(CREWAI)/.installed
OLDEST := .venv-oldest
OLDEST_STAMP := $(OLDEST)/.installed
PEERS := .venv-peers
PEERS_STAMP := $(PEERS)/.installed
TRANSPARENCY := .venv-transparency
TRANSPARENCY_STAMP := $(TRANSPARENCY)/.installed

# What runs in an environment depends on the versions in it only here.
ADAPTERS := tests/crewai tests/langgraph tests/openai tests/anthropic tests/examples tests/docs tests/cli/test_demo.py
# What depends on the version of Python most, in less time than all.
VERSION_BOUND := tests/core tests/ledger tests/heartbeat tests/langchain tests/attribution tests/testing tests/cli
PARALLEL := -n auto --dist worksteal

.PHONY: demo test test-fast test-newest test-crewai test-oldest test-versions test-python-3.13 lint install bench bench-instructions \
	bench-peers transparency clean

demo: $(CREWAI_STAMP)
	$(CREWAI)/bin/clevagent demo

test: test-newest test-crewai test-python-3.13

# For every save: under a minute on two cores.
test-fast: $(STAMP)
	$(BIN)/pytest $(PARALLEL) --ignore=tests/crewai -m "not slow" $(PYTEST_ARGS)

test-newest: $(STAMP)
	$(BIN)/pytest $(PARALLEL) --ignore=tests/crewai $(PYTEST_ARGS)

test-crewai: $(CREWAI_STAMP)
	$(CREWAI)/bin/pytest $(PARALLEL) $(ADAPTERS) $(PYTEST_ARGS)

test-oldest: $(OLDEST_STAMP)
	$(OLDEST)/bin/pytest $(PARALLEL) $(ADAPTERS) tests/langchain $(PYTEST_ARGS)

# On every version of Python that is supported and found.
test-versions: $(STAMP)
	$(BIN)/nox -- $(PYTEST_ARGS)

test-python-3.13: $(STAMP)
	$(BIN)/nox --session tests-3.13 -- $(VERSION_BOUND) $(PYTEST_ARGS)

lint: $(STAMP) $(CREWAI_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo
	$(CREWAI)/bin/mypy

bench: $(STAMP) $(CREWAI_STAMP)
	$(BIN)/python benchmarks/hot_paths.py
	$(CREWAI)/bin/python benchmarks/ceilings.py
	$(BIN)/python benchmarks/ledgers.py
	$(BIN)/python benchmarks/heartbeats.py
	$(BIN)/python benchmarks/clients.py
	$(BIN)/python benchmarks/graphs.py
	$(CREWAI)/bin/python benchmarks/crews.py
	$(BIN)/python -m benchmarks.results --readme

# Counts, which come out the same within a per cent: what "not slower" means here. Installs valgrind where it is missing and make runs as
# root on Debian.
bench-instructions: $(STAMP)
	sh scripts/valgrind.sh
	$(BIN)/python -m benchmarks.instructions
	$(BIN)/python -m benchmarks.results

# ClevAgent beside others, in an environment of their own; the table of README.md follows.
bench-peers: $(PEERS_STAMP)
	$(PEERS)/bin/python -m benchmarks.peers.ceilings
	$(PEERS)/bin/python -m benchmarks.peers.costs
	$(PEERS)/bin/python -m benchmarks.peers.signs
	$(PEERS)/bin/python -m benchmarks.results --readme

# The unit tests of LangChain's packages, plainly and with ClevAgent attached: TRANSPARENCY_ARGS="langgraph --verbose" for a part.
transparency: $(STAMP) $(TRANSPARENCY_STAMP)
	$(BIN)/pytest tests/langchain/test_standard_suite.py
	$(TRANSPARENCY)/bin/python scripts/transparency/compare.py $(TRANSPARENCY_ARGS)

install: $(STAMP) $(CREWAI_STAMP)

$(STAMP): pyproject.toml constraints.txt scripts/setup.sh
	PYTHON=$(PYTHON) sh scripts/setup.sh $(VENV) dev constraints.txt
	touch $@

$(CREWAI_STAMP): pyproject.toml constraints-crewai.txt scripts/setup.sh
	PYTHON=$(PYTHON) sh scripts/setup.sh $(CREWAI) crewai constraints-crewai.txt
	touch $@

$(OLDEST_STAMP): pyproject.toml constraints-oldest.txt scripts/setup.sh
	PYTHON=$(PYTHON) sh scripts/setup.sh $(OLDEST) crewai constraints-oldest.txt
	touch $@

$(PEERS_STAMP): pyproject.toml constraints.txt benchmarks/peers/requirements.txt scripts/peers.sh
	PYTHON=$(PYTHON) sh scripts/peers.sh $(PEERS) benchmarks/peers/requirements.txt
	touch $@

$(TRANSPARENCY_STAMP): pyproject.toml constraints.txt scripts/transparency/requirements.txt scripts/peers.sh
	PYTHON=$(PYTHON) sh scripts/peers.sh $(TRANSPARENCY) scripts/transparency/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) $(CREWAI) $(OLDEST) $(PEERS) $(TRANSPARENCY) .nox build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
