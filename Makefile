# Two commands for a fresh machine: `make demo` and `make test`. Both make .venv themselves.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do $$p -c 'import sys; sys.exit(not (3,11) <= sys.version_info < (3,14))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
DEMO ?= demo-output

.PHONY: demo test lint soak simulate clean

demo: .venv/run.stamp
	@echo "Drawing frames, then captioning them; the first start of Ray takes a while."
	$(BIN)/python -m framecap.demo.frames --out $(DEMO)/frames
	$(BIN)/python jobs/caption_frames.py --input-uri $(DEMO)/frames --output-uri $(DEMO)/captions --image-embedding
	$(BIN)/python -m framecap.demo.sample --out $(DEMO)

test: lint
	$(BIN)/python -m pytest

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/mypy

soak: .venv/dev.stamp
	$(BIN)/python -m pytest -m soak -s --timeout 7200

SEEDS ?= 1000
JOBS ?= 2
simulate: .venv/dev.stamp
	PYTHONPATH=tests $(BIN)/python -m simulation --seeds $(SEEDS) --jobs $(JOBS) $(if $(SEED),--seed $(SEED))

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "framecap needs Python 3.11, 3.12 or 3.13; none was found on PATH." >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/run.stamp: .venv/bin/python pyproject.toml constraints.txt
	@echo "Installing into .venv; the first time this takes some minutes."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/dev.stamp: .venv/bin/python pyproject.toml constraints.txt
	@echo "Installing into .venv, with the tools for tests; the first time this takes some minutes."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@ .venv/run.stamp

clean:
	rm -rf .venv $(DEMO) build framecap.egg-info .mypy_cache .ruff_cache .pytest_cache
