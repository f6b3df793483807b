# Every target works in a fresh clone: the first one that needs it makes .venv and installs there.
# PYTHON names the interpreter that .venv is made with and, for `make gpu`, the one whose torch sees a GPU.

PYTHON ?= python3
VENV := .venv
IN_VENV := $(VENV)/bin/python
EXTRAS := test,transformers
SOURCES := $(wildcard csrc/*/*.cpp csrc/*/*.h)
COMMIT ?= unknown

.DEFAULT_GOAL := help
.PHONY: help demo test gpu bench plots audit lint format docs clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 16

demo: $(VENV)/built  ## swap real models, verify and time them on this machine
	$(IN_VENV) -m pyarch demo

test: $(VENV)/built  ## everything that needs no GPU, the Triton kernels by interpreter
	TRITON_INTERPRET=1 $(IN_VENV) -m pytest -n auto --dist worksteal --durations=15 tests/test_*_triton.py
	$(IN_VENV) -m pytest -n auto --dist worksteal --durations=15 --ignore-glob='*_triton.py'

plots: $(VENV)/installed  ## draw docs/plots from committed results
	$(IN_VENV) -m benchmarks plots

audit: $(VENV)/built  ## compile every Triton kernel for every target and check what the compiler made
	$(IN_VENV) -m benchmarks audit
	$(IN_VENV) -m pytest -m audit

bench: $(VENV)/built  ## measure every operator beside the stock one
	$(IN_VENV) -m benchmarks all

lint: $(VENV)/installed  ## formatting and static checks
	$(IN_VENV) -m ruff check .
	$(IN_VENV) -m ruff format --check .
	$(if $(SOURCES),$(VENV)/bin/clang-format --dry-run -Werror $(SOURCES))

format: $(VENV)/installed  ## write what lint wants to read
	$(IN_VENV) -m ruff check --fix .
	$(IN_VENV) -m ruff format .
	$(if $(SOURCES),$(VENV)/bin/clang-format -i $(SOURCES))

docs: $(VENV)/built  ## regenerate the tables of the README from committed results
	$(IN_VENV) -m benchmarks readme
	$(IN_VENV) -m benchmarks readme --check

gpu:  ## acceptance on a GPU: make gpu PYTHON=python3 COMMIT=<sha> [RESULTS=<folder>]
	@$(PYTHON) -c 'import torch; raise SystemExit(None if torch.cuda.is_available() else 1)' 2>/dev/null \
	    || { echo "make gpu: $(PYTHON) has no torch that sees a GPU, name another with PYTHON=<interpreter>"; exit 1; }
	$(PYTHON) -m benchmarks.acceptance --commit $(COMMIT) $(if $(RESULTS),--results "$(RESULTS)")

clean:  ## remove what was built, keep .venv
	rm -rf build dist *.egg-info pyarch/*.so $(VENV)/built

# The packages first, because the libraries are built against the torch among them.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python %s, needs 3.11 or newer" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(IN_VENV) -m pip install -c constraints.txt setuptools wheel
	PYARCH_BUILD_EXT=0 $(IN_VENV) -m pip install -c constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	@touch $@

$(VENV)/built: $(VENV)/installed setup.py $(SOURCES)
	$(IN_VENV) setup.py --quiet build_ext --inplace
	@touch $@
