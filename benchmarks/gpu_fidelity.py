"""Whether the engine on a GPU computes what the float32 reference on the CPU does, for a real model on held-out text.

Teacher-forced: KL and argmax agreement of next-token distributions, for floats, 8-bit caches and quantized weights;
the reference has the same integers or 8-bit floats, so that the kernels are judged and not the rounding. Continued:
greedy texts of the float32 engine on the GPU against the CPU's, and against itself with each engine option on.
Exits 1 where a bar is missed; the same command again goes on with what its record lacks. docs/gpu-kernels.md says how
to read the record. Needs torch, numpy, safetensors and tokenizers only.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import parser, write

from powertrain.checkpoint.hub import resolve_model
from powertrain.checkpoint.load import load_decoder
from powertrain.checkpoint.source import open_checkpoint
from powertrain.checkpoint.tokenizer_files import load_tokenizer
from powertrain.compress.quantize import rtn
from powertrain.config import EngineConfig, KVCacheDType, physical_cores, resolve
from powertrain.engine.core import Engine
from powertrain.kernels.op import choosing
from powertrain.kernels.rounding import quantize_to_float8
from powertrain.measure import record
from powertrain.measure.scoring import targets
from powertrain.measure.statistics import TokenScores, compare_logits, summarize
from powertrain.model.decoder import Decoder
from powertrain.model.float8 import Float8, Float8Weight
from powertrain.model.quantized_input import QuantizedInput
from powertrain.model.weights import IntWeight, WeightFormat, pack_int_weight
from powertrain.text_data import Window, encode_texts, read_texts, spread, token_sha256, windows_of
from powertrain.types import PowertrainError, QuantScheme, Request, SamplingParams

LONG_CHUNK, SHORT_CHUNKS = 512, (48, 1)
"""Tokens of a forward pass: long windows take the prompts' kernels, short ones those of few rows and of decodes."""

SHORT_WINDOW = 128
SHORT_AGREEMENT = 0.95
"""Argmax agreement asked of the short windows: of some 500 tokens, two standard errors below the 97 % of thousands."""

ROUNDED_FACTOR = 1.5
"""Where inputs are rounded to 8 bits, the last bit of a 16-bit number decides between two steps: so much more than the
reference itself loses in 16 bits on the same device may a product lose."""

EQUAL_TEXTS = 0.95
LARGEST_GAP = 0.01
"""Where greedy texts part, the reference must hold the two tokens for nearly equal: difference of logits."""

IN_DTYPE = "kl_mean_of_reference_in_dtype"
"""What torch's products lose in the same dtype on the same device: a product's share of the KL is what exceeds it."""

SHOWN = ("kl_mean", "kl_p99", "top1_agreement", "ppl_reference", "ppl_candidate")
GREEDY = "greedy"
SHARED_PREFIX = 128
BLOCK_SIZE = 16

QuantizedWeight = IntWeight | Float8Weight
Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What the GPU holds and rounds in a teacher-forced comparison, and the bars on it.

    `quantize`: float32 [out, in] to what both sides multiply; None leaves the weights as floats.
    """

    name: str
    max_kl: float
    min_agreement: float | None = None
    dtype: str = "bfloat16"
    kv_cache_dtype: KVCacheDType = "auto"
    quantize: Callable[[torch.Tensor], QuantizedWeight] | None = None
    rounds_input: bool = False
    covers_head: bool = False


def _to_integers(scheme: QuantScheme, weight: torch.Tensor) -> IntWeight:
    # scales of 16 bits, as checkpoints have them: on a CPU the 4-bit format rounds them so, and both sides must agree
    return rtn(weight, scheme, scale_dtype=torch.bfloat16)[0]


def _to_float8(weight: torch.Tensor) -> Float8Weight:
    values, scale = quantize_to_float8(weight)
    return Float8Weight(values, scale[:, 0])


_int8 = partial(_to_integers, QuantScheme(num_bits=8))
_int4 = partial(_to_integers, QuantScheme(num_bits=4, group_size=64))

SUBJECTS = (
    Subject(name="float32", dtype="float32", max_kl=1e-6, min_agreement=0.998),
    Subject(name="bfloat16", max_kl=0.002, min_agreement=0.97),
    Subject(name="int8 cache", max_kl=0.01, kv_cache_dtype="int8"),
    Subject(name="fp8 cache", max_kl=0.01, kv_cache_dtype="fp8"),
    Subject(name="int8 W8A16, head too", max_kl=0.002, quantize=_int8, covers_head=True),
    Subject(name="int4 W4A16 g64", max_kl=0.002, quantize=_int4),
    Subject(name="int8 W8A8", max_kl=0.01, quantize=_int8, rounds_input=True),
    Subject(name="fp8 W8A8", max_kl=0.01, quantize=_to_float8, rounds_input=True),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """Engine options that must not change a text. `effect` names the statistic that shows that they did something."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    effect: str | None = None
    is_tight: bool = False
    """Whether the cache has few blocks."""
    is_captured: bool = True
    """Whether decode steps are CUDA graphs."""
    is_together: bool = True

    @property
    def row(self) -> str:
        """The name of its row in the record."""
        return f"{GREEDY}, {self.name}"


_SPECULATION = {"num_speculative_tokens": 4}
_PREFIXES = {"enable_prefix_caching": True}
PLAIN = Variant(name="plain")
VARIANTS = (
    PLAIN,
    # a step's budget below all prompts: the later ones find the blocks of the first
    Variant(name="prefix cache", options={**_PREFIXES, "max_num_batched_tokens": 256}, effect="prefix_cache_hits"),
    Variant(name="steps of 64 tokens", options={"max_num_batched_tokens": 64}),
    Variant(name="few blocks", is_tight=True, effect="num_preemptions"),
    Variant(name="one request at a time", is_together=False),
    Variant(name="no graphs", is_captured=False),
    Variant(name="n-gram speculation", options=_SPECULATION, effect="accepted_draft_tokens"),
    Variant(
        name="all of these",
        options={**_SPECULATION, **_PREFIXES, "max_num_batched_tokens": 64},
        is_tight=True,
        effect="num_preemptions",
    ),
)


def main() -> None:
    given = _arguments()
    torch.set_num_threads(given.threads)
    torch.set_float32_matmul_precision("highest")  # no TF32
    try:
        path = resolve_model(given.model)
        token_ids = encode_texts(read_texts(given.data), load_tokenizer(path))
        prompts = _prompts(token_ids, given.prompts)
        decoders = _Decoders(path, given.device)
        windows = spread(windows_of(token_ids, given.window), given.num_tokens)
        short = spread(windows_of(token_ids, min(SHORT_WINDOW, given.window)), given.decode_tokens)
    except PowertrainError as error:
        sys.exit(f"error: {error}")
    config = {"window": given.window, "output": given.output, "device": given.device}
    about = {"model": path.name, "data": given.data.name, "data_sha256": token_sha256([*windows, *short])}
    about |= {"config": config}
    measured = _measured(given.json, about, record.git_state(given.git))
    forced, texts = measured["teacher_forced"], measured["texts"]

    def made() -> Row:
        missed = [sentence for row in (*forced, *texts) for sentence in _missed(row)]
        content = {"seconds": sum(row["seconds"] for row in (*forced, *texts)), "missed": missed}
        return record.new_record("gpu_fidelity", git=given.git, **about, **content, teacher_forced=forced, texts=texts)

    for subject in SUBJECTS:
        if given.only in subject.name and subject.name not in {row["subject"] for row in forced}:
            forced += [row | {"subject": subject.name} for row in _teacher_forced(decoders, subject, windows, short)]
            # after each: an interruption keeps what was measured
            record.write_record(given.json, made())
    lacking = [one for one in VARIANTS if given.only in one.row and one.row not in {row["name"] for row in texts}]
    for row in _texts(decoders, prompts, given.output, lacking) if lacking else ():
        texts.append(row)
        record.write_record(given.json, made())
    missed = made()["missed"]
    write(given.json, made())
    print("\n".join(f"MISSED {sentence}" for sentence in missed) or "every bar is met")
    sys.exit(1 if missed else 0)


def _measured(path: Path, about: Row, git: Row) -> dict[str, list[Row]]:
    """The rows that an earlier run of the same commit, model, text and settings has left in the record."""
    rows: dict[str, list[Row]] = {"teacher_forced": [], "texts": []}
    if path.is_file():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if all(earlier.get(key) == value for key, value in {**about, "git": git}.items()):
            rows = {name: earlier[name] for name in rows}
    return rows


def _arguments() -> argparse.Namespace:
    arguments = parser(__doc__, "gpu_fidelity.json")
    arguments.add_argument("--model", default="smollm2", help="a model's name, folder or GGUF file")
    arguments.add_argument(
        "--data", type=Path, required=True, help="a text that is not of the model's training, or .gz"
    )
    arguments.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: only to see that all runs")
    arguments.add_argument("--num-tokens", type=int, default=4096, help="of the text, in windows of --window")
    arguments.add_argument("--window", type=int, default=512)
    arguments.add_argument("--decode-tokens", type=int, default=512, help=f"in windows of {SHORT_WINDOW}")
    arguments.add_argument("--prompts", type=int, default=40)
    arguments.add_argument("--output", type=int, default=64, help="tokens of each greedy text")
    arguments.add_argument("--only", default="", help=f"comparisons whose names contain this: fp8 W8A8, {GREEDY}, ...")
    arguments.add_argument("--threads", type=int, default=physical_cores(), help="of the reference on the CPU")
    given = arguments.parse_args()
    names = [*(subject.name for subject in SUBJECTS), *(variant.row for variant in VARIANTS)]
    if not any(given.only in name for name in names):
        sys.exit(f"error: --only {given.only!r} is in no comparison's name: {', '.join(names)}")
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device; --device cpu shows that it runs")
    return given


def _attempt(name: str, measure: Callable[[], Row]) -> Row:
    """The row of one measurement with its seconds; a failure is a row too: it must not hide what the others find."""
    started = time.perf_counter()
    row: Row
    try:
        row = {"name": name, **measure()}
    except Exception as error:
        row = {"name": name, "error": f"{type(error).__name__}: {error}"}
    row["seconds"] = time.perf_counter() - started
    print(_line(row), flush=True)
    return row


def _line(row: Row) -> str:
    if "error" in row:
        found = row["error"]
    elif "kl_mean" in row:
        found = f"KL {row['kl_mean']:.2e}  argmax {row['top1_agreement']:7.2%}  of {row['num_tokens']} tokens"
        found += f"  (reference in {row['dtype']} {row[IN_DTYPE]:.2e})" if IN_DTYPE in row else ""
    else:
        found = f"{row['num_equal']} of {row['num_texts']} equal, largest gap {row['largest_gap']:.1e}"
    mark = "!" if _missed(row) else " "
    return f"{mark} {row['name']:<36} {found}  {row['seconds']:.1f} s"


def _missed(row: Row) -> list[str]:
    """One sentence for each bar that the row misses."""
    if "error" in row:
        return [f"{row['name']}: {row['error']}"]
    sentences = []
    for name, bar in row["bars"].items():
        low, high = bar.get("min", float("-inf")), bar.get("max", float("inf"))
        if not low <= row[name] <= high:
            sentences.append(f"{row['name']}: {name} {row[name]:.6g}, bar {bar}")
    return sentences


# ---- models ----


class _Decoders:
    """The model as the float32 reference on the CPU, and as the device under test has it, by dtype."""

    def __init__(self, path: Path, device: str) -> None:
        self.device = torch.device(device)
        self.config = {"device": device, "kernels": "triton" if device == "cuda" else "reference"}
        self.reference_config = {"device": "cpu", "dtype": "float32", "kernels": "reference"}
        self.reference = _load(path, self.reference_config)
        self.tested = {dtype: _load(path, {**self.config, "dtype": dtype}) for dtype in ("float32", "bfloat16")}


def _load(path: Path, options: dict[str, Any]) -> Decoder:
    config = EngineConfig.from_options(**options)
    return load_decoder(open_checkpoint(path), resolve(config, has_cuda=torch.cuda.is_available(), model_dtype="auto"))


@contextmanager
def _with_weights(decoder: Decoder, weights: Sequence[QuantizedWeight], rounds_input: bool) -> Iterator[None]:
    """The decoder's first products multiply these, those after them what they did."""
    changed = decoder.linears()[: len(weights)]
    before = [linear.formats for linear in changed]
    try:
        for linear, weight in zip(changed, weights, strict=True):
            linear.formats = [_format(weight, decoder.device, rounds_input)]
        yield
    finally:
        for linear, formats in zip(changed, before, strict=True):
            linear.formats = formats


def _format(weight: QuantizedWeight, device: torch.device, rounds_input: bool) -> WeightFormat:
    if isinstance(weight, Float8Weight):
        return Float8.pack(weight, device, rounds_input)
    packed = pack_int_weight(weight, device)
    return QuantizedInput(packed, None) if rounds_input else packed


def _rounds_input(subject: Subject, device: torch.device, chunk: int) -> bool:
    """Whether W8A8 rounds its input in passes of `chunk` tokens: for few, a GPU leaves it as it is."""
    if subject.rounds_input and device.type == "cuda":
        from powertrain.kernels.quantized import MAX_UNROUNDED_ROWS

        dtype = torch.float8_e4m3fn if subject.quantize is _to_float8 else torch.int8
        return chunk > MAX_UNROUNDED_ROWS[dtype]
    return subject.rounds_input


# ---- teacher-forced ----


def _teacher_forced(
    decoders: _Decoders, subject: Subject, windows: Sequence[Window], short: Sequence[Window]
) -> Iterator[Row]:
    reference = decoders.reference.with_kv_cache_dtype(subject.kv_cache_dtype)
    tested = decoders.tested[subject.dtype].with_kv_cache_dtype(subject.kv_cache_dtype)
    weights: list[QuantizedWeight] = []
    if subject.quantize is not None:
        linears = reference.linears() if subject.covers_head else reference.linears()[:-1]
        floats = (torch.cat([part.unpack().float() for part in linear.formats]) for linear in linears)
        weights = [subject.quantize(weight) for weight in floats]
    with _with_weights(tested, weights, subject.rounds_input):
        for chunk in (LONG_CHUNK, *SHORT_CHUNKS):
            chosen = windows if chunk == LONG_CHUNK else short
            is_rounded = _rounds_input(subject, decoders.device, chunk)
            with _with_weights(reference, weights, is_rounded):
                compare = partial(_compare, reference, tested, subject, chosen, chunk, is_rounded)
                yield _attempt(f"{subject.name}, {chunk} at once", compare)


def _compare(
    reference: Decoder, tested: Decoder, subject: Subject, windows: Sequence[Window], chunk: int, is_rounded: bool
) -> Row:
    plain = copy.copy(tested)
    plain.kernels = "reference"
    scores: list[TokenScores] = []
    in_dtype: list[TokenScores] = []
    num_not_finite = 0
    for window in windows:
        token_ids = torch.tensor(window.token_ids[:-1])
        with choosing("reference"):  # on a CPU some products with few rows would run torch's 16-bit kernels
            expected = reference.score(token_ids).to(tested.device)
        got = tested.score(token_ids, chunk=chunk)
        num_not_finite += int((~torch.isfinite(got)).any(-1).sum())
        scores.append(compare_logits(expected, got.nan_to_num(), targets(window)))
        if is_rounded == subject.rounds_input:  # the reference on the device always rounds
            in_dtype.append(compare_logits(expected, plain.score(token_ids), targets(window)))
    row: Row = {
        "chunk": chunk,
        "dtype": subject.dtype,
        "kv_cache_dtype": tested.kv_cache_dtype,
        "formats": tested.formats(),
    }
    row |= {"num_tokens": sum(map(len, scores)), "num_windows": len(windows), "num_not_finite": num_not_finite}
    found = summarize(scores)
    row |= {name: found.values[name] for name in SHOWN}
    row["intervals"] = {name: list(found.intervals[name]) for name in SHOWN if name in found.intervals}
    max_kl = subject.max_kl
    if in_dtype:
        row[IN_DTYPE] = summarize(in_dtype).values["kl_mean"]
        max_kl = max(max_kl, ROUNDED_FACTOR * row[IN_DTYPE]) if is_rounded else max_kl
    row["bars"] = {"kl_mean": {"max": max_kl}, "num_not_finite": {"max": 0}}
    if subject.min_agreement is not None:
        row["bars"]["top1_agreement"] = {"min": subject.min_agreement if chunk == LONG_CHUNK else SHORT_AGREEMENT}
    return row


# ---- greedy texts ----


def _prompts(token_ids: Sequence[int], count: int) -> list[list[int]]:
    """Prompts of 8 to 96 tokens of the text, every third behind the same long beginning."""
    longest = 96
    if len(token_ids) < SHARED_PREFIX + 2 * longest:
        raise PowertrainError(f"--data: {len(token_ids)} tokens are too few to take prompts from")
    rng = random.Random(7)
    made = []
    for at in range(count):
        start = rng.randrange(SHARED_PREFIX, len(token_ids) - longest)
        own = list(token_ids[start : start + rng.randint(8, longest)])
        made.append([*token_ids[:SHARED_PREFIX], *own] if at % 3 == 0 else own)
    return made


def _texts(
    decoders: _Decoders, prompts: Sequence[Sequence[int]], num_tokens: int, variants: Sequence[Variant]
) -> Iterator[Row]:
    """The plain run against the CPU's, each other variant against the plain run."""
    blocks = [-(-(len(prompt) + num_tokens) // BLOCK_SIZE) for prompt in prompts]
    few = max(max(blocks) + 1, sum(blocks) // 5)
    runs: dict[str, list[list[int]]] = {}

    def run(variant: Variant, decoder: Decoder, config: dict[str, Any]) -> Row:
        num_blocks = few if variant.is_tight else sum(blocks) + 1
        options = {"enable_prefix_caching": False, "num_blocks": num_blocks, **config, **variant.options}
        engine = Engine(decoder, EngineConfig.from_options(**options), "fidelity")
        if variant.is_captured:
            engine.warm_up()
        groups = [prompts] if variant.is_together else [[prompt] for prompt in prompts]
        runs[variant.name] = [text for group in groups for text in _continue(engine, group, num_tokens)]
        return {variant.effect: getattr(engine.stats(), variant.effect)} if variant.effect else {}

    def against(baseline: str, variant: Variant) -> Row:
        effect = run(variant, tested, config)
        found = _compare_texts(decoders.reference, prompts, runs[baseline], runs[variant.name])
        found["bars"] |= {name: {"min": 1} for name in effect}
        return {"against": baseline, **variant.options, **effect, **found}

    tested, config = decoders.tested["float32"], {**decoders.config, "dtype": "float32"}
    if PLAIN in variants:
        run(Variant(name="CPU"), decoders.reference, decoders.reference_config)
    else:
        run(PLAIN, tested, config)
    for variant in variants:
        yield _attempt(variant.row, partial(against, "CPU" if variant is PLAIN else PLAIN.name, variant))


def _continue(engine: Engine, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    """Greedy texts of `num_tokens` tokens, all prompts in the engine at once."""
    sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    for at, prompt in enumerate(prompts):
        engine.add(Request(request_id=str(at), prompt_token_ids=tuple(prompt), sampling=sampling))
    done: dict[str, list[int]] = {str(at): [] for at in range(len(prompts))}
    while engine.has_work():
        for output in engine.step():
            if output.error is not None:
                raise PowertrainError(output.error)
            done[output.request_id] += output.token_ids
    return list(done.values())


def _compare_texts(
    reference: Decoder,
    prompts: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    got: Sequence[Sequence[int]],
) -> Row:
    """How many texts are equal, and for the others where they part and by how much the reference prefers a token."""
    differences = []
    for number, (prompt, left, right) in enumerate(zip(prompts, expected, got, strict=True)):
        pairs = enumerate(zip(left, right, strict=True))
        at = next((at for at, (one, other) in pairs if one != other), None)
        if at is not None:
            logits = reference.score(torch.tensor([*prompt, *left[:at]]))[-1]
            gap = abs(float(logits[left[at]] - logits[right[at]]))
            differences.append({"prompt": number, "prompt_tokens": len(prompt), "position": at, "gap": gap})
    num_equal = len(prompts) - len(differences)
    return {
        "num_texts": len(prompts),
        "num_equal": num_equal,
        "share_equal": num_equal / len(prompts),
        "largest_gap": max((difference["gap"] for difference in differences), default=0.0),
        "differences": differences,
        "bars": {"share_equal": {"min": EQUAL_TEXTS}, "largest_gap": {"max": LARGEST_GAP}},
    }


if __name__ == "__main__":
    main()
