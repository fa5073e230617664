"""One user's row of the online store, or none where the store does not answer in time."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from threading import Thread
from time import monotonic, sleep, time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from feast import FeatureService, FeatureStore

THREADS = 8
LOOK = 0.25  # seconds between two looks where the path leads
AGAIN = 10.0  # seconds between two tries to open a store that could not be opened: Redis may come up later
RECEIPT = "receipt.json"  # of a store folder: what is written last
logger = logging.getLogger("bentoml.clickloop")  # under BentoML's logger, so that the server shows it


@dataclass(frozen=True)
class UserRow:
    """history  raw item ids, oldest first; profile  attribute -> value; reason  why the row is empty, or None"""

    history: list[int] = field(default_factory=list)
    profile: dict[str, str | None] = field(default_factory=dict)
    reason: str | None = None


class OnlineFeatures:
    """Reads users within a time limit, from several threads at once.

    fetch    user id -> feature name -> value, as Feast answers; None where no store is configured
    timeout  seconds from the call to the answer

    A store that hangs blocks at most THREADS threads; further reads are answered without it.
    """

    def __init__(self, fetch: Callable[[int], dict[str, Any]] | None, *, timeout: float) -> None:
        self._fetch, self._timeout = fetch, timeout
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="online-store")
        self._free = threading.Semaphore(THREADS)

    def read(self, user_id: int) -> UserRow:
        """Never raises: where the store does not answer in time, the row has a reason."""
        if self._fetch is None:
            return UserRow(reason="store_unavailable")
        deadline = monotonic() + self._timeout
        if not self._free.acquire(timeout=self._timeout):
            return UserRow(reason="store_unavailable")
        future = self._pool.submit(self._fetch, user_id)
        future.add_done_callback(lambda _: self._free.release())
        try:
            row = dict(future.result(max(0.0, deadline - monotonic())))
            history = row.pop("history", None)
            if history is None and all(value is None for value in row.values()):
                return UserRow(reason="unknown_user")
            return UserRow([int(item) for item in history or ()], row)
        except Exception as error:  # whatever the store's client raises
            logger.warning("online store: user %s: %r", user_id, error)
            return UserRow(reason="store_unavailable")


def feast_reader(path: str | None) -> Reader | None:
    """Reads users from the store folder that a path names. None, and a line in the log, where no path is given."""
    if path:
        return Reader(path)
    logger.warning("CLICKLOOP_ONLINE is not set: without an online store every answer is degraded")
    return None


class Reader:
    """user id -> feature name -> value, from the store folder that a path leads to, now and after every switch.

    path  a folder that `publish` has filled, or a link to one, which may lead to another one at any time

    A thread looks where the path leads. A new store is opened aside, and is read once it has answered. So no read waits
    for a switch, and while the new store cannot be opened, the old one is read. A read raises where none is open.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path).absolute()
        self.opened: _Opened | None = None
        self._failed: tuple[int, ...] | None = None
        self._again = 0.0
        if identity(self.path) is None:
            logger.warning("online store: %s is no store yet; until it is one, answers are degraded", self.path)
        self.look()
        Thread(target=_watch, args=(weakref.ref(self),), name="online-store-switch", daemon=True).start()

    def __call__(self, user_id: int) -> dict[str, Any]:
        if (opened := self.opened) is None:
            raise LookupError(f"{self.path}: no online store is open")
        return opened.fetch(user_id)

    def look(self) -> None:
        """Open what the path leads to, if it is another store than the one that is open. Never raises."""
        folder = self.path.resolve()
        found = identity(folder)
        if found is None or (self.opened and self.opened.identity == found):
            return
        if found == self._failed and monotonic() < self._again:
            return
        try:
            self.opened = _Opened(folder, found)
            logger.info("online store: opened %s", folder)
        except Exception:  # whatever Feast or the store's client raises
            self._failed, self._again = found, monotonic() + AGAIN
            serves = "the old one is served" if self.opened else "every answer is degraded"
            logger.exception("online store: %s cannot be opened; %s", folder, serves)


def _watch(reader: weakref.ref[Reader]) -> None:
    while True:
        sleep(LOOK)
        if (alive := reader()) is None:
            return
        alive.look()
        del alive


def identity(folder: Path) -> tuple[int, ...] | None:
    """Of the receipt, which comes last and is never written again; None where there is none."""
    try:
        found = (folder / RECEIPT).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


class _Opened:
    """A store folder that has answered. Raises what Feast raises.

    Its registry is read once, and SQLite keeps its file open: it answers also when the folder is gone.
    """

    def __init__(self, folder: Path, identity: tuple[int, ...]) -> None:
        from feast import FeatureStore  # seconds, so only a server that has a store pays for it
        from feast.repo_config import load_repo_config

        self.identity = identity
        os.environ.setdefault("CLICKLOOP_REDIS", "localhost:6379")  # feature_store.yaml may name it
        config = load_repo_config(folder, folder / "feature_store.yaml")
        for path in filter(None, (config.registry.path, getattr(config.online_store, "path", None))):
            if not (folder / path).is_file():  # Feast would make it
                raise FileNotFoundError(f"{folder / path} is not there")
        self.store = FeatureStore(repo_path=str(folder))
        self.store.config.registry.cache_ttl_seconds = 0  # for ever
        self.service = self.store.get_feature_service("serving")
        self.ttl = {
            feature.name: (self.store.get_feature_view(view.name).ttl or timedelta()).total_seconds()
            for view in self.service.feature_view_projections
            for feature in view.features
        }
        self.fetch(0)  # opens the connection, outside of any request's time limit
        if config.online_store.type == "sqlite":
            # Feast's objects lie in circles, so the file of a store that was dropped would stay on the disk
            online: Any = self.store._get_provider().online_store
            weakref.finalize(self, online._get_conn(self.store.config).close)

    def fetch(self, user_id: int) -> dict[str, Any]:
        return served(self.store, self.service, {"user_id": user_id}, self.ttl, time())


def served(
    store: FeatureStore, features: FeatureService | list[str], entity: dict[str, int], ttl: dict[str, float], now: float
) -> dict[str, Any]:
    """Feature -> its value online, or None where it is older than its time to live: Feast does not check that.

    features  a service, or `view:feature` names
    ttl       feature -> seconds, 0 for ever
    now       seconds since 1970
    """
    answer = store.get_online_features(features=features, entity_rows=[entity])
    row = {name: values[0] for name, values in answer.to_dict(include_event_timestamps=True).items()}
    return {name: None if 0 < ttl[name] < now - row[f"{name}__ts"] else row[name] for name in ttl}
