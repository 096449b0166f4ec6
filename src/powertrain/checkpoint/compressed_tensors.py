"""compressed-tensors' config, and its integer weights: packed densely into int32 words, or one in a byte.

A value in [-2^(b-1), 2^(b-1) - 1] is stored plus 2^(b-1); element i of a row lies at bit i * b, low end first, in
consecutive words, whose borders values of 3, 5, 6 and 7 bits straddle. Zero points are packed the same way, but down
the output axis. That is `pack-quantized`; schemes that quantize activations too are stored as `int-quantized`: int8
`weight` and `weight_zero_point`, whatever the bits.
Floats are read by `checkpoint/float8.py` and `checkpoint/float4.py`.
Format: https://github.com/neuralmagic/compressed-tensors
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from powertrain.checkpoint.float4 import FLOAT4_FORMATS, Float4Scheme, float4_scheme_of
from powertrain.checkpoint.float8 import BLOCK, FLOAT8, Float8Scheme, Strategy
from powertrain.checkpoint.float_presets import FloatScheme, float_group
from powertrain.checkpoint.kv_cache import KVCacheScheme, kv_cache_kind
from powertrain.checkpoint.quantization_config import quantization_of, refuse
from powertrain.checkpoint.source import Checkpoint, load_checked
from powertrain.kernels.quantized import FLOAT8_BLOCK
from powertrain.model.weights import IntWeight
from powertrain.types import ModelFileError, QuantScheme

PACKED, PLAIN = "pack-quantized", "int-quantized"
MIXED, DENSE = "mixed-precision", "dense"
LINEAR = "Linear"


def pack_int32(values: Tensor, num_bits: int) -> Tensor:
    """int8 [rows, n] -> int32 [rows, ceil(n * num_bits / 32)]; the last word of a row is filled with zero bits.

    `num_bits` is 2 to 8. Raises `ValueError` for values that do not fit.
    """
    offset = 1 << (num_bits - 1)
    if values.numel() and not -offset <= int(values.min()) <= int(values.max()) < offset:
        raise ValueError(f"values outside [{-offset}, {offset - 1}] cannot be packed into {num_bits} bits")
    rows, count = values.shape
    codes = torch.nn.functional.pad(values.view(torch.uint8) + offset, (0, -count % 8))
    if num_bits == 4:
        dense = codes[:, 0::2] | (codes[:, 1::2] << 4)
    else:
        dense = codes if num_bits == 8 else _squeeze(codes, num_bits)
    dense = torch.nn.functional.pad(dense, (0, 4 * num_words(count, num_bits) - dense.shape[1]))
    # bytes to words as the machine orders them, which is little endian wherever this runs
    return dense.flatten().view(torch.int32).view(rows, -1)


def unpack_int32(packed: Tensor, num_bits: int, shape: Sequence[int]) -> Tensor:
    """The inverse of `pack_int32`: int32 words -> int8 of `shape` [rows, n]."""
    codes = packed.flatten().view(torch.uint8).view(packed.shape[0], -1)
    if num_bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)
    elif num_bits != 8:
        num_bytes = -(-shape[1] // 8) * num_bits
        codes = _spread(torch.nn.functional.pad(codes, (0, num_bytes - codes.shape[1])), num_bits)
    return (codes[:, : shape[1]] - (1 << (num_bits - 1))).view(torch.int8)


def _squeeze(codes: Tensor, num_bits: int) -> Tensor:
    """Codes below 2^num_bits, one in a byte [rows, 8 k], as dense bytes [rows, k * num_bits].

    Eight codes are one 64-bit word. Three steps move each second field of it next to the one before, whatever the
    bits, and leave the codes in its low bytes: about a second for 10^8 weights.
    """
    words = codes.flatten().view(torch.int64).view(codes.shape[0], -1)
    for width in (8, 16, 32):
        low, used = _low_fields(width, num_bits)
        words = (words & low) | ((words >> (width - used)) & (low << used))
    return words.view(torch.uint8).view(*words.shape, 8)[..., :num_bits].flatten(1)


def _spread(dense: Tensor, num_bits: int) -> Tensor:
    """The inverse of `_squeeze`: dense bytes [rows, k * num_bits] -> one code in a byte [rows, 8 k]."""
    fields = dense.view(dense.shape[0], -1, num_bits)
    words = torch.nn.functional.pad(fields, (0, 8 - num_bits)).view(torch.int64).squeeze(-1)
    for width in (32, 16, 8):
        low, used = _low_fields(width, num_bits)
        words = (words & low) | ((words & (low << used)) << (width - used))
    return words.view(torch.uint8)


def _low_fields(width: int, num_bits: int) -> tuple[int, int]:
    """The used bits of each first of two neighbouring fields of a 64-bit word, and how many bits a field uses."""
    used = width // 8 * num_bits
    return sum(((1 << used) - 1) << start for start in range(0, 64, 2 * width)), used


def stored_format(scheme: QuantScheme) -> str:
    """How a scheme's integers are stored, as the library itself and its readers have it."""
    return PACKED if scheme.activation_bits is None else PLAIN


def int_weight_tensors(name_prefix: str, weight: IntWeight, storage: str = PACKED) -> dict[str, Tensor]:
    """The tensors of one layer (`model.layers.0.mlp.up_proj`) as they stand in the file; see `stored_format`."""
    if storage == PLAIN:
        tensors = {f"{name_prefix}.weight": weight.values, f"{name_prefix}.weight_scale": weight.scale.contiguous()}
        if weight.zero_point is not None:
            tensors[f"{name_prefix}.weight_zero_point"] = weight.zero_point
        return tensors
    tensors = {
        f"{name_prefix}.weight_packed": pack_int32(weight.values, weight.num_bits),
        f"{name_prefix}.weight_scale": weight.scale.contiguous(),
        f"{name_prefix}.weight_shape": torch.tensor(weight.values.shape, dtype=torch.int64),
    }
    if weight.zero_point is not None:
        tensors[f"{name_prefix}.weight_zero_point"] = pack_int32(weight.zero_point.T, weight.num_bits).T.contiguous()
    return tensors


def load_int_weight(checkpoint: Checkpoint, prefix: str, scheme: QuantScheme) -> IntWeight:
    """The integers of one layer. Raises `ModelFileError` naming the tensor whose dtype or shape does not fit."""
    present = set(checkpoint.names())

    def fail(suffix: str, problem: str) -> NoReturn:
        raise ModelFileError(f"{checkpoint.path}: {prefix}.{suffix} {problem}")

    def load(suffix: str, dtype: torch.dtype | None, shape: tuple[int, ...]) -> Tensor:
        return load_checked(checkpoint, f"{prefix}.{suffix}", shape, dtype)

    if f"{prefix}.weight_g_idx" in present:
        fail("weight_g_idx", "reorders columns by activation, which cannot be run")
    is_plain = f"{prefix}.weight_packed" not in present and f"{prefix}.weight" in present
    declared = list(checkpoint.shape(f"{prefix}.weight")) if is_plain else None
    if declared is None:
        declared = checkpoint.load(f"{prefix}.weight_shape").flatten().tolist()
    if len(declared) != 2 or not all(isinstance(size, int) and 0 < size < 2**31 for size in declared):
        fail("weight_shape", f"is {declared}, expected two sizes")
    out_features, in_features = declared
    group_size = scheme.group_size or in_features
    if in_features % group_size:
        fail("weight_shape", f"has rows of {in_features}, which groups of {group_size} do not divide")
    groups = in_features // group_size
    if is_plain:
        values = load("weight", torch.int8, (out_features, in_features))
        high = 1 << (scheme.num_bits - 1)
        if scheme.num_bits < 8 and not -high <= int(values.min()) <= int(values.max()) < high:
            fail("weight", f"holds integers beyond {scheme.num_bits} bits")
        return IntWeight(
            values=values,
            scale=load("weight_scale", None, (out_features, groups)),
            zero_point=None if scheme.symmetric else load("weight_zero_point", torch.int8, (out_features, groups)),
            num_bits=scheme.num_bits,
        )
    words = num_words(in_features, scheme.num_bits)
    padded_words = -(-in_features // (32 // scheme.num_bits))
    if padded_words != words and checkpoint.shape(f"{prefix}.weight_packed") == (out_features, padded_words):
        # the library's own order before its pull request 732; its reader now takes such words for dense ones
        fail(
            "weight_packed",
            f"holds {32 // scheme.num_bits} values of {scheme.num_bits} bits a word; dense words can be run",
        )
    packed = load("weight_packed", torch.int32, (out_features, words))
    scale = load("weight_scale", None, (out_features, groups))
    zero_point = None
    if not scheme.symmetric:
        zeros = load("weight_zero_point", torch.int32, (num_words(out_features, scheme.num_bits), groups))
        zero_point = unpack_int32(zeros.T, scheme.num_bits, (groups, out_features)).T.contiguous()
    values = unpack_int32(packed, scheme.num_bits, (out_features, in_features))
    return IntWeight(values, scale, zero_point, scheme.num_bits)


def num_words(count: int, num_bits: int) -> int:
    """int32 words that `count` values take, the last one filled up."""
    return -(-count * num_bits // 32)


def quantization_config(
    groups: Sequence[tuple[QuantScheme | FloatScheme, list[str]]],
    ignore: Sequence[str],
    kv_cache: KVCacheScheme | None = None,
) -> dict[str, Any]:
    """The `quantization_config` of a `config.json`: one config group per (scheme, targets)."""
    made = [
        float_group(scheme.preset, targets) if isinstance(scheme, FloatScheme) else _int_group(scheme, targets)
        for scheme, targets in groups
    ]
    formats = {group["format"] for group in made}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else MIXED if formats else DENSE,
        "quantization_status": "compressed",
        "config_groups": {f"group_{number}": group for number, group in enumerate(made)},
        "ignore": list(ignore),
        "kv_cache_scheme": None if kv_cache is None else kv_cache.to_config(),
    }


def _int_group(scheme: QuantScheme, targets: Sequence[str]) -> dict[str, Any]:
    return {
        "targets": list(targets),
        "weights": {
            "num_bits": scheme.num_bits,
            "type": "int",
            "symmetric": scheme.symmetric,
            "strategy": scheme.strategy,
            "group_size": scheme.group_size,
            "dynamic": False,
        },
        "input_activations": _input_activations(scheme),
        "output_activations": None,
        "format": stored_format(scheme),
    }


def _input_activations(scheme: QuantScheme) -> dict[str, Any] | None:
    if scheme.activation_bits is None:
        return None
    return {
        "num_bits": scheme.activation_bits,
        "type": "int",
        "symmetric": True,
        "strategy": "token" if scheme.activation_group_size is None else "group",
        "group_size": scheme.activation_group_size,
        "dynamic": True,
    }


def scheme_of(config: Mapping[str, Any], layer_name: str) -> QuantScheme | Float8Scheme | Float4Scheme | None:
    """How the Linear `layer_name` is quantized according to a model's `config.json`; None if it is not.

    A target is a name, a pattern (`re:` and a regular expression matched from the start) or the class `Linear`, in
    this order of precedence. Raises `ModelFileError` for a format, activation or cache scheme that cannot be run.
    """
    quantization = quantization_of(config)
    if quantization is None:
        return None
    groups = _checked_groups(quantization)
    if any(_rank(target, layer_name) is not None for target in quantization.get("ignore") or ()):
        return None
    ranked = [
        (rank, number)
        for number, group in enumerate(groups)
        for target in group["targets"]
        if (rank := _rank(target, layer_name)) is not None
    ]
    if not ranked:
        return None
    return _scheme(groups[min(ranked)[1]], quantization.get("format"))


def _rank(target: str, layer_name: str) -> int | None:
    """How narrowly a target names a layer: 0 by name, 1 by pattern, 2 by class; None if it does not."""
    if target == layer_name:
        return 0
    if target.startswith("re:"):
        try:
            return 1 if re.match(target[3:], layer_name) else None
        except re.error as error:
            refuse(f"the pattern {target!r} is not a regular expression ({error})")
    return 2 if target == LINEAR else None


def _checked_groups(quantization: Mapping[str, Any]) -> list[dict[str, Any]]:
    method = quantization.get("quant_method")
    if method != "compressed-tensors":
        refuse(f"quant_method {method!r} cannot be run; compressed-tensors can")
    if quantization.get("quantization_status", "compressed") != "compressed":
        refuse(f"quantization_status {quantization['quantization_status']!r} is not 'compressed'")
    kv_cache_kind(quantization)  # refuses what cannot be run
    for key in ("transform_config", "sparsity_config"):
        part = quantization.get(key)
        if part and not (key == "sparsity_config" and part.get("format") == "dense"):
            refuse(f"{key} cannot be run")
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not all(_is_group(group) for group in groups.values()):
        refuse("config_groups is not a mapping of groups with targets and weights")
    ignore = quantization.get("ignore") or []
    if not isinstance(ignore, list) or not all(isinstance(target, str) for target in ignore):
        refuse("ignore is not a list of names")
    return list(groups.values())


def _is_group(group: Any) -> bool:
    return (
        isinstance(group, dict)
        and isinstance(group.get("targets"), list)
        and all(isinstance(target, str) for target in group["targets"])
        and isinstance(group.get("weights"), dict)
    )


def _scheme(group: Mapping[str, Any], default_format: Any) -> QuantScheme | Float8Scheme | Float4Scheme:
    found_format = group.get("format") or default_format
    runnable = (PACKED, PLAIN, FLOAT8, *FLOAT4_FORMATS)
    if found_format not in runnable:
        refuse(f"format {found_format!r} cannot be run; {', '.join(runnable)} can")
    if group.get("output_activations") is not None:
        refuse("output_activations: quantized outputs cannot be run")
    if found_format in FLOAT4_FORMATS:
        return float4_scheme_of(group, found_format)
    return _float8_scheme(group) if found_format == FLOAT8 else _int_scheme(group)


def _int_scheme(group: Mapping[str, Any]) -> QuantScheme:
    weights = group["weights"]
    num_bits, strategy, group_size = weights.get("num_bits", 8), weights.get("strategy"), weights.get("group_size")
    if weights.get("type", "int") != "int" or type(num_bits) is not int or not 2 <= num_bits <= 8:
        refuse(f"{weights.get('type', 'int')} weights of {num_bits} bits cannot be run; int of 2 to 8 bits can")
    if group.get("input_activations") is not None and num_bits not in (4, 8):
        refuse(f"input_activations beside weights of {num_bits} bits cannot be run; beside 4 or 8 bits they can")
    if weights.get("actorder") in (True, "group") or weights.get("dynamic") not in (None, False):
        refuse("activation order by group and dynamic weights cannot be run")
    if strategy is None:
        strategy = "channel" if group_size in (None, -1) else "group"
    if strategy not in ("channel", "group"):
        refuse(f"strategy {strategy!r} cannot be run; channel and group can")
    is_size = isinstance(group_size, int) and not isinstance(group_size, bool) and group_size > 0
    if strategy == "group" and not is_size:
        refuse(f"group_size {group_size!r} is not a size")
    return QuantScheme(
        num_bits=num_bits,
        group_size=group_size if strategy == "group" else None,
        symmetric=bool(weights.get("symmetric", True)),
        **_activation_fields(group.get("input_activations")),
    )


def _activation_fields(activations: Any) -> dict[str, int | None]:
    """The activation part of a `QuantScheme`: dynamic symmetric int8 per token or per group, or none."""
    if activations is None:
        return {}
    if not isinstance(activations, dict):
        refuse("input_activations is no mapping")
    strategy, group_size = activations.get("strategy"), activations.get("group_size")
    found = [activations.get(key, default) for key, default in (("num_bits", 8), ("type", "int"), ("symmetric", True))]
    is_group = strategy == "group" and type(group_size) is int and group_size > 0
    if found != [8, "int", True] or activations.get("dynamic") is not True or not (is_group or strategy == "token"):
        refuse("input_activations: only dynamic symmetric int of 8 bits, per token or per group, can be run")
    return {"activation_bits": 8, "activation_group_size": group_size if is_group else None}


def _float8_scheme(group: Mapping[str, Any]) -> Float8Scheme:
    weights = group["weights"]
    strategy: Strategy = weights.get("strategy") or "tensor"
    found = [weights.get(key, default) for key, default in (("num_bits", 8), ("type", "int"), ("symmetric", True))]
    if found != [8, "float", True] or weights.get("dynamic") not in (None, False):
        refuse(f"format {FLOAT8!r} can be run with static symmetric float weights of 8 bits only")
    if strategy not in ("tensor", "channel", "block"):
        refuse(f"strategy {strategy!r} cannot be run for 8-bit floats; tensor, channel and block can")
    if strategy == "block" and weights.get("block_structure") not in (BLOCK, f"{BLOCK[0]}x{BLOCK[1]}"):
        refuse(f"block_structure {weights.get('block_structure')!r} cannot be run; {BLOCK} can")
    rounds_input, has_input_scale = _float8_input(group.get("input_activations"), strategy)
    return Float8Scheme(strategy, rounds_input, has_input_scale=has_input_scale)


def _float8_input(activations: Any, strategy: Strategy) -> tuple[bool, bool]:
    """Whether inputs are rounded, and whether to a scale in the file.

    Else to scales found per token or, beside a matrix of blocks, per block of a token.
    """
    if activations is None:
        return False, False
    if not isinstance(activations, dict):
        refuse("input_activations is no mapping")
    found = [activations.get(key, default) for key, default in (("num_bits", 8), ("type", "int"), ("symmetric", True))]
    if found == [8, "float", True] and activations.get("dynamic") in (None, False):
        if activations.get("strategy") not in (None, "tensor") or strategy == "block":
            refuse(
                "input_activations: static input scales can be run with strategy tensor, beside weights not in blocks"
            )
        return True, True
    is_block = activations.get("strategy") == "group" and activations.get("group_size") == FLOAT8_BLOCK
    is_fitting = is_block if strategy == "block" else activations.get("strategy") == "token"
    if found != [8, "float", True] or activations.get("dynamic") is not True or not is_fitting:
        wanted = f"per group of {FLOAT8_BLOCK}" if strategy == "block" else "per token"
        refuse(f"input_activations: beside {strategy} scales only symmetric float of 8 bits, {wanted}, can be run")
    return True, False
