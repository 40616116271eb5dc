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

.PHONY: demo test lint types quick slow e2e images lock setup clean train evaluate

demo: $(VENV)/.installed
	$(SAY) "demo: starting the service on the embedded model"
	@$(RUN)/florence2 demo

test: lint types quick

lint: $(VENV)/.installed
	$(SAY) "ruff"
	@$(RUN)/ruff check . && $(RUN)/ruff format --check .

types: $(VENV)/.installed
	$(SAY) "mypy"
	@$(RUN)/mypy florence2_kserve loadtest/florence2_loadtest

quick: $(VENV)/.installed $(BASE_VENV)/.installed
	$(SAY) "pytest, without the slow ones"
	@$(RUN)/pytest -m "not slow and not e2e" $(ARGS)

slow: $(VENV)/.installed $(BASE_VENV)/.installed
	$(SAY) "pytest, the slow ones"
	@$(RUN)/pytest -m slow $(ARGS)

# Brings up a cluster of its own, unless FLORENCE2_E2E_KUBECONFIG names one; where none can be had, it skips and says why.
e2e: $(VENV)/.installed chart-tools
	$(SAY) "the cluster's programs and images (20 minutes the first time; kept)"
	@if test -n "$$FLORENCE2_E2E_KUBECONFIG" || ! $(RUN)/python -m tests.e2e.cluster why-not; then :; \
	  else $(RUN)/python -m tests.e2e.cluster build; fi
	$(SAY) "the images and the chart on a real cluster"
	@$(RUN)/pytest -m e2e tests/images tests/e2e -s $(ARGS); status=$$?; \
	  test -n "$$FLORENCE2_E2E_KEEP$$FLORENCE2_E2E_KUBECONFIG" || $(RUN)/python -m tests.e2e.cluster down; exit $$status

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
# One resolution, dev.txt; the images' lock files are parts of it. torch.txt is torch and all that it stands on.
lock: $(UV)
	$(SAY) "locking requirements"
	@$(LOCK) pyproject.toml --extra dev --extra validation --extra loadtest -o requirements/dev.txt
	@$(LOCK) pyproject.toml -c requirements/dev.txt -o requirements/base.txt
	@$(LOCK) pyproject.toml --extra predictor -c requirements/dev.txt -o requirements/predictor.txt
	@echo 'torch torchvision' | tr ' ' '\n' | $(LOCK) - -c requirements/dev.txt -o requirements/torch.txt
	@$(LOCK) pyproject.toml --extra validation --extra loadtest -c requirements/dev.txt -o requirements/tools.txt
	@echo hatchling | $(LOCK) - -o requirements/build.txt

# By buildah, or else docker. BASE_IMAGE=local makes a base by debootstrap, where no image registry is reached.
images:
	$(SAY) "building the images"
	@$(PYTHON) tests/images/build.py transformer predictor tools --base $(or $(BASE_IMAGE),default) $(ARGS)

train: $(VENV)/.installed
	$(SAY) "training the embedded model (resumes where it stopped)"
	@$(RUN)/python -m florence2_kserve.tiny.train

evaluate: $(VENV)/.installed
	$(SAY) "scoring the embedded model on 500 held-out scenes"
	@$(RUN)/florence2 evaluate-embedded --write-card

clean:
	rm -rf $(VENV) $(BASE_VENV) .bootstrap demo-output e2e-output .pytest_cache .mypy_cache .ruff_cache

# The chart. Its tools are built out of Go modules into ~/.cache/florence2-kserve (FLORENCE2_CACHE), minutes the first time.
.PHONY: chart-tools chart-test chart-docs manifests manifests-check
quick: chart-tools

chart-tools: $(VENV)/.installed
	@$(RUN)/python -m tests.chart.toolbox

chart-test: chart-tools
	$(SAY) "lint, unit tests, schemas and documentation of the chart"
	@$(RUN)/pytest tests/chart $(ARGS)

chart-docs: chart-tools
	$(SAY) "writing the chart's README, and its schema of the settings"
	@$(RUN)/python -m tests.chart.settings_schema
	@$(RUN)/python -m tests.chart.readme

manifests: chart-tools
	$(SAY) "rendering manifests/"
	@$(RUN)/python -m tests.chart.manifests

manifests-check: chart-tools
	@$(RUN)/python -m tests.chart.manifests --check
