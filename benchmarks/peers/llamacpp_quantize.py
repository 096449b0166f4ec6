"""Write one GGUF file in another format with llama.cpp's own quantizer: SOURCE OUT FORMAT.

Runs in the environment of llama-cpp-python. Quantized tensors of the source are dequantized to float32 first; which
tensors keep more bits (a tied head stays Q8_0 beside a Q4_0 body) is llama.cpp's own choice.
"""

from __future__ import annotations

import ctypes
import os
import sys

import llama_cpp  # type: ignore[import-not-found]


def main() -> None:
    source, out, name = sys.argv[1:]
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    parameters.allow_requantize = True
    parameters.nthread = os.cpu_count() or 1
    llama_cpp.llama_backend_init()
    if llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(parameters)) != 0:
        sys.exit(f"llama.cpp could not write {out}")


if __name__ == "__main__":
    main()
