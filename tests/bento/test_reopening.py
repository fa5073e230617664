"""A server that keeps reading while `features` makes the stores anew. tests/components checks what is in a row."""

from __future__ import annotations

import shutil
import sqlite3
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast import FeatureStore
from feast.infra.registry import registry

from bento import store
from bento.store import OnlineFeatures, feast_reader
from tests.bento.world import ITEM_IDS, USER_IDS, World, end_run, fill_store, make_store, make_world

USER = USER_IDS[3]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


def rewrite_histories(world: World, items: list[int]) -> None:
    """Every user's history, in the source."""
    file = world.features / "sources" / "user_history.parquet"
    table = pq.read_table(file)
    lists = pa.array([items] * len(table), pa.list_(pa.int64()))
    pq.write_table(table.set_column(1, "history", lists), file)


def drop_stores(world: World) -> None:
    """As the stage begins: nothing of the run before is left."""
    for name in ("receipt.json", "registry.db", "online.db"):
        (world.features / name).unlink(missing_ok=True)


def test_a_store_made_anew_is_served_once_it_is_whole(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite_histories(world, ITEM_IDS[:2])
    repo = make_store(world)
    fetch = feast_reader(str(repo))
    assert fetch is not None
    assert fetch(USER)["history"] == ITEM_IDS[:2]

    later = datetime.now().astimezone() + timedelta(hours=1)
    monkeypatch.setattr(registry, "_utc_now", lambda: later)  # no cache of Feast's is young enough
    drop_stores(world)
    assert fetch(USER)["history"] == ITEM_IDS[:2]
    assert not (world.features / "registry.db").exists()  # Feast makes one where it opens none
    (world.features / "registry.db").write_bytes(b"half a registry")
    assert fetch(USER)["history"] == ITEM_IDS[:2]
    drop_stores(world)
    rewrite_histories(world, ITEM_IDS[5:8])
    fill_store(world, repo)
    assert fetch(USER)["history"] == ITEM_IDS[:2]  # there, and nobody has said that it is whole
    end_run(world)
    assert fetch(USER)["history"] == ITEM_IDS[5:8]


def test_a_server_started_while_the_stage_is_at_work(world: World, caplog: pytest.LogCaptureFixture) -> None:
    rewrite_histories(world, ITEM_IDS[:2])
    repo = make_store(world)
    drop_stores(world)
    fetch = feast_reader(str(repo))
    assert any(f"opened once `features` has written {repo}" in message for message in caplog.messages)
    online = OnlineFeatures(fetch, timeout=600)
    assert online.read(USER).reason == "store_unavailable"
    end_run(world)  # as `dvc checkout` may bring it before the rest
    assert online.read(USER).reason == "store_unavailable"
    assert sorted(file.name for file in world.features.iterdir()) == ["receipt.json", "sources"]  # Feast made nothing
    drop_stores(world)
    fill_store(world, repo)
    assert online.read(USER).reason == "store_unavailable"  # there, and nobody has said that it is whole
    end_run(world)
    assert online.read(USER).history == ITEM_IDS[:2]


def test_a_store_that_comes_up_after_the_server_is_tried_again(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Redis is not up yet")

    clock = 0.0
    monkeypatch.setattr(store, "monotonic", lambda: clock)
    repo = make_store(world)
    with monkeypatch.context() as patch:
        patch.setattr(FeatureStore, "get_online_features", unreachable)
        online = OnlineFeatures(feast_reader(str(repo)), timeout=600)
        for _ in range(3):
            assert online.read(USER).reason == "store_unavailable"
        assert sum("cannot be opened" in message for message in caplog.messages) == 1
    clock = store.AGAIN
    assert online.read(USER).history


def test_a_store_that_takes_the_place_of_another_is_served(world: World) -> None:
    """As `dvc checkout` does: the receipt stays, or comes first."""
    rewrite_histories(world, ITEM_IDS[:2])
    repo = make_store(world)
    fetch = feast_reader(str(repo))
    assert fetch is not None
    with sqlite3.connect(world.features / "online.db") as db:  # a push changes the file, and does not replace it
        db.execute("create table other (x)")
    opened: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "_Opened", lambda repo: opened.append(repo))
        fetch(USER)
    assert opened == []
    shutil.copy(world.features / "online.db", world.features / "kept.db")
    (world.features / "kept.db").replace(world.features / "online.db")
    with sqlite3.connect(world.features / "online.db") as db:
        for (table,) in db.execute("select name from sqlite_master where name like '%user_history'").fetchall():
            db.execute(f'delete from "{table}"')
    assert fetch(USER)["history"] is None


def test_what_cannot_be_opened_leaves_what_was_there(world: World, caplog: pytest.LogCaptureFixture) -> None:
    repo = make_store(world)
    fetch = feast_reader(str(repo))
    assert fetch is not None
    before = fetch(USER)
    assert before["history"]
    drop_stores(world)
    (world.features / "registry.db").write_bytes(b"no registry")
    (world.features / "online.db").write_bytes(b"no store")
    end_run(world)
    for _ in range(3):
        assert fetch(USER) == before
    assert sum("cannot be opened" in message for message in caplog.messages) == 1
    drop_stores(world)
    rewrite_histories(world, ITEM_IDS[5:8])
    fill_store(world, repo)
    end_run(world)
    assert fetch(USER)["history"] == ITEM_IDS[5:8] != before["history"]
