"""AutoRound as one of the tools that quantize; runs in the environment of auto-round.

Its own defaults but for what the job names, and that it computes in float32 (`amp=False`), for it would round the
source's weights to bfloat16 first, and stores scales in float32 as the others do here.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from auto_round import AutoRound  # type: ignore[import-not-found]
from quantize_job import Job, serve
from transformers import AutoModelForCausalLM, AutoTokenizer  # type: ignore[import-not-found]


def quantize(job: Job) -> dict[str, Any]:
    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(job["source"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(job["source"])
    ids = torch.from_numpy(np.load(job["calibration"]))
    scheme, method = job["scheme"], job["method"]
    settings = {
        "bits": scheme["num_bits"],
        "group_size": scheme["group_size"] or -1,
        "sym": True,
        "iters": method["iterations"],
        "batch_size": method["batch_size"],
        "seqlen": ids.shape[1],
        "nsamples": len(ids),
        "seed": job["seed"],
        "amp": False,
        "scale_dtype": "fp32",
        "device_map": job["device"],
    }
    started = time.perf_counter()
    tool = AutoRound(model, tokenizer, dataset=batches(ids, method["batch_size"]), **settings)
    _, folders = tool.quantize_and_save(f"{job['out']}-named", format="llm_compressor")
    seconds = time.perf_counter() - started
    folder = folders[0] if isinstance(folders, list) else folders
    Path(folder).rename(job["out"])  # it puts a folder of a name of its own into the one it is given
    return {"seconds": seconds, "version": f"auto-round {version('auto-round')}", "settings": settings}


def batches(ids: torch.Tensor, size: int) -> list[dict[str, torch.Tensor]]:
    """The windows as its calibration takes them when they are tokenized already."""
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(size)]


if __name__ == "__main__":
    serve(quantize)
