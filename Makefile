# The README's commands. `make quickstart` sets up .venv with what the embedded recipe needs and runs it; `make test` adds
# the development tools and runs the tests.
PYTHON ?= python3
VENV := .venv
# Without a GPU, PyTorch's CPU build is smaller by gigabytes: pass PIP_OPTIONS as the README's "Install" says.
PIP_OPTIONS ?=
DEMO := $(VENV)/.demo
READY := $(VENV)/.ready
INSTALL = $(VENV)/bin/python -m pip install --disable-pip-version-check $(PIP_OPTIONS) -c constraints.txt -e

# `make test THOROUGH=1`, which CI runs, takes the thorough tests as well.
THOROUGH :=
MARKS := $(if $(THOROUGH),-m "not slow and not gpu and not network")

.PHONY: quickstart test test-all slow lint site clean

quickstart: $(DEMO)
	$(VENV)/bin/distilpeft run recipes/quickstart.yaml

test: $(READY)
	$(VENV)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(MARKS)

test-all:
	$(MAKE) test THOROUGH=1
	$(MAKE) slow

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

slow: $(READY)
	$(VENV)/bin/python -m pytest -m slow

site: $(READY)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

clean:
	rm -rf $(VENV)

$(DEMO): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "distilpeft needs Python 3.11 or newer; name one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) ".[quickstart]"
	touch $(DEMO)

$(READY): $(DEMO)
	$(INSTALL) ".[quickstart,dev]"
	touch $(READY)
