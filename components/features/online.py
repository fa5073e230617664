"""The newest rows of the views -> a new online store, SQLite or Redis, written at once in the layout of Feast's own.

A store, a view or a type that is not known here is left to Feast's materialization, and a line says so.

Some of this uses private parts of Feast. tests/components/features/test_feast_private.py names and checks them.
"""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from itertools import chain, islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from colorama import colorama_text

from components.features import sqlite_store
from components.features.layout import KINDS, batches, timestamps
from components.features.store import feature_store, newest_rows
from components.features.views import ONLINE_VIEWS

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView

# One command of Redis writes many rows: ARGV has, for each, a count, the key, and so many fields and values.
WRITE_ROWS = """
local at = 1
while at <= #ARGV do
    local last = at + tonumber(ARGV[at])
    redis.call('HSET', unpack(ARGV, at + 1, last))
    at = last + 1
end
"""
ROWS_A_COMMAND = 500
KEYS_A_COMMAND = 10_000


def write(store: FeatureStore, sources: Path, until: datetime, folder: Path, like: Path | None = None) -> int | None:
    """Write what is known by then into the store's online store, whose views must be empty.

    folder  the store folder
    like    on SQLite, another store of the same features: the new one begins as a copy, and only what differs is
            written

    Returns how many rows were written to a copy; None where all were.
    """
    views = [store.get_feature_view(name) for name in ONLINE_VIEWS]
    rows = {view.name: newest_rows(sources, view.name, view.join_keys[0], until) for view in views}
    left = []
    for view in views:
        if reason := unknown(store, view, rows[view.name]):
            print(f"{view.name}: {reason}, so Feast itself writes it", flush=True)
            left.append(view.name)
    known = [view for view in views if view.name not in left]
    written = None
    if store.config.online_store.type == "sqlite":
        with closing(sqlite3.connect(store.config.online_store.path, isolation_level=None)) as db:
            written = sqlite_store.write(db, store.project, known, rows, folder, None if left else like)
    else:
        for view in known:
            write_redis(store, view, rows.pop(view.name))
    if left:
        with colorama_text():  # Feast colours what it prints; on no terminal, the codes are dropped
            store.materialize(datetime(1990, 1, 1, tzinfo=UTC), until, feature_views=left)
    return written


def unknown(store: FeatureStore, view: FeatureView, rows: pa.Table) -> str | None:
    """Why the view's rows cannot be written here; None where they can."""
    from feast import FeatureView, FileSource
    from feast.types import Int64

    config = store.config
    online = config.online_store.model_dump()
    plain: dict[str, dict[str, Any]] = {
        "sqlite": {"vector_enabled": False, "text_search_enabled": False, "enable_openai_compatible_store": False},
        "redis": {"redis_type": "redis", "client": "redis", "key_ttl_seconds": None},
    }
    if online["type"] not in plain:
        return f"the online store is {online['type']}"
    for name, value in plain[online["type"]].items():
        if online.get(name, value) != value:
            return f"the online store has {name}: {online[name]}"
    if config.registry.enable_online_feature_view_versioning or config.entity_key_serialization_version != 3:
        return "the keys have another layout"
    source = view.batch_source
    if type(view) is not FeatureView or type(source) is not FileSource:
        return f"it is a {type(view).__name__} over a {type(source).__name__}"
    if source.field_mapping or source.created_timestamp_column or source.timestamp_field != "event_timestamp":
        return "its source renames columns, or has other times"
    if [column.dtype for column in view.entity_columns] != [Int64]:
        return "its entity is not one integer"
    for field in view.features:
        kind = KINDS.get(str(field.dtype))
        if kind is None or field.vector_index or rows[field.name].type != kind.type:
            return f"{field.name} is {field.dtype}, as {rows[field.name].type} in the source"
        if pa.types.is_list(kind.type) and rows[field.name].combine_chunks().flatten().null_count:
            return f"a list of {field.name} has an empty place"
    return None


def write_redis(store: FeatureStore, view: FeatureView, rows: pa.Table) -> None:
    """A hash for each entity, with a field for each feature and one for the time."""
    from feast.infra.online_stores.helpers import _mmh3

    online: Any = store._get_provider().online_store
    send = online._get_client(store.config.online_store).register_script(WRITE_ROWS)
    for batch in batches(view, rows, store.project):
        columns: list[Any] = [repeat(2 * len(batch.values) + 3), batch.keys]
        columns += [repeat(f"_ts:{view.name}"), timestamps(batch.microseconds)]
        for feature, values in batch.values.items():
            columns += [repeat(_mmh3(f"{view.name}:{feature}")), values]
        arguments = list(chain.from_iterable(zip(*columns, strict=False)))
        step = ROWS_A_COMMAND * len(columns)
        for start in range(0, len(arguments), step):
            send(args=arguments[start : start + step])


def drop(store: Path) -> None:
    """Remove a store folder that serves no more. Its rows in a server go first: after a kill, the folder still names
    them."""
    if (store / "feature_store.yaml").is_file() and (store / "registry.db").is_file():
        with feature_store(store) as opened:
            forget(opened)
    shutil.rmtree(store)


def forget(store: FeatureStore) -> None:
    """Remove a store's rows from the server that has them; SQLite's go with their file."""
    kind = store.config.online_store.type
    if kind == "redis":
        forget_redis(store)
    elif kind != "sqlite":
        store.teardown()


def forget_redis(store: FeatureStore) -> None:
    """Feast's own removal keeps every key of the store in memory."""
    from feast.infra.online_stores.helpers import _redis_key_prefix

    online: Any = store._get_provider().online_store
    client = online._get_client(store.config.online_store)
    project = store.project.encode()
    for prefix in {_redis_key_prefix(store.get_feature_view(name).join_keys) for name in ONLINE_VIEWS}:
        # after the prefix come the id's type and length, 4 bytes each, and the id
        found = client.scan_iter(prefix + b"*" + project, count=KEYS_A_COMMAND)
        own = (key for key in found if len(key) == len(prefix) + 16 + len(project))
        while keys := list(islice(own, KEYS_A_COMMAND)):
            client.unlink(*keys)
