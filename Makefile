# Each target does its own set-up: a virtual environment in .venv, made once.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test test-slow test-matrix lint typecheck docs dist clean

# The demo needs the command line's extra, everything else the developers'.
$(VENV)/.app: pyproject.toml requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[app]'
	touch $@

$(VENV)/.dev: pyproject.toml requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[dev]'
	touch $@ $(VENV)/.app

demo: $(VENV)/.app
	$(BIN)/msdspn demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(VENV)/.dev
	$(BIN)/pyright

# Every supported version of Python and JAX that can be installed here; says what it ran.
test-matrix:
	$(PYTHON) tests/matrix.py

# The site, into site/; a warning or a broken link is an error.
docs: $(VENV)/.dev
	$(BIN)/mkdocs build --strict
	$(BIN)/python docs/_links.py site

# Source archive and wheel, into dist/: built, checked, and the wheel tried in a fresh environment.
dist: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[release]'
	rm -rf dist build/fresh
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv build/fresh
	build/fresh/bin/pip install --quiet --disable-pip-version-check --constraint requirements.lock "$$(ls dist/*.whl)[app]"
	cd build && fresh/bin/msdspn --version && fresh/bin/msdspn render --seed 0 --num 1 --size 64 --out fresh/scenes
	cd build && fresh/bin/msdspn predict fresh/scenes/images/*/*.png --out fresh/found --no-pictures

clean:
	rm -rf $(VENV) .matrix build dist site
