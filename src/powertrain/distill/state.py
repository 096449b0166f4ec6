"""A training run on disk: tensors as safetensors, the rest as JSON, in one folder that is there whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from powertrain.checkpoint.safetensors_folder import read_header, read_json, sync
from powertrain.checkpoint.unfinished import set_aside, under_way
from powertrain.types import ModelFileError, PowertrainError

STATE_FILE, PARAMETERS_FILE, OPTIMIZER_FILE, BEST_FILE = (
    "state.json",
    "parameters.safetensors",
    "optimizer.safetensors",
    "best.safetensors",
)


@dataclass(slots=True)
class History:
    """What a run has done: `step` steps in `seconds`, the loss of each, a row of `curve` at each evaluation.

    `best_kl` on the held-out text was found after `best_step` steps.
    """

    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)
    best_kl: float | None = None
    best_step: int = 0
    ended: str | None = None
    """Why the run is over: "steps", "seconds" or "early stop"; None while it can go on."""


@dataclass(slots=True)
class Saved:
    """A run's state. `optimizer`: tensors named `key|parameter`. `best`: None where they are the last ones."""

    history: History
    parameters: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    best: dict[str, torch.Tensor] | None


def save_state(folder: Path, saved: Saved, identity: Mapping[str, Any]) -> None:
    """Write the state as `folder`/step-N and remove those of earlier steps. Raises `PowertrainError` (a full disk).

    `identity`: what the run is (settings, hashes of data and models): only a run with the same one may go on from it.
    """
    final = folder / f"step-{saved.history.step:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with under_way(final, is_folder=True) as partial:
            _save(partial / PARAMETERS_FILE, saved.parameters)
            _save(partial / OPTIMIZER_FILE, saved.optimizer)
            if saved.best is not None:
                _save(partial / BEST_FILE, saved.best)
            text = json.dumps({"identity": dict(identity), "history": asdict(saved.history)}, indent=1, allow_nan=False)
            (partial / STATE_FILE).write_text(text + "\n", encoding="utf-8")
            for file in partial.iterdir():
                sync(file)
            sync(partial)
            older = [path for path in _states(folder) if path != final]
            # the same step may be there: its time and its end may differ
            with set_aside(final) if final.exists() else nullcontext():
                partial.rename(final)
            sync(folder)
            for path in older:
                shutil.rmtree(path, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise PowertrainError(f"cannot write the training state to {folder}: {error}") from error


def load_state(folder: Path, identity: Mapping[str, Any], device: torch.device | str) -> Saved | None:
    """The last state in `folder`, or None if there is none yet.

    Raises `PowertrainError` naming the first setting in which the run that wrote it differs from `identity`, and
    `ModelFileError` for a damaged file.
    """
    found = _states(folder)
    if not found:
        return None
    last = found[-1]
    content = read_json(last / STATE_FILE)
    # compared as JSON has them: tuples are lists there
    _check_identity(last, content.get("identity"), json.loads(json.dumps(dict(identity))))
    try:
        history = History(**content["history"])
    except (KeyError, TypeError) as error:
        raise ModelFileError(f"{last / STATE_FILE}: not a training state: {error}") from None
    best = _load(last / BEST_FILE, device) if (last / BEST_FILE).is_file() else None
    return Saved(history, _load(last / PARAMETERS_FILE, device), _load(last / OPTIMIZER_FILE, device), best)


def _states(folder: Path) -> list[Path]:
    """Complete states, the latest last."""
    return sorted(path for path in folder.glob("step-*") if (path / STATE_FILE).is_file())


def _check_identity(where: Path, found: Any, wanted: dict[str, Any]) -> None:
    found = found if isinstance(found, dict) else {}
    for key in (*wanted, *found):
        if found.get(key) != wanted.get(key):
            raise PowertrainError(
                f"{where}: a run with another {key} ({found.get(key)!r}, now {wanted.get(key)!r}): "
                f"rerun the command as it was, or remove {where.parent} to begin anew"
            )


def _save(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file)


def _load(file: Path, device: torch.device | str) -> dict[str, torch.Tensor]:
    read_header(file)  # refuses a damaged file before the library maps it
    try:
        tensors: dict[str, torch.Tensor] = load_file(file, device=str(device))
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"{file}: cannot be read: {error}") from None
    return tensors
