# make demo and make test do everything on a machine with Python 3.10+, g++ and make.
#
# PYTHON=...      use this interpreter (an environment of yours, with its torch) instead of .venv
# TORCH_SPEC=...  what to install where no torch is found (default torch==2.13.0)
# BASE_PYTHON=... what .venv is made with (default python3)
# JOBS=...        files of tests that run side by side (default 2; 0: in one process, for --pdb)
# ARGS=...        passed on: make test ARGS="-k gru", make demo ARGS="--cell gru"
# STAGE=...       stages of make gpu: make gpu STAGE="build tests" (default: all; docs/gpu.md)

VENV := .venv
BASE_PYTHON := python3
JOBS := 2
PY := $(if $(PYTHON),$(PYTHON),$(VENV)/bin/python)
SETUP := $(PY) tools/dev_setup.py
CLIENTS := $(VENV)/clients
CLANG_FORMAT = $(PY) -c "import clang_format; clang_format.clang_format()"
CPP_FILES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')

.PHONY: help environment demo examples test test-clients bench build gpu lint types docs features dist format clean

help:
	@echo "make demo    train a character language model, rnn_ext beside torch.nn (about 3 minutes)"
	@echo "make examples   run every example for a few seconds and check what comes of it"
	@echo "make test    run the tests            make test ARGS='-k gru'"
	@echo "make test-clients   programs from PyPI give the same numbers with our layers"
	@echo "make bench   speed and memory beside torch.nn     make bench ARGS=--quick"
	@echo "make build   compile what changed, for this checkout"
	@echo "make gpu     on a machine with a GPU: build, check, measure (STAGE=tests for one stage)"
	@echo "make lint    check style and types    make format   fix the style"
	@echo "make types   check the types alone"
	@echo "make docs    the reference and the guides as web pages, in build/docs"
	@echo "make features  docs/features.md anew: each feature, by the test that shows it"
	@echo "make dist    a source distribution and a wheel for this Python and torch, in dist"
	@echo "make clean   remove what was built; the environment .venv stays"
	@echo "Each sets up what it needs in .venv; PYTHON=python uses your own environment."

environment:
ifndef PYTHON
	@$(BASE_PYTHON) tools/dev_setup.py venv $(VENV)
endif

build: environment
	@$(SETUP) build

demo: environment
	@$(SETUP) build demo
	@$(PY) examples/char_lm.py $(ARGS)

examples: environment
	@$(SETUP) build test
	@$(SETUP) examples
	@$(PY) -m pytest tests/test_examples.py $(ARGS)

test: environment
	@$(SETUP) build test
	@$(SETUP) examples
	@$(PY) -m pytest -n $(JOBS) --dist loadfile $(ARGS)

# Programs from PyPI, in an environment of their own that sees this one's packages.
test-clients: environment
	@$(SETUP) build test
	@$(SETUP) clients $(CLIENTS)
	@PYTHONPATH=$(CURDIR) $(CLIENTS)/bin/python -m pytest clients $(ARGS)

bench: environment
	@$(SETUP) build bench
	@$(PY) -m benchmarks $(ARGS)

# Sets up nothing and needs no network: for an environment that has a CUDA torch, nvcc and pytest.
gpu:
	@command -v $(PY) >/dev/null || { echo "make gpu: there is no $(PY); name a Python that has" \
	  "a CUDA torch: make gpu PYTHON=python3"; exit 1; }
	@$(PY) tools/gpu.py $(STAGE) $(ARGS)

lint: environment types
	@$(SETUP) packages lint
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	@echo "clang-format csrc"
	@$(CLANG_FORMAT) --dry-run -Werror $(CPP_FILES)

# rnn_ext need not be compiled for this; torch has to be there.
types: environment
	@$(SETUP) packages torch types
	$(PY) tools/check_types.py

# A warning is an error. Needs no network once the packages are there.
docs: environment
	@$(SETUP) build docs
	$(PY) -m sphinx -W --keep-going -q -E -b html docs build/docs
	@echo "build/docs/index.html"

features: environment
	@$(SETUP) build test
	$(PY) tools/feature_table.py $(ARGS)

dist: environment
	@$(SETUP) packages torch build
	rm -rf dist
	$(PY) -c "import build_backend; build_backend.build_sdist('dist')"
	$(PY) -m pip wheel --no-build-isolation --no-deps -w dist dist/rnn_ext-*.tar.gz
	@ls -l dist

format: environment
	@$(SETUP) packages lint
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	@$(CLANG_FORMAT) -i $(CPP_FILES)

clean:
	rm -rf build dist *.egg-info rnn_ext/_C.*.so
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
