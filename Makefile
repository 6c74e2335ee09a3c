# `make demo` and `make test` set themselves up: Python 3.11+, git and make are all they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PROCESSES ?= auto

.PHONY: help demo demo-adapters bench-fidelity test test-sanitized quality style clean
help:
	@echo "make demo            fetch a real encoder and four text tasks, finetune, merge, evaluate (first time: minutes)"
	@echo "make demo-adapters   the same with LoRA and (IA)3 adapters, beside PEFT's own merges"
	@echo "make bench-fidelity  accuracy kept by merging beside its rivals, on eight text tasks, as many image tasks and more (hours)"
	@echo "make test            lint, type-check and run the tests"
	@echo "make test-sanitized  run the tests of the compiled files under address and undefined-behaviour sanitizers (GCC)"
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

# In a copy, so that the compiled file in use stays as it is. Python is not instrumented: the sanitizers' runtime is loaded
# before it, and the C++ library with it, without which an exception of torch's would end the process.
SANITIZED := build/sanitized
SANITIZERS := -g -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
SANITIZED_PYTHON = ASAN_OPTIONS=detect_leaks=0:handle_sigbus=0 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" $(abspath $(BIN))/python
SANITIZED_TESTS := tests/test_kernels.py tests/test_election.py tests/test_fitting.py tests/test_mapped_files.py

test-sanitized: $(VENV)/installed
	rm -rf $(SANITIZED)
	mkdir -p $(SANITIZED)
	cp -R emr_hf tests pyproject.toml $(SANITIZED)
	rm -f $(SANITIZED)/emr_hf/_kernels*
	$(CXX) $(SANITIZERS) -fno-exceptions -fno-rtti -fno-math-errno -Wno-psabi -fPIC -shared \
		-o $(SANITIZED)/emr_hf/_kernels.abi3.so emr_hf/csrc/*.cpp
	cd $(SANITIZED) && $(SANITIZED_PYTHON) -c "from emr_hf import kernels; assert kernels.available(), 'not built'"
	cd $(SANITIZED) && $(SANITIZED_PYTHON) -m pytest -p no:cacheprovider $(SANITIZED_TESTS)

quality: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV)
