# `make quickstart` and `make test` are the two commands; each makes .venv if it is absent.
#   PYTHON=python3.12        the interpreter that .venv is made with
#   TORCH_SPEC='torch==...'  another torch (an installed one is honoured)
#   ARGS='--smoke'           arguments of `leyden quickstart`
#   PYTEST_ARGS='-k cli'     arguments of pytest
PYTHON ?= python3
TORCH_SPEC ?=
ARGS ?=
PYTEST_ARGS ?=
export TORCH_SPEC
BIN := .venv/bin

.PHONY: help setup quickstart test test-all test-slurm lint bench clean

help:
	@echo 'make quickstart   the whole path on real input: Spark -> shards -> two ranks (ARGS=--smoke)'
	@echo 'make test         the tests (PYTEST_ARGS=...); test-all, test-slurm: the long ones too'
	@echo 'make lint         ruff and mypy'
	@echo 'make bench        the published figures in half an hour, into build/benchmarks'
	@echo 'make setup        .venv only; make clean removes build output, never data, runs or .venv'

# The script compares a digest of pyproject.toml and constraints.txt with the one in .venv
# (time stamps lie after a git checkout) and returns in 0.1 s when nothing changed.
setup:
	@command -v $(PYTHON) >/dev/null || { \
	  echo 'error: no $(PYTHON) on PATH; install Python 3.11 to 3.13 with venv, e.g.' \
	       'apt-get install python3 python3-venv' >&2; exit 4; }
	@$(PYTHON) launch/bootstrap.py

# exec: make passes a Ctrl-C on, and no shell stands between it and the command.
quickstart: setup
	@exec $(BIN)/leyden quickstart $(ARGS)

test: setup
	@exec $(BIN)/python -m pytest $(PYTEST_ARGS)

# Every strategy crossed with every option, every seed and every fault point; new random examples.
test-all: setup
	@LEYDEN_ALL_CELLS=1 LEYDEN_FAULT_POINTS=0 exec $(BIN)/python -m pytest $(PYTEST_ARGS)

# Half an hour on a real Slurm that the tests start themselves (root, slurm-wlm, munge).
test-slurm: setup
	@exec $(BIN)/python -m pytest -m slurm_long -s tests/test_slurm_long.py $(PYTEST_ARGS)

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/mypy

bench: setup
	@$(BIN)/python -m benchmarks.run_all

clean:
	@rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache spark-warehouse
