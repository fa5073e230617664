"""The newest rows of the views -> a new online store, in the layout of Feast's own stores for SQLite and Redis.

Feast's materialization makes several Python objects of each value, which takes minutes for a million users. Here a
column becomes bytes at once. What is written is what Feast would write: tests compare both to the byte, and read both
through Feast. A store, a view or a type that is not known here is left to Feast, and a line says so.

Some of this uses private parts of Feast. tests/components/features/test_feast_private.py names and checks them.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from itertools import chain, pairwise, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from colorama import colorama_text

from components.features.store import newest_rows
from components.features.views import ONLINE_VIEWS

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView

BATCH = 50_000  # entities in memory as Python objects
LENGTH_DELIMITED, VARINT = 2, 0  # wire types of protobuf

# One command of Redis sends many rows: ARGV is, for each, a count, the key and so many fields and values.
WRITE_ROWS = """
local at = 1
while at <= #ARGV do
    local last = at + tonumber(ARGV[at])
    redis.call('HSET', unpack(ARGV, at + 1, last))
    at = last + 1
end
"""
ROWS_A_COMMAND = 500


class Rows(NamedTuple):
    """A batch of entities in the order of their keys; lists of the same length, `values` and `texts` by feature.

    microseconds  since 1970, of the rows' event_timestamp
    """

    keys: list[bytes]
    values: dict[str, list[bytes]]
    texts: dict[str, list[Any]]
    microseconds: np.ndarray


def write(store: FeatureStore, sources: Path, until: datetime) -> None:
    """Write what is known by then into the store's online store, whose views must be empty."""
    left = []
    for name in ONLINE_VIEWS:
        view = store.get_feature_view(name)
        rows = newest_rows(sources, name, view.join_keys[0], until)
        if reason := unknown(store, view, rows):
            print(f"{name}: {reason}, so Feast itself writes it", flush=True)
            left.append(name)
        elif store.config.online_store.type == "sqlite":
            write_sqlite(store, view, rows)
        else:
            write_redis(store, view, rows)
    if left:
        with colorama_text():  # Feast colours what it prints; on no terminal, the codes are dropped
            store.materialize(datetime(1990, 1, 1, tzinfo=UTC), until, feature_views=left)


def unknown(store: FeatureStore, view: FeatureView, rows: pa.Table) -> str | None:
    """Why the view's rows cannot be written here; None where they can."""
    from feast import FeatureView, FileSource
    from feast.types import Int64

    config = store.config
    online = config.online_store.model_dump()
    plain = {
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


# ---- bytes ------------------------------------------------------------------------------------------------------


def batches(view: FeatureView, rows: pa.Table, project: str = "") -> Iterator[Rows]:
    """The rows as the online store's bytes, in the order of their keys. `project` is the end of a Redis key."""
    from feast.infra.key_encoding_utils import serialize_entity_key
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

    (key,) = view.join_keys
    like = serialize_entity_key(EntityKey(join_keys=[key], entity_values=[Value(int64_val=0)]), 3)
    before, after = like[:-8], project.encode()
    names = sorted(feature.name for feature in view.features)
    kinds = {feature.name: KINDS[str(feature.dtype)] for feature in view.features}
    ids = rows[key].to_numpy().astype("<i8")
    rows = rows.take(pa.array(np.argsort(ids.view(">u8"))))  # as the keys' bytes are ordered
    for batch in rows.to_batches(max_chunksize=BATCH) if rows.num_rows else ():
        packed = batch[key].to_numpy().astype("<i8").tobytes()
        yield Rows(
            [before + packed[at : at + 8] + after for at in range(0, len(packed), 8)],
            {name: kinds[name].values(batch[name]) for name in names},
            {name: kinds[name].texts(batch[name]) for name in names},
            batch["event_timestamp"].cast(pa.int64()).to_numpy(),
        )


def varints(values: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Integers of 64 bits as protobuf's varints, one after another, and where each begins (and the last ends)."""
    left = values.astype("<i8").view("<u8")
    length = np.ones(len(left), np.int64)
    for bits in range(7, 64, 7):
        length += left >= np.uint64(1) << np.uint64(bits)
    start = np.concatenate([[0], np.cumsum(length)])
    found = np.empty(start[-1], np.uint8)
    at, rest = start[:-1], left
    while len(at):
        more = rest >= 128
        found[at] = (rest & np.uint64(127)).astype(np.uint8) | (more.astype(np.uint8) << 7)
        at, rest = at[more] + 1, rest[more] >> np.uint64(7)
    return found.tobytes(), start


def varint(value: int) -> bytes:
    return varints(np.array([value]))[0]


def tag(field: str, wire: int) -> bytes:
    """What stands before a value of this field of Feast's Value."""
    from feast.protos.feast.types.Value_pb2 import Value

    return varint(Value.DESCRIPTOR.fields_by_name[field].number << 3 | wire)


def delimited(field: str, data: bytes, start: np.ndarray, valid: np.ndarray, inner: bytes = b"") -> list[bytes]:
    """Values of a field that has a length: data[start[i] : start[i + 1]], within a message's field where `inner` is the
    tag of that. A null is a Value without any field."""

    def head(size: int) -> bytes:
        if inner and size:
            within = inner + varint(size)
            return tag(field, LENGTH_DELIMITED) + varint(len(within) + size) + within
        return tag(field, LENGTH_DELIMITED) + varint(size)

    heads = {size: head(size) for size in np.unique(np.diff(start)).tolist()}
    cuts = zip(pairwise(start.tolist()), valid.tolist(), strict=True)
    return [heads[end - begin] + data[begin:end] if known else b"" for (begin, end), known in cuts]


def _valid(column: pa.Array) -> np.ndarray:
    return column.is_valid().to_numpy(zero_copy_only=False)


def integers(column: pa.Array) -> list[bytes]:
    data, start = varints(column.fill_null(0).to_numpy())
    mark = tag("int64_val", VARINT)
    cuts = zip(pairwise(start.tolist()), _valid(column).tolist(), strict=True)
    return [mark + data[begin:end] if known else b"" for (begin, end), known in cuts]


def strings(column: pa.Array) -> list[bytes]:
    start = np.concatenate([[0], np.cumsum(pc.binary_length(column).fill_null(0).to_numpy())])
    return delimited("string_val", "".join(column.fill_null("").to_pylist()).encode(), start, _valid(column))


def _offsets(column: pa.Array) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(pc.list_value_length(column).fill_null(0).to_numpy())]).astype(np.int64)


PACKED = b"\x0a"  # field 1 of Feast's Int64List and FloatList


def integer_lists(column: pa.Array) -> list[bytes]:
    data, start = varints(column.flatten().to_numpy())
    return delimited("int64_list_val", data, start[_offsets(column)], _valid(column), PACKED)


def float_lists(column: pa.Array) -> list[bytes]:
    data = column.flatten().to_numpy().astype("<f4").tobytes()
    return delimited("float_list_val", data, 4 * _offsets(column), _valid(column), PACKED)


class Kind(NamedTuple):
    """How a type of Feast's is written: the column's type, its values as bytes, and what SQLite's value_text has."""

    type: pa.DataType
    values: Callable[[pa.Array], list[bytes]]
    texts: Callable[[pa.Array], list[Any]]


def _no_text(column: pa.Array) -> list[None]:
    return [None] * len(column)


KINDS = {
    "Int64": Kind(pa.int64(), integers, lambda column: column.cast(pa.string()).to_pylist()),
    "String": Kind(pa.string(), strings, lambda column: column.to_pylist()),
    "Array(Int64)": Kind(pa.list_(pa.int64()), integer_lists, _no_text),
    "Array(Float32)": Kind(pa.list_(pa.float32()), float_lists, _no_text),
}


# ---- SQLite -----------------------------------------------------------------------------------------------------


def write_sqlite(store: FeatureStore, view: FeatureView, rows: pa.Table) -> None:
    """Into the table that `apply` has made. It is made anew as one tree, sorted by key: Feast's has three."""
    name = f"{store.project}_{view.name}"
    columns = "entity_key, feature_name, value, value_text, event_ts"
    insert = f'insert into "{name}" ({columns}) values (?, ?, ?, ?, ?)'  # noqa: S608 - our own names
    with closing(sqlite3.connect(store.config.online_store.path, isolation_level=None)) as db:
        for setting in ("journal_mode = off", "synchronous = off"):  # the folder is synced before it is named
            db.execute(f"pragma {setting}")
        (made,) = db.execute("select sql from sqlite_master where type = 'table' and name = ?", [name]).fetchone()
        db.execute(f'drop table "{name}"')
        db.execute(f"{made} without rowid")
        db.execute("begin")
        for batch in batches(view, rows):
            known = local_seconds(batch.microseconds).tolist()
            by_feature = (
                zip(batch.keys, repeat(feature), values, batch.texts[feature], known)
                for feature, values in batch.values.items()
            )
            db.executemany(insert, chain.from_iterable(zip(*by_feature, strict=True)))
        db.execute("commit")


def local_seconds(microseconds: np.ndarray) -> np.ndarray:
    """What Feast's SQLite store keeps of a time: the seconds of its UTC clock, taken as a clock of this machine's zone.
    It reads them back the same way."""
    quarter, place = np.unique(microseconds // 900_000_000, return_inverse=True)  # no zone changes within one
    offsets = [
        int(datetime.fromtimestamp(900 * q, UTC).replace(tzinfo=None).timestamp()) - 900 * q for q in quarter.tolist()
    ]
    return microseconds // 1_000_000 + np.array(offsets, np.int64)[place]


# ---- Redis ------------------------------------------------------------------------------------------------------


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


def timestamps(microseconds: np.ndarray) -> list[bytes]:
    """Protobuf's Timestamp: field 1 has seconds, field 2 nanoseconds where they are not zero."""
    seconds, first = varints(microseconds // 1_000_000)
    nanos, second = varints(microseconds % 1_000_000 * 1000)
    parts = zip(pairwise(first.tolist()), pairwise(second.tolist()), (microseconds % 1_000_000).tolist(), strict=True)
    return [b"\x08" + seconds[a:b] + (b"\x10" + nanos[c:d] if rest else b"") for (a, b), (c, d), rest in parts]
