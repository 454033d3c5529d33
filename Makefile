# Each target sets up its own virtual environment from the committed lock; a second call starts at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEERS := .venv-peers
# Extras that `make test` installs besides, such as EXTRAS=torch: tests of what is not there are skipped.
EXTRAS ?=
# Real images for the tests that need them, where they lie beside the checkout.
HYPERAX_DATA ?= $(wildcard $(CURDIR)/../shared/data)
ifneq ($(HYPERAX_DATA),)
export HYPERAX_DATA
endif

.PHONY: demo test lint bench bench-peers clean

demo: $(VENV)/run
	$(BIN)/hyperax run glyphs-5way-1shot

test: $(VENV)/test $(EXTRAS:%=$(VENV)/%)
	$(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal

lint: $(VENV)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# On a machine that does nothing else: about 20 minutes on two cores, and bench-peers as long.
bench: $(VENV)/run
	$(BIN)/python -m benchmarks.hyperiteration
	$(BIN)/python -m benchmarks.costs
	$(BIN)/python -m benchmarks.methods
	$(BIN)/python -m benchmarks.estimators
	$(BIN)/python -m benchmarks.figures

# Other libraries have an environment of their own; hyperax runs there from src/.
bench-peers: $(VENV)/run $(PEERS)/installed
	$(BIN)/python -m benchmarks.peers.run
	$(BIN)/python -m benchmarks.few_shot.run
	$(BIN)/python -m benchmarks.data_cleaning
	$(BIN)/python -m benchmarks.torch
	$(BIN)/python -m benchmarks.figures

clean:
	rm -rf $(VENV) $(PEERS)

# One stamp for each extra; pip installs what the extra needs at the versions of the lock.
$(VENV)/run $(VENV)/test $(VENV)/lint $(VENV)/torch: $(VENV)/%: pyproject.toml requirements.lock | $(VENV)/created
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[$*]'
	touch $@

$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "hyperax needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

# betty-ml asks for an older Python than it needs, and has no other wheel: without its pin and without dependencies.
$(PEERS)/installed: benchmarks/peers/requirements.lock benchmarks/peers/requirements-no-deps.lock
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet --disable-pip-version-check --requirement benchmarks/peers/requirements.lock
	$(PEERS)/bin/pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python \
		--requirement benchmarks/peers/requirements-no-deps.lock
	touch $@
