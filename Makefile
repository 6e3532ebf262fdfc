# `make example` and `make test` need Python >= 3.11 and nothing else: both make their environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2

.PHONY: example test lint docs unit benchmark clean

$(STAMP): pyproject.toml example_project/requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[sim,dev]' -r example_project/requirements.txt
	touch $@

# QNN's CPU backend left the onnxruntime-qnn wheels with release 2.4: it is fetched once into the user's cache.
.PHONY: cpu-backend
cpu-backend: $(STAMP)
	$(BIN)/pytest-qnn fetch cpu-backend --quiet

example: $(STAMP) cpu-backend
	cd example_project && ../$(BIN)/python -m pytest

# The same tests on a device: a stand-in for a Linux board, behind a real ADB server; its HTP is the simulator.
.PHONY: example-adb
example-adb: $(STAMP)
	cd example_project && ../$(BIN)/python -m pytest_qnn.testing.loopback --flavor linux -- ../$(BIN)/python -m pytest

test: lint docs unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

unit: $(STAMP) cpu-backend
	$(BIN)/python -m pytest -n $(WORKERS) tests

benchmark: $(STAMP) cpu-backend
	$(BIN)/python -m benchmarks

# What the gate catches, and how often it cries wolf. The wheel of onnx 1.19.1 is the last that has the backend node tests.
.PHONY: defects
defects: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps -r benchmarks/defects/requirements.txt
	$(BIN)/python -m pip download --quiet --no-deps --dest $(VENV)/wheels onnx==1.19.1
	$(BIN)/python -m benchmarks.defects --node-tests $(VENV)/wheels/onnx-1.19.1-*.whl

clean:
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache
