# Every target bootstraps what it needs. ARGS passes options on: make test ARGS='-k plan', make demo ARGS=--no-token-label.
# PY=python uses the environment that is active (conda) and sets nothing up.
PY ?= .venv/bin/python
ARGS ?=

READY := $(if $(filter .venv/bin/python,$(PY)),.venv/.ready)
INTEROP := $(if $(READY),.venv/.interop)

.PHONY: help setup demo test test-all lint bench clean

help:
	@echo 'make setup      build .venv (PYTHON=... chooses the interpreter; Python >= 3.11); no root, no compiler'
	@echo 'make demo       annotate, pack, train, evaluate and draw the bundled photos'
	@echo 'make test       run the quick tests of everything; adds stock FFCV where it can be compiled, else skips its tests'
	@echo 'make test-all   make test, then the slow tests and the many cases that it leaves out; what CI runs'
	@echo 'make lint       check the code with ruff: formatting, imports, likely mistakes'
	@echo 'make bench      run the CPU benchmarks; stock FFCV as for make test'
	@echo 'make clean      remove .venv, caches and build products; runs/ and data stay'

setup: $(READY)

# The stamp is written last, so an interrupted set-up starts over.
.venv/.ready: pyproject.toml constraints.txt .ci/setup
	@bash .ci/setup

# Stock FFCV. Where it cannot be compiled, .ci/setup says why and writes no stamp; make goes on all the same.
.venv/.interop: .venv/.ready
	@bash .ci/setup --interop

demo: $(READY)
	@$(PY) -m tl_fast.demo $(ARGS)

test: $(READY) $(INTEROP)
	$(PY) -m pytest -q $(ARGS)

test-all: test
	$(PY) -m pytest -q -m 'slow or matrix' $(ARGS)

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

bench: $(READY) $(INTEROP)
	@ls benchmarks/*.py >/dev/null 2>&1 || { echo 'make bench: there is no benchmarks/*.py to run' >&2; exit 1; }
	@set -e; for file in $$(grep -l __main__ benchmarks/*.py); do echo "== $$file"; $(PY) "$$file" $(ARGS); done

clean:
	rm -rf .venv build *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
