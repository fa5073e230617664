"""One user's row of the online store, or none where the store does not answer in time."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from time import monotonic, time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from feast import FeatureService, FeatureStore

THREADS = 8
AGAIN = 10.0  # seconds between two tries to open a store, while none is open
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


def feast_reader(repo: str | None) -> Callable[[int], dict[str, Any]] | None:
    """Reads the feature service `serving` of a Feast repo. None, and a line in the log, where there is no such repo.

    The stores are opened once they are whole: now, or at the first read after the stage `features` has ended. If it has
    made them anew, the next read opens them; a server that kept the deleted files would serve the old rows for ever.
    While the stage is at work, the old stores are read. A read raises where there is none.
    """
    if not repo:
        logger.warning("CLICKLOOP_FEATURE_REPO is not set: without an online store every answer is degraded")
        return None
    try:
        files = store_files(repo)
    except Exception:
        logger.exception("CLICKLOOP_FEATURE_REPO=%s: no online store; every answer is degraded", repo)
        return None
    opened: _Opened | None = None
    tried: tuple[Any, ...] | None = None
    trying = threading.Lock()

    def look() -> None:
        nonlocal opened, tried
        made = store_identity(files)  # before anything is read: a store made meanwhile is found at the next read
        # a store that cannot be opened is not tried at every read; where none is open, Redis may come up later
        attempt = (made, None if opened else monotonic() // AGAIN)
        if made is None or attempt == tried or not trying.acquire(blocking=False):
            return
        try:
            fresh = _Opened(repo)
            opened, attempt = fresh, (made, None)
            logger.info("online store: opened")
        except Exception:
            serves = "the old one is served" if opened else "every answer is degraded"
            logger.exception("online store: cannot be opened; %s", serves)
        finally:
            tried = attempt
            trying.release()

    def fetch(user_id: int) -> dict[str, Any]:
        look()
        if opened is None:
            raise LookupError(f"no online store is open; run `dvc repro features` if {files[0]} is not there")
        return opened.fetch(user_id)

    look()
    if store_identity(files) is None:
        logger.warning("online store: opened once `features` has written %s; until then answers are degraded", files[0])
    return fetch


def store_files(repo: str) -> list[Path]:
    """The files that show which stores a repo has: receipt.json, which `features` writes last, the registry, and
    SQLite's file. Their paths come from feature_store.yaml, because Feast would make the files that are missing."""
    from feast.repo_config import load_repo_config  # seconds, so only a server that has a store pays for it

    os.environ.setdefault("CLICKLOOP_REDIS", "localhost:6379")  # feature_store.yaml may name it
    if repo not in sys.path:
        sys.path.append(repo)  # as Feast's own command does: feature_store.yaml names a class of asof.py
    config = load_repo_config(Path(repo), Path(repo, "feature_store.yaml"))
    registry = Path(repo, config.registry.path)
    files = [registry.with_name("receipt.json"), registry]
    if database := getattr(config.online_store, "path", None):
        files.append(Path(repo, database))
    return files


def store_identity(files: list[Path]) -> tuple[int, ...] | None:
    """The files' identity; None where one is missing. A pushed click changes SQLite's file and does not replace it."""
    try:
        return (files[0].stat().st_mtime_ns, *(file.stat().st_ino for file in files))
    except OSError:
        return None


class _Opened:
    """A Feast repo's stores, as they were when they were opened. Raises what Feast raises."""

    def __init__(self, repo: str) -> None:
        from feast import FeatureStore

        self.store = FeatureStore(repo_path=repo)
        self.store.config.registry.cache_ttl_seconds = 0  # for ever: the registry is not read again
        self.service = self.store.get_feature_service("serving")
        self.ttl = {
            feature.name: (self.store.get_feature_view(view.name).ttl or timedelta()).total_seconds()
            for view in self.service.feature_view_projections
            for feature in view.features
        }
        self.fetch(0)  # opens the connection, outside of any request's time limit

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
