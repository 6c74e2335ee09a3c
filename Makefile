# `make demo` and `make test` set themselves up: Python 3.11+, git and make are all they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PROCESSES ?= auto

.PHONY: help demo demo-adapters bench-fidelity test quality style clean
help:
	@echo "make demo            fetch a real encoder and four text tasks, finetune, merge, evaluate (first time: minutes)"
	@echo "make demo-adapters   the same with LoRA and (IA)3 adapters, beside PEFT's own merges"
	@echo "make bench-fidelity  accuracy kept by merging beside its rivals, on eight text tasks, as many image tasks and more (hours)"
	@echo "make test            lint, type-check and run the tests"
	@echo "make style           format the code"
	@echo "make clean           remove the virtual environment"

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@

demo: $(VENV)/installed
	$(BIN)/python recipes/demo.py $(DEMO_ARGS)

demo-adapters: $(VENV)/installed
	$(BIN)/python recipes/demo_adapters.py $(DEMO_ARGS)

bench-fidelity: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[plot,recipes]'
	$(BIN)/python benchmarks/fidelity.py $(BENCH_ARGS)

test: quality
	$(BIN)/python -m pytest -m "not slow" --numprocesses $(PROCESSES) --maxprocesses 8

quality: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV)
