# Every target sets itself up. `make help` lists them.

PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
BIN := .venv/bin
# A stamp says what is installed: nothing is installed again until pyproject.toml changes.
RUN_STAMP := .venv/.run-installed
DEV_STAMP := .venv/.dev-installed
OCR := "rapidocr-onnxruntime>=1.4,<2; python_version < '3.13'"
QUIET_PIP := -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help run test lint types unit soak bench bench-full-cpu bench-flow bench-isolation test-matrix clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' Makefile

run: $(RUN_STAMP) ## serve the digits example on http://127.0.0.1:8000
	@$(BIN)/python -m examples.digits --host $(HOST) --port $(PORT)

test: lint types unit ## the whole check: lint, types, tests with coverage, examples, documentation

lint: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV_STAMP)
	$(BIN)/mypy
	$(BIN)/pyright

# Tests start many programs: each would compile the package anew where bytecode is not kept.
unit: export PYTHONDONTWRITEBYTECODE =
unit: $(DEV_STAMP)
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -m "not soak"
	$(BIN)/coverage report

soak: $(DEV_STAMP) ## the tests that take minutes
	$(BIN)/python -m pytest -m soak --timeout 900

bench: $(RUN_STAMP) ## measure against the alternatives; writes benchmarks/results/
	@$(BIN)/python $(QUIET_PIP) install --group bench
	@$(BIN)/python -m benchmarks

bench-full-cpu: $(RUN_STAMP) ## the same for models that want every CPU, and beside other servers
	@$(BIN)/python $(QUIET_PIP) install --group bench-full-cpu
	@$(BIN)/python $(QUIET_PIP) install --no-deps $(OCR)
	@$(BIN)/python -m benchmarks --set full-cpu

bench-flow: $(RUN_STAMP) ## overload, batches and streams, beside what else there is; with pictures
	@$(BIN)/python $(QUIET_PIP) install --group bench-flow
	@$(BIN)/python -m benchmarks --set flow
	@$(BIN)/python -m benchmarks.plot_overload

bench-isolation: $(RUN_STAMP) ## processes, shared models and Ray, beside what else there is
	@$(BIN)/python $(QUIET_PIP) install --group bench-isolation
	@$(BIN)/python -m benchmarks --set isolation

test-matrix: ## the tests on every Python at hand, and with the lowest dependencies
	@$(PYTHON) tests/matrix.py

clean: ## remove what the targets made
	rm -rf .venv .venv-* dist build .coverage .mypy_cache .pytest_cache .ruff_cache

.venv/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "asgi_infer needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	@echo "making .venv ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python $(QUIET_PIP) install "pip>=25.1"
	@touch $@

$(RUN_STAMP): .venv/.created pyproject.toml
	@echo "installing (once) ..."
	@$(BIN)/python $(QUIET_PIP) install --editable . --group digits
	@touch $@

$(DEV_STAMP): .venv/.created pyproject.toml
	@echo "installing (once) ..."
	@$(BIN)/python $(QUIET_PIP) install --editable . --group dev
	@$(BIN)/python $(QUIET_PIP) install --no-deps $(OCR)
	@touch $@ $(RUN_STAMP)
