# Every habit in one line. Whoever knows DVC, Airflow and BentoML can go without make.
SHELL := bash
.DEFAULT_GOAL := help
SOURCE ?= simulator
RAW ?=

export PATH := $(CURDIR)/.venv/bin:$(PATH)
# Nothing phones home. Airflow and Feast have no telemetry in these versions.
export GX_ANALYTICS_ENABLED := false
export DVC_NO_ANALYTICS := 1
export BENTOML_DO_NOT_TRACK := True

export BENTOML_HOME := $(CURDIR)/.bentoml
export BENTOML_HOST ?= 127.0.0.1
export BENTOML_PORT ?= 3000
export AIRFLOW_HOME := $(CURDIR)/.airflow
export AIRFLOW__CORE__DAGS_FOLDER := $(CURDIR)/dags
export AIRFLOW__CORE__PLUGINS_FOLDER := $(CURDIR)/dags/plugins
export AIRFLOW__CORE__LOAD_EXAMPLES := False
export AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION := False
export AIRFLOW__CORE__PARALLELISM := 4
export AIRFLOW__API__HOST := 127.0.0.1
export AIRFLOW__API__PORT := 8080
export AIRFLOW__API__BASE_URL = http://127.0.0.1:$(AIRFLOW__API__PORT)
export AIRFLOW__CORE__EXECUTION_API_SERVER_URL = $(AIRFLOW__API__BASE_URL)/execution/
# Airflow's own 5, 30 and 50 seconds are too short for a machine that trains models at the same time.
export AIRFLOW__WORKERS__EXECUTION_API_TIMEOUT := 60
export AIRFLOW__CORE__DAGBAG_IMPORT_TIMEOUT := 300
export AIRFLOW__DAG_PROCESSOR__DAG_FILE_PROCESSOR_TIMEOUT := 600
# The tasks of a killed scheduler start again after a minute, and not after five.
export AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL := 30
# Models that train at a time: the slots of the pool `gpu`. The cores are divided among them.
export CLICKLOOP_TRAINING_SLOTS ?= 2
# DB=postgres: a Postgres in .airflow/postgres, or the one that AIRFLOW__DATABASE__SQL_ALCHEMY_CONN names
ifeq ($(DB),postgres)
export AIRFLOW__DATABASE__SQL_ALCHEMY_CONN ?= postgresql+psycopg2://airflow@/postgres?host=$(AIRFLOW_HOME)/postgres
endif

PIP_LINKS = $$(.venv/bin/python -m pip config get global.find-links 2>/dev/null || echo $$PIP_FIND_LINKS)

.PHONY: help demo test docs bench bench-gpu serve airflow backfill repro report lint lock clean

help:  ## what can be done here
	@grep -hE '^[a-z./]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

demo: .venv  ## the first night, from raw clicks to a model that serves (SOURCE=movielens RAW=path for real ratings)
	python -m components use $(SOURCE) $(if $(RAW),--raw $(RAW)) && python -m components run

lint: .venv  ## style, types, layers and prose: what a commit must pass
	ruff check . && ruff format --check . && mypy && lint-imports && python docs/hooks/prose.py *.md docs

# Coverage costs Python 3.11 a fifth to two fifths of the CPU time: CI prints it, and `make test COV=--cov`.
COV ?= $(if $(CI),--cov)
test: lint  ## lint, and every test that a machine without a GPU can run (COV=--cov for the lines that no test reached)
	OMP_NUM_THREADS=1 pytest -n auto --maxprocesses 4 --dist loadfile $(COV)

docs: .venv  ## the documentation, checked and built into site/ (open site/index.html)
	python docs/hooks/prose.py *.md docs && NO_MKDOCS_2_WARNING=1 mkdocs build --strict

bench: .venv  ## benchmarks that need no GPU, one JSON line a figure (ONLY=name for one: qin_rank_cpu, train_memory, …)
	for file in $(or $(ONLY:%=tests/benchmarks/bench_%.py),$(filter-out %_gpu.py,$(wildcard tests/benchmarks/bench_*.py))); do python $$file || exit; done

bench-gpu: .venv  ## benchmarks that need a CUDA device
	for file in tests/benchmarks/bench_*_gpu.py; do python $$file || exit; done

repro: .venv  ## run what changed
	dvc repro

report: .venv  ## the last run's tables, and its page
	python -m components report

serve: .venv  ## the champion on http://127.0.0.1:3000 (BENTOML_HOST, BENTOML_PORT)
	python -m components serve

airflow: .venv  ## Airflow on http://127.0.0.1:8080, the DAGs switched on (DB=postgres for Postgres; Ctrl-C stops it)
	python -m components airflow

backfill: .venv  ## days FROM=2026-01-01 TO=2026-01-10 by the Airflow that runs (ARGS="--max-active-runs 2 --run-backwards")
	airflow backfill create --dag-id ctr_daily --from-date $(FROM) --to-date $(TO) $(ARGS)

# torch brings the CUDA packages of its own build: the lock names none, so that a CPU build brings none.
# TORCH_CPU is the hash of PyTorch's own CPU wheel for this version (Linux x86-64, Python 3.11), which PyPI does not have:
# sha256sum of the file that https://download.pytorch.org/whl/cpu/torch/ lists. Change it with the version of torch.
TORCH_CPU := 6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b
lock: .venv  ## resolve pyproject.toml into requirements.lock again (a pin changes only where it must)
	uv pip compile -q pyproject.toml --group dev --group docs --python-version 3.11 --generate-hashes --no-annotate --no-header --no-emit-index-url -o requirements.lock
	sed -i -E '/^(cuda-|triton=|nvidia-(cu|nc|nv))/,/[^\\]$$/d; /$(TORCH_CPU)/d; s/^torch==.*/&\n    --hash=sha256:$(TORCH_CPU) \\/' requirements.lock

clean:  ## drop what can be made again: outputs, caches, Airflow's state (not .venv, not DVC's cache)
	rm -rf data checkpoints artifacts .scratch .airflow .mypy_cache .pytest_cache .ruff_cache .coverage dvc_plots

# pip fetches uv, uv the rest: seconds in place of minutes. Both check every hash that the lock has. uv does not read
# pip's find-links, where a CPU build of torch may lie; without one, torch comes from the registry with CUDA.
.venv: requirements.lock
	python3 -m venv .venv && .venv/bin/python -m pip install -q --require-hashes -r <(sed -n '/^uv==/,/[^\\]$$/p' requirements.lock)
	UV_FIND_LINKS="$(PIP_LINKS)" .venv/bin/uv pip install -q --python .venv/bin/python --compile-bytecode --verify-hashes -r requirements.lock
	touch .venv
