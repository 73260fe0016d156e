.PHONY: install test tritons fuzz kill-test lint format bench bench-report gpu

CPP = $(shell find csrc benchmarks tests -name '*.h' -o -name '*.cpp' -o -name '*.cu')

install:
	pip install -e ".[dev]"

test:
	pytest

# The kernels under each Triton that a supported torch brings; this fetches them into build/tritons.
tritons:
	python tests/tritons.py $(ARGS)

# 10,000 random calls of every operation against float64, then 5,000 during which memory must not grow.
fuzz:
	python tests/fuzz_ops.py --calls 10000 --memory 5000 $(ARGS)

# 100 kills of a training run at random moments, and 100 of one of two processes; every run must end the same
# to the bit.
kill-test:
	python tests/kill_run.py --kills 100 $(ARGS)
	python tests/kill_run.py --kills 100 --processes 2 $(ARGS)

lint:
	ruff check .
	ruff format --check .
	mypy
	clang-format --dry-run --Werror $(CPP)

format:
	ruff check --fix .
	ruff format .
	clang-format -i $(CPP)

# Measures on this machine, into benchmarks/results, and writes the page and the README's table.
# ARGS="--peer-path official=DIR" adds the official code.
bench:
	pytest benchmarks --benchmark-json=benchmarks/results/$$(python -m benchmarks.environment).json $(ARGS)
	python -m benchmarks.report

# The page, its pictures and the README's table, from the files in benchmarks/results.
bench-report:
	python -m benchmarks.report

# In nine minutes: builds for the GPU of this machine, runs the tests on it under two assemblers, calibrates,
# measures every kernel and writes the same page; without a GPU it says so and fails. ARGS=--sanitize adds
# compute-sanitizer.
gpu:
	python -m benchmarks.gpu $(ARGS)
