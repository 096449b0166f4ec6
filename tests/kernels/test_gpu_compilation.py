"""Kernels whose compiled code is another than the interpreter's, through Triton's front end for an H100, without one.

The interpreter runs neither the inline assembly nor the branches around it, and takes types that the compiler refuses.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

SCRIPT = """
from itertools import product

from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from powertrain.kernels.gpu import conversions, int4_matmul, quantized

TARGET = GPUTarget("cuda", 90, 32)
FLOATS = ("bf16", "fp16")


def check(kernel, pointers, **constants):
    types = {name: f"*{kind}" for name, kind in pointers.items()}
    constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    signature = {name: types.get(name, "constexpr" if name in constants else "i32") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs)
    backend = make_backend(TARGET)
    options, context = backend.parse_options({"num_warps": 4, "num_stages": 3}), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    code = backend.get_codegen_implementation(options)
    text = str(source.make_ir(TARGET, options, code, backend.get_module_map(), context))
    assert "elementwise_inline_asm" in text, kernel


shared = {"OUTPUTS": 64, "PRECISION": "tf32", "IS_COMPILED": True, "PDL": 1}
for kind, swaps, gated in product(FLOATS, (False, True), (False, True)):
    x = {"x": kind, "scale": kind, "out": "fp32"}
    layout = {"SWAPS": swaps, "GATED": gated}
    for (word, nibbles), has_zero in product((("i16", 4), ("u8", 2)), (False, True)):
        check(int4_matmul._int4_kernel, {**x, "values": word, "zero": "i8"}, **shared, **layout, WORDS=16,
              NIBBLES=nibbles, GROUP_BLOCKS=1, HAS_ZERO=has_zero, IS_WHOLE=swaps, TILES=1 + swaps, ROWS=16,
              BLOCKS_AHEAD=4)
        check(conversions._int4_floats_kernel, {"values": word, "scale": kind, "zero": "i8", "out": kind}, WORDS=16,
              NIBBLES=nibbles, GROUP_BLOCKS=1, HAS_ZERO=has_zero, OUTPUTS=64, IS_COMPILED=True)
    if kind == "bf16":
        for has_blocks in (False, True):
            check(quantized._matrix_kernel, {**x, "values": "fp8e4nv", "scale": "fp32"}, **shared, **layout, INPUTS=128,
                  HAS_SCALE=True, HAS_BLOCKS=has_blocks, ROWS=16, LINES=4)
"""


def test_products_of_narrow_weights_pass_the_compilers_front_end():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr[-3000:]
