# `make` alone lists what there is. Everything runs in .venv, which the first target that needs it
# makes: choose another interpreter with `make setup PYTHON=python3.12`, and another vLLM, in a
# folder of its own, with VLLM=0.33 once there is a requirements/vllm-0.33.txt (every target takes it).

PYTHON ?= python3
export PYTHON
export VLLM

VENV := .venv$(addprefix -,$(VLLM))
STAMP := $(VENV)/.set-up
PINNED := $(wildcard requirements/*.*) requirements/vllm-metadata/pyproject.toml pyproject.toml

.PHONY: help setup demo test test-all check types rules fast format docs upstream bench soak heads clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 18

setup: $(STAMP) ## install the pinned CPU stack into .venv

# The stamp is written last, so that an interrupted set-up is taken up again.
$(STAMP): $(PINNED)
	@rm -f $@
	requirements/install-cpu.sh $(VENV)
	@touch $@

demo: $(STAMP) ## emphasis on real prompts, plain and emphasised side by side
	$(VENV)/bin/vllm-pasta demo

# Two workers with half of the cores each, since most of a test is Python. Tests that need the same
# server or engine share a worker, and what takes long comes first (tests/conftest.py).
WORKERS ?= 2
PYTEST = $(VENV)/bin/pytest -q -ra --durations=20
DEALT = -n $(WORKERS) --dist loadgroup --no-loadscope-reorder

test: check ## linters, type checker, tests (WORKERS=4 on a larger machine)
	$(PYTEST) $(DEALT)

test-all: check ## and slow variants of them
	$(VENV)/bin/pip install --quiet "ray>=2.40,<3"
	$(PYTEST) -m "" $(DEALT)

upstream: $(STAMP) ## what another vLLM changes that the plugin builds on: VERSION=0.33.0
	$(VENV)/bin/python -m tools.check_upstream $(VERSION)

bench: $(STAMP) ## all benchmarks, against plain vLLM, with plots (an hour; BENCH=--short: minutes)
	$(VENV)/bin/pip install --quiet matplotlib
	$(VENV)/bin/python -m benchmarks $(BENCH)

soak: $(STAMP) ## ten minutes of mixed traffic on a server, its answers held against the oracle
	$(VENV)/bin/python -m benchmarks.soak $(SOAK)

heads: $(STAMP) ## find SmolLM2's heads for the paper's tasks (two hours; experiments/find_heads.sh)
	$(VENV)/bin/pip install --quiet matplotlib
	experiments/find_heads.sh $(VENV)/bin

docs: $(STAMP) ## the documentation as a site, in build/site/index.html
	$(VENV)/bin/pip install --quiet --no-deps --requirement requirements/docs.txt
	$(VENV)/bin/properdocs build --strict --config-file properdocs.yml

check: $(STAMP) ## linters, type checker, import rules, links of the documents
	@$(MAKE) --no-print-directory --jobs 2 --output-sync types rules

types:
	$(VENV)/bin/mypy

rules:
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports --no-logo
	$(VENV)/bin/pytest -q tests/unit/test_docs.py

fast: check ## the checks and the unit tests: before every commit
	$(PYTEST) $(DEALT) tests/unit

format: $(STAMP) ## format the code as `make check` wants it
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean: ## remove .venv and everything built; the converted model stays in its cache folder
	rm -rf .venv .venv-* build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
