# Figment: `make train` and look at what a GAN draws. `make help` lists the rest.

PYTHON ?= python3
BIN    := .venv/bin
STACK  := $(BIN)/python -m infra.local
SUBMIT := $(STACK) run -- python -m jobs.submit --
SAMPLE := data/cifar-10-sample.tar.xz
RECIPE ?= dcgan-demo
OUT    ?= $(CURDIR)/out/$(RECIPE)

.DEFAULT_GOAL := help
.PHONY: help install stack status train doctor test stop
MAKEFLAGS += --no-print-directory

help:
	@echo 'make train    install, start the local stack, ingest the CIFAR-10 sample, train a DCGAN on two workers'
	@echo '              (RECIPE=… for another recipe, ARGS="--training.images 20000" for other settings)'
	@echo 'make test     format, lint, types and all tests, on real servers'
	@echo 'make stack    start the local stack: S3 server, MLflow server, Ray head, all on 127.0.0.1'
	@echo 'make status   what runs, where, and what is wrong with what does not'
	@echo 'make doctor   check every node of the cluster: versions, storage, MLflow, GPU, disk'
	@echo 'make stop     stop the local stack; data sets, runs and logins stay in .figment'
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

train: stack
	@$(SUBMIT) python -m jobs.ingest '$(CURDIR)/$(SAMPLE)' --dataset-name cifar10-sample
	@$(SUBMIT) python -m jobs.train $(RECIPE) --output '$(OUT)' $(ARGS)

doctor: stack
	@$(SUBMIT) python -m jobs.doctor

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest $(ARGS)

stop:
	@test ! -x $(BIN)/python || $(STACK) down
