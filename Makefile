# Commands for people and for .ci/run. Each makes the virtual environment it needs under
# .venv the first time, and again when the requirements change.
#
#   make demo                       train a small model, show what its experts do
#   make demo BACKEND=torch         on torch or tensorflow; jax is the default
#   make demo TEXT=path/to/my.txt   on your own text
#   make test                       tests and guides on all three backends
#   make test BACKEND=torch         on one of them
#   make lint                       check format and style
#   make format                     format, mend what can be mended, check the rest
#   make clean                      remove environments, builds and caches
#
# Further variables: PYTHON (the interpreter to start from), PYTEST_ARGS, and
# TORCH_INDEX: on Linux, PyPI's torch brings gigabytes of CUDA. To have the CPU build:
#   make test TORCH_INDEX=https://download.pytorch.org/whl/cpu

BACKENDS := jax torch tensorflow
BACKEND ?=
PYTHON ?= python3
PYTEST_ARGS ?=
TEXT ?=
TORCH_INDEX ?=

ifneq ($(filter-out $(BACKENDS),$(BACKEND))$(word 2,$(BACKEND)),)
$(error BACKEND must be one of: $(BACKENDS). Received: BACKEND=$(BACKEND))
endif

DEMO := demo-$(or $(BACKEND),jax)
TESTS := $(addprefix test-,$(or $(BACKEND),$(BACKENDS)))
DEMO_STAMPS := $(BACKENDS:%=.venv/demo-%/.installed)

GUIDES := $(sort $(wildcard guides/*.py))

# TensorFlow and XLA log their start-up otherwise.
export TF_CPP_MIN_LOG_LEVEL ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK := 1

PIP_INSTALL = -m pip install --constraint requirements/constraints.txt \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

# $(call create_venv,folder)
define create_venv
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo "keras_moe needs Python 3.11 or newer as '$(PYTHON)', and found:" \
		"$$($(PYTHON) --version 2>&1)." \
		"Name another one: make PYTHON=python3.12 ..." >&2; \
	exit 1; }
$(PYTHON) -m venv $(1)
endef

.PHONY: help demo test $(BACKENDS:%=test-%) lint format clean
.NOTPARALLEL:  # one process a backend, one after the other

help:
	@sed -n '/^#   make/s/^#   //p' Makefile

demo: .venv/$(DEMO)/.installed
	KERAS_BACKEND=$(DEMO:demo-%=%) .venv/$(DEMO)/bin/python guides/demo.py \
		$(if $(TEXT),--text '$(TEXT)')

test: $(TESTS)

# On the CPU, two processes of a thread each, whatever the machine has. XLA spends most
# of the time compiling programs that run once, so it is told to optimise nothing and to
# fuse in its older, quicker way, and JAX to keep every program on disk: another model of
# the same shapes, the other process and the guides take it from there.
$(BACKENDS:%=test-%): export CUDA_VISIBLE_DEVICES := -1
$(BACKENDS:%=test-%): export JAX_COMPILATION_CACHE_DIR := $(CURDIR)/.venv/test/jax
$(BACKENDS:%=test-%): export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS := 0
$(BACKENDS:%=test-%): export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES := -1
$(BACKENDS:%=test-%): export JAX_PLATFORMS := cpu
$(BACKENDS:%=test-%): export KERAS_TORCH_DEVICE := cpu
$(BACKENDS:%=test-%): export MPLBACKEND := agg
$(BACKENDS:%=test-%): export OMP_NUM_THREADS := 1
$(BACKENDS:%=test-%): export PJRT_NPROC := 1
$(BACKENDS:%=test-%): export TF_NUM_INTRAOP_THREADS := 1
$(BACKENDS:%=test-%): export TF_NUM_INTEROP_THREADS := 1
$(BACKENDS:%=test-%): export XLA_FLAGS := --xla_backend_optimization_level=0 \
	--xla_cpu_use_fusion_emitters=false --xla_llvm_disable_expensive_passes=true
$(BACKENDS:%=test-%): test-%: .venv/test/.installed
	KERAS_BACKEND=$* .venv/test/bin/python -m pytest tests -n 2 --dist worksteal \
		$(PYTEST_ARGS)
	@set -e; for guide in $(GUIDES); do \
		echo "KERAS_BACKEND=$* $$guide --fast"; \
		KERAS_BACKEND=$* .venv/test/bin/python $$guide --fast; \
	done

lint: .venv/lint/.installed
	.venv/lint/bin/ruff format --check .
	.venv/lint/bin/ruff check .

format: .venv/lint/.installed
	.venv/lint/bin/ruff check --fix --exit-zero --quiet .
	.venv/lint/bin/ruff format .
	.venv/lint/bin/ruff check .

clean:
	rm -rf .venv build dist *.egg-info .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment holds what its command needs and no more: a demo on JAX does not
# install torch, and linting installs ruff alone.
$(DEMO_STAMPS): .venv/demo-%/.installed: pyproject.toml requirements/constraints.txt
	$(call create_venv,$(@D))
	$(@D)/bin/python $(PIP_INSTALL) --editable '.[$*,plot]'
	@touch $@

.venv/test/.installed: pyproject.toml requirements/constraints.txt
	$(call create_venv,$(@D))
	$(@D)/bin/python $(PIP_INSTALL) --editable '.[jax,torch,tensorflow,test]'
	@touch $@

.venv/lint/.installed: requirements/constraints.txt
	$(call create_venv,$(@D))
	$(@D)/bin/python $(PIP_INSTALL) ruff
	@touch $@
