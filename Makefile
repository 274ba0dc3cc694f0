# make test    sets everything up, checks style and types, and runs the tests
# make demo    sets everything up, trains a teacher and distils it into a small student, compresses a network
# make lint    ruff (rules and format), mypy --strict, clang-format
# make bench   benchmarks against every peer; writes cpu, population.{json,md,png}, end_to_end, evolution and
#              compression.{json,md} in bench/results
# All work happens in .venv and .build; `make clean` removes both.

# Packages are installed while others are compiled, types are checked while tests are built.
MAKEFLAGS += --jobs=2
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUILD := .build
EXTRAS := distill compress test bench lint
# What an installation depends on: a change of any of these builds the package anew.
SOURCES := $(shell find csrc fastkd -type f -not -name '*.so' -not -path '*/__pycache__/*') \
           CMakeLists.txt pyproject.toml setup.py
# Make's job server cannot be passed on through Python, and ninja would look for it.
RUN := env -u MAKEFLAGS $(BIN)/python
PIP := $(RUN) -m pip --quiet --disable-pip-version-check
CXX_SOURCES := $(shell find csrc tests/simt bench -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')
export FASTKD_SIMT_DIR := $(CURDIR)/$(BUILD)/simt
# For this machine's GPUs alone; without any, one architecture in whole, and the branches for older ones as PTX: of all
# architectures, which an installation is built for, nvcc takes minutes.
ifndef CUDAARCHS
CUDAARCHS := $(or $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null \
                    | sed -n 's/^\([0-9]*\)[.]\([0-9]\)$$/\1\2/p' | sort -u | paste -s -d ';'),75-virtual;90-real)
endif
export CUDAARCHS
# A process per core; a file's tests stay in one, which makes its fixtures once. In the order of names, since files of few
# tests are among the slowest, and would come last.
PARALLEL := -n auto --dist loadfile --no-loadscope-reorder

.PHONY: setup test test-large sanitize demo bench lint simt clean
.DELETE_ON_ERROR:

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade "pip>=24"

# Few and small: what the builds below need.
$(VENV)/.tools: constraints.txt pyproject.toml scripts/requirements.py | $(BIN)/python
	$(BIN)/python scripts/requirements.py build > $(VENV)/build.txt
	$(PIP) install -c constraints.txt -r $(VENV)/build.txt cmake
	@touch $@

# torch first and by itself, so that the constraint decides which one.
$(VENV)/.packages: $(VENV)/.tools
	$(PIP) install -c constraints.txt torch numpy
	$(BIN)/python scripts/requirements.py $(EXTRAS) > $(VENV)/requirements.txt
	$(PIP) install -c constraints.txt -r $(VENV)/requirements.txt
	@touch $@

# The wheel knows no torch, so that it is built while torch is installed.
$(BUILD)/wheel/.built: $(SOURCES) $(VENV)/.tools
	rm -rf $(BUILD)/wheel
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) wheel --no-deps --no-build-isolation --wheel-dir $(BUILD)/wheel .
	@touch $@

$(VENV)/.fastkd: $(BUILD)/wheel/.built $(VENV)/.packages
	$(PIP) install --no-deps --force-reinstall $(BUILD)/wheel/fastkd-*.whl
	@touch $@

setup: $(VENV)/.fastkd

# The CUDA sources, built for the host.
$(BUILD)/simt/.built: $(SOURCES) $(wildcard tests/simt/*) scripts/build_simt.py $(VENV)/.tools
	$(RUN) scripts/build_simt.py $(BUILD)/simt
	@touch $@

simt: $(BUILD)/simt/.built

$(BUILD)/sanitize/.built: $(SOURCES) $(wildcard tests/simt/*) scripts/build_simt.py $(VENV)/.tools
	$(RUN) scripts/build_simt.py $(BUILD)/sanitize --sanitize address,undefined
	@touch $@

lint: $(VENV)/.packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	$(BIN)/mypy fastkd

# The package's examples are those of its docstrings.
test: setup simt sanitize lint
	$(BIN)/pytest -m "not large" $(PARALLEL) --durations=30 --doctest-modules tests $(VENV)/lib/python*/site-packages/fastkd

test-large: setup simt
	$(BIN)/pytest -m large tests

# Both back ends under AddressSanitizer and UBSan, on a part of the table. Leaks are not looked for:
# Python and torch keep what they allocate. torch ships no instrumented C++ runtime, hence the
# exceptions below.
sanitize: setup $(BUILD)/sanitize/.built
	FASTKD_SANITIZED=1 FASTKD_SIMT_DIR="$(CURDIR)/$(BUILD)/sanitize" \
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	$(BIN)/pytest tests/core/test_ops.py tests/core/test_network.py -m "not large" \
	    -k "(layout or index_dtypes or reduction or each_alone or moments or tensor_cores or own) and not cuda" $(PARALLEL)

demo: setup
	$(BIN)/fastkd demo

bench: setup
	$(BIN)/pytest bench/test_lsp.py --benchmark-json=bench/results/cpu.json
	$(BIN)/python -m bench.report bench/results/cpu.json
	$(BIN)/pytest bench/test_population.py --benchmark-json=bench/results/population.json
	$(BIN)/python -m bench.report bench/results/population.json
	$(BIN)/python -m bench.end_to_end
	$(BIN)/python -m bench.evolution
	$(BIN)/python -m bench.compression

clean:
	rm -rf $(VENV) $(BUILD) build *.egg-info
