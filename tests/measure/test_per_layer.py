"""Distances layer by layer: against transformers' own layers, on rotated candidates, and where layers do not match."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from model_builders import TINY_TEXT
from powertrain import cli
from powertrain.compress import compress
from powertrain.kernels import native
from powertrain.measure.judge import judge
from powertrain.measure.per_layer import LayerDistance, LayerDistances, compare_layers
from powertrain.measure.scoring import read_model
from powertrain.text_data import Window, windows_of
from powertrain.types import PowertrainError

TinyModel = Callable[[str], Path]

W4 = {"match": "Linear", "scheme": "W4A16", "group_size": 32}
KERNELS = ["reference", pytest.param("native", marks=pytest.mark.skipif(native.load() is None, reason="not built"))]


@pytest.fixture
def made(tiny_model_dir: TinyModel, tmp_path: Path) -> Callable[..., Path]:
    def make(family: str, *steps: dict[str, Any], **options: Any) -> Path:
        options = {"dtype": "float32", "length": 64, "overwrite": True, **options}
        compress(tiny_model_dir(family), tmp_path / "made", {"steps": list(steps)}, **options)
        return tmp_path / "made"

    return make


def windows(length: int = 160) -> list[Window]:
    """Long ones: a product of few rows runs on activations in bfloat16, which transformers has in float32."""
    return windows_of([(7 * at * at + 3 * at) % 320 for at in range(2 * length)], length)


def by_transformers(candidate: Path, reference: Path) -> dict[str, tuple[float | None, float, float]]:
    """The definition, with transformers' modules moved from one model into the other."""
    import transformers

    def load(folder: Path) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    theirs, ours = load(reference), load(candidate)
    ids = torch.tensor([window.token_ids[:-1] for window in windows()])

    @torch.no_grad()
    def log_p(model: Any) -> torch.Tensor:
        return torch.log_softmax(model(ids).logits.double(), -1)

    def with_parts(of: Any, *, embedding: bool, layers: list[int], head: bool) -> Any:
        model = copy.deepcopy(theirs)
        if embedding:
            model.model.embed_tokens = of.model.embed_tokens
        for index in layers:
            model.model.layers[index] = of.model.layers[index]
        if head:
            model.model.norm, model.lm_head = of.model.norm, of.lm_head
        return model

    def kl(**parts: Any) -> float:
        p, q = log_p(theirs), log_p(with_parts(ours, **parts))
        return float((p.exp() * (p - q)).sum(-1).mean())

    num_layers = len(theirs.model.layers)
    with torch.no_grad():
        streams = [model(ids, output_hidden_states=True).hidden_states for model in (ours, theirs)]
    errors = [float(((x - y).norm(dim=-1) / y.norm(dim=-1)).mean()) for x, y in zip(*streams, strict=True)]
    # the last of transformers' hidden states is after the final norm
    found: dict[str, tuple[float | None, float, float]] = {}
    only = kl(embedding=True, layers=[], head=False)
    found["embedding"] = errors[0], only, only
    for index in range(num_layers):
        alone = kl(embedding=False, layers=[index], head=False)
        so_far = kl(embedding=True, layers=list(range(index + 1)), head=False)
        found[str(index)] = errors[index + 1] if index + 1 < num_layers else None, alone, so_far
    every = list(range(num_layers))
    found["head"] = None, kl(embedding=False, layers=[], head=True), kl(embedding=True, layers=every, head=True)
    return found


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_parts_are_exchanged_as_transformers_would(
    tiny_model_dir: TinyModel, made: Callable[..., Path], family: str, kernels: str
):
    head = {"match": "lm_head", "scheme": "W8A16"}
    reference, candidate = tiny_model_dir(family), made(family, W4, *([head] if family != "qwen2" else []))
    found = compare_layers(
        read_model(candidate, dtype="float32" if kernels == "reference" else "auto", kernels=kernels),
        read_model(reference, dtype="float32"),
        windows(),
        num_tokens=None,
    )
    expected = by_transformers(candidate, reference)
    assert [row.part for row in found.parts] == list(expected)
    assert (found.num_tokens, found.num_windows, found.is_turned) == (318, 2, False)
    for row in found.parts:
        error, alone, so_far = expected[row.part]
        if error is not None:
            assert row.error == pytest.approx(error, rel=0.05, abs=1e-6)
        # our 4-bit product on a CPU takes its scales in bfloat16
        assert row.kl_alone == pytest.approx(alone, rel=0.05, abs=1e-6), row.part
        assert row.kl_so_far == pytest.approx(so_far, rel=0.05, abs=1e-6), row.part


def test_a_model_equals_itself(tiny_model_dir: TinyModel):
    model = read_model(tiny_model_dir("llama3"), dtype="float32")
    found = compare_layers(model, model, windows())
    assert all((row.error or 0.0) == row.kl_alone == row.kl_so_far == 0.0 for row in found.parts)


def test_the_last_row_is_the_divergence_of_the_models(tiny_model_dir: TinyModel, made: Callable[..., Path]):
    reference = tiny_model_dir("llama")
    ids = [list(window.token_ids) for window in windows()]
    found = judge(made("llama", W4), reference, data=ids, per_layer=True, dtype="float32")
    assert found.layers is not None
    assert found.evaluation is not None
    assert found.layers.parts[-1].kl_so_far == pytest.approx(found.evaluation.kl_mean, rel=1e-3)
    assert found.layers.data_sha256 == found.evaluation.data_sha256


def test_a_rotated_model_is_turned_back(tiny_model_dir: TinyModel, made: Callable[..., Path]):
    reference = read_model(tiny_model_dir("llama"), dtype="float32")
    exact = compare_layers(
        read_model(made("llama", {"method": "rotate", "kind": "random"}), dtype="float32"), reference, windows()
    )
    assert exact.is_turned
    assert max(row.kl_alone for row in exact.parts) < 1e-5
    assert max(row.error or 0.0 for row in exact.parts) < 1e-3
    rounded = compare_layers(
        read_model(made("llama", {"method": "rotate", "kind": "random"}, W4), dtype="float32"), reference, windows()
    )
    layers = rounded.parts[1:-1]
    assert min(row.kl_alone for row in layers) > 1e-3
    assert max(row.error or 0.0 for row in layers) < 1.0, "unturned, the error of unrelated directions is 1.4"


def test_fewer_channels_are_compared_and_fewer_layers_refused(tiny_model_dir: TinyModel, made: Callable[..., Path]):
    reference = tiny_model_dir("mistral")
    ids = [list(window.token_ids) for window in windows()]
    prune: dict[str, Any] = {"method": "prune_width", "intermediate_size": 64}
    narrow = judge(made("mistral", prune, calibration=ids), reference, data=ids, per_layer=True, allows_overlap=True)
    assert narrow.layers is not None
    assert min(row.kl_alone for row in narrow.layers.parts[1:-1]) > 0
    shallow = made("mistral", {"method": "prune_depth", "drop": [1]})
    message = "has 2 layers and .* 3, so that its layers are not the reference's one by one; leave the flag out"
    with pytest.raises(PowertrainError, match=message):
        judge(shallow, reference, data=ids, per_layer=True)


def test_another_model_is_refused(tiny_model_dir: TinyModel):
    models = [read_model(tiny_model_dir(family), dtype="float32") for family in ("llama", "qwen2")]
    with pytest.raises(PowertrainError, match=r"neither those of .* nor a rotation of them"):
        compare_layers(models[0], models[1], windows())


def test_the_verb_prints_a_table_and_keeps_it(tiny_model_dir: TinyModel, made: Callable[..., Path], tmp_path: Path):
    text, record = tmp_path / "text.txt", tmp_path / "record.json"
    text.write_text(TINY_TEXT, encoding="utf-8")
    candidate = made("llama", W4)
    arguments = ["evaluate", str(candidate), "--reference", str(tiny_model_dir("llama")), "--window", "64"]
    arguments += ["--data", str(text), "--per-layer", "--json", str(record)]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    table = result.stdout.split("\n\n")[1].splitlines()
    assert [line.split()[0] for line in table] == ["part", "embedding", "0", "1", "head"]
    assert max(map(len, table)) < 80
    kept = json.loads(record.read_text())["per_layer"]
    assert [row["part"] for row in kept["parts"]] == ["embedding", "0", "1", "head"]
    assert json.loads((candidate / "powertrain.json").read_text())["per_layer"] == kept
    with pytest.raises(PowertrainError, match="--per-layer needs --data other than none"):
        judge(candidate, tiny_model_dir("llama"), data="none", agreement=text, per_layer=True)


def test_bars_are_shares_of_the_largest():
    rows = [LayerDistance(part=str(at), error=0.1, kl_alone=kl, kl_so_far=kl) for at, kl in enumerate((0.5, 1.0, 0.0))]
    found = LayerDistances(parts=rows, is_turned=False, num_tokens=1, num_windows=1, data_sha256="")
    assert [line.count("█") for line in found.text().splitlines()[1:]] == [15, 30, 0]
