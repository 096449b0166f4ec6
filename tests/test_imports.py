"""The import law: which layer may know which, read from the source; and what each process really loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import powertrain

PACKAGE = Path(powertrain.__file__).parent

TOKENIZER = {"tokenizer", "tokenizer_gguf", "chat_template"}
BASE = {"types", "config"}
MODEL = BASE | {"kernels", "model"}
CHECKPOINT = MODEL | TOKENIZER | {"checkpoint"}
FACES = CHECKPOINT | {"engine", "llm", "outputs", "serve"}
COMMAND_LINE = {"cli", "cli_budget", "cli_distill", "cli_evaluate", "cli_export", "cli_options", "cli_output"}
EVERYTHING = FACES | {"compress", "distill", "measure", "optimize", "student_sampler", "text_data"} | COMMAND_LINE

MAY_IMPORT = {
    "types": set(),
    "config": {"types"},
    **dict.fromkeys(TOKENIZER, TOKENIZER | {"types"}),
    "kernels": BASE | {"kernels"},
    "model": MODEL,
    "text_data": TOKENIZER | {"types"},
    "checkpoint": CHECKPOINT,
    "compress": CHECKPOINT | {"compress", "text_data"},
    "distill": CHECKPOINT | {"compress", "distill", "text_data"},
    "engine": CHECKPOINT | {"engine"},
    "student_sampler": CHECKPOINT | {"distill", "engine"},
    "outputs": TOKENIZER | {"types"},
    "llm": FACES,
    "serve": FACES,
    "measure": EVERYTHING - COMMAND_LINE,
    "optimize": EVERYTHING - COMMAND_LINE,
    "cli_options": BASE,
    "cli_output": {"measure"},
    "cli": EVERYTHING,
    "cli_budget": EVERYTHING,
    "cli_distill": EVERYTHING,
    "cli_evaluate": EVERYTHING,
    "cli_export": EVERYTHING,
    "__main__": {"cli"},
    "__init__": EVERYTHING,
}

COMPUTE_LAYERS = ("kernels", "model", "checkpoint", "compress", "distill", "engine")
BARE_MACHINE = {"torch", "numpy", "safetensors", "tokenizers"}
NOT_ON_A_BARE_MACHINE = [
    *("fastapi", "pydantic", "starlette", "uvicorn", "h11", "httpx", "gguf", "msgspec", "typer", "rich", "yaml", "zmq"),
    *("jinja2", "transformers", "huggingface_hub", "prometheus_client", "openai", "compressed_tensors"),
]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(["powertrain", *(part for part in parts if part != "__init__")])


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative imports hide the law"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def imports(path: Path, *, with_functions: bool) -> Iterator[str]:
    """Dotted names imported by a file, without those under `if TYPE_CHECKING`."""
    todo: list[ast.AST] = [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        yield from imported(node)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
        elif with_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            todo += ast.iter_child_nodes(node)


def test_layers_know_only_those_below() -> None:
    offences = []
    for path in sources():
        layer = layer_of(path)
        assert layer in MAY_IMPORT, f"{layer} has no place in the import law yet: say what it may import"
        for name in imports(path, with_functions=True):
            is_own = name.startswith("powertrain.") and name != "powertrain.__version__"
            if is_own and name.split(".")[1] not in MAY_IMPORT[layer]:
                offences.append(f"{module_name(path)} imports {name}")
    assert not offences


@pytest.mark.parametrize(
    "layer", ["types", "config", "kernels", "model", "checkpoint", "compress", "distill", "engine"]
)
def test_the_compute_layers_need_only_the_libraries_of_a_bare_machine(layer: str) -> None:
    allowed = BARE_MACHINE | {"powertrain"} | set(sys.stdlib_module_names)
    for path in sources():
        if layer_of(path) == layer:
            roots = {name.split(".")[0] for name in imports(path, with_functions=False)}
            if path.parent.name == "gpu":
                roots.discard("triton")  # there with every torch for CUDA, and imported when a kernel first runs
            assert roots <= allowed, f"{module_name(path)} imports {roots - allowed}"


def test_package_markers_are_empty_where_the_law_says_so() -> None:
    for layer in ("checkpoint", "distill", "engine", "kernels", "model", "serve", "measure"):
        body = ast.parse((PACKAGE / layer / "__init__.py").read_text()).body
        assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body), layer


def test_files_stay_short() -> None:
    assert [module_name(path) for path in sources() if len(path.read_text().splitlines()) > 500] == []


BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

sys.meta_path.insert(0, Block())
"""


def run_blocked(code: str, blocked: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCK.format(blocked=blocked) + code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_a_bare_machine_can_run_the_engine_side() -> None:
    modules = [module_name(path) for path in sources() if layer_of(path) in COMPUTE_LAYERS]
    modules += [f"powertrain.measure.{name}" for name in ("bench", "bench_kernels", "explain")]
    code = "import importlib\n" + "".join(f"importlib.import_module({name!r})\n" for name in modules)
    run_blocked(code, NOT_ON_A_BARE_MACHINE)


def test_the_web_process_loads_no_torch() -> None:
    modules = [module_name(path) for path in sources() if layer_of(path) == "serve" and path.stem != "worker"]
    assert "powertrain.serve.router" in modules
    assert "powertrain.serve.app" in modules
    code = "import importlib\n" + "".join(f"importlib.import_module({name!r})\n" for name in modules)
    run_blocked(code, ["torch", "transformers"])


def test_gguf_metadata_needs_no_torch() -> None:
    run_blocked("import powertrain.checkpoint.gguf, powertrain.checkpoint.tokenizer_files", ["torch", "transformers"])


def test_importing_the_package_or_the_command_line_is_light() -> None:
    run_blocked("import powertrain; powertrain.SamplingParams", ["torch", "numpy", *NOT_ON_A_BARE_MACHINE])
    heavy = [name for name in NOT_ON_A_BARE_MACHINE if name not in ("typer", "rich", "pydantic")]
    run_blocked("import powertrain.cli", ["torch", "numpy", *heavy])
