"""`bench engine` with random weights of a known model's shape on one GPU, one record a weight format.

Needs torch, numpy, safetensors and tokenizers only; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import torch

from powertrain.measure import record
from powertrain.measure.bench import FORMATS, bench_engine, text_table

SHAPES = Path(__file__).resolve().parent / "shapes"


def record_name(given: argparse.Namespace, weights: str) -> str:
    """`gpu_engine_SHAPE_FORMAT`, and what differs from the usual run."""
    parts = ["gpu_engine", given.shape, weights]
    parts += [f"{given.kv_cache_dtype}-kv"] if given.kv_cache_dtype != "auto" else []
    parts += ["deterministic"] if given.deterministic else []
    parts += [f"{given.prompt}-prompts"] if given.prompt != 1024 else []
    return "_".join(parts)


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    arguments.add_argument("--shape", default="llama-3.1-8b", choices=sorted(path.name for path in SHAPES.iterdir()))
    arguments.add_argument("--formats", default="none", help=f"of {', '.join(FORMATS)}, separated by commas")
    arguments.add_argument("--batch", default="1,8,32,64,128,256")
    arguments.add_argument("--prompt", type=int, default=1024, help="tokens; 8192 with --batch 1 for long prompts")
    arguments.add_argument("--output", type=int, default=128)
    arguments.add_argument("--mixed", type=int, default=256)
    arguments.add_argument("--kv-cache-dtype", default="auto")
    arguments.add_argument("--deterministic", action="store_true")
    arguments.add_argument("--max-num-batched-tokens", type=int, default=8192)
    arguments.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "docs" / "results")
    arguments.add_argument("--git", help="commit to record where git is missing")
    given = arguments.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    # what a start is made of
    logging.basicConfig(format="%(message)s")
    logging.getLogger("powertrain.engine.gpu_runner").setLevel(logging.INFO)
    for weights in given.formats.split(","):
        made = bench_engine(
            SHAPES / given.shape,
            random_weights=True,
            format=weights,
            batches=[int(part) for part in given.batch.split(",")],
            prompt=given.prompt,
            output=given.output,
            mixed=given.mixed,
            device="cuda",
            git=given.git,
            engine_options={
                "max_num_batched_tokens": given.max_num_batched_tokens,
                "kv_cache_dtype": given.kv_cache_dtype,
                "deterministic": given.deterministic,
            },
        )
        print(text_table(made), flush=True)
        record.write_record(given.out / f"{record_name(given, weights)}.json", made)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
