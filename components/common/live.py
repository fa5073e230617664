"""The live folder: the releases and online stores of this machine, and the one pointer to what serves.

releases/NAME/VERSION/   bento/, golden.json, package.json, release.json: whole or not there, never changed
stores/ID/               a store folder, as `publish` fills it
deployed/N/              bento -> the release's, online -> the store, deployment.json
current -> deployed/N    what serves now; it is replaced by one rename, last
clicks/                  the journal of the clicks that were pushed
lock                     held by whoever changes this folder; the system frees it when the holder ends, also by a kill
"""

from __future__ import annotations

import fcntl
import getpass
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from components.common.artifacts import new_folder, sync_entries, write_json

CURRENT, DEPLOYED, RELEASES, STORES, CLICKS = "current", "deployed", "releases", "stores", "clicks"
KEEP = 2  # deployments whose release and store stay on the disk, with the one that serves
_held: set[Path] = set()  # the live folders that this process has locked


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """What serves, or served: a release, an online store, or both.

    folder   deployed/N; `bento` and `online` in it are what a server takes
    release  releases/NAME/VERSION; None before the first promotion
    store    stores/ID; None before the first one was filled
    when     ISO time of the switch
    """

    folder: Path
    release: Path | None
    store: Path | None
    why: str
    who: str
    when: str

    @property
    def version(self) -> str | None:
        return self.release.name if self.release else None

    @property
    def number(self) -> int:
        return int(self.folder.name)


def live_folder() -> Path:
    """CLICKLOOP_LIVE, or `.live` in the folder where the command runs, which is the project's. Absolute."""
    return Path(os.environ.get("CLICKLOOP_LIVE") or ".live").absolute()


def current(live: Path) -> Deployment | None:
    """What serves now; None before the first switch. Raises ValueError where the pointer leads to nothing."""
    while True:
        try:
            pointer = (live / CURRENT).readlink()
        except FileNotFoundError:
            return None
        try:
            return read(live / pointer)
        except FileNotFoundError as error:
            if (live / CURRENT).readlink() == pointer:  # else it was switched, and its old folder dropped, meanwhile
                raise ValueError(
                    f"{live / CURRENT}: {error.filename} is gone; run `python -m components registry promote VERSION`"
                ) from None


def read(folder: Path) -> Deployment:
    """One of live/deployed."""
    said: dict[str, Any] = json.loads((folder / "deployment.json").read_text())
    live = folder.parents[1]
    return Deployment(
        folder=folder,
        release=live / RELEASES / said["release"] if said["release"] else None,
        store=live / STORES / said["store"] if said["store"] else None,
        why=said["why"],
        who=said["who"],
        when=said["when"],
    )


@contextmanager
def locked(live: Path) -> Iterator[None]:
    """Nobody else changes the live folder while the block lasts. Waits for the one who does, and says so.

    A process that holds the lock must not ask for it again: it would wait for itself.
    """
    live.mkdir(parents=True, exist_ok=True)
    live = live.resolve()
    assert live not in _held, "the live folder is locked already, by this process"
    with (live / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            print(f"{live}: waiting for process {lock.read().strip()}, which changes it", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        _held.add(live)
        try:
            yield
        finally:
            _held.discard(live)  # the lock itself goes with its file


def switch(
    live: Path,
    *,
    release: Path | None = None,
    store: Path | None = None,
    why: str,
    who: str | None = None,
    keep: int = KEEP,
    drop: Callable[[Path], None] = shutil.rmtree,
) -> Deployment:
    """Serve another release, another online store, or both; the half that is not given stays as it is.

    Call it within `locked`. A kill at any instant leaves the old deployment or the new one. The last `keep`
    deployments stay; of older ones, the store (by `drop`) and the release go, unless a later deployment has them too.
    """
    assert live.resolve() in _held, "call it within locked(live)"
    assert release or store, "there is nothing to switch"
    before = current(live)
    release = release or (before.release if before else None)
    store = store or (before.store if before else None)
    folder = live / DEPLOYED / str(before.number + 1 if before else 1)
    with new_folder(folder) as scratch:  # in the place of one that a killed switch left
        for name, target in (("bento", release and release / "bento"), ("online", store)):
            if target:
                assert target.is_dir(), f"{target} is not there"
                (scratch / name).symlink_to(Path("../..") / target.relative_to(live))
        said = {
            "version": release.name if release else None,
            "release": release.relative_to(live / RELEASES).as_posix() if release else None,
            "store": store.relative_to(live / STORES).as_posix() if store else None,
            "why": why,
            "who": who or _user(),
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_json(scratch / "deployment.json", said)
    _point(live, folder)
    tidy(live, keep=keep, drop=drop)
    return read(folder)


def tidy(live: Path, *, keep: int = KEEP, drop: Callable[[Path], None] = shutil.rmtree) -> None:
    """Drop what served before the last `keep` deployments. A store that never served is left to who filled it."""
    assert live.resolve() in _held, "call it within locked(live)"
    assert keep > 0, "what serves stays"
    if (now := current(live)) is None:
        return
    by_age = sorted((live / DEPLOYED).glob("[1-9]*"), key=lambda folder: int(folder.name))
    by_age = [folder for folder in by_age if int(folder.name) <= now.number]  # one after it is of a killed switch
    kept = [read(folder) for folder in by_age[-keep:]]
    for folder in by_age[:-keep]:
        if (folder / "deployment.json").is_file():  # else a killed tidy had dropped its parts already
            old = read(folder)
            if old.store and old.store.exists() and old.store not in (other.store for other in kept):
                drop(old.store)
            if old.release and old.release.exists() and old.release not in (other.release for other in kept):
                old.release.rename(old.release.with_name(f".{old.release.name}.partial"))  # never half there
        shutil.rmtree(folder)
    for left in (live / RELEASES).glob("*/.*.partial"):
        shutil.rmtree(left)


def _point(live: Path, folder: Path) -> None:
    scratch = live / f".{CURRENT}.partial"
    scratch.unlink(missing_ok=True)
    scratch.symlink_to(folder.relative_to(live))
    scratch.replace(live / CURRENT)
    sync_entries(live)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in a container
        return str(os.getuid())
