# Everything runs in an environment of its own; VENV puts it elsewhere.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/

.PHONY: demo test test-slow test-all lint bench bench-compiled clean

EXAMPLE ?= digits
demo: $(VENV)/examples
	$(RUN)python -m examples.$(EXAMPLE)

test: $(VENV)/test
	$(RUN)python -m pytest -n 2 -m "not slow"

test-slow: $(VENV)/test
	$(RUN)python -m pytest -n 2 -m slow

# On the newest releases and on the oldest; NOX="-s floor" chooses, see noxfile.py.
test-all: $(VENV)/pip
	$(RUN)python -m pip install --quiet 'nox[uv]'
	$(RUN)nox $(NOX)

lint: $(VENV)/lint
	$(RUN)ruff check
	$(RUN)ruff format --check
	$(RUN)pyright --pythonpath $(RUN)python

bench: $(VENV)/examples
	$(RUN)python -m benchmarks.step
	$(RUN)python -m benchmarks.collectives
	$(RUN)python -m benchmarks.backward
	$(RUN)python -m benchmarks.program

# What the steps compile to for a GPU and TPUs, none of which is needed.
bench-compiled: $(VENV)-compilers/compilers
	$(VENV)-compilers/bin/python -m benchmarks.compiled
	$(VENV)-compilers/bin/python -m benchmarks.scale

clean:
	rm -rf .venv .venv-compilers .nox runs build dist .pytest_cache .hypothesis .ruff_cache

# A file named after each set of packages stands for its installation.
$(VENV)/pip:
	$(PYTHON) -m venv $(VENV)
	$(RUN)python -m pip install --quiet --upgrade 'pip>=25.1'
	touch $@

$(VENV)/examples: $(VENV)/pip pyproject.toml
	$(RUN)python -m pip install --quiet --editable '.[examples]'
	touch $@

$(VENV)/test: $(VENV)/examples
	$(RUN)python -m pip install --quiet --editable '.[equinox,haiku,data]' --group test --group experiments
	touch $@

$(VENV)/lint: $(VENV)/test
	$(RUN)python -m pip install --quiet --group lint
	touch $@

# An environment beside the others, as jax looks for devices where it finds libtpu. The plugin of
# CUDA needs no package of NVIDIA to compile.
$(VENV)-compilers/compilers: pyproject.toml
	$(PYTHON) -m venv $(VENV)-compilers
	$(VENV)-compilers/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(VENV)-compilers/bin/python -m pip install --quiet --editable '.[examples]' --group compilers
	$(VENV)-compilers/bin/python -m pip install --quiet --no-deps $$($(VENV)-compilers/bin/python -c \
	  'import jax; [print(f"jax-cuda13-{name}=={jax.__version__}") for name in ("plugin", "pjrt")]')
	touch $@
