# Every target sets itself up: the first one run creates .venv and installs the releases named in constraints.txt.
#
#   make demo     the first thing to try
#   make test     the tests alone
#   make check    everything CI runs: format, lint, types, tests, the README's commands
#   make format   write the code as `make check` wants it
#   make clean    remove .venv and everything else made here
#
# PYTHON=python3.12 chooses the interpreter; LOCOCO_TORCH_INDEX=URL chooses where torch comes from.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# Tiny models take one thread each, so that two files of tests go side by side; more would each hold the default model.
PYTEST := $(BIN)/pytest --numprocesses 2 --dist loadfile
PIP := $(BIN)/pip --disable-pip-version-check --quiet --quiet # twice: errors alone
TORCH := $(shell grep '^torch==' constraints.txt)
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: demo test check format clean
.DEFAULT_GOAL := check

demo: $(STAMP)
	$(BIN)/lococo demo

test: $(STAMP)
	$(PYTEST)

# One recipe, so that the cheap checks come first whatever `-j` says. mypy, which takes a minute where it has no cache and
# one core of the machine, goes beside the tests.
check: $(STAMP)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy & types=$$!; $(PYTEST); tests=$$?; wait $$types && exit $$tests

format: $(STAMP)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache build dist
	find src tests -name __pycache__ -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit( \
	  "lococo needs Python 3.11 or newer, and $(PYTHON) is %d.%d; try: make PYTHON=python3.11" % sys.version_info[:2])'
	@test -x $(BIN)/pip || { echo "Creating .venv"; $(PYTHON) -m venv .venv; }
	@$(install_torch)
	@echo "Installing lococo and what it needs (a minute or two)"
	@$(PIP) install --constraint constraints.txt --editable '.[dev]'
	@touch $@

# On Linux the default index holds torch with gigabytes of CUDA. A machine without an NVIDIA GPU is served from torch's
# own index of CPU builds first; where that cannot be reached, the install below takes what the default index has.
define install_torch
if $(BIN)/python -c 'import importlib.metadata as m; assert "torch==" + m.version("torch").split("+")[0] == "$(TORCH)"' \
     2>/dev/null; then \
  :; \
elif [ -n "$$LOCOCO_TORCH_INDEX" ]; then \
  echo "Installing $(TORCH) from $$LOCOCO_TORCH_INDEX"; \
  $(PIP) install --no-deps --index-url "$$LOCOCO_TORCH_INDEX" $(TORCH); \
elif [ "$$(uname -s)" = Linux ] && ! nvidia-smi >/dev/null 2>&1; then \
  echo "Installing $(TORCH) for the CPU"; \
  $(PIP) install --no-deps --timeout 5 --retries 0 --index-url $(TORCH_CPU_INDEX) $(TORCH) 2>/dev/null \
    || echo "Not to be had from $(TORCH_CPU_INDEX); taking the build of the default index"; \
fi
endef
