"""What each way of compressing costs a real model: KL, perplexity and size, on the checkpoint read back from disk.

Calibrated methods run once a seed; the same command again goes on with the rows that its record lacks. The reference is
the model as it is given, dequantized to float32: for the default model that is a file of 4-bit blocks, so nothing here
is a loss against the model that was trained. The text that judges must share no run of 13 tokens with the text that
calibrates. With `--device cuda` all of it runs on a GPU, judged in float32 by the reference kernels; that needs torch,
numpy, safetensors and tokenizers only.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from common import parser, write

from powertrain.checkpoint.hub import resolve_model
from powertrain.checkpoint.source import open_checkpoint
from powertrain.checkpoint.tokenizer_files import load_tokenizer
from powertrain.compress.budget import Target, budget
from powertrain.compress.calibrate import NgramFilter, calibration_set
from powertrain.compress.driver import compress, plan_compression
from powertrain.compress.recipe import load_recipe
from powertrain.measure import record
from powertrain.measure.evaluate import Reference
from powertrain.measure.scoring import Model, read_model
from powertrain.text_data import encode_texts, read_texts

Step = dict[str, Any]


def step(scheme: str, group_size: int | str, **options: Any) -> Step:
    return {"match": "Linear", "scheme": scheme, "group_size": group_size, **options}


GPTQ: Step = {"method": "gptq"}
MSE: Step = {"observer": "mse"}
ROTATE: Step = {"method": "rotate"}
RANDOM: Step = {"method": "rotate", "kind": "random"}
AWQ: Step = {"method": "awq"}
LEARNED: Step = {"method": "autoround"}
W4: Step = step("W4A16", "channel")
W4_MSE: Step = step("W4A16", "channel", **MSE)
W4_GPTQ: Step = step("W4A16", "channel", **GPTQ)
W3: Step = step("W3A16", 64)
W8A8: Step = {"match": "Linear", "scheme": "W8A8"}
FP8_STATIC: Step = {"match": "Linear", "scheme": "FP8"}
RECIPES: dict[str, list[Step]] = {
    **{
        f"{name} {how}": [step(scheme, group_size, **options)]
        for name, scheme, group_size in (
            ("W4 channel", "W4A16", "channel"),
            ("W4 g64", "W4A16", 64),
            ("W3 g64", "W3A16", 64),
            ("W2 g64", "W2A16", 64),
        )
        for how, options in (
            ("rtn", {}),
            ("rtn mse", MSE),
            ("gptq", GPTQ),
            ("gptq weighted", {**GPTQ, "observer": "weighted"}),
            ("gptq asymmetric", {**GPTQ, "correction": "asymmetric"}),
            ("gptq weighted asymmetric", {**GPTQ, "observer": "weighted", "correction": "asymmetric"}),
            ("autoround", LEARNED),
            ("autoround compressed target", {**LEARNED, "target": "compressed"}),
        )
    },
    "W2 g64 autoround minmax": [step("W2A16", 64, **LEARNED, observer="minmax")],
    "W2 g64 autoround 1000 steps": [step("W2A16", 64, **LEARNED, iterations=1000)],
    "W2 g64 autoround autocast": [step("W2A16", 64, **LEARNED, autocast=True)],
    "W2 g64 asymmetric rtn mse": [step("W2A16_ASYM", 64, **MSE)],
    "W2 g64 asymmetric autoround": [step("W2A16_ASYM", 64, **LEARNED)],
    "FP8": [{"match": "Linear", "scheme": "FP8_DYNAMIC"}],
    # a CPU's native kernels leave the inputs of 8-bit floats alone: `--device cuda` judges their scales too
    "FP8 static": [FP8_STATIC],
    "FP8 static gptq": [{**FP8_STATIC, **GPTQ}],
    **{
        f"{name} gptq": [{"match": "Linear", "scheme": scheme, **GPTQ}]
        for name, scheme in (("FP8", "FP8_DYNAMIC"), ("NVFP4", "NVFP4A16"), ("MXFP4", "MXFP4A16"))
    },
    "NVFP4": [{"match": "Linear", "scheme": "NVFP4A16"}],
    "NVFP4 mse": [{"match": "Linear", "scheme": "NVFP4A16", **MSE}],
    "MXFP4": [{"match": "Linear", "scheme": "MXFP4A16"}],
    "MXFP4 mse": [{"match": "Linear", "scheme": "MXFP4A16", **MSE}],
    "rotated W4 channel rtn": [ROTATE, W4],
    "rotated W4 channel rtn mse": [ROTATE, W4_MSE],
    "rotated W4 channel gptq": [ROTATE, W4_GPTQ],
    "rotated W4 channel gptq asymmetric": [ROTATE, {**W4_GPTQ, "correction": "asymmetric"}],
    "rotated W4 channel gptq weighted": [ROTATE, {**W4_GPTQ, "observer": "weighted"}],
    "rotated W4 channel gptq weighted asymmetric": [
        ROTATE,
        {**W4_GPTQ, "observer": "weighted", "correction": "asymmetric"},
    ],
    "randomly rotated W4 channel rtn": [RANDOM, W4],
    "randomly rotated W4 channel gptq": [RANDOM, W4_GPTQ],
    "awq W4 channel rtn": [AWQ, W4],
    "awq W4 channel gptq": [AWQ, W4_GPTQ],
    "awq W4 g64 rtn": [AWQ, step("W4A16", 64)],
    "awq W4 g64 gptq weighted asymmetric": [
        AWQ,
        step("W4A16", 64, **GPTQ, observer="weighted", correction="asymmetric"),
    ],
    "awq W3 g64 rtn": [AWQ, W3],
    "awq W3 g64 gptq": [AWQ, step("W3A16", 64, **GPTQ)],
    "W8A8": [W8A8],
    "smoothquant W8A8": [{"method": "smoothquant"}, W8A8],
}
BUDGETS = {f"budget of W4 g64 {method}": method for method in ("rtn", "gptq", "autoround")}
"""Each layer in a format of its own, chosen by sensitivity for the bytes of W4 g64."""
BUDGET_WINDOWS = {"num_samples": 32, "length": 256}
"""Of the calibration text, for the sensitivities."""


SHOWN = ("kl_mean", "kl_p99", "top1_agreement", "ppl_reference", "ppl_candidate", "ppl_ratio", "bits_per_weight")


SETTINGS = ("kind", "model", "data", "calibration", "config")
"""What rows of one record have in common."""


def main() -> None:
    arguments = parser(__doc__, "compression.json")
    arguments.add_argument("--model", default="smollm2")
    arguments.add_argument("--calibration", type=Path, action="append", required=True, help="text, repeatable")
    arguments.add_argument("--data", type=Path, required=True, help="text that judges")
    arguments.add_argument("--num-samples", type=int, default=128)
    arguments.add_argument("--length", type=int, default=512)
    arguments.add_argument("--num-tokens", type=int, default=32768)
    arguments.add_argument("--window", type=int, default=512)
    arguments.add_argument("--seeds", default="0")
    arguments.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    arguments.add_argument("--sensitivity", default="fisher", choices=("fisher", "kl"), help="of the budgets")
    arguments.add_argument("--only", default="*", help="names of recipes, commas between; `*` stands for anything")
    given = arguments.parse_args()
    checkpoint = open_checkpoint(resolve_model(given.model))
    judging = encode_texts(read_texts(given.data), load_tokenizer(checkpoint.path))
    # float32 is what it says on a GPU too
    torch.backends.cuda.matmul.allow_tf32 = False
    rows = measured(given)
    reference = Reference(judged(given.model, given), data=given.data, num_tokens=given.num_tokens, window=given.window)
    seeds = [int(part) for part in given.seeds.split(",")]
    for name in [*RECIPES, *BUDGETS]:
        if not any(fnmatch(name, pattern) for pattern in given.only.split(",")):
            continue
        is_calibrated = name in BUDGETS or load_recipe({"steps": RECIPES[name]}).is_calibrated
        for seed in seeds if is_calibrated else seeds[:1]:
            if any((row["name"], row["seed"]) == (name, seed) for row in rows):
                continue
            how = {"num_samples": given.num_samples, "length": given.length, "seed": seed}
            for windows in (how, {**how, **BUDGET_WINDOWS}) if name in BUDGETS else (how,):
                found = calibration_set(given.calibration, checkpoint, **windows)
                shared = NgramFilter(found.token_ids).num_shared([judging])
                if shared:
                    sys.exit(f"error: {shared} runs of 13 tokens of {given.data} are in the calibration text")
            rows.append(one(given, reference, name, how))
            show(rows[-1])
            # after each row: an interruption keeps what was measured
            record.write_record(given.json, made(given, rows))
    write(given.json, made(given, rows))


def judged(model: str, given: Any) -> Model:
    """A model as it is judged: on a GPU in float32, on a CPU as the engine would serve it; the reference in float32."""
    if given.device == "cuda":
        return read_model(model, device="cuda", dtype="float32", kernels="reference")
    return read_model(model, device="cpu", dtype="float32" if model == given.model else "auto")


def measured(given: Any) -> list[dict[str, Any]]:
    """The rows that an earlier run with the same settings has left in the record."""
    if not given.json.is_file():
        return []
    earlier, now = json.loads(given.json.read_text()), made(given, [])
    return earlier["results"] if all(earlier.get(key) == now[key] for key in SETTINGS) else []


def made(given: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    config = {key: getattr(given, key) for key in ("num_samples", "length", "num_tokens", "device", "sensitivity")}
    calibration = [path.name for path in given.calibration]
    about = {"model": Path(given.model).name, "data": given.data.name, "calibration": calibration}
    return record.new_record("compression_methods", git=given.git, **about, config=config, results=rows)


def one(given: Any, reference: Reference, name: str, how: dict[str, Any]) -> dict[str, Any]:
    """Compress into a folder that is gone afterwards, and judge what stands there."""
    with tempfile.TemporaryDirectory() as folder:
        out, started = Path(folder) / "out", time.perf_counter()
        recipe = RECIPES[name] if name in RECIPES else budgeted(given, BUDGETS[name], how["seed"])
        steps = {"steps": recipe}
        report = compress(given.model, out, steps, calibration=given.calibration, device=given.device, **how)
        seconds = time.perf_counter() - started
        found = reference.compare(judged(str(out), given)).to_dict()
    own = {"name": name, "seed": how["seed"], "seconds": seconds, "recipe": recipe, "bytes": report.nbytes}
    return {**own, **{key: found[key] for key in SHOWN}, "intervals": found["intervals"]}


def budgeted(given: Any, method: str, seed: int) -> list[Step]:
    """The steps of a budget's recipe; it looks at fewer of the calibration's windows."""
    nbytes = plan_compression(given.model, {"steps": [step("W4A16", 64)]}).nbytes
    found = budget(
        given.model,
        Target(nbytes=nbytes),
        calibration=given.calibration,
        sensitivity=given.sensitivity,
        method=method,
        device=given.device,
        seed=seed,
        **BUDGET_WINDOWS,
    )
    return [one.to_dict() for one in found.recipe.steps]


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['name']:<28} seed {row['seed']}  KL {row['kl_mean']:.4f}  top-1 {row['top1_agreement']:.1%}  "
        f"perplexity x {row['ppl_ratio']:.4f}  {row['bits_per_weight']:.2f} bits  {row['seconds']:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
