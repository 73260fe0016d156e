.PHONY: install test lint format bench bench-report gpu

install:
	pip install -e ".[dev]"

test:
	pytest

lint:
	ruff check .
	ruff format --check .
	mypy
	clang-format --dry-run --Werror csrc/*

format:
	ruff check --fix .
	ruff format .
	clang-format -i csrc/*

# Measures on this machine, into benchmarks/results, and writes the tables. ARGS="--peer-path official=DIR" adds
# the official code.
bench:
	pytest benchmarks --results benchmarks/results/$$(python -m benchmarks.environment).json $(ARGS)
	python -m benchmarks.report

# The tables and plots of all committed measurements: benchmarks/README.md and the block in README.md.
bench-report:
	python -m benchmarks.report

# Builds for the GPU of this machine, runs the tests on it and measures every kernel, into benchmarks/results;
# without a GPU it says so and fails. ARGS=--sanitize adds compute-sanitizer.
gpu:
	python -m benchmarks.gpu_report $(ARGS)
	python -m benchmarks.steps --output benchmarks/results
