"""The CPU comparison's own parts: whose turn it is, what the rounds say, and contenders as processes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from powertrain.types import PowertrainError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

FAKE = """
import os, sys
sys.path.insert(0, sys.argv[1])
from wire import serve

class Fake:
    def about(self):
        print("a library greets")
        os.write(1, b"so does its C code\\n")
        return {"weight_bytes": 7}
    def step(self, count):
        print("noise")
        return {"seconds": 0.5 * count}
    def close(self):
        raise RuntimeError("nothing is open")
    def run(self):
        sys.stderr.write("out of luck\\n")
        sys.stderr.flush()
        os._exit(3)

serve(Fake)
"""


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The benchmark's modules by name; they are no part of the package, so they leave again."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield {name: importlib.import_module(f"peers.{name}") for name in ("works", "contender", "wire")}
    for name in [name for name in sys.modules if name == "peers" or name.startswith("peers.")]:
        del sys.modules[name]


def test_every_round_begins_with_the_next_contender(peers: dict[str, ModuleType]) -> None:
    order: list[str] = []

    def turn(name: str, rate: float) -> object:
        return lambda: (order.append(name), rate)[1]

    turns = {"a": turn("a", 1.0), "b": turn("b", 2.0), "c": turn("c", 3.0)}
    rates = peers["works"].take_turns(turns, 4, lambda: order.append("|"))
    assert "".join(order) == "|abc|bca|cab|abc"
    assert rates == {"a": [1.0] * 4, "b": [2.0] * 4, "c": [3.0] * 4}


def test_ratio_is_to_the_best_peer_of_the_same_round(peers: dict[str, ModuleType]) -> None:
    rates = {"ours": [10.0, 20.0, 30.0], "x": [5.0, 40.0, 10.0], "y": [4.0, 5.0, 60.0]}
    works = peers["works"]
    assert works.ratios_to_best(rates, "ours", ["x", "y"]) == [2.0, 0.5, 0.5]
    assert works.best_peer(rates, ["x", "y"]) == "x"  # by median: 10 against 5


def test_bytes_per_step_count_the_cache_at_its_mean_length(peers: dict[str, ModuleType]) -> None:
    works = {work.name: work for work in peers["works"].WORKS}
    decode = works["decode-4"]
    mean = decode.prompt + decode.output / 2
    assert decode.bytes_per_step(1000, 10, rounds=5) == 1000 + 4 * 10 * mean
    long = works["context-4096"]  # goes on from round to round, so its context grows over all of them
    assert long.bytes_per_step(0, 1, rounds=5) == 4096 + 5 * long.output / 2
    assert works["prefill-512"].bytes_per_step(1000, 10, rounds=5) is None


def test_all_contenders_get_the_same_prompts(peers: dict[str, ModuleType]) -> None:
    prompts = peers["wire"].random_prompts(3, 20, 100)
    assert prompts == peers["wire"].random_prompts(3, 20, 100)
    assert [len(ids) for ids in prompts] == [20] * 3
    assert len({tuple(ids) for ids in prompts}) == 3
    assert all(10 <= token < 90 for ids in prompts for token in ids)


def test_a_contender_answers_fails_and_dies_in_words(peers: dict[str, ModuleType], tmp_path: Path) -> None:
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    contender = peers["contender"]
    command = (sys.executable, str(script), str(BENCHMARKS / "peers"))
    with contender.Worker(contender.Contender(name="fake", format="none", command=command), tmp_path / "log") as worker:
        assert worker.about == {"weight_bytes": 7}  # what libraries print is not in the way
        assert worker.weight_bytes == 7
        assert worker.ask("step", count=3) == {"seconds": 1.5}
        with pytest.raises(PowertrainError, match="fake: RuntimeError: nothing is open"):
            worker.ask("close")
        assert worker.ask("step", count=1) == {"seconds": 0.5}
        with pytest.raises(PowertrainError, match=r"fake ended with status 3: (.|\n)*out of luck"):
            worker.ask("run")
