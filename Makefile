# Each target sets up its own virtual environment from the committed lock; a second call starts at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Real images for the tests that need them, where they lie beside the checkout.
HYPERAX_DATA ?= $(wildcard $(CURDIR)/../shared/data)
ifneq ($(HYPERAX_DATA),)
export HYPERAX_DATA
endif

.PHONY: demo test lint bench clean

demo: $(VENV)/run
	$(BIN)/hyperax run glyphs-5way-1shot

test: $(VENV)/test
	$(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal

lint: $(VENV)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(VENV)/run
	$(BIN)/python -m benchmarks.hyperiteration

clean:
	rm -rf $(VENV)

# One stamp for each extra; pip installs what the extra needs at the versions of the lock.
$(VENV)/run $(VENV)/test $(VENV)/lint: $(VENV)/%: pyproject.toml requirements.lock | $(VENV)/created
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[$*]'
	touch $@

$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "hyperax needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@
