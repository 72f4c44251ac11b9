# make demo: train a small model on the embedded emoji and draw with it. make test: every check.
# Needs python3 >= 3.11 with venv; everything else is installed into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# How long the demo trains; with the installation it ends within ten minutes on two cores.
DEMO_BUDGET ?= 5m
DEMO := demo

.PHONY: setup demo test lint format bench clean

setup: $(INSTALLED)

# torch goes first and alone, so that nothing else decides which build of it is taken.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Limner needs Python 3.11 or later; try: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	@echo "Installing into $(VENV); this takes a minute or two."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/limner train examples/emoji --preset emoji --out $(DEMO)/run --budget $(DEMO_BUDGET) --resume
	for s in 1 2 3; do \
	  $(BIN)/limner sample $(DEMO)/run --num 32 --guidance $$s --seed 0 --out $(DEMO)/guidance-$$s.png --overwrite || exit; \
	done
	@echo
	@echo "Pictures by the model that was just trained, a column for each group, the same noise in each file:"
	@for s in 1 2 3; do echo "  $(CURDIR)/$(DEMO)/guidance-$$s.png"; done
	@echo "The run, with its previews and metrics: $(CURDIR)/$(DEMO)/run"
	@echo "More of them: $(BIN)/limner sample $(DEMO)/run --label 'Food & Drink' --num 16 --out food.png"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --cache-dir .import_linter_cache

# One thread a process: two pools of threads on the same cores wait for each other most of the time.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Alone on the machine, or the figures mean nothing.
bench: setup
	$(BIN)/limner bench

clean:
	rm -rf $(VENV) $(DEMO) .pytest_cache .ruff_cache .hypothesis .import_linter_cache
