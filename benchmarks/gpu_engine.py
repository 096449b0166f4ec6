"""`bench engine` with random weights of a Llama-3.1-8B shape on one GPU, in each weight format, one record a format.

Needs torch, numpy, safetensors and tokenizers only. The shape is written to a temporary folder; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from powertrain.measure import record
from powertrain.measure.bench import FORMATS, bench_engine, text_table

SHAPES: dict[str, dict[str, Any]] = {
    "llama8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    },
    "qwen06b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    },
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    arguments.add_argument("--shape", default="llama8b", choices=sorted(SHAPES))
    arguments.add_argument("--formats", default="none", help=f"of {', '.join(FORMATS)}, separated by commas")
    arguments.add_argument("--batch", default="1,8,32,64,128,256")
    arguments.add_argument("--prompt", type=int, default=1024)
    arguments.add_argument("--output", type=int, default=128)
    arguments.add_argument("--mixed", type=int, default=256)
    arguments.add_argument("--max-num-batched-tokens", type=int, default=8192)
    arguments.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "docs" / "results")
    arguments.add_argument("--git", help="commit to record where git is missing")
    given = arguments.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    with tempfile.TemporaryDirectory() as folder:
        shape = Path(folder) / given.shape
        shape.mkdir()
        (shape / "config.json").write_text(json.dumps(SHAPES[given.shape]))
        for weights in given.formats.split(","):
            made = bench_engine(
                shape,
                random_weights=True,
                format=weights,
                batches=[int(part) for part in given.batch.split(",")],
                prompt=given.prompt,
                output=given.output,
                mixed=given.mixed,
                device="cuda",
                git=given.git,
                engine_options={"max_num_batched_tokens": given.max_num_batched_tokens},
            )
            print(text_table(made), flush=True)
            record.write_record(given.out / f"gpu_{given.shape}_{weights}.json", made)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
