"""From a checkpoint on disk, or from nothing but a config, to a running decoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from powertrain.checkpoint.compressed_tensors import load_int_weight, scheme_of
from powertrain.checkpoint.source import Checkpoint
from powertrain.model.decoder import Decoder
from powertrain.model.families import ModelConfig, model_config
from powertrain.model.layers import Attention, Block, GatedMLP, Linear, RMSNorm, Rope
from powertrain.model.weights import (
    Dense,
    IntWeight,
    WeightFormat,
    concat_int_weights,
    pack_int_weight,
)
from powertrain.types import ModelFileError, QuantScheme

RandomFormat = Literal["none", "int8", "int4"]
Matrices = Callable[[list[str]], list[WeightFormat]]
Vectors = Callable[[str, int], torch.Tensor]


def load_model(
    checkpoint: Checkpoint,
    device: torch.device | str,
    dtype: torch.dtype,
    max_position: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Decoder:
    """Load every tensor onto `device`; dense ones become `dtype`, quantized ones keep their integers.

    `max_position` limits the rotary tables. Raises `ModelFileError` naming a tensor that is absent or of another
    shape than the config says.
    """
    device = torch.device(device)
    config = model_config(checkpoint.config)
    present = set(checkpoint.names())
    shapes = _linear_shapes(config)

    def dense(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name not in present:
            raise ModelFileError(f"{checkpoint.path}: tensor {name} is missing")
        tensor = checkpoint.load(name)
        if tuple(tensor.shape) != shape:
            raise ModelFileError(f"{checkpoint.path}: {name} has shape {list(tensor.shape)}, expected {list(shape)}")
        return tensor.to(device=device, dtype=dtype)

    def matrices(layers: list[str]) -> list[WeightFormat]:
        schemes = [scheme_of(checkpoint.config, layer) for layer in layers]
        scheme = schemes[0]
        if any(other != scheme for other in schemes):
            return [fmt for layer in layers for fmt in matrices([layer])]
        if scheme is None:
            weights = [dense(f"{layer}.weight", shapes[layer]) for layer in layers]
            return [Dense.pack(weights[0] if len(weights) == 1 else torch.cat(weights), device, dtype)]
        ints = [_int_weight(checkpoint, layer, scheme, shapes[layer]) for layer in layers]
        return [pack_int_weight(concat_int_weights(ints), device)]

    def vector(name: str, size: int) -> torch.Tensor:
        return dense(name, (size,))

    embedding = dense("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
    has_own_head = bool({"lm_head.weight", "lm_head.weight_packed"} & present)
    if not has_own_head and not config.ties_embeddings:
        raise ModelFileError(f"{checkpoint.path}: tensor lm_head.weight is missing and the embeddings are not tied")
    head: list[WeightFormat] = [Dense(embedding)] if config.ties_embeddings else matrices(["lm_head"])
    return _assemble(config, matrices, vector, embedding, head, max_position, on_progress)


def _linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    shapes = {
        f"model.layers.{index}.{name}": shape
        for index in range(config.num_layers)
        for name, shape in config.linear_shapes().items()
    }
    return shapes | {"lm_head": (config.vocab_size, config.hidden_size)}


def _int_weight(checkpoint: Checkpoint, layer: str, scheme: QuantScheme, shape: tuple[int, int]) -> IntWeight:
    weight = load_int_weight(checkpoint, layer, scheme)
    if tuple(weight.values.shape) != shape:
        raise ModelFileError(
            f"{checkpoint.path}: {layer} has shape {list(weight.values.shape)}, expected {list(shape)}"
        )
    return weight


def _assemble(
    config: ModelConfig,
    matrices: Matrices,
    vector: Vectors,
    embedding: torch.Tensor,
    head: list[WeightFormat],
    max_position: int | None,
    on_progress: Callable[[int, int], None] | None,
) -> Decoder:
    """The decoder from its tensors' sources; both a checkpoint and random numbers come through here."""

    shapes = _linear_shapes(config)

    def norm(name: str, size: int) -> RMSNorm:
        return RMSNorm(vector(f"{name}.weight", size), config.rms_norm_eps)

    def linear(prefix: str, names: list[str], has_bias: bool) -> Linear:
        layers = [f"{prefix}.{name}" for name in names]
        bias = torch.cat([vector(f"{layer}.bias", shapes[layer][0]) for layer in layers]) if has_bias else None
        return Linear(matrices(layers), bias)

    def block(index: int) -> Block:
        layer = f"model.layers.{index}"
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        return Block(
            attention_norm=norm(f"{layer}.input_layernorm", config.hidden_size),
            attention=Attention(
                qkv=linear(attention, ["q_proj", "k_proj", "v_proj"], config.has_qkv_bias),
                output=linear(attention, ["o_proj"], config.has_output_bias),
                query_norm=norm(f"{attention}.q_norm", config.head_dim) if config.has_qk_norm else None,
                key_norm=norm(f"{attention}.k_norm", config.head_dim) if config.has_qk_norm else None,
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                window=config.windows[index],
            ),
            mlp_norm=norm(f"{layer}.post_attention_layernorm", config.hidden_size),
            mlp=GatedMLP(
                gate_up=linear(mlp, ["gate_proj", "up_proj"], config.has_mlp_bias),
                down=linear(mlp, ["down_proj"], config.has_mlp_bias),
            ),
        )

    blocks = []
    for index in range(config.num_layers):
        blocks.append(block(index))
        if on_progress is not None:
            on_progress(index + 1, config.num_layers)
    final = norm("model.norm", config.hidden_size)
    rope = Rope(config, min(max_position or config.max_position, config.max_position), *_place(final))
    return Decoder(config, embedding, blocks, final, Linear(head), rope)


def _place(norm: RMSNorm) -> tuple[torch.device, torch.dtype]:
    return norm.weight.device, norm.weight.dtype


def random_model(
    folder: str | Path,
    device: torch.device | str,
    dtype: torch.dtype,
    weight_format: RandomFormat = "none",
    seed: int = 0,
    max_position: int | None = None,
) -> Decoder:
    """A decoder of a config's shape with random weights drawn on the device (for speed measurements, never zeros).

    `folder` holds a Hugging Face `config.json`. `weight_format` is that of the linear layers; the head stays dense.
    """
    path = Path(folder) / "config.json" if Path(folder).is_dir() else Path(folder)
    try:
        config = model_config(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path}: {error}") from None
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(seed)
    shapes = _linear_shapes(config)

    def normal(rows: int, cols: int) -> torch.Tensor:
        weight = torch.empty(rows, cols, device=device, dtype=dtype)
        return weight.normal_(0.0, cols**-0.5, generator=generator)

    def matrices(layers: list[str]) -> list[WeightFormat]:
        rows, cols = sum(shapes[layer][0] for layer in layers), shapes[layers[0]][1]
        if weight_format == "none":
            return [Dense.pack(normal(rows, cols), device, dtype)]
        return [pack_int_weight(_random_ints(rows, cols, weight_format, generator), device)]

    def vector(name: str, size: int) -> torch.Tensor:
        is_norm = name.endswith("norm.weight")
        return torch.full((size,), 1.0 if is_norm else 0.01, device=device, dtype=dtype)

    embedding = normal(config.vocab_size, config.hidden_size)
    head = embedding if config.ties_embeddings else normal(config.vocab_size, config.hidden_size)
    return _assemble(config, matrices, vector, embedding, [Dense(head)], max_position, None)


def _random_ints(rows: int, cols: int, weight_format: RandomFormat, generator: torch.Generator) -> IntWeight:
    num_bits = 8 if weight_format == "int8" else 4
    group_size = cols if num_bits == 8 else next(size for size in (128, 64, 32, cols) if cols % size == 0)
    low, high = -(2 ** (num_bits - 1)), 2 ** (num_bits - 1)
    values = torch.randint(low, high, (rows, cols), dtype=torch.int8, device=generator.device, generator=generator)
    scale = torch.full((rows, cols // group_size), cols**-0.5 / (high / 2), device=generator.device)
    return IntWeight(values, scale, None, num_bits)
