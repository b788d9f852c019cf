# `make` lists the commands. Each sets up .venv first if needed.
PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup data repro medium test test-slow gpu check bench bench-finetune bench-serve soak serve ui doctor clean

help:
	@echo 'make setup           create .venv and install the project (the other commands do this first)'
	@echo 'make data            check out the bundled text and base'
	@echo 'make repro           run the whole pipeline, from text to registered model'
	@echo 'make medium          run it on GPT-2 Medium, as a DVC experiment (downloads 1.5 GB)'
	@echo 'make ui              browse the runs in MLflow'
	@echo 'make serve           serve the registered champion on http://127.0.0.1:8000'
	@echo 'make doctor          show what this machine can run, and what CUDA is missing'
	@echo 'make check           check style, formatting and types'
	@echo 'make test            run the tests'
	@echo 'make test-slow       run all tests, also those on the real shape of GPT-2 Medium and of benchmarks'
	@echo 'make gpu             try what needs a GPU: tests, speed, and the whole pipeline (at most 40 minutes; docs/gpu.md)'
	@echo 'make bench           compare the speed of the engine with its peers (hours; see benchmarks/decode.py --help)'
	@echo 'make bench-finetune  compare fine-tuning with the recipe of transformers (half an hour)'
	@echo 'make bench-serve     compare the server with the engine alone and with llama-server (half an hour)'
	@echo 'make soak            load a server with honest and hostile clients for ten minutes'
	@echo 'make clean           remove the outputs of stages and the caches; keep data, runs and .venv'

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'error: $(PYTHON) is older than Python 3.11; name a newer one with make PYTHON=...' >&2; exit 2; }
	@echo 'installing into $(VENV); this takes a few minutes'
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

data: setup
	@git rev-parse --git-dir > /dev/null 2>&1 || \
		{ echo 'error: this folder is not a git repository, which DVC needs; clone it, or run git init here' >&2; exit 2; }
	@test -e data -a -e base || dvc pull --quiet --remote embedded data.dvc base.dvc

repro: data
	@python -m pipeline.params.whole
	@dvc repro
	@python -m pipeline restore

medium: data
	@dvc exp run \
		-S base.source=openai-community/gpt2-medium \
		-S base.revision=6dcaa7a952f72f9298047fd5137cd6e4f05f41da \
		-S finetune.learning_rate=0.00003 \
		-S finetune.epochs=3 \
		-S finetune.batch_tokens=4096 \
		-S register.name=harbour-tales-medium

# One test file per core: the models are too small for more threads.
test: data
	@OMP_NUM_THREADS=1 python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder -m 'not slow'

test-slow: data
	@python -m pytest

# The environment is taken as it is: a machine with a GPU may have no package index.
gpu: $(if $(wildcard $(VENV)),,setup)
	@python benchmarks/gpu.py

check: setup
	@ruff check .
	@ruff format --check .
	@mypy

# Includes CTranslate2 and llama.cpp if pip install --editable '.[bench]' has installed them.
bench: setup
	@python benchmarks/decode.py --out benchmarks/results/decode.txt

bench-finetune: data
	@dvc repro tokenize
	@python benchmarks/finetune.py --rounds 3 --out benchmarks/results/finetune.txt

bench-serve: setup
	@python benchmarks/serve.py --out benchmarks/results/serve.txt

soak: setup
	@python benchmarks/soak.py

serve: setup
	@python -m pipeline serve

doctor: setup
	@python -m pipeline doctor

ui: setup
	@python -m pipeline ui

clean:
	@rm -rf out .mypy_cache .ruff_cache .pytest_cache .hypothesis
