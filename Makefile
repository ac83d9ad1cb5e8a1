# One verb each; `make` lists them. Everything runs in .venv, which is made once, from constraints.txt, and anew for
# others: make test CONSTRAINTS=constraints-newest.txt PYTHON=python3.13

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV := .venv
MADE_FROM := $(shell cat $(VENV)/complete 2>/dev/null)
RUN := $(VENV)/bin/python -m
ARGS ?=
# Of tests: one more than two cores, as some wait for what they have started. They start Python many times, for which
# bytecode is kept even where the environment says not to.
WORKERS ?= 3
# Extras that the versions allow, see setup.py.
EXTRAS = test$(if $(findstring oldest,$(CONSTRAINTS)),,,adapters,docs,eval)$(if $(findstring newest,$(CONSTRAINTS)),,,torchaudio)

.DEFAULT_GOAL := help
.PHONY: help train test browser bench gpu lint docs clean

help:  ## list the verbs
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

train: $(VENV)/complete  ## train; with no ARGS, the demo: make train ARGS="--help"
	$(RUN) avfuse.train $(ARGS)

test: $(VENV)/complete  ## run the tests: make test ARGS="-k pair_attention" WORKERS=4
	PYTHONDONTWRITEBYTECODE= $(RUN) pytest -n $(WORKERS) --dist worksteal $(ARGS)

browser: $(VENV)/complete  ## test the demo's page in Chromium (Debian: apt install chromium chromium-driver)
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { \
	  echo "chromium or chromedriver is missing. On Debian: apt install chromium chromium-driver" >&2; exit 1; }
	$(RUN) pip install --disable-pip-version-check -c $(CONSTRAINTS) -e '.[demo,browser]'
	$(RUN) pytest tests/test_demo.py $(ARGS)

bench: $(VENV)/complete  ## time the attention over pairs: make bench ARGS="--variants bias"
	$(VENV)/bin/python benchmarks/pair_attention.py $(ARGS)

# A machine with a GPU may have no network to make .venv from: where there is none, PYTHON does it.
gpu:  ## measure all that only a GPU can tell: make gpu PART=1; rehearse: make gpu DEVICE=cpu SMALL=1
	$(if $(wildcard $(VENV)/complete),$(VENV)/bin/python,$(PYTHON)) benchmarks/gpu.py $(if $(PART),--part $(PART)) \
	  $(if $(DEVICE),--device $(DEVICE)) $(if $(SMALL),--small) $(ARGS)

lint: $(VENV)/complete  ## check the style
	$(RUN) ruff check .

docs: $(VENV)/complete  ## build the documentation as a site, build/docs; no link may be broken
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build

clean:  ## remove caches and build products (not .venv, data or runs)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find avfuse kernels benchmarks tests -name __pycache__ -prune -exec rm -rf {} +

# While it is being made, .venv holds a file `incomplete`. A .venv found with that file was interrupted: pip cannot
# tell a half-unpacked package from a whole one, so it is made anew. So is one of other constraints, which its file
# `complete` names.
ifneq ($(or $(MADE_FROM),constraints.txt),$(CONSTRAINTS))
.PHONY: $(VENV)/complete
endif
$(VENV)/complete: $(CONSTRAINTS) setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "avfuse needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	    "Name another: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo "$(PYTHON) lacks its venv module. On Debian: apt install python3-venv" >&2; exit 1; }
	@if [ -e $(VENV)/incomplete ] || [ "$(or $(MADE_FROM),constraints.txt)" != "$(CONSTRAINTS)" ]; then rm -rf $(VENV); fi
	@mkdir -p $(VENV) && touch $(VENV)/incomplete
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --disable-pip-version-check -c $(CONSTRAINTS) -e '.[$(EXTRAS)]'
	@echo $(CONSTRAINTS) > $(VENV)/incomplete && mv $(VENV)/incomplete $@
