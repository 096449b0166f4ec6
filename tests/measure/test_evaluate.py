"""Evaluation end to end on tiny models read back from disk, judged by transformers where it can."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model_builders import TINY_TEXT
from powertrain.compress import compress
from powertrain.kernels import native
from powertrain.measure.evaluate import Reference, evaluate, perplexity
from powertrain.measure.scoring import Model, read_model
from powertrain.text_data import Window, windows_of
from powertrain.types import PowertrainError

TinyModel = Callable[[str], Path]

STATISTICS = {
    "kl_mean",
    "kl_p50",
    "kl_p90",
    "kl_p99",
    "kl_p999",
    "top1_agreement",
    "rms_dp",
    "ppl_reference",
    "ppl_candidate",
    "ppl_ratio",
}


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TINY_TEXT * 3, encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def compressed(tiny_model_dir: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("compressed")
    w4 = {"steps": [{"match": "Linear", "scheme": "W4A16", "group_size": 32}]}
    for name, recipe in {"W8": "W8A16", "W4": w4}.items():
        compress(tiny_model_dir("llama"), out / name, recipe, dtype="float32")
    return {name: out / name for name in ("W8", "W4")}


def test_a_model_equals_itself(tiny_model_dir: TinyModel, text_file: Path):
    folder = tiny_model_dir("llama")
    found = evaluate(folder, folder, data=text_file, window=64, kernels="reference")
    assert found.kl_mean == found.kl_p999 == found.rms_dp == 0.0
    assert found.top1_agreement == found.ppl_ratio == 1.0
    assert found.bits_per_weight == 32.0
    assert set(found.intervals) == STATISTICS


def test_the_candidate_runs_as_it_would_be_served(tiny_model_dir: TinyModel, text_file: Path):
    if native.load() is None:
        pytest.skip(f"no native kernels: {native.unavailable()}")
    folder = tiny_model_dir("llama")
    found = {
        kind: evaluate(folder, folder, data=text_file, window=64, kv_cache_dtype=kind) for kind in ("auto", "int8")
    }
    for kind, name in (("auto", "float16"), ("int8", "int8")):
        settings = found[kind].settings
        assert (settings["kernels"], settings["kv_cache_dtype"]) == ("native", name)
    assert 0 <= found["auto"].kl_mean < 1e-5
    assert found["auto"].kl_mean < found["int8"].kl_mean < 0.05
    for kind in ("int8", "fp8"):
        plain = evaluate(folder, folder, data=text_file, window=64, kernels="reference", kv_cache_dtype=kind)
        assert plain.settings["kv_cache_dtype"] == kind
        assert 0 < plain.kl_mean < 0.05
    with pytest.raises(PowertrainError, match="runs on a GPU or with --kernels reference"):
        evaluate(folder, folder, data=text_file, window=64, kv_cache_dtype="fp8")


def test_fewer_bits_are_further_away(tiny_model_dir: TinyModel, text_file: Path, compressed: dict[str, Path]):
    reference = Reference(tiny_model_dir("llama"), data=text_file, window=64)
    w8 = reference.compare(read_model(compressed["W8"]))
    w4 = reference.compare(read_model(compressed["W4"]))
    assert 0 < w8.kl_mean < w4.kl_mean / 20
    assert w4.top1_agreement < w8.top1_agreement <= 1
    assert w4.bytes < w8.bytes
    assert w4.bits_per_weight < w8.bits_per_weight < 32
    for found in (w4, w8):
        for name in STATISTICS:
            low, high = found.intervals[name]
            assert low <= getattr(found, name) <= high
        assert found.kl_p50 <= found.kl_p90 <= found.kl_p99 <= found.kl_p999


def test_kl_and_perplexity_are_those_transformers_gives(
    tiny_model_dir: TinyModel, text_file: Path, compressed: dict[str, Path]
):
    import transformers

    found = evaluate(compressed["W4"], tiny_model_dir("llama"), data=text_file, window=64, num_tokens=None)
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (tiny_model_dir("llama"), compressed["W4"])
    ]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model_dir("llama"))
    kl, nll = [], []
    for window in windows_of(tokenizer(text_file.read_text(encoding="utf-8"))["input_ids"], 64):
        ids = torch.tensor([window.token_ids])
        with torch.no_grad():
            p, q = (torch.log_softmax(model(ids).logits[0, :-1].double(), -1) for model in models)
        kl.append((p.exp() * (p - q)).sum(-1))
        nll.append(-p.gather(1, ids[0, 1:, None])[:, 0])
    # The engine's 4-bit product may run in bfloat16: its own distance from the file's exact weights is in the figure.
    assert found.kl_mean == pytest.approx(float(torch.cat(kl).mean()), rel=0.05)
    assert found.ppl_reference == pytest.approx(float(torch.cat(nll).mean().exp()), rel=1e-4)
    assert found.num_tokens == len(torch.cat(kl))


def test_the_record_is_json_and_names_what_was_compared(
    tiny_model_dir: TinyModel, text_file: Path, compressed: dict[str, Path]
):
    found = evaluate(str(compressed["W8"]), tiny_model_dir("llama"), data=text_file, window=64, num_tokens=200)
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert record["schema"] == 1
    assert record["kind"] == "evaluation"
    assert set(record) >= STATISTICS | {"bits_per_weight", "bytes", "num_tokens", "data_sha256", "intervals"}
    assert len(record["intervals"]["kl_mean"]) == 2
    assert record["num_windows"] == len(record["kl_windows"]) == 3
    assert sum(record["kl_windows"]) / 3 == pytest.approx(record["kl_mean"])
    assert record["settings"]["reference_dtype"] == "float32"
    assert record["settings"]["data"] == str(text_file)


def test_self_text_is_sampled_once_seeded_and_scored_after_its_opening(
    tiny_model_dir: TinyModel, compressed: dict[str, Path]
):
    first = Reference(tiny_model_dir("llama"), num_tokens=640, window=128, seed=5)
    again = Reference(tiny_model_dir("llama"), num_tokens=640, window=128, seed=5)
    other = Reference(tiny_model_dir("llama"), num_tokens=640, window=128, seed=6)
    assert first.windows == again.windows
    assert first.data_sha256 != other.data_sha256
    assert [len(window.token_ids) for window in first.windows] == [128] * 5
    assert {window.num_context for window in first.windows} != {1}, "some windows open with a question"
    assert 1 in {window.num_context for window in first.windows}, "and some with the bare first token"
    found = first.compare(read_model(compressed["W4"]))
    assert found.num_tokens == sum(window.num_scored for window in first.windows)
    assert found.kl_mean > 0
    # Sampled at temperature 1, the text is as surprising to the model as the model is uncertain.
    assert found.ppl_reference < 320


def test_small_chunks_take_the_decoding_products(
    tiny_model_dir: TinyModel, text_file: Path, compressed: dict[str, Path]
):
    reference = Reference(tiny_model_dir("llama"), data=text_file, window=64, num_tokens=128)
    whole = reference.compare(read_model(compressed["W4"]))
    small = reference.compare(read_model(compressed["W4"]), chunk=4)
    assert small.kl_mean == pytest.approx(whole.kl_mean, rel=0.1)
    assert small.settings["chunk"] == 4


def test_token_ids_can_be_given(tiny_model_dir: TinyModel, compressed: dict[str, Path]):
    sequences = [[5, 6, 7, 8, 9], [10, 11, 12], [3]]
    found = evaluate(compressed["W8"], tiny_model_dir("llama"), data=sequences, window=64)
    assert found.num_tokens == 6
    assert found.num_windows == 2


class FixedDecoder:
    """A decoder that gives fixed logits: a table of next-token preferences, and counts how often it is asked."""

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table
        self.num_calls = 0

    def score(self, token_ids: torch.Tensor, chunk: int = 512) -> torch.Tensor:
        self.num_calls += 1
        return self.table[token_ids]


def fixed_model(table: torch.Tensor, **changes: Any) -> Model:
    values = {
        "name": "fixed",
        "path": Path("fixed"),
        "decoder": FixedDecoder(table),
        "vocab_size": table.shape[1],
        "max_length": None,
        "device": "cpu",
        "dtype": "float32",
        "nbytes": 100,
        "num_parameters": 400,
    }
    return Model(**{**values, **changes})


def test_reference_logits_are_computed_once_within_the_budget():
    table = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    sequences = np.random.default_rng(0).integers(0, 16, (6, 9)).tolist()
    window_bytes = 8 * 16 * 4
    reference = Reference(fixed_model(table), data=sequences, window=16, cache_bytes=2 * window_bytes)
    candidate = fixed_model(table + 0.1 * torch.eye(16))
    first = reference.compare(candidate)
    assert reference.model.decoder.num_calls == 6
    second = reference.compare(candidate)
    assert reference.model.decoder.num_calls == 6 + 4
    assert first.intervals == second.intervals
    assert first.kl_mean == second.kl_mean > 0
    assert first.bits_per_weight == 2.0


def test_only_scored_tokens_count():
    table = torch.zeros(4, 4)
    table[0] = torch.tensor([0.0, 9.0, 0.0, 0.0])
    reference = Reference(fixed_model(torch.zeros(4, 4)), data=[[0, 1, 1, 1]], window=8)
    reference.windows = [Window((0, 1, 1, 1), 2), Window((0, 1, 1, 1), 3)]
    found = reference.compare(fixed_model(table))
    assert found.num_tokens == 3
    assert found.kl_mean == 0.0  # the one differing prediction is of a context token


def test_what_cannot_be_compared_is_refused(tiny_model_dir: TinyModel, text_file: Path, tmp_path: Path):
    llama = tiny_model_dir("llama")
    with pytest.raises(PowertrainError, match=r"window 1024 is longer than .* allows"):
        evaluate(llama, llama, data=text_file, window=1024)
    with pytest.raises(PowertrainError, match=r"missing\.txt: cannot be read"):
        evaluate(llama, llama, data=tmp_path / "missing.txt", window=64)
    with pytest.raises(PowertrainError, match="num_tokens must be given with data `self`"):
        evaluate(llama, llama, num_tokens=None, window=64)
    with pytest.raises(PowertrainError, match="num_tokens must be at least 2"):
        evaluate(llama, llama, num_tokens=1, window=64)
    with pytest.raises(PowertrainError, match="nothing to predict"):
        evaluate(llama, llama, data=[[1]], window=64)
    reference = Reference(fixed_model(torch.zeros(8, 8)), data=[[1, 2, 3]], window=8)
    with pytest.raises(PowertrainError, match="has 9 tokens and fixed 8: only models of one vocabulary"):
        reference.compare(fixed_model(torch.zeros(9, 9)))
    with pytest.raises(PowertrainError, match="no finite probabilities on window 0"):
        reference.compare(fixed_model(torch.full((8, 8), float("nan"))))


def test_perplexity_is_that_of_transformers(tiny_model_dir: TinyModel, text_file: Path):
    import transformers

    found = perplexity(tiny_model_dir("qwen3"), text_file, window=48, stride=16)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_dir("qwen3"), dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model_dir("qwen3"))
    ids = tokenizer(text_file.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"]
    total, count, previous_end = 0.0, 0, 0
    for begin in range(0, ids.shape[1], 16):
        end = min(begin + 48, ids.shape[1])
        labels = ids[:, begin:end].clone()
        labels[:, : -(end - previous_end)] = -100
        with torch.no_grad():
            loss = model(ids[:, begin:end], labels=labels).loss
        scored = int((labels[:, 1:] != -100).sum())
        total, count, previous_end = total + float(loss) * scored, count + scored, end
        if end == ids.shape[1]:
            break
    assert found.num_tokens == count == ids.shape[1] - 1
    assert found.ppl == pytest.approx(np.exp(total / count), rel=1e-4)
    assert found.interval is not None
    assert found.interval[0] < found.ppl < found.interval[1]
    assert json.loads(json.dumps(found.to_dict()))["kind"] == "perplexity"


def test_progress_is_told(tiny_model_dir: TinyModel, text_file: Path):
    calls: list[tuple[str, float, float | None]] = []
    evaluate(
        tiny_model_dir("llama"),
        tiny_model_dir("llama"),
        data=text_file,
        window=64,
        progress=lambda *call: calls.append(call),
    )
    assert calls[-1][1] == calls[-1][2]
    assert calls[-1][0].startswith("evaluate")


def test_a_trained_model_and_its_own_words(stories260k_dir: Path, shared_dir: Path):
    tales = shared_dir / "data" / "calibration" / "tinystories.txt.gz"
    found = perplexity(stories260k_dir, tales, window=256, num_tokens=2048)
    assert 2 < found.ppl < 8, "the model was trained on such stories"
