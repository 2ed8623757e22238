# Two commands for a machine that has only Python 3.11 (3.10 to 3.13) and git:
#   make demo    the main job on the embedded model and text
#   make test    format, lint, types and tests
PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
JOBS ?= auto

.PHONY: demo test check tests tests-oldest format clean

demo: $(VENV)
	$(VENV)/bin/python examples/demo.py

test: check tests tests-oldest

check: $(VENV)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

tests: $(VENV)
	$(VENV)/bin/python -m pytest -q -n $(JOBS)

# The oldest transformers that is supported: the adapter's tests.
tests-oldest: $(OLDEST)
	$(OLDEST)/bin/python -m pytest -q -n $(JOBS) tests/test_mamba.py tests/test_sparsify.py tests/test_families.py

format: $(VENV)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

.PHONY: $(VENV) $(OLDEST)
$(VENV):
	@$(PYTHON) tools/make_venv.py $(VENV) --extras dev

$(OLDEST):
	@$(PYTHON) tools/make_venv.py $(OLDEST) --extras dev --constraints constraints-oldest.txt

clean:
	rm -rf $(VENV) $(OLDEST) out build .pytest_cache .mypy_cache .ruff_cache .hypothesis
