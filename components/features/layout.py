"""A view's rows -> the bytes that Feast's online stores hold: keys, values and times, a column at once.

Feast makes several Python objects of each value, which takes minutes for a million users. What comes out is what Feast
would write: tests compare both to the byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    from feast import FeatureView

BATCH = 50_000  # entities in memory as Python objects
LENGTH_DELIMITED, VARINT = 2, 0  # wire types of protobuf
PACKED = b"\x0a"  # field 1 of Feast's Int64List and FloatList


class Rows(NamedTuple):
    """A batch of entities in the order of their keys; lists of the same length, `values` and `texts` by feature.

    microseconds  since 1970, of the rows' event_timestamp
    """

    keys: list[bytes]
    values: dict[str, list[bytes]]
    texts: dict[str, list[Any]]
    microseconds: np.ndarray


def batches(view: FeatureView, rows: pa.Table, project: str = "") -> Iterator[Rows]:
    """The rows as the online store's bytes, in the order of their keys. `project` is the end of a Redis key."""
    (key,) = view.join_keys
    names = sorted(feature.name for feature in view.features)
    kinds = {feature.name: KINDS[str(feature.dtype)] for feature in view.features}
    ids = rows[key].to_numpy().astype("<i8")
    rows = rows.take(pa.array(np.argsort(ids.view(">u8"))))  # as the keys' bytes are ordered
    for batch in rows.to_batches(max_chunksize=BATCH) if rows.num_rows else ():
        yield Rows(
            entity_keys(key, batch[key].to_numpy(), project),
            {name: kinds[name].values(batch[name]) for name in names},
            {name: kinds[name].texts(batch[name]) for name in names},
            batch["event_timestamp"].cast(pa.int64()).to_numpy(),
        )


def entity_keys(name: str, ids: np.ndarray, project: str = "") -> list[bytes]:
    """Feast's key of an entity ends in the eight bytes of its id; in Redis, the project follows."""
    from feast.infra.key_encoding_utils import serialize_entity_key
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

    like = serialize_entity_key(EntityKey(join_keys=[name], entity_values=[Value(int64_val=0)]), 3)
    before, after, packed = like[:-8], project.encode(), ids.astype("<i8").tobytes()
    return [before + packed[at : at + 8] + after for at in range(0, len(packed), 8)]


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


def timestamps(microseconds: np.ndarray) -> list[bytes]:
    """Protobuf's Timestamp: field 1 has seconds, field 2 nanoseconds where they are not zero."""
    seconds, first = varints(microseconds // 1_000_000)
    nanos, second = varints(microseconds % 1_000_000 * 1000)
    parts = zip(pairwise(first.tolist()), pairwise(second.tolist()), (microseconds % 1_000_000).tolist(), strict=True)
    return [b"\x08" + seconds[a:b] + (b"\x10" + nanos[c:d] if rest else b"") for (a, b), (c, d), rest in parts]
