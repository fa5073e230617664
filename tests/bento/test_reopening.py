"""A server that keeps reading while its link is switched to other stores. tests/components checks what is in a row."""

from __future__ import annotations

import shutil
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast import FeatureStore

from bento import store
from bento.store import OnlineFeatures, Reader
from tests.bento.world import ITEM_IDS, USER_IDS, World, make_store, make_world

USER = USER_IDS[3]
OLD, NEW = ITEM_IDS[:2], ITEM_IDS[5:8]  # histories


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Two stores."""
    world = make_world(tmp_path_factory.mktemp("reopening"))
    file = world.features / "sources" / "user_history.parquet"
    table = pq.read_table(file)
    for name, items in (("old", OLD), ("new", NEW)):
        lists = pa.array([items] * len(table), pa.list_(pa.int64()))
        pq.write_table(table.set_column(1, "history", lists), file)
        make_store(world, name)
    return world


@pytest.fixture
def live(filled: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A live folder that serves the old store; `live/current/online` is what a server reads."""
    monkeypatch.setattr(store, "LOOK", 0.02)
    shutil.copytree(filled.root / "stores", tmp_path / "stores")
    switch(tmp_path, "old")
    return tmp_path


def switch(live: Path, name: str) -> None:
    """By one rename, as production does."""
    deployed = live / "deployed" / f"{time.time_ns()}"
    deployed.mkdir(parents=True)
    (deployed / "online").symlink_to(f"../../stores/{name}")
    (live / "next").symlink_to(deployed.relative_to(live))
    (live / "next").replace(live / "current")


def read(live: Path) -> Reader:
    return Reader(str(live / "current" / "online"))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_new_store_is_served_and_the_old_folder_may_go(live: Path) -> None:
    fetch = read(live)
    assert fetch(USER)["history"] == OLD
    switch(live, "new")
    shutil.rmtree(live / "stores" / "old")
    seen = []
    wait_for(lambda: seen.append(fetch(USER)["history"]) or seen[-1] == NEW)
    assert all(history == OLD for history in seen[:-1])
    assert fetch(USER)["history"] == NEW


def test_reads_go_on_while_a_store_is_opened(live: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch, opening, go_on, real = read(live), threading.Event(), threading.Event(), store._Opened

    def slow(*given: Any) -> Any:
        opening.set()
        assert go_on.wait(300)
        return real(*given)

    monkeypatch.setattr(store, "_Opened", slow)
    switch(live, "new")
    assert opening.wait(300)
    for _ in range(20):
        assert fetch(USER)["history"] == OLD
    go_on.set()
    wait_for(lambda: fetch(USER)["history"] == NEW)


def test_a_push_and_the_same_store_open_nothing(live: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = read(live)
    opened: list[Any] = []
    monkeypatch.setattr(store, "_Opened", lambda *given: opened.append(given))
    with sqlite3.connect(live / "stores" / "old" / "online.db") as db:
        db.execute("create table other (x)")
    switch(live, "old")  # another release, with the store that serves
    fetch.look()
    assert opened == []
    receipt = live / "stores" / "old" / "receipt.json"  # a folder that took the place of another
    shutil.copy(receipt, receipt.with_name("again"))
    receipt.with_name("again").replace(receipt)
    wait_for(lambda: bool(opened))


@pytest.mark.parametrize("missing", ["registry.db", "online.db", None])
def test_what_cannot_be_opened_leaves_what_was_there(
    live: Path, missing: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    fetch, broken = read(live), live / "stores" / "broken"
    shutil.copytree(live / "stores" / "new", broken)
    if missing:
        (broken / missing).unlink()
    else:
        (broken / "online.db").write_bytes(b"no store")
    switch(live, "broken")
    shutil.rmtree(live / "stores" / "old")
    wait_for(lambda: "the old one is served" in caplog.text)
    for _ in range(10):
        fetch.look()
        assert fetch(USER)["history"] == OLD
    assert sum("cannot be opened" in message for message in caplog.messages) == 1
    assert not missing or not (broken / missing).exists()  # Feast would make it
    switch(live, "new")
    wait_for(lambda: fetch(USER)["history"] == NEW)


def test_a_server_started_before_there_is_a_store(live: Path, caplog: pytest.LogCaptureFixture) -> None:
    (live / "current").unlink()
    fetch = read(live)
    assert any("is no store yet" in message for message in caplog.messages)
    online = OnlineFeatures(fetch, timeout=600)
    assert online.read(USER).reason == "store_unavailable"
    switch(live, "new")
    wait_for(lambda: fetch.opened is not None)
    assert online.read(USER).history == NEW


def test_a_store_that_comes_up_after_the_server_is_tried_again(
    live: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Redis is not up yet")

    clock = 0.0
    monkeypatch.setattr(store, "monotonic", lambda: clock)
    monkeypatch.setattr(store, "LOOK", 300)
    with monkeypatch.context() as patch:
        patch.setattr(FeatureStore, "get_online_features", unreachable)
        fetch = read(live)
        for _ in range(3):
            fetch.look()
            with pytest.raises(LookupError, match="no online store is open"):
                fetch(USER)
        assert sum("cannot be opened" in message for message in caplog.messages) == 1
    clock = store.AGAIN
    fetch.look()
    assert fetch(USER)["history"] == OLD


def test_a_store_that_serves_no_more_gives_its_room_back(live: Path) -> None:
    """A deleted file takes room on the disk while it is open."""
    fetch = read(live)
    assert fetch(USER)["history"] == OLD
    file = (live / "stores" / "old" / "online.db").resolve()
    assert str(file) in open_files()
    switch(live, "new")
    wait_for(lambda: fetch(USER)["history"] == NEW)
    wait_for(lambda: str(file) not in open_files())  # the collector is not asked: a server freezes what it has
    threads = {one for one in threading.enumerate() if one.name == "online-store-switch"}
    before = {one for one in threads if one.is_alive()}
    assert before
    fetch = None  # type: ignore[assignment]
    wait_for(lambda: not all(one.is_alive() for one in before))


def open_files() -> set[str]:
    return {file.path for file in psutil.Process().open_files()}
