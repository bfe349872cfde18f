# make demo and make test do everything on a machine with Python 3.10+, g++ and make.
#
# PYTHON=...      use this interpreter (an environment of yours, with its torch) instead of .venv
# TORCH_SPEC=...  what to install where no torch is found (default torch==2.13.0)
# BASE_PYTHON=... what .venv is made with (default python3)
# ARGS=...        passed on: make test ARGS="-k gru", make demo ARGS="--cell gru"
# STAGE=...       stages of make gpu: make gpu STAGE="build tests" (default: all; docs/gpu.md)

VENV := .venv
BASE_PYTHON := python3
PY := $(if $(PYTHON),$(PYTHON),$(VENV)/bin/python)
SETUP := $(PY) tools/dev_setup.py
CLANG_FORMAT = $(PY) -c "import clang_format; clang_format.clang_format()"
CPP_FILES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')

.PHONY: help environment demo test bench build gpu lint format clean

help:
	@echo "make demo    train a character language model, rnn_ext beside torch.nn (under 3 minutes)"
	@echo "make test    run the tests            make test ARGS='-k gru'"
	@echo "make bench   speed and memory beside torch.nn     make bench ARGS=--quick"
	@echo "make build   compile what changed, for this checkout"
	@echo "make gpu     on a machine with a GPU: build, check, measure (STAGE=tests for one stage)"
	@echo "make lint    check style              make format   fix it"
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

test: environment
	@$(SETUP) build test
	@$(PY) -m pytest $(ARGS)

bench: environment
	@$(SETUP) build bench
	@$(PY) -m benchmarks $(ARGS)

# Sets up nothing and needs no network: for an environment that has a CUDA torch, nvcc and pytest.
gpu:
	@command -v $(PY) >/dev/null || { echo "make gpu: there is no $(PY); name a Python that has" \
	  "a CUDA torch: make gpu PYTHON=python3"; exit 1; }
	@$(PY) tools/gpu.py $(STAGE) $(ARGS)

lint: environment
	@$(SETUP) packages lint
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	@echo "clang-format csrc"
	@$(CLANG_FORMAT) --dry-run -Werror $(CPP_FILES)

format: environment
	@$(SETUP) packages lint
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	@$(CLANG_FORMAT) -i $(CPP_FILES)

clean:
	rm -rf build dist *.egg-info rnn_ext/_C.*.so
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
