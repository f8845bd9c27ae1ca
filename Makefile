# Every target does its own set-up (.ci/env.sh); nothing has to be installed or activated before.
#
#   make run                                            the default pipeline
#   make run EXPERIMENT=tiny ARGS="engine.tp_size=1"    an experiment and Hydra overrides
#   make test ARGS="-k ledger"                          pytest options

EXPERIMENT ?=
ARGS ?=
BIN := .venv/bin
# Which sglang-jax upstream-watch looks at: that of this interpreter, by default the lock's.
PYTHON ?=
MAKEFLAGS += --no-print-directory
# Without kept bytecode half of a run's time is spent on compiling what it imports.
unexport PYTHONDONTWRITEBYTECODE
# A file's tests share engines, so each file goes to one process. ARGS="-n 0" runs all in one.
# tests/conftest.py orders the files. A process that died is not replaced: its test would be run
# again, up to 8 times, and with the other process at its end already xdist 3.8 waits for ever.
PARALLEL := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

EXPERIMENTS := $(sort $(basename $(notdir $(wildcard conf/experiment/*.yaml))))
empty :=
comma := ,

.DEFAULT_GOAL := help
.PHONY: help run plans test test-all mutants test-fast bench lint format lock release-check upstream-watch clean env

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: env ## run a pipeline: make run EXPERIMENT=tiny ARGS="key=value ..."
	@$(BIN)/python -m kvpipe $(if $(EXPERIMENT),+experiment=$(EXPERIMENT)) $(ARGS)

plans: env ## renew the plan that is committed beside each experiment
	@$(BIN)/python -m kvpipe plan -m +experiment=$(subst $(empty) ,$(comma),$(EXPERIMENTS)) \
		plan.format=markdown plan.compile=false 'plan.file=conf/experiment/$${experiment}.plan.md'

test: env ## run what a commit can break, on real engines
	@$(BIN)/python -m pytest $(PARALLEL) -m "not nightly" $(ARGS)

# The planted faults load what the tests have compiled, and tests that have all just passed are not run
# once more without a fault.
test-all: env ## run the tests of both tiers, and the planted faults that some test has to notice
	@JAX_COMPILATION_CACHE_DIR=$$(mktemp -d) && trap 'rm -rf "$$JAX_COMPILATION_CACHE_DIR"' EXIT && \
		export JAX_COMPILATION_CACHE_DIR JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 && \
		$(BIN)/python -m pytest $(PARALLEL) -m "not small" $(ARGS) && \
		$(BIN)/python -m tools.mutants $(if $(ARGS),,--tests-passed)

mutants: env ## plant faults in copies and see them noticed: make mutants ARGS="-k kv"
	@$(BIN)/python -m tools.mutants $(ARGS)

test-fast: env ## run the tests that start no engine
	@$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not nightly" $(ARGS)

bench: env ## measure engine, supervision and commands; the last line is JSON: make bench ARGS=kv
	@$(BIN)/python -m benchmarks $(ARGS)

lint: env ## check style, types and the layer rules
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright
	@$(BIN)/lint-imports --no-logo

format: env ## rewrite the files in the project's style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

lock: ## resolve the dependencies again, from the public index only
	@"$$(.ci/env.sh uv)" lock --default-index https://pypi.org/simple $(ARGS)

release-check: env ## build the wheel and the sdist and try them in a clean environment
	@.ci/release-check

upstream-watch: env ## what another sglang-jax changes: make upstream-watch PYTHON=/its/bin/python
	@PYTHONPATH="$(CURDIR)" $(or $(PYTHON),$(BIN)/python) -m tools.upstream_watch $(ARGS)

clean: ## remove all that make made here; the outputs of runs stay
	rm -rf .venv .uv build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find kvpipe phases conf tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

env:
	@.ci/env.sh

include ops/tpu.mk
