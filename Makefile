# `make help` lists what there is. Nothing but GNU make, a POSIX shell and Python 3.10 or newer is needed beforehand:
# the first target that needs packages installs them into .venv, at the versions in constraints.txt.
PYTHON ?= python3
# Two tests at a time; `make test PYTEST_FLAGS=-x` runs one after the other and stops at the first failure.
PYTEST_FLAGS ?= -n 2
# The oldest Python that setup.cfg allows; `make test-oldest OLDEST_PYTHON=...` names one by its path.
OLDEST_PYTHON ?= python3.10
# Which PyTorch `make test-newest` tries first: `make test-newest NEWEST_TORCH=torch==...` takes another one.
NEWEST_TORCH ?= torch
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RESULTS_STAMP := $(VENV)/.results
DOCS_STAMP := $(VENV)/.docs
OLDEST := .venv-oldest
OLDEST_STAMP := $(OLDEST)/.installed
NEWEST := .venv-newest
NEWEST_STAMP := $(NEWEST)/.installed
# The tests that depend on the versions of the frameworks: private names, steps, compilation, processes, files, command lines. The
# formulas are the same in every version; the golden values stand for them.
VERSION_TESTS ?= $(addprefix tests/lightning/test_,callbacks_together.py cleanup.py cli.py compat.py compat_torch.py compile.py \
	distributed.py every_loss_trains.py losses_golden.py metrics.py optimizers.py outputs.py precision.py resume.py \
	schedules.py teacher.py training_step.py yaml.py) $(addprefix tests/cache/test_,cached_errors.py cached_training.py \
	store.py) $(addprefix tests/launcher/test_,command.py hooks.py) $(addprefix tests/keras/test_,callbacks_keras.py \
	compat_keras.py config.py data.py execution.py numbers_keras.py persistence.py step_keras.py teachers_keras.py)

SHELL := /bin/sh
.SHELLFLAGS := -ec
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help install demo test test-oldest test-newest build docs docs-short lint format bench results notebooks notebooks-write clean

# One thread: two cores are shared by the processes of the distributed tests. No downloads: every model and data set is
# made on the spot. Figures need no display.
RUN_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TF_CPP_MIN_LOG_LEVEL=3 TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg
# Timings scatter by up to a third with the C library's default allocator settings.
BENCH_ENV := MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' Makefile

# PyTorch first and alone, so that a CPU build is taken where pip is set up to offer one; the rest then keeps it. The
# wheel of torchvision has no compiled operators for that build, and Lightning cannot be imported beside it: it lies in a
# folder of its own, which the tests of its detectors put on their path; so does timm, which needs it.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install -qq --upgrade pip
	$(BIN)/python -m pip install -qq -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -qq -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -qq -c constraints.txt --no-deps --target $(VENV)/vision torchvision timm
	$(BIN)/python -m pip check
	touch $@

install: $(STAMP) ## install the library and all tools into .venv

# Both halves at the same time, one core each. Keras' report waits in a file until Lightning's is done, and what it
# wrote to the standard error stream (TensorFlow's greeting) is shown only if it fails.
demo: $(STAMP) ## distil a small network on a small data set, with Lightning and with Keras, and show what it gains
	@echo "Both halves train at the same time: first the report of lightning-distill, then that of keras-distill."
	@reports=$$(mktemp -d); keras=; \
	trap 'if [ -n "$$keras" ]; then kill "$$keras" 2>/dev/null || true; fi; rm -rf "$$reports"' EXIT; \
	trap 'exit 130' INT TERM HUP; \
	$(RUN_ENV) $(BIN)/keras-distill demo >"$$reports/out" 2>"$$reports/errors" & keras=$$!; \
	lightning_code=0; $(RUN_ENV) $(BIN)/lightning-distill demo || lightning_code=$$?; \
	keras_code=0; wait "$$keras" || keras_code=$$?; keras=; echo; cat "$$reports/out"; \
	if [ "$$keras_code" -ne 0 ]; then cat "$$reports/errors" >&2; exit "$$keras_code"; fi; \
	exit "$$lightning_code"

lint: $(STAMP) ## ruff (lint and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## let ruff fix and format what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Keras takes one backend for a whole process: its tests run on torch first, and with all the others on TensorFlow.
# TensorFlow keeps much of every traced model, and each garbage collection walks through it. The tests that trace the
# most run in processes of their own, so that these and all others are faster.
# pytest's closing line must be the last one printed: add nothing below it.
TRACED_LAUNCHER := tests/pairs/test_pairs_keras.py tests/cache/test_cache_keras.py $(addprefix tests/keras/test_launcher_,\
	data_keras.py keras.py hooks_keras.py outputs_keras.py training_keras.py)
TRACED_MODELS := $(addprefix tests/keras/test_,cached_targets.py demo_keras.py every_loss_trains_keras.py execution.py \
	export_keras.py forward.py layouts_keras.py learned_training_keras.py loss_chunks.py maths.py persistence.py \
	sequence_keras.py sequence_keras_together.py top_k_keras.py)
test: lint ## lint, then every test, doctest, notebook and block of the documentation
	$(RUN_ENV) KERAS_BACKEND=torch $(BIN)/python -m pytest tests/keras $(PYTEST_FLAGS)
	$(RUN_ENV) $(BIN)/python -m pytest $(TRACED_LAUNCHER) $(PYTEST_FLAGS)
	$(RUN_ENV) $(BIN)/python -m pytest $(TRACED_MODELS) $(PYTEST_FLAGS)
	$(RUN_ENV) $(BIN)/python -m pytest $(addprefix --ignore=,$(TRACED_LAUNCHER) $(TRACED_MODELS)) $(PYTEST_FLAGS)

# Tools that only `make lint`, the notebooks and the demos need are left out.
VERSION_TOOLS := pytorch-lightning hypothesis pytest pytest-xdist tensorboard transformers

$(OLDEST_STAMP): setup.cfg pyproject.toml constraints-oldest.txt
	$(OLDEST_PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed")'
	$(OLDEST_PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install -qq --upgrade pip
	$(OLDEST)/bin/python -m pip install -qq -c constraints-oldest.txt "$$(grep '^torch==' constraints-oldest.txt)"
	$(OLDEST)/bin/python -m pip install -qq -c constraints-oldest.txt -e '.[all]' $(VERSION_TOOLS)
	$(OLDEST)/bin/python -m pip check
	touch $@

# Old releases warn of what has changed since: their warnings are not errors here.
test-oldest: $(OLDEST_STAMP) ## the tests of both halves with the oldest versions that setup.cfg allows
	$(RUN_ENV) $(OLDEST)/bin/python -m pytest -W default $(VERSION_TESTS) $(PYTEST_FLAGS)

$(NEWEST_STAMP): setup.cfg pyproject.toml
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python -m pip install -qq --upgrade pip
	$(NEWEST)/bin/python -m pip install -qq '$(NEWEST_TORCH)'
	$(NEWEST)/bin/python -m pip install -qq -e '.[all]' $(VERSION_TOOLS)
	$(NEWEST)/bin/python -m pip check
	touch $@

# Warnings are errors here: each announces what the next release will change.
test-newest: $(NEWEST_STAMP) ## the tests of both halves with the newest versions that pip finds
	$(RUN_ENV) $(NEWEST)/bin/python -m pip list
	$(RUN_ENV) $(NEWEST)/bin/python -m pytest $(VERSION_TESTS) $(PYTEST_FLAGS)

# Without an environment of its own, the build uses the pinned setuptools of .venv.
build: $(STAMP) ## the source distribution and the wheel, checked, in dist
	rm -rf build dist
	$(BIN)/python -m pip install -qq -c constraints.txt build twine
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*

bench: $(STAMP) ## the side-by-side benchmarks
	$(RUN_ENV) $(BENCH_ENV) $(BIN)/python -m benchmarks

# Hours on two cores; what a stopped run has done is kept.
results: $(RESULTS_STAMP) ## the experiments on real data, and docs/results.md from what they measured
	$(RUN_ENV) RESULTS_PEERS=$(VENV)/peers $(BIN)/python -m benchmarks.quality.peers
	$(RUN_ENV) RESULTS_DATA=$(VENV)/results $(BIN)/python -m benchmarks.quality

$(RESULTS_STAMP): $(STAMP) benchmarks/quality/requirements.txt benchmarks/quality/requirements-peers.txt
	$(BIN)/python -m pip install -qq --no-deps --require-hashes --target $(VENV)/results --upgrade -r benchmarks/quality/requirements.txt
	$(BIN)/python -m pip install -qq --no-deps --require-hashes --target $(VENV)/peers --upgrade -r benchmarks/quality/requirements-peers.txt
	touch $@

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install -qq -c constraints.txt -e '.[docs]'
	touch $@

# Every program of the pages runs, and a warning of Sphinx, such as a link that leads nowhere, is an error.
docs: $(DOCS_STAMP) ## the site, in build/site/html: open its index.html
	$(RUN_ENV) $(BIN)/python -m pytest tests/test_docs.py tests/test_notebooks.py $(PYTEST_FLAGS)
	$(RUN_ENV) $(BIN)/python docs/site/run_programs.py
	$(RUN_ENV) $(BIN)/python docs/site/generate.py build/site/source
	$(RUN_ENV) $(BIN)/python -m sphinx -W --keep-going -q -b html build/site/source build/site/html
	@echo "The site is in build/site/html/index.html."

# Sphinx reads all pages and follows their links, and writes none of them.
docs-short: $(DOCS_STAMP) ## the warnings of the site, without its programs: less than a minute
	$(RUN_ENV) $(BIN)/python docs/site/generate.py build/site/source
	$(RUN_ENV) $(BIN)/python -m sphinx -W --keep-going -q -b dummy build/site/source build/site/checked

notebooks: $(STAMP) ## execute the notebooks and compare with their stored outputs
	$(RUN_ENV) $(BIN)/python -m pytest tests/test_notebooks.py

notebooks-write: $(STAMP) ## execute the notebooks and store their outputs in their files
	$(RUN_ENV) $(BIN)/python tests/notebook_outputs.py

clean: ## remove .venv and everything that tools and builds left
	rm -rf $(VENV) $(OLDEST) $(NEWEST) build dist ./*.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache lightning_logs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
