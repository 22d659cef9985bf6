# Two commands do everything: `make demo` and `make test`. PYTHON=python3.13 makes and uses another environment.
# T is passed on to pytest: make test T="-k 'echo and uvloop'".
PYTHON ?= python3
VENV ?= .venv$(if $(filter-out python3,$(notdir $(PYTHON))),-$(notdir $(PYTHON)))
BIN = $(VENV)/bin
SOURCES = kaio tests examples benchmarks scripts

.PHONY: demo test load check fix lint matrix fuzz bench conformance man system clean

demo: $(VENV)/.demo
	$(BIN)/python -m kaio demo

test: system lint
	$(BIN)/python -m pytest -n 12 --dist worksteal -m "not heavy" $(T)

# Loads of thousands of connections, a day of a client, the pool under fire, the benchmarks in little, the command line in every shell: fourteen minutes.
load: system $(VENV)/.dev
	$(BIN)/python -m pytest -m heavy -s $(T)

# Before each commit: a second when nothing has changed, up to 13 s when mypy has to read everything again.
check: $(VENV)/.dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

# Correct and format what ruff can.
fix: $(VENV)/.dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# check, and pyright, which takes 20 s more.
lint: check
	$(BIN)/pyright --pythonpath $(BIN)/python
	PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONPATH=. pyright --ignoreexternal --verifytypes kaio

# The proof: every death found, wherever the path breaks, and the living never taken for dead. About three minutes.
matrix: system $(VENV)/.dev
	$(BIN)/python -m tests.matrix

# Random input for all parsers: /proc, netlink, BTF, sysctl.d, policies, addresses, PROXY headers. MINUTES=10.
MINUTES ?= 10
fuzz: $(VENV)/.dev
	$(BIN)/python -W error -m tests.fuzz --minutes $(MINUTES)

# kaio beside what a user would pick instead: about an hour; the results go to benchmarks/results.
bench: system $(VENV)/.dev
	$(BIN)/python -m benchmarks

# Other projects' test suites over kaio's loop and over its base: about ten minutes.
conformance: system $(VENV)/.dev
	$(BIN)/python -m scripts.conformance

# Man pages, made from the help of the commands, in build/man.
man: $(VENV)/.demo
	$(BIN)/python -m scripts.man

# What the tests need besides Python: nftables, strace and the like.
system:
	scripts/install-system-packages

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[cli]'
	touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[cli,dev]'
	touch $@ $(VENV)/.demo

clean:
	rm -rf .venv .venv-* .conformance .mypy_cache .ruff_cache .pytest_cache .hypothesis
