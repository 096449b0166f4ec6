"""The command line: what each verb passes on, what errors look like. Models are tiny; nothing leaves the machine."""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from powertrain import __version__, cli
from powertrain.config import EngineConfig, ServerConfig, SpeculationConfig
from powertrain.types import PowertrainError, SamplingParams

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run("pull", "x") -> (exit status, stdout, stderr)`, in this process."""

    def call(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["powertrain", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        code = ended.value.code
        return (code if isinstance(code, int) else 0), out, err

    return call


def flags_of(verb: Callable[..., None]) -> set[str]:
    return set(inspect.signature(verb).parameters)


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"powertrain {__version__}\n", "")


@pytest.mark.parametrize("verb", [cli.generate, cli.chat, cli.serve, cli.bench_engine, cli.explain])
def test_every_engine_option_is_a_flag(verb: Callable[..., None]) -> None:
    options = {field.name for field in dataclasses.fields(EngineConfig)} - {"cache", "scheduler", "speculation"}
    default = EngineConfig()
    for part in (default.cache, default.scheduler):
        options |= {field.name for field in dataclasses.fields(part)}
    assert options | {"speculative_config"} <= flags_of(verb)


@pytest.mark.parametrize("verb", [cli.generate, cli.chat])
def test_sampling_flags_are_sampling_parameters(verb: Callable[..., None]) -> None:
    known = {field.name for field in dataclasses.fields(SamplingParams)}
    assert {"temperature", "top_p", "top_k", "min_p", "max_tokens", "stop"} <= flags_of(verb) & known


@pytest.mark.parametrize(
    "verb",
    [
        cli.compress,
        cli.evaluate,
        cli.export,
        cli.bench_kernels,
        cli.bench_engine,
        cli.bench_serve,
        cli.explain,
        cli.roofline,
        cli.optimize,
    ],
)
def test_measuring_verbs_take_json(verb: Callable[..., None]) -> None:
    assert "json" in flags_of(verb)


def test_serve_passes_its_flags_on(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import powertrain.serve.run

    seen: list[Any] = []
    monkeypatch.setattr(powertrain.serve.run, "serve", lambda *given: seen.append(given) or 0)
    arguments = ["--max-num-seqs", "3", "--no-enable-prefix-caching", "--api-key", "a", "--api-key", "b", "--port", "0"]
    draft = '{"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}'
    assert run("serve", str(tmp_path), *arguments, "--speculative-config", draft) == (0, "", "")
    path, engine, server = seen[0]
    assert path == tmp_path
    assert engine.scheduler.max_num_seqs == 3
    assert not engine.cache.enable_prefix_caching
    assert engine.speculation == SpeculationConfig(num_speculative_tokens=2, prompt_lookup_max=3)
    assert server == ServerConfig(port=0, api_keys=("a", "b"), served_model_name=tmp_path.name)
    assert engine.max_model_len is None


def test_keys_come_from_the_environment_too(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import powertrain.serve.run

    seen: list[Any] = []
    monkeypatch.setattr(powertrain.serve.run, "serve", lambda *given: seen.append(given) or 0)
    monkeypatch.setenv("POWERTRAIN_API_KEY", "x,y")
    assert run("serve", str(tmp_path))[0] == 0
    assert seen[0][2].api_keys == ("x", "y")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "no-such-model", "x"], "no-such-model"),
        (["serve", "no-such-model"], "no-such-model"),
        (["roofline", "no-such-model"], "no-such-model"),
        (["optimize", "no-such-model", "out"], "no-such-model"),
        (["generate", ".", "x", "--max-tokens", "-3"], "max_tokens"),
        (["generate", ".", "x", "--temperature", "nan"], "temperature"),
        (["generate", ".", "x", "--speculative-config", "{"], "--speculative-config must be JSON like"),
        (["generate", ".", "x", "--speculative-config", '{"a": 1}'], "--speculative-config must be JSON like"),
        (["bench", "engine", ".", "--batch", "1,x"], "--batch must be numbers"),
        (["bench", "serve", "--concurrency", "2", "--rate", "3"], "--concurrency"),
        (["bench", "serve", "http://127.0.0.1:9", "--num-requests", "1"], "no server at http://127.0.0.1:9"),
        (["bench", "serve", "nonsense", "--num-requests", "1"], "no server at nonsense"),
        (["compress", ".", "out", "--recipe", "r.yaml", "--group-size", "32"], "--group-size goes with a preset"),
        (["compress", ".", "out", "--recipe", "nope"], "nope"),
        (["export", "no-such-model", "x.gguf", "--type", "q4_0"], "no-such-model"),
        (["route", "--replica", "localhost:8000"], "give a full address"),
        (["route", "--replica", "http://a", "--replica", "http://a"], "twice"),
    ],
)
def test_what_the_user_can_act_on_is_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run(*arguments)
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["generate"], ["generate", "m", "p", "--nonsense"], ["serve", "m", "--port", "x"]]
)
def test_usage_errors_are_2(run: Run, arguments: list[str]) -> None:
    status, _, err = run(*arguments)
    assert status == 2
    assert "Usage" in err


def test_interrupts_are_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_name: str) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr("powertrain.checkpoint.hub.resolve_model", interrupt)
    assert run("serve", "m")[0] == 130


def test_a_message_of_several_lines_is_still_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_name: str) -> Path:
        raise PowertrainError("first\nsecond")

    monkeypatch.setattr("powertrain.checkpoint.hub.resolve_model", fail)
    assert run("serve", "m") == (1, "", "error: first second\n")


def test_a_busy_port_says_so(run: Run, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments in (["route", "--replica", "http://127.0.0.1:9"], ["serve", str(tmp_path)]):
            status, out, err = run(*arguments, "--port", port)
            assert (status, out) == (1, "")
            assert port in err
            assert "--port" in err


def test_pull_prints_the_path_and_the_next_command(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("powertrain.checkpoint.hub.pull", lambda name, progress: tmp_path / name)
    status, out, err = run("pull", "smollm2")
    assert (status, out) == (0, f"{tmp_path / 'smollm2'}\n")
    assert err == 'next: powertrain generate smollm2 "Once upon a time"\n'


def test_generate_streams_text_and_tells_the_speed(run: Run, stories260k_dir: Path) -> None:
    engine = ["--num-blocks", "64", "--threads", "1"]
    status, out, err = run("generate", str(stories260k_dir), "Once upon a time", "--max-tokens", "12", *engine)
    assert status == 0
    assert len(out.strip()) > 10
    assert "[12 tokens, first after" in err
    assert "\x1b" not in err
    again = run("generate", str(stories260k_dir), "-", "--max-tokens", "12", *engine, stdin="Once upon a time")
    assert again[1] == out


def test_chat_keeps_the_history(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import powertrain.llm

    @dataclasses.dataclass
    class Piece:
        text: str
        token_ids: list[int]

    asked: list[list[dict[str, str]]] = []

    class FakeLLM:
        def __init__(self, model: str, **options: Any) -> None:
            assert (model, options) == ("m", {"threads": 1})

        def __enter__(self) -> FakeLLM:
            return self

        def __exit__(self, *exception: object) -> None: ...

        def stream_chat(self, messages: list[dict[str, str]], _params: SamplingParams) -> Iterator[Piece]:
            asked.append(list(messages))
            yield from (Piece("Hel", [1]), Piece(f"lo {len(asked)}", [2, 3]))

    monkeypatch.setattr(powertrain.llm, "LLM", FakeLLM)
    status, out, _ = run("chat", "m", "--system", "be kind", "--threads", "1", stdin="hi\n\nyou?\n/exit\nnever\n")
    assert (status, out.replace("Hello", "|Hello").split("|")[1:]) == (0, ["Hello 1\n", "Hello 2\n"])
    assert [message["content"] for message in asked[1]] == ["be kind", "hi", "Hello 1", "you?"]
    assert len(asked) == 2


def test_compress_evaluate_and_roofline_on_a_real_model(run: Run, stories260k_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "int8"
    made = tmp_path / "made.json"
    status, text, err = run("compress", str(stories260k_dir), str(out), "--recipe", "W8A16", "--json", str(made))
    assert status == 0, err
    assert "bits per weight" in text
    assert f"next: powertrain evaluate {out} --reference {stories260k_dir}" in err
    assert json.loads(made.read_text())["kind"] == "compression"
    assert "already" in run("compress", str(stories260k_dir), str(out), "--recipe", "W8A16")[2]

    judged = tmp_path / "judged.json"
    options = ["--num-tokens", "256", "--window", "64", "--json", str(judged)]
    status, text, err = run("evaluate", str(out), "--reference", str(stories260k_dir), *options)
    assert status == 0, err
    assert "kl_mean" in text
    assert 0 < json.loads(judged.read_text())["kl_mean"] < 0.05
    assert json.loads((out / "powertrain.json").read_text())["evaluation"] == json.loads(judged.read_text())
    dry = run("compress", str(stories260k_dir), str(tmp_path / "none"), "--recipe", "W8A16", "--dry-run")
    assert dry[0] == 0
    assert "self_attn.q_proj" in dry[1]
    assert dry[1].splitlines()[-1].startswith("at most about 0 MB of memory beside Python's own; more layers")
    assert not (tmp_path / "none").exists()


def test_compress_rotates_a_twin_and_scales_before_it_rounds(run: Run, stories260k_dir: Path, tmp_path: Path) -> None:
    source, twin, out = str(stories260k_dir), str(tmp_path / "twin"), str(tmp_path / "awq")
    status, text, err = run("compress", source, twin, "--recipe", "rotated", "--dtype", "float32")
    assert status == 0, err
    assert "dense float32 weights" in text
    judged = tmp_path / "judged.json"
    options = ["--num-tokens", "256", "--window", "64", "--json", str(judged)]
    assert run("evaluate", twin, "--reference", source, *options)[0] == 0
    assert abs(json.loads(judged.read_text())["kl_mean"]) < 1e-6
    words = tmp_path / "text.txt"
    words.write_text("Once upon a time there was a small engine that lived in a red barn near the river. " * 20)
    shape = ["--group-size", "channel", "--calibration-length", "32", "--calibration-samples", "4"]
    command = ["compress", source, out, "--recipe", "W4A16", "--method", "awq", "--calibration", str(words)]
    status, text, err = run(*command, *shape, "--device", "cpu")
    assert status == 0, err
    steps = json.loads((tmp_path / "awq" / "powertrain.json").read_text())["recipe"]["steps"]
    assert [step["method"] for step in steps] == ["awq", "rtn"]


def test_export_writes_a_file_and_a_folder(run: Run, stories260k_dir: Path, tmp_path: Path) -> None:
    file, folder, made = tmp_path / "m.gguf", tmp_path / "plain", tmp_path / "made.json"
    status, text, err = run("export", str(stories260k_dir), str(file), "--type", "Q4_K", "--json", str(made))
    assert status == 0, err
    assert "30 Q5_0" in text
    assert "Q5_0 for Q4_K in rows of 64, which blocks do not divide" in text
    assert "F16 for Q4_K in rows of 172" in text
    assert json.loads(made.read_text())["types"] == {"Q5_0": 30, "F16": 5, "Q8_0": 1}
    assert run("export", str(file), str(folder), "--type", "bf16")[0] == 0
    assert (folder / "model.safetensors").is_file()
    assert "q4_0 is for a .gguf file" in run("export", str(file), str(tmp_path / "no"), "--type", "q4_0")[2]


@pytest.mark.parametrize("is_qualified", [True, False])
def test_optimize_passes_its_limits_on_and_its_status_back(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_qualified: bool
) -> None:
    import powertrain.optimize.run as module

    seen: dict[str, Any] = {}

    class Result:
        record: ClassVar = {"kind": "optimize"}

        def __init__(self) -> None:
            self.is_qualified = is_qualified

        def table(self) -> str:
            return "the table"

        def summary(self) -> str:
            return "the summary"

    def optimize(model: str, out: Path, **given: Any) -> Result:
        seen.update(given, model=model, out=out)
        return Result()

    monkeypatch.setattr(module, "optimize", optimize)
    limits = ["--tpot-ms", "20", "--max-kl", "0.05", "--max-memory", "600MB", "--batch", "4", "--num-tokens", "99"]
    status, out, _ = run("optimize", "m", str(tmp_path / "o"), *limits, "--json", str(tmp_path / "r.json"))
    assert (status, out) == (0 if is_qualified else 1, "the table\nthe summary\n")
    assert (seen["tpot_ms"], seen["max_kl"], seen["max_memory"], seen["batch"]) == (20.0, 0.05, "600MB", 4)
    assert seen["effort"] == module.Effort(num_tokens=99)
    assert json.loads((tmp_path / "r.json").read_text()) == {"kind": "optimize"}


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_route_starts_answers_and_stops_cleanly() -> None:
    command = [sys.executable, "-m", "powertrain", "route", "--replica", "http://127.0.0.1:9", "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith("routing http://127.0.0.1:")
        port = int(line.split()[1].rsplit(":", 1)[1])
        deadline = time.monotonic() + 20
        while True:
            with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
                if connection.recv(100).startswith(b"HTTP/1.1 503"):
                    break
            assert time.monotonic() < deadline
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()
