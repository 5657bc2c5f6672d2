# Two commands do all the set-up: `make demo` and `make test`. Both need Python 3.11 or newer, make, and nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test check mutations proto docs .venv clean
.DEFAULT_GOAL := demo

demo: $(STAMP)  ## a federated QLoRA fine-tuning on this machine, from base to comparison and report
	$(BIN)/silotune-sim demo

# Processes of the tests; each takes a whole file at a time, and the next when it is free.
JOBS ?= 2

test: $(STAMP)  ## everything that the gate runs
	$(BIN)/python -m pytest -q -m "not slow and not gpu" --numprocesses=$(JOBS) --dist=loadfile --no-loadscope-reorder

mutations: $(STAMP)  ## switches guards off one at a time; a test must notice each
	$(BIN)/python -m tests.mutations

check: $(STAMP)  ## style, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/layout.py --check

.venv: $(STAMP)  ## the environment alone

$(STAMP): pyproject.toml constraints.txt
	@echo "Making $(VENV) from constraints.txt (torch, transformers, Flower: a few minutes, once)"
	$(PYTHON) -c 'import sys; sys.exit("silotune needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	$(BIN)/python -m pip install --quiet --editable ".[dev]" -c constraints.txt
	@touch $@

proto: $(STAMP)  ## the gRPC code between courier and agent, from its schema
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. common/agent.proto

docs: $(STAMP)  ## the generated pages
	$(BIN)/python -m common.run.pages
	$(BIN)/python -m server.report.methods
	$(BIN)/python -m tests.mutations --page

clean:
	rm -rf $(VENV) runs build *.egg-info
