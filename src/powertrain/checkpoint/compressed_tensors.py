"""compressed-tensors' integer weights and their config: packed densely into int32 words, or one in a byte.

A value in [-2^(b-1), 2^(b-1) - 1] is stored plus 2^(b-1); element i of a row lies at bit i * b, low end first, in
consecutive words. Zero points are packed the same way, but down the output axis. That is `pack-quantized`; schemes that
quantize activations too are stored as `int-quantized`: int8 `weight` and `weight_zero_point`, whatever the bits.
Format: https://github.com/neuralmagic/compressed-tensors
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from powertrain.checkpoint.source import Checkpoint
from powertrain.model.weights import IntWeight
from powertrain.types import ModelFileError, QuantScheme

PACKED, PLAIN = "pack-quantized", "int-quantized"
MIXED = "mixed-precision"
LINEAR = "Linear"


def pack_int32(values: Tensor, num_bits: int) -> Tensor:
    """int8 [rows, n] -> int32 [rows, ceil(n * num_bits / 32)]; the last word of a row is filled with zero bits.

    `num_bits` is 4 or 8. Raises `ValueError` for values that do not fit.
    """
    offset = 1 << (num_bits - 1)
    if values.numel() and not -offset <= int(values.min()) <= int(values.max()) < offset:
        raise ValueError(f"values outside [{-offset}, {offset - 1}] cannot be packed into {num_bits} bits")
    codes = (values.to(torch.int16) + offset).to(torch.uint8)
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % (32 // num_bits)))
    if num_bits == 4:
        codes = codes[:, 0::2] | (codes[:, 1::2] << 4)
    # bytes to words as the machine orders them, which is little endian wherever this runs
    return codes.flatten().view(torch.int32).view(codes.shape[0], -1)


def unpack_int32(packed: Tensor, num_bits: int, shape: Sequence[int]) -> Tensor:
    """The inverse of `pack_int32`: int32 words -> int8 of `shape` [rows, n]."""
    codes = packed.flatten().view(torch.uint8).view(packed.shape[0], -1)
    if num_bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)
    offset = 1 << (num_bits - 1)
    return (codes[:, : shape[1]].to(torch.int16) - offset).to(torch.int8)


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

    def load(suffix: str, kind: str, shape: tuple[int, ...]) -> Tensor:
        tensor = checkpoint.load(f"{prefix}.{suffix}")
        is_right_kind = tensor.is_floating_point() if kind == "float" else tensor.dtype == getattr(torch, kind)
        if not is_right_kind or tuple(tensor.shape) != shape:
            fail(suffix, f"is {tensor.dtype} {list(tensor.shape)}, expected {kind} {list(shape)}")
        return tensor

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
        values = load("weight", "int8", (out_features, in_features))
        if scheme.num_bits == 4 and not -8 <= int(values.min()) <= int(values.max()) < 8:
            fail("weight", "holds integers beyond 4 bits")
        return IntWeight(
            values=values,
            scale=load("weight_scale", "float", (out_features, groups)),
            zero_point=None if scheme.symmetric else load("weight_zero_point", "int8", (out_features, groups)),
            num_bits=scheme.num_bits,
        )
    packed = load("weight_packed", "int32", (out_features, _words(in_features, scheme.num_bits)))
    scale = load("weight_scale", "float", (out_features, groups))
    zero_point = None
    if not scheme.symmetric:
        zeros = load("weight_zero_point", "int32", (_words(out_features, scheme.num_bits), groups))
        zero_point = unpack_int32(zeros.T, scheme.num_bits, (groups, out_features)).T.contiguous()
    values = unpack_int32(packed, scheme.num_bits, (out_features, in_features))
    return IntWeight(values, scale, zero_point, scheme.num_bits)


def _words(count: int, num_bits: int) -> int:
    return -(-count * num_bits // 32)


def quantization_config(groups: Sequence[tuple[QuantScheme, list[str]]], ignore: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of a `config.json`: one config group per (scheme, targets)."""
    formats = {stored_format(scheme) for scheme, _ in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {
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
            for number, (scheme, targets) in enumerate(groups)
        },
        "ignore": list(ignore),
        "kv_cache_scheme": None,
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


def scheme_of(config: Mapping[str, Any], layer_name: str) -> QuantScheme | None:
    """How the Linear `layer_name` is quantized according to a model's `config.json`; None if it is not.

    A target is a name, a pattern (`re:` and a regular expression matched from the start) or the class `Linear`, in
    this order of precedence. Raises `ModelFileError` for a format, activation or cache scheme that cannot be run.
    """
    quantization = config.get("quantization_config") or config.get("compression_config")
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
            _refuse(f"the pattern {target!r} is not a regular expression ({error})")
    return 2 if target == LINEAR else None


def _checked_groups(quantization: Any) -> list[dict[str, Any]]:
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method != "compressed-tensors":
        _refuse(f"quant_method {method!r} cannot be run; compressed-tensors can")
    if quantization.get("quantization_status", "compressed") != "compressed":
        _refuse(f"quantization_status {quantization['quantization_status']!r} is not 'compressed'")
    for key in ("kv_cache_scheme", "transform_config", "sparsity_config"):
        part = quantization.get(key)
        if part and not (key == "sparsity_config" and part.get("format") == "dense"):
            _refuse(f"{key} cannot be run")
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not all(_is_group(group) for group in groups.values()):
        _refuse("config_groups is not a mapping of groups with targets and weights")
    ignore = quantization.get("ignore") or []
    if not isinstance(ignore, list) or not all(isinstance(target, str) for target in ignore):
        _refuse("ignore is not a list of names")
    return list(groups.values())


def _is_group(group: Any) -> bool:
    return (
        isinstance(group, dict)
        and isinstance(group.get("targets"), list)
        and all(isinstance(target, str) for target in group["targets"])
        and isinstance(group.get("weights"), dict)
    )


def _scheme(group: Mapping[str, Any], default_format: Any) -> QuantScheme:
    weights = group["weights"]
    found_format = group.get("format") or default_format
    num_bits, strategy, group_size = weights.get("num_bits", 8), weights.get("strategy"), weights.get("group_size")
    if found_format not in (PACKED, PLAIN):
        _refuse(f"format {found_format!r} cannot be run; {PACKED} and {PLAIN} can")
    if group.get("output_activations") is not None:
        _refuse("output_activations: quantized outputs cannot be run")
    if weights.get("type", "int") != "int" or num_bits not in (4, 8) or isinstance(num_bits, bool):
        _refuse(f"{weights.get('type', 'int')} weights of {num_bits} bits cannot be run; int of 4 or 8 bits can")
    if weights.get("actorder") in (True, "group") or weights.get("dynamic") not in (None, False):
        _refuse("activation order by group and dynamic weights cannot be run")
    if strategy is None:
        strategy = "channel" if group_size in (None, -1) else "group"
    if strategy not in ("channel", "group"):
        _refuse(f"strategy {strategy!r} cannot be run; channel and group can")
    is_size = isinstance(group_size, int) and not isinstance(group_size, bool) and group_size > 0
    if strategy == "group" and not is_size:
        _refuse(f"group_size {group_size!r} is not a size")
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
        _refuse("input_activations is no mapping")
    strategy, group_size = activations.get("strategy"), activations.get("group_size")
    found = [activations.get(key, default) for key, default in (("num_bits", 8), ("type", "int"), ("symmetric", True))]
    is_group = strategy == "group" and type(group_size) is int and group_size > 0
    if found != [8, "int", True] or activations.get("dynamic") is not True or not (is_group or strategy == "token"):
        _refuse("input_activations: only dynamic symmetric int of 8 bits, per token or per group, can be run")
    return {"activation_bits": 8, "activation_group_size": group_size if is_group else None}


def _refuse(problem: str) -> NoReturn:
    raise ModelFileError(f"config.json: quantization_config: {problem}")
