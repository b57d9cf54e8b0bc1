# Needs Debian (or another Linux), make and Python 3.11 to 3.13. No compiler: every package is installed from a wheel.
# `make` lists the targets. Another Python: make PYTHON=python3.12 setup

PYTHON ?= python3
ARGS ?=
# Test processes side by side, each with whole files; most of a test's time is spent waiting for Ray to start.
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP_VERSION := 26.3
# The lock keeps these where they are; `make lock` moves everything else to the newest that resolves.
LOCK_PINS := torch==2.13.0
CHECKED := geneformer_ray ray_jobs serve
# What can be submitted to a cluster: every module of ray_jobs/ that can be run, but for what submits.
JOBS := $(filter-out submit,$(patsubst ray_jobs/%.py,%,$(shell grep -l '^if __name__ == "__main__":' ray_jobs/*.py)))
SUBMIT ?=
# Byte-code is worth its time only for what can be imported here: no test suites, RLlib or other model families.
NOT_COMPILED := /tests?/|/ray/rllib/|/transformers/models/(?!auto/|bert/)[^/]+/

# Without compiled byte-code every Ray worker compiles its imports again: starts take three times as long.
unexport PYTHONDONTWRITEBYTECODE
# A pip or Python of another project must not leak into this one.
unexport PYTHONHOME
unexport PIP_REQUIRE_VIRTUALENV
unexport PIP_TARGET
unexport PIP_USER
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

.PHONY: help setup quickstart doctor test unit integration slow chaos lint format lock clean $(JOBS:%=submit-%)
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile
	@echo 'on the cluster of RAY_API_SERVER_ADDRESS (flags of the job: ARGS="...", of ray_jobs.submit: SUBMIT="..."):'
	@printf 'make submit-%s\n' $(JOBS)

setup: $(VENV)/.installed ## create or update .venv from requirements.lock

quickstart: setup ## run the main job on the embedded cells, into runs/quickstart (more flags: ARGS="...")
	@$(BIN)/python -m ray_jobs.quickstart --output runs/quickstart $(ARGS)

doctor: setup ## check this set-up, and its cluster where RAY_ADDRESS names one (more flags: ARGS="...")
	@$(BIN)/python -m ray_jobs.doctor $(ARGS)

test: setup ## unit tests, then integration tests
	@$(MAKE) --no-print-directory unit
	@$(MAKE) --no-print-directory integration

unit: setup ## tests without Ray: seconds (more flags: ARGS="-k name")
	@$(BIN)/python -m pytest tests/unit -q -n $(WORKERS) --dist loadfile $(ARGS)

integration: setup ## tests with real Ray, MLflow and Serve: minutes
	@$(BIN)/python -m pytest tests/integration -q -m 'not slow' -n $(WORKERS) --dist loadfile $(ARGS)

slow: setup ## whole studies, and jobs that are killed and go on: minutes, before a release
	@$(BIN)/python -m pytest tests/integration -q -m slow $(ARGS)

chaos: setup ## kill workers, actors, nodes, drivers, store and disk: half an hour (table: CHAOS_REPORT=FILE)
	@$(BIN)/python -m pytest tests/chaos -q --session-timeout=2700 $(ARGS)

$(JOBS:%=submit-%): submit-%: setup
	@$(BIN)/python -m ray_jobs.submit $(SUBMIT) $* $(ARGS)

lint: setup ## ruff (rules and format) and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy $(CHECKED)

format: setup ## let ruff rewrite the files
	@$(BIN)/ruff check --fix --quiet . || true
	@$(BIN)/ruff format .

# The report is what a fresh installation would get. Local version labels (+cpu) are dropped: any build will do.
lock: setup ## pin the newest versions that resolve into requirements.lock
	@$(BIN)/python -m pip install -qq --dry-run --ignore-installed --only-binary=:all: \
		--report $(VENV)/lock.json $(LOCK_PINS) '.[demo,dev]'
	@$(BIN)/python -c "$$WRITE_LOCK" $(VENV)/lock.json requirements.lock
	@rm -f $(VENV)/lock.json

clean: ## remove .venv, caches and build leftovers; runs/ stays
	@rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
	@find geneformer_ray ray_jobs serve tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# Updates an existing .venv in place; `make clean setup` starts afresh. The stamp comes last, so that an
# interrupted installation is taken up again. pip first: the pinned one installs in half the CPU time of Debian's.
$(VENV)/.installed: requirements.lock pyproject.toml
	@command -v '$(PYTHON)' >/dev/null || { \
		echo "setup: no '$(PYTHON)' found: install Python 3.11, 3.12 or 3.13, or name one: make PYTHON=/path/to/python setup" >&2; exit 2; }
	@'$(PYTHON)' -c "$$CHECK_VERSION"
	@set -e; start=$$(date +%s); \
	if ! $(BIN)/python -c "$$CHECK_VERSION" >/dev/null 2>&1 || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		if '$(PYTHON)' -c 'import ensurepip' 2>/dev/null; then \
			'$(PYTHON)' -m venv --clear $(VENV); \
		elif '$(PYTHON)' -m pip --version >/dev/null 2>&1; then \
			'$(PYTHON)' -m venv --clear --without-pip $(VENV); \
			'$(PYTHON)' -m pip --python $(BIN)/python install -qq pip==$(PIP_VERSION); \
		else \
			'$(PYTHON)' -c "$$NO_PIP"; \
		fi; \
	fi; \
	rm -f $@; \
	echo "setup: installing $$(grep -c == requirements.lock) pinned packages into $(VENV)"; \
	$(BIN)/python -m pip install -qq pip==$(PIP_VERSION); \
	$(BIN)/python -m pip install -qq --no-compile --only-binary=:all: -r requirements.lock; \
	$(BIN)/python -m pip install -qq --no-deps --no-build-isolation -e .; \
	echo "setup: compiling byte-code ($$(($$(date +%s) - start)) s so far)"; \
	$(BIN)/python -m compileall -qq -j 0 -x '$(NOT_COMPILED)' $(VENV)/lib >/dev/null || true; \
	$(BIN)/python -m pip check; \
	touch $@; \
	echo "setup: done in $$(($$(date +%s) - start)) s"

define CHECK_VERSION
import sys
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit("setup: Python 3.11, 3.12 or 3.13 is needed, $(PYTHON) is %s; name another: make PYTHON=python3.11 setup" % sys.version.split()[0])
endef
export CHECK_VERSION

define NO_PIP
import sys
sys.exit("setup: this Python cannot make a virtual environment; as root run: apt-get install -y python%d.%d-venv" % sys.version_info[:2])
endef
export NO_PIP

define WRITE_LOCK
import json, re, sys
report, lock = sys.argv[1:]
header = [line for line in open(lock).read().splitlines() if line.startswith("#")]
found = {p["metadata"]["name"]: p["metadata"]["version"].split("+")[0] for p in json.load(open(report))["install"]}
left_out = re.compile(r"(pip|geneformer-ray|triton|nvidia-.*|cuda-.*)$$", re.IGNORECASE)
lines = [f"{n}=={found[n]}" for n in sorted(found, key=str.lower) if not left_out.match(n)]
open(lock, "w").write("\n".join(header + lines) + "\n")
print(f"lock: {len(lines)} packages")
endef
export WRITE_LOCK
