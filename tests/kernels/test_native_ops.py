"""Each native op against its reference, on every instruction set this processor runs; no bit depends on company."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from native_builders import (
    LEVELS,
    NATIVE,
    Product,
    each_level,
    expected_product,
    generator,
    matmul,
    needs_native,
    product,
    relative_error,
    run_at_once,
)
from powertrain.kernels.cases import Case, ProductCase, cases, product_cases
from powertrain.model.packed import native_matrix, pack

pytestmark = needs_native

ELEMENTWISE = [case for case in cases() if case.op.name in ("rms_norm", "silu_mul", "apply_rope")]
# each format once, at 40 outputs of 256 inputs
FORMATS = [case for case in product_cases() if case.label.endswith(" 1x256x40")]
each_format = pytest.mark.parametrize("case", FORMATS, ids=lambda case: case.label.removesuffix(" 1x256x40"))


def run_elementwise(team: Any, case: Case, args: tuple[Any, ...]) -> Tensor:
    """The native op of that name on the torch op's arguments."""
    if case.op.name == "apply_rope":
        x, cos, sin = args[0].clone(), args[1][:, 0], args[2][:, 0]
        half = x.shape[2] // 2
        NATIVE.apply_rope(team, x, cos[:, :half].contiguous(), sin[:, half:].contiguous())
        return x
    x = args[0]
    if case.op.name == "silu_mul":
        out = torch.full((x.shape[0], x.shape[1] // 2), torch.nan)
        NATIVE.silu_mul(team, x, out)
    else:
        out = torch.full_like(x, torch.nan)
        NATIVE.rms_norm(team, x, args[1], args[2], out)
    return out


@each_level
@pytest.mark.parametrize("case", ELEMENTWISE, ids=lambda case: f"{case.op.name} {case.label}")
def test_elementwise_ops_equal_their_reference(level: str, case: Case) -> None:
    args = case.make(generator(5))
    expected = case.op.reference(*[arg.clone() if isinstance(arg, Tensor) else arg for arg in args])
    outs = [run_elementwise(NATIVE.Team(threads, level), case, args) for threads in (1, 3)]
    assert relative_error(outs[0], expected) < case.tolerance
    assert torch.equal(outs[0], outs[1])
    alone = tuple(arg[:1] if isinstance(arg, Tensor) and arg.dim() > 1 else arg for arg in args)
    assert torch.equal(run_elementwise(NATIVE.Team(2, level), case, alone), outs[0][:1])


@each_level
@pytest.mark.parametrize("dim", [2, 6, 8, 10, 48, 80, 128, 256])
def test_rope_rotates_heads_of_any_size(level: str, dim: int) -> None:
    x, angles = torch.randn(5, 3, dim, generator=generator(dim)), torch.rand(5, dim // 2, generator=generator(1)) * 6
    low, high = x.double().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    c, s = cos.double().unsqueeze(1), sin.double().unsqueeze(1)
    expected = torch.cat((low * c - high * s, high * c + low * s), dim=-1)
    NATIVE.apply_rope(NATIVE.Team(2, level), x, cos, sin)
    assert relative_error(x, expected) < 2e-7


@each_level
def test_silu_keeps_its_limits(level: str) -> None:
    gate = torch.tensor([[-1e4, -200.0, -88.0, -87.0, -1e-30, 0.0, 1e-30, 20.0, 88.0, 200.0, 1e30]])
    out = torch.full_like(gate, torch.nan)
    NATIVE.silu_mul(NATIVE.Team(1, level), torch.cat((gate, torch.ones_like(gate)), dim=1), out)
    expected = torch.nn.functional.silu(gate.double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-34)


@pytest.mark.parametrize("case", product_cases(), ids=lambda case: case.label)
def test_products_equal_their_reference(case: ProductCase) -> None:
    made = product(case)
    x = torch.randn(case.rows, case.in_features, generator=generator(7))
    expected = expected_product(made, x)
    for level in LEVELS:
        out = matmul(NATIVE.Team(2, level), made.matrix, x, case.out_features)
        assert not expected.exceeded_by(out), level
        assert relative_error(out, expected.value) < case.tolerance, level
    elements = case.out_features * case.in_features
    assert case.num_bytes <= made.stream.numel() + 4 * case.rows * (case.out_features + case.in_features)
    assert case.num_bytes > elements // 2


def check_product(team: Any, made: Product, x: Tensor) -> Tensor:
    out = matmul(team, made.matrix, x, made.layout.out_features)
    assert not expected_product(made, x).exceeded_by(out)
    return out


@st.composite
def any_product(draw: st.DrawFn) -> ProductCase:
    kind = draw(st.sampled_from(["u4", "s8", "f32", "f16", "bf16"]))
    is_gate_up = draw(st.booleans())
    sizes = {
        "rows": draw(st.integers(1, 20)),
        "out_features": draw(st.integers(1, 90)) * (2 if is_gate_up else 1),
        "in_features": draw(st.integers(1, 200)),
        "is_gate_up": is_gate_up,
    }
    if kind not in ("u4", "s8"):
        return ProductCase("drawn", kind, **sizes)
    blocks = -(-sizes["in_features"] // 32)
    return ProductCase(
        "drawn",
        kind,
        **sizes,
        group_blocks=draw(st.sampled_from([n for n in range(1, blocks + 1) if blocks % n == 0])),
        scale=draw(st.sampled_from(["f16", "f32"])),
        has_minimum=draw(st.booleans()),
        quantizes_activations=draw(st.booleans()),
    )


@given(any_product(), st.sampled_from(LEVELS), st.integers(0, 2**20), st.floats(1e-3, 1e3))
@settings(deadline=None, max_examples=60)
def test_products_of_any_shape_equal_their_reference(case: ProductCase, level: str, seed: int, size: float) -> None:
    x = torch.randn(case.rows, case.in_features, generator=generator(seed)) * size
    made = product(case, seed)
    out = check_product(NATIVE.Team(1, level), made, x)
    row = seed % case.rows
    assert torch.equal(matmul(NATIVE.Team(3, level), made.matrix, x[row : row + 1], case.out_features)[0], out[row])


@each_level
@each_format
def test_a_row_does_not_depend_on_its_batch_or_the_threads(level: str, case: ProductCase) -> None:
    for out_features in (70, 1040):
        made = product(
            ProductCase(
                case.label,
                case.kind,
                out_features=out_features,
                in_features=128,
                group_blocks=min(case.group_blocks, 4),
                scale=case.scale,
                has_minimum=case.has_minimum,
                quantizes_activations=case.quantizes_activations,
            )
        )
        x = torch.randn(130, 128, generator=generator(3))
        whole = matmul(NATIVE.Team(1, level), made.matrix, x, out_features)
        for threads in (2, 3, 4):
            team = NATIVE.Team(threads, level)
            assert torch.equal(matmul(team, made.matrix, x, out_features), whole)
            for start, count in ((0, 1), (129, 1), (5, 2), (8, 3), (1, 5), (64, 66), (2, 63)):
                part = matmul(team, made.matrix, x[start : start + count], out_features)
                assert torch.equal(part, whole[start : start + count]), (threads, start, count)


@each_level
@each_format
def test_gather_gives_the_unpacked_rows(level: str, case: ProductCase) -> None:
    made = product(case)
    ids = torch.tensor([39, 0, 0, 15, 16, 17, 31, 32, 5, 39])
    out = torch.full((len(ids), case.in_features), torch.nan)
    NATIVE.gather(NATIVE.Team(2, level), made.matrix, ids, out)
    assert torch.equal(out, made.weights()[ids])


@each_level
@pytest.mark.parametrize("kind", ["u4", "s8"])
@pytest.mark.parametrize("has_minimum", [False, True])
def test_extreme_codes_and_activations_do_not_overflow(level: str, kind: Any, has_minimum: bool) -> None:
    """All codes at an end of their range times all activations at an end of theirs: the largest integer sums."""
    case = ProductCase("x", kind, 3, 16, 64, 1, "f32", has_minimum, quantizes_activations=True)
    made = product(case)
    (grid,) = made.grids
    x = torch.tensor([[1.0], [-1.0], [0.0]]).expand(3, 64).contiguous()
    x[2, ::2], x[2, 1::2] = 1.0, -1.0
    for byte in (0x00, 0xFF, 0x7F, 0x80, 0x88):
        other = rebuilt(case, grid._replace(codes=torch.full_like(grid.codes, byte)))
        for rows in (slice(0, 3), slice(0, 1), slice(1, 3)):
            check_product(NATIVE.Team(1, level), other, x[rows])


def rebuilt(case: ProductCase, part: Any) -> Product:
    stream, layout = pack([part])
    return Product(native_matrix(stream, layout, NATIVE), stream, layout, [part])


QUANTIZING = [case for case in FORMATS if case.quantizes_activations]


@each_level
@pytest.mark.parametrize("case", QUANTIZING, ids=lambda case: case.label.removesuffix(" 1x256x40"))
def test_half_way_activations_round_to_even(level: str, case: ProductCase) -> None:
    """With 127 in every block the scale is 1, so .5 lies exactly between two codes."""
    made = product(case)
    x = torch.arange(case.in_features).remainder(17).sub(8).add(0.5).repeat(4, 1)
    x[1] = -x[1]
    x[2] += 1.0
    x[:, ::32] = 127.0
    check_product(NATIVE.Team(1, level), made, x)
    check_product(NATIVE.Team(1, level), made, x[:1])


@each_level
@each_format
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_stays_so_and_alone(level: str, case: ProductCase, poison: float) -> None:
    made = product(case)
    x = torch.randn(9, case.in_features, generator=generator(11))
    clean = matmul(NATIVE.Team(2, level), made.matrix, x, case.out_features)
    for count in (1, 2, 9):
        bad = x[:count].clone()
        bad[count // 2, case.in_features // 2] = poison
        out = matmul(NATIVE.Team(2, level), made.matrix, bad, case.out_features)
        assert not out[count // 2].isfinite().any()
        others = [row for row in range(count) if row != count // 2]
        assert torch.equal(out[others], clean[others])


@each_level
@each_format
def test_weights_that_are_not_finite_show_in_their_output_alone(level: str, case: ProductCase) -> None:
    made = product(case)
    (part,) = made.grids
    at = case.out_features // 2
    if isinstance(part, Tensor):
        bad: Any = part.clone()
        bad[at, 0] = torch.nan
    else:
        bad = part._replace(scale=part.scale.clone())
        bad.scale[at, 0] = torch.inf
    x = torch.randn(5, case.in_features, generator=generator(2))
    out = matmul(NATIVE.Team(1, level), rebuilt(case, bad).matrix, x, case.out_features)
    clean = matmul(NATIVE.Team(1, level), made.matrix, x, case.out_features)
    assert not out[:, at].isfinite().any()
    others = [column for column in range(case.out_features) if column != at]
    assert torch.equal(out[:, others], clean[:, others])


@each_level
@pytest.mark.parametrize("case", QUANTIZING, ids=lambda case: case.label.removesuffix(" 1x256x40"))
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-40, 1e-38, 1e-36, 1e36])
def test_activations_at_the_ends_of_float32_stay_finite(level: str, case: ProductCase, size: float) -> None:
    made = product(case)
    x = torch.randn(3, case.in_features, generator=generator(2)).clamp(-3, 3) * size
    for rows in (1, 3):
        out = matmul(NATIVE.Team(1, level), made.matrix, x[:rows], case.out_features)
        reference = x[:rows].double() @ made.weights().double().t()
        # below 1e-36 the grid of codes is finer than float32: what may be lost is less than any model's epsilon
        allowed = 0.02 * (x[:rows].double().abs() @ made.weights().double().abs().t()) + 1e-30
        assert bool(((out - reference).abs() <= allowed).all())


# ---- what is refused ----


def x_and_out(rows: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 256), torch.zeros(rows, 40)


def test_a_matrix_says_what_is_wrong_with_it() -> None:
    stream = torch.zeros(3 * 8 * (32 + 256), dtype=torch.uint8)
    right: dict[str, Any] = {"kind": "u4", "out_features": 40, "in_features": 256, "group_blocks": 1}
    NATIVE.Matrix(stream, **right)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"kind": "u5"}, "unknown kind 'u5'"),
        ({"out_features": 0}, r"1 to 2\^24 outputs and inputs"),
        ({"in_features": -1}, r"1 to 2\^24 outputs and inputs"),
        ({"in_features": 2**31}, r"1 to 2\^24 outputs and inputs"),
        ({"group_blocks": 0}, "group_blocks"),
        ({"group_blocks": 3}, "group_blocks"),
        ({"group_blocks": -8}, "group_blocks"),
        ({"scale": "f64"}, "scale must be f16 or f32, got 'f64'"),
        ({"scale": "f32"}, "stream has 6912 bytes, expected 7680"),
        ({"kind": "f32"}, "stream has 6912 bytes"),
        ({"kind": "f32", "has_minimum": True}, "float kinds"),
        ({"kind": "f16", "quantizes_activations": True}, "float kinds"),
        ({"out_features": 39, "is_gate_up": True}, "gate and up"),
        ({"out_features": 49}, "expected 9216"),
        ({"in_features": 257}, "expected"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            NATIVE.Matrix(stream, **{**right, **change})
    for size in (0, 1, stream.numel() - 1):
        with pytest.raises(ValueError, match=f"stream has {size} bytes, expected 6912"):
            NATIVE.Matrix(stream[:size], **right)


def test_a_matrix_too_large_to_exist_is_refused() -> None:
    stream = torch.zeros(64, dtype=torch.uint8)
    for kind, options in (("f32", {}), ("s8", {"group_blocks": 1, "scale": "f32", "has_minimum": True})):
        for out_features, in_features in ((2**31 - 1, 2**31 - 1), (2**31 - 1, 2**30), (2**62, 4), (4, 2**62)):
            with pytest.raises(ValueError, match=r"stream has 64 bytes|1 to 2\^24 outputs"):
                NATIVE.Matrix(stream, kind, out_features, in_features, **options)


def test_no_rows_are_no_work() -> None:
    team, nothing = NATIVE.Team(2), torch.zeros(0, 8)
    NATIVE.rms_norm(team, nothing, torch.ones(8), 1e-5, torch.zeros(0, 8))
    NATIVE.silu_mul(team, nothing, torch.zeros(0, 4))
    NATIVE.apply_rope(team, torch.zeros(0, 2, 4), torch.zeros(0, 2), torch.zeros(0, 2))
    made = product(ProductCase("x", "f32", in_features=8))
    NATIVE.gather(team, made.matrix, torch.zeros(0, dtype=torch.int64), nothing)
    NATIVE.matmul(team, made.matrix, nothing, torch.zeros(0, 40))


def test_products_of_other_shapes_are_refused_and_the_team_goes_on() -> None:
    made, team = product(ProductCase("x", "u4", group_blocks=1)), NATIVE.Team(2)
    x, out = x_and_out()
    for wrong_x, wrong_out in (
        (x[:, :255].contiguous(), out),
        (x, out[:, :39].contiguous()),
        (x[:1], out),
        (x, torch.zeros(3, 40)),
    ):
        with pytest.raises(ValueError, match="matmul: x must be"):
            NATIVE.matmul(team, made.matrix, wrong_x, wrong_out)
    for wrong_x, wrong_out in ((x[0], out), (x, out[0]), (x, out.numpy().tolist())):
        with pytest.raises(TypeError):
            NATIVE.matmul(team, made.matrix, wrong_x, wrong_out)
    NATIVE.matmul(team, made.matrix, x[:0], out[:0])
    check_product(team, made, x)


def test_results_never_go_to_a_hidden_copy() -> None:
    """An output that the kernels cannot write to as it is must be an error: a converted copy would be lost."""
    made, team = product(ProductCase("x", "u4", group_blocks=1)), NATIVE.Team(1)
    x, out = x_and_out()
    for wrong in (out.double(), out.half(), torch.zeros(40, 2).t(), torch.zeros(2, 80)[:, ::2]):
        with pytest.raises(TypeError):
            NATIVE.matmul(team, made.matrix, x, wrong)
        with pytest.raises(TypeError):
            NATIVE.rms_norm(team, torch.ones(2, 40), torch.ones(40), 1e-5, wrong)
        with pytest.raises(TypeError):
            NATIVE.silu_mul(team, torch.ones(2, 80), wrong)
        with pytest.raises(TypeError):
            NATIVE.gather(team, product(ProductCase("x", "f32", in_features=40)).matrix, torch.tensor([0, 1]), wrong)
    table = torch.ones(2, 4)
    for rotated in (torch.ones(2, 3, 8).double(), torch.ones(2, 8, 3).transpose(1, 2)):
        with pytest.raises(TypeError):
            NATIVE.apply_rope(team, rotated, table, table)
    readonly = out.numpy()
    readonly.setflags(write=False)
    with pytest.raises(TypeError):
        NATIVE.matmul(team, made.matrix, x, readonly)


@pytest.mark.parametrize("ids", [[-1], [40], [0, 47], [2**62], [-(2**62)]])
def test_rows_that_are_not_there_are_named(ids: list[int]) -> None:
    made, team = product(ProductCase("x", "f16")), NATIVE.Team(2)
    with pytest.raises(ValueError, match=rf"row {ids[-1]} is not in 0\.\.39"):
        NATIVE.gather(team, made.matrix, torch.tensor(ids), torch.zeros(len(ids), 256))
    with pytest.raises(ValueError, match="gather: out must be"):
        NATIVE.gather(team, made.matrix, torch.tensor([1]), torch.zeros(1, 255))
    gate_up = product(ProductCase("x", "f16", is_gate_up=True))
    with pytest.raises(ValueError, match="gather"):
        NATIVE.gather(team, gate_up.matrix, torch.tensor([1]), torch.zeros(1, 256))


def test_elementwise_ops_refuse_what_does_not_fit() -> None:
    team, x = NATIVE.Team(2), torch.ones(2, 8)
    for weight, out in ((torch.ones(7), x), (torch.ones(8), x[:1]), (torch.ones(8), torch.ones(2, 9))):
        with pytest.raises(ValueError, match="rms_norm"):
            NATIVE.rms_norm(team, x, weight, 1e-5, out)
    for out in (torch.ones(2, 5), torch.ones(1, 4)):
        with pytest.raises(ValueError, match="silu_mul"):
            NATIVE.silu_mul(team, x, out)
    for shape, table in (((2, 1, 8), (2, 3)), ((2, 1, 8), (1, 4)), ((2, 1, 7), (2, 3)), ((2, 1, 7), (2, 4))):
        with pytest.raises(ValueError, match="apply_rope"):
            NATIVE.apply_rope(team, torch.ones(shape), torch.ones(table), torch.ones(table))
    with pytest.raises(ValueError, match="apply_rope"):
        NATIVE.apply_rope(team, torch.ones(2, 1, 8), torch.ones(2, 4), torch.ones(2, 3))


def test_a_team_has_the_threads_and_level_it_was_asked_for() -> None:
    for level in LEVELS:
        team = NATIVE.Team(3, level)
        assert (team.threads, team.level) == (3, level)
    assert NATIVE.Team(1).level == LEVELS[0]
    with pytest.raises(ValueError, match="does not run the level 'sse9'"):
        NATIVE.Team(1, "sse9")
    for threads in (0, -1, 1025):
        with pytest.raises(ValueError, match=rf"threads must be in 1\.\.1024, got {threads}"):
            NATIVE.Team(threads)


# ---- the pool ----


@each_level
def test_many_short_jobs_all_get_done(level: str) -> None:
    made, team = product(ProductCase("x", "u4", group_blocks=1, quantizes_activations=True)), NATIVE.Team(4, level)
    x = torch.randn(3, 256, generator=generator(1))
    expected = matmul(NATIVE.Team(1, level), made.matrix, x, 40)
    for _ in range(400):
        out = torch.full((3, 40), torch.nan)
        NATIVE.matmul(team, made.matrix, x, out)
        assert torch.equal(out, expected)


def test_teams_come_and_go() -> None:
    made = product(ProductCase("x", "f32", in_features=64))
    x = torch.randn(2, 64, generator=generator(1))
    expected = matmul(NATIVE.Team(1), made.matrix, x, 40)
    before = threading.active_count(), num_threads()
    for turn in range(150):
        team = NATIVE.Team(1 + turn % 4)
        if turn % 3:  # some end without ever having worked
            assert torch.equal(matmul(team, made.matrix, x, 40), expected)
    del team
    assert (threading.active_count(), num_threads()) == before


def num_threads() -> int:
    """Of this process; 0 where the system does not say."""
    try:
        with open("/proc/self/status") as status:  # noqa: PTH123
            return next(int(line.split()[1]) for line in status if line.startswith("Threads:"))
    except OSError:
        return 0


@pytest.mark.parametrize("is_shared", [False, True])
def test_python_threads_may_work_at_once(is_shared: bool) -> None:
    """Each with a team of its own, or all with one, which then serves them in turn."""
    made = product(ProductCase("x", "u4", group_blocks=1, quantizes_activations=True))
    x = torch.randn(4, 256, generator=generator(1))
    expected = matmul(NATIVE.Team(1), made.matrix, x, 40)
    teams = [NATIVE.Team(2)] * 2 if is_shared else [NATIVE.Team(2), NATIVE.Team(3)]
    wrong: list[int] = []

    def work(team: Any) -> None:
        wrong.extend(turn for turn in range(200) if not torch.equal(matmul(team, made.matrix, x, 40), expected))

    run_at_once(work, teams)
    assert not wrong


def test_an_idle_team_takes_no_processor_time() -> None:
    made, team = product(ProductCase("x", "f32")), NATIVE.Team(4)
    x, out = x_and_out()
    NATIVE.matmul(team, made.matrix, x, out)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.05
