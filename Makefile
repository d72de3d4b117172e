# `make run`, `make check` and `make test` need make, Python 3.11 or newer with its venv module, and a package registry.

# The first interpreter that is new enough and can create an environment.
CAN_RUN := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3.12 python3.11 python3 python; do \
	$$p -c '$(CAN_RUN)' >/dev/null 2>&1 && { echo $$p; break; }; done)
VENV ?= .venv
BIN := $(VENV)/bin

# A finished run is never written over: runs/digits, then runs/digits-2, ... An interrupted one is resumed.
OUT ?= $(shell out=runs/digits; n=1; while [ -e $$out/results.json ]; do \
	n=$$((n + 1)); out=runs/digits-$$n; done; echo $$out)

# Two files of tests at a time, those that take longest first; a file's tests stay together, because they share
# what one of them has learned.
PYTEST := $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

# mypy has work for one processor for half a minute. It runs beside the tests, and what it finds comes after them.
MYPY := $(BIN)/mypy --strict src/
define beside_mypy
mkdir -p build; $(MYPY) >build/mypy.txt 2>&1 & mypy=$$!; trap "kill $$mypy" INT TERM; \
echo '$(1)'; $(1); code=$$?; wait $$mypy || code=$$?; echo '$(MYPY)'; cat build/mypy.txt; exit $$code
endef

SITE := build/site

.PHONY: run lint style check test docs serve-docs clean
.DELETE_ON_ERROR:

run: $(VENV)/.installed-report
	$(BIN)/duallora run --stream digits --backbone embedded --out $(OUT)

lint: style
	$(MYPY)

style: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell README.md CHANGELOG.md CONTRIBUTING.md SECURITY.md docs src tests benchmarks tools

check: style
	@$(call beside_mypy,$(PYTEST) -m "not slow and not process and not browser")

test: style
	@$(call beside_mypy,$(PYTEST) --durations=15)

# Strict: a link, a reference or an annotation that leads nowhere ends the build.
docs: $(VENV)/.installed-test
	$(BIN)/sphinx-build -W --keep-going -q -c docs/site -b html -d build/doctrees . $(SITE)
	@echo "the site: $(SITE)/index.html"

serve-docs: docs
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory $(SITE) 8008

clean:
	rm -rf $(VENV) build

$(BIN)/python:
	@[ -n "$(PYTHON)" ] || { echo "No Python 3.11 or newer with venv was found; install one \
	(on Debian: apt install python3 python3-venv) or run make PYTHON=/path/to/python" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# The package is installed in place, so only a change of its dependencies needs another installation.
$(VENV)/.installed-report: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[report]"
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[report,test]"
	@touch $@ $(VENV)/.installed-report
