"""Export a model to GGUF, continue prompts greedily with llama.cpp and with our engine, and count where they part.

llama.cpp comes from llama-cpp-python, in an environment of its own whose interpreter `--llama-python` names; without it
nothing is measured. Beside quantized matrices llama.cpp rounds activations, and so do our native kernels (`auto`), each
in its own way: they part where two tokens are nearly as likely. `behind` says how near: by how much the logit of
llama.cpp's token there lies below that of ours, as the reference kernels, which round no activation, have them.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import common
import torch

from powertrain.checkpoint.export_gguf import export_gguf
from powertrain.checkpoint.hub import resolve_model
from powertrain.checkpoint.load import load_model
from powertrain.checkpoint.source import open_checkpoint
from powertrain.checkpoint.tokenizer_files import load_tokenizer
from powertrain.llm import LLM
from powertrain.measure import record
from powertrain.model.decoder import Decoder
from powertrain.types import SamplingParams

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "The three most important rules of good writing are",
    "def fibonacci(n):",
    "Water boils at a lower temperature on a mountain because",
)

THEIRS = """
import json, sys
import llama_cpp
model_path, prompts, count = json.load(sys.stdin)
model = llama_cpp.Llama(model_path, n_ctx=512, n_threads=1, n_threads_batch=1, seed=0, verbose=False)
answers = []
for ids in prompts:
    model.reset()
    found = []
    for token in model.generate(ids, temp=0.0, repeat_penalty=1.0):
        found.append(token)
        if len(found) == count or token == model.token_eos():
            break
    answers.append(found)
print(json.dumps({"version": llama_cpp.__version__, "answers": answers}))
"""


def main() -> None:
    parser = common.parser(__doc__, "llama_cpp_agreement.json")
    parser.add_argument("--llama-python", type=Path, required=True, help="interpreter that has llama-cpp-python")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--types", default="f16,q8_0,q4_1,q4_0,q4_k")
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args()
    if not options.llama_python.is_file():
        print(f"skipped: {options.llama_python} is not there")
        return
    rows, version = [], ""
    for type_name in options.types.split(","):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            report = export_gguf(open_checkpoint(resolve_model(options.model)), path, type_name)
            row, version = compare(path, options.llama_python, options.tokens)
        rows.append({"type": type_name, "types": dict(report.types), **row})
        print(json.dumps(rows[-1]), flush=True)
    config = {"model": options.model, "tokens": options.tokens, "prompts": PROMPTS, "llama_cpp_python": version}
    common.write(options.json, record.new_record("llama_cpp_agreement", git=options.git, config=config, results=rows))


def compare(path: Path, python: Path, count: int) -> tuple[dict[str, Any], str]:
    """One file's row, and the version of llama-cpp-python."""
    tokenizer = load_tokenizer(path)
    prompts = [list(tokenizer.encode(prompt)) for prompt in PROMPTS]
    done = subprocess.run(
        [str(python), "-c", THEIRS], input=json.dumps([str(path), prompts, count]), capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    answered = json.loads(done.stdout)
    exact = load_model(open_checkpoint(path), "cpu", torch.float32)
    row: dict[str, Any] = {"of_tokens": [len(answer) for answer in answered["answers"]]}
    for kernels in ("auto", "reference"):
        with LLM(path, kernels=kernels) as llm:
            made = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=count))
        ours = [list(output.outputs[0].token_ids) for output in made]
        row[kernels] = _where_they_part(prompts, ours, answered["answers"], exact)
    return row, answered["version"]


def _where_they_part(
    prompts: list[list[int]], ours: list[list[int]], theirs: list[list[int]], exact: Decoder
) -> dict[str, list[float]]:
    """Tokens until the first difference of each prompt; at each difference, how far theirs is behind ours."""
    agreed: list[float] = []
    behind: list[float] = []
    for prompt, own, other in zip(prompts, ours, theirs, strict=True):
        at = next((at for at, (one, two) in enumerate(zip(own, other, strict=False)) if one != two), None)
        agreed.append(min(len(own), len(other)) if at is None else at)
        if at is not None:
            logits = exact.score(torch.tensor([*prompt, *own[:at]]))[-1]
            behind.append(round(float(logits[own[at]] - logits[other[at]]), 4))
    return {"agreed_tokens": agreed, "behind": behind}


if __name__ == "__main__":
    main()
