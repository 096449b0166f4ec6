#!/usr/bin/env bash
# The tests of the GPU's kernels and engine, on a machine with one: scripts/gpu_tests.sh [pytest's arguments]
# Side by side where pytest-xdist is installed. Needs torch, triton, numpy, safetensors, tokenizers and pytest only.
set -euo pipefail
cd "$(dirname "$0")/.."

# what runs beside each other shares the cores: more threads each would only wait
export OMP_NUM_THREADS=1 PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH}
side_by_side=()
if python3 -c 'import xdist' 2>/dev/null; then
    # engines take their share of the device's memory each
    side_by_side=(-n "${WORKERS:-8}" --dist load)
fi
exec python3 -m pytest -q -p no:cacheprovider --timeout 300 "${side_by_side[@]}" \
    tests/kernels/test_gpu_*.py tests/kernels/test_compile_ahead.py tests/engine/test_gpu*.py "$@"
