# One set of verbs, the same that CI calls. Everything happens in ./.venv.
PY := .venv/bin/python

.PHONY: setup fmt lint typecheck test test-rust test-python bench bench-smoke bench-rust wheel
setup: .venv/.stamp
.venv/.stamp: pyproject.toml Cargo.toml rust/Cargo.toml $(shell find rust/src -name '*.rs')
	test -x $(PY) || python3 -m venv .venv
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet --editable '.[dev]'
	touch $@

fmt: setup
	cargo fmt --all
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .
