"""Tasks on tiny models: scores are transformers' own, whatever is shared and batched; runs go on after a kill."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from powertrain.compress import compress
from powertrain.measure import task_scoring, tasks
from powertrain.measure.scoring import read_model
from powertrain.measure.task_data import read_task
from powertrain.measure.task_journal import Journal
from powertrain.measure.task_scoring import Answer, Question, answer, encode_item
from powertrain.measure.tasks import TaskEvaluation, evaluate_tasks
from powertrain.types import PowertrainError

TinyModel = Callable[[str], Path]

LONG = "Once upon a time there was a small engine that lived in a red barn near the river. "
FILES: dict[str, list[dict[str, Any]]] = {
    "choices": [
        {"query": f"Question: {LONG * 2}How far can I go today?", "choices": ["three carts", "a", "café"], "gold": 0},
        {"query": "The rain came, so it said:", "choices": ["I will wait", "I will run to town"], "gold": 1},
        {"query": "Why?", "choices": ["river", "apples and stones", "one cart of letters"], "gold": 2},
    ],
    "endings": [
        {"ctx": f"Work: {LONG}the engine", "endings": ["went anyway.", "said nothing.", "left.", "ran."], "label": 0},
        {"ctx": "Rain: the sun", "endings": ["will wait.", "left it."], "label": 1},
    ],
    "words": [{"context": f"{LONG}And it", "continuation": "went"}, {"context": "Every", "continuation": "morning"}],
    "options": [
        {"context_options": [f"{LONG}Sun", f"{LONG}Rain"], "continuation": "said nothing.", "gold": 0},
        {"context_options": ["The sun", "The small engine"], "continuation": "went anyway.", "gold": 1},
    ],
}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    for name, rows in FILES.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return {name: tmp_path / f"{name}.jsonl" for name in FILES}


@pytest.fixture(scope="session")
def w4(tiny_model_dir: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tasks") / "w4"
    recipe = {"steps": [{"match": "Linear", "scheme": "W4A16", "group_size": 32}]}
    compress(tiny_model_dir("llama"), out, recipe, dtype="float32")
    return out


class Judge:
    """transformers' logits of each text in one piece, one text at a time."""

    def __init__(self, folder: Path) -> None:
        import transformers

        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def score(self, context: str, continuation: str) -> tuple[float, bool]:
        ids = self.tokenizer(context + continuation, return_tensors="pt")["input_ids"]
        first = len(self.tokenizer(context)["input_ids"])
        with torch.no_grad():
            log_p = torch.log_softmax(self.model(ids).logits[0, first - 1 : -1].double(), -1)
        targets = ids[0, first:]
        assert len(targets) > 0
        return float(log_p.gather(1, targets[:, None]).sum()), bool((log_p.argmax(-1) == targets).all())


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_scores_are_those_of_transformers(tiny_model_dir: TinyModel, files: dict[str, Path], family: str):
    folder = tiny_model_dir(family)
    found = evaluate_tasks(folder, folder, list(files.values()), kernels="reference")
    judge = Judge(folder)
    for result in found.tasks:
        for item, entry in zip(read_task(result.path).items, result.items, strict=True):
            expected = [judge.score(*pair) for pair in item.texts()]
            for role in ("reference", "candidate"):
                assert entry[role]["logprobs"] == pytest.approx([score for score, _ in expected], abs=2e-3, rel=1e-5)
                chosen = entry[role]["picks"]
                if result.name == "words":
                    assert chosen == {"acc": 0 if expected[0][1] else -1}
                    continue
                assert chosen["acc"] == np.argmax([score for score, _ in expected])
                if result.name != "options":
                    per_byte = [s / len(text.encode()) for (s, _), text in zip(expected, item.answers, strict=True)]
                    assert chosen["acc_norm"] == np.argmax(per_byte)
        assert set(result.scores) == ({"acc", "acc_norm"} if result.name in ("choices", "endings") else {"acc"})
        for score in result.scores.values():
            assert score.difference == score.flips == score.changed == 0


@pytest.mark.parametrize("step_tokens", [9, 512])
def test_sharing_and_batching_change_nothing(
    tiny_model_dir: TinyModel, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, step_tokens: int
):
    model = read_model(tiny_model_dir("llama"), dtype="float32")
    from powertrain.checkpoint.tokenizer_files import load_tokenizer

    tokenizer = load_tokenizer(model.path)
    questions = [encode_item(item, tokenizer, 512) for path in files.values() for item in read_task(path).items]
    assert max(question.shared() for question in questions) >= 48, "something is shared"
    expected = []
    for question in questions:
        for ids, num_context in zip(question.sequences, question.num_context, strict=True):
            log_p = torch.log_softmax(model.decoder.score(torch.tensor(ids[:-1])), -1)
            expected.append(sum(float(log_p[at - 1, ids[at]]) for at in range(num_context, len(ids))))
    monkeypatch.setattr(task_scoring, "STEP_TOKENS", step_tokens)
    monkeypatch.setattr(task_scoring, "LOGIT_ROWS", 5)
    together = [number for found in answer(model.decoder, questions) for number in found.logprobs]
    alone = [number for question in questions for number in answer(model.decoder, [question])[0].logprobs]
    assert together == pytest.approx(expected, abs=1e-3)
    assert alone == pytest.approx(expected, abs=1e-3)


def test_a_greedy_word_is_one_the_engine_writes(tiny_model_dir: TinyModel):
    from powertrain.llm import LLM
    from powertrain.types import SamplingParams

    folder = tiny_model_dir("llama")
    with LLM(str(folder), dtype="float32") as llm:
        written = llm.generate("the sun", SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True))[0]
    ids, word = tuple(written.prompt_token_ids), tuple(written.outputs[0].token_ids)
    others = [(*word[:at], (word[at] + 1) % 320, *word[at + 1 :]) for at in range(5)]
    question = Question(tuple((*ids, *end) for end in (word, *others)), (len(ids),) * 6)
    (found,) = answer(read_model(folder, dtype="float32").decoder, [question])
    assert found.is_greedy == (True, False, False, False, False, False)


def test_a_long_context_is_cut_on_the_left(tiny_model_dir: TinyModel, tmp_path: Path):
    folder = tiny_model_dir("llama")
    row = {"query": f"{LONG * 30}so", "choices": ["it went anyway", "no"], "gold": 0}
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps(row) + "\n")
    found = evaluate_tasks(folder, folder, [path], kernels="reference").tasks[0]
    assert found.num_cut == 1
    judge = Judge(folder)
    context, continuation = read_task(path).items[0].texts()[0]
    ids = judge.tokenizer(context + continuation, return_tensors="pt")["input_ids"][:, -513:]
    count = len(judge.tokenizer(context + continuation)["input_ids"]) - len(judge.tokenizer(context)["input_ids"])
    with torch.no_grad():
        log_p = torch.log_softmax(judge.model(ids[:, :-1]).logits[0, -count:].double(), -1)
    expected = float(log_p.gather(1, ids[0, -count:, None]).sum())
    assert found.items[0]["reference"]["logprobs"][0] == pytest.approx(expected, abs=2e-3)
    path.write_text(json.dumps({**row, "choices": [LONG * 30, "no"]}) + "\n")
    with pytest.raises(PowertrainError, match=r"long\.jsonl:1: .*with 512 tokens the model holds no context"):
        evaluate_tasks(folder, folder, [path])


def test_flips_and_differences_are_counted(files: dict[str, Path]):
    task = read_task(files["choices"])
    before = [Answer((-1.0, -5.0, -9.0), (False,) * 3), Answer((-1.0, -2.0), (False,) * 2)]
    before.append(Answer((-1.0, -2.0, -3.0), (False,) * 3))
    after = [Answer((-6.0, -5.0, -9.0), (False,) * 3), Answer((-2.0, -1.0), (False,) * 2)]
    after.append(Answer((-2.0, -1.0, -3.0), (False,) * 3))
    found = tasks._result(task, {"reference": before, "candidate": after}, 0, 1000, 0)
    score = found.scores["acc"]
    # golds are 0, 1, 2: right, wrong, wrong before; wrong, right, wrong after, the last with another wrong answer
    assert (score.reference, score.candidate, score.difference) == (1 / 3, 1 / 3, 0.0)
    assert (score.flips, score.lost, score.gained, score.changed) == pytest.approx((2 / 3, 1 / 3, 1 / 3, 1.0))
    assert score.reference_stderr == pytest.approx(np.std([1, 0, 0], ddof=1) / np.sqrt(3))
    low, high = score.difference_interval
    assert low < 0 < high
    assert found.gold_logprob["difference"] == pytest.approx(((-6 + 1) + (-1 + 2) + 0) / 3)
    # per byte of the last item: -1 / 5, -2 / 17, -3 / 19
    assert [item["reference"]["picks"] for item in found.items][2] == {"acc": 0, "acc_norm": 1}
    assert [item["candidate"]["picks"]["acc_norm"] for item in found.items] == [0, 1, 1]
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_compressed_model_is_compared(tiny_model_dir: TinyModel, files: dict[str, Path], w4: Path):
    calls: list[tuple[str, float, float | None]] = []
    paths = list(files.values())
    found = evaluate_tasks(w4, tiny_model_dir("llama"), paths, progress=lambda *call: calls.append(call))
    assert found.settings["reference dtype"] == "float32"
    assert found.settings["candidate weights"] != found.settings["reference weights"]
    assert all(task.gold_logprob["difference"] != 0 for task in found.tasks)
    assert ("choices, reference", 3, 3) in calls
    assert calls[-1] == ("options, candidate", 2, 2)
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert record["kind"] == "tasks"
    assert [task["num_items"] for task in record["tasks"]] == [3, 2, 2, 2]


def strip_time(found: TaskEvaluation) -> dict[str, Any]:
    return {key: value for key, value in found.to_dict().items() if key not in ("seconds", "num_resumed")}


@pytest.mark.parametrize("dies_at", [1, 4, 9, 17])
def test_a_killed_run_goes_on_and_ends_the_same(
    tiny_model_dir: TinyModel,
    files: dict[str, Path],
    w4: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dies_at: int,
):
    paths, journal = list(files.values()), tmp_path / "answers.journal"
    whole = evaluate_tasks(w4, tiny_model_dir("llama"), paths)
    num_asked = 0

    def dying(decoder: Any, questions: list[Question]) -> list[Answer]:
        nonlocal num_asked
        num_asked += len(questions)
        if num_asked == dies_at:
            raise KeyboardInterrupt
        return answer(decoder, questions)

    monkeypatch.setattr(tasks, "answer", dying)
    with pytest.raises(KeyboardInterrupt):
        evaluate_tasks(w4, tiny_model_dir("llama"), paths, journal=journal)
    num_kept = len(journal.read_text().splitlines()) - 1
    assert num_kept == dies_at - 1, "all but the item under way"
    with journal.open("ab") as stream:  # a kill within the write of a line
        stream.write(b'{"key": ["reference", "wo')
    num_asked = 10**6
    again = evaluate_tasks(w4, tiny_model_dir("llama"), paths, journal=journal)
    assert again.num_resumed == num_kept
    assert num_asked - 10**6 == 18 - num_kept
    assert strip_time(again) == strip_time(whole)
    assert evaluate_tasks(w4, tiny_model_dir("llama"), paths, journal=journal).num_resumed == 18


def test_a_larger_limit_goes_on(tiny_model_dir: TinyModel, files: dict[str, Path], tmp_path: Path):
    folder, journal = tiny_model_dir("llama"), tmp_path / "j"
    first = evaluate_tasks(folder, folder, [files["choices"]], journal=journal, limit=1)
    assert [task.num_items for task in first.tasks] == [1]
    assert first.tasks[0].scores["acc"].difference_interval is None
    more = evaluate_tasks(folder, folder, [files["choices"]], journal=journal, limit=2)
    assert more.num_resumed == 2
    assert more.tasks[0].num_in_file == 3
    with pytest.raises(PowertrainError, match="limit must be at least 1"):
        evaluate_tasks(folder, folder, [files["choices"]], limit=0)


def test_a_journal_of_another_run_is_refused_by_name(
    tiny_model_dir: TinyModel, files: dict[str, Path], w4: Path, tmp_path: Path
):
    folder, journal = tiny_model_dir("llama"), tmp_path / "kept.journal"
    evaluate_tasks(folder, folder, [files["words"]], journal=journal)
    before = journal.read_bytes()

    def refused(what: str, candidate: Path = folder, name: str = "words", **options: Any) -> None:
        with pytest.raises(PowertrainError, match=rf"kept\.journal: holds results of another run: {what}"):
            evaluate_tasks(candidate, folder, [files[name]], journal=journal, **options)

    refused("candidate weights was [0-9a-f]{12} and is [0-9a-f]{12}; delete it", candidate=w4)
    refused("task choices was absent and is", name="choices")
    refused("separator was auto and is '_'", separator="_")
    refused("candidate kv_cache_dtype was .* and is int8", kv_cache_dtype="int8")
    files["words"].write_text(files["words"].read_text() + json.dumps(FILES["words"][0]) + "\n")
    refused("task words was [0-9a-f]{12} and is")
    assert journal.read_bytes() == before


def test_what_is_no_journal_or_damaged_is_refused_and_left_alone(tmp_path: Path):
    path = tmp_path / "j"
    for content in ("", "a letter\n", '{"kind": "evaluation", "header": {}}\n', '{"kind": "task-journal"'):
        path.write_text(content)
        with pytest.raises(PowertrainError, match="is there but is no journal of tasks"):
            Journal(path, {"a": "1"})
        assert path.read_text() == content
    path.unlink()
    key = ("candidate", "t", "00")
    with Journal(path, {"a": "1"}) as journal:
        journal.add(key, Answer((-1.5, -0.1 - 0.2), (True, False)))
    with Journal(path, {"a": "1"}) as journal:
        assert journal.get(key) == Answer((-1.5, -0.1 - 0.2), (True, False))
        assert journal.num_read == 1
    whole = path.read_text()
    for line in ('{"key": ["a"]}', "x", '{"key": ["a", "b", "c"], "logprobs": [NaN], "is_greedy": [true]}', ""):
        path.write_text(whole + line + "\n")
        with pytest.raises(PowertrainError, match=r"j:3: this journal is damaged"):
            Journal(path, {"a": "1"})
    with pytest.raises(PowertrainError, match="cannot"):
        Journal(tmp_path, {"a": "1"})


def test_every_cut_of_a_journal_loses_one_answer_at_most(tmp_path: Path):
    path = tmp_path / "j"
    keys = [("candidate", "t", str(number)) for number in range(3)]
    ends = []
    with Journal(path, {"a": "1"}) as journal:
        ends.append(path.stat().st_size)
        for number, key in enumerate(keys):
            journal.add(key, Answer((-1.0 * number,), (True,)))
            ends.append(path.stat().st_size)
    content = path.read_bytes()
    for length in range(ends[0], len(content) + 1):
        path.write_bytes(content[:length])
        with Journal(path, {"a": "1"}) as journal:
            num_whole = sum(end <= length for end in ends[1:])
            assert journal.num_read == num_whole
            assert [journal.get(key) is not None for key in keys] == [at < num_whole for at in range(3)]
            journal.add(keys[2], Answer((-2.0,), (True,)))
        with Journal(path, {"a": "1"}) as journal:
            assert journal.get(keys[2]) == Answer((-2.0,), (True,))


def test_a_broken_model_and_another_vocabulary_are_refused(
    tiny_model_dir: TinyModel, stories260k_dir: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    folder = tiny_model_dir("llama")
    with pytest.raises(PowertrainError, match="only models of one vocabulary"):
        evaluate_tasks(stories260k_dir, folder, [files["words"]])
    model = read_model(folder, dtype="float32")
    monkeypatch.setattr(model.decoder, "logits", lambda hidden: torch.full((len(hidden), 320), torch.nan))
    with pytest.raises(PowertrainError, match=r"words\.jsonl:1: the model gives no finite probabilities"):
        evaluate_tasks(model, folder, [files["words"]])


def test_context_of_no_token_begins_with_the_first_of_the_model(tiny_model_dir: TinyModel):
    """The tokens of a text need not begin with those of its beginning."""
    from powertrain.checkpoint.tokenizer_files import load_tokenizer
    from powertrain.measure.task_data import Item

    tokenizer = load_tokenizer(tiny_model_dir("llama"))
    item = Item(line=1, sha256="", contexts=("t", "t"), answers=("he", "own"), gold=0)
    question = encode_item(item, tokenizer, 512, separator="")
    for ids, count, text in zip(question.sequences, question.num_context, ("the", "town"), strict=True):
        assert 1 <= count < len(ids)
        assert tokenizer.decode(ids) == text


@pytest.mark.big
def test_arc_easy_on_the_default_model(smollm2_gguf: Path, shared_dir: Path):
    """Published for the whole set, 0-shot: 54.1 % of 2,376 items; 50 items know it to 7 points."""
    path = shared_dir / "data" / "arc" / "arc_easy_test.jsonl.gz"
    found = evaluate_tasks(smollm2_gguf, smollm2_gguf, [path], limit=50).tasks[0]
    score = found.scores["acc"]
    assert found.num_items == 50
    assert 0.30 < score.reference < 0.75
    assert score.flips <= 0.1, "the native kernels are the reference but for rounding"
    assert abs(found.gold_logprob["difference"]) < 0.1
