"""The build of the native kernels: what an install holds with a C++ compiler and without one, and what it says then."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from powertrain.kernels import native

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path.name for path in (ROOT / "src/powertrain/kernels/native").iterdir())
DESCRIBE = "import powertrain; from powertrain.kernels import native; print(powertrain.__file__, native.describe())"


def build_tool(*names: str) -> str:
    """The first of these programs beside this Python or on the PATH; skips where there is none."""
    path = sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"]
    for name in names:
        if found := shutil.which(name, path=path):
            return found
    pytest.skip(f"no {' or '.join(names)} here")


def run(*command: str | Path, cwd: Path, timeout: float = 100, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command with nothing of our own module search in its environment."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "POWERTRAIN_NATIVE")}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def build(what: str, out: Path) -> Path:
    """Run a hook of the build backend in the checkout; returns the archive that it made in `out`."""
    code = f"from scikit_build_core.build import {what} as build; build({str(out)!r})"
    done = run(sys.executable, "-c", code, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr
    [archive] = out.iterdir()
    return archive


@pytest.fixture
def python_without_compiler(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A new environment that sees this one's libraries, but not its powertrain; and variables that hide compilers."""
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).stdout.strip()
    # Python reads no .pth file in a folder that a .pth file names, so the editable install stays behind.
    (Path(purelib) / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (tmp_path / "bin").mkdir()
    for tool in (build_tool("cmake"), build_tool("ninja", "make")):
        (tmp_path / "bin" / Path(tool).name).symlink_to(tool)
    return python, {"PATH": str(tmp_path / "bin"), "CC": str(tmp_path / "no-cc"), "CXX": str(tmp_path / "no-c++")}


def test_without_a_compiler_it_installs_runs_and_says_so(
    python_without_compiler: tuple[Path, dict[str, str]], tiny_model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    python, no_compiler = python_without_compiler
    install = ("--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed", "--verbose", ROOT)
    pip = (sys.executable, "-m", "pip", "--python", python, "install", *install)
    installed = run(*pip, cwd=tmp_path, **no_compiler)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    assert "could not find the compiler" in (installed.stdout + installed.stderr).lower()

    described = run(python, "-c", DESCRIBE, cwd=tmp_path).stdout
    assert described.startswith(str(tmp_path)), "the installed package, not the checkout"
    package = Path(described.split()[0]).parent
    assert not [*package.rglob("*.so"), *package.rglob("*.cpp")]
    reason = "native kernels: none (not built: powertrain was installed without a working C++20 compiler;"
    assert reason in described

    command = python.parent / "powertrain"
    model = tiny_model_dir("llama")
    answered = run(command, "generate", model, "hello", "--max-tokens", "3", "--threads", "1", cwd=tmp_path)
    assert answered.returncode == 0, answered.stderr
    card = run(command, "roofline", model, "--threads", "1", cwd=tmp_path, COLUMNS="200")
    assert reason in card.stdout, card.stderr


def test_a_source_tree_runs_without_a_build_and_is_not_taken_for_another(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("*.so", "__pycache__", "native"))
    done = run(sys.executable, "-c", DESCRIBE, cwd=tmp_path, PYTHONPATH=str(tmp_path / "src"))
    assert done.stdout.startswith(str(tmp_path / "src")), done.stderr
    assert "native kernels: none (not built" in done.stdout
    assert "the reference path runs" in done.stdout


def test_what_is_described_is_what_the_machine_has() -> None:
    module = native.load()
    if module is None:
        assert native.unavailable() in native.describe()
        pytest.skip(native.describe())
    assert native.unavailable() is None
    assert native.describe() == f"native kernels: {module.levels()[0]}"
    assert module.levels()[-1] == "portable"
    assert native.load() is module


@pytest.mark.parametrize("name", ["absent.so", "broken.so", "no_module.txt"])
def test_a_named_build_that_does_not_load_is_an_error_not_the_reference_path(name: str, tmp_path: Path) -> None:
    if name != "absent.so":
        (tmp_path / name).write_text("not a module")
    code = DESCRIBE.replace("native.describe()", "native.load()")
    environment = {"PYTHONPATH": str(ROOT / "src"), "POWERTRAIN_NATIVE": str(tmp_path / name)}
    done = run(sys.executable, "-c", code, cwd=tmp_path, **environment)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith(
        f"powertrain.types.PowertrainError: POWERTRAIN_NATIVE: {tmp_path / name} "
    )


def test_the_source_archive_holds_what_a_build_and_a_test_run_need(tmp_path: Path) -> None:
    with tarfile.open(build("build_sdist", tmp_path / "out")) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {f"src/powertrain/kernels/native/{source}" for source in SOURCES} <= names
    assert {"pyproject.toml", "Makefile", "README.md", "LICENSE", "CHANGELOG.md", "scripts/demo.sh"} <= names
    assert {"docs/structure.md", "examples/chat_stream.py", "tests/conftest.py", "src/powertrain/py.typed"} <= names
    assert not [name for name in names if name.endswith(".so") or name.startswith((".venv", "build", "demo-out"))]


@pytest.mark.big
@pytest.mark.timeout(600)
def test_a_wheel_holds_the_module_and_not_its_sources(tmp_path: Path) -> None:
    """Compiles every level: a minute or more."""
    with zipfile.ZipFile(build("build_wheel", tmp_path / "out")) as wheel:
        names = wheel.namelist()
        wheel.extractall(tmp_path / "site")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert f"powertrain/kernels/_native{suffix}" in names
    assert "powertrain/kernels/native.py" in names
    assert not [name for name in names if name.startswith("powertrain/kernels/native/")]
    done = run(sys.executable, "-c", DESCRIBE, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert done.stdout.startswith(str(tmp_path / "site")), done.stderr
    assert "none" not in done.stdout
