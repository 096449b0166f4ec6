"""Makes the small model folders of the fixtures, with transformers and tokenizers: other people's writers."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

FAMILIES = ("llama", "llama3", "mistral", "qwen2", "qwen3")
TINY_VOCAB = 320
TINY_LENGTH = 512

TINY_TEXT = (
    "Once upon a time there was a small engine that lived in a red barn near the river. "
    "Every morning it asked the sun: how far can I go today? The sun said nothing, and the engine went anyway. "
    "It pulled three carts of apples, two carts of stones and one cart of letters from town to town. "
    'When the rain came it said, "I will wait," and when the rain left it said, "I will run." '
    "Numbers: 0 1 2 3 4 5 6 7 8 9 10 11 12 100 2024. Words like café, naïve and 東京 are written there too."
)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tiny_model(family: str, out: Path) -> Path:
    """A two or three layer model of `family`, seeded, with logits far from flat, saved by transformers itself."""
    import transformers

    common: dict[str, Any] = {
        "vocab_size": TINY_VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": TINY_LENGTH,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    scaled_rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    per_family: dict[str, tuple[str, dict[str, Any]]] = {
        "llama": ("Llama", {"tie_word_embeddings": True}),
        "llama3": ("Llama", {"tie_word_embeddings": False, "rope_parameters": scaled_rope}),
        "mistral": ("Mistral", {"tie_word_embeddings": False, "sliding_window": 24, "num_hidden_layers": 3}),
        "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
        "qwen3": ("Qwen3", {"tie_word_embeddings": False, "head_dim": 32}),
    }
    name, own = per_family[family]
    config = getattr(transformers, f"{name}Config")(**{**common, **own})
    torch.manual_seed(FAMILIES.index(family))
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(torch.float32).eval()
    with torch.no_grad():
        for tensor_name, tensor in model.named_parameters():
            if tensor_name.endswith("bias"):
                tensor.normal_(0.0, 0.1)  # transformers starts them at zero, which would hide a missing bias
            elif tensor.dim() == 1:
                tensor.uniform_(0.5, 1.5)  # likewise norms start at one
    model.save_pretrained(out)
    write_tiny_tokenizer(out)
    return out


def write_tiny_tokenizer(out: Path) -> None:
    """A byte-level BPE of 320 entries: ids 0 `<s>`, 1 `</s>`, 2-4 the chat roles; any text can be encoded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_VOCAB,
        special_tokens=["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TINY_TEXT] * 4, trainer)
    assert tokenizer.get_vocab_size() == TINY_VOCAB
    tokenizer.save(str(out / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_bos_token": False,
        "model_max_length": TINY_LENGTH,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2))


def build_stories260k(source: Path, out: Path) -> Path:
    """The llama2.c files of `source` as a Hugging Face folder: same numbers, q/k rows in half-split rope order."""
    from safetensors.torch import save_file

    data = (source / "stories260K.bin").read_bytes()
    hidden, intermediate, layers, heads, kv_heads, vocab, length = struct.unpack_from("<7i", data)
    floats = iter_arrays(np.frombuffer(data, "<f4", offset=28))
    head_dim = hidden // heads
    norm, matrix = (hidden,), (hidden, hidden)
    kv = (kv_heads * head_dim, hidden)
    tensors = {"model.embed_tokens.weight": floats((vocab, hidden))}
    per_layer = [
        ("input_layernorm", norm),
        ("self_attn.q_proj", matrix),
        ("self_attn.k_proj", kv),
        ("self_attn.v_proj", kv),
        ("self_attn.o_proj", matrix),
        ("post_attention_layernorm", norm),
        ("mlp.gate_proj", (intermediate, hidden)),
        ("mlp.down_proj", (hidden, intermediate)),
        ("mlp.up_proj", (intermediate, hidden)),
    ]
    for name, shape in per_layer:
        stack = floats((layers, *shape))
        for layer in range(layers):
            weight = stack[layer]
            if name.endswith(("q_proj", "k_proj")):
                weight = split_halves(weight, head_dim)
            tensors[f"model.layers.{layer}.{name}.weight"] = weight
    tensors["model.norm.weight"] = floats(norm)
    save_file({name: torch.from_numpy(array.copy()) for name, array in tensors.items()}, out / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "max_position_embeddings": length,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    (out / "config.json").write_text(json.dumps(config, indent=2))
    write_stories_tokenizer((source / "tok512.bin").read_bytes(), vocab, out)
    return out


def iter_arrays(floats: np.ndarray) -> Any:
    """`take(shape)`: the next array of that shape from a flat run of floats."""
    position = 0

    def take(shape: tuple[int, ...]) -> np.ndarray:
        nonlocal position
        count = int(np.prod(shape))
        position += count
        return floats[position - count : position].reshape(shape)

    return take


def split_halves(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorders rows [heads * head_dim, in] from rope over adjacent pairs to rope over the two halves of a head."""
    rows, columns = weight.shape
    pairs = weight.reshape(rows // head_dim, head_dim // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def write_stories_tokenizer(data: bytes, vocab_size: int, out: Path) -> None:
    """SentencePiece-like BPE: a leading space, bytes for unknown characters, merges ordered by the pieces' scores."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    scores = [0.0] * len(pieces)
    for index, (score, piece) in enumerate(iter_pieces(data, vocab_size)):
        if index >= len(scores):
            pieces.append(piece.decode().replace(" ", "▁"))
            scores.append(score)
    ids = {piece: index for index, piece in enumerate(pieces)}
    merges = [
        (-scores[index], cut, (piece[:cut], piece[cut:]))
        for index, piece in enumerate(pieces)
        if index > 258
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    merges.sort()
    bpe = models.BPE(ids, [pair for _, _, pair in merges], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in pieces[:3]])
    tokenizer.save(str(out / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "model_max_length": 512,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2))


def iter_pieces(data: bytes, vocab_size: int) -> Iterator[tuple[float, bytes]]:
    """(score, bytes) of each record of llama2.c's tokenizer file."""
    position = 4
    for _ in range(vocab_size):
        score, length = struct.unpack_from("<fi", data, position)
        position += 8
        yield score, data[position : position + length]
        position += length
