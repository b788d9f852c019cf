# `make` lists the commands. Each sets up .venv first where that is needed.
PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup data repro medium test test-slow test-gpu check bench bench-finetune bench-gpu bench-serve soak serve ui doctor clean

help:
	@echo 'make repro      run the whole pipeline: data to registered model'
	@echo 'make test       run the tests'
	@echo 'make test-slow  run the rehearsals on the true shape of GPT-2 Medium too'
	@echo 'make test-gpu   run the tests that need a GPU'
	@echo 'make check      lint, formatting and types'
	@echo 'make bench      compare the speed of the engine with its peers (hours; see --help of benchmarks/decode.py)'
	@echo 'make bench-finetune  compare fine-tuning with transformers'"'"' own recipe (half an hour)'
	@echo 'make bench-gpu  the same on a GPU, against transformers, Optimum and vLLM'
	@echo 'make doctor     say what this machine can run, and what CUDA lacks'
	@echo 'make bench-serve  compare the server with the engine alone and with a peer (half an hour)'
	@echo 'make soak       let sixteen clients do what they want to a server for ten minutes'
	@echo 'make serve      serve the registered champion: http://127.0.0.1:8000'
	@echo 'make ui         browse the runs in MLflow'
	@echo 'make medium     the pipeline on GPT-2 Medium, as a DVC experiment (fetches 1.5 GB)'
	@echo 'make clean      remove stage outputs; data, runs and .venv stay'

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'error: $(PYTHON) is older than Python 3.11; give another with make PYTHON=...' >&2; exit 2; }
	@echo 'installing into $(VENV); this takes a few minutes'
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

data: setup
	@test -e data -a -e base || dvc pull --quiet data.dvc base.dvc

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

# A test file a core: their models are too small for more threads.
test: data
	@OMP_NUM_THREADS=1 python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder -m 'not slow'

test-slow: data
	@python -m pytest

test-gpu: data
	@python -m pytest -m gpu -rs

check: setup
	@ruff check .
	@ruff format --check .
	@mypy

# CTranslate2 and llama.cpp take part where pip install '.[bench]' has brought them.
bench: setup
	@python benchmarks/decode.py --out benchmarks/results/decode.txt

bench-finetune: data
	@dvc repro tokenize
	@python benchmarks/finetune.py --rounds 3 --out benchmarks/results/finetune.txt

bench-gpu: setup
	@python benchmarks/decode.py --provider cuda --batch 1,8,64 --out benchmarks/results/decode-gpu.txt

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
