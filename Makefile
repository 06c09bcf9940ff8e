# The installed PyTorch is kept if there is one; TORCH names the build that a new environment gets.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
DEMO ?= demo

.PHONY: install demo test test-all test-demo check format docs clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q -e ".[dev]"
	touch $@

demo: install
	sh demo.sh $(BIN) $(DEMO)

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

test-all: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "slow or not slow"

test-demo: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 -m slow tests/test_demo.py

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(MAKE) docs
	$(MAKE) test

docs: install
	$(BIN)/python -m pytest -n 0 tests/test_docs.py

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(DEMO) .pytest_cache .ruff_cache .hypothesis
