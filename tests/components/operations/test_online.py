"""The online store, SQLite and a real Redis: what is materialized, pushed and expired is what the server reads."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from bento.store import feast_reader
from components.common.contracts import Canonical
from components.features import features
from components.features.store import apply, feature_store
from components.operations import push
from components.operations.push import Click
from tests.components.small_world import (
    FEATURES,
    PROJECT,
    Folders,
    Row,
    hand_tables,
    known_clicks,
    plain_rows,
    prepare,
    with_column,
)
from tests.parts import need

REDIS = """online_store:
  type: redis
  connection_string: ${CLICKLOOP_REDIS}
  skip_dedup: true
"""


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """host:port of a Redis of this module's own."""
    need("redis")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("redis")
    words = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    server = subprocess.Popen(["redis-server", *words], stdout=subprocess.DEVNULL)
    try:
        import redis

        client = redis.Redis(port=port)
        while True:
            try:
                client.ping()
                break
            except redis.ConnectionError:
                assert server.poll() is None, "redis-server ended"
                time.sleep(0.05)
        client.close()
        yield f"localhost:{port}"
    finally:
        server.terminate()
        server.wait()


def use_redis(repo: Path) -> None:
    """The lines that feature_store.yaml shows, in place of SQLite's."""
    file = repo / "feature_store.yaml"
    text = file.read_text()
    shown = "".join(line.removeprefix("# ") for line in text.splitlines(keepends=True) if line.startswith("# "))
    assert REDIS in shown
    start, end = text.index("online_store:\n  type: sqlite"), text.index("# In place of")
    file.write_text(text[:start] + REDIS + text[end:])


@pytest.fixture(scope="module", params=["sqlite", "redis"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Folders]:
    made = prepare(hand_tables(), tmp_path_factory.mktemp(request.param))
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "redis":
            patch.setenv("CLICKLOOP_REDIS", request.getfixturevalue("redis_server"))
            use_redis(made.repo)
        features.run(FEATURES, made.canonical, made.report, made.embedding, made.repo, made.features)
        assert (made.features / "online.db").exists() == (request.param == "sqlite")
        yield made


def reader(folders: Folders, patch: pytest.MonkeyPatch) -> Callable[[int], dict[str, Any]]:
    """Reads users as the server does."""
    patch.chdir(folders.repo)
    fetch = feast_reader(".")
    assert fetch is not None
    return fetch


@pytest.fixture
def rows(served: Folders) -> list[Row]:
    return plain_rows(Canonical(served.canonical).events())


def test_what_is_served_is_what_was_counted_by_hand(
    served: Folders, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    users, forever = Canonical(served.canonical).users().to_pylist(), 10**18
    fetch = reader(served, monkeypatch)
    for user in users:
        history = known_clicks(rows, user["user_id"], forever, FEATURES.availability_lag_seconds)
        assert fetch(user["user_id"]) == {
            "history": history[-FEATURES.history_length :] or None,
            "region": user["region"],
        }
    assert fetch(1) == {"history": None, "region": None}


def test_new_values_of_an_old_time_are_served(served: Folders, tmp_path: Path) -> None:
    """A refit of the vectors changes no time. By default, Feast's Redis store would keep the old ones."""
    again = Folders(tmp_path / "again")
    shutil.copytree(served.root, again.root)
    file = again.embedding / "item_embedding.parquet"
    table = pq.read_table(file)
    changed = [None if v is None else [2 * x for x in v] for v in table["embedding"].to_pylist()]
    pq.write_table(with_column(table, "embedding", changed), file)
    features.run(FEATURES, again.canonical, again.report, again.embedding, again.repo, again.features)  # it compares


def test_pushed_clicks_are_served(served: Folders, rows: list[Row], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of their times, after what was there, and no more than are kept."""
    lag, length = FEATURES.availability_lag_seconds, FEATURES.history_length
    users = sorted({r.user for r in rows if r.label})
    before = {user: known_clicks(rows, user, 10**18, lag) for user in users}
    when = datetime(2024, 4, 1, tzinfo=UTC)
    clicks = [Click(user, 900 + n, when + timedelta(seconds=5 - n)) for user in (users[0], 77) for n in (1, 2)]
    with feature_store(served.repo) as store:
        push.push(store, clicks, length)
        push.push(store, [Click(users[1], 5, when), Click(users[1], 5, when)], length)
        push.push(store, [Click(users[0], 903, when)], length)  # a click that comes late stands where it came
    fetch = reader(served, monkeypatch)
    assert fetch(users[0])["history"] == [*before[users[0]], 902, 901, 903][-length:]
    assert fetch(77)["history"] == [902, 901]
    assert fetch(users[1])["history"] == [*before[users[1]], 5, 5][-length:]
    assert fetch(users[2])["history"] == before[users[2]][-length:]
    assert fetch(users[0])["region"] is not None


class Stream:
    """The command that production runs, with an open stream of lines."""

    def __init__(self, repo: Path, folder: Path) -> None:
        words = [
            sys.executable,
            "-m",
            "components",
            "push",
            "--repo",
            str(repo),
            "--params",
            str(PROJECT / "params.yaml"),
        ]
        folder.mkdir()
        self.rejected, pipe = folder / push.REJECTED, subprocess.PIPE
        self.process = subprocess.Popen(
            words, cwd=folder, stdin=pipe, stderr=pipe, env=os.environ | {"PYTHONPATH": str(PROJECT)}
        )

    def send(self, *lines: bytes) -> None:
        assert self.process.stdin
        self.process.stdin.write(b"".join(line + b"\n" for line in lines))
        self.process.stdin.flush()

    def end(self) -> str:
        """What it printed, once its lines have ended."""
        _, printed = self.process.communicate()
        return printed.decode()


def line(user: int, item: int, timestamp: str = "2024-04-01T00:00:00+00:00") -> bytes:
    return json.dumps({"user_id": user, "item_id": item, "timestamp": timestamp}).encode()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


BAD_LINES = [
    b"", b"{", b'{"user_id": "\xff"}', b"[" * 100_000, b'"' + b"x" * 5000,
    b'{"user_id": 4321, "item_id": "3", "timestamp": "2024-04-01T00:00:00+00:00"}',
]  # fmt: skip


def test_a_stream_of_clicks(served: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each click is served while the stream stays open, whatever lies between, and once, however often it comes."""
    stream = Stream(served.repo, tmp_path / "push")
    fetch = reader(served, monkeypatch)
    for n in range(3):
        stream.send(line(4321, n), *BAD_LINES[2 * n : 2 * n + 2], line(4321, 0, "2024-04-01T02:00:00+02:00"))
        wait_for(lambda n=n: fetch(4321)["history"] == list(range(n + 1)))
    printed = stream.end()
    assert stream.process.returncode == 0, printed
    assert "push: 3 pushed, 3 repeated, 6 rejected" in printed
    assert fetch(4321)["history"] == [0, 1, 2]
    kept = [json.loads(one) for one in stream.rejected.read_text().splitlines()]
    assert [one["line"] for one in kept] == [2, 3, 6, 7, 10, 11]
    assert [one["text"] for one in kept[:3]] == ["", "{", '{"user_id": "\\xff"}']
    assert kept[-1]["error"] == "item_id is '3'; it takes an integer of 64 bits"
    shown = [one for one in printed.splitlines() if "is set aside" in one]
    assert len(shown) == push.SHOWN and max(map(len, shown)) < 2 * push.SHOWN_CHARACTERS + 50
    assert "push: line 2 is set aside: it is empty; write e.g. {" in printed


def test_one_process_pushes(served: Folders, tmp_path: Path) -> None:
    first, second = Stream(served.repo, tmp_path / "first"), None
    try:
        wait_for(lambda: lock_of(served).is_file() and lock_of(served).read_text() == str(first.process.pid))
        second = Stream(served.repo, tmp_path / "second")
        printed = " ".join(second.end().split())
        assert second.process.returncode == 1
        assert f"push: process {first.process.pid} pushes into {served.features} already" in printed
        first.process.kill()  # the system gives its lock back
        first.process.wait()
        third = Stream(served.repo, tmp_path / "third")
        assert "push: 0 pushed, 0 repeated, 0 rejected" in third.end()
    finally:
        for stream in filter(None, (first, second)):
            stream.process.kill()
            stream.process.communicate()


def lock_of(folders: Folders) -> Path:
    return folders.features.with_name(".features.push")


def test_an_interrupted_stream_says_what_it_did(
    served: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Stream(served.repo, tmp_path / "push")
    fetch = reader(served, monkeypatch)
    stream.send(line(4322, 1), b"{")
    wait_for(lambda: fetch(4322)["history"] == [1])
    stream.process.send_signal(signal.SIGTERM)
    assert stream.process.wait() == 143
    assert "push: 1 pushed, 0 repeated, 1 rejected" in stream.end()


def test_a_click_of_the_log_is_not_pushed_again(
    served: Folders, rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by a process that was just started. A late click, which the log does not hold, is pushed."""
    lag = FEATURES.availability_lag_seconds
    again = Folders(tmp_path / "again")
    shutil.copytree(served.root, again.root)
    features.run(FEATURES, again.canonical, again.report, again.embedding, again.repo, again.features)
    user = next(r.user for r in rows if r.label)
    before = known_clicks(rows, user, 10**18, lag)[-FEATURES.history_length :]
    seen = [r for r in rows if r.user == user and r.label]
    moments = [datetime.fromtimestamp(r.micro // 10**6, UTC) + timedelta(microseconds=r.micro % 10**6) for r in seen]
    with ExitStack() as stack:
        histories = push.Histories(again.repo, FEATURES.history_length, stack)
        clicks = [Click(user, r.item, moment) for r, moment in zip(seen, moments, strict=True)]
        assert histories.add(clicks) == 0
        fetch = reader(again, monkeypatch)
        assert fetch(user)["history"] == before
        late = [Click(user, 987, moments[0]), Click(user, seen[0].item, moments[0] + timedelta(microseconds=1))]
        assert histories.add([*clicks, *late, *late]) == 2
        assert histories.add(late) == 0
        assert fetch(user)["history"] == [*before, 987, seen[0].item][-FEATURES.history_length :]


def test_rejected_lines_take_a_bounded_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push, "REJECTED_BYTES", 1000)
    file = tmp_path / "deep" / "rejected.jsonl"
    for number in range(200):
        push.set_aside(file, number, b"x" * 100_000, "it is wrong", show=False)
        monkeypatch.setattr(push, "REJECTED_LINE", 50)
    kept = [json.loads(one)["line"] for name in ("rejected.jsonl.1", "rejected.jsonl") for one in
            (tmp_path / "deep" / name).read_text().splitlines()]  # fmt: skip
    assert kept == list(range(kept[0], 200)) and len(kept) < 50  # the newest
    assert sum(f.stat().st_size for f in (tmp_path / "deep").iterdir()) < 3000


def test_a_store_made_anew_gets_the_clicks_that_its_log_lacks(
    served: Folders, rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once each, and of users that only the pushed clicks know, too: Redis still has theirs, a new SQLite has not."""
    again = Folders(tmp_path / "again")
    shutil.copytree(served.root, again.root)

    def materialize() -> str:
        receipt = features.run(FEATURES, again.canonical, again.report, again.embedding, again.repo, again.features)
        return receipt["log_until"]

    until = datetime.fromisoformat(materialize())
    assert until == max(Canonical(again.canonical).events()["timestamp"].to_pylist())
    length, forever, lag = FEATURES.history_length, 10**18, FEATURES.availability_lag_seconds
    first, second = sorted({r.user for r in rows if r.label})[:2]
    before = {user: known_clicks(rows, user, forever, lag) for user in (first, second)}
    newer = [Click(user, 700 + n, until + timedelta(seconds=n)) for user in (first, 5150) for n in (1, 2)]
    in_the_log = Click(second, 799, until)
    with ExitStack() as stack:
        histories = push.Histories(again.repo, length, stack)
        histories.add([*newer, in_the_log])
        fetch = reader(again, monkeypatch)
        wanted = {first: [*before[first], 701, 702][-length:], 5150: [701, 702], second: before[second][-length:]}
        assert fetch(second)["history"] == [*before[second], 799][-length:]
        for _ in range(2):
            materialize()
            assert fetch(first)["history"] == before[first][-length:]
            histories.add([])
            assert {user: fetch(user)["history"] for user in wanted} == wanted
        histories.add([Click(first, 703, until + timedelta(seconds=3))])
        assert fetch(first)["history"] == [*before[first], 701, 702, 703][-length:]


def test_clicks_wait_until_the_store_is_whole(served: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Folders(tmp_path / "made")
    shutil.copytree(served.root, made.root)
    receipt, aside = made.features / "receipt.json", tmp_path / "receipt.json"
    fetch = reader(made, monkeypatch)
    with ExitStack() as stack:
        histories = push.Histories(made.repo, FEATURES.history_length, stack)
        receipt.rename(aside)  # as while `features` is at work
        adding = Thread(target=histories.add, args=([Click(5151, 1, datetime.now(UTC))],))
        adding.start()
        adding.join(3 * push.LOOK_SECONDS)
        assert adding.is_alive() and fetch(5151)["history"] is None
        aside.rename(receipt)
        adding.join()
        assert fetch(5151)["history"] == [1]
    receipt.unlink()
    with pytest.raises(ValueError, match=r"receipt\.json is not there; run `dvc repro features`"), ExitStack() as stack:
        push.Histories(made.repo, FEATURES.history_length, stack)


@pytest.mark.parametrize(
    ("bad", "wrong"),
    [
        ("", "it is empty; write e.g."),
        ("7", "it is not a JSON object"),
        ("null", "it is not a JSON object"),
        ("{", "it is not JSON"),
        ('{"user_id": 1, "item_id": 2}', "timestamp is missing"),
        ('{"user_id": 1, "item_id": 2, "timestamp": 3}', "timestamp is 3; it takes an ISO time"),
        ('{"user_id": 1, "item_id": 2, "timestamp": "0001-01-01T00:00:00+05:00"}', "it takes an ISO time"),
        ('{"user_id": true, "item_id": 2, "timestamp": "2024-04-01T00:00:00+00:00"}', "user_id is True"),
        ('{"user_id": 1, "item_id": 2.0, "timestamp": "2024-04-01T00:00:00+00:00"}', "item_id is 2.0"),
        ('{"user_id": 1, "item_id": 9223372036854775808, "timestamp": "2024-04-01T00:00:00+00:00"}', "of 64 bits"),
        ('{"user_id": 1, "item_id": 2, "timestamp": "2024-04-01T00:00:00"}', "a time without a zone"),
    ],
)
def test_lines_that_are_no_clicks(bad: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=re.escape(wrong)):
        push.parse(bad.encode())


def test_old_histories_are_forgotten_alike(served: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a time to live, training and serving know no click that is older; Feast's online read alone would."""
    short = Folders(tmp_path / "short")
    shutil.copytree(served.root, short.root)
    file = short.repo / "definitions.py"
    file.write_text(file.read_text().replace("HISTORY_TTL = FOREVER", "HISTORY_TTL = timedelta(days=2)"))
    with feature_store(short.repo) as store:
        apply(store, short.features.resolve())
        # the last user: no test above pushed to it
        newest = pq.read_table(short.features / "sources" / "user_history.parquet").to_pylist()[
            -1
        ]  # one that no test above pushed to
        user, known = newest["user_id"], newest["event_timestamp"]
        moments = [known, known + timedelta(days=2), known + timedelta(days=2, microseconds=1)]
        entities = pd.DataFrame({"user_id": user, "item_id": 1, "event_timestamp": moments})
        job = store.get_historical_features(entity_df=entities, features=["user_clicks:clicks_end"])
        table = job.to_arrow().sort_by("event_timestamp")
        assert pc.is_valid(table["clicks_end"]).to_pylist() == [True, True, False]
        push.push(store, [Click(55, 1, datetime.now(UTC))], 5)
    fetch = reader(short, monkeypatch)
    assert fetch(user)["history"] is None and fetch(user)["region"] is not None  # the profile lives on
    assert fetch(55)["history"] == [1]


def test_what_left_the_sources_is_served_no_more(
    served: Folders, rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user whose only click was corrected away, one who left, and one who was pushed to alone; an item without its
    vector, and one without its events."""
    raw = hand_tables()
    *_, unclicked, left = sorted({row.user for row in rows})
    item, unseen = rows[0].item, rows[1].item
    assert item != unseen
    user, label = (raw.events[name].to_numpy() for name in ("user_id", "label"))
    events = with_column(raw.events, "label", np.where(user == unclicked, 0, label), pa.int8())
    events = events.filter(pa.array((user != left) & (raw.events["item_id"].to_numpy() != unseen)))
    image = raw.modalities["image"]
    fewer = replace(
        raw,
        events=events,
        users=raw.users.filter(pc.not_equal(raw.users["user_id"], left)),
        modalities={"image": image.filter(pc.not_equal(image["item_id"], item))},
    )
    views = ["user_profile:region", "user_history:history"]
    items = ["item_popularity:views", "item_embedding:embedding"]

    def found(folders: Folders) -> tuple[dict[str, list], dict[str, list]]:
        with feature_store(folders.repo) as store:
            return (
                store.get_online_features(views, [{"user_id": user} for user in (unclicked, left, 6001)]).to_dict(),
                store.get_online_features(items, [{"item_id": item} for item in (item, unseen)]).to_dict(),
            )

    features.run(FEATURES, served.canonical, served.report, served.embedding, served.repo, served.features)
    with feature_store(served.repo) as store:
        push.push(store, [Click(6001, 1, datetime(2024, 4, 1, tzinfo=UTC))], FEATURES.history_length)
    users, of_items = found(served)
    assert None not in users["history"] and None not in of_items["views"] and None not in of_items["embedding"]
    made = prepare(fewer, tmp_path)
    if not (served.features / "online.db").exists():
        use_redis(made.repo)
    features.run(FEATURES, made.canonical, made.report, made.embedding, made.repo, made.features)
    after, of_items_after = found(made)
    assert after["history"] == [None] * 3
    assert after["region"] == [users["region"][0], None, None]
    assert of_items_after["views"][0] is not None and of_items_after["views"][1] is None
    assert of_items_after["embedding"][0] is None and of_items_after["embedding"][1] is not None
