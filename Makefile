# The installed PyTorch is kept if there is one; TORCH names the build that a new environment gets.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
DEMO ?= demo
FAULT_TESTS := $(addprefix tests/,test_faults.py test_secure_faults.py test_audit.py test_leaks.py test_torchrun_killed.py test_attacks.py)
FLOWER_TESTS := $(wildcard tests/test_federation*.py) $(wildcard tests/test_deployed*.py)

.PHONY: install demo test test-all test-demo test-faults test-flower check format docs clean

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

# Payloads mutated a hundred thousand times, the audit of privacy, memory, ranks that are killed, clients that lie; what
# needs Flower is part of test-flower.
test-faults: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m slow $(FAULT_TESTS)

# Flower pins packages that others need newer: it has an environment of its own.
test-flower: $(VENV)-flower/.installed
	OMP_NUM_THREADS=1 $(VENV)-flower/bin/python -m pytest -m "slow or not slow" $(FLOWER_TESTS)

$(VENV)-flower/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-flower
	$(VENV)-flower/bin/python -m pip install -q "$(TORCH)"
	$(VENV)-flower/bin/python -m pip install -q -e ".[flower,sparse,data,report,wire,privacy]" "hypothesis>=6.100" "pytest>=8.2" "pytest-timeout>=2.3"
	touch $@

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
	rm -rf $(VENV) $(VENV)-flower $(DEMO) .pytest_cache .ruff_cache .hypothesis
