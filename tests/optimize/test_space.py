from __future__ import annotations

import shlex
from typing import Any

import pytest

from powertrain.compress.recipe import load_recipe
from powertrain.optimize.space import Limits, formats, int4_group, parse_memory, serve_command, settings
from powertrain.types import PowertrainError

SMOLLM2: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}


def test_formats_of_the_default_model() -> None:
    assert [f.name for f in formats(SMOLLM2)] == [
        "none",
        "W8A16 channel",
        "W8A16 channel, head W8A16",
        "W4A16 g64, head W8A16",
        "W4A16_ASYM g64, head W8A16",
    ]


def test_every_recipe_is_one_that_compress_reads() -> None:
    layers = ["model.layers.0.mlp.up_proj", "lm_head"]
    for choice in formats(SMOLLM2):
        if choice.recipe is not None:
            assigned = load_recipe(choice.recipe).assign(layers)
            assert ("lm_head" in assigned) == ("head" in choice.name)
            assert layers[0] in assigned
            assert "/" not in choice.folder


def test_folders_are_told_apart() -> None:
    folders = [f.folder for f in formats(SMOLLM2)]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize(("change", "group"), [({}, 64), ({"hidden_size": 576 + 32}, 32), ({"hidden_size": 577}, None)])
def test_groups_divide_every_row(change: dict[str, int], group: int | None) -> None:
    assert int4_group({**SMOLLM2, "head_dim": 64, **change}) == group


def test_a_small_head_is_left_alone() -> None:
    names = [f.name for f in formats({**SMOLLM2, "vocab_size": 1024})]
    assert names == ["none", "W8A16 channel", "W4A16 g64", "W4A16_ASYM g64"]


def test_a_quantized_model_is_only_tried_as_it_is() -> None:
    assert [f.name for f in formats({**SMOLLM2, "quantization_config": {"format": "pack-quantized"}})] == ["none"]


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_the_serve_line_gives_the_server_the_options_that_were_measured(batch: int) -> None:
    """The line is split as a shell would and each flag looked up among those the server really has."""
    from typer.main import get_command

    from powertrain.cli import app

    serve = get_command(app).commands["serve"]  # type: ignore[attr-defined]
    known = {flag for parameter in serve.params for flag in parameter.opts}
    for setting in settings(batch, threads=2, kv_cache_memory_bytes=10**8):
        words = shlex.split(serve_command("my model", setting.options))
        assert words[:3] == ["powertrain", "serve", "my model"]
        assert set(words[3::2]) <= known
        assert "--threads" in words


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("600MB", 600 * 10**6), ("1.5 GiB", 3 * 2**29), ("1000", 1000), (7, 7), (None, None), ("2gb", 2 * 10**9)],
)
def test_memory_sizes(text: Any, num_bytes: int | None) -> None:
    assert parse_memory(text) == num_bytes


@pytest.mark.parametrize("text", ["", "MB", "5 elephants", "-1MB", "1e9"])
def test_bad_memory_sizes_are_refused(text: str) -> None:
    with pytest.raises(PowertrainError, match="--max-memory"):
        parse_memory(text)


def test_limits_default_to_none() -> None:
    assert Limits() == Limits(tpot_ms=None, ttft_ms=None, max_kl=None, max_memory=None)
