"""push: fresh clicks -> the histories that are served, while they arrive.

Feast's push writes a user's whole history: `push` reads what is served, adds the click, and writes it back. So one
process at a time may push, and a lock beside the store's folder refuses a second one. With Redis, too, the lock is a
file of this machine: it does not see a process that pushes on another machine.

The stage `features` makes the histories anew, from the events that it knows. Clicks wait until it is done; then those
after its newest event are pushed again.

A click that is delivered twice (same user, item and time) counts once, as far as that can be known:

- up to the newest event of the click log, the log says which clicks are in the histories;
- after it, this process remembers the clicks that it has pushed, about 250 bytes each.

Served histories hold no times. So a process that is started again does not recognise what an earlier one pushed after
the newest event of the log: if such a click is delivered again, it counts again, until `features` runs the next time.
Where the source gives the histories itself, the log holds no times either.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from bento.store import store_files, store_identity
from components.common.artifacts import read_json
from components.features.store import feature_store
from components.features.views import FeaturesConfig

if TYPE_CHECKING:
    from feast import FeatureStore

SOURCE = "fresh_history"  # the push source of feature_repo/definitions.py
LOOK_SECONDS = 0.5  # how often a stream without clicks looks whether the store was made anew
SHOWN = 5  # bad lines that the terminal shows
SHOWN_CHARACTERS = 200
REJECTED = Path(".scratch/push/rejected.jsonl")
REJECTED_BYTES = 2**24  # of that file; then it becomes rejected.jsonl.1, in place of the one before
REJECTED_LINE = 2**16  # bytes kept of a line
EXAMPLE = '{"user_id": 7, "item_id": 12, "timestamp": "2026-01-31T12:00:00+00:00"}'


Line = TypeVar("Line")


class Click(NamedTuple):
    user_id: int
    item_id: int
    timestamp: datetime


def run(
    config: FeaturesConfig, repo: Path, lines: Iterable[bytes] = sys.stdin.buffer, rejected: Path = REJECTED
) -> int:
    """Push clicks until the lines end: a JSON object a line, with user_id, item_id and timestamp (ISO, with a zone).

    rejected  where lines that are no click are kept, each with its number and what is wrong with it

    Prints how many lines were pushed, repeated and rejected, also when it is interrupted. Returns how many were pushed.
    Raises ValueError where `features` has not made a store, or another process pushes into it.
    """
    rejected = rejected.absolute()  # Feast's store works in the repo's folder
    counts = {"pushed": 0, "repeated": 0, "rejected": 0}
    with ExitStack() as stack:
        histories = Histories(repo, config.history_length, stack)
        with alone(histories.files[0].parent):
            try:
                for waiting in _waiting(enumerate(lines, 1)):
                    clicks = []
                    for number, line in waiting:
                        try:
                            clicks.append(parse(line))
                        except ValueError as error:
                            counts["rejected"] += 1
                            set_aside(rejected, number, line, str(error), show=counts["rejected"] <= SHOWN)
                    pushed = histories.add(clicks)
                    counts["pushed"] += pushed
                    counts["repeated"] += len(clicks) - pushed
            finally:
                _print(f"push: {', '.join(f'{count:,} {name}' for name, count in counts.items())}")
                if counts["rejected"]:
                    _print(f"push: the rejected lines are in {rejected}")
    return counts["pushed"]


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Raises ValueError where another process of this machine pushes into the store of this folder."""
    folder = folder.resolve()
    file = folder.with_name(f".{folder.name}.push")  # beside the folder: `features` deletes what is in it
    with file.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system unlocks it when this process ends
        except BlockingIOError:
            lock.seek(0)
            raise ValueError(
                f"push: process {lock.read().strip()} pushes into {folder} already, and two would lose clicks; "
                "stop it, or send it these clicks"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


class Histories:
    """The histories that a repo's online store serves.

    length  newest clicks kept of a user
    stack   closes the store

    Raises ValueError where `features` has not made a store.
    """

    def __init__(self, repo: Path, length: int, stack: ExitStack) -> None:
        self.repo, self.length, self.stack = repo.resolve(), length, stack
        self.files = store_files(str(self.repo))
        self.log = self.files[0].with_name("click_log.parquet")
        self.opened: tuple[int, ...] | None = None
        # Of the users pushed to: their clicks since the log's newest event, and the hash of what is served if nothing
        # else has written it.
        self.fresh: dict[int, dict[Click, None]] = {}
        self.written: dict[int, int] = {}
        read_json(self.files[0], "features")

    def add(self, clicks: list[Click]) -> int:
        """Push the clicks that are new, once the store is whole, and first what a store made anew does not have.

        Returns how many were new.
        """
        while (found := store_identity(self.files)) is None:
            time.sleep(LOOK_SECONDS)
        if found != self.opened:
            self._open()
            self.opened = found
        try:
            known = _in_the_log(self.log, [click for click in clicks if click.timestamp <= self.until])
        except OSError:
            if store_identity(self.files) == found:
                raise
            return self.add(clicks)  # `features` has just begun to make it anew
        new = dict.fromkeys(
            click for click in clicks if click not in known and click not in self.fresh.get(click.user_id, ())
        )
        self._push(list(new))
        for click in new:
            self.fresh.setdefault(click.user_id, {})[click] = None
        return len(new)

    def _open(self) -> None:
        self.stack.close()
        self.store = self.stack.enter_context(feature_store(self.repo))
        self.until = datetime.fromisoformat(read_json(self.files[0], "features")["log_until"])
        newer = {
            user: {click: None for click in clicks if click.timestamp > self.until}
            for user, clicks in self.fresh.items()
        }
        self.fresh = {user: clicks for user, clicks in newer.items() if clicks}
        served = served_histories(self.store, list(self.fresh))
        lost = [user for user, history in served.items() if hash(tuple(history)) != self.written[user]]
        self.written = {user: self.written[user] for user in self.fresh}
        if clicks := [click for user in lost for click in list(self.fresh[user])[-self.length :]]:
            _print(f"push: the store was made anew; pushes the {len(clicks):,} clicks after {self.until:%F %T} again")
            self._push(clicks)

    def _push(self, clicks: list[Click]) -> None:
        if clicks:
            pushed = push(self.store, clicks, self.length)
            self.written |= {user: hash(tuple(history)) for user, history in pushed.items()}


def parse(line: bytes) -> Click:
    """Raises ValueError that says what is wrong with the line."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        wrong = f"it is not JSON ({error})" if line.strip() else "it is empty"
        raise ValueError(f"{wrong}; write e.g. {EXAMPLE}") from None
    if not isinstance(found, dict):
        raise ValueError(f"it is not a JSON object; write e.g. {EXAMPLE}")
    for name in Click._fields:
        if name not in found:
            raise ValueError(f"{name} is missing; write e.g. {EXAMPLE}")
    for name in ("user_id", "item_id"):
        if type(found[name]) is not int or not -(2**63) <= found[name] < 2**63:
            raise ValueError(f"{name} is {found[name]!r}; it takes an integer of 64 bits")
    try:
        timestamp = datetime.fromisoformat(found["timestamp"])
        timestamp.astimezone(UTC)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"timestamp is {found['timestamp']!r}; it takes an ISO time; write e.g. {EXAMPLE}") from None
    if timestamp.tzinfo is None:
        raise ValueError(f"timestamp is {found['timestamp']!r}, a time without a zone; add one, such as +00:00")
    return Click(found["user_id"], found["item_id"], timestamp)


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


def _in_the_log(log: Path, clicks: list[Click]) -> set[Click]:
    """Those of the clicks that the click log holds. DuckDB reads the parts of the file that may have them."""
    if not clicks:
        return set()
    import duckdb
    import pyarrow as pa
    import pyarrow.parquet as pq

    if "us" not in pq.read_schema(log).names:  # the source gives the histories, and no times of their clicks
        return set()
    users, items, times = (list(column) for column in zip(*clicks, strict=True))
    with duckdb.connect() as db:
        db.register(
            "asked",
            pa.table(
                {
                    "user_id": pa.array(users, pa.int64()),
                    "item_id": pa.array(items, pa.int64()),
                    "us": pa.array(times, pa.timestamp("us", tz="UTC")).cast(pa.int64()),
                    "position": pa.array(range(len(clicks)), pa.int64()),
                }
            ),
        )
        found = db.sql(
            "select position from asked where exists (from read_parquet($log) as log where log.user_id = asked.user_id "
            "and log.item_id = asked.item_id and log.us = asked.us)",
            params={"log": str(log)},
        ).fetchall()
    return {clicks[position] for (position,) in found}


def set_aside(rejected: Path, number: int, line: bytes, error: str, *, show: bool) -> None:
    """Keep a bad line in a file of bounded size, and print it where it is one of the first."""
    rejected.parent.mkdir(parents=True, exist_ok=True)
    if rejected.is_file() and rejected.stat().st_size > REJECTED_BYTES:
        rejected.replace(rejected.with_name(f"{rejected.name}.1"))
    text = line[:REJECTED_LINE].decode(errors="backslashreplace").strip()
    with rejected.open("a", encoding="utf-8") as kept:
        kept.write(json.dumps({"line": number, "error": _short(error), "text": text}) + "\n")
    if show:
        _print(f"push: line {number} is set aside: {_short(error)}: {_short(text)}")


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _waiting(lines: Iterable[Line]) -> Iterator[list[Line]]:
    """The lines as they come: each time all that wait, or none after a while without any. Raises what `lines` raise."""
    queue: SimpleQueue[Line] = SimpleQueue()
    failed: list[BaseException] = []

    def read() -> None:
        try:
            for line in lines:
                queue.put(line)
        except BaseException as error:
            failed.append(error)

    reading = Thread(target=read, daemon=True)
    reading.start()
    ended = False
    while not ended:
        ended = not reading.is_alive()  # before the queue is emptied
        waiting: list[Line] = []
        with suppress(Empty):
            waiting.append(queue.get(block=not ended, timeout=LOOK_SECONDS))
            while True:
                waiting.append(queue.get_nowait())
        yield waiting
    for error in failed:
        raise error
