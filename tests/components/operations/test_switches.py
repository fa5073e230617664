"""Clicks that are pushed while stores are switched, and by processes that are killed: each is served once."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event, Thread
from typing import Any

import feast
import pyarrow as pa
import pytest

from bento.store import OnlineFeatures, identity
from components.features import clicks
from components.operations import push
from components.operations.push import Click, Histories
from tests.components.live_world import Live, Stream, line, make_features, wait_for
from tests.components.small_world import FEATURES, Folders, hand_tables, prepare

WHEN = datetime(2024, 4, 1, tzinfo=UTC)  # after all events of the small world
USERS = [8001, 8002, 8003]  # the world does not know them
WORLDS_USER = 7000


@pytest.fixture(scope="module")
def world(prepared: Folders, tmp_path_factory: pytest.TempPathFactory) -> Live:
    """A live folder whose histories are long: what is served is all that was pushed."""
    return Live.of(prepared, tmp_path_factory.mktemp("long") / "world", history_length=300)


def clicks_of(user: int, items: Iterable[int]) -> list[bytes]:
    """A click a second."""
    return [line(user, item, (WHEN + timedelta(seconds=n)).isoformat()) for n, item in enumerate(items)]


def numbered(start: int, stop: int) -> list[bytes]:
    """A click a second, each on an item of its own, by one user after another."""
    return [
        line(USERS[n % len(USERS)], n, (WHEN + timedelta(seconds=n)).isoformat()) for n in range(start, stop)
    ]  # fmt: skip


def test_clicks_that_come_while_stores_are_switched(world: Live, tmp_path: Path) -> None:
    """Three switches, a stream of clicks, and a reader. No read is without its user, no click is missing at the end,
    and none is there twice or out of order at any time."""
    stream = Stream(world.live, tmp_path / "push")
    fetch = world.reader()
    online, done, wrong = OnlineFeatures(fetch, timeout=120), Event(), []
    reads = 0

    def read() -> None:
        nonlocal reads
        while not done.is_set():
            known = online.read(WORLDS_USER)
            if known.reason or not known.history or not known.profile["region"]:
                wrong.append(known)
            for user in USERS:
                history = online.read(user).history
                if history != sorted(set(history)):
                    wrong.append((user, history))
            reads += 1

    def all_are_served(stop: int) -> bool:
        return all(fetch(user)["history"] == [*range(n, stop, len(USERS))] for n, user in enumerate(USERS))

    stream.send(*numbered(0, 6))
    wait_for(lambda: all_are_served(6))
    reader = Thread(target=read)
    reader.start()
    sent, stores = 6, [world.store]
    try:
        for _ in range(3):
            stream.send(*numbered(sent, sent + 10))  # before and while the store is filled
            sender = Thread(target=lambda start=sent + 10: [stream.send(one) for one in numbered(start, start + 30)])
            sender.start()
            stores.append(world.publish())
            sender.join()
            stream.send(*numbered(sent + 40, sent + 45))
            sent += 45
        wait_for(lambda: all_are_served(sent))
    finally:
        done.set()
        reader.join()
    printed = stream.end()
    assert f"push: {sent} pushed, 0 repeated, 0 rejected" in printed
    assert not wrong and reads and len(set(stores)) == 4
    assert fetch.opened and fetch.opened.identity == identity(world.store)


def test_a_newer_log_takes_over_what_it_holds(prepared: Folders, tmp_path: Path) -> None:
    """Clicks that were pushed come in the next day's log: they are served once, and their parts of the journal go."""
    live, raw = Live.of(prepared, tmp_path / "today"), hand_tables()
    user, items = WORLDS_USER, raw.items["item_id"].to_pylist()[:4]
    until = max(raw.events["timestamp"].to_pylist())
    pushed = [Click(user, item, until + timedelta(seconds=n)) for n, item in enumerate(items, 1)]
    before = live.reader()(user)["history"]
    for click in pushed:
        Histories(live.live).add([click])  # as many processes would: a part of the journal each
    assert live.reader()(user)["history"] == [*before, *items][-FEATURES.history_length :]

    rows = raw.events.slice(0, 2).to_pylist()
    for row, click in zip(rows, pushed[:2], strict=True):
        row |= {"user_id": user, "item_id": click.item_id, "timestamp": click.timestamp, "label": 1}
    events = pa.concat_tables([raw.events, pa.Table.from_pylist(rows, raw.events.schema)])
    tomorrow = prepare(replace(raw, events=events), tmp_path / "tomorrow")
    make_features(tomorrow)
    shutil.rmtree(live.folders.features)
    shutil.move(tomorrow.features, live.folders.features)
    live.publish()
    assert live.reader()(user)["history"] == [*before, *items][-FEATURES.history_length :]
    assert Histories(live.live).add(pushed) == 0
    assert [int(part.stem) for part in clicks.parts(live.live)] == [3, 4]


# ---- kills ------------------------------------------------------------------------------------------------------


def kill_at(step: int, live: Path, lines: list[bytes]) -> None:
    """Push in a process that is killed at one of its steps: right before or after it waits for the disk or writes to
    the store. Killed too where it has no such step, so that nothing is ever ended in order."""
    count = 0

    def step_done() -> None:
        nonlocal count
        if count == step:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    def around(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*given: Any, **named: Any) -> Any:
            step_done()
            try:
                return call(*given, **named)
            finally:
                step_done()

        return wrapped

    os.fsync = around(os.fsync)
    feast.FeatureStore.push = around(feast.FeatureStore.push)
    push.run(live, lines)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_push_that_is_killed_at_any_step(world: Live) -> None:
    """It is started again with one line more, and killed one step later, until it gets through. Now and then a store
    is published meanwhile."""
    user, steps = 8101, 15
    forked = multiprocessing.get_context("fork")
    for step in range(steps):
        # one item again and again: its history does not tell which of its clicks it has
        child = forked.Process(target=kill_at, args=(step, world.live, clicks_of(user, [5] * (step + 1))))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        if step in (6, 9):
            world.publish()
    push.run(world.live, clicks_of(user, [5] * steps))
    assert world.reader()(user)["history"] == [5] * steps
    assert sum(clicks.read(world.live)["user_id"] == user) == steps


def test_a_push_that_is_killed_at_any_moment(world: Live, tmp_path: Path) -> None:
    """The command itself, in the middle of a stream."""
    user, lines = 8102, clicks_of(8102, range(200))
    stream, fetch = Stream(world.live, tmp_path / "push"), world.reader()
    stream.send(*lines[:1])
    wait_for(lambda: fetch(user)["history"])
    for one in lines[1:]:
        stream.send(one)
    stream.process.kill()
    stream.process.wait()
    assert push.run(world.live, lines, tmp_path / "rejected") < 200
    assert fetch(user)["history"] == list(range(200))
    assert sum(clicks.read(world.live)["user_id"] == user) == 200
