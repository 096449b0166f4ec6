# make demo    compress, measure, choose and serve a real model on this machine
# make test    the test suite
# make check   lint, format, strict types
# make native    the C++ kernels alone, built again in place: seconds after an edit
# make sanitize  their tests under AddressSanitizer and UndefinedBehaviorSanitizer (GCC)
#
# Each makes .venv on first use. Another interpreter: make demo PYTHON=python3.12

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
# Installed first and alone: whatever a later package asks for, this version satisfies it and stays.
TORCH := torch>=2.11,<2.14
PIP := $(BIN)/python -m pip install --disable-pip-version-check

NATIVE := src/powertrain/kernels/native
CMAKE := $(BIN)/cmake
CONFIGURE := $(CMAKE) -S $(NATIVE) -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DCMAKE_CXX_COMPILER=$(CXX)

.PHONY: demo test check native sanitize clean
.DELETE_ON_ERROR:

demo: .venv/demo.stamp
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/demo.sh demo-out

test: .venv/test.stamp
	$(BIN)/python -m pytest

check: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

native: $(CMAKE)
	$(CONFIGURE) -B build/native
	$(CMAKE) --build build/native --parallel
	$(CMAKE) --install build/native

# Python itself is not built with the sanitizer, so its library is loaded first; and the C++ library with it, whose
# exceptions it intercepts. What Python leaks at its end is not ours.
sanitize: $(CMAKE)
	$(CONFIGURE) -B build/sanitize -DPOWERTRAIN_SANITIZE=ON
	$(CMAKE) --build build/sanitize --parallel
	POWERTRAIN_NATIVE="$$(echo $(CURDIR)/build/sanitize/_native*.so)" \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 \
	$(BIN)/python -m pytest --capture=sys tests/*/test_native_*.py --ignore tests/kernels/test_native_build.py

# Of the test extra; and no prerequisite, which would build by pip first what these two build.
$(CMAKE):
	$(MAKE) .venv/test.stamp

.venv/base.stamp:
	@test -n "$(PYTHON)" || { echo "error: Powertrain needs Python 3.11 or newer; install it, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than Python 3.11; name another: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) "$(TORCH)"
	touch $@

.venv/%.stamp: .venv/base.stamp pyproject.toml $(wildcard $(NATIVE)/*)
	$(PIP) --editable ".[$*]" "$(TORCH)"
	touch $@

clean:
	rm -rf .venv demo-out build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f src/powertrain/kernels/_native*.so
