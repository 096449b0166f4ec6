"""Model folders: what transformers wrote is read back equal, what we wrote it reads, hostile headers are refused."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from powertrain.checkpoint.safetensors_folder import SafetensorsCheckpoint, read_header, write_checkpoint
from powertrain.checkpoint.source import iterate, open_checkpoint
from powertrain.types import ModelFileError, PowertrainError

CONFIG = {"model_type": "llama", "hidden_size": 4}
quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def folder_with(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A model folder whose one weight file holds exactly this header."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG))
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    (path / "model.safetensors").write_bytes(size.to_bytes(8, "little") + text + data)
    return path


def entry(shape: list[Any], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_reads_what_transformers_wrote(tiny_model_dir: Callable[[str], Path]) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_model_dir("qwen2")
    checkpoint = open_checkpoint(folder)
    expected = load_file(folder / "model.safetensors")
    assert checkpoint.names() == sorted(expected)
    for name, tensor in iterate(checkpoint):
        assert torch.equal(tensor, expected[name])
        assert checkpoint.nbytes(name) == tensor.nbytes
    assert checkpoint.config["model_type"] == "qwen2"
    assert set(checkpoint.names()) <= set(AutoModelForCausalLM.from_pretrained(folder).state_dict())


@pytest.mark.parametrize("max_shard_bytes", [10**9, 30_000])
def test_transformers_reads_what_we_write(
    tiny_model_dir: Callable[[str], Path], tmp_path: Path, max_shard_bytes: int
) -> None:
    from transformers import AutoModelForCausalLM

    source = open_checkpoint(tiny_model_dir("llama3"))
    out = write_checkpoint(tmp_path / "out", source.config, iterate(source), max_shard_bytes=max_shard_bytes)
    shards = sorted(out.glob("*.safetensors"))
    assert (len(shards) > 3) == (max_shard_bytes == 30_000)
    assert (out / "model.safetensors.index.json").exists() == (len(shards) > 1)
    theirs = AutoModelForCausalLM.from_pretrained(out).state_dict()
    ours = open_checkpoint(out)
    assert ours.names() == sorted(theirs)
    for name, tensor in iterate(ours):
        assert torch.equal(tensor, theirs[name])


DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.float64,
)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"a": torch.arange(-6, 6).view(3, 4).to(dtype), "scalar": torch.tensor(3).to(dtype)}
    out = write_checkpoint(tmp_path / "out", CONFIG, tensors.items(), {"recipe.yaml": "steps: []", "raw": b"\xff"})
    checkpoint = SafetensorsCheckpoint(out)
    for name, tensor in tensors.items():
        loaded = checkpoint.load(name)
        assert loaded.dtype == dtype
        assert torch.equal(loaded, tensor)
        assert checkpoint.shape(name) == tuple(tensor.shape)
    assert (out / "raw").read_bytes() == b"\xff"
    assert (out / "recipe.yaml").read_text() == "steps: []"


def test_views_of_one_tensor_are_written_apart(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    out = write_checkpoint(tmp_path / "out", CONFIG, [("a", base), ("b", base), ("c", base[2:5]), ("d", base[::2])])
    loaded = load_file(out / "model.safetensors")
    assert torch.equal(loaded["a"], loaded["b"])
    assert loaded["c"].tolist() == [2.0, 3.0, 4.0]
    assert loaded["d"].tolist() == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]


HOSTILE: dict[str, tuple[Any, bytes, int | None]] = {
    "header longer than file": ({"a": entry([1], 0, 4)}, b"\0" * 4, 2**40),
    "header length of all ones": ({"a": entry([1], 0, 4)}, b"\0" * 4, 2**64 - 1),
    "not json": (b"{nonsense", b"", None),
    "not an object": ([1, 2], b"", None),
    "deep nesting": (b"[" * 200_000, b"", None),
    "huge number": (b'{"a":' + b"9" * 6000 + b"}", b"", None),
    "not utf-8": (b'{"\xff\xfe": 1}', b"", None),
    "duplicate name": (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":1}', b"\0", None),
    "entry not an object": ({"a": 3}, b"", None),
    "unknown dtype": ({"a": entry([1], 0, 4, "F99")}, b"\0" * 4, None),
    "dtype not a string": ({"a": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4, None),
    "past the end": ({"a": entry([4], 0, 16)}, b"\0" * 4, None),
    "offsets reversed": ({"a": entry([1], 4, 0)}, b"\0" * 4, None),
    "negative shape": ({"a": entry([-1, -1], 0, 4)}, b"\0" * 4, None),
    "overflowing shape": ({"a": entry([2**62, 4], 0, 4)}, b"\0" * 4, None),
    "boolean shape": ({"a": entry([True], 0, 4)}, b"\0" * 4, None),
    "shape of floats": ({"a": entry([1.0], 0, 4)}, b"\0" * 4, None),
    "overlap": ({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, b"\0" * 4, None),
    "partial overlap": ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"\0" * 12, None),
    "hole": ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"\0" * 12, None),
    "trailing bytes": ({"a": entry([1], 0, 4)}, b"\0" * 9, None),
    "hundred dimensions": ({"a": entry([1] * 100, 0, 4)}, b"\0" * 4, None),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused(tmp_path: Path, case: str) -> None:
    header, data, length = HOSTILE[case]
    with pytest.raises(ModelFileError, match=r"model\.safetensors"):
        open_checkpoint(folder_with(tmp_path / "m", header, data, length))


def a_valid_file(path: Path) -> bytes:
    save_file({"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.int8)}, path)
    return path.read_bytes()


@quick
@given(cut=st.integers(0, 10_000))
def test_a_truncated_file_is_refused(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "x.safetensors"
    whole = a_valid_file(file)
    file.write_bytes(whole[: cut % len(whole)])
    with pytest.raises(ModelFileError):
        read_header(file)


@quick
@given(edits=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_mutated_file_is_refused_or_read_within_bounds(tmp_path: Path, edits: list[tuple[int, int]]) -> None:
    folder = folder_with(tmp_path / "m", {})
    file = folder / "model.safetensors"
    whole = bytearray(a_valid_file(file))
    for position, value in edits:
        whole[position % len(whole)] = value
    file.write_bytes(whole)
    try:
        for _, tensor in iterate(open_checkpoint(folder)):
            tensor.sum()
    except ModelFileError:
        pass


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/passwd", "a/b.safetensors", "..", "x.bin", 3, ""])
def test_an_index_cannot_point_elsewhere(tmp_path: Path, name: Any) -> None:
    a_valid_file(tmp_path / "evil.safetensors")
    folder = folder_with(tmp_path / "m", {})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"b": name}}))
    with pytest.raises(ModelFileError, match=r"index\.json"):
        open_checkpoint(folder)


def test_an_index_naming_a_missing_file_or_tensor(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m", {})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"b": "gone.safetensors"}}))
    with pytest.raises(ModelFileError, match=r"gone\.safetensors"):
        open_checkpoint(folder)
    index.write_text(json.dumps({"weight_map": {"b": "model.safetensors"}}))
    with pytest.raises(ModelFileError, match="b is not in"):
        open_checkpoint(folder)


def test_pickles_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ModelFileError, match=r"pytorch_model\.bin is a pickle"):
        open_checkpoint(tmp_path)


def test_remote_code_is_never_run_and_ours_does_not_need_it(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m", {"a": entry([1], 0, 4)}, b"\0" * 4)
    auto_map = {"AutoModelForCausalLM": "modeling_evil.Evil"}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    with pytest.raises(ModelFileError, match="auto_map"):
        open_checkpoint(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "auto_map": auto_map}))
    assert open_checkpoint(folder).names() == ["a"]


@pytest.mark.parametrize("content", ["", "[]", "nonsense", "[" * 100_000])
def test_a_damaged_config_is_refused(tmp_path: Path, content: str) -> None:
    folder = folder_with(tmp_path / "m", {})
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelFileError, match=r"config\.json"):
        open_checkpoint(folder)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="powertrain pull smollm2"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(ModelFileError, match=r"no config\.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "weights.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(ModelFileError, match=r"not a \.gguf file"):
        open_checkpoint(tmp_path / "weights.bin")
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ModelFileError, match=r"2 \.gguf files: give the path of one"):
        open_checkpoint(tmp_path)


def test_other_peoples_folders_are_not_overwritten(tmp_path: Path) -> None:
    tensors = [("a", torch.ones(2))]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(PowertrainError, match="not written by powertrain"):
        write_checkpoint(tmp_path / "mine", CONFIG, tensors, overwrite=True)
    out = write_checkpoint(tmp_path / "out", CONFIG, tensors)
    with pytest.raises(PowertrainError, match="already holds a model"):
        write_checkpoint(out, CONFIG, tensors)
    write_checkpoint(out, CONFIG, [("b", torch.zeros(3))], overwrite=True)
    assert SafetensorsCheckpoint(out).names() == ["b"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "out"]


@pytest.mark.parametrize("name", ["../escape", "a/b", "config.json", "x.safetensors", ""])
def test_extra_files_stay_inside(tmp_path: Path, name: str) -> None:
    with pytest.raises(PowertrainError, match="extra file"):
        write_checkpoint(tmp_path / "out", CONFIG, [("a", torch.ones(1))], {name: "x"})
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_when_the_tensors_fail(tmp_path: Path) -> None:
    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.ones(1000)
        raise PowertrainError("the source broke")

    out = write_checkpoint(tmp_path / "out", CONFIG, [("old", torch.ones(1))])
    with pytest.raises(PowertrainError, match="the source broke"):
        write_checkpoint(out, CONFIG, tensors(), max_shard_bytes=10, overwrite=True)
    assert SafetensorsCheckpoint(out).names() == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


FULL_DISK = """
import resource, sys, torch
from pathlib import Path
from powertrain.checkpoint.safetensors_folder import write_checkpoint
from powertrain.types import PowertrainError
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    write_checkpoint(Path(sys.argv[1]), {}, [("a", torch.ones(100, 10)), ("b", torch.ones(1000, 99))], None, 9)
except PowertrainError as error:
    print("refused:", error)
"""


def test_a_file_that_cannot_be_written_whole_leaves_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "out")], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.startswith(f"refused: cannot write {tmp_path / 'out'}"), done.stderr
    assert not list(tmp_path.iterdir())


def test_a_full_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("powertrain.checkpoint.safetensors_write.SafetensorsFile.close", full)
    with pytest.raises(PowertrainError, match="the disk is full"):
        write_checkpoint(tmp_path / "out", CONFIG, [("a", torch.ones(1))])
    assert not list(tmp_path.iterdir())
