# Everything runs in an environment of its own; VENV puts it elsewhere.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/

.PHONY: help demo test test-slow test-all lint docs bench bench-compiled dist clean

help:  ## what there is
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /|/' | column -t -s '|'

EXAMPLE ?= digits
demo: $(VENV)/examples  ## trains on digits in a minute; EXAMPLE=name runs another example
	$(RUN)python -m examples.$(EXAMPLE)

test: $(VENV)/test  ## the tests but for those that take long
	$(RUN)python -m pytest -n 2 -m "not slow"

test-slow: $(VENV)/test  ## the tests that take long
	$(RUN)python -m pytest -n 2 -m slow

# On the newest releases and on the oldest; NOX="-s floor" chooses, see noxfile.py.
test-all: $(VENV)/pip  ## all tests, on every Python and on the oldest releases
	$(RUN)python -m pip install --quiet 'nox[uv]'
	$(RUN)nox $(NOX)

lint: $(VENV)/lint  ## ruff and pyright
	$(RUN)ruff check
	$(RUN)ruff format --check
	$(RUN)pyright --pythonpath $(RUN)python

# Sphinx executes the notebooks of the gallery.
docs: $(VENV)/docs  ## the site, in docs/_build/html
	$(RUN)python -m sphinx -b html -W --keep-going -q docs docs/_build/html

bench: $(VENV)/examples  ## what a step costs here
	$(RUN)python -m benchmarks.step
	$(RUN)python -m benchmarks.collectives
	$(RUN)python -m benchmarks.backward
	$(RUN)python -m benchmarks.program

# What the steps compile to for a GPU and TPUs, none of which is needed.
bench-compiled: $(VENV)-compilers/compilers  ## what a step compiles to for a GPU and TPUs
	$(VENV)-compilers/bin/python -m benchmarks.compiled
	$(VENV)-compilers/bin/python -m benchmarks.scale

dist: $(VENV)/pip  ## sdist and wheel, in dist
	$(RUN)python -m pip install --quiet build twine
	rm -rf dist
	$(RUN)python -m build --outdir dist
	$(RUN)python -m twine check --strict dist/*

clean:  ## undoes what the others did
	rm -rf $(VENV) $(VENV)-compilers .nox runs build dist docs/_build
	rm -rf .pytest_cache .hypothesis .ruff_cache *.egg-info
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

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

$(VENV)/docs: $(VENV)/test
	$(RUN)python -m pip install --quiet --group docs
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
