"""publish: a store is whole or not there, serves what was counted by hand, and a difference is found."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from components.common.artifacts import read_json
from components.common.contracts import Canonical
from components.features import features, publish
from components.features.publish import PublishConfig
from components.features.store import check_online, feature_store
from components.features.views import ONLINE_VIEWS
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
    assert sorted(file.name for file in store.iterdir()) == [
        "click_log.parquet", "feature_store.yaml", "online.db", "receipt.json", "registry.db"
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
