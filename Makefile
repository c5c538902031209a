# Every command of this project. Each sets up what it needs first; `make` alone lists them.

PY := .venv/bin/python
# Only what holds Python: mypy refuses an empty directory.
TYPED := $(foreach dir,cgroups pactown_runner tests benchmarks examples scripts,$(if $(shell find $(dir) -name '*.py' 2>/dev/null),$(dir))) $(wildcard hatch_build.py)

.DEFAULT_GOAL := help
.PHONY: help setup run test test-kernel check format lint types layers bench clean

help: ## list these commands
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1|/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do \
		printf '  make %-11s %s\n' "$$name" "$$text"; done

setup: ## make .venv and build the launcher (all others do this first)
	@bash scripts/setup

run: setup ## run the example: two tenants side by side
	@$(PY) examples/two_tenants.py

# Without ARGS, which choose from the tests, also those that need a guest, where one can be had.
test: check ## check, then every test that this machine can run
	@$(PY) -m pytest $(ARGS)
	@$(if $(ARGS),,$(PY) -m scripts.kernel_lane --if-possible)

test-kernel: setup ## the tests that need cgroup v2 controllers, in a guest under QEMU; NATIVE=1: on this host
	@$(PY) -m scripts.kernel_lane $(if $(NATIVE),--native) -- $(ARGS)

check: lint types layers ## formatting, lint, types and layers

format: setup ## rewrite the sources in the project's format
	@$(PY) -m ruff format .
	@$(PY) -m ruff check --fix .

lint: setup
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .

types: setup
	@$(PY) -m mypy --strict $(TYPED)

layers: setup
	@.venv/bin/lint-imports --no-logo

bench: setup ## measure, as benchmarks/ describes
	@$(PY) -m benchmarks $(ARGS)

clean: ## remove all that these commands made
	rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist
	rm -f pactown_runner/launcher/launch
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
