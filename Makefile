# Three commands, all plain wrappers: what a person without make types stands in each recipe.
# constraints.txt decides the versions. Its torch is the default build, which on Linux brings
# gigabytes of CUDA libraries; pip takes the CPU build instead where it is given the index of CPU
# wheels (PIP_EXTRA_INDEX_URL, see the install selector on pytorch.org).

PYTHON ?= python3
BIN := .venv/bin
OUT ?= out
JOBS ?= 2
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/pip install --quiet --constraint constraints.txt
INSTALLED_BY := pyproject.toml setup.py constraints.txt $(wildcard sparse_dit/backends/cpu/csrc/*)

.PHONY: demo serve test clean

demo: .venv/.demo
	$(BIN)/sparse-dit demo --out $(OUT)

serve: .venv/.demo
	$(BIN)/sparse-dit serve tiny-wan --plan tiny-wan

test: .venv/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	OMP_NUM_THREADS=1 $(BIN)/pytest -q --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder --durations=10

.venv/.made:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or later is needed" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv --clear .venv
	@touch $@

.venv/.demo: .venv/.made $(INSTALLED_BY)
	@echo "installing sparse_dit[all] into .venv: torch alone is 200 MB, this takes minutes"
	$(PIP) --editable '.[all]'
	@touch $@

.venv/.test: .venv/.made $(INSTALLED_BY)
	@echo "installing sparse_dit[all,test] into .venv: torch alone is 200 MB, this takes minutes"
	$(PIP) --editable '.[all,test]'
	$(PIP) --no-deps --upgrade --target .venv/quantised torchao gguf
	@touch $@ .venv/.demo

clean:
	rm -rf .venv build dist sparse_dit.egg-info .pytest_cache .ruff_cache
	rm -f sparse_dit/backends/cpu/libsparse_dit_cpu.*
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
