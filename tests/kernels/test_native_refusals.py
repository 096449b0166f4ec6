"""The native decoder refuses what does not fit, naming it, and holds on to all that it was made of."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from native_builders import BLOCK_SIZE, NATIVE, VOCAB, needs_native, random_ids, run_at_once, step_of
from powertrain.model.native_decoder import NativeDecoder
from powertrain.model.packed import native_matrix, pack

pytestmark = needs_native

Models = Callable[..., NativeDecoder]


@pytest.fixture
def right(native_model: Models) -> tuple[NativeDecoder, dict[str, Any]]:
    model = native_model(("llama", ""))
    arguments = {
        "ids": random_ids(4),
        "query_lens": np.array([1, 3], dtype=np.int32),
        "context_lens": np.array([1, 3], dtype=np.int32),
        "tables": np.array([[0], [1]], dtype=np.int64),
        "cache": model.new_cache(2, BLOCK_SIZE).native,
        "out": torch.zeros(4, model.config.hidden_size),
    }
    return model, arguments


def i32(*values: int) -> Any:
    return np.array(values, dtype=np.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.tensor([0, 1, VOCAB, 2])}, "token 320 is not in 0..319"),
        ({"ids": torch.tensor([0, -1, 5, 2])}, "token -1 is not in"),
        ({"ids": torch.tensor([0, 2**40, 5, 2])}, "token 1099511627776"),
        ({"ids": torch.tensor([0, 1, 2])}, "one token per row"),
        ({"out": torch.zeros(3, 64)}, r"out must be \[tokens, hidden\]"),
        ({"out": torch.zeros(4, 63)}, r"out must be \[tokens, hidden\]"),
        ({"tables": np.array([[0], [2]])}, "block 2 is not in 0..1"),
        ({"tables": np.array([[0], [-1]])}, "block -1 is not in"),
        ({"context_lens": i32(17, 3)}, "sequence 0: 1 of 17 tokens do not fit a table of 1 blocks"),
        ({"context_lens": i32(1, 2)}, "sequence 1: 3 of 2 tokens"),
        ({"query_lens": i32(0, 4)}, "sequence 0"),
        ({"query_lens": i32(1)}, "one entry per sequence"),
        ({"context_lens": i32(513, 3), "tables": np.zeros((2, 33), np.int64)}, "longer than the rotary tables"),
    ],
)
def test_steps_that_do_not_fit_are_refused_and_the_decoder_goes_on(
    right: tuple[NativeDecoder, dict[str, Any]], change: dict[str, Any], message: str
) -> None:
    model, arguments = right
    with pytest.raises(ValueError, match=message):
        model._native.forward(*{**arguments, **change}.values())
    model._native.forward(*arguments.values())
    assert arguments["out"].abs().max() > 0


def test_a_cache_of_another_model_is_refused(native_model: Models, right: tuple[NativeDecoder, dict[str, Any]]) -> None:
    model, arguments = right
    for family in ("mistral", "qwen3"):  # another number of layers, another size of head
        cache = native_model((family, "")).new_cache(2, BLOCK_SIZE).native
        with pytest.raises(ValueError, match="cache belongs to another model"):
            model._native.forward(*{**arguments, "cache": cache}.values())


def test_heads_of_other_shapes_are_refused(right: tuple[NativeDecoder, dict[str, Any]]) -> None:
    native, hidden = right[0]._native, torch.zeros(2, 64)
    for x, out in ((hidden[:, :63], (2, VOCAB)), (hidden, (2, 319)), (hidden, (1, VOCAB))):
        with pytest.raises(ValueError, match="hidden must be"):
            native.logits(x.contiguous(), torch.zeros(out))
    good = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.bool)
    for at, wrong in (
        (0, torch.zeros(2, 4)),
        (0, torch.zeros(1, 3)),
        (1, torch.zeros(2, 4, dtype=torch.int64)),
        (2, torch.zeros(3, dtype=torch.bool)),
    ):
        with pytest.raises(ValueError, match="values and ids must be"):
            native.top(hidden, *[wrong if at == index else part for index, part in enumerate(good)])
    for k in (0, VOCAB + 1):
        with pytest.raises(ValueError, match="values and ids must be"):
            native.top(hidden, torch.zeros(2, k), torch.zeros(2, k, dtype=torch.int64), good[2])
    for at, wrong in (
        (0, good[0].double()),
        (1, good[1].int()),
        (2, good[2].to(torch.uint8)),
        (0, torch.zeros(3, 2).t()),
    ):
        with pytest.raises(TypeError):
            native.top(hidden, *[wrong if at == index else part for index, part in enumerate(good)])
    with pytest.raises(TypeError):
        native.logits(hidden, torch.zeros(2, VOCAB).double())
    native.top(hidden[:0], good[0][:0], good[1][:0], good[2][:0])
    native.logits(hidden[:0], torch.zeros(0, VOCAB))


def dense(rows: int, cols: int) -> Any:
    return native_matrix(*pack([torch.zeros(rows, cols)]), NATIVE)


def build(**change: Any) -> Any:
    """A decoder of hidden size 8 with two heads of 4, or one with the given parts."""
    right: dict[str, Any] = {
        "team": NATIVE.Team(1),
        "hidden_size": 8,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 4,
        "intermediate_size": 6,
        "eps": 1e-5,
        "embedding": dense(10, 8),
        "head": dense(10, 8),
        "norm": torch.ones(8),
        "cos": torch.ones(32, 2),
        "sin": torch.zeros(32, 2),
    }
    return NATIVE.Decoder(**{**right, **change})


def add_layer(decoder: Any, **change: Any) -> None:
    right: dict[str, Any] = {
        "attention_norm": torch.ones(8),
        "qkv": [dense(8, 8), dense(8, 8)],
        "qkv_bias": None,
        "query_norm": None,
        "key_norm": None,
        "output": [dense(8, 8)],
        "output_bias": None,
        "mlp_norm": torch.ones(8),
        "gate_up": [dense(6, 8), dense(6, 8)],
        "gate_up_bias": None,
        "down": [dense(8, 6)],
        "down_bias": None,
        "window": 0,
    }
    decoder.add_layer(**{**right, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3, "num_kv_heads": 2}, "multiple of key heads"),
        ({"num_kv_heads": 0}, "multiple of key heads"),
        ({"num_heads": 65}, "at most 64 to one"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"head_dim": 258}, "at most 256"),
        ({"hidden_size": 9}, "embedding and head"),
        ({"embedding": lambda: dense(11, 8)}, "embedding and head"),
        ({"head": lambda: dense(10, 7)}, "embedding and head"),
        ({"norm": torch.ones(7)}, "norm must have"),
        ({"cos": torch.ones(32, 3)}, "cos and sin"),
        ({"sin": torch.ones(31, 2)}, "cos and sin"),
    ],
)
def test_decoders_say_what_is_wrong_with_them(change: dict[str, Any], message: str) -> None:
    build()
    with pytest.raises(ValueError, match=message):
        build(**{name: value() if callable(value) else value for name, value in change.items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_norm": torch.ones(7)}, "attention_norm has the wrong length"),
        ({"mlp_norm": torch.ones(9)}, "mlp_norm has the wrong length"),
        ({"query_norm": torch.ones(8)}, "query_norm has the wrong length"),
        ({"key_norm": torch.ones(3)}, "key_norm has the wrong length"),
        ({"qkv": lambda: [dense(8, 8)]}, "qkv has the wrong number of outputs"),
        ({"qkv": lambda: []}, "qkv has the wrong number of outputs"),
        ({"qkv": lambda: [dense(16, 7)]}, "qkv has the wrong number of inputs"),
        ({"qkv_bias": torch.ones(15)}, "qkv has the wrong length"),
        ({"output": lambda: [dense(9, 8)]}, "output has the wrong number of outputs"),
        ({"gate_up": lambda: [dense(6, 8)]}, "gate_up has the wrong number of outputs"),
        ({"gate_up": lambda: []}, "gate_up has the wrong number of outputs"),
        ({"gate_up_bias": torch.ones(6)}, "gate_up has the wrong length"),
        ({"down": lambda: [dense(8, 7)]}, "down has the wrong number of inputs"),
        ({"down_bias": torch.ones(6)}, "down has the wrong length"),
        ({"window": -1}, "window must not be negative"),
    ],
)
def test_layers_say_what_is_wrong_with_them(change: dict[str, Any], message: str) -> None:
    decoder = build()
    with pytest.raises(ValueError, match=message):
        add_layer(decoder, **{name: value() if callable(value) else value for name, value in change.items()})
    add_layer(decoder)


def run_small(decoder: Any) -> Tensor:
    memory = np.zeros(NATIVE.Cache.bytes_per_block("float32", 16, 1, 4), dtype=np.uint8)
    cache, out = NATIVE.Cache(memory, "float32", 1, 1, 16, 1, 4), torch.full((2, 8), torch.nan)
    decoder.forward(torch.tensor([3, 9]), i32(2), i32(2), np.zeros((1, 1), np.int64), cache, out)
    logits = torch.full((2, 10), torch.nan)
    decoder.logits(out, logits)
    return logits


def test_a_decoder_keeps_what_it_was_made_of() -> None:
    """Nobody else holds the vectors, matrices and streams, whose memory others would get."""
    decoder = build()
    add_layer(decoder, qkv_bias=torch.ones(16), down_bias=torch.ones(8))
    gc.collect()
    others = [torch.full((size,), torch.nan) for size in (8, 16, 64, 128, 160) for _ in range(50)]
    assert torch.equal(run_small(decoder), torch.zeros(2, 10))
    assert len(others) == 250


def test_a_list_of_matrices_may_change_afterwards() -> None:
    decoder, matrices = build(), [dense(8, 8), dense(8, 8)]
    add_layer(decoder, qkv=matrices)
    matrices.clear()
    gc.collect()
    others = [torch.full((size,), torch.nan) for size in (8, 128, 160) for _ in range(50)]
    assert torch.equal(run_small(decoder), torch.zeros(2, 10))
    assert len(others) == 150


def test_python_threads_may_share_a_decoder(native_model: Models) -> None:
    """Each with a cache of its own; the decoder serves them in turn."""
    model = native_model(("llama", ""))
    steps = [(step_of([(count, count)], [[0, 1, 2, 3]]), random_ids(count)) for count in (1, 60)]
    expected = [model.forward(ids, step, model.new_cache(4, BLOCK_SIZE)) for step, ids in steps]
    wrong: list[int] = []

    def work(at: int) -> None:
        step, ids = steps[at]
        cache = model.new_cache(4, BLOCK_SIZE)
        wrong.extend(turn for turn in range(60) if not torch.equal(model.forward(ids, step, cache), expected[at]))

    run_at_once(work, (0, 1))
    assert not wrong
