# `make demo` and `make test` do all the set-up: they need Python >= 3.10, make and a C++ compiler, nothing else.
# torch comes from pip's configured indexes; for the small build without CUDA:
#   make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && command -v "$$p" && break; done)
VENV ?= .venv
PIP_FLAGS ?=
WORKERS ?= 2

BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
ONE_THREAD := OMP_NUM_THREADS=1

.PHONY: demo test lint types wheel-test imports bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/lvmppl run experiments/iris_mixture.yaml

test: $(VENV)/.installed-test
	$(ONE_THREAD) $(BIN)/python -m pytest -q -n $(WORKERS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# On an installed tree: only installation makes one package of the checkout's folders. setuptools would put modules
# that are long deleted back from an old build/, so it is removed first.
types: $(VENV)/.installed-dev
	rm -rf build
	$(PIP) install --quiet --no-deps --target build/types .
	cd build/types && $(BIN)/python -m mypy --config-file $(CURDIR)/pyproject.toml -p lvmppl

wheel-test: $(VENV)/.installed-dev
	rm -rf build dist
	$(BIN)/python -m build --outdir dist . > build.log 2>&1 || { cat build.log; exit 1; }
	rm -rf build build.log
	$(PIP) install --quiet --no-deps --target build/wheel dist/*.whl
	$(ONE_THREAD) $(BIN)/python -I tests/wheel_smoke.py build/wheel

imports: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q tests/test_imports.py

bench: $(VENV)/.installed-bench
	for benchmark in benchmarks/*.py; do echo "== $$benchmark"; $(BIN)/python "$$benchmark" || exit 1; done

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "lvmppl needs Python >= 3.10: give one with PYTHON=/path/to/python3"; exit 1; }
	"$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); echo "this Python cannot make a venv (on Debian: apt install python3-venv)"; exit 1; }
	$(PIP) install --quiet "pip>=22.2"

$(VENV)/.installed: setup.cfg constraints.txt | $(VENV)/bin/python
	$(PIP) install $(PIP_FLAGS) -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-%: $(VENV)/.installed
	$(PIP) install $(PIP_FLAGS) -c constraints.txt -e ".[$*]"
	@touch $@
