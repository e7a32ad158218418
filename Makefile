# make demo | test | bench | lint | sanitize | aarch64 | clean: each sets up .venv by itself, once, and again when its
# inputs change. Another interpreter: make PYTHON=python3.12 test (after make clean). More arguments:
# make test PYTEST_ARGS="-k plan".

PYTHON ?= python3
PYTEST_ARGS ?=
BENCH_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := pyproject.toml $(wildcard setup.py CMakeLists.txt MANIFEST.in) $(shell find csrc -type f)

.PHONY: demo test bench lint format sanitize aarch64 clean
.DELETE_ON_ERROR:

demo: $(STAMPS)/demo
	$(BIN)/python -m recipes.demo --overwrite

test: $(STAMPS)/test
	$(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

bench: $(STAMPS)/bench
	$(BIN)/python -m pytest benchmarks/ --benchmark-only \
	  --benchmark-columns=median,iqr,rounds --benchmark-sort=fullname $(BENCH_ARGS)

lint: $(STAMPS)/lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMPS)/lint
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

sanitize aarch64: $(STAMPS)/test
	PATH="$(CURDIR)/$(BIN):$$PATH" bash .ci/$@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f den_kernels/*.so den_kernels/backends/*.so

$(STAMPS)/venv:
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) -m venv failed. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	mkdir -p $(STAMPS)
	touch $@

# The build is isolated: it brings its own cmake, ninja and pybind11, and never torch.
$(STAMPS)/base: requirements/base.txt requirements/versions.txt $(SOURCES) | $(STAMPS)/venv
	$(PIP) install --quiet -r requirements/base.txt
	$(PIP) install --quiet -c requirements/versions.txt --editable .
	touch $@

$(STAMPS)/demo $(STAMPS)/test $(STAMPS)/bench $(STAMPS)/lint: $(STAMPS)/%: requirements/%.txt $(STAMPS)/base
	$(PIP) install --quiet -r $<
	touch $@

$(STAMPS)/test: requirements/demo.txt
$(STAMPS)/bench: requirements/peers.txt
