"""One user's row of the online store, in time or not at all."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from time import monotonic, time
from typing import Any

THREADS = 8
logger = logging.getLogger("bentoml.clickloop")  # under BentoML's logger, so that the server shows it


@dataclass(frozen=True)
class UserRow:
    """history  raw item ids, oldest first; profile  attribute -> value; reason  why there is nothing, or None"""

    history: list[int] = field(default_factory=list)
    profile: dict[str, str | None] = field(default_factory=dict)
    reason: str | None = None


class OnlineFeatures:
    """Reads users within a time limit, from several threads at once.

    fetch    user id -> feature name -> value, as Feast answers; None where no store is configured
    timeout  seconds from the call to the answer

    A store that hangs keeps at most THREADS threads; further reads are answered without it.
    """

    def __init__(self, fetch: Callable[[int], dict[str, Any]] | None, *, timeout: float) -> None:
        self._fetch, self._timeout = fetch, timeout
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="online-store")
        self._free = threading.Semaphore(THREADS)

    def read(self, user_id: int) -> UserRow:
        """Never raises: a row with a reason is the answer where the store has none in time."""
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
    """Reads the feature service `serving` of a Feast repo. None, and a line in the log, where it cannot be opened."""
    if not repo:
        logger.warning("CLICKLOOP_FEATURE_REPO is not set: without an online store every answer is degraded")
        return None
    try:
        from feast import FeatureStore  # seconds, so only a server that has a store pays for it

        os.environ.setdefault("CLICKLOOP_REDIS", "localhost:6379")  # feature_store.yaml may name it
        sys.path.append(repo)  # as Feast's own command does: feature_store.yaml names a class of asof.py
        store = FeatureStore(repo_path=repo)
        service = store.get_feature_service("serving")
        ttl = {
            feature.name: (store.get_feature_view(view.name).ttl or timedelta()).total_seconds()
            for view in service.feature_view_projections
            for feature in view.features
        }

        def fetch(user_id: int) -> dict[str, Any]:
            answer = store.get_online_features(features=service, entity_rows=[{"user_id": user_id}])
            row = {name: values[0] for name, values in answer.to_dict(include_event_timestamps=True).items()}
            now = time()  # Feast does not hold online values to their time to live
            return {name: None if 0 < ttl[name] < now - row[f"{name}__ts"] else row[name] for name in ttl}

        fetch(0)  # opens the connection, outside of any request's time limit
    except Exception:
        logger.exception("CLICKLOOP_FEATURE_REPO=%s: no online store; every answer is degraded", repo)
        return None
    return fetch
