"""publish: a store is whole or not there, serves what was counted by hand, and a difference is found."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from feast import FeatureStore
from feast.data_source import PushMode

from components.__main__ import main
from components.common.artifacts import read_json, write_json
from components.common.contracts import Canonical
from components.common.live import current
from components.features import clicks, features, publish
from components.features.publish import PublishConfig
from components.features.store import check_online, feature_store
from components.features.views import ONLINE_VIEWS
from tests.components.features.test_online import REDIS, held, use
from tests.components.small_world import (
    DAY,
    DAYS,
    FEATURES,
    PUBLISH,
    START,
    Folders,
    hand_tables,
    known_clicks,
    known_counts,
    plain_rows,
    prepare,
    with_column,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    folders = prepare(hand_tables(), tmp_path_factory.mktemp("publish"))
    features.run(FEATURES, folders.canonical, folders.report, folders.embedding, folders.features)
    return folders


@pytest.fixture(scope="module")
def store(made: Folders) -> Path:
    publish.fill(PUBLISH, made.features, made.repo, made.root / "store")
    return made.root / "store"


def ask(store: Path, view: str, key: str, ids: list[int]) -> dict[str, list[Any]]:
    """Feature -> values, by Feast as a server opens it."""
    with feature_store(store) as opened:
        names = [f"{view}:{feature.name}" for feature in opened.get_feature_view(view).features]
        found = opened.get_online_features(names, [{key: one} for one in ids]).to_dict()
    return {name: values for name, values in found.items() if name != key}


def test_a_store_serves_the_values_counted_by_hand(made: Folders, store: Path) -> None:
    rows, raw = plain_rows(Canonical(made.canonical).events()), hand_tables()
    users, items = (table[f"{name}_id"].to_pylist() for name, table in (("user", raw.users), ("item", raw.items)))
    lag, forever = FEATURES.availability_lag_seconds, 10**18
    histories = [known_clicks(rows, user, forever, lag)[-FEATURES.history_length :] or None for user in users]
    assert ask(store, "user_history", "user_id", [*users, 1]) == {"history": [*histories, None]}
    regions = {"region": [*raw.users["region"].to_pylist(), None]}
    assert ask(store, "user_profile", "user_id", [*users, 1]) == regions
    after_the_last_day = (START + DAYS * DAY + lag) * 1_000_000
    counts = [known_counts(rows, i, after_the_last_day, lag, FEATURES.popularity_days) for i in items]
    served = ask(store, "item_popularity", "item_id", items)
    assert list(zip(served["views"], served["clicks"], strict=True)) == [one or (None, None) for one in counts]
    table = pq.read_table(made.embedding / "item_embedding.parquet")
    wanted = dict(zip(table["item_id"].to_pylist(), table["embedding"].to_pylist(), strict=True))
    assert ask(store, "item_embedding", "item_id", [*items, 1]) == {"embedding": [wanted.get(i) for i in [*items, 1]]}


def test_the_receipt_says_what_is_in_the_store(made: Folders, store: Path) -> None:
    receipt, of_features = (read_json(folder / "receipt.json", "publish") for folder in (store, made.features))
    assert receipt | of_features == receipt
    assert receipt["project"] == "clickloop"
    assert receipt["features"] == {
        "user_profile": ["region"], "user_history": ["history"], "item_popularity": ["views", "clicks"],
        "item_embedding": ["embedding"],
    }  # fmt: skip
    entities = [
        len(set(pq.read_table(made.features / "sources" / f"{view}.parquet")[0].to_pylist())) for view in ONLINE_VIEWS
    ]
    assert receipt["values_compared"] == sum(entities) + entities[2]  # two values of an item's popularity
    assert receipt["rows_written"] is None
    assert sorted(file.name for file in store.iterdir()) == [
        "click_log.parquet", "feature_store.yaml", "online.db", "receipt.json", "registry.db", "rows"
    ]  # fmt: skip
    assert (store / "click_log.parquet").read_bytes() == (made.features / "click_log.parquet").read_bytes()


def test_a_store_needs_no_other_folder_and_may_be_moved(made: Folders, store: Path, tmp_path: Path) -> None:
    user = Canonical(made.canonical).users()["user_id"].to_pylist()
    before = ask(store, "user_profile", "user_id", user)
    shutil.copytree(store, tmp_path / "moved")
    (tmp_path / "online").symlink_to("moved")
    code = f"""
import sys
sys.modules["asof"] = None  # importing it would be an error
from feast import FeatureStore
store = FeatureStore(repo_path={str(tmp_path / "online")!r})
print(store.get_online_features(["user_profile:region"], [{{"user_id": one}} for one in {user}]).to_dict()["region"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(before["region"])


def test_a_store_of_some_users(made: Folders, tmp_path: Path) -> None:
    users = Canonical(made.canonical).users()["user_id"].to_pylist()
    publish.fill(PUBLISH, made.features, made.repo, tmp_path / "store", users=[*users[:2], 1])
    served = ask(tmp_path / "store", "user_history", "user_id", users)["history"]
    assert None not in served[:2] and set(map(str, served[2:])) == {"None"}
    assert set(ask(tmp_path / "store", "item_popularity", "item_id", [900_001])["views"]) == {None}


def test_sources_anywhere_are_read(made: Folders, tmp_path: Path) -> None:
    """The folder that is named counts, and not the one beside the Feast repo: a tag's features lie in a scratch one."""
    shutil.copytree(made.features, tmp_path / "elsewhere")
    file = tmp_path / "elsewhere" / "sources" / "user_profile.parquet"
    table = pq.read_table(file)
    pq.write_table(with_column(table, "region", ["west"] * len(table)), file)
    publish.fill(PUBLISH, tmp_path / "elsewhere", made.repo, tmp_path / "store")
    user = table["user_id"].to_pylist()[0]
    assert ask(tmp_path / "store", "user_profile", "user_id", [user]) == {"region": ["west"]}
    file.unlink()
    told = r"source user_profile is read from .*elsewhere/sources/user_profile.parquet, which is not there"
    with pytest.raises(ValueError, match=told):
        publish.fill(PUBLISH, tmp_path / "elsewhere", made.repo, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("view", "feature", "spoil"),
    [
        ("item_popularity", "views", "update"),
        ("user_history", "history", "update"),
        ("item_embedding", "embedding", "update"),
        ("user_profile", "region", "delete"),
    ],
)
def test_a_difference_in_the_online_store_is_found(
    view: str, feature: str, spoil: str, made: Folders, store: Path, tmp_path: Path
) -> None:
    from feast.protos.feast.types.Value_pb2 import Value

    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    receipt = read_json(store / "receipt.json", "publish")
    sample = (made.features / "sources", PUBLISH.online_sample, datetime.fromisoformat(receipt["known_until"]))
    with feature_store(copy) as opened:
        assert check_online(opened, *sample) == receipt["values_compared"]
    with closing(sqlite3.connect(copy / "online.db")) as db, db:
        where = f"clickloop_{view} where feature_name = '{feature}'"
        old = [Value.FromString(v) for (v,) in db.execute(f"select value from {where}")]
        if spoil == "delete":
            changed = db.execute(f"delete from {where}").rowcount
        else:
            new = Value.FromString(old[0].SerializeToString())
            match new.WhichOneof("val"):
                case "int64_val":
                    new.int64_val += 1
                case "int64_list_val":
                    new.int64_list_val.val.reverse()
                    new.int64_list_val.val.append(1)
                case "float_list_val":
                    new.float_list_val.val[0] = np.nextafter(np.float32(new.float_list_val.val[0]), np.float32(9))
            changed = db.execute(
                f"update clickloop_{view} set value = ? where feature_name = ? and value = ?",
                (new.SerializeToString(), feature, old[0].SerializeToString()),
            ).rowcount
        assert changed
    told = rf"online store: {view}:{feature} of \w+_id \d+ is .*, offline .*; nothing was switched"
    with feature_store(copy) as opened, pytest.raises(ValueError, match=told):
        check_online(opened, *sample)


def test_no_repo_at_all(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"feature_store\.yaml is not there; name the Feast repo's folder"),
        feature_store(tmp_path),
    ):
        pass


@pytest.mark.parametrize("key", ["online_sample", "keep"])
def test_a_config_takes_positive_numbers(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} is 0; it must be at least 1"):
        PublishConfig(**{"online_sample": 1, "keep": 1, key: 0})


# ---- what serves ------------------------------------------------------------------------------------------------


@pytest.fixture(params=["sqlite", "redis"])
def world(request: pytest.FixtureRequest, made: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folders:
    shutil.copytree(made.root, tmp_path / "world")
    folders = Folders(tmp_path / "world")
    if request.param == "redis":
        monkeypatch.setenv("CLICKLOOP_REDIS", request.getfixturevalue("redis_server"))
        use(folders.repo, **REDIS)
    return folders


def later(folders: Folders, name: str, hours: int, change: Callable[[pa.Table], pa.Table]) -> Path:
    """What `features` writes some hours later: other histories."""
    new = folders.root / name
    shutil.copytree(folders.features, new)
    file = new / "sources" / "user_history.parquet"
    pq.write_table(change(pq.read_table(file)), file)
    receipt = read_json(new / "receipt.json", "features")
    receipt["until"] = (datetime.fromisoformat(receipt["until"]) + timedelta(hours=hours)).isoformat()
    write_json(new / "receipt.json", receipt)
    return new


def all_of(item: int) -> Callable[[pa.Table], pa.Table]:
    return lambda table: with_column(table, "history", [[item]] * len(table))


def one_more(table: pa.Table) -> pa.Table:
    """The first user leaves, the second clicks, and one is new."""
    history = table["history"].to_pylist()
    changed = with_column(table, "history", [history[0], [*history[1], 5], *history[2:]]).slice(1)
    new = pa.table({"user_id": [5], "history": [[1, 2]], "event_timestamp": table["event_timestamp"][:1]})
    return pa.concat_tables([changed, new.cast(table.schema)])


def test_what_differs_is_written_to_a_copy(world: Folders) -> None:
    """Also what a push has changed since: the journal, and not the copy, says which clicks the new store has."""
    live = world.root / "live"
    first = publish.publish(PUBLISH, world.features, world.repo, live, "first")
    assert first and first.store and first.store.parent == live / "stores"
    known = pq.read_table(world.features / "sources" / "user_history.parquet")["user_id"].to_pylist()
    pushed = [known[0], known[3], 6]
    now = datetime.now(UTC)
    rows = pd.DataFrame({"user_id": pushed, "history": [[9]] * 3, "event_timestamp": [now] * 3})
    with feature_store(first.store) as opened:
        opened.push("fresh_history", rows, to=PushMode.ONLINE)
    assert ask(first.store, "user_history", "user_id", pushed) == {"history": [[9]] * 3}
    new = later(world, "new", 1, one_more)
    second = publish.publish(PUBLISH, new, world.repo, live, "second")
    assert second and second.store and second.why == "second" and current(live) == second
    whole = world.root / "whole"
    publish.fill(PUBLISH, new, world.repo, whole)
    assert held(second.store) == held(whole)
    copied = (second.store / "online.db").exists()
    # the one who left, the one who clicked, the new one, and two who were pushed to
    assert read_json(second.store / "receipt.json", "publish")["rows_written"] == (5 if copied else None)
    assert ask(first.store, "user_history", "user_id", pushed) == {"history": [[9]] * 3}  # a reader may still have it


def test_another_definition_is_written_whole(made: Folders, tmp_path: Path) -> None:
    shutil.copytree(made.root, tmp_path / "world")
    world, live = Folders(tmp_path / "world"), tmp_path / "live"
    publish.publish(PUBLISH, world.features, world.repo, live, "first")
    file = world.repo / "definitions.py"
    file.write_text(file.read_text().replace("HISTORY_TTL = FOREVER", "HISTORY_TTL = timedelta(days=2)"))
    deployed = publish.publish(PUBLISH, world.features, world.repo, live, "second")  # the same data
    assert deployed and deployed.store
    assert read_json(deployed.store / "receipt.json", "publish")["rows_written"] is None


def test_the_same_data_or_older_ones_are_not_published(
    made: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made.root, tmp_path / "world")
    world, live = Folders(tmp_path / "world"), tmp_path / "live"
    new = later(world, "new", 1, one_more)
    deployed = publish.publish(PUBLISH, new, world.repo, live, "new")
    assert publish.publish(PUBLISH, new, world.repo, live, "again") is None
    assert "which serves, has the same data; nothing is switched" in capsys.readouterr().out
    assert publish.publish(PUBLISH, world.features, world.repo, live, "old") is None
    assert "which serves, are newer: until 2024-" in capsys.readouterr().out
    assert current(live) == deployed and len(list((live / "stores").iterdir())) == 1


def test_a_reader_never_sees_a_mixture(world: Folders) -> None:
    """It opens what serves again and again, while four publications come."""
    live = world.root / "live"
    versions = [later(world, f"v{n}", n, all_of(n)) for n in range(1, 5)]
    publish.publish(PUBLISH, versions[0], world.repo, live, "first")
    users = pq.read_table(versions[0] / "sources" / "user_history.parquet")["user_id"].to_pylist()
    seen: list[set[str]] = []
    ended = Event()

    def look() -> None:
        while not ended.is_set():
            store = FeatureStore(repo_path=str((live / "current" / "online").resolve()))
            found = store.get_online_features(["user_history:history"], [{"user_id": user} for user in users])
            seen.append(set(map(str, found.to_dict()["history"])))

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        for number, features_ in enumerate(versions[1:], 2):
            publish.publish(PUBLISH, features_, world.repo, live, f"{number}")
            before = len(seen)
            while len(seen) < before + 2 and not looking.done():
                time.sleep(0.01)
        ended.set()
        looking.result()
    whole = [{f"[{n}]"} for n in range(1, 5)]
    assert all(one in whole for one in seen) and seen[-1] == whole[-1] and seen[0] == whole[0]
    assert len(list((live / "stores").iterdir())) == PUBLISH.keep


def test_what_is_dropped_leaves_nothing(world: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a store that is not filled to its end; other stores of the same Redis stay."""
    kept, gone = world.root / "kept", world.root / "gone"
    for store in (kept, gone):
        publish.fill(PUBLISH, world.features, world.repo, store)
    before, receipt = held(kept), read_json(gone / "receipt.json", "publish")
    publish.drop(gone)
    assert not gone.exists() and held(kept) == before
    keys = stored_keys(kept)
    assert not [key for key in keys if key.endswith(receipt["project"].encode())] or receipt["project"] == "clickloop"
    monkeypatch.setattr(publish, "check_online", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        publish.fill(PUBLISH, world.features, world.repo, gone)
    assert not gone.exists() and stored_keys(kept) == keys and held(kept) == before


def stored_keys(store: Path) -> set[bytes]:
    """All keys of the store's Redis; none for SQLite."""
    with feature_store(store) as opened:
        online: Any = opened._get_provider().online_store
        if opened.config.online_store.type == "sqlite":
            return set()
        return set(online._get_client(opened.config.online_store).keys())


def test_a_click_of_the_journal_goes_to_the_new_store(world: Folders) -> None:
    live = world.root / "live"
    publish.publish(PUBLISH, world.features, world.repo, live, "first")
    user = pq.read_table(world.features / "sources" / "user_history.parquet")["user_id"].to_pylist()[2]
    until = datetime.fromisoformat(read_json(world.features / "receipt.json", "features")["log_until"])
    click = np.array([(user, 77, clicks.micros(until) + 1)], clicks.CLICK)
    clicks.Journal(live).append(click)
    deployed = publish.publish(PUBLISH, later(world, "new", 1, all_of(3)), world.repo, live, "second")
    assert deployed and deployed.store
    assert ask(deployed.store, "user_history", "user_id", [user]) == {"history": [[3, 77]]}


def test_the_command(made: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLICKLOOP_LIVE", str(tmp_path / "live"))
    params = tmp_path / "params.yaml"
    params.write_text(yaml.safe_dump({"publish": asdict(PUBLISH)}))
    paths = {"features": made.features, "repo": made.repo, "params": params}
    words = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
    assert main(["publish", *words]) == 0
    deployed = current(tmp_path / "live")
    assert deployed and deployed.store and deployed.release is None
