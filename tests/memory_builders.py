"""Models whose size is chosen, and the most memory that compressing one takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file


def build_many_layers(
    out: Path, num_layers: int, *, hidden: int = 256, inner: int = 768, vocab: int = 512, dtype: str = "float32"
) -> Path:
    """A random Llama of `num_layers` equal blocks, in shards of 4 blocks, without a tokenizer."""
    generator = torch.Generator().manual_seed(0)
    heads, kv_heads, head_dim = hidden // 32, hidden // 64, 32
    shapes = {
        "self_attn.q_proj": (heads * head_dim, hidden),
        "self_attn.k_proj": (kv_heads * head_dim, hidden),
        "self_attn.v_proj": (kv_heads * head_dim, hidden),
        "self_attn.o_proj": (hidden, heads * head_dim),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * columns**-0.5).to(getattr(torch, dtype))

    ones = torch.ones(hidden, dtype=getattr(torch, dtype))
    tensors = {"model.embed_tokens.weight": matrix(vocab, hidden), "model.norm.weight": ones}
    out.mkdir(parents=True)
    places: dict[str, str] = {}

    def write(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, out / file)
        places.update(dict.fromkeys(tensors, file))

    write("model-rest.safetensors", tensors)
    for first in range(0, num_layers, 4):
        tensors = {}
        for index in range(first, min(first + 4, num_layers)):
            prefix = f"model.layers.{index}"
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}.{norm}.weight"] = ones.clone()
            tensors |= {f"{prefix}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        write(f"model-{first}.safetensors", tensors)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
    }
    (out / "config.json").write_text(json.dumps(config))
    return out


MEASURE = """
import json, sys, threading, time
import torch
from powertrain.compress import compress

torch.set_num_threads(1)

def held():
    # anonymous pages: neither mapped files, whose pages the system can drop, nor the page cache
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

model, warm_up, out, options = *sys.argv[1:], json.load(sys.stdin)
compress(warm_up, out, **options, overwrite=True)  # what torch and Python hold once they have worked
before, seen, along = held(), [], []
done = threading.Event()

def watch():
    while not done.is_set():
        seen.append(held())
        time.sleep(0.003)

watcher = threading.Thread(target=watch)
watcher.start()
compress(model, out, **options, overwrite=True, progress=lambda *_: along.append(held()))
done.set()
watcher.join()
print(json.dumps({"peak": max(seen + along) - before, "along": [value - before for value in along]}))
"""


class Held(NamedTuple):
    """Bytes beside those that a smaller model had left: the most that was seen, and after each tensor."""

    peak: int
    along: list[int]


def held_by_compress(model: Path, warm_up: Path, out: Path, **options: Any) -> Held:
    """What `compress` takes of `model`, after one of the model `warm_up`, in a process of its own.

    Whatever is freed is given back at once (glibc's threshold is held low), so that the bytes are those in use.
    """
    malloc = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(model), str(warm_up), str(out)],
        input=json.dumps(options),
        capture_output=True,
        text=True,
        env={**os.environ, **malloc},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return Held(**json.loads(done.stdout))
