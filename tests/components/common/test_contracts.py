"""The contract: what conforms comes out in one form, and what does not is refused by place, column and remedy."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.common.contracts import (
    EVENTS,
    ITEMS,
    OPTIONAL,
    ORACLE,
    TIMESTAMP,
    USERS,
    VECTORS,
    Canonical,
    attributes,
    conform,
    read_parquet,
    vector_matrix,
    write_days,
)
from tests.components.small_world import with_column

NOON = datetime(2024, 3, 1, 12, tzinfo=UTC)


def events(rows: int = 3) -> pa.Table:
    return pa.table(
        {
            "user_id": pa.array(range(rows), pa.int64()),
            "item_id": pa.array(range(rows), pa.int64()),
            "timestamp": pa.array([NOON + timedelta(seconds=i) for i in range(rows)], TIMESTAMP),
            "label": pa.array([i % 2 for i in range(rows)], pa.int8()),
        }
    )


def test_other_widths_and_orders_come_out_as_the_contract() -> None:
    table = events()
    other = pa.table(
        {
            "device": pa.array(["tv", None, "tv"]).dictionary_encode(),
            ORACLE: pa.array([0.5, 0.25, 0.125], pa.float64()),
            "label": table["label"].cast(pa.int64()),
            "item_id": table["item_id"].cast(pa.int32()),
            "timestamp": table["timestamp"].cast(pa.timestamp("ms", tz="Europe/Oslo")),
            "user_id": table["user_id"].cast(pa.uint16()),
        }
    )
    found = conform(other, EVENTS, "here", optional={ORACLE: pa.float32()})
    assert found.schema.names == [*EVENTS.names, "device", ORACLE]
    assert found.select(EVENTS.names).equals(table)
    assert found["device"].type == pa.string() and found["device"].to_pylist() == ["tv", None, "tv"]
    assert found[ORACLE].type == pa.float32()
    assert attributes(found, EVENTS) == ["device"]  # the oracle is never a feature


def test_lists_of_other_kinds_come_out_as_the_contract() -> None:
    flat = pa.array([1.0, 2.0, 3.0, 4.0], pa.float64())
    fixed = pa.table({"item_id": [1, 2], "vector": pa.FixedSizeListArray.from_arrays(flat, 2)})
    found = conform(fixed, VECTORS, "here", extra_columns=False)
    assert found.schema.equals(VECTORS)
    assert found["vector"].to_pylist() == [[1.0, 2.0], [3.0, 4.0]]
    items = pa.table(
        {
            "item_id": [1],
            "created_at": pa.array([NOON], TIMESTAMP),
            "title": pa.array(["a"], pa.large_string()),
            "tags": pa.array([["x"]], pa.large_list(pa.large_string())),
            "text": pa.nulls(1),
        }
    )
    assert conform(items, ITEMS, "here").schema.equals(ITEMS)


@pytest.mark.parametrize("column", EVENTS.names)
def test_a_missing_column(column: str) -> None:
    told = rf"here: column '{column}' \(.*\) is missing; it has \[.*\]\. Add the column, or map one to this name"
    with pytest.raises(ValueError, match=told):
        conform(events().drop_columns(column), EVENTS, "here")


@pytest.mark.parametrize(
    ("column", "values", "kind", "told"),
    [
        ("user_id", ["a", "b", "c"], pa.string(), "column 'user_id' is string; it must be int64. Convert it"),
        ("item_id", [1.0, 2.0, 3.0], pa.float64(), "column 'item_id' is double; it must be int64"),
        ("label", [True, False, True], pa.bool_(), "column 'label' is bool; it must be int8"),
        ("label", [0.0, 1.0, 0.0], pa.float32(), "column 'label' is float; it must be int8"),
        ("label", [0, 1, 300], pa.int64(), "column 'label' does not fit int8: Integer value 300"),
        ("user_id", [0, 1, 2**63], pa.uint64(), "column 'user_id' does not fit int64: Integer value 9223372036854775"),
        ("timestamp", [1, 2, 3], pa.int64(), "column 'timestamp' is int64; it must be timestamp[us, tz=UTC]"),
        ("timestamp", [NOON.replace(tzinfo=None)] * 3, pa.timestamp("us"), "has times without a zone (timestamp[us])"),
        ("timestamp", [1, 2, 3], pa.timestamp("ns", tz="UTC"), "does not fit timestamp[us, tz=UTC]"),
        ("timestamp", [0, None, 253_402_300_800], pa.timestamp("s", tz="UTC"), "'timestamp' has times beyond the year"),
    ],
)
def test_a_column_of_another_kind(column: str, values: list, kind: pa.DataType, told: str) -> None:
    with pytest.raises(ValueError, match="here: column") as caught:
        conform(with_column(events(), column, values, kind), EVENTS, "here")
    assert told in str(caught.value)


def test_extra_columns_are_categories() -> None:
    with pytest.raises(ValueError, match="here: extra column 'age' is int64; it must be string"):
        conform(pa.table({"user_id": [1], "age": [30]}), USERS, "here")
    vectors = pa.table({"item_id": [1], "vector": [[1.0]], "norm": ["a"]})
    with pytest.raises(ValueError, match=r"here: unknown column 'norm'; only .* belong here"):
        conform(vectors, VECTORS, "here", extra_columns=False)


def test_optional_columns_are_no_features_of_events_alone() -> None:
    table = events()
    for name, kind in OPTIONAL.items():
        table = table.append_column(name, pa.nulls(len(table), kind))
    found = conform(table, EVENTS, "here", optional=OPTIONAL)
    assert {name: found.schema.field(name).type for name in OPTIONAL} == OPTIONAL
    assert attributes(found, EVENTS) == []
    with pytest.raises(ValueError, match="here: column 'split' is int64; it must be string"):
        conform(with_column(table, "split", [1, 2, 3], pa.int64()), EVENTS, "here", optional=OPTIONAL)


def test_histories_are_there_or_derived(tmp_path: Path) -> None:
    assert Canonical(tmp_path).histories() is None
    pq.write_table(pa.table({"item_id": pa.array([], pa.int64())}), tmp_path / "histories.parquet")
    histories = Canonical(tmp_path).histories()
    assert histories is not None and len(histories) == 0  # given, and empty


def test_a_file_that_is_no_whole_parquet(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    with pytest.raises(ValueError, match=r"x\.parquet is not there; run `dvc repro ingest`, or check the path"):
        read_parquet(file)
    pq.write_table(events(5000), file)
    assert len(read_parquet(file)) == 5000
    whole = file.read_bytes()
    for cut in (b"", b"id,label\n1,0\n", whole[: len(whole) // 2], whole[:-4]):
        file.write_bytes(cut)
        with pytest.raises(ValueError, match=r"x\.parquet is no whole parquet file: .*\. Write it again"):
            read_parquet(file)


def test_days_keep_every_row_and_its_order(tmp_path: Path) -> None:
    """Over a thousand days, each spread over the whole table: a writer that holds a file open a day loses some."""
    rng = np.random.default_rng(0)
    rows, days = 20_000, 1200
    second = rng.integers(-100, days - 100, rows) * 86_400 + rng.integers(0, 86_400, rows)  # also before 1970
    table = pa.table(
        {
            "user_id": np.arange(rows),
            "item_id": np.zeros(rows, np.int64),
            "timestamp": pa.array(second * 1_000_000).cast(TIMESTAMP),
            "label": np.zeros(rows, np.int8),
            "device": pa.array(["a", None] * (rows // 2)),
        }
    )
    named = write_days(table, tmp_path / "events")
    data = Canonical(tmp_path)
    day = second // 86_400
    assert named == data.days() == [str(np.datetime64(int(d), "D")) for d in np.unique(day)]
    assert data.events().equals(table.take(np.argsort(day, kind="stable")).combine_chunks())
    assert len(list(tmp_path.rglob("*.parquet"))) == len(named)


def test_no_day_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="events holds no day; run `dvc repro ingest`"):
        Canonical(tmp_path).events()


def test_vector_matrix() -> None:
    def lists(values: list) -> pa.ChunkedArray:
        return pa.chunked_array([pa.array(values, pa.list_(pa.float32()))])

    fixed = vector_matrix(lists([[1, 2], None, [3, 4]]), "here")
    assert fixed.type == pa.list_(pa.float32(), 2)
    assert fixed.to_pylist() == [[1, 2], None, [3, 4]]
    with pytest.raises(ValueError, match=r"here: vectors of several lengths: .*2.*3.*; one modality has one length"):
        vector_matrix(lists([[1, 2], [1, 2, 3]]), "here")
    for nothing in ([], [None], [[]]):
        with pytest.raises(ValueError, match="here: no vector in it; leave the modality's file out instead"):
            vector_matrix(lists(nothing), "here")
