"""The online store, SQLite and a real Redis: what is materialized, pushed and expired is what the server reads."""

from __future__ import annotations

import json
import shutil
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
    """A refit of the vectors changes no time. Feast's Redis store would keep the old ones, were it not told."""
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


def test_a_stream_of_clicks(served: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that production runs: each click is served while the stream stays open."""
    words = [sys.executable, "-m", "components", "push", "--repo", str(served.repo)]
    fetch = reader(served, monkeypatch)
    with subprocess.Popen(words, cwd=PROJECT, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as stream:
        assert stream.stdin and stream.stderr
        for n in range(3):
            click = {"user_id": 4321, "item_id": n, "timestamp": "2024-04-01T00:00:00+00:00"}
            stream.stdin.write(json.dumps(click) + "\n")
            stream.stdin.flush()
            deadline = time.monotonic() + 600
            while fetch(4321)["history"] != list(range(n + 1)):
                assert stream.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
        stream.stdin.write('{"user_id": 4321, "item_id": "3"}\n')
        stream.stdin.close()
        told = " ".join(stream.stderr.read().split())
        assert stream.wait() == 1
    assert 'push: line 4: \'{"user_id": 4321, "item_id": "3"}\' is no click; write e.g.' in told


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
    "line",
    [
        "",
        "7",
        "null",
        "{",
        '{"user_id": 1, "item_id": 2}',
        '{"user_id": 1, "item_id": 2, "timestamp": 3}',
        '{"user_id": true, "item_id": 2, "timestamp": "2024-04-01T00:00:00+00:00"}',
        '{"user_id": 1, "item_id": 2.0, "timestamp": "2024-04-01T00:00:00+00:00"}',
        '{"user_id": 1, "item_id": 2, "timestamp": "2024-04-01T00:00:00"}',
    ],
)
def test_lines_that_are_no_clicks(line: str) -> None:
    with pytest.raises(ValueError, match=r"is no click; write e\.g\. \{"):
        push.parse(line)


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
