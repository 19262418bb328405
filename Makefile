# `make run` and `make test` are all a new machine needs: Python 3.11 or newer, make, and a package index.
PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
REPOSITORY ?= file://$(CURDIR)

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

.DEFAULT_GOAL := help
.PHONY: help run test check soak bench bench-peers docs format lock train clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

run: $(VENV)/.installed  ## Serve the bundled model on http://127.0.0.1:8000 (HOST= and PORT= change it)
	@$(BIN)/modalkit serve --host $(HOST) --port $(PORT)

test: $(VENV)/.installed-dev  ## Run the tests, on all cores (TESTS= chooses some)
	@$(BIN)/python -m pytest -n auto --dist worksteal $(TESTS)

check: $(VENV)/.installed-dev  ## Lint, check formatting, types, layers and pyproject.toml
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/validate-pyproject pyproject.toml

soak: $(VENV)/.installed-dev  ## Kill the service 20 times, then break it under load, and count what is lost (5 minutes)
	@$(BIN)/python -m tests.faults.soak
	@$(BIN)/python -m tests.faults.saturation --minutes 3

bench: $(VENV)/.installed-dev  ## Measure ratios, and flag those more than 10 % worse than the committed ones (4 minutes)
	@$(BIN)/python -m modalkit.benchmarks.report --rounds 2 --texts 600 --baseline benchmarks/baseline.json

bench-peers: $(VENV)/.installed-dev  ## Measure beside LitServe, mosec, Ray Serve, BentoML, Infinity and FastAPI (15 minutes on 2 cores)
	@$(BIN)/python -m modalkit.benchmarks.peers

docs: $(VENV)/.installed-dev  ## Build the documentation into build/site, with its links checked (REPOSITORY= is where the other files are)
	@rm -rf build/docs build/site
	@mkdir -p build
	@cp -R docs build/docs
	@cp benchmarks/peers/results/*.svg build/docs
	@sed -E 's#\]\(benchmarks/[^)]*/([a-z]+\.svg)#](docs/\1#; s#\]\(([^h)])#](../\1#g; s#\]\(\.\./docs/#](#g' README.md >build/docs/index.md
	@sed -i.bak -E 's|\]\(\.\./([^)#]*)|]($(REPOSITORY)/\1?|g' build/docs/*.md  # by the ?, zensical sees that it is no page
	@rm build/docs/*.bak
	@$(BIN)/zensical build --clean --strict

format: $(VENV)/.installed-dev  ## Put the code into its standard form
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# What torch needs for CUDA alone comes with torch, where the image is for CUDA.
lock: $(VENV)/.installed-dev  ## Write the packages of the container image, with their hashes, into deploy/requirements.txt
	@$(BIN)/uv pip compile pyproject.toml --extra otel --extra sqs --extra taskiq --constraint constraints.txt \
		--no-emit-package torch --generate-hashes --python-version 3.11 --no-annotate --quiet --no-header \
		--output-file deploy/requirements.txt
	@awk '/^[a-z]/ {cuda = /^(cuda-|nvidia-|triton==)/} !cuda' deploy/requirements.txt >deploy/requirements.new
	@mv deploy/requirements.new deploy/requirements.txt

train: $(VENV)/.installed  ## Train the bundled model anew (about 15 minutes on 2 cores)
	@$(BIN)/python -m modalkit.pipelines.training train

clean:  ## Remove the virtual environment and all caches
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

$(BIN)/python:
	@command -v '$(PYTHON)' >/dev/null \
		|| { echo "There is no program '$(PYTHON)'. Install Python 3.11 or newer, or name yours: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "modalkit needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version). Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing modalkit into $(VENV) (a minute or two the first time) ..."
	@$(INSTALL) .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing the test and lint tools into $(VENV) ..."
	@$(INSTALL) '.[dev]'
	@touch $@
