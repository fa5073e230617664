"""The outputs of a step: each is whole or not there, and is named by its hash."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux's fcntl.h and fs.h
CANNOT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EXDEV)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A scratch folder beside `path`. It takes the place of `path` once the block ends without an error.

    A block that fails or is killed leaves `path` as it was. The next call deletes what the killed one left.

    On Linux the old folder and the new one exchange their names in one step, so `path` is one of the two at every
    moment. Where the system or the file system cannot do that, the old folder is renamed first: a kill at this point
    leaves no `path`, and the next call for it puts the old folder back.
    """
    scratch, old = (path.with_name(f".{path.name}.{kind}") for kind in ("partial", "old"))
    if old.exists() and not path.exists():
        old.rename(path)
    for left in (scratch, old):
        shutil.rmtree(left, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        sync(scratch)
        if not path.exists():
            scratch.rename(path)
        elif not exchange(scratch, path):
            path.rename(old)
            scratch.rename(path)
        sync_entries(path.parent)
        for left in (scratch, old):
            shutil.rmtree(left, ignore_errors=True)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step. False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    if renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in CANNOT_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def sync(folder: Path) -> None:
    """Wait until all its files, and their names, are on the disk."""
    for file in folder.rglob("*"):
        if file.is_dir():
            sync_entries(file)
        elif file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
    sync_entries(folder)


def sync_entries(folder: Path) -> None:
    """Wait until the names that a folder holds are on the disk: a rename alone may be lost with the power."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A scratch file beside `path`. It is renamed to `path` once the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.partial")
    try:
        yield scratch
        with scratch.open("rb") as opened:
            os.fsync(opened.fileno())
        scratch.replace(path)
        sync_entries(path.parent)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Sorted keys, so that equal contents are equal bytes."""
    with new_file(path) as scratch:
        scratch.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, written_by: str) -> Any:
    """Raises ValueError where the file is missing or is not JSON. The error names the stage that writes it."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} is not there; run `dvc repro {written_by}`, which writes it") from None
    except ValueError as error:  # not JSON, or not text
        raise ValueError(f"{path} is not whole ({error}); run `dvc repro --force {written_by}`") from None


def folder_hash(folder: Path) -> str:
    """sha256 over the names and bytes of all files of a folder. Raises ValueError where it is not there."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not there; run the stage that writes it (`dvc repro`) or `dvc pull`")
    digest = hashlib.sha256()
    for file in sorted(f for f in folder.rglob("*") if f.is_file()):
        digest.update(f"{file.relative_to(folder).as_posix()} {file_hash(file)}\n".encode())
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
