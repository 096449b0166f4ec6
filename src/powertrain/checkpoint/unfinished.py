"""Outputs under way: written beside their place under another name, so that no half of one is taken for the whole.

A process that is killed cannot clean up. Its leftovers are told from what another process is still writing by a lock
(flock), which the system releases however its holder ends: the next writer of the same output removes them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

PARTIAL, OLD = "partial", "old"


@contextlib.contextmanager
def under_way(final: Path, *, is_folder: bool = False) -> Iterator[Path]:
    """A new file or folder beside `final`, to be filled and renamed to it; gone afterwards in any other case.

    What killed processes left of the same output is removed before. Raises `OSError`.
    """
    remove_leftovers(final)
    path = _beside(final, PARTIAL)
    made = path.with_suffix(".new")
    if is_folder:
        made.mkdir()
    else:
        made.touch(exist_ok=False)
    try:
        with locked(made):
            made.rename(path)  # under this name it is never without its lock
            yield path
    finally:
        for left in (made, path):
            _remove(left)


@contextlib.contextmanager
def set_aside(path: Path) -> Iterator[Path]:
    """Move what stands at `path` to a name beside it. It comes back if nothing takes its place, else it goes."""
    old = _beside(path, OLD)
    with locked(path):
        path.rename(old)
        try:
            yield old
        finally:
            if path.exists():
                _remove(old)
            else:
                old.rename(path)


def remove_leftovers(final: Path) -> None:
    """Remove what killed processes left of `final`; what one had set aside comes back where nothing took its place."""
    for path in final.parent.glob(f".{final.name}.*.{OLD}"):
        if is_abandoned(path):
            if final.exists():
                _remove(path)
            else:
                path.rename(final)
    for path in final.parent.glob(f".{final.name}.*.{PARTIAL}"):
        if is_abandoned(path):
            _remove(path)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file's or folder's lock, whatever its name becomes; until the process ends at the latest."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def is_abandoned(path: Path) -> bool:
    """Whether no process holds the lock."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _beside(final: Path, kind: str) -> Path:
    return final.with_name(f".{final.name}.{secrets.token_hex(4)}.{kind}")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
