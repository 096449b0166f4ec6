# make demo    compress, measure, choose and serve a real model on this machine
# make test    the test suite
# make check   lint, format, strict types
#
# Each makes .venv on first use. Another interpreter: make demo PYTHON=python3.12

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
# Installed first and alone: whatever a later package asks for, this version satisfies it and stays.
TORCH := torch>=2.11,<2.14
PIP := $(BIN)/python -m pip install --disable-pip-version-check

.PHONY: demo test check clean
.DELETE_ON_ERROR:

demo: .venv/demo.stamp
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/demo.sh demo-out

test: .venv/test.stamp
	$(BIN)/python -m pytest

check: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/base.stamp:
	@test -n "$(PYTHON)" || { echo "error: Powertrain needs Python 3.11 or newer; install it, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than Python 3.11; name another: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) "$(TORCH)"
	touch $@

.venv/%.stamp: .venv/base.stamp pyproject.toml
	$(PIP) --editable ".[$*]" "$(TORCH)"
	touch $@

clean:
	rm -rf .venv demo-out .pytest_cache .mypy_cache .ruff_cache .hypothesis
