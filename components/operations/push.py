"""push: fresh clicks -> the histories that are served, while they arrive.

Each click goes to the journal first, and then to the store that serves. components/features/clicks.py says how a kill
loses none and doubles none. A click that is delivered twice (same user, item and time) counts once: the journal, and
up to its newest event the store's click log, tell which came already.

A publish locks the live folder, gives the new store the journal's clicks, and switches. Clicks wait meanwhile, and go
to the new store. Only one process may push. The lock is a file: it does not see a process on another machine.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import NamedTuple, TypeVar

import numpy as np

from components.common.live import CLICKS, current, locked
from components.features import clicks as journal

LOOK_SECONDS = 0.5  # how often a stream without clicks looks whether its lines have ended
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


def run(live: Path, lines: Iterable[bytes] = sys.stdin.buffer, rejected: Path = REJECTED) -> int:
    """Push clicks until the lines end: a JSON object a line, with user_id, item_id and timestamp (ISO, with a zone).

    live      the live folder
    rejected  where lines that are no click are kept, each with its number and what is wrong with it

    Prints how many lines were pushed, repeated and rejected, also when it is interrupted. Returns how many were pushed.
    Raises ValueError where no store serves, or another process pushes.
    """
    counts = {"pushed": 0, "repeated": 0, "rejected": 0}
    with alone(live):
        histories = Histories(live)
        try:
            for waiting in _waiting(enumerate(lines, 1)):
                found = []
                for number, line in waiting:
                    try:
                        found.append(parse(line))
                    except ValueError as error:
                        counts["rejected"] += 1
                        set_aside(rejected, number, line, str(error), show=counts["rejected"] <= SHOWN)
                for start in range(0, len(found), journal.BATCH):
                    some = found[start : start + journal.BATCH]
                    pushed = histories.add(some)
                    counts["repeated"] += len(some) - pushed
        finally:
            counts["pushed"] = histories.pushed
            _print(f"push: {', '.join(f'{count:,} {name}' for name, count in counts.items())}")
            if counts["rejected"]:
                _print(f"push: the rejected lines are in {rejected}")
    return counts["pushed"]


@contextmanager
def alone(live: Path) -> Iterator[None]:
    """Raises ValueError where another process of this machine pushes into the live folder."""
    file = live / CLICKS / "pusher"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system unlocks it when this process ends
        except BlockingIOError:
            lock.seek(0)
            raise ValueError(
                f"push: process {lock.read().strip()} pushes into {live} already, and two would lose clicks; "
                "stop it, or send it these clicks"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


class Histories:
    """The histories that are served from a live folder. Raises ValueError where no store serves."""

    def __init__(self, live: Path) -> None:
        self.live, self.journal = live, journal.Journal(live)
        self.folder: Path | None = None
        self.pushed = 0  # clicks that are in the journal: a kill cannot take them back
        with locked(live):
            self._open()

    def add(self, clicks: list[Click]) -> int:
        """Push the clicks that are new, once nobody else changes the live folder. Returns how many were new."""
        rows = [(click.user_id, click.item_id, journal.micros(click.timestamp)) for click in clicks]
        asked = np.array(rows, journal.CLICK)
        asked = asked[np.argsort(asked["us"], kind="stable")]
        with locked(self.live):
            self._open()
            assert self.folder
            asked = asked[~journal.in_the_log(self.folder, asked)]
            new = dict.fromkeys(key for key in keys(asked) if key not in self.known)
            fresh = np.frombuffer(b"".join(new), journal.CLICK)
            if len(fresh):
                batch = self.journal.append(fresh)
                self.pushed += len(fresh)
                self.known |= new.keys()
                journal.give(self.folder, self.store, fresh, batch)
        return len(fresh)

    def _open(self) -> None:
        """The store that serves now. It has all that the journal has, unless a process was killed in between."""
        deployed = current(self.live)
        if deployed is None or deployed.store is None:
            raise ValueError(
                f"push: no store serves from {self.live}; run `python -m components registry promote`, or name another "
                "live folder by CLICKLOOP_LIVE"
            )
        if deployed.store != self.folder:
            self.folder, self.store = deployed.store, journal.open_store(deployed.store)
            if given := journal.catch_up(self.live, self.folder, self.store):
                _print(f"push: gave {self.folder} the {given:,} clicks of the journal that it did not have")
            journal.trim(self.live, journal.log_until(self.folder))
            self.known = set(keys(journal.read(self.live)))


def keys(clicks: np.ndarray) -> list[bytes]:
    """What tells two clicks apart: the bytes of a CLICK."""
    size = journal.CLICK.itemsize
    plain = np.empty(len(clicks), journal.CLICK)
    for name in journal.CLICK.names or ():
        plain[name] = clicks[name]
    content = plain.tobytes()
    return [content[start : start + size] for start in range(0, len(content), size)]


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
