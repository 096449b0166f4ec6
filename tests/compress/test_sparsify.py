"""Masks: patterns exact, SparseGPT against its textbook in float64, and the order of the methods' output errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from powertrain.checkpoint.source import open_checkpoint
from powertrain.compress import compress, load_recipe, plan_compression
from powertrain.compress.gptq import Moments
from powertrain.compress.sparsify import KINDS, Pattern, magnitude, sparsegpt, wanda
from powertrain.types import PowertrainError

TinyModel = Callable[[str], Path]
PATTERNS = (Pattern(0.5), Pattern(0.7), Pattern(0.5, 2, 4), Pattern(0.75, 2, 8))


def correlated(tokens: int, width: int, seed: int) -> torch.Tensor:
    """Inputs that share directions and differ in size, as activations do."""
    source = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, width, generator=source) @ torch.randn(width, width, generator=source)
    return mixed / width**0.5 * torch.randn(width, generator=source).exp() + 0.1 * torch.randn(
        tokens, width, generator=source
    )


def moments_of(x: torch.Tensor) -> Moments:
    moments = Moments.zeros(x.shape[1], x.device)
    moments.add(x)
    return moments


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_sparsegpt_loses_less_than_wanda_and_wanda_less_than_magnitude(pattern: Pattern) -> None:
    for seed in range(3):
        x = correlated(1000, 256, seed)
        weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(seed + 10))
        moments = moments_of(x)
        pruned = (sparsegpt(weight, moments, pattern), wanda(weight, moments, pattern), magnitude(weight, pattern))
        errors = [float((x @ (weight - one).t()).square().sum()) for one in pruned]
        assert errors[0] < errors[1] < errors[2]


@settings(max_examples=30, deadline=None)
@given(num_kept=st.integers(1, 5), more=st.integers(1, 4), seed=st.integers(0, 999), kind=st.sampled_from(KINDS))
def test_every_group_has_exactly_its_zeros(num_kept: int, more: int, seed: int, kind: str) -> None:
    group = num_kept + more
    pattern = Pattern.parse(f"{num_kept}:{group}", "pattern")
    x = correlated(100, 6 * group, seed)
    weight = torch.randn(5, 6 * group, generator=torch.Generator().manual_seed(seed))
    made = {
        "magnitude": lambda: magnitude(weight, pattern),
        "wanda": lambda: wanda(weight, moments_of(x), pattern),
        "sparsegpt": lambda: sparsegpt(weight, moments_of(x), pattern),
    }[kind]()
    assert ((made.view(5, 6, group) != 0).sum(-1) == num_kept).all()
    if kind == "magnitude":
        kept = made.view(5, 6, group).abs()
        gone = weight.view(5, 6, group).abs().masked_fill(kept != 0, 0.0).amax(-1)
        assert (gone <= kept.masked_fill(kept == 0, torch.inf).amin(-1)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_unstructured_patterns_zero_their_share(kind: str) -> None:
    x, weight = correlated(300, 256, 0), torch.randn(16, 256)
    made = {
        "magnitude": lambda: magnitude(weight, Pattern(0.3)),
        "wanda": lambda: wanda(weight, moments_of(x), Pattern(0.3)),
        "sparsegpt": lambda: sparsegpt(weight, moments_of(x), Pattern(0.3)),
    }[kind]()
    share = float((made == 0).float().mean())
    assert share == pytest.approx(0.3, abs=0.002)
    if kind == "wanda":  # compared within a row
        assert (made == 0).sum(1).eq(round(0.3 * 256)).all()


@pytest.mark.parametrize("pattern", [Pattern(0.5, 2, 4), Pattern(0.4)], ids=str)
def test_sparsegpt_is_the_textbooks(pattern: Pattern) -> None:
    """Column by column with an explicit inverse of what is left of H, in float64."""
    x, weight = correlated(400, 24, 3), torch.randn(6, 24, generator=torch.Generator().manual_seed(4))
    hessian = x.double().t() @ x.double() / len(x)
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(24)
    expected = weight.double().clone()
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(24)]
    costs = torch.stack([inverse[0, 0] for inverse in inverses])
    group = pattern.group or 24
    for begin in range(0, 24, group):
        chosen = slice(begin, begin + group)
        scores = expected[:, chosen].square() / costs[chosen]
        if pattern.group is None:
            gone = scores <= scores.flatten().sort().values[round(0.4 * scores.numel()) - 1]
        else:
            gone = scores.argsort(1).argsort(1) < pattern.group - pattern.num_kept
        for j in range(begin, begin + group):
            factor = torch.where(gone[:, j - begin], expected[:, j] / costs[j], 0.0)
            expected[:, j:] -= factor.unsqueeze(1) * inverses[j][0]
            expected[gone[:, j - begin], j] = 0.0
    found = sparsegpt(weight, moments_of(x), pattern)
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_recipe_writes_a_dense_folder_with_zeros_in_its_matrices(
    tiny_model_dir: TinyModel, tmp_path: Path, kind: str
) -> None:
    samples = torch.randint(5, 300, (4, 32), generator=torch.Generator().manual_seed(2)).tolist()
    recipe = {"steps": [{"method": "sparsify", "kind": kind, "pattern": "2:4"}]}
    compress(
        tiny_model_dir("qwen2"),
        tmp_path / "out",
        recipe,
        calibration=samples,
        num_samples=4,
        length=32,
        dtype="float32",
    )
    before, after = open_checkpoint(tiny_model_dir("qwen2")), open_checkpoint(tmp_path / "out")
    assert "quantization_config" not in after.config
    for name in after.names():
        tensor = after.load(name)
        if "_proj.weight" in name:
            assert ((tensor.view(len(tensor), -1, 4) != 0).sum(-1) == 2).all()
        else:
            assert torch.equal(tensor, before.load(name))


def test_patterns_and_steps_are_checked_by_name(tiny_model_dir: TinyModel) -> None:
    for bad in ("4:2", "2:2", 0, 1, "half", True, "0:4", 1.5):
        with pytest.raises(PowertrainError, match=r"steps\[0\]\.pattern"):
            load_recipe({"steps": [{"method": "sparsify", "pattern": bad}]})
    with pytest.raises(PowertrainError, match="groups of 7 do not divide its 64"):
        plan_compression(tiny_model_dir("llama"), {"steps": [{"method": "sparsify", "pattern": "3:7"}]})
    for pattern in (0.5, "2:4"):
        recipe = load_recipe({"steps": [{"method": "sparsify", "kind": "sparsegpt", "pattern": pattern}]})
        assert load_recipe(recipe.to_dict()) == recipe
    table = plan_compression(tiny_model_dir("llama"), {"steps": [{"method": "sparsify", "kind": "magnitude"}]}).table()
    assert "serve no faster" in table
