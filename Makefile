# Everything starts from a clone, Python >= 3.11 and make.
#
#   make run     serve the default fleet: two pools on this machine, one endpoint
#   make test    the whole test suite
#   make lint    ruff and mypy
#   make bench   how fast it is here
#   make compilers   the compilers of other chips, for `anypool check`
#   make matrix  docs/support.md: models x chips x jobs
#   make lock    remake the lock files after a change to pyproject.toml
#
# PYTHON=/path/to/python chooses the interpreter, EXTRA=tpu|cuda|rocm|ray|wandb|peers adds what it needs to .venv, and
# ARGS="..." is passed on to the command.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
export PYTHON EXTRA

VENV  := .venv
BIN   := $(VENV)/bin

.PHONY: help install run test lint format bench compilers matrix lock clean

help:  ## show this list
	@grep -hE '^[a-z]+:.*## ' Makefile | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install:  ## make .venv from the lock files, quick when nothing changed (EXTRA=cuda adds an accelerator)
	@bash tools/install.sh

run: install  ## serve the default fleet (ARGS="my-fleet.toml --port 9000")
	@$(BIN)/anypool up $(ARGS)

test: install  ## run the whole test suite (ARGS="tests/pools -k drain")
	@$(BIN)/python -m pytest $(ARGS)

lint: install  ## ruff check, ruff format --check, mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: install  ## let ruff mend what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: install  ## measure the server on this machine (ARGS="--format json")
	@$(BIN)/anypool bench serve $(ARGS)

compilers: install  ## install the TPU, NVIDIA and AMD compilers into the user's cache, outside .venv (about 2 GB)
	@for compiler in tpu cuda rocm; do $(BIN)/anypool check --install $$compiler; done

matrix: install  ## remake docs/support.md (ARGS="--models smollm2-135m --chips v5e,h100 --jobs decode")
	@$(BIN)/python -m anypool.check.matrix $(ARGS)

lock: install  ## remake requirements*.lock (versions and hashes, no index addresses)
	@bash tools/lock.sh

clean:  ## remove .venv and caches
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
