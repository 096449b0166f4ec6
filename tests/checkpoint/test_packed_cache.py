"""The cache of packed weights: what is read back is what was packed, whatever happened to the file in between."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from powertrain.checkpoint.packed_cache import Stream, cache_files, packed_streams, source_fingerprint
from powertrain.checkpoint.source import open_checkpoint
from powertrain.compress.manifest import weights_sha256
from powertrain.model.packed import gguf_part, pack, unpack

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POWERTRAIN_CACHE", str(tmp_path / "cache"))


class Builder:
    """Packs a few matrices of a tiny model and counts how often it is asked to."""

    def __init__(self, path: Path) -> None:
        self.checkpoint = open_checkpoint(path)
        self.num_builds = 0

    def __call__(self) -> Iterator[tuple[str, Stream]]:
        self.num_builds += 1
        for name in self.checkpoint.names()[:5]:
            if len(self.checkpoint.shape(name)) == 2:
                yield name, pack([self.checkpoint.load(name)[:-3]])

    def streams(self) -> dict[str, Stream]:
        return packed_streams(self.checkpoint, self)


def open_and_check(path: Path) -> int:
    """Opens the cached streams, holds them against the source, and returns how often they were built."""
    builder = Builder(path)
    streams = builder.streams()
    assert len(streams) > 2
    for name, (stream, layout) in streams.items():
        assert torch.equal(unpack(stream, layout), builder.checkpoint.load(name)[:-3].float()), name
    return builder.num_builds


@pytest.fixture(scope="module")
def pristine(tiny_model_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with its cache file, for tests that copy it."""
    folder = tmp_path_factory.mktemp("pristine") / "model"
    shutil.copytree(tiny_model_dir("llama"), folder, ignore=shutil.ignore_patterns("*.packed"))  # left by other tests
    assert open_and_check(folder) == 1
    return folder


@pytest.fixture
def model(pristine: Path, tmp_path: Path) -> Path:
    shutil.copytree(pristine, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def cache(model: Path) -> Path:
    return cache_files(model)[0]


def files_in(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_the_second_opening_builds_nothing(model: Path) -> None:
    before = files_in(model)
    assert open_and_check(model) == 0
    assert files_in(model) == before
    assert not any("partial" in name for name in before)


def test_the_safetensors_library_reads_the_file(model: Path, cache: Path) -> None:
    streams = Builder(model).streams()
    assert set(load_file(cache)) == set(streams)
    with safe_open(cache, framework="pt") as opened:
        for name, (stream, layout) in streams.items():
            assert torch.equal(opened.get_tensor(name)[: layout.num_bytes], stream)
    data = cache.read_bytes()
    header_bytes = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_bytes])
    assert (8 + header_bytes) % 4096 == 0
    header.pop("__metadata__")
    assert all(entry["data_offsets"][0] % 64 == 0 for entry in header.values())
    assert all(stream.data_ptr() % 64 == 0 for stream, _ in streams.values())


def test_writing_to_a_stream_changes_neither_the_file_nor_the_next_opening(model: Path, cache: Path) -> None:
    before = cache.read_bytes()
    for stream, _ in Builder(model).streams().values():
        stream.fill_(7)
    assert cache.read_bytes() == before
    assert open_and_check(model) == 0


@given(st.data())
@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_byte_is_noticed(model: Path, cache: Path, data: st.DataObject) -> None:
    good = cache.read_bytes()
    header_bytes = 8 + int.from_bytes(good[:8], "little")
    # half of the flips fall into the small header
    position = data.draw(st.integers(0, header_bytes - 1) | st.integers(0, len(good) - 1))
    bad = bytearray(good)
    bad[position] ^= data.draw(st.integers(1, 255))
    cache.write_bytes(bad)
    assert open_and_check(model) == 1
    assert cache.read_bytes() == good


@given(st.data())
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_truncation_is_noticed(model: Path, cache: Path, data: st.DataObject) -> None:
    good = cache.read_bytes()
    header_bytes = 8 + int.from_bytes(good[:8], "little")
    cache.write_bytes(good[: data.draw(st.integers(0, header_bytes) | st.integers(0, len(good) - 1))])
    assert open_and_check(model) == 1
    assert cache.read_bytes() == good


def test_bytes_after_the_end_are_noticed(model: Path, cache: Path) -> None:
    cache.write_bytes(cache.read_bytes() + b"\0")
    assert open_and_check(model) == 1


def test_a_foreign_file_is_replaced(model: Path, cache: Path) -> None:
    cache.write_text("{}")
    assert open_and_check(model) == 1
    save_file({"a": torch.zeros(3)}, cache)
    assert open_and_check(model) == 1
    assert open_and_check(model) == 0


def forge(file: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Change header and layouts of a cache file and hash it anew, as one who knows the format can."""
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    metadata = header["__metadata__"]
    layouts = json.loads(metadata["layouts"])
    change(header, layouts)
    metadata |= {"layouts": json.dumps(layouts), "sha256": "0" * 64}
    head = data[:8] + json.dumps(header).encode().ljust(end - 8)
    pieces = [hashlib.sha256(data[at : at + (8 << 20)]).digest() for at in range(end, len(data), 8 << 20)]
    digest = hashlib.sha256(head + b"".join(pieces)).hexdigest()
    file.write_bytes(head.replace(b"0" * 64, digest.encode()) + data[end:])


def test_a_forged_layout_never_reaches_beyond_the_file(model: Path, cache: Path) -> None:
    good = cache.read_bytes()
    name = "model.embed_tokens.weight"

    def forged(change: Callable[[dict[str, Any], dict[str, Any]], None]) -> int:
        cache.write_bytes(good)
        forge(cache, change)
        return open_and_check(model)

    assert forged(lambda header, layouts: None) == 0
    assert forged(lambda header, layouts: layouts[name].update(out_features=1 << 20)) == 1
    assert forged(lambda header, layouts: layouts[name].update(in_features=-1)) == 1
    assert forged(lambda header, layouts: layouts[name].update(kind="f64")) == 1
    assert forged(lambda header, layouts: layouts[name].update(more=1)) == 1
    assert forged(lambda header, layouts: header[name].update(data_offsets=[0, 1 << 40])) == 1
    assert forged(lambda header, layouts: header[name].update(data_offsets=[-64, 1 << 20])) == 1
    assert forged(lambda header, layouts: header[name].update(data_offsets=[1, header[name]["shape"][0]])) == 1
    assert forged(lambda header, layouts: header[name].update(data_offsets=["0", "9"])) == 1
    assert forged(lambda header, layouts: header.pop(name)) == 1
    assert forged(lambda header, layouts: layouts.update({name: 3})) == 1


def test_a_replaced_source_is_packed_again(model: Path, tiny_model_dir: Callable[[str], Path]) -> None:
    shutil.copy(tiny_model_dir("llama3") / "model.safetensors", model / "model.safetensors")
    shutil.copy(tiny_model_dir("llama3") / "config.json", model / "config.json")
    assert open_and_check(model) == 1
    assert open_and_check(model) == 0
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    assert open_and_check(model) == 1


def test_new_weights_under_an_old_header_are_packed_again(model: Path) -> None:
    file = model / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1000] ^= 1
    status = file.stat()
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert open_and_check(model) == 1


def test_a_source_that_changes_while_it_is_packed_is_not_cached(model: Path, cache: Path) -> None:
    cache.unlink()
    builder = Builder(model)

    def build() -> Iterator[tuple[str, Stream]]:
        for named in builder():
            status = (model / "model.safetensors").stat()
            os.utime(model / "model.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns + 1000))
            yield named

    assert packed_streams(builder.checkpoint, build).keys() == dict(builder()).keys()
    assert not cache.exists()
    assert not cache_files(model)[1].exists()


def test_where_the_folder_takes_no_file_the_cache_folder_does_and_else_memory(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.unlink()
    (cache / "in the way").mkdir(parents=True)  # no file can be renamed onto this, not even by root
    assert open_and_check(model) == 2  # once for each place
    assert open_and_check(model) == 0
    elsewhere = cache_files(model)[1]
    assert elsewhere.is_file()
    assert elsewhere.stat().st_size > 4096
    monkeypatch.setenv("POWERTRAIN_CACHE", str(model / "config.json"))
    assert open_and_check(model) == 2  # once for the first place, then to be kept in memory
    assert not any("partial" in name for name in files_in(model))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission(model: Path, cache: Path) -> None:
    cache.unlink()
    model.chmod(0o555)
    try:
        assert open_and_check(model) == 1
        assert open_and_check(model) == 0
    finally:
        model.chmod(0o755)


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from powertrain.checkpoint.packed_cache import packed_streams
    from powertrain.checkpoint.source import open_checkpoint
    from powertrain.model.packed import pack

    def die(*args):
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoint = open_checkpoint(sys.argv[1])

    def build():
        for name in checkpoint.names()[:5]:
            yield name, pack([checkpoint.load(name).view(1, -1)])
        if sys.argv[2] == "while writing":
            die()

    Path.replace = die
    packed_streams(checkpoint, build)
"""


@pytest.mark.parametrize("moment", ["while writing", "before the rename"])
@pytest.mark.parametrize("has_old_file", [False, True])
def test_a_writer_that_is_killed_leaves_no_half_file(model: Path, cache: Path, moment: str, has_old_file: bool) -> None:
    old = b"an outdated file"
    if has_old_file:
        cache.write_bytes(old)
    else:
        cache.unlink()
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), str(model), moment], timeout=120)
    assert done.returncode == -9
    assert (cache.read_bytes() == old) if has_old_file else (not cache.exists())
    partials = list(model.glob("*.partial"))
    assert len(partials) == 1
    assert open_and_check(model) == 1
    assert open_and_check(model) == 0
    assert partials[0].exists()  # it may belong to somebody still at work
    long_ago = time.time() - 7 * 24 * 3600
    os.utime(partials[0], (long_ago, long_ago))
    cache.unlink()
    assert open_and_check(model) == 1
    assert not partials[0].exists()


def test_many_may_open_at_once(model: Path, cache: Path) -> None:
    cache.unlink()
    with ThreadPoolExecutor(6) as threads:
        builds = list(threads.map(open_and_check, [model] * 12))
    assert 1 in builds  # the first to ask need not be the first to look
    assert set(builds) <= {0, 1}
    assert open_and_check(model) == 0
    assert not [name for name in files_in(model) if "partial" in name]


def test_a_folder_with_the_cache_file_is_the_model_it_was(model: Path, cache: Path) -> None:
    digest = weights_sha256(model)
    names = open_checkpoint(model).names()
    cache.unlink()
    assert open_checkpoint(model).names() == names
    assert weights_sha256(model) == digest


def test_a_gguf_file_has_its_cache_beside_it(tiny_gguf: Callable[[str, str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "one file"
    folder.mkdir()
    shutil.copy(tiny_gguf("llama", "Q4_1"), folder / "tiny.gguf")
    checkpoint: Any = open_checkpoint(folder)
    name = "model.layers.0.self_attn.q_proj.weight"

    def build() -> Iterator[tuple[str, Stream]]:
        type_name, rows, _ = checkpoint.raw(name)
        yield name, pack([gguf_part(type_name, rows)])

    stream, layout = packed_streams(checkpoint, build)[name]
    assert files_in(folder) == {"tiny.gguf", "tiny.gguf.packed"}
    assert torch.equal(unpack(stream, layout), open_checkpoint(folder).load(name))
    before = source_fingerprint(checkpoint)
    (folder / "tiny.gguf").touch()
    assert source_fingerprint(open_checkpoint(folder)) != before
