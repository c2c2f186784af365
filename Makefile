# The two commands of the README are `make demo` and `make test`; both set up what they need in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= out
BUNDLE := $(OUT)/sana-tiny
PROMPT ?= a red apple on a yellow background

WORKERS ?= 2
# Without parity to diffusers, whose import alone takes seconds.
QUICK = $(BIN)/python -m pytest -m "not slow and not gpu" --ignore=tests/parity
HALF := apps benchmarks plugins sana_ref train

# Tests start a hundred processes, and each would compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test check quick-half quick-rest lint type test-gpu clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python {sys.version.split()[0]} found; 3.11 or newer is needed: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)

# One stamp an extra: the installation runs again only when pyproject.toml changes.
$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

setup: $(VENV)/.installed-test ## install everything that development needs into .venv

demo: $(VENV)/.installed-export ## build the small model that ships, draw a picture with it, say where it is
	$(BIN)/python export/build_engine.py --model models/sana-tiny --precision fp16 --target sm80,sm86,sm89,sm120 --out $(BUNDLE)
	$(BIN)/sana generate $(BUNDLE) "$(PROMPT)" --out $(OUT)/picture.png

# A file's tests share what its fixtures build: they stay in one process. Files come in the order of tests/conftest.py, long ones first.
# Tests that need the GPU have it to themselves.
test: $(VENV)/.installed-test ## lint, types, all tests (CPU; tests that need a GPU say that they skip)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not gpu" --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder
	$(BIN)/python -m pytest -m gpu -rs

check: $(VENV)/.installed-test ## lint, types and the quick tests, in two processes of about the same length
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) --jobs=2 --output-sync quick-half quick-rest

quick-half:
	$(QUICK) $(addprefix tests/,$(HALF))
quick-rest:
	$(QUICK) $(addprefix --ignore=tests/,$(HALF))

lint: $(VENV)/.installed-test ## format and lint in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-gpu: $(VENV)/.installed-test ## the tests that need a GPU
	$(BIN)/python -m pytest -m gpu -rs

clean: ## remove what was built (not .venv)
	rm -rf $(OUT) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
