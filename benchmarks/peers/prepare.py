"""The peers' models, made once from the one file that is measured, so that all contenders hold the same weights.

llama.cpp: the file as it is, and what its own quantizer makes of it. OpenVINO: a float32 Hugging Face folder of the
dequantized weights, exported by optimum-intel. Each result appears under its final name only when it is complete.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from powertrain.checkpoint.safetensors_folder import write_checkpoint
from powertrain.checkpoint.source import iterate, open_checkpoint
from powertrain.checkpoint.tokenizer_files import hugging_face_files

HERE = Path(__file__).resolve().parent
OPENVINO_EXPORTS = {
    "int8": ("--weight-format", "int8"),
    "int4": ("--weight-format", "int4", "--sym", "--group-size", "64", "--ratio", "1.0"),
}


def float32_folder(source: Path, cache: Path) -> Path:
    """The dequantized weights, config and tokenizer of `source` as a Hugging Face folder."""
    out = cache / "float32"
    if not out.is_dir():
        checkpoint = open_checkpoint(source)
        write_checkpoint(out, checkpoint.config, iterate(checkpoint), hugging_face_files(source))
    return out


def compressed_folder(source: Path, cache: Path, name: str, recipe: tuple[str, int | None]) -> Path:
    """`source` compressed by our own command: the name of a recipe and its group size."""
    preset, group_size = recipe
    options: list[str | Path] = [] if group_size is None else ["--group-size", str(group_size)]
    command: list[str | Path] = [sys.executable, "-m", "powertrain", "compress", source]
    return _once(
        cache / name.replace(" ", "-"),
        lambda out: _run([*command, out, "--recipe", preset, "--dtype", "float32", *options]),
    )


def llamacpp_file(source: Path, cache: Path, name: str, python: Path) -> Path:
    """`source` in llama.cpp's format `name` (Q4_0, Q8_0, F16)."""
    script = HERE / "llamacpp_quantize.py"
    return _once(cache / f"{name}.gguf", lambda out: _run([python, script, source, out, name]))


def openvino_folder(source: Path, cache: Path, name: str, python: Path) -> Path:
    """`source` exported for OpenVINO in format `name` of `OPENVINO_EXPORTS`."""
    command: list[str | Path] = [python.parent / "optimum-cli", "export", "openvino", *OPENVINO_EXPORTS[name]]
    command += ["--task", "text-generation-with-past", "--model", float32_folder(source, cache)]
    return _once(cache / f"openvino-{name}", lambda out: _run([*command, out]))


def _once(final: Path, make: Callable[[Path], None]) -> Path:
    if final.exists():
        return final
    partial = final.with_name(f"partial-{final.name}")
    if partial.is_dir():
        shutil.rmtree(partial)
    partial.unlink(missing_ok=True)
    final.parent.mkdir(parents=True, exist_ok=True)
    print(f"preparing {final}")
    make(partial)
    partial.rename(final)
    return final


def _run(command: list[str | Path]) -> None:
    subprocess.run([str(part) for part in command], check=True)
