# make demo: draw with the models that come with Limner, then train one from nothing. make test: every check.
# Needs python3 >= 3.11 with venv; everything else is installed into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

DEMO := demo
# What the demo draws with, and for how long it trains; with the installation it ends within ten minutes on two cores.
DEMO_MODEL ?= emoji
DEMO_BUDGET ?= 2m
DEMO_CAPTIONS := --text "red heart" --text "green apple" --text "cat face" --text "rocket" \
  --text "grinning face with sunglasses" --text "woman shrugging dark skin tone" --text "blue book" --text "full moon"

.PHONY: setup demo test audit fuzz lint docs pictures tour format bench clean

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
	@mkdir -p $(DEMO)
	$(BIN)/limner models
	$(BIN)/limner sample $(DEMO_MODEL) $(DEMO_CAPTIONS) --num 16 --out $(DEMO)/asked.png --overwrite
	@echo "A grid of what was asked for: $(CURDIR)/$(DEMO)/asked.png"
	$(BIN)/limner sample $(DEMO_MODEL) --text "red heart" --num 1 --out $(DEMO)/whole/ --overwrite
	$(BIN)/limner sample emoji-inpaint --text "green heart" --num 4 --image $(DEMO)/whole/000000.png \
	  --mask examples/mask.png --out $(DEMO)/painted.png --overwrite
	@echo "Its lower half painted anew, four times: $(CURDIR)/$(DEMO)/painted.png"
	for s in 1 3 6; do \
	  $(BIN)/limner sample $(DEMO_MODEL) $(DEMO_CAPTIONS) --num 8 --guidance $$s --out $(DEMO)/guidance-$$s.png --overwrite || exit; \
	done
	@echo "The same noise under guidance 1, 3 and 6: $(CURDIR)/$(DEMO)/guidance-*.png"
	@echo
	@echo "Now a model from nothing: handwritten digits, at most $(DEMO_BUDGET). Its pictures while it learns:"
	@echo "  $(CURDIR)/$(DEMO)/digits/previews/"
	$(BIN)/limner train digits --out $(DEMO)/digits --budget $(DEMO_BUDGET) --resume
	$(BIN)/limner sample $(DEMO)/digits --num 40 --out $(DEMO)/digits.png --overwrite
	$(BIN)/limner evaluate $(DEMO)/digits --num 200
	@echo
	@echo "What it draws now, a column for each digit: $(CURDIR)/$(DEMO)/digits.png"
	@echo "More: $(BIN)/limner sample $(DEMO_MODEL) --text 'a word of yours' --out yours.png"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --cache-dir .import_linter_cache

# One thread a process: two pools of threads on the same cores wait for each other most of the time.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

# Whether an advisory is known of a pinned version; asks PyPI, and fails where it can't answer for one of them.
audit: setup
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/pip install --quiet --disable-pip-version-check pip-audit
	$(VENV)/audit/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r constraints.txt

# Readers fed with bytes that coverage guides, so many seconds each; atheris has wheels for Linux and some Pythons.
FUZZ_S ?= 60
fuzz: setup
	$(BIN)/pip install --quiet --disable-pip-version-check atheris
	for t in headers pickles metadata csv pictures maps tars parquet recipes; do \
	  $(BIN)/python scripts/fuzz.py $$t -max_total_time=$(FUZZ_S) || exit; \
	done

# The documentation, into site/; `make test` builds it too.
docs: setup
	$(BIN)/mkdocs build --strict

# The pictures of docs/methods, drawn again.
pictures: setup
	$(BIN)/python scripts/pictures.py

# The notebook with its outputs, carried out again.
tour: setup
	$(BIN)/python scripts/tour.py examples/tour.ipynb

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Alone on the machine, or the figures mean nothing.
bench: setup
	$(BIN)/limner bench

clean:
	rm -rf $(VENV) $(DEMO) site .pytest_cache .ruff_cache .hypothesis .import_linter_cache
