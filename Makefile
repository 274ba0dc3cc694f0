# make test    sets everything up and runs the tests
# make demo    sets everything up, trains a teacher and distils it into a small student
# make bench   benchmarks against every peer; writes cpu, population.{json,md,png}, end_to_end, evolution and
#              compression.{json,md} in bench/results
# All work happens in .venv and .build; `make clean` removes both.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUILD := .build
# What an installation depends on: a change of any of these installs the package anew.
SOURCES := $(shell find csrc fastkd -type f -not -name '*.so' -not -path '*/__pycache__/*') \
           CMakeLists.txt pyproject.toml setup.py constraints.txt
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
export FASTKD_SIMT_DIR := $(abspath $(BUILD)/simt)
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
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=24"

# torch first and by itself, so that the constraint decides which one.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(PIP) torch numpy
	@touch $@

$(VENV)/.fastkd: $(SOURCES) $(VENV)/.torch
	$(BIN)/python -m pip uninstall --quiet --yes fastkd
	$(PIP) "fastkd[distill,compress,test,bench] @ file://$(CURDIR)"
	@touch $@

setup: $(VENV)/.fastkd

# The CUDA sources, built for the host.
$(BUILD)/simt/.built: $(SOURCES) $(wildcard tests/simt/*) $(VENV)/.fastkd
	$(BIN)/python scripts/build_simt.py $(BUILD)/simt
	@touch $@

simt: $(BUILD)/simt/.built

$(BUILD)/sanitize/.built: $(SOURCES) $(wildcard tests/simt/*) $(VENV)/.fastkd
	$(BIN)/python scripts/build_simt.py $(BUILD)/sanitize --sanitize address,undefined
	@touch $@

test: setup simt sanitize
	$(BIN)/pytest -m "not large" $(PARALLEL)

test-large: setup simt
	$(BIN)/pytest -m large

# Both back ends under AddressSanitizer and UBSan, on a part of the table. Leaks are not looked for:
# Python and torch keep what they allocate. torch ships no instrumented C++ runtime, hence the
# exceptions below.
sanitize: setup $(BUILD)/sanitize/.built
	FASTKD_SANITIZED=1 FASTKD_SIMT_DIR=$(abspath $(BUILD)/sanitize) \
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	$(BIN)/pytest tests/test_ops.py tests/test_network.py -m "not large" \
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

lint: setup
	$(PIP) ruff mypy
	$(BIN)/ruff check .
	$(BIN)/mypy fastkd

clean:
	rm -rf $(VENV) $(BUILD) build *.egg-info
