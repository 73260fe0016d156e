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

# Builds for the GPU of this machine, runs the tests on it and then the benchmarks; without a GPU it says so and fails.
gpu:
	python -c 'import torch; assert torch.cuda.is_available(), "make gpu: torch sees no GPU here"'
	SWITCH_MOE_CUDA=1 pip install -e . --no-build-isolation --no-deps
	pytest
	pytest benchmarks
