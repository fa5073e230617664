"""push: fresh clicks -> the histories that are served, while they arrive.

Feast's push writes a user's whole history: what is served is read, the click added, and all of it written back. So one
process at a time may push. The next materialization writes the histories anew, from the events that it knows; push
again what came after those.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, NamedTuple

from components.features import FeaturesConfig, feature_store

if TYPE_CHECKING:
    from feast import FeatureStore

SOURCE = "fresh_history"  # the push source of feature_repo/definitions.py


class Click(NamedTuple):
    user_id: int
    item_id: int
    timestamp: datetime


def run(config: FeaturesConfig, repo: Path, lines: Iterable[str] = sys.stdin) -> int:
    """Push clicks until the lines end: a JSON object a line, with user_id, item_id and timestamp (ISO, with a zone).

    Returns how many. Raises ValueError where a line is no click; the clicks before it are pushed.
    """
    pushed = 0
    with feature_store(repo) as store:
        for waiting in _waiting(lines):
            clicks, broken = [], None
            for line in waiting:
                try:
                    clicks.append(parse(line))
                except ValueError as error:
                    broken = error
                    break
            if clicks:
                push(store, clicks, config.history_length)
            pushed += len(clicks)
            if broken:
                raise ValueError(f"push: line {pushed + 1}: {broken}")
    return pushed


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


def push(store: FeatureStore, clicks: list[Click], length: int) -> None:
    """Add the clicks, in the order of their times, to the histories that the store serves; the newest `length` stay.

    A history is known from now on, or, as in training, once the click's second is over.
    """
    import pandas as pd
    from feast.data_source import PushMode

    fresh: dict[int, list[Click]] = {}
    for click in sorted(clicks, key=lambda click: click.timestamp):
        fresh.setdefault(click.user_id, []).append(click)
    served = store.get_online_features(
        features=["user_history:history"], entity_rows=[{"user_id": user} for user in fresh]
    ).to_dict()["history"]
    now = datetime.now(UTC)
    rows = pd.DataFrame(
        {
            "user_id": list(fresh),
            "history": [
                [*(old or []), *(click.item_id for click in new)][-length:]
                for old, new in zip(served, fresh.values(), strict=True)
            ],
            "event_timestamp": pd.to_datetime(
                [
                    max(now, new[-1].timestamp.astimezone(UTC).replace(microsecond=0) + timedelta(seconds=1))
                    for new in fresh.values()
                ]
            ),
        }
    )
    store.push(SOURCE, rows, to=PushMode.ONLINE)


def _waiting(lines: Iterable[str]) -> Iterator[list[str]]:
    """The lines as they come: each time, all that wait."""
    queue: SimpleQueue[str | None] = SimpleQueue()

    def read() -> None:
        for line in lines:
            queue.put(line)
        queue.put(None)

    Thread(target=read, daemon=True).start()
    while (line := queue.get()) is not None:
        waiting = [line]
        try:
            while (line := queue.get_nowait()) is not None:
                waiting.append(line)
        except Empty:
            yield waiting
        else:
            yield waiting
            return
