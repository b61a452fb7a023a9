# Figment: `make train` and look at what a GAN draws. `make help` lists the rest.

PYTHON ?= python3
BIN    := .venv/bin
STACK  := $(BIN)/python -m infra.local
SUBMIT := $(STACK) run -- python -m jobs.submit --
RECIPE ?= dcgan-demo
# Tests that share a server stay in one process (tests/grouping.py); three processes, since servers are waited for.
PARALLEL := -n 3 --dist loadscope
OUT    ?= $(CURDIR)/out/$(RECIPE)

.DEFAULT_GOAL := help
.PHONY: help install stack status train tables doctor test test-fast stop
MAKEFLAGS += --no-print-directory

help:
	@echo 'make train    install, start the local stack, bring the data of a recipe, train it: a DCGAN on two workers'
	@echo '              (RECIPE=vae-demo for another recipe, ARGS="--training.images 20000" for other settings)'
	@echo 'make test     format, lint, types and all tests, on real servers'
	@echo 'make test-fast   those that need no server, in a minute'
	@echo 'make stack    start the local stack: S3 server, MLflow server, Ray head, all on 127.0.0.1'
	@echo 'make status   what runs, where, and what is wrong with what does not'
	@echo 'make doctor   check every node of the cluster: versions, storage, MLflow, GPU, disk'
	@echo 'make stop     stop the local stack; data sets, runs and logins stay in .figment'
	@echo 'make tables   write the tables of recipes and models into README.md and models/README.md'
	@echo 'make install  only make .venv and install into it'
	@echo
	@echo 'eval "$$($(STACK) env)"  gives your shell what a job needs: ray job submit --working-dir . -- python -m jobs.train …'

# Made again when what it depends on says something new; newer files that say the same cost nothing.
.venv/installed: pyproject.toml constraints.txt infra/install.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: Figment needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -V 2>&1): make PYTHON=/path/to/python3.11 …" >&2; exit 2; }
	@$(PYTHON) infra/install.py

install: .venv/installed
	@:

stack: install
	@$(STACK) up

status:
	@test -x $(BIN)/python || { echo 'nothing is installed yet: make train'; exit 1; }
	@$(STACK) status

# What is wrong with RECIPE or ARGS is said before anything starts.
train: install
ifneq ($(filter -h --help,$(ARGS)),)
	@$(BIN)/python -m jobs.train $(RECIPE) $(ARGS)
else
	@$(BIN)/python -m jobs.train $(RECIPE) $(ARGS) --dry-run >/dev/null
	@$(STACK) up
	@$(SUBMIT) python -m jobs.train $(RECIPE) --ingest --output '$(OUT)' $(ARGS)
endif

tables: install
	@$(BIN)/python -m jobs.recipes --write

doctor: stack
	@$(SUBMIT) python -m jobs.doctor

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest $(PARALLEL) --durations 25 $(ARGS)

# For the inner loop: what needs no server, in under 90 seconds.
test-fast: install
	$(BIN)/ruff check .
	$(BIN)/pytest $(PARALLEL) --durations 10 -m 'not servers' $(ARGS)

stop:
	@test ! -x $(BIN)/python || $(STACK) down
