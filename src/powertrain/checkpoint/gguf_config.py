"""GGUF metadata to the keys of a Hugging Face `config.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from powertrain.types import ModelFileError

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
DEFAULT_ROPE_THETA = 10000.0
Shapes = Mapping[str, tuple[int, ...]]


def config_from_metadata(metadata: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """`metadata` in Hugging Face words; `shapes` are those of the file's tensors, in GGUF names.

    llama.cpp calls Mistral's files "llama" too; one with a sliding window comes out as "mistral". Raises
    `ModelFileError` naming the key (not the file, which is not known here).
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise ModelFileError(f"architecture {architecture!r} cannot be run; these can: {', '.join(ARCHITECTURES)}")
    keys = _Keys(metadata, architecture)
    hidden_size = keys.count("embedding_length")
    num_heads = keys.count("attention.head_count")
    head_dim = keys.count("attention.key_length", default=max(1, hidden_size // num_heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.count(key, default=head_dim) != head_dim:
            raise ModelFileError(f"{architecture}.{key} differs from the head size {head_dim}, which cannot be run")
    window = keys.count("attention.sliding_window", default=0)
    is_mistral = architecture == "llama" and window > 0
    return {
        "model_type": "mistral" if is_mistral else architecture,
        "architectures": ["MistralForCausalLM" if is_mistral else ARCHITECTURES[architecture]],
        "hidden_size": hidden_size,
        "intermediate_size": keys.count("feed_forward_length"),
        "num_hidden_layers": keys.count("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": keys.count("attention.head_count_kv", default=num_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "vocab_size": _vocab_size(keys, shapes),
        "max_position_embeddings": keys.count("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon", default=1e-6),
        "rope_theta": keys.number("rope.freq_base", default=DEFAULT_ROPE_THETA),
        "rope_scaling": _rope_scaling(keys),
        "sliding_window": window or None,
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "torch_dtype": "float32",
    }


def generation_config_from_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """All the ids that end a turn, as `eos_token_id`: chat models have several."""
    keys = ("eos", "eot", "eom")
    ids = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in keys]
    ends = list(dict.fromkeys(token_id for token_id in ids if isinstance(token_id, int)))
    return {"eos_token_id": ends} if ends else {}


class _Keys:
    """The architecture's own keys, checked for kind and range."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str) -> None:
        self.metadata = metadata
        self.architecture = architecture

    def get(self, key: str) -> Any:
        return self.metadata.get(f"{self.architecture}.{key}")

    def count(self, key: str, default: int | None = None) -> int:
        """A size: an integer in [1, 2^31). A list, one per layer, will do if all are equal."""
        value = self.get(key)
        if isinstance(value, list) and len(set(map(str, value))) == 1:
            value = value[0]
        if value is None and default is not None:
            return default
        is_count = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31
        if not is_count:
            problem = "is missing" if value is None else f"is {str(value)[:40]}, not a size"
            raise ModelFileError(f"{self.architecture}.{key} {problem}")
        return int(value)

    def number(self, key: str, default: float) -> float:
        """A positive finite float. The file holds float32, so 1e-5 arrives as 9.99999975e-06: that is undone."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, (int, float)) or not math.isfinite(value) or not value > 0:
            raise ModelFileError(f"{self.architecture}.{key} is {str(value)[:40]}, not a positive number")
        return float(f"{value:.7g}")


def _vocab_size(keys: _Keys, shapes: Shapes) -> int:
    embedding = shapes.get("token_embd.weight")
    if embedding is not None and len(embedding) == 2:
        return embedding[0]
    tokens = keys.metadata.get("tokenizer.ggml.tokens")
    return len(tokens) if isinstance(tokens, list) and tokens else keys.count("vocab_size")


def _rope_scaling(keys: _Keys) -> dict[str, Any] | None:
    kind = keys.get("rope.scaling.type")
    if kind in (None, "none"):
        return None
    if not isinstance(kind, str):
        raise ModelFileError(f"{keys.architecture}.rope.scaling.type is not a name")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": keys.number("rope.scaling.factor", default=1.0)}
    original = keys.count("rope.scaling.original_context_length", default=0)
    if original:
        scaling["original_max_position_embeddings"] = original
    return scaling
