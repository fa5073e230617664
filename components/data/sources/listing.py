"""The raw files that a window needs, each with its day, its size and the hash of its content.

A hash is remembered by the file's path, size, time of change and inode, so a run reads new files alone. Files behind a
URL have the checksum that their store keeps (ETag, MD5), and are not read.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import fsspec

from components.data.sources import Window
from components.data.sources.mapping import FilesConfig
from components.data.sources.reading import File, find
from components.data.sources.tables import needed

CHECKSUMS = ("ETag", "etag", "md5Hash", "md5", "content_md5", "crc32c")  # as fsspec's file systems call them
SETTLED = 2.0  # seconds since its last change after which a file is remembered: times of change are coarse


@dataclass(frozen=True)
class Listed:
    """One raw file. `path` is below ingest.raw, or the whole path or URL where the file lies elsewhere."""

    path: str
    day: str | None
    bytes: int
    hash: str


@dataclass(frozen=True)
class Listing:
    """files    those that the window needs, by path
    skipped  how many others there are, of other days
    late     of the files, those that are new or changed since an earlier listing of other files of their day
    """

    files: list[Listed]
    skipped: int
    late: list[Listed]

    def rows(self) -> list[dict[str, Any]]:
        """JSON-able, and the same whenever the files are the same."""
        return [asdict(file) for file in self.files]


def listing(source: str, raw: str, settings: Any, window: Window, memory: Path | None = None) -> Listing:
    """The raw files of a source. `memory` holds the hashes of earlier listings; by default `remembered_hashes()`.

    Raises ValueError where a table of `ingest.files` has no file.
    """
    if source == "simulator":
        return Listing([], 0, [])
    if isinstance(settings, FilesConfig):
        every, wanted = _of_tables(raw, settings, window)
    else:
        every = wanted = _below(raw)
    memory = memory or remembered_hashes()
    known = _read(memory)
    with ThreadPoolExecutor() as pool:
        hashed = list(pool.map(partial(_hashed, known), wanted))
    days = {entry["day"] for entry in known.values()} - {None}
    root = fsspec.core.url_to_fs(raw)[1].rstrip("/") + "/"
    files, late, new = [], [], {}
    for file, (size, digest, key) in zip(wanted, hashed, strict=True):
        path = file.path.removeprefix(root) if file.path.startswith(root) else file.name
        files.append(Listed(path, str(file.day) if file.day else None, size, digest))
        if files[-1].day in days and known.get(file.name, {}).get("hash") != digest:
            late.append(files[-1])
        if key:
            new[file.name] = {"key": key, "hash": digest, "day": files[-1].day}
    if any(known.get(name) != entry for name, entry in new.items()):
        _remember(memory, known | new)
    return Listing(sorted(files, key=lambda one: one.path), len(every) - len(wanted), late)


def remembered_hashes() -> Path:
    """The file with the hashes of earlier listings: one for the clone and all of its work trees."""
    try:
        asked = ["git", "rev-parse", "--path-format=absolute", "--git-common-dir"]
        common = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        common = ".git"
    return Path(common).parent / ".scratch" / "raw-hashes.json"


def _of_tables(raw: str, config: FilesConfig, window: Window) -> tuple[list[File], list[File]]:
    """All files of the tables, and those that the window needs. Pictures count where the items name some."""
    every, wanted = [], []
    paths = {"events": config.events.path, "users": config.users.path, "items": config.items.path}
    for table, path in (paths | {f"vectors.{name}": path for name, path in config.vectors.items()}).items():
        if path is None:
            continue
        found = [
            file for one in (path.values() if isinstance(path, dict) else [path]) for file in find(raw, table, one)
        ]
        every += found
        wanted += needed(table, found, window)
        if table == "items" and config.items.columns.get("image", "image") in found[-1].columns():
            tables = {file.path for file in every}
            pictures = [file for file in _below(raw) if file.path not in tables]
            every, wanted = every + pictures, wanted + pictures
    return [*dict.fromkeys(every)], [*dict.fromkeys(wanted)]


def _below(raw: str) -> list[File]:
    system, root = fsspec.core.url_to_fs(raw)
    return [File(system, path) for path in sorted(system.find(root))]


def _read(memory: Path) -> dict[str, dict[str, Any]]:
    """File -> the hash of its content, what that is remembered by, and the file's day."""
    try:
        found: dict[str, dict[str, Any]] = json.loads(memory.read_text())
    except (OSError, ValueError):  # there is none yet, or it was spoilt: the files are read again
        return {}
    return found


def _remember(memory: Path, known: dict[str, dict[str, Any]]) -> None:
    """Two runs may do this at once: the later one wins, and the other's files are hashed once more."""
    memory.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile("w", dir=memory.parent, prefix=f".{memory.name}.", delete=False) as scratch:
        json.dump(known, scratch)
    Path(scratch.name).replace(memory)


def _hashed(known: dict[str, dict[str, Any]], file: File) -> tuple[int, str, list[Any] | None]:
    """Size and hash, and what the hash is remembered by, or None. Raises ValueError where the file has gone."""
    try:
        if "file" not in file.system.protocol:
            info = file.system.info(file.path)
            told = next((str(info[name]) for name in CHECKSUMS if info.get(name)), None)
            digest = told or str(file.system.checksum(file.path))
            return int(info.get("size") or 0), digest, [digest]
        local = Path(file.path)
        state = local.stat()
        key = [state.st_size, state.st_mtime_ns, state.st_ino]
        if (entry := known.get(file.name)) and entry["key"] == key:
            return state.st_size, str(entry["hash"]), key
        with local.open("rb") as opened:
            digest = hashlib.file_digest(opened, partial(hashlib.blake2b, digest_size=16)).hexdigest()
    except OSError as error:
        raise ValueError(f"ingest.raw: {file.name} cannot be read: {error}. Run it again, or mend the file") from error
    return state.st_size, digest, key if time.time() - state.st_mtime > SETTLED else None
