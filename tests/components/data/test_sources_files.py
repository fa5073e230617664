"""files: a user's own tables, wherever they lie, come out as the mapping says; what is broken is told by file."""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from pyarrow import csv

from components.common.contracts import EVENTS as SCHEMA
from components.common.contracts import Canonical, attributes
from components.common.dataset import UNSEEN, Dataset
from components.common.splits import SplitConfig, split_rows
from components.data import ingest, validate
from components.data.sources import reading, values
from components.data.sources.files import FilesConfig, TableConfig
from components.features import dataset, embed, features
from components.features.dataset import DatasetConfig
from components.features.embed import EmbedConfig
from models.schema import bucket, trimmed
from tests.components.small_world import (
    FEATURES,
    NO_FILES,
    NO_TABLE,
    SPLIT,
    VALIDATE,
    Folders,
    ingest_config,
    learn,
    new_repo,
)

NOON = datetime(2024, 3, 1, 12, tzinfo=UTC)
EVENTS = replace(
    NO_TABLE,
    path="events/*",
    columns={"user_id": "uid", "item_id": "doc", "timestamp": "at", "label": "click"},
    categorical=["device"],
    numeric=["price"],
)


def table(rows: int = 6, first: int = 0) -> pa.Table:
    """A day's impressions as somebody writes them."""
    row = np.arange(first, first + rows)
    return pa.table(
        {
            "at": pa.array([NOON + timedelta(minutes=int(i)) for i in row], pa.timestamp("ms", tz="Europe/Oslo")),
            "uid": pa.array(7 + row % 3, pa.int32()),
            "doc": pa.array(50 + row % 4, pa.int64()),
            "click": row % 2 == 1,
            "device": pa.array(["tv", None, "phone"]).take(pa.array(row % 3)),
            "price": pa.array(row * 1.5),
            "unused": ["x"] * rows,
        }
    )


def as_csv(rows: pa.Table, separator: str = ",") -> bytes:
    at = rows.schema.get_field_index("at")
    if at >= 0:
        rows = rows.set_column(at, "at", pa.array([t.isoformat() for t in rows["at"].to_pylist()]))
    out = io.BytesIO()
    csv.write_csv(rows, out, csv.WriteOptions(delimiter=separator))
    return out.getvalue()


def write(root: str, files: dict[str, pa.Table | bytes]) -> str:
    for name, content in files.items():
        data = content
        if isinstance(content, pa.Table):
            out = io.BytesIO()
            pq.write_table(content, out)
            data = out.getvalue()
        with fsspec.open(f"{root}/{name}", "wb", auto_mkdir=True) as opened:
            opened.write(data)
    return root


@pytest.fixture
def ingested(tmp_path: Path) -> Any:
    """`ingested(files, mapping)`: the facts and the canonical data of files that lie in a folder."""

    def run(
        files: dict[str, pa.Table | bytes], mapping: FilesConfig, root: str = "", until: str | None = None,
        max_rejected: float = 0.0,
    ) -> tuple[dict[str, Any], Canonical]:  # fmt: skip
        raw = write(root or str(tmp_path / "raw"), files)
        config = replace(ingest_config("files", raw, until, mapping), max_rejected=max_rejected)
        return ingest.run(config, tmp_path / "canonical"), Canonical(tmp_path / "canonical")

    return run


def mapped(events: TableConfig = EVENTS, **changes: Any) -> FilesConfig:
    return replace(NO_FILES, events=events, **changes)


PLACES = {
    "parquet": lambda t: {"events/a.parquet": t},
    "csv": lambda t: {"events/a.csv": as_csv(t)},
    "tsv.gz": lambda t: {"events/a.tsv.gz": gzip.compress(as_csv(t, "\t"))},
    "two files": lambda t: {"events/1.parquet": t.slice(0, 4), "events/2.csv.gz": gzip.compress(as_csv(t.slice(4)))},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("where", ["folder", "memory"])
def test_every_format_and_place_gives_the_same_rows(place: str, where: str, ingested: Any, tmp_path: Path) -> None:
    root = f"memory://{tmp_path.name}" if where == "memory" else ""
    facts, data = ingested(PLACES[place](table()), mapped(), root)
    rows = [tuple(row.values()) for row in data.events().to_pylist()]
    when = [NOON + timedelta(minutes=i) for i in range(6)]
    assert rows == [
        (7, 50, when[0], 0, "tv", "0"),
        (8, 51, when[1], 1, None, "1"),
        (9, 52, when[2], 0, "phone", "1"),  # ln(3)² = 1.2
        (7, 53, when[3], 1, "tv", "2"),
        (8, 50, when[4], 0, None, "3"),
        (9, 51, when[5], 1, "phone", "4"),
    ]
    assert data.events().column_names == ["user_id", "item_id", "timestamp", "label", "device", "price"]
    assert data.users()["user_id"].to_pylist() == [7, 8, 9] and data.items()["item_id"].to_pylist() == [50, 51, 52, 53]
    assert facts["rows"] == {"read": 6, "later": 0, "outside": 0, "written": 6, "left_out": {}}


def test_users_items_and_vectors(ingested: Any) -> None:
    items = pa.table(
        {
            "doc": [50, 51, 52, 53, 99], "name": ["A", "B", None, "D", "E"], "genres": ["x|y", "", "y", None, "z"],
            "age": [1, 30, None, 2, 4], "kind": ["p", "q", "q", None, "p"],
        }
    )  # fmt: skip
    vectors = pa.table({"item_id": [50, 51], "vector": [[1.0, 2.0], [3.0, 4.0]]})
    mapping = mapped(
        users=replace(NO_TABLE, path="users.csv", columns={"user_id": "uid"}, categorical=["city"]),
        items=TableConfig(
            path="items.parquet", columns={"item_id": "doc", "title": "name", "tags": "genres"}, categorical=["kind"],
            numeric=["age"],
        ),
        vectors={"image": "vectors/*.parquet"},
    )  # fmt: skip
    files = {
        "events/a.parquet": table(), "users.csv": b"uid,city\n7,Oslo\n8,\n9,Bergen\n", "items.parquet": items,
        "vectors/1.parquet": vectors.slice(0, 1), "vectors/2.parquet": vectors.slice(1),
    }  # fmt: skip
    _, data = ingested(files, mapping)
    assert data.users()["city"].to_pylist() == ["Oslo", None, "Bergen"]
    found = data.items()
    assert found["title"].to_pylist() == ["A", "B", "52", "D", "E"]
    assert found["tags"].to_pylist() == [["x", "y"], None, ["y"], None, ["z"]]
    assert found["age"].to_pylist() == ["1", "11", None, "2", "1"]  # ln(30)² = 11.6, ln(4)² = 1.9
    assert found["kind"].to_pylist() == ["p", "q", "q", None, "p"]
    assert set(found["created_at"].to_pylist()) == {NOON}  # no column: there from the first event on
    assert data.modalities()["image"].to_pylist() == vectors.to_pylist()
    lists = items.set_column(2, "genres", pa.array([["x"], [], None, ["y", "z"], ["z"]]))
    _, data = ingested(files | {"items.parquet": lists}, mapping)
    assert data.items()["tags"].to_pylist() == [["x"], [], None, ["y", "z"], ["z"]]


def test_a_file_of_vectors_without_a_column(ingested: Any) -> None:
    files = {"events/a.parquet": table(), "vectors.parquet": pa.table({"item_id": [50], "embedding": [[1.0]]})}
    told = r"vectors\.image: .*vectors\.parquet has no column \['vector'\]; it has \['item_id', 'embedding'\]"
    with pytest.raises(ValueError, match=told):
        ingested(files, mapped(vectors={"image": "vectors.parquet"}))


@pytest.mark.parametrize("x", [-7.9, 0.0, 0.9, 2.0, 2.1, 3.0, 1000.0, 1e300, None, math.nan])
def test_buckets(x: float | None, ingested: Any) -> None:
    rows = table(2).set_column(5, "price", pa.array([x, 1.0]))
    _, data = ingested({"events/a.parquet": rows}, mapped())
    finite = x is not None and math.isfinite(x)
    wanted = None if not finite else str(math.floor(math.log(x) ** 2) if x > 2 else math.trunc(x))
    assert data.events()["price"].to_pylist()[0] == wanted
    assert data.numeric() == ["price"]
    assert (None if x is None else bucket(x)) == wanted  # the server's own


def test_spaces_around_a_value_are_none_of_it(ingested: Any) -> None:
    """Every character that any of Unicode, Python and SQL may take for a space."""
    spaces = [chr(code) for code in range(1, sys.maxunicode) if chr(code).isspace()] + ["\u200b", "\u2060", "\ufeff"]
    given = [f"{space}a{space}b{space}" for space in spaces] + spaces + ["", "a", "  a "]
    rows = table(len(given)).set_column(4, "device", pa.array(given))
    _, data = ingested({"events/a.parquet": rows}, mapped())
    found = data.events()["device"].to_pylist()
    assert found == [trimmed(value) for value in given]  # the server's own
    assert {"a b", "\ta\tb\t", "\t", None} <= set(found)


BROKEN: dict[str, tuple[str, Any, str]] = {
    "no user": ("uid", "", "uid is missing"),
    "a word for an item": ("doc", "fifty", "doc is no whole number of 64 bits"),
    "an endless item": ("doc", "1e99", "doc is no whole number of 64 bits"),
    "half an item": ("doc", "50.4", "doc is no whole number of 64 bits"),
    "half a user": ("uid", "7.5", "uid is no whole number of 64 bits"),
    "a user of 65 bits": ("uid", "9223372036854775808", "uid is no whole number of 64 bits"),
    "a label of 2": ("click", "2", "click is neither 0 nor 1"),
    "no label": ("click", "", "click is missing"),
    "no time": ("at", "", "at is missing"),
    "a word for a time": ("at", "noon", "at is no time"),
    "milliseconds": ("at", "1709294400000", "at is too large for seconds since 1970: write seconds, not milliseconds"),
    "the year 58000": ("at", "58000-01-01T00:00:00Z", "at is no time"),
    "no zone": ("at", "2024-03-01T12:00:00", "at is a time without a zone"),
    "a word for a number": ("price", "cheap", "price is no number"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_value_sends_its_row_to_quarantine(name: str, ingested: Any) -> None:
    column, value, told = BROKEN[name]
    lines = [line.split(",") for line in as_csv(table()).decode().replace('"', "").splitlines()]
    lines[3][lines[0].index(column)] = value
    text = "\n".join(",".join(line) for line in lines).encode()
    facts, data = ingested({"events/a.csv": text}, mapped(), max_rejected=0.2)
    assert facts["rows"] == {"read": 6, "later": 0, "outside": 0, "written": 5, "left_out": {told: 1}}
    assert data.events()["timestamp"].to_pylist() == [NOON + timedelta(minutes=i) for i in (0, 1, 3, 4, 5)]
    (kept,) = (pq.read_table(file).to_pylist() for file in (data.root / "quarantine").iterdir())
    (row,) = kept
    assert row["row"] == 2 and row["file"].endswith("raw/events/a.csv") and row["reason"] == told
    assert value in row["values"]
    with pytest.raises(
        ValueError, match=rf"files: 1 of 6 rows are broken, more than .* \(0\.1\) .*{told}: 1, e\.g\. .*a\.csv"
    ):
        ingested({"events/a.csv": text}, mapped(), max_rejected=0.1)


@pytest.mark.parametrize(
    ("kind", "value", "told"),
    [
        (pa.float64(), 7.5, "uid is no whole number of 64 bits"),
        (pa.float32(), 7.5, "uid is no whole number of 64 bits"),
        (pa.decimal128(9, 2), Decimal("7.50"), "uid is no whole number of 64 bits"),
        (pa.float64(), math.nan, "uid is no whole number of 64 bits"),
        (pa.float64(), -math.inf, "uid is no whole number of 64 bits"),
        (pa.float64(), 2.0**53, "uid is a float too large to be exact"),
        (pa.float32(), -(2.0**24), "uid is a float too large to be exact"),
        (pa.uint64(), 2**64 - 1, "uid is no whole number of 64 bits"),
        (pa.float64(), 2.0**53 - 1, None),
        (pa.float32(), 2.0**24 - 1, None),
        (pa.decimal128(9, 2), Decimal("9.00"), None),
    ],
)
def test_no_number_is_rounded_to_another_id(kind: pa.DataType, value: Any, told: str | None, ingested: Any) -> None:
    users = pa.array([value, *([Decimal(8)] if isinstance(value, Decimal) else [8]) * 5], kind)
    facts, data = ingested({"events/a.parquet": table().set_column(1, "uid", users)}, mapped(), max_rejected=0.2)
    assert facts["rows"]["left_out"] == ({told: 1} if told else {})
    assert data.events()["user_id"].to_pylist() == [*([] if told else [int(value)]), *[8] * 5]


def test_ids_in_text_may_be_whole_floats_and_large(ingested: Any) -> None:
    """As pandas writes a column of whole numbers of which one is missing; and exact beyond a float's 53 bits."""
    users = ["7.0", "+8", "9.", " 9007199254740993 ", "-9223372036854775808", "010.000"]
    _, data = ingested({"events/a.parquet": table().set_column(1, "uid", pa.array(users))}, mapped())
    assert data.events()["user_id"].to_pylist() == [7, 8, 9, 2**53 + 1, -(2**63), 10]


@pytest.mark.parametrize(
    "name", ["file", "row", "reason", "again", "given", "batch", "c0", "values", ":row", "=x", 'a"b']
)
def test_a_column_may_have_any_name(name: str, ingested: Any) -> None:
    """None of them meets a column that the reading needs for itself."""
    rows = table().rename_columns(["at", "uid", "doc", "click", name, "price", "unused"])
    broken = table(3, first=6).rename_columns(rows.column_names).set_column(2, "doc", pa.array([50, None, 52]))
    files = {"events/1.parquet": rows, "events/2.parquet": rows.slice(2, 2), "events/3.parquet": broken}
    facts, data = ingested(files, mapped(replace(EVENTS, categorical=[name])), max_rejected=0.2)
    assert facts["rows"]["left_out"] == {"doc is missing": 1, "repeated by a later file": 2}
    assert data.events()[name].to_pylist() == [*["tv", None, "phone"] * 2, "tv", "phone"]
    kept = {file.stem: pq.read_table(file).to_pylist() for file in (data.root / "quarantine").iterdir()}
    (row,) = kept["0-doc-is-missing"]
    assert (row["row"], row["reason"], Path(row["file"]).name) == (1, "doc is missing", "3.parquet")


def test_the_row_of_a_broken_value_is_counted_over_the_batches(ingested: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BATCH", 4)
    click = [0, 1, 0, 0, 1, 9, 0, 1, 1, 2]
    rows = table(10).set_column(3, "click", pa.array(click))
    facts, data = ingested({"events/a.parquet": rows}, mapped(), max_rejected=0.5)
    (file,) = (data.root / "quarantine").iterdir()
    assert pq.read_table(file)["row"].to_pylist() == [5, 9] and facts["impressions"] == 8
    assert data.events()["label"].to_pylist() == [label for label in click if label < 2]


def test_a_torn_line_is_kept_too(ingested: Any) -> None:
    text = as_csv(table()) + b"1,2,3\n"
    facts, data = ingested({"events/a.csv": text}, mapped(), max_rejected=0.2)
    assert facts["rows"] == {"read": 7, "later": 0, "outside": 0, "written": 6, "left_out": {"line is torn": 1}}
    (file,) = (data.root / "quarantine").iterdir()
    assert pq.read_table(file)["values"].to_pylist() == ["1,2,3"]


@pytest.mark.parametrize("unit", [1000, 1_000_000, 1_000_000_000])
@pytest.mark.parametrize("kind", [pa.int64(), pa.float64(), pa.string()])
def test_times_in_another_unit_are_told(unit: int, kind: pa.DataType, ingested: Any) -> None:
    files = {
        "events/a.parquet": table().set_column(
            0, "at", pa.array([int(NOON.timestamp()) * unit] * 6).cast(kind, safe=False)
        )
    }
    told = (
        r"6 of 6 rows are broken.*at is too large for seconds since 1970: write seconds, not .*: 6, e\.g\. .*'at': .?1"
    )
    with pytest.raises(ValueError, match=told):
        ingested(files, mapped())


def test_a_float_that_rounds_times_is_no_time(ingested: Any) -> None:
    rows = table().set_column(0, "at", pa.array([NOON.timestamp()] * 6, pa.float32()))  # to 128 seconds
    with pytest.raises(ValueError, match="at is a float of too few bits for a time: 6, "):
        ingested({"events/a.parquet": rows}, mapped())


def test_a_fraction_of_a_second_is_kept(ingested: Any) -> None:
    for seconds in (pa.array([NOON.timestamp() + 0.75] * 6), pa.array([str(NOON.timestamp() + 0.75)] * 6)):
        _, data = ingested({"events/a.parquet": table().set_column(0, "at", seconds)}, mapped())
        assert set(data.events()["timestamp"].to_pylist()) == {NOON + timedelta(milliseconds=750)}


def test_seconds_since_1970_are_times(ingested: Any) -> None:
    for seconds in (pa.array([int(NOON.timestamp())] * 6), pa.array([str(int(NOON.timestamp()))] * 6)):
        _, data = ingested({"events/a.parquet": table().set_column(0, "at", seconds)}, mapped())
        assert set(data.events()["timestamp"].to_pylist()) == {NOON}


def test_a_partition_that_comes_twice_counts_once(ingested: Any) -> None:
    twice = pa.concat_tables([table(2), table(2)])  # equal rows of one file are impressions of their own
    files = {"events/1.parquet": twice, "events/2.parquet": table(4), "events/3.csv": as_csv(table(2, first=4))}
    facts, data = ingested(files, mapped())
    assert facts["rows"] == {
        "read": 10,
        "later": 0,
        "outside": 0,
        "written": 8,
        "left_out": {"repeated by a later file": 2},
    }
    assert data.events()["item_id"].to_pylist() == [50, 50, 51, 51, 52, 53, 50, 51]
    assert facts["unusual_days"] == {"2024-03-01": {"rows": 8, "repeated by a later file": 2}}


def test_a_file_without_rows_is_no_fault(ingested: Any) -> None:
    _, data = ingested(
        {"events/1.parquet": table(0), "events/2.csv": as_csv(table(0)), "events/3.csv": as_csv(table())}, mapped()
    )
    assert data.events().num_rows == 6


def test_a_file_that_corrects_an_earlier_one(ingested: Any) -> None:
    """Nobody says when it arrived: the later file counts, row by row of what it holds."""

    def day(*clicks: bool) -> pa.Table:
        return table(len(clicks)).set_column(3, "click", pa.array(clicks))

    files = {
        "events/1.parquet": day(False, False, False, True),
        "events/2.parquet": day(True, False, True),  # corrects the first and the third
        "events/3.parquet": day(False),  # and back: as it was in the first file
    }
    facts, data = ingested(files, mapped())
    assert data.events()["label"].to_pylist() == [0, 0, 1, 1]
    assert facts["rows"] == {
        "read": 8, "later": 0, "outside": 0, "written": 4,
        "left_out": {"corrected by a later file": 2, "repeated by a later file": 2},
    }  # fmt: skip
    assert facts["unusual_days"]["2024-03-01"]["corrected by a later file"] == 2
    two = pa.concat_tables([day(False), day(True)])  # one file says that there were two impressions
    facts, data = ingested(
        {"events/1.parquet": two, "events/2.parquet": two.slice(1), "events/3.parquet": day()}, mapped()
    )
    assert facts["label_rate"] == 1 and facts["rows"]["left_out"] == {
        "corrected by a later file": 1, "repeated by a later file": 1,
    }  # fmt: skip


def test_rows_of_nobody_correct_nobody(ingested: Any) -> None:
    """Without users and items, rows of one moment are impressions of their own, whatever file they lie in."""
    columns = {"timestamp": "at", "label": "click"}
    files = {"events/1.parquet": table(), "events/2.parquet": table().set_column(3, "click", pa.array([True] * 6))}
    facts, _ = ingested(files, mapped(replace(EVENTS, columns=columns)))
    assert facts["rows"]["left_out"] == {"repeated by a later file": 3}


def test_an_arrival_column_makes_the_newest_row_count(ingested: Any) -> None:
    def delivered(hours: int, click: bool) -> pa.Table:
        rows = table().set_column(3, "click", pa.array([click] * 6))
        return rows.append_column("loaded", pa.repeat(NOON + timedelta(hours=hours), 6).cast(pa.timestamp("us", "UTC")))

    events = replace(EVENTS, columns=EVENTS.columns | {"created_at": "loaded"})
    files = {"events/1.parquet": delivered(5, True), "events/2.parquet": delivered(2, False)}
    facts, _ = ingested(files, mapped(events))
    assert facts["rows"]["left_out"] == {"corrected later": 6} and facts["label_rate"] == 1
    facts, _ = ingested(files, mapped(events), until=(NOON + timedelta(hours=3)).isoformat())
    assert (
        facts["rows"] == {"read": 12, "later": 6, "outside": 0, "written": 6, "left_out": {}}
        and facts["label_rate"] == 0
    )


def test_a_later_delivery_adds_no_user_and_no_item_to_the_days_before(ingested: Any) -> None:
    """Without files of users and items, these are those of the rows that are known before `until`."""

    def day(number: int) -> pa.Table:
        rows = table().set_column(1, "uid", pa.array([f"user {number}{i % 3}" for i in range(6)]))
        rows = rows.set_column(2, "doc", pa.array([f"item {number}{i % 4}" for i in range(6)]))
        return rows.set_column(0, "at", pa.repeat(NOON + timedelta(days=number), 6).cast(pa.timestamp("us", "UTC")))

    until = (NOON + timedelta(hours=6)).isoformat()
    _, data = ingested({"events/0.parquet": day(0)}, mapped(), until=until)
    names = ("users", "items", "users_vocabulary", "items_vocabulary")
    before = {name: (data.root / f"{name}.parquet").read_bytes() for name in names}
    facts, data = ingested({"events/1.parquet": day(1)}, mapped(), until=until)
    assert facts["rows"]["later"] == 6
    assert {name: (data.root / f"{name}.parquet").read_bytes() for name in names} == before


# ---- rows that a quote swallowed, infinity, and other forms of a file ---------------------------------------------


def test_stray_quotes_are_counted_and_lose_no_other_row(ingested: Any) -> None:
    rows = table(1800).set_column(4, "device", pa.array([f"device {i}" for i in range(1800)]))
    text = as_csv(rows).decode().replace('"', "").replace(",device 5,", ',"device 5,').replace(",device 105,", ',"105,')
    facts, data = ingested({"events/a.csv": text.encode()}, mapped(), max_rejected=0.01)
    reason = 'a quote (") is not closed on its line'
    assert facts["rows"] == {"read": 1800, "later": 0, "outside": 0, "written": 1798, "left_out": {reason: 2}}
    (file,) = (data.root / "quarantine").iterdir()
    assert pq.read_table(file)["line"].to_pylist() == [7, 107]
    with pytest.raises(ValueError, match=r"2 of 1800 rows are broken.*not closed on its line: 2, e\.g\. .*'line': '7'"):
        ingested({"events/a.csv": text.encode()}, mapped())


def test_a_message_shows_the_start_of_a_value(ingested: Any) -> None:
    text = as_csv(table()) + b"x" * 100_000
    with pytest.raises(ValueError, match=r"line is torn: 1, e\.g\. .*'values': 'xxx.*100,000 characters") as caught:
        ingested({"events/a.csv": text}, mapped())
    assert len(str(caught.value)) < 1000
    users = replace(NO_TABLE, path="users.csv", columns={"user_id": "uid"}, categorical=["name"])
    with pytest.raises(
        ValueError, match=r"1 broken row\(s\), e\.g\. in .*users\.csv, line 3: uid is missing"
    ) as caught:
        ingested({**FILES, "users.csv": b"uid,name\n7,a\n," + b"y" * 100_000}, mapped(users=users))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("value", ["inf", "-Infinity", "1e999"])
@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_an_infinite_number_sends_its_row_to_quarantine(value: str, form: str, ingested: Any) -> None:
    price = pa.array(["1.5", "", "nan", value, "2", "3"])
    rows = table().set_column(5, "price", price if form == "csv" else price.cast(pa.string()))
    files = {f"events/a.{form}": as_csv(rows) if form == "csv" else rows}
    facts, data = ingested(files, mapped(), max_rejected=0.2)
    assert facts["rows"]["left_out"] == {"price is infinite": 1}
    assert data.events()["price"].to_pylist() == ["1", None, None, "2", "1"]


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_another_separator_is_read_as_the_header_has_it(
    separator: str, ingested: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    facts, _ = ingested({"events/a.csv": as_csv(table(), separator)}, mapped())
    assert facts["rows"]["written"] == 6
    assert f"a.csv: the columns are separated by {separator!r}, as in its header" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"has no column 'uid'.*separate the columns by a comma, a semicolon, a tab"):
        ingested({"events/a.csv": b"at uid doc click\n1 2 3 1\n"}, mapped())


def test_usual_words_for_the_parts_are_taken_and_counted(ingested: Any) -> None:
    words = pa.array(["Validation", "train", "testing", "train", "val", "training"])
    columns = {k: v for k, v in EVENTS.columns.items() if k != "timestamp"} | {"split": "fold"}
    rows = table().append_column("fold", words)
    facts, data = ingested({"events/a.csv": as_csv(rows)}, mapped(replace(EVENTS, columns=columns)))
    assert data.events()["split"].to_pylist() == ["train"] * 3 + ["valid"] * 2 + ["test"]
    assert facts["split_words"] == {"Validation": 1, "train": 2, "testing": 1, "val": 1, "training": 1}
    rows = table().append_column("fold", pa.array(["train", "valid", "holdout"] * 2))
    with pytest.raises(ValueError, match=r"fold is none of train, valid, test: 2, e\.g\. .*holdout"):
        ingested({"events/a.csv": as_csv(rows)}, mapped(replace(EVENTS, columns=columns)))


def test_what_the_logging_system_tells_is_read_and_is_no_feature(ingested: Any) -> None:
    told = {"propensity": [0.5, 1, 0.25, 0.125, 0.5, 0.5], "rank": [1, 2, 3, 1, 2, 3], "slate": [7, 7, 7, 2**40, 2, 2]}
    rows = table()
    for name, given in told.items():
        rows = rows.append_column(name, pa.array(given))
    config = mapped(replace(EVENTS, columns=EVENTS.columns | {"position": "rank"}))
    _, data = ingested({"events/a.csv": as_csv(rows)}, config)
    events = data.events().sort_by("slate")
    assert events["slate"].to_pylist() == [2, 2, 7, 7, 7, 2**40]
    assert sorted(events["propensity"].to_pylist()) == sorted(told["propensity"])
    assert events.schema.field("position").type == pa.int16() and not {*told, "position"} & {
        *attributes(events, SCHEMA)
    }
    for name, wrong, said in (
        ("propensity", 0, "propensity is not above 0 and at most 1: 1"), ("rank", 0, "rank is no whole number from 1"),
        ("rank", 1.5, "rank is no whole number from 1"), ("slate", "x", "slate is no whole number"),
    ):  # fmt: skip
        texts = pa.array([str(wrong), *map(str, told[name][1:])])
        spoiled = rows.set_column(rows.column_names.index(name), name, texts)
        with pytest.raises(ValueError, match=said):
            ingested({"events/a.csv": as_csv(spoiled)}, config)


def test_a_list_of_paths(ingested: Any) -> None:
    files = {"b/1.parquet": table(4), "a/1.csv": as_csv(table(2, first=4)), "c.csv": as_csv(table())}
    _, data = ingested(files, mapped(replace(EVENTS, path=["b/*.parquet", "a/1.csv"])))
    assert data.events().num_rows == 6
    with pytest.raises(ValueError, match="path is an empty list"):
        replace(EVENTS, path=[])
    with pytest.raises(ValueError, match="only the events have a path for each part"):
        mapped(users=replace(NO_TABLE, path={"train": "a", "valid": "b"}))


# ---- ids that are text --------------------------------------------------------------------------------------------


def hashed(text: str) -> int:
    """63 bits of the MD5, as anybody can count them again."""
    return int.from_bytes(hashlib.md5(text.encode()).digest()[:8], "little") >> 1


def with_text_ids(rows: pa.Table) -> pa.Table:
    for at, name in ((1, "uid"), (2, "doc")):
        ids = pa.array([f"{name}-{value}" for value in rows[name].to_pylist()])
        rows = rows.set_column(at, name, ids)
    return rows


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_text_ids_are_encoded_and_have_a_vocabulary(form: str, ingested: Any) -> None:
    rows = with_text_ids(table())
    items = pa.table({"doc": [f"doc-{i}" for i in (50, 51, 52, 53, 99)], "name": ["A", "B", None, "D", "E"]})
    vectors = pa.table({"item_id": ["doc-50", "doc-52"], "vector": [[1.0], [2.0]]})
    mapping = mapped(
        items=replace(NO_TABLE, path="items.csv", columns={"item_id": "doc", "title": "name"}),
        vectors={"image": "vectors.parquet"},
    )
    events = {f"events/a.{form}": as_csv(rows) if form == "csv" else rows}
    _, data = ingested({**events, "items.csv": as_csv(items), "vectors.parquet": vectors}, mapping)
    assert data.events()["user_id"].to_pylist() == [hashed(f"uid-{7 + i % 3}") for i in range(6)]
    assert data.events()["item_id"].to_pylist() == [hashed(f"doc-{50 + i % 4}") for i in range(6)]
    assert set(data.items()["item_id"].to_pylist()) == {hashed(text) for text in items["doc"].to_pylist()}
    titles = dict(zip(data.items()["item_id"].to_pylist(), data.items()["title"].to_pylist(), strict=True))
    assert titles[hashed("doc-52")] == "doc-52" and titles[hashed("doc-50")] == "A"
    assert data.modalities()["image"]["item_id"].to_pylist() == sorted(map(hashed, ["doc-50", "doc-52"]))
    users = pq.read_table(data.root / "users_vocabulary.parquet").to_pylist()
    assert {row["text"]: row["user_id"] for row in users} == {t: hashed(t) for t in ("uid-7", "uid-8", "uid-9")}
    words = pq.read_table(data.root / "items_vocabulary.parquet").to_pylist()
    assert {row["text"]: row["item_id"] for row in words} == {t: hashed(t) for t in items["doc"].to_pylist()}


def test_a_text_has_the_same_id_whatever_else_is_there(ingested: Any) -> None:
    rows = with_text_ids(table(40))
    _, data = ingested({"events/a.csv": as_csv(rows.slice(30))}, mapped())
    later = data.events()["user_id"].to_pylist()
    _, data = ingested({"events/a.csv": as_csv(rows)}, mapped())
    assert data.events()["user_id"].to_pylist()[30:] == later


def test_a_text_id_that_is_missing_is_broken_and_digits_are_a_text_too(ingested: Any) -> None:
    users = pa.array(["ann", "", "007", "bob", "7", "ann"])
    facts, data = ingested({"events/a.parquet": table().set_column(1, "uid", users)}, mapped(), max_rejected=0.2)
    assert facts["rows"]["left_out"] == {"uid is missing": 1}
    assert data.events()["user_id"].to_pylist() == [hashed(text) for text in ("ann", "007", "bob", "7", "ann")]


def test_two_texts_of_one_id_stop_ingest(ingested: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "text_id", lambda words: f"(md5_number_upper({words}::varchar) & 1)::bigint")
    with pytest.raises(ValueError, match=r"user_id 'uid-.' and 'uid-.' have the same 63 bits of MD5; rename one"):
        ingested({"events/a.parquet": with_text_ids(table())}, mapped())


# ---- what the mapping and the files do not agree on -------------------------------------------------------------

FILES = {"events/a.parquet": table()}
WRONG: dict[str, tuple[dict[str, Any], FilesConfig, str]] = {
    "no path": (FILES, NO_FILES, r"ingest\.files\.events\.path is null; name the files of your impressions"),
    "no file": ({"x": b""}, mapped(), r"ingest\.files\.events: no file at .*raw/events/\*; mend"),
    "no such user file": (
        FILES, mapped(users=replace(NO_TABLE, path="users.csv")), r"ingest\.files\.users: no file at .*raw/users\.csv",
    ),
    "no row": (
        {"events/a.parquet": table(0), "events/b.csv": as_csv(table(0))}, mapped(),
        r"ingest\.files\.events: no row in .*a\.parquet, .*b\.csv; mend ingest\.files\.events\.path or the files",
    ),
    "no such column": (
        FILES, mapped(replace(EVENTS, columns=EVENTS.columns | {"label": "clicked"})),
        r"a\.parquet has no column 'clicked' for label; it has \['at', .*columns: \{label: …\}",
    ),
    "no label": (
        FILES, mapped(replace(EVENTS, columns={})), r"a\.parquet has no column 'label' for label",
    ),
    "no such feature": (
        FILES, mapped(replace(EVENTS, numeric=["cost"])), r"a\.parquet has no column 'cost'; it has .*Mend `cat",
    ),
    "a key as a feature": (
        {"events/a.parquet": table().rename_columns(["at", "user_id", "doc", "click", "device", "price", "unused"])},
        mapped(replace(EVENTS, columns={"label": "click"}, categorical=["user_id"])),
        r"'user_id' is a canonical column, and no feature besides",
    ),
    "a list as a feature": (
        {"events/a.parquet": table().set_column(4, "device", pa.array([["a"]] * 6))}, mapped(),
        r"a\.parquet: column 'device' is list<.*>; only the tags of the items can be a list",
    ),
    "files that differ": (
        {**FILES, "events/b.parquet": table().drop_columns("doc").append_column("item_id", pa.array(range(6)))},
        mapped(replace(EVENTS, columns={k: v for k, v in EVENTS.columns.items() if k != "item_id"})),
        r"b\.parquet has \[.*'item_id'.*\], the files before it \[.*\]; give all files of a table the same columns",
    ),
    "no order": (
        {"events/a.parquet": table().drop_columns("at")},
        mapped(replace(EVENTS, columns={k: v for k, v in EVENTS.columns.items() if k != "timestamp"})),
        r"a\.parquet has no timestamp and no split column, so no row is later than another; map one of the two",
    ),
    "a broken user": (
        {**FILES, "users.csv": b"uid\n7\nx\n"},
        mapped(users=replace(NO_TABLE, path="users.csv", columns={"user_id": "uid"})),
        r"ingest\.files\.users: 1 broken row\(s\), e\.g\. in .*users\.csv: uid is no whole number .*'x'|x\}\. Mend",
    ),
    "another ending": ({"events/a.json": b"{}"}, mapped(), r"a\.json: files end in .*; convert or rename it"),
    "a workbook": ({"events/a.xlsx": b"PK"}, mapped(), r"a\.xlsx: .*; save it as CSV or parquet"),
    "no parquet": ({"events/a.parquet": b"PAR1"}, mapped(), r"a\.parquet cannot be read whole: .*Parquet.*Mend"),
    "an empty csv": ({"events/a.csv": b""}, mapped(), r"a\.csv cannot be read whole: .*Empty CSV.*Mend the file"),
    "half a gzip": (
        {"events/a.csv.gz": gzip.compress(as_csv(table(3000)))[:4000]}, mapped(), r"a\.csv\.gz cannot be read whole",
    ),
    "latin-1": (
        {"events/a.csv": as_csv(table()).replace(b"phone", b"t\xe9l\xe9")}, mapped(),
        r"a\.csv cannot be read whole.*UTF8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_agree_is_told_by_table_file_and_column(name: str, ingested: Any, tmp_path: Path) -> None:
    files, mapping, told = WRONG[name]
    with pytest.raises(ValueError, match=told):
        ingested(files, mapping)
    assert not (tmp_path / "canonical").exists()


def test_a_file_cut_short_after_its_first_rows(ingested: Any) -> None:
    out = io.BytesIO()
    pq.write_table(table(5000), out, row_group_size=500)
    whole = bytearray(out.getvalue())
    whole[400:900] = b"\0" * 500  # the footer is whole, the first pages are not
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read whole"):
        ingested({"events/a.parquet": bytes(whole)}, mapped())


class NoCredentialsError(Exception):
    """As botocore's errors: no OSError."""


def refuse(*_: Any, **__: Any) -> Any:
    raise NoCredentialsError("no key")


@pytest.mark.parametrize("ending", ["parquet", "csv"])
@pytest.mark.parametrize(
    ("owner", "name", "path", "told"),
    [
        (MemoryFileSystem, "glob", "events/*", r"ingest\.files\.events: memory://.*/events/\* cannot be opened"),
        (MemoryFileSystem, "info", "events/a.{}", r"ingest\.files\.events: memory://.*/events/a\..* cannot be opened"),
        (MemoryFileSystem, "_open", "events/*", r"memory://.*/a\.(csv|parquet) cannot be read whole"),
        (MemoryFile, "read", "events/*", r"memory://.*/a\.(csv|parquet) cannot be read whole"),
    ],
)
def test_a_place_out_of_reach_is_told_with_its_own_error(
    ending: str, owner: type, name: str, path: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = table() if ending == "parquet" else as_csv(table())
    raw = write(f"memory://{tmp_path.name}", {f"events/a.{ending}": content})
    config = ingest_config("files", raw, None, mapped(replace(EVENTS, path=path.format(ending))))
    monkeypatch.setattr(owner, name, refuse)
    with pytest.raises(ValueError, match=rf"{told}: NoCredentialsError: no key\. Mend the .* access"):
        ingest.run(config, tmp_path / "canonical")


def test_a_filesystem_that_is_not_installed(tmp_path: Path) -> None:
    config = ingest_config("files", "gs://bucket/data", None, mapped())  # gcsfs is in none of our groups
    with pytest.raises(
        ValueError, match=r"ingest\.files\.events: gs://bucket/data/events/\* cannot be opened: .*gcsfs"
    ):
        ingest.run(config, tmp_path / "canonical")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"path": {"train": "a"}}, r"path has the parts \['train'\]; give train, valid and"),
        ({"path": "a", "categorical": ["x"], "numeric": ["x"]}, r"columns \['x'\] are named twice"),
    ],
)
def test_a_table_that_cannot_be(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        replace(NO_TABLE, **values)


def test_only_canonical_names_are_mapped() -> None:
    with pytest.raises(ValueError, match=r"users\.columns maps \['uid'\]; the canonical names are user_id"):
        mapped(users=replace(NO_TABLE, columns={"uid": "user_id"}))


# ---- plain tabular data -----------------------------------------------------------------------------------------


def tabular(rows: int, seed: int) -> pa.Table:
    """Like Criteo: a label, numbers and categories; no user, no item, no time. Clicks follow `C1` and `I1`."""
    rng = np.random.default_rng(seed)
    c1, i1 = rng.integers(0, 6, rows), rng.integers(0, 50, rows)
    click = rng.random(rows) < np.where(c1 < 3, 0.75, 0.2) - np.where(i1 > 25, 0.15, 0)
    return pa.table(
        {
            "label": click.astype(np.int64),
            "I1": pa.array(i1, mask=rng.random(rows) < 0.1),
            "C1": [f"{value:08x}" for value in c1],
            "C2": [f"once{seed}.{i}" if i % 50 == 0 else "often" for i in range(rows)],
        }
    )


CRITEO = TableConfig(
    path={"test": "test.csv", "train": "train_*.csv", "valid": "valid.csv"},
    columns={},
    categorical=["C1", "C2"],
    numeric=["I1"],
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    names = {"train_0.csv": 500, "train_1.csv": 400, "valid.csv": 300, "test.csv": 200}
    raw = {name: as_csv(tabular(rows, i)) for i, (name, rows) in enumerate(names.items())}
    return through_dataset(tmp_path_factory.mktemp("tabular"), raw, CRITEO)


def through_dataset(root: Path, raw: dict[str, pa.Table | bytes], events: TableConfig, **changes: Any) -> Folders:
    """Files through every stage up to the dataset, as production runs them."""
    found = Folders(root)
    new_repo(found)
    ingest.run(ingest_config("files", write(str(root / "raw"), raw), None, mapped(events, **changes)), found.canonical)
    validate.run(VALIDATE, found.canonical, found.report, found.root / "docs")
    config = EmbedConfig(dim=3, text_features=10, text_dim=3, text_encoder=None, image_encoder=None, seed=1, fit=None)
    embed.run(config, SPLIT, found.canonical, found.report, found.embedding)
    features.run(FEATURES, found.canonical, found.report, found.embedding, found.features)
    config = DatasetConfig(history_length=8, min_count=2, max_tags=5)
    dataset.run(config, SPLIT, found.canonical, found.features, found.repo, found.dataset)
    return found


@pytest.fixture(scope="module")
def data(folders: Folders) -> Dataset:
    return Dataset.open(folders.dataset)


def test_tabular_data_has_its_columns_for_features_and_no_others(data: Dataset) -> None:
    assert [(f.name, f.owner, f.kind) for f in data.schema.features] == [
        (name, "impression", "categorical") for name in ("C1", "C2", "I1")
    ]
    assert data.schema.history_length == 0 and len(data.click_log) == 0
    assert data.splits == {"train": (0, 900), "valid": (900, 1200), "test": (1200, 1400)}


def test_tabular_values_by_min_count_unseen_and_missing(data: Dataset, folders: Folders) -> None:
    given = pa.concat_tables([tabular(rows, seed) for seed, rows in enumerate((500, 400, 300, 200))])
    train = given.slice(0, 900)
    for name in ("C1", "C2"):
        counts = {row["values"]: row["counts"] for row in train[name].value_counts().to_pylist()}
        known = sorted(value for value, count in counts.items() if count >= 2)
        wanted = [known.index(value) + 2 if value in known else 1 for value in given[name].to_pylist()]
        assert data.columns[f"field.{name}"].tolist() == wanted
    assert 1 in data.columns["field.C2"].tolist()
    unknown = [row for row in range(1200, 1400) if data.columns["field.C2"][row] == 1]
    assert unknown == [1200, 1250, 1300, 1350]
    assert pq.read_table(folders.dataset / UNSEEN).to_pylist() == [
        {"field": "C2", "row": row, "value": given["C2"][row].as_py()} for row in unknown
    ]
    missing = [value is None for value in given["I1"].to_pylist()]
    assert [index == 0 for index in data.columns["field.I1"].tolist()] == missing


@pytest.mark.parametrize("model", ["qin", "sdcnv3"])
def test_both_models_train_on_it(data: Dataset, networks: dict[str, dict[str, Any]], model: str) -> None:
    """QIN has no interests to pool here: it is the quadratic network of the fields."""
    assert learn(model, networks[model] | {"exclude": ("user_id",)}, data) > 0.7


def test_items_and_labels_alone_are_enough(tmp_path: Path, networks: dict[str, dict[str, Any]]) -> None:
    """An impression then has no field, and the test rows no value that could be unseen."""
    names = {"train_0.csv": 600, "valid.csv": 300, "test.csv": 200}
    rng = np.random.default_rng(3)
    raw: dict[str, pa.Table | bytes] = {}
    for name, rows in names.items():
        items = rng.integers(0, 30, rows)
        clicked = rng.random(rows) < np.where(items % 3 == 0, 0.8, 0.2)
        raw[name] = as_csv(pa.table({"item_id": items, "label": clicked.astype(np.int64)}))
    folders = through_dataset(tmp_path, raw, replace(CRITEO, categorical=[], numeric=[]))
    data = Dataset.open(folders.dataset)
    assert [feature.name for feature in data.schema.features] == ["item_id"]
    found = pq.read_table(folders.dataset / UNSEEN)
    assert found.num_rows == 0 and [str(kind) for kind in found.schema.types] == ["string", "int64", "string"]
    for model in ("qin", "sdcnv3"):
        assert learn(model, networks[model], data) > 0.7


def test_tabular_data_may_have_items_with_tags_and_texts(tmp_path: Path, networks: dict[str, dict[str, Any]]) -> None:
    """All rows know all items, whenever these say they were made: the times of the rows are none."""
    rng, tags = np.random.default_rng(3), ("red", "green", "blue")
    raw: dict[str, pa.Table | bytes] = {}
    for name, rows in {"train_0.csv": 600, "valid.csv": 300, "test.csv": 200}.items():
        items = rng.integers(0, 30, rows)
        clicked = rng.random(rows) < np.where(items % 3 == 0, 0.8, 0.2)
        raw[name] = as_csv(pa.table({"item_id": items, "label": clicked.astype(np.int64)}))
    described = {
        "item_id": range(30),
        "created_at": ["2023-05-01T00:00:00Z"] * 30,
        "text": [f"a {tags[i % 3]} {('cup', 'jar', 'pot', 'pan', 'mug')[i % 5]} of clay" for i in range(30)],
        "tags": [f"{tags[i % 3]}|{i % 2}" for i in range(30)],
    }
    raw["items.csv"] = as_csv(pa.table({name: pa.array(values) for name, values in described.items()}))
    items = replace(NO_FILES.items, path="items.csv")
    folders = through_dataset(tmp_path, raw, replace(CRITEO, categorical=[], numeric=[]), items=items)
    data = Dataset.open(folders.dataset)
    assert [(f.name, f.kind, f.size) for f in data.schema.features] == [
        ("item_id", "categorical", 32), ("tags", "multi", 7), ("embedding", "vector", 3),
    ]  # fmt: skip
    assert data.catalog.vector_IE is not None and data.catalog.vector_IE[2:].norm(dim=1).min() > 0
    assert data.catalog.sets["tags"][2:].min() > 1
    for model in ("qin", "sdcnv3"):
        assert learn(model, networks[model], data) > 0.7


def test_a_split_column_orders_the_rows(ingested: Any) -> None:
    rows = (
        table()
        .drop_columns("at")
        .append_column("fold", pa.array(["valid", "train", "test", "train", "valid", "train"]))
    )
    columns = {k: v for k, v in EVENTS.columns.items() if k != "timestamp"} | {"split": "fold"}
    _, data = ingested({"events/a.parquet": rows}, mapped(replace(EVENTS, columns=columns)))
    events = data.events()
    assert events["split"].to_pylist() == ["train"] * 3 + ["valid"] * 2 + ["test"]
    assert events["item_id"].to_pylist() == [51, 53, 51, 50, 50, 52]
    cut = split_rows(events, SplitConfig(valid_share=0.1, test_share=0.1))
    assert cut.ranges(6) == {"train": (0, 3), "valid": (3, 5), "test": (5, 6)}
    assert data.histories() is not None and data.items().num_rows == 4
