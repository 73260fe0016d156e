.PHONY: install test lint format bench gpu

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

bench:
	pytest benchmarks

# Builds for the GPU of this machine, runs the tests on it and measures every kernel, into benchmarks/results;
# without a GPU it says so and fails. ARGS=--sanitize adds compute-sanitizer.
gpu:
	python -m benchmarks.gpu_report $(ARGS)
	python -m benchmarks.train_step --output benchmarks/results
