"""push: fresh clicks -> the histories that are served, while they arrive.

Feast's push writes a user's whole history: what is served is read, the click added, and all of it written back. So one
process at a time may push. The stage `features` makes the histories anew, from the events that it knows: clicks wait
until it is done, and those that came after its newest event are pushed again. A process that is started again knows
none of those: what it pushed before lasts until the next materialization.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, NamedTuple

from bento.store import store_files, store_identity
from components.common.artifacts import read_json
from components.features.store import feature_store
from components.features.views import FeaturesConfig

if TYPE_CHECKING:
    from feast import FeatureStore

SOURCE = "fresh_history"  # the push source of feature_repo/definitions.py
LOOK_SECONDS = 0.5  # how often a stream without clicks looks whether the store was made anew


class Click(NamedTuple):
    user_id: int
    item_id: int
    timestamp: datetime


def run(config: FeaturesConfig, repo: Path, lines: Iterable[str] = sys.stdin) -> int:
    """Push clicks until the lines end: a JSON object a line, with user_id, item_id and timestamp (ISO, with a zone).

    Returns how many. Raises ValueError where a line is no click; the clicks before it are pushed.
    """
    pushed = 0
    with ExitStack() as stack:
        histories = Histories(repo, config.history_length, stack)
        for waiting in _waiting(lines):
            clicks, broken = [], None
            for line in waiting:
                try:
                    clicks.append(parse(line))
                except ValueError as error:
                    broken = error
                    break
            histories.add(clicks)
            pushed += len(clicks)
            if broken:
                raise ValueError(f"push: line {pushed + 1}: {broken}")
    return pushed


class Histories:
    """The histories that a repo's online store serves.

    length  newest clicks kept of a user
    stack   closes the store

    Raises ValueError where `features` has not made a store.
    """

    def __init__(self, repo: Path, length: int, stack: ExitStack) -> None:
        self.repo, self.length, self.stack = repo.resolve(), length, stack
        self.files = store_files(str(self.repo))
        self.seen: tuple[int, ...] | None = None
        # Of the users pushed to: their newest clicks, and the hash of what is served if nothing else has written it.
        self.recent: dict[int, list[Click]] = {}
        self.written: dict[int, int] = {}
        read_json(self.files[0], "features")

    def add(self, clicks: list[Click]) -> None:
        """Push, once the store is whole, and first what a store made anew does not have."""
        while (found := store_identity(self.files)) is None:
            time.sleep(LOOK_SECONDS)
        if found != self.seen:
            self._open()
            self.seen = found
        self._push(clicks)
        for click in clicks:
            self.recent[click.user_id] = [*self.recent.get(click.user_id, ()), click][-self.length :]

    def _open(self) -> None:
        self.stack.close()
        self.store = self.stack.enter_context(feature_store(self.repo))
        until = datetime.fromisoformat(read_json(self.files[0], "features")["log_until"])
        newer = {user: [click for click in clicks if click.timestamp > until] for user, clicks in self.recent.items()}
        self.recent = {user: clicks for user, clicks in newer.items() if clicks}
        served = served_histories(self.store, list(self.recent))
        lost = [user for user, history in served.items() if hash(tuple(history)) != self.written[user]]
        self.written = {user: self.written[user] for user in self.recent}
        if clicks := [click for user in lost for click in self.recent[user]]:
            print(f"the store was made anew: pushes the {len(clicks):,} clicks after {until:%Y-%m-%d %H:%M:%S} again")
            self._push(clicks)

    def _push(self, clicks: list[Click]) -> None:
        if clicks:
            pushed = push(self.store, clicks, self.length)
            self.written |= {user: hash(tuple(history)) for user, history in pushed.items()}


def parse(line: str) -> Click:
    """Raises ValueError that says what is wrong with the line."""
    try:
        found = json.loads(line)
        user_id, item_id, text = (found[name] for name in Click._fields)
        click = Click(user_id, item_id, datetime.fromisoformat(text))
    except (ValueError, KeyError, TypeError):
        click = None
    if click is None or type(user_id) is not int or type(item_id) is not int or click.timestamp.tzinfo is None:
        raise ValueError(
            f'{line.strip()!r} is no click; write e.g. {{"user_id": 7, "item_id": 12, '
            '"timestamp": "2026-01-31T12:00:00+00:00"}'
        )
    return click


def push(store: FeatureStore, clicks: list[Click], length: int) -> dict[int, list[int]]:
    """Add the clicks, in the order of their times, to the histories that the store serves; the newest `length` stay.

    A history is known from now on, or, as in training, once the click's second is over. Returns user -> history.
    """
    import pandas as pd
    from feast.data_source import PushMode

    fresh: dict[int, list[Click]] = {}
    for click in sorted(clicks, key=lambda click: click.timestamp):
        fresh.setdefault(click.user_id, []).append(click)
    histories = {
        user: [*served, *(click.item_id for click in fresh[user])][-length:]
        for user, served in served_histories(store, list(fresh)).items()
    }
    now = datetime.now(UTC)
    rows = pd.DataFrame(
        {
            "user_id": list(fresh),
            "history": list(histories.values()),
            "event_timestamp": pd.to_datetime(
                [
                    max(now, new[-1].timestamp.astimezone(UTC).replace(microsecond=0) + timedelta(seconds=1))
                    for new in fresh.values()
                ]
            ),
        }
    )
    store.push(SOURCE, rows, to=PushMode.ONLINE)
    return histories


def served_histories(store: FeatureStore, users: list[int]) -> dict[int, list[int]]:
    """Item ids, oldest first, of each user."""
    if not users:
        return {}
    entities = [{"user_id": user} for user in users]
    found = store.get_online_features(features=["user_history:history"], entity_rows=entities).to_dict()["history"]
    return {user: list(history or ()) for user, history in zip(users, found, strict=True)}


def _waiting(lines: Iterable[str]) -> Iterator[list[str]]:
    """The lines as they come: each time all that wait, or none after a while without any."""
    queue: SimpleQueue[str | None] = SimpleQueue()

    def read() -> None:
        try:
            for line in lines:
                queue.put(line)
        finally:
            queue.put(None)

    Thread(target=read, daemon=True).start()
    ended = False
    while not ended:
        waiting: list[str] = []
        with suppress(Empty):
            line = queue.get(timeout=LOOK_SECONDS)
            while line is not None:
                waiting.append(line)
                line = queue.get_nowait()
            ended = True
        yield waiting
