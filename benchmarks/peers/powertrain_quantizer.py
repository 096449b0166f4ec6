"""Powertrain as one of the tools that quantize: `compress` on the job's source, calibration ids and scheme."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from quantize_job import DAMPING, Job, serve

from powertrain import __version__
from powertrain.compress.driver import compress


def quantize(job: Job) -> dict[str, Any]:
    torch.set_num_threads(job["threads"])
    windows = np.load(job["calibration"])
    steps = recipe_steps(job["scheme"], job["method"])
    started = time.perf_counter()
    compress(
        job["source"],
        job["out"],
        {"steps": steps},
        dtype="float32",
        device=job["device"],
        calibration=windows.tolist(),
        num_samples=len(windows),
        length=windows.shape[1],
        seed=job["seed"],
    )
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "version": f"powertrain {__version__}", "settings": {"steps": steps}}


def recipe_steps(scheme: Job, method: Job) -> list[dict[str, Any]]:
    """The recipe that says what the job does."""
    preset = f"W{scheme['num_bits']}A{scheme['activation_bits'] or 16}"
    step = {"match": "Linear", "scheme": preset, "group_size": scheme["group_size"] or "channel"}
    step |= {"method": method["round"], "observer": method["observer"]}
    if method["round"] == "gptq":
        step |= {"dampening_frac": DAMPING, "actorder": "static", "correction": method.get("correction", "none")}
    if method["round"] == "autoround":
        step |= {"iterations": method["iterations"], "batch_size": method["batch_size"]}
    transform = method.get("transform")
    return [{"method": transform}, step] if transform else [step]


if __name__ == "__main__":
    serve(quantize)
