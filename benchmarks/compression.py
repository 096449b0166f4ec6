"""What each way of compressing costs a real model: KL, perplexity and size, on the checkpoint read back from disk.

Calibrated methods run once a seed. The reference is the model as it is given, dequantized to float32: for the default
model that is a file of 4-bit blocks, so nothing here is a loss against the model that was trained. The text that judges
must share no run of 13 tokens with the text that calibrates.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import parser, write

from powertrain.checkpoint.hub import resolve_model
from powertrain.checkpoint.source import open_checkpoint
from powertrain.checkpoint.tokenizer_files import load_tokenizer
from powertrain.compress.calibrate import NgramFilter, calibration_set
from powertrain.compress.driver import compress
from powertrain.compress.recipe import load_recipe
from powertrain.measure import record
from powertrain.measure.evaluate import Reference, evaluate
from powertrain.text_data import encode_texts, read_texts

Step = dict[str, Any]


def step(scheme: str, group_size: int | str, **options: Any) -> Step:
    return {"match": "Linear", "scheme": scheme, "group_size": group_size, **options}


GPTQ: Step = {"method": "gptq"}
MSE: Step = {"observer": "mse"}
ROTATE: Step = {"method": "rotate"}
RANDOM: Step = {"method": "rotate", "kind": "random"}
AWQ: Step = {"method": "awq"}
W4: Step = step("W4A16", "channel")
W4_MSE: Step = step("W4A16", "channel", **MSE)
W4_GPTQ: Step = step("W4A16", "channel", **GPTQ)
W3: Step = step("W3A16", 64)
W8A8: Step = {"match": "Linear", "scheme": "W8A8"}
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
            ("gptq asymmetric", {**GPTQ, "correction": "asymmetric"}),
        )
    },
    "FP8": [{"match": "Linear", "scheme": "FP8_DYNAMIC"}],
    "NVFP4": [{"match": "Linear", "scheme": "NVFP4A16"}],
    "NVFP4 mse": [{"match": "Linear", "scheme": "NVFP4A16", **MSE}],
    "MXFP4": [{"match": "Linear", "scheme": "MXFP4A16"}],
    "MXFP4 mse": [{"match": "Linear", "scheme": "MXFP4A16", **MSE}],
    "rotated W4 channel rtn": [ROTATE, W4],
    "rotated W4 channel rtn mse": [ROTATE, W4_MSE],
    "rotated W4 channel gptq": [ROTATE, W4_GPTQ],
    "randomly rotated W4 channel rtn": [RANDOM, W4],
    "randomly rotated W4 channel gptq": [RANDOM, W4_GPTQ],
    "awq W4 channel rtn": [AWQ, W4],
    "awq W4 channel gptq": [AWQ, W4_GPTQ],
    "awq W4 g64 rtn": [AWQ, step("W4A16", 64)],
    "awq W3 g64 rtn": [AWQ, W3],
    "awq W3 g64 gptq": [AWQ, step("W3A16", 64, **GPTQ)],
    "W8A8": [W8A8],
    "smoothquant W8A8": [{"method": "smoothquant"}, W8A8],
}
SHOWN = ("kl_mean", "kl_p99", "top1_agreement", "ppl_reference", "ppl_candidate", "ppl_ratio", "bits_per_weight")


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
    arguments.add_argument("--only", default="", help="recipes whose names contain one of these, after commas")
    given = arguments.parse_args()
    checkpoint = open_checkpoint(resolve_model(given.model))
    judging = encode_texts(read_texts(given.data), load_tokenizer(checkpoint.path))
    reference = Reference(given.model, data=given.data, num_tokens=given.num_tokens, window=given.window)
    rows: list[dict[str, Any]] = []
    for name, recipe in RECIPES.items():
        if not any(part in name for part in given.only.split(",")):
            continue
        for seed in [int(part) for part in given.seeds.split(",")]:
            if not load_recipe({"steps": recipe}).is_calibrated and seed != int(given.seeds.split(",")[0]):
                continue
            how = {"num_samples": given.num_samples, "length": given.length, "seed": seed}
            shared = NgramFilter(calibration_set(given.calibration, checkpoint, **how).token_ids).num_shared([judging])
            if shared:
                sys.exit(f"error: {shared} runs of 13 tokens of {given.data} are in the calibration text")
            rows.append(one(given, reference, name, recipe, how))
            show(rows[-1])
            # after each row: an interruption keeps what was measured
            record.write_record(given.json, made(given, rows))
    write(given.json, made(given, rows))


def made(given: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    config = {"num_samples": given.num_samples, "length": given.length, "num_tokens": given.num_tokens}
    about = {"model": given.model, "data": given.data.name, "calibration": [path.name for path in given.calibration]}
    return record.new_record("compression_methods", git=given.git, **about, config=config, results=rows)


def one(given: Any, reference: Reference, name: str, recipe: list[Step], how: dict[str, Any]) -> dict[str, Any]:
    """Compress into a folder that is gone afterwards, and judge what stands there."""
    with tempfile.TemporaryDirectory() as folder:
        out, started = Path(folder) / "out", time.perf_counter()
        report = compress(given.model, out, {"steps": recipe}, calibration=given.calibration, **how)
        seconds = time.perf_counter() - started
        found = evaluate(str(out), reference).to_dict()
    own = {"name": name, "seed": how["seed"], "seconds": seconds, "recipe": recipe, "bytes": report.nbytes}
    return {**own, **{key: found[key] for key in SHOWN}, "intervals": found["intervals"]}


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['name']:<28} seed {row['seed']}  KL {row['kl_mean']:.4f}  top-1 {row['top1_agreement']:.1%}  "
        f"perplexity x {row['ppl_ratio']:.4f}  {row['bits_per_weight']:.2f} bits  {row['seconds']:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
