"""Models read back from disk, and the windows of tokens they are asked to predict."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from powertrain.checkpoint.source import Checkpoint, open_checkpoint
from powertrain.config import EngineConfig, resolve
from powertrain.text_data import Window, encode_texts, read_texts, spread, windows_of
from powertrain.types import PowertrainError

if TYPE_CHECKING:
    from powertrain.model.decoder import Decoder

Progress = Callable[[str, float, float | None], None]
"""Called as (what, done, total)."""

Data = str | Path | Sequence[Sequence[int]]
"""`self`, a file of text or JSON lines, or sequences of token ids."""

SELF = "self"


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model read from disk, ready to score. `nbytes` is that of all its tensors as stored.

    `kernels` and `kv_cache_dtype` say what scores it: a candidate shall be judged as it would be served.
    """

    name: str
    path: Path
    decoder: Decoder
    vocab_size: int
    max_length: int | None
    device: str
    dtype: str
    nbytes: int
    num_parameters: int
    kernels: str = "reference"
    kv_cache_dtype: str = "float32"


def read_model(
    model: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    kernels: str = "auto",
    kv_cache_dtype: str = "auto",
) -> Model:
    """Load a checkpoint as the engine would: `auto` as the engine resolves it. `model` is a name or a path.

    An explicit `dtype`, as a reference has, means torch's products on weights of that type.
    """
    from powertrain.checkpoint.hub import resolve_model
    from powertrain.checkpoint.load import load_decoder

    path = resolve_model(model)
    checkpoint = open_checkpoint(path)
    stored = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")).removeprefix("torch.")
    options = EngineConfig.from_options(device=device, dtype=dtype, kernels=kernels, kv_cache_dtype=kv_cache_dtype)
    settled = resolve(options, has_cuda=torch.cuda.is_available(), model_dtype=stored)
    decoder = load_decoder(checkpoint, settled).with_kv_cache_dtype(settled.cache.kv_cache_dtype)
    return Model(
        name=str(model),
        path=path,
        decoder=decoder,
        vocab_size=int(checkpoint.config["vocab_size"]),
        max_length=checkpoint.config.get("max_position_embeddings"),
        device=settled.device,
        dtype=settled.dtype,
        nbytes=sum(checkpoint.nbytes(name) for name in checkpoint.names()),
        num_parameters=count_parameters(checkpoint),
        kernels=decoder.kernels,
        kv_cache_dtype=decoder.kv_cache_dtype,
    )


def check_same_vocabulary(candidate: Model, reference: Model) -> None:
    """Raises `PowertrainError` naming both if their vocabularies differ in size."""
    if candidate.vocab_size != reference.vocab_size:
        raise PowertrainError(
            f"{candidate.name} has {candidate.vocab_size} tokens and {reference.name} {reference.vocab_size}: "
            "only models of one vocabulary can be compared"
        )


def count_parameters(checkpoint: Checkpoint) -> int:
    """All weights of a checkpoint: a packed matrix counts as what it stands for, its scales as nothing."""
    total = 0
    for name in checkpoint.names():
        if name.endswith(".weight_shape"):
            total += math.prod(checkpoint.load(name).tolist())
        elif not name.endswith((".weight_packed", "_scale", ".weight_zero_point")):
            total += math.prod(checkpoint.shape(name))
    return total


def data_name(data: Data) -> str:
    """How records call the data; its hash says exactly what it was."""
    return str(data) if isinstance(data, str | Path) else "token ids"


def data_windows(
    model: Model,
    data: Data,
    num_tokens: int | None,
    window: int,
    *,
    stride: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Window]:
    """The windows of `data` to score, about `num_tokens` of it evenly spread (None: all), in the ids of `model`.

    Raises `PowertrainError` for a window the model cannot hold, an unreadable file, or data with nothing to predict.
    """
    if model.max_length is not None and window > model.max_length:
        raise PowertrainError(f"window {window} is longer than {model.name} allows ({model.max_length} tokens)")
    if num_tokens is not None and num_tokens < 2:
        raise PowertrainError(f"num_tokens must be at least 2, got {num_tokens}")
    if not isinstance(data, str | Path):
        windows = [Window(tuple(ids)) for ids in data if len(ids) > 1]
    elif str(data) == SELF:
        windows = _own_windows(model, num_tokens, window, seed, progress)
    else:
        windows = windows_of(_encode_file(model, data), window, stride)
        windows = windows if num_tokens is None or not windows else spread(windows, num_tokens)
    if not windows:
        raise PowertrainError(f"{data_name(data)}: fewer than two tokens, so there is nothing to predict")
    return windows


def _own_windows(
    model: Model, num_tokens: int | None, window: int, seed: int, progress: Progress | None
) -> list[Window]:
    from powertrain.checkpoint.tokenizer_files import load_tokenizer
    from powertrain.measure.self_text import sample_windows

    if num_tokens is None:
        raise PowertrainError("num_tokens must be given with data `self`: a model never runs out of its own text")
    tokenizer = load_tokenizer(model.path)
    return sample_windows(model.decoder, tokenizer, num_tokens=num_tokens, window=window, seed=seed, progress=progress)


def _encode_file(model: Model, path: str | Path) -> list[int]:
    from powertrain.checkpoint.tokenizer_files import load_tokenizer

    return encode_texts(read_texts(path), load_tokenizer(model.path))


def predictions(model: Model, window: Window, chunk: int | None) -> torch.Tensor:
    """Logits float32 [num_scored, vocab] for the window's scored tokens, `chunk` rows at a time through the model."""
    token_ids = torch.tensor(window.token_ids[:-1], dtype=torch.int64)
    logits = model.decoder.score(token_ids) if chunk is None else model.decoder.score(token_ids, chunk=chunk)
    return logits[window.num_context - 1 :]


def targets(window: Window) -> torch.Tensor:
    """The scored tokens, int64 [num_scored]."""
    return torch.tensor(window.token_ids[window.num_context :], dtype=torch.int64)
