"""What the README shows is run: the quick commands as they stand, the rest at least parsed, and every link followed."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from powertrain import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
VERBS = ["pull", "generate", "chat", "serve", "route", "compress", "evaluate", "bench kernels", "bench engine"]
VERBS += ["bench serve", "explain", "roofline", "optimize"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    lines = "\n".join(blocks("bash")).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def powertrain(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "powertrain", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT)


def test_the_first_screen_says_what_it_does_and_gives_two_commands() -> None:
    head = README.splitlines()[:24]
    assert any("makes a language model fast" in line for line in head)
    assert {"make demo", "make test"} <= {line.split("#")[0].strip() for line in head}


def test_help_lists_every_verb() -> None:
    shown = powertrain("--help").stdout
    for verb in VERBS:
        assert f" {verb.split()[0]} " in shown


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_each_verb(verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["powertrain", *verb.split(), "--help"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert f"powertrain {verb}" in out
    assert "--help" in out


@pytest.mark.parametrize("command", [c for c in commands() if c[0] == "powertrain"], ids=" ".join)
def test_shown_commands_parse(command: list[str]) -> None:
    """The flags exist and the values fit."""
    import typer.main

    parser, words = typer.main.get_command(cli.app), command[1:]
    while hasattr(parser, "commands"):
        parser = parser.commands[words.pop(0)]
    assert parser.make_context(command[1], words).args == []


def test_other_shown_commands_are_there() -> None:
    others = [command for command in commands() if command[0] != "powertrain"]
    makefile = (ROOT / "Makefile").read_text()
    for command in others:
        if command[0] == "make":
            assert re.search(rf"^{command[1]}:", makefile, re.MULTILINE)
        else:
            assert command[0] == "python"
            assert (ROOT / command[1]).is_file()


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_paths_named_in_the_docs_exist() -> None:
    for page in [ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for path in re.findall(r"`((?:src|tests|examples|scripts|benchmarks|docs)/[\w./-]+)`", page.read_text()):
            assert (ROOT / path).exists(), f"{page.name}: {path}"
        for path in re.findall(
            r"`((?:engine|serve|model|kernels|checkpoint|compress|measure|optimize)/[\w./]+\.py)`", page.read_text()
        ):
            assert (ROOT / "src" / "powertrain" / path).exists(), f"{page.name}: {path}"


def test_every_dependency_has_its_reason() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    reasons = (ROOT / "docs" / "dependencies.md").read_text()
    for listed in (project["dependencies"], *project["optional-dependencies"].values()):
        for requirement in listed:
            name = re.split(r"[<>=;\[ ]", requirement)[0]
            assert f"`{name}`" in reasons, name


def test_the_python_example_runs_on_a_small_model(stories260k_dir: Path, tmp_path: Path) -> None:
    """The README's own lines, with the model's name replaced by one that is here."""
    [code] = blocks("python")
    code = code.replace('"smollm2"', repr(str(stories260k_dir))).replace("num_tokens=2048", "num_tokens=128, window=64")
    code = code.replace('"group_size": 64', '"group_size": "channel"').replace("LLM(", "LLM(num_blocks=64, model=")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=150, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) > 0


def test_the_bench_example_runs_on_a_small_model(stories260k_dir: Path, tmp_path: Path) -> None:
    [command] = [c for c in commands() if c[:3] == ["powertrain", "bench", "engine"]]
    out = tmp_path / "record.json"
    sizes = ["--batch", "1,2", "--prompt", "16", "--output", "8", "--threads", "1", "--json", str(out)]
    done = powertrain("bench", "engine", str(stories260k_dir), *sizes)
    assert done.returncode == 0, done.stderr
    assert "floor" in done.stdout
    assert {flag for flag in command if flag.startswith("--")} <= set(sizes)
    assert out.is_file()
