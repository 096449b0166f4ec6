"""From a checkpoint on disk, or from nothing but a config, to a running decoder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch

from powertrain.checkpoint.gguf import GGUFCheckpoint
from powertrain.checkpoint.kv_cache import stored_cache_dtype
from powertrain.checkpoint.packed_cache import Stream, packed_streams
from powertrain.checkpoint.quantization_config import HEAD
from powertrain.checkpoint.quantized import load_quantized, running_formats
from powertrain.checkpoint.source import Checkpoint
from powertrain.config import NATIVE_BLOCK_SIZE, EngineConfig
from powertrain.kernels import gpu_provider, native
from powertrain.kernels.rounding import quantize_to_float8
from powertrain.model.decoder import Decoder
from powertrain.model.families import ModelConfig, model_config
from powertrain.model.float4 import Float4Weight
from powertrain.model.float8 import Float8, Float8Weight
from powertrain.model.gpu_memory import must_fit
from powertrain.model.gpu_weights import Int4Blocked
from powertrain.model.layers import Attention, Block, GatedMLP, Linear, RMSNorm, Rope
from powertrain.model.packed import FLOATS, GGUF_FLOATS, GGUF_GRIDS, PackedMatrix, Part, can_stack, gguf_part, int_part
from powertrain.model.packed import pack as pack_stream
from powertrain.model.quantized_input import QuantizedInput
from powertrain.model.reordered_input import ReorderedInput
from powertrain.model.weights import Dense, Int8Channel, IntWeight, WeightFormat, pack_int_weight
from powertrain.types import ModelFileError, PowertrainError

EMBEDDING = "model.embed_tokens"
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OUTPUT = ("self_attn.o_proj",)
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
DOWN = ("mlp.down_proj",)
PRODUCTS = (QKV, OUTPUT, GATE_UP, DOWN)
"""The layers of a block, as they are multiplied together."""

_WEIGHTS_FIT = must_fit(
    "the weights",
    "take a smaller model or format (`powertrain compress --recipe W4A16`, --dtype bfloat16), or end what else holds "
    "the GPU's memory",
)

RandomFormat = Literal["none", "int8", "int4", "fp8"]
Progress = Callable[[int, int], None]
"""Called with (layers done, layers in all)."""

Matrices = Callable[[list[str]], Sequence[WeightFormat]]
Vectors = Callable[[str, int], torch.Tensor]


@_WEIGHTS_FIT
def load_decoder(checkpoint: Checkpoint, config: EngineConfig, on_progress: Progress | None = None) -> Decoder:
    """The decoder a resolved `config` asks for: on the native kernels where they shall and can run, else `load_model`.

    Native weights are packed once and mapped from a cache file afterwards. Its caches are of the type that the
    checkpoint asks for, if `config` leaves it open. Raises `ModelFileError` for an unreadable model and
    `PowertrainError` where `kernels` is "native" but they are not there.
    """
    decoder = _load_decoder(checkpoint, config, on_progress)
    if config.cache.kv_cache_dtype != "auto":
        return decoder
    return decoder.with_kv_cache_dtype(stored_cache_dtype(checkpoint, has_float8=decoder.kernels != "native"))


def _load_decoder(checkpoint: Checkpoint, config: EngineConfig, on_progress: Progress | None) -> Decoder:
    model = model_config(checkpoint.config)
    module = _native_module(config, model)
    if module is None:
        dtype = getattr(torch, config.dtype)
        loaded = load_model(checkpoint, config.device, dtype, config.max_model_len, on_progress)
        return _on_gpu_kernels(loaded, config)
    _check_head(checkpoint, model)
    products = _product_streams(checkpoint, model, on_progress)
    vector = _dense_reader(checkpoint, torch.device("cpu"), torch.float32)
    decoder = _native_decoder(model, config, module, products, lambda name, size: vector(name, (size,)))
    if on_progress is not None:
        on_progress(model.num_layers, model.num_layers)
    return decoder


def load_model(
    checkpoint: Checkpoint,
    device: torch.device | str,
    dtype: torch.dtype,
    max_position: int | None = None,
    on_progress: Progress | None = None,
) -> Decoder:
    """Load every tensor onto `device`; dense ones become `dtype`, quantized ones keep their integers.

    `max_position` limits the rotary tables. Raises `ModelFileError` naming a tensor that is absent or of another
    shape than the config says.
    """
    device = torch.device(device)
    config = model_config(checkpoint.config)
    _check_head(checkpoint, config)
    shapes = _linear_shapes(config)
    dense = _dense_reader(checkpoint, device, dtype)

    def plain(layers: list[str]) -> Dense:
        weights = [dense(f"{layer}.weight", shapes[layer]) for layer in layers]
        return Dense.pack(weights[0] if len(weights) == 1 else torch.cat(weights), device, dtype)

    def matrices(layers: list[str]) -> list[WeightFormat]:
        loaded = [load_quantized(checkpoint, layer, shapes[layer]) for layer in layers]
        quantized = [matrix for matrix in loaded if matrix is not None]
        if not quantized:
            return [plain(layers)]
        if len(quantized) == len(layers):
            return running_formats(quantized, device, dtype)
        return [
            plain([layer]) if matrix is None else running_formats([matrix], device, dtype)[0]
            for layer, matrix in zip(layers, loaded, strict=True)
        ]

    def vector(name: str, size: int) -> torch.Tensor:
        return dense(name, (size,))

    embedding = dense(f"{EMBEDDING}.weight", shapes[EMBEDDING])
    head: list[WeightFormat] = [Dense(embedding)] if config.ties_embeddings else matrices([HEAD])
    make = partial(Decoder, config, embedding)
    return _assemble(config, matrices, vector, head, make, max_position, on_progress)


def _dense_reader(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> Callable[[str, tuple[int, ...]], torch.Tensor]:
    """A function that loads a float tensor by name after checking that it is there and has the shape given."""
    present = set(checkpoint.names())

    def dense(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name not in present:
            raise ModelFileError(f"{checkpoint.path}: tensor {name} is missing")
        found = tuple(checkpoint.shape(name))
        if found != shape:
            raise ModelFileError(f"{checkpoint.path}: {name} has shape {list(found)}, expected {list(shape)}")
        return checkpoint.load(name).to(device=device, dtype=dtype)

    return dense


def _check_head(checkpoint: Checkpoint, config: ModelConfig) -> None:
    has_own_head = bool({f"{HEAD}.weight", f"{HEAD}.weight_packed", f"{HEAD}.qweight"} & set(checkpoint.names()))
    if not has_own_head and not config.ties_embeddings:
        raise ModelFileError(f"{checkpoint.path}: tensor {HEAD}.weight is missing and the embeddings are not tied")


def _linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Shape [out, in] of every matrix by its layer's name, embedding and head included."""
    shapes = {
        f"model.layers.{index}.{name}": shape
        for index in range(config.num_layers)
        for name, shape in config.linear_shapes().items()
    }
    table = (config.vocab_size, config.hidden_size)
    return shapes | {EMBEDDING: table, HEAD: table}


def _assemble(
    config: ModelConfig,
    matrices: Matrices,
    vector: Vectors,
    head: Sequence[WeightFormat],
    make: Callable[[list[Block], RMSNorm, Linear, Rope], Decoder],
    max_position: int | None,
    on_progress: Progress | None,
) -> Decoder:
    """The decoder from its tensors' sources: a checkpoint or random numbers, as torch or the native kernels hold them.

    `matrices` is called with the layers that make one product, `make` with the parts of the finished decoder.
    """
    shapes = _linear_shapes(config)

    def norm(name: str, size: int) -> RMSNorm:
        return RMSNorm(vector(f"{name}.weight", size), config.rms_norm_eps)

    def linear(prefix: str, names: Sequence[str], has_bias: bool) -> Linear:
        layers = [f"{prefix}.{name}" for name in names]
        bias = torch.cat([vector(f"{layer}.bias", shapes[layer][0]) for layer in layers]) if has_bias else None
        return Linear(list(matrices(layers)), bias)

    def block(index: int) -> Block:
        layer = f"model.layers.{index}"
        attention = f"{layer}.self_attn"
        return Block(
            attention_norm=norm(f"{layer}.input_layernorm", config.hidden_size),
            attention=Attention(
                qkv=linear(layer, QKV, config.has_qkv_bias),
                output=linear(layer, OUTPUT, config.has_output_bias),
                query_norm=norm(f"{attention}.q_norm", config.head_dim) if config.has_qk_norm else None,
                key_norm=norm(f"{attention}.k_norm", config.head_dim) if config.has_qk_norm else None,
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                window=config.windows[index],
            ),
            mlp_norm=norm(f"{layer}.post_attention_layernorm", config.hidden_size),
            mlp=GatedMLP(
                gate_up=linear(layer, GATE_UP, config.has_mlp_bias),
                down=linear(layer, DOWN, config.has_mlp_bias),
            ),
        )

    blocks = []
    for index in range(config.num_layers):
        blocks.append(block(index))
        if on_progress is not None:
            on_progress(index + 1, config.num_layers)
    final = norm("model.norm", config.hidden_size)
    rope = Rope(config, min(max_position or config.max_position, config.max_position), *_place(final))
    return make(blocks, final, Linear(list(head)), rope)


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
    config = _config_of(folder)
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
        if weight_format == "fp8":
            return [Float8.pack(_random_float8(normal(rows, cols)), device, rounds_input=True)]
        return [pack_int_weight(_random_ints(rows, cols, weight_format, generator), device)]

    def vector(name: str, size: int) -> torch.Tensor:
        is_norm = name.endswith("norm.weight")
        return torch.full((size,), 1.0 if is_norm else 0.01, device=device, dtype=dtype)

    embedding = normal(config.vocab_size, config.hidden_size)
    head = embedding if config.ties_embeddings else normal(config.vocab_size, config.hidden_size)
    return _assemble(config, matrices, vector, [Dense(head)], partial(Decoder, config, embedding), max_position, None)


def _config_of(folder: str | Path) -> ModelConfig:
    path = Path(folder) / "config.json" if Path(folder).is_dir() else Path(folder)
    try:
        return model_config(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path}: {error}") from None


def _random_ints(rows: int, cols: int, weight_format: RandomFormat, generator: torch.Generator) -> IntWeight:
    num_bits = 8 if weight_format == "int8" else 4
    group_size = cols if num_bits == 8 else next(size for size in (128, 64, 32, cols) if cols % size == 0)
    low, high = -(2 ** (num_bits - 1)), 2 ** (num_bits - 1)
    values = torch.randint(low, high, (rows, cols), dtype=torch.int8, device=generator.device, generator=generator)
    scale = torch.full((rows, cols // group_size), cols**-0.5 / (high / 2), device=generator.device)
    return IntWeight(values, scale, None, num_bits)


def _random_float8(weight: torch.Tensor) -> Float8Weight:
    values, scale = quantize_to_float8(weight)
    return Float8Weight(values, scale[:, 0])


@_WEIGHTS_FIT
def random_decoder(
    folder: str | Path, config: EngineConfig, weight_format: RandomFormat = "none", seed: int = 0
) -> Decoder:
    """`random_model` for a resolved `config`: on the native kernels where they shall and can run.

    There, matrices that are not quantized have the dtype of the model's config, as its checkpoint would.
    """
    model = _config_of(folder)
    module = _native_module(config, model)
    if module is None:
        dtype = getattr(torch, config.dtype)
        made = random_model(folder, config.device, dtype, weight_format, seed, config.max_model_len)
        return _on_gpu_kernels(made, config)
    shapes = _linear_shapes(model)
    generator = torch.Generator().manual_seed(seed)
    stored = getattr(torch, model.dtype, torch.float32)
    dtype = stored if stored in FLOATS.values() else torch.float32

    def part(layer: str) -> Part:
        rows, cols = shapes[layer]
        if weight_format == "none" or layer in (EMBEDDING, HEAD):
            return torch.empty(rows, cols, dtype=dtype).normal_(0.0, cols**-0.5, generator=generator)
        if weight_format == "fp8":
            return _random_float8(torch.randn(rows, cols, generator=generator) * cols**-0.5).dequantize()
        return int_part(_random_ints(rows, cols, weight_format, generator))

    def vector(name: str, size: int) -> torch.Tensor:
        return torch.full((size,), 1.0 if name.endswith("norm.weight") else 0.01)

    return _native_decoder(
        model, config, module, lambda layers: _pack([part(layer) for layer in layers], layers), vector
    )


def _on_gpu_kernels(decoder: Decoder, config: EngineConfig) -> Decoder:
    if config.kernels == "triton":
        decoder.kernels = "triton"
    if config.deterministic:
        obstacle = gpu_provider.unsupported() if decoder.kernels == "triton" else native.unavailable()
        if decoder.kernels != "triton" or obstacle is not None:
            raise PowertrainError(
                f"--deterministic needs the native kernels or Triton's: {obstacle or 'see --kernels'}"
            )
        formats = [fmt for linear in decoder.linears() for fmt in linear.formats]
        batched = sorted({fmt.name for fmt in formats if not _is_invariant(fmt)})
        if batched:
            raise PowertrainError(f"--deterministic: no batch-invariant product for weights in {', '.join(batched)}")
        decoder.is_deterministic = True
    return decoder


def _is_invariant(weight: WeightFormat) -> bool:
    """Whether a GPU has a batch-invariant product for a format, wrapped or not."""
    inner = weight.weight if isinstance(weight, QuantizedInput | ReorderedInput) else weight
    return isinstance(inner, Dense | Int8Channel | Int4Blocked | Float8)


# ---- the native kernels' decoder ----

Streams = Callable[[list[str]], list[Stream]]
"""The packed matrices of the layers of one product."""


def _native_module(config: EngineConfig, model: ModelConfig) -> ModuleType | None:
    """The native module if `config` wants it and it can run the model; else None, or `PowertrainError` if it must."""
    if config.device != "cpu" or config.kernels == "reference":
        return None
    module, obstacle = native.load(), native.unavailable()
    if module is not None:
        from powertrain.model.native_decoder import why_not

        obstacle = why_not(model)
    if obstacle is not None and config.kernels == "native":
        raise PowertrainError(f"--kernels native cannot run: {obstacle}")
    # resolve() refuses other block sizes only to those who ask for these kernels by name
    is_runnable = obstacle is None and config.cache.block_size % NATIVE_BLOCK_SIZE == 0
    return module if is_runnable else None


def _native_decoder(
    model: ModelConfig, config: EngineConfig, module: ModuleType, streams: Streams, vector: Vectors
) -> Decoder:
    from powertrain.model.native_decoder import Backend, NativeDecoder

    team = module.Team(config.threads)

    def matrices(layers: list[str]) -> list[PackedMatrix]:
        return [PackedMatrix(stream, layout, module, team) for stream, layout in streams(layers)]

    (embedding,) = matrices([EMBEDDING])
    head = [embedding] if model.ties_embeddings else matrices([HEAD])

    def make(blocks: list[Block], norm: RMSNorm, head: Linear, rope: Rope) -> Decoder:
        return NativeDecoder(model, embedding, blocks, norm, head, rope, Backend(module, team))

    return _assemble(model, matrices, vector, head, make, config.max_model_len, None)


def _product_streams(checkpoint: Checkpoint, model: ModelConfig, on_progress: Progress | None) -> Streams:
    """The checkpoint's packed matrices, from its cache file where there is one."""
    shapes = _linear_shapes(model)
    products = [[EMBEDDING]] if model.ties_embeddings else [[EMBEDDING], [HEAD]]
    for index in range(model.num_layers):
        products += [[f"model.layers.{index}.{name}" for name in names] for names in PRODUCTS]

    def build() -> Iterator[tuple[str, Stream]]:
        with _one_torch_thread():
            for left, layers in enumerate(products, start=-len(products)):
                parts = [_part(checkpoint, layer, shapes[layer]) for layer in layers]
                for number, stream in enumerate(_pack(parts, layers)):
                    yield _stream_name(layers, number), stream
                if on_progress is not None and left % len(PRODUCTS) == 0:
                    on_progress(max(0, model.num_layers + left // len(PRODUCTS)), model.num_layers)

    packed = packed_streams(checkpoint, build)

    def streams(layers: list[str]) -> list[Stream]:
        names = [_stream_name(layers, number) for number in range(len(layers))]
        return [packed[name] for name in names if name in packed]

    return streams


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Packing is many small copies: beside other work, torch's threads wait on each other longer than they copy."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _stream_name(layers: list[str], number: int) -> str:
    return "+".join([layers[0], *(layer.rsplit(".", 1)[-1] for layer in layers[1:])]) + f".{number}"


def _part(checkpoint: Checkpoint, layer: str, shape: tuple[int, int]) -> Part:
    """One matrix as it is stored; what the kernels do not run as stored becomes float32."""
    quantized = None if layer == EMBEDDING else load_quantized(checkpoint, layer, shape)
    if quantized is not None:
        weight = quantized.weight
        if isinstance(weight, Float4Weight):
            weight = weight.as_integers() or weight
        if isinstance(weight, IntWeight) and weight.input_order is None:
            return int_part(weight, quantized.rounds_input)
        # no kernel reorders its input, and a float times its scale and divisor fits no float narrower than this
        return weight.dequantize()
    name = f"{layer}.weight"
    if name not in checkpoint.names():
        raise ModelFileError(f"{checkpoint.path}: tensor {name} is missing")
    found = tuple(checkpoint.shape(name))
    if found != shape:
        raise ModelFileError(f"{checkpoint.path}: {name} has shape {list(found)}, expected {list(shape)}")
    if isinstance(checkpoint, GGUFCheckpoint):
        type_name, rows, _ = checkpoint.raw(name)
        if type_name in GGUF_GRIDS or type_name in GGUF_FLOATS:
            return gguf_part(type_name, rows)
    tensor = checkpoint.load(name)
    return tensor if tensor.dtype in FLOATS.values() else tensor.float()


def _pack(parts: list[Part], layers: list[str]) -> list[Stream]:
    """As few streams as the parts' grids allow, in order. Gate and up become one with interleaved panels, or two."""
    if layers[-1].endswith(GATE_UP[-1]):
        return [pack_stream(parts, is_gate_up=True)] if can_stack(parts) else [pack_stream([part]) for part in parts]
    runs: list[list[Part]] = []
    for part in parts:
        if runs and can_stack([runs[-1][0], part]):
            runs[-1].append(part)
        else:
            runs.append([part])
    return [pack_stream(run) for run in runs]
