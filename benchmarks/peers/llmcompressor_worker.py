"""llm-compressor as one of the tools that quantize; runs in the environment of llm-compressor.

Its own defaults but for what the job names: sequential pipelines block by block, GPTQ with static activation order in
blocks of 128 columns, AWQ with 20 grid points and duo scaling (and no clipping, which it has not), SmoothQuant 0.5.
"""

from __future__ import annotations

import time
from typing import Any

import llmcompressor  # type: ignore[import-not-found]
import numpy as np
import torch
from datasets import Dataset  # type: ignore[import-not-found]
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier  # type: ignore[import-not-found]
from llmcompressor.modifiers.quantization import QuantizationModifier  # type: ignore[import-not-found]
from llmcompressor.modifiers.transform.awq import AWQModifier  # type: ignore[import-not-found]
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier  # type: ignore[import-not-found]
from llmcompressor.pipelines.cache import IntermediatesCache  # type: ignore[import-not-found]
from quantize_job import DAMPING, Job, serve
from transformers import AutoModelForCausalLM, AutoTokenizer  # type: ignore[import-not-found]

OBSERVERS = {"minmax": "memoryless_minmax", "mse": "memoryless_mse", "imatrix": "imatrix_mse"}
TRANSFORMS = {"awq": AWQModifier, "smoothquant": SmoothQuantModifier}


def quantize(job: Job) -> dict[str, Any]:
    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    if not torch.accelerator.is_available():
        # AWQ pins its activations for quicker copies to a GPU, which torch refuses where there is none
        IntermediatesCache.pin_memory = lambda *_: None
    model = AutoModelForCausalLM.from_pretrained(job["source"], dtype=torch.float32).to(job["device"])
    tokenizer = AutoTokenizer.from_pretrained(job["source"])
    modifiers = recipe(job["scheme"], job["method"])
    settings = str(modifiers)
    started = time.perf_counter()
    given = calibration(job["calibration"]) if any(one.requires_calibration_data for one in modifiers) else {}
    oneshot(model=model, tokenizer=tokenizer, recipe=modifiers, **given)
    model.save_pretrained(job["out"], save_compressed=True)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "version": f"llm-compressor {llmcompressor.__version__}", "settings": settings}


def calibration(path: str) -> dict[str, Any]:
    """The ids as a tokenized dataset, every window once, in order and whole."""
    ids = np.load(path)
    columns = {"input_ids": ids.tolist(), "attention_mask": np.ones_like(ids).tolist()}
    return {
        "dataset": Dataset.from_dict(columns),
        "num_calibration_samples": len(ids),
        "max_seq_length": ids.shape[1],
        "shuffle_calibration_samples": False,
    }


def recipe(scheme: Job, method: Job) -> list[Any]:
    """The modifiers that do what the job says."""
    weights = {"num_bits": scheme["num_bits"], "type": "int", "symmetric": True, "dynamic": False}
    weights |= {"strategy": "group" if scheme["group_size"] else "channel", "group_size": scheme["group_size"]}
    weights |= {"observer": OBSERVERS[method["observer"]]}
    group = {"targets": ["Linear"], "weights": weights}
    if scheme["activation_bits"]:
        inputs = {"num_bits": scheme["activation_bits"], "type": "int", "symmetric": True}
        group["input_activations"] = {**inputs, "strategy": "token", "dynamic": True}
    common = {"config_groups": {"group_0": group}, "ignore": ["lm_head"]}
    if method["round"] == "gptq":
        rounding = GPTQModifier(**common, dampening_frac=DAMPING, actorder="static")
    else:
        rounding = QuantizationModifier(**common)
    transform = method.get("transform")
    return [TRANSFORMS[transform](), rounding] if transform else [rounding]


if __name__ == "__main__":
    serve(quantize)
