"""Decode speed on this CPU beside transformers in float32, both measured in one run: only their ratios are claims.

Both sides: random prompt ids, greedy, end-of-text ignored, (time for n + 1 tokens - time for 1) / n, best of two, the
same thread count. The sides take turns for `--rounds` rounds and each keeps its best, as shared machines drift.
transformers reads the same weights, written once as a float32 safetensors folder.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common import parser, write

from powertrain.config import physical_cores
from powertrain.measure import record
from powertrain.measure.bench import bench_engine, random_prompts


def float32_folder(model: str, out: Path) -> Path:
    """The model's weights as a Hugging Face folder in float32."""
    import torch

    from powertrain.checkpoint.hub import resolve_model
    from powertrain.checkpoint.safetensors_folder import write_checkpoint
    from powertrain.checkpoint.source import iterate, open_checkpoint

    checkpoint = open_checkpoint(resolve_model(model))
    config = {key: value for key, value in checkpoint.config.items() if key not in ("dtype", "quantization_config")}
    config["torch_dtype"] = "float32"
    tensors = ((name, tensor.to(torch.float32)) for name, tensor in iterate(checkpoint))
    write_checkpoint(out, config, tensors, {})
    return out


def transformers_rows(folder: Path, batches: list[int], prompt: int, output: int, threads: int) -> list[dict[str, Any]]:
    """`batch, step_ms, output_tokens_per_s` of transformers' own generate loop with its own cache."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    source = random.Random(0)

    def seconds(batch: int, num_tokens: int) -> float:
        ids = torch.tensor(random_prompts(batch, prompt, model.config.vocab_size, source))
        options = {"do_sample": False, "min_new_tokens": num_tokens, "max_new_tokens": num_tokens}
        start = time.perf_counter()
        with torch.inference_mode():
            made = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
        assert made.shape[1] == prompt + num_tokens
        return time.perf_counter() - start

    seconds(1, 4)
    rows = []
    for batch in batches:
        first = min(seconds(batch, 1) for _ in range(2))
        step = (min(seconds(batch, output + 1) for _ in range(2)) - first) / output
        rows.append({"batch": batch, "step_ms": 1000 * step, "output_tokens_per_s": batch / step})
        print(f"transformers batch {batch}: {batch / step:.1f} tok/s")
    return rows


def best(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    return min(rows, key=lambda row: row["step_ms"])


def main() -> None:
    arguments = parser(__doc__, "cpu_decode.json")
    arguments.add_argument("--model", default="smollm2")
    arguments.add_argument("--batch", default="1,4,8,16")
    arguments.add_argument("--prompt", type=int, default=128)
    arguments.add_argument("--output", type=int, default=64)
    arguments.add_argument("--threads", type=int, default=physical_cores())
    arguments.add_argument("--rounds", type=int, default=3)
    given = arguments.parse_args()
    batches = [int(part) for part in given.batch.split(",")]
    ours: list[dict[str, Any]] = []
    theirs: list[list[dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as folder:
        source = float32_folder(given.model, Path(folder) / "model")
        shape = {"batches": batches, "prompt": given.prompt, "output": given.output}
        for _ in range(given.rounds):
            ours.append(bench_engine(source, threads=given.threads, device="cpu", **shape))
            theirs.append(transformers_rows(source, batches, given.prompt, given.output, given.threads))
    engine_rows = [best(made["results"][at] for made in ours) for at in range(len(batches))]
    other_rows = [best(rows[at] for rows in theirs) for at in range(len(batches))]
    results = []
    single = engine_rows[0]["output_tokens_per_s"]
    for engine, other in zip(engine_rows, other_rows, strict=True):
        rate = engine["output_tokens_per_s"]
        row = {"batch": engine["batch"], "prompt": given.prompt, "output": given.output, "engine_tokens_per_s": rate}
        row["transformers_tokens_per_s"] = other["output_tokens_per_s"]
        row["over_transformers"] = rate / other["output_tokens_per_s"]
        row["over_first_batch"] = rate / single
        row["fraction_of_floor"] = engine["fraction"]
        results.append(row)
        print(
            f"batch {row['batch']:>3}: engine {rate:.1f} tok/s, {row['over_transformers']:.2f} × transformers, "
            f"{row['over_first_batch']:.2f} × batch {batches[0]}, {row['fraction_of_floor']:.0%} of floor"
        )
    import transformers

    made = record.new_record(
        "cpu_decode",
        git=given.git,
        model=given.model,
        threads=given.threads,
        transformers=transformers.__version__,
        rounds=given.rounds,
        ceilings=[made["ceilings"] for made in ours],
        results=results,
    )
    write(given.json, made)


if __name__ == "__main__":
    main()
