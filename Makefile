# `make` alone lists what there is. Everything runs in .venv, which the first target that needs it
# makes: choose another interpreter with `make setup PYTHON=python3.12`, and another vLLM, in a
# folder of its own, with VLLM=0.31 (every target takes it).

PYTHON ?= python3
export PYTHON
export VLLM

VENV := .venv$(addprefix -,$(VLLM))
STAMP := $(VENV)/.set-up
PINNED := $(wildcard requirements/*.*) requirements/vllm-metadata/pyproject.toml pyproject.toml

.PHONY: help setup demo test test-all fast check docs upstream bench heads clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 14

setup: $(STAMP) ## install the pinned CPU stack into .venv

# The stamp is written last, so that an interrupted set-up is taken up again.
$(STAMP): $(PINNED)
	@rm -f $@
	requirements/install-cpu.sh $(VENV)
	@touch $@

demo: $(STAMP) ## emphasis on real prompts, plain and emphasised side by side
	$(VENV)/bin/vllm-pasta demo

# Two workers, each with half of the cores: most of a test is Python. Tests that need the same server
# or engine share a worker, and what takes long comes first (tests/conftest.py).
WORKERS ?= 2
PYTEST = $(VENV)/bin/pytest -q -ra --durations=10 -n $(WORKERS) --dist loadgroup --no-loadscope-reorder

test: check ## linters, type checker, tests (WORKERS=4 on a larger machine)
	$(PYTEST)

test-all: check ## and slow variants of them
	$(PYTEST) -m ""

fast: check ## linters, type checker, unit tests: about a minute
	$(PYTEST) tests/unit

upstream: $(STAMP) ## what another vLLM changes that we build on: VERSION=0.33.0
	$(VENV)/bin/python -m patches.check_upstream $(VERSION)

bench: $(STAMP) ## all benchmarks, against plain vLLM, with plots (an hour; BENCH=--short: minutes)
	$(VENV)/bin/pip install --quiet matplotlib
	$(VENV)/bin/python -m benchmarks $(BENCH)

# Resumable: what was answered stays in heads/. VLLM_PASTA_DATA names the folder of CounterFact.
PROFILE = $(VENV)/bin/vllm-pasta profile --search gradient --likelihood --examples 40
EVAL = $(VENV)/bin/vllm-pasta eval --generations 100 --markdown
BASELINES = zero-shot,starred,quoted,few-shot

heads: $(STAMP) ## find SmolLM2's heads for the paper's tasks, and the README's tables (two hours)
	$(VENV)/bin/pip install --quiet matplotlib
	mkdir -p heads
	for task in json pronouns biasbios counterfact; do \
		$(PROFILE) --tasks $$task --alpha 0.1 --top-k auto --out heads/$$task.json || exit; \
	done
	$(PROFILE) --tasks json --top-k 20 --out heads/json-20.json
	$(PROFILE) --tasks json,biasbios,counterfact --alpha 0.1 --select union --top-k 10 \
		--out heads/multi.json
	$(VENV)/bin/vllm-pasta profile --tasks counterfact --top-k auto --out heads/counterfact-full.json
	$(VENV)/bin/python -m benchmarks.heads heads/json.json heads/pronouns.json \
		heads/biasbios.json heads/counterfact.json --out heads/by-number.png
	for task in json-20 pronouns biasbios counterfact; do \
		$(EVAL) --tasks $${task%-*} --alpha 0.1 --out heads/eval-$$task.jsonl \
			--methods $(BASELINES),heads/$$task.json,heads/multi.json || exit; \
	done
	$(EVAL) --tasks counterfact --examples 500 \
		--methods $(BASELINES),all,layers:20-24,heads/counterfact-full.json \
		--head-counts 1,3,8,12,20,50,100 --out heads/eval.jsonl --plots heads/eval.png

docs: $(STAMP) ## the documentation as a site, in build/site/index.html
	$(VENV)/bin/pip install --quiet --no-deps --requirement requirements/docs.txt
	$(VENV)/bin/properdocs build --strict --config-file properdocs.yml

check: $(STAMP) ## linters, type checker, links of the documents
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/pytest -q tests/unit/test_docs.py

clean: ## remove .venv and everything built; the converted model stays in its cache folder
	rm -rf .venv .venv-* build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
