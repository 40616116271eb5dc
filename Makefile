# Everything from nothing but Python >= 3.11, make and the package registries.
#   make demo   the service on the embedded model: questions, answers, an annotated picture
#   make test   the quick checks: lint, types, tests
SHELL := /bin/sh
PYTHON ?= python3
VENV := .venv
BASE_VENV := .venv-base
UV := .bootstrap/bin/uv
RUN := $(VENV)/bin
SAY := @printf '\033[1m== %s\033[0m\n'

export UV_PYTHON_DOWNLOADS := never
# Set in some containers; without bytecode on disk every process would compile torch anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint types quick slow lock setup clean train evaluate

demo: $(VENV)/.installed
	$(SAY) "demo: starting the service on the embedded model"
	@$(RUN)/florence2 demo

test: lint types quick

lint: $(VENV)/.installed
	$(SAY) "ruff"
	@$(RUN)/ruff check . && $(RUN)/ruff format --check .

types: $(VENV)/.installed
	$(SAY) "mypy"
	@$(RUN)/mypy florence2_kserve

quick: $(VENV)/.installed $(BASE_VENV)/.installed
	$(SAY) "pytest, without the slow ones"
	@$(RUN)/pytest -m "not slow and not e2e" $(ARGS)

slow: $(VENV)/.installed $(BASE_VENV)/.installed
	$(SAY) "pytest, the slow ones"
	@$(RUN)/pytest -m slow $(ARGS)

setup: $(VENV)/.installed $(BASE_VENV)/.installed

$(UV): requirements/uv.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python >= 3.11 is needed; set PYTHON=/path/to/python3.11"; exit 1; }
	$(SAY) "bootstrapping uv into .bootstrap"
	@$(PYTHON) -m venv .bootstrap
	@.bootstrap/bin/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/uv.txt
	@touch $(UV)

# Two environments: all of it, and the base install, which must do without torch.
$(VENV)/.installed: $(UV) requirements/dev.txt pyproject.toml
	$(SAY) "installing everything, torch included, into $(VENV) (a minute on a fast line)"
	@$(UV) venv --quiet --allow-existing --python $(PYTHON) $(VENV)
	@$(UV) pip sync --quiet --python $(RUN)/python --require-hashes requirements/dev.txt
	@$(UV) pip install --quiet --python $(RUN)/python --no-deps --editable .
	@touch $@

$(BASE_VENV)/.installed: $(UV) requirements/base.txt pyproject.toml
	$(SAY) "installing the base, without torch, into $(BASE_VENV)"
	@$(UV) venv --quiet --allow-existing --python $(PYTHON) $(BASE_VENV)
	@$(UV) pip sync --quiet --python $(BASE_VENV)/bin/python --require-hashes requirements/base.txt
	@$(UV) pip install --quiet --python $(BASE_VENV)/bin/python --no-deps --editable .
	@touch $@

LOCK := $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	--no-header --no-annotate
lock: $(UV)
	$(SAY) "locking requirements"
	@$(LOCK) pyproject.toml -o requirements/base.txt
	@$(LOCK) pyproject.toml --extra predictor -o requirements/predictor.txt
	@$(LOCK) pyproject.toml --extra dev --extra validation --extra loadtest -o requirements/dev.txt

train: $(VENV)/.installed
	$(SAY) "training the embedded model (resumes where it stopped)"
	@$(RUN)/python -m florence2_kserve.tiny.train

evaluate: $(VENV)/.installed
	$(SAY) "scoring the embedded model on 500 held-out scenes"
	@$(RUN)/florence2 evaluate-embedded --write-card

clean:
	rm -rf $(VENV) $(BASE_VENV) .bootstrap demo-output .pytest_cache .mypy_cache .ruff_cache
