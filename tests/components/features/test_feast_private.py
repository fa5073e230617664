"""What the project uses of Feast that Feast does not document: a new release may change it without a word.

Each name has the parameters that our calls and overrides rely on. If one fails after an upgrade, read what changed in
Feast, correct the code that the message names, and then this table.
"""

from __future__ import annotations

import ast
import inspect
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.components.small_world import PROJECT

SPARK = "feast.infra.offline_stores.contrib.spark_offline_store.spark"
JOIN = ("config", "feature_views", "feature_refs", "entity_df", "registry", "project", "full_feature_names",
        "filter_by_created_timestamp")  # fmt: skip
RELIED_ON: dict[tuple[str, str], tuple[str, ...]] = {
    # components/features: the online store behind a provider, its connection to Redis, Redis's keys
    ("feast", "FeatureStore._get_provider"): ("self",),
    ("feast.infra.online_stores.redis", "RedisOnlineStore._get_client"): ("self", "online_store_config"),
    ("feast.infra.online_stores.helpers", "_mmh3"): ("key",),
    ("feast.infra.online_stores.helpers", "_redis_key_prefix"): ("entity_keys",),
    ("feast.infra.key_encoding_utils", "serialize_entity_key"): ("entity_key", "entity_key_serialization_version"),
    ("feast.repo_operations", "parse_repo"): ("repo_root",),
    # bento/store.py: the connection of a store that is not served any more is closed
    ("feast.infra.online_stores.sqlite", "SqliteOnlineStore._get_conn"): ("self", "config"),
    ("feast.repo_config", "load_repo_config"): ("repo_path", "fs_yaml_file"),
    # feature_repo/asof.py: reading files as Feast's DuckDB store does, and its retrieval job
    ("feast.infra.offline_stores.duckdb", "_read_data_source"): ("data_source", "repo_path"),
    ("feast.infra.offline_stores.duckdb", "_write_data_source"): (
        "table", "data_source", "repo_path", "mode", "allow_overwrite",
    ),
    ("feast.infra.offline_stores.duckdb", "DuckDBOfflineStore.get_historical_features"): JOIN,
    ("feast.infra.offline_stores.ibis", "IbisRetrievalJob.__init__"): (
        "self", "table", "on_demand_feature_views", "full_feature_names", "metadata", "data_source_writer",
        "staging_location", "staging_location_endpoint_override", "repo_path",
    ),
    ("feast.infra.offline_stores.offline_utils", "infer_event_timestamp_from_entity_df"): ("entity_schema",),
    ("feast.on_demand_feature_view", "OnDemandFeatureView.get_requested_odfvs"): (
        "feature_refs", "project", "registry",
    ),
    # feature_repo/spark.py
    (SPARK, "SparkOfflineStore.get_historical_features"): (*JOIN, "kwargs"),
    (SPARK, "SparkOfflineStore.pull_latest_from_table_or_query"): (
        "config", "data_source", "join_key_columns", "feature_name_columns", "timestamp_field",
        "created_timestamp_column", "start_date", "end_date",
    ),
    (SPARK, "SparkRetrievalJob._to_arrow_internal"): ("self", "timeout"),
    (SPARK, "SparkRetrievalJob.to_spark_df"): ("self",),
    (SPARK, "get_spark_session_or_start_new_with_repoconfig"): ("store_config",),
    ("feast", "FileSource.get_uri_for_file_path"): ("repo_path", "uri"),
}  # fmt: skip
NOT_FEASTS = {"_fields"}  # of named tuples


@pytest.mark.parametrize(("module", "name"), RELIED_ON, ids=[name for _, name in RELIED_ON])
def test_feast_has_what_the_project_relies_on(module: str, name: str) -> None:
    if module == SPARK:
        pytest.importorskip("pyspark")
    found: Any = import_module(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    release = f"feast {version('feast')}"
    assert found is not None, f"{release} has no {module}.{name}; the project uses it (see {Path(__file__).name})"
    parameters = tuple(inspect.signature(found).parameters)
    wanted = RELIED_ON[module, name]
    assert parameters == wanted, f"{module}.{name} of {release} takes {parameters}; the project relies on {wanted}"


def test_the_parts_of_a_view_and_of_a_job_that_the_join_reads() -> None:
    from feast import FeatureView, FileSource
    from feast.infra.offline_stores.offline_store import RetrievalMetadata

    wanted = ["features", "keys", "min_event_timestamp", "max_event_timestamp"]
    assert list(inspect.signature(RetrievalMetadata).parameters) == wanted
    source = FileSource(name="a", path="a.parquet", timestamp_field="at")
    view = FeatureView(name="v", source=source)
    assert view.batch_source is source and view.entity_columns == []
    projection = view.projection
    assert (projection.name, projection.name_alias, projection.join_key_map) == ("v", None, {})
    assert projection.name_to_use() == "v"


def test_the_layout_of_a_redis_key() -> None:
    """What names the entity, the id's type and length (4 bytes each), the id, and the project."""
    from feast.infra.online_stores.helpers import _redis_key, _redis_key_prefix
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

    key = _redis_key("clickloop", EntityKey(join_keys=["user_id"], entity_values=[Value(int64_val=7)]), 3)
    prefix = _redis_key_prefix(["user_id"])
    assert key.startswith(prefix) and key.endswith(b"clickloop")
    assert len(key) == len(prefix) + 16 + len("clickloop")
    assert int.from_bytes(key[len(prefix) + 8 :][:8], "little") == 7


def test_the_layout_of_sqlites_tables(tmp_path: Path) -> None:
    """`sqlite_store` makes the table anew from Feast's own words, as one tree by its primary key."""
    from feast import Entity, FeatureView, Field, FileSource, RepoConfig, ValueType
    from feast.infra.online_stores.sqlite import SqliteOnlineStore
    from feast.types import Int64

    store = {"type": "sqlite", "path": str(tmp_path / "online.db")}
    config = RepoConfig(
        project="p", provider="local", registry="r.db", online_store=store, entity_key_serialization_version=3
    )
    user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
    source = FileSource(name="a", path="a.parquet", timestamp_field="at")
    view = FeatureView(name="v", entities=[user], source=source, schema=[Field(name="n", dtype=Int64)])
    SqliteOnlineStore().update(config, [], [view], [], [user], partial=False)
    with closing(sqlite3.connect(tmp_path / "online.db")) as db:
        columns = db.execute("pragma table_info(p_v)").fetchall()
    names = ["entity_key", "feature_name", "value", "value_text", "vector_value", "event_ts", "created_ts"]
    assert [column[1] for column in columns] == names
    assert [column[1] for column in columns if column[5]] == ["entity_key", "feature_name"]  # the primary key


def private_names(tree: ast.Module) -> Iterator[str]:
    """The private names that a file imports from Feast, calls on what is not `self`, or overrides in a class."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "feast":
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls"):
            names = [node.attr]
        elif isinstance(node, ast.ClassDef) and node.bases:
            names = [one.name for one in node.body if isinstance(one, ast.FunctionDef)]
        yield from (name for name in names if name.startswith("_") and name != "_" and not name.endswith("__"))


def test_every_private_name_of_feast_in_the_code_is_in_the_table() -> None:
    known = {name.rpartition(".")[2] for _, name in RELIED_ON} | NOT_FEASTS
    for folder in ("bento", "components", "feature_repo"):
        for file in (PROJECT / folder).rglob("*.py"):
            text = file.read_text()
            if "from feast" in text or "import feast" in text:
                missing = set(private_names(ast.parse(text))) - known
                assert not missing, f"{file}: {sorted(missing)} are not in RELIED_ON; add them with their parameters"
