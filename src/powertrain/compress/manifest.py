"""`powertrain.json`: what a compressed folder says about itself, and where its evaluation is added later."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from powertrain.checkpoint.unfinished import under_way
from powertrain.types import ModelFileError, PowertrainError

MANIFEST_FILE = "powertrain.json"


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a compressed folder. Raises `ModelFileError` if there is none or it is damaged."""
    file = Path(folder) / MANIFEST_FILE
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{file}: no readable manifest: {error}") from None
    if not isinstance(manifest, dict):
        raise ModelFileError(f"{file}: the manifest is not a JSON object")
    return manifest


def update_manifest(folder: str | Path, **entries: Any) -> None:
    """Set entries of a folder's manifest (such as `evaluation`), whole or not at all."""
    file = Path(folder) / MANIFEST_FILE
    text = manifest_text({**read_manifest(folder), **entries})
    try:
        with under_way(file) as partial:
            partial.write_text(text, encoding="utf-8")
            partial.replace(file)
    except OSError as error:
        raise PowertrainError(f"cannot write {file}: {error.strerror}") from None


def manifest_text(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def weights_sha256(path: Path) -> str:
    """SHA-256 of a GGUF file, or of the names and hashes of a folder's safetensors files in name order."""
    if path.is_file():
        return _file_sha256(path)
    files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.gguf"))
    lines = "".join(f"{_file_sha256(file)}  {file.name}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def _file_sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
