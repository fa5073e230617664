"""The feature repo on Spark, a session on this machine: every value is that of the default store."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from feast import FeatureStore
from feast.repo_operations import get_repo_files

from components.common.contracts import Canonical, read_parquet
from components.common.dataset import Dataset
from components.features import dataset, features, publish, views
from components.features.dataset import DatasetConfig, point_in_time
from components.features.store import feature_store, scratch_store
from components.operations import replay
from tests.components.small_world import FEATURES, PROJECT, PUBLISH, SPLIT, Folders, hand_tables, prepare, with_arrivals
from tests.parts import need

pytestmark = pytest.mark.slow
STORES = ("default", "spark")
CONFIG = DatasetConfig(history_length=4, min_count=3, max_tags=3)


QUICK = """\
    spark.sql.shuffle.partitions: "2"
    spark.driver.extraJavaOptions: -XX:TieredStopAtLevel=1
"""  # a session of seconds is over before the JVM's better compiler has paid
ADVERSE = """\
    spark.sql.session.timeZone: Asia/Tokyo
    spark.sql.execution.arrow.maxRecordsPerBatch: "50"
"""


def use_spark(repo: Path) -> None:
    """The lines that feature_store.yaml shows, in place of the default's, and some of this test's own."""
    file = repo / "feature_store.yaml"
    text = file.read_text()
    start, shown = text.index("offline_store:\n  type: asof"), text.index("# offline_store:\n")
    end = text.index("online_store:\n  type: sqlite")
    block = "".join(line.removeprefix("# ") for line in text[shown:end].splitlines(keepends=True))
    assert "spark.master: local[*]" in block
    file.write_text(text[:start] + block.replace("local[*]", "local[2]") + QUICK + ADVERSE + text[end:])


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Folders]]:
    """One world through `features` and `dataset`, on each store."""
    need("spark")
    root = tmp_path_factory.mktemp("spark")
    made = {"default": prepare(with_arrivals(hand_tables()), root / "default")}
    made["spark"] = Folders(root / "spark")
    shutil.copytree(made["default"].root, made["spark"].root)
    use_spark(made["spark"].repo)
    for world in made.values():
        features.run(FEATURES, world.canonical, world.report, world.embedding, world.features)
        dataset.run(CONFIG, SPLIT, world.canonical, world.features, world.repo, world.dataset)
    yield made
    from pyspark.sql import SparkSession

    session = SparkSession.getActiveSession()
    assert session is not None
    session.stop()


def test_the_dataset_is_the_same_to_the_byte(worlds: dict[str, Folders]) -> None:
    ours, sparks = (Dataset.open(worlds[name].dataset) for name in STORES)
    assert ours.facts == sparks.facts
    assert ours.facts["data_sha256"] and ours.facts["schema_hash"]
    assert ours.catalog.vector_IE is not None and ours.catalog.vector_IE.any()


def test_the_joined_rows_have_the_same_types_and_values(worlds: dict[str, Folders]) -> None:
    """Where a feature is missing too: pandas would make floats of its integers, and take the zone from times."""
    events = Canonical(worlds["default"].canonical).events().select(["user_id", "item_id", "timestamp"])
    rows = events.rename_columns(["user_id", "item_id", "event_timestamp"])
    found = []
    for name in STORES:
        with scratch_store(worlds[name].repo, worlds[name].features) as store:
            kind = type(store._get_provider().offline_store).__name__
            assert kind == {"default": "AsofOfflineStore", "spark": "SparkFilesOfflineStore"}[name]
            table = point_in_time(store, "training", rows)
        found.append(table.select(sorted(table.column_names)))
    ours, sparks = found
    assert ours.schema.field("views").type == pa.int64() and 0 < ours["views"].null_count < len(ours)
    assert sparks.schema.remove_metadata() == ours.schema.remove_metadata()
    assert sparks.equals(ours)


def test_two_candidates_of_one_user_at_one_time_are_two_rows(worlds: dict[str, Folders]) -> None:
    events = Canonical(worlds["spark"].canonical).events()
    shown = events.slice(len(events) - 1).select(["user_id", "item_id", "timestamp"])
    rows = pa.concat_tables([shown, shown, shown]).rename_columns(["user_id", "item_id", "event_timestamp"])
    items = events["item_id"].unique().to_pylist()[:2]
    rows = rows.set_column(1, "item_id", pa.array([*items, items[0]]))  # and one of them twice
    with scratch_store(worlds["spark"].repo, worlds["spark"].features) as store:
        joined = point_in_time(store, "training", rows).to_pylist()
    assert [row["item_id"] for row in joined] == [*items, items[0]]
    assert joined[0] == joined[2] != joined[1]
    assert joined[0]["clicks_end"] == joined[1]["clicks_end"] is not None


def served(store: FeatureStore, world: Folders) -> dict[str, Any]:
    """All that the online store holds, with its times."""
    found: dict[str, Any] = {}
    for name in views.ONLINE_VIEWS:
        view = store.get_feature_view(name)
        keys = read_parquet(world.features / "sources" / f"{name}.parquet")[view.join_keys[0]].unique().to_pylist()
        found[name] = store.get_online_features(
            features=[f"{name}:{feature.name}" for feature in view.features],
            entity_rows=[{view.join_keys[0]: key} for key in sorted(keys)],
        ).to_dict(include_event_timestamps=True)
    return found


def test_the_online_store_serves_the_same_values_and_times(worlds: dict[str, Folders]) -> None:
    found = []
    for world in worlds.values():
        publish.fill(PUBLISH, world.features, world.repo, world.root / "store")
        with feature_store(world.root / "store") as store:
            found.append(served(store, world))
    ours, sparks = found
    assert list(ours) == list(views.ONLINE_VIEWS)
    assert any(ours["user_history"]["history"]) and all(ours["item_popularity"]["views__ts"])
    assert sparks == ours


def test_replay_finds_no_mismatch(worlds: dict[str, Folders]) -> None:
    """It reads a second repo in the one JVM: a source's path is the repo's that names it."""
    world = worlds["spark"]
    assert replay.run(FEATURES, world.canonical, world.features, world.repo, rows=2, seed=5) == {}


def test_a_server_needs_no_java(worlds: dict[str, Folders], tmp_path: Path) -> None:
    code = """
from bento.store import feast_reader
fetch = feast_reader(".")
assert fetch is not None and fetch(7000)["region"] == "north"
"""
    environment = {name: value for name, value in os.environ.items() if name != "JAVA_HOME"}
    environment |= {"PATH": str(tmp_path), "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=worlds["spark"].root / "store", env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_without_the_setting_nothing_of_spark_is_imported() -> None:
    """Feast imports every file of a repo that .feastignore does not name."""
    repo = PROJECT / "feature_repo"
    assert [file.name for file in get_repo_files(repo)] == ["asof.py", "definitions.py"]
