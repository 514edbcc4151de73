# One set of verbs, the same that CI calls. Everything is installed into ./.venv.
PY := .venv/bin/python
SOURCES := pyproject.toml Cargo.toml Cargo.lock $(shell find rust python -type f -not -name '*.so' -not -name '*.pyc')

.PHONY: setup fmt lint typecheck test test-rust test-python bench bench-rust wheel clean

setup: .venv/.stamp
.venv/.stamp: $(SOURCES)
	test -x $(PY) || python3 -m venv .venv
	$(PY) -m pip install --quiet '.[dev]'
	touch $@

fmt: setup
	cargo fmt --all
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

lint: setup
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	PYO3_PYTHON=$(abspath $(PY)) cargo clippy --workspace --all-targets --all-features -- -D warnings
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .

typecheck: setup
	.venv/bin/mypy
	cd tests && ../.venv/bin/stubtest surgeon._core

test: test-rust test-python

test-rust:
	cargo test --workspace --quiet

test-python: setup
	.venv/bin/pytest

# Measured, with results in .benchmarks/; `make test` runs the same files once each as smoke tests.
bench: setup
	SURGEON_BENCH_SCALE=1 .venv/bin/pytest benches --benchmark-enable --benchmark-autosave

bench-rust:
	cargo bench --workspace

wheel: setup
	.venv/bin/maturin build --release --out dist

clean:
	rm -rf dist target .venv
