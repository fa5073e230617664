"""How a step's output comes to be: whole or not at all, named by its hash."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A scratch folder beside `path` that takes its name, and its place, once the block ends well.

    A killed or failed block leaves `path` as it was; what a kill left in the scratch folder is cleared by the next
    run.
    """
    scratch = path.with_name(f".{path.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        sync(scratch)
        shutil.rmtree(path, ignore_errors=True)
        scratch.rename(path)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def sync(folder: Path) -> None:
    """Its files are on the disk: what says that they are whole may be written."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A scratch file beside `path`, renamed to it once the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.partial")
    try:
        yield scratch
        with scratch.open("rb") as opened:
            os.fsync(opened.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Sorted keys, so that equal contents are equal bytes."""
    with new_file(path) as scratch:
        scratch.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, written_by: str) -> Any:
    """Raises ValueError where the file is missing or no JSON, naming the stage that writes it."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} is not there; run `dvc repro {written_by}`, which writes it") from None
    except ValueError as error:  # no JSON, or no text
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
