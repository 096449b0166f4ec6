"""Flags that several verbs share. Engine flags are written once, here, and carry vLLM's names where vLLM has one."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from powertrain.config import Kernels, KVCacheDType
from powertrain.types import PowertrainError

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A name (smollm2), a Hugging Face id, or a local folder or .gguf file.")
]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the full record here.")]
RandomWeights = Annotated[
    bool, typer.Option("--random-weights", help="Draw the weights; MODEL needs only a config.json.")
]
RandomFormat = Annotated[
    Literal["none", "int8", "int4", "fp8"],
    typer.Option("--format", help="Weight format, with --random-weights."),
]

Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
Method = Literal["rtn", "gptq", "autoround", "awq", "smoothquant"]

_ENGINE_FLAGS: dict[str, tuple[Any, str]] = {
    "device": (Device, "Where to run; auto takes CUDA if there is one."),
    "dtype": (DType, "Type of dense weights and activations; auto is the checkpoint's on CUDA, float32 on CPU."),
    "kernels": (
        Kernels,
        "auto takes the native ones on a CPU where they are built and --dtype is not given, Triton's on a GPU; "
        "else the reference.",
    ),
    "deterministic": (bool, "The same bits for a request alone and in any batch; slower on a GPU."),
    "max_model_len": (int, "Longest prompt plus output, in tokens."),
    "max_num_seqs": (int, "Most sequences in one step."),
    "max_num_batched_tokens": (int, "Token budget of one step, shared by decodes and prefill chunks."),
    "block_size": (int, "Tokens in one KV block."),
    "num_blocks": (int, "KV blocks in the pool; sized from memory if not given."),
    "kv_cache_memory_bytes": (int, "Bytes for the KV pool, if --num-blocks is not given."),
    "gpu_memory_utilization": (float, "Share of GPU memory to use."),
    "kv_cache_dtype": (
        KVCacheDType,
        "KV cache type; auto: as the model's files ask, else float16 (native kernels) or as activations. fp8: GPU.",
    ),
    "threads": (int, "CPU threads; one per physical core if not given."),
    "seed": (int, "Seed of requests that bring none."),
}

_SAMPLING_FLAGS: dict[str, tuple[Any, str]] = {
    "max_tokens": (int, "Most tokens to generate."),
    "temperature": (float, "0 is greedy."),
    "top_p": (float, "Keep the smallest set of tokens with this much probability."),
    "top_k": (int, "Keep this many tokens; 0 keeps all."),
    "min_p": (float, "Drop tokens below this share of the likeliest one's probability."),
    "repetition_penalty": (float, "Above 1 discourages tokens that were seen."),
    "presence_penalty": (float, "Above 0 discourages tokens that were generated."),
    "frequency_penalty": (float, "Above 0 discourages tokens by how often they were generated."),
    "stop": (list[str], "Stop at this text (repeatable)."),
    "ignore_eos": (bool, "Go on after the end-of-text token."),
}


def engine_options(verb: Callable[..., None]) -> Callable[..., None]:
    """Add the engine flags to `verb`; those given come as `engine`, in the names of `EngineConfig.from_options`."""
    flags = _parameters(_ENGINE_FLAGS, "Engine")
    flags["enable_prefix_caching"] = _parameter(
        "enable_prefix_caching",
        bool,
        typer.Option(
            "--enable-prefix-caching/--no-enable-prefix-caching",
            help="Reuse KV blocks of equal prefixes.",
            rich_help_panel="Engine",
            show_default="on",
        ),
    )
    flags["speculative_config"] = _parameter(
        "speculative_config",
        str,
        typer.Option(
            metavar="JSON",
            help='Draft tokens, e.g. \'{"method": "ngram", "num_speculative_tokens": 4}\'.',
            rich_help_panel="Engine",
        ),
    )

    def gather(given: dict[str, Any]) -> dict[str, Any]:
        draft = given.pop("speculative_config", None)
        if draft is not None:
            given["speculation"] = _speculation(draft)
        return given

    return _with_flags(verb, "engine", flags, gather)


def sampling_options(verb: Callable[..., None]) -> Callable[..., None]:
    """Add the sampling flags to `verb`; those given come as `sampling`, in the names of `SamplingParams`."""
    return _with_flags(verb, "sampling", _parameters(_SAMPLING_FLAGS, "Sampling"), lambda given: given)


def _speculation(text: str) -> Any:
    from powertrain.config import SpeculationConfig

    try:
        values = json.loads(text)
        return SpeculationConfig(**values)
    except (ValueError, TypeError) as error:
        example = '{"method": "ngram", "num_speculative_tokens": 4}'
        raise PowertrainError(f"--speculative-config must be JSON like {example}: {error}") from None


def _parameter(name: str, kind: Any, option: Any) -> inspect.Parameter:
    annotation = Annotated[kind | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _parameters(flags: dict[str, tuple[Any, str]], panel: str) -> dict[str, inspect.Parameter]:
    parameters = {}
    for name, (kind, text) in flags.items():
        # A plain switch: its negative would only repeat the default.
        names = [f"--{name.replace('_', '-')}"] if kind is bool else []
        parameters[name] = _parameter(name, kind, typer.Option(*names, help=text, rich_help_panel=panel))
    return parameters


def _with_flags(
    verb: Callable[..., None],
    bundle: str,
    flags: dict[str, inspect.Parameter],
    gather: Callable[[dict[str, Any]], dict[str, Any]],
) -> Callable[..., None]:
    """`verb` with its parameter `bundle` replaced by `flags`: typer reads the signature, so the signature is built."""

    @functools.wraps(verb)
    def with_flags(**arguments: Any) -> None:
        given = {name: arguments.pop(name) for name in flags}
        verb(**arguments, **{bundle: gather({k: v for k, v in given.items() if v not in (None, [])})})

    signature = inspect.signature(verb, eval_str=True)
    own = [p.replace(kind=p.KEYWORD_ONLY) for p in signature.parameters.values() if p.name != bundle]
    vars(with_flags)["__signature__"] = signature.replace(parameters=[*own, *flags.values()])
    with_flags.__annotations__ = {p.name: p.annotation for p in [*own, *flags.values()]}
    return with_flags


def comma_numbers(flag: str, text: str) -> list[int]:
    """`1,8,32` as numbers. Raises `PowertrainError` naming `flag`."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise PowertrainError(f"{flag} must be numbers separated by commas, like 1,8,32; got {text!r}") from None
