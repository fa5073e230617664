"""ingest: canonical in, canonical out; bad input stops before anything is written."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from components.common.artifacts import folder_hash
from components.common.config import parse_time
from components.common.contracts import EVENTS, TIMESTAMP, Canonical, attributes
from components.data import ingest, revisions, sources
from components.data.sources import RawTables
from components.data.sources.simulator import read
from models import schema
from tests.components.small_world import SIMULATOR, ingest_config, ingest_tables, with_column

RATINGS = "1::10::5::978300760\n2::10::1::978300761\n"


@pytest.fixture(scope="module")
def raw() -> RawTables:
    return read("", SIMULATOR)


@pytest.fixture
def movielens(tmp_path: Path) -> Path:
    folder = tmp_path / "ml"
    folder.mkdir()
    (folder / "ratings.dat").write_text(RATINGS)
    (folder / "users.dat").write_text("1::F::1::10::4\n2::M::25::1::7\n")
    (folder / "movies.dat").write_text("10::A (1999)::Drama\n")
    return folder


def test_what_goes_in_comes_out(raw: RawTables, tmp_path: Path) -> None:
    facts = ingest_tables(raw, tmp_path / "canonical")
    data = Canonical(tmp_path / "canonical")
    assert data.events().num_rows == facts["impressions"] == len(raw.events)
    for name in raw.events.column_names:
        assert data.events()[name].to_pylist() == raw.events[name].to_pylist(), name
    assert data.users().to_pylist() == raw.users.to_pylist()
    assert data.items().to_pylist() == raw.items.to_pylist()
    assert {k: v.to_pylist() for k, v in data.modalities().items()} == {
        k: v.to_pylist() for k, v in raw.modalities.items()
    }
    assert facts["label_rate"] == pytest.approx(np.mean(raw.events["label"].to_pylist()))
    assert (facts["first_day"], facts["last_day"], facts["days"]) == ("2024-03-01", "2024-03-08", 8)
    assert json.loads((tmp_path / "canonical" / "source.json").read_text()) == facts


def test_extra_columns_are_read_as_the_server_reads_a_request(raw: RawTables, tmp_path: Path) -> None:
    spaces = [chr(code) for code in range(1, sys.maxunicode) if chr(code).isspace()]
    given = [*(f"{space}a{space}b{space}" for space in spaces), *spaces, "", None, "a"]
    tables = {}
    for name in ("events", "users", "items"):
        table = getattr(raw, name)
        extra = pa.array([given[i % len(given)] for i in range(len(table))], pa.string())
        tables[name] = table.append_column(f"extra_{name}", extra)
    ingest_tables(replace(raw, **tables), tmp_path / "canonical")
    data = Canonical(tmp_path / "canonical")
    for name, table in tables.items():
        found = getattr(data, name)()[f"extra_{name}"].to_pylist()
        assert found == [None if v is None else schema.trimmed(v) for v in table[f"extra_{name}"].to_pylist()]
    assert "a b" in found and "\ta\tb\t" in found


def test_until_leaves_later_events_out_in_any_zone(raw: RawTables, tmp_path: Path) -> None:
    facts = ingest_tables(raw, tmp_path / "canonical", until="2024-03-03T01:00:00+01:00")
    assert (facts["last_day"], facts["impressions"]) == ("2024-03-02", 800)
    moment = raw.events["timestamp"][10].as_py()
    earlier = sum(t < moment for t in raw.events["timestamp"].to_pylist())  # the moment itself is out
    assert ingest_tables(raw, tmp_path / "other", until=moment.isoformat())["impressions"] == earlier


@pytest.mark.parametrize(
    ("until", "told"),
    [
        ("2024-03-03T00:00:00", "ingest.until is '2024-03-03T00:00:00', a time without a zone; add one, e.g. 2024-03-"),
        ("yesterday", "ingest.until is 'yesterday'; write an ISO time such as"),
    ],
)
def test_until_must_be_a_time_with_a_zone(until: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ingest_config(until=until)


def test_nothing_before_until(raw: RawTables, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no event before until='1999-01-01T00:00:00.00:00' .* give a later time"):
        ingest_tables(raw, tmp_path / "canonical", until="1999-01-01T00:00:00+00:00")
    assert list(tmp_path.iterdir()) == []


def without_zone(raw: RawTables) -> RawTables:
    return replace(raw, events=with_column(raw.events, "timestamp", naive(len(raw.events)), pa.timestamp("us")))


def naive(rows: int) -> list[datetime]:
    return [datetime(2024, 3, 1) + timedelta(seconds=i) for i in range(rows)]


def bad_label(raw: RawTables) -> RawTables:
    return replace(raw, events=with_column(raw.events, "label", [1000] * len(raw.events), pa.int64()))


def no_time(raw: RawTables, rows: int = 40) -> RawTables:
    times = raw.events["timestamp"].to_pylist()
    return replace(raw, events=with_column(raw.events, "timestamp", [*[None] * rows, *times[rows:]]))


def with_pointers(raw: RawTables, start: int, end: int, items: list[int] | None) -> RawTables:
    events = raw.events
    for name, at in (("history_start", start), ("history_end", end)):
        events = events.append_column(name, pa.repeat(at, len(events)))
    return replace(raw, events=events, histories=None if items is None else pa.table({"item_id": items}))


def bad_vector(raw: RawTables) -> RawTables:
    text = raw.modalities["text"]
    return replace(raw, modalities={"image": raw.modalities["image"], "text": text.rename_columns(["item_id", "x"])})


BAD: dict[str, tuple[Callable[[RawTables], RawTables], str]] = {
    "missing event column": (
        lambda raw: replace(raw, events=raw.events.drop_columns("label")),
        r"planted events: column 'label' \(int8\) is missing; it has \['user_id',",
    ),
    "missing item column": (
        lambda raw: replace(raw, items=raw.items.drop_columns("created_at")),
        r"planted items: column 'created_at' .* is missing",
    ),
    "wrong type": (
        lambda raw: replace(raw, users=pa.table({"user_id": ["a", "b"]})),
        "planted users: column 'user_id' is string; it must be int64",
    ),
    "no zone": (without_zone, r"planted events: column 'timestamp' has times without a zone.*make them UTC, e\.g\."),
    "label too large": (bad_label, "planted events: column 'label' does not fit int8: Integer value 1000"),
    "more broken rows than the limit": (
        no_time,
        r"planted: 40 of 3200 rows are broken, more than ingest\.max_rejected \(0\.01\) .*no timestamp: 40, e\.g\. "
        r"\{'user_id'.* mend the files, or raise the limit",
    ),
    "an event column's name": (
        lambda raw: replace(raw, users=raw.users.append_column("split", pa.array(["a"] * len(raw.users)))),
        r"planted: extra columns \['split'\] have a name",
    ),
    "histories without a table": (
        lambda raw: with_pointers(raw, 0, 0, None),
        r"planted events have \('history_start', 'history_end'\); give `histories`",
    ),
    "histories out of their table": (
        lambda raw: with_pointers(raw, 1, 4, [5, 6, 7]),
        r"planted: \('history_start', 'history_end'\) leave \[0, 3\]",
    ),
    "number as an attribute": (
        lambda raw: replace(raw, users=raw.users.append_column("age", pa.array(range(len(raw.users))))),
        "planted users: extra column 'age' is int64; it must be string",
    ),
    "one name in two tables": (
        lambda raw: replace(raw, users=raw.users.append_column("device", pa.array(["tv"] * len(raw.users)))),
        r"planted: extra columns \['device'\] have a name that another table's column .*; rename them",
    ),
    "a feature's name": (
        lambda raw: replace(raw, items=raw.items.append_column("views", pa.array(["9"] * len(raw.items)))),
        r"planted: extra columns \['views'\] have a name .* or a feature of the pipeline has; rename them",
    ),
    "a counted feature's name": (
        lambda raw: replace(raw, events=raw.events.append_column("views_level", pa.array(["9"] * len(raw.events)))),
        r"planted: extra columns \['views_level'\] have a name",
    ),
    "modality without vector": (bad_vector, "planted modality text: column 'vector' .* is missing"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_leaves_nothing_and_touches_nothing(name: str, raw: RawTables, tmp_path: Path) -> None:
    spoil, told = BAD[name]
    output = tmp_path / "canonical"
    with pytest.raises(ValueError, match=told):
        ingest_tables(spoil(raw), output)
    assert list(tmp_path.iterdir()) == []
    ingest_tables(raw, output)
    before = folder_hash(output)
    with pytest.raises(ValueError, match=told):
        ingest_tables(spoil(raw), output)
    assert folder_hash(output) == before
    assert list(tmp_path.iterdir()) == [output]


def test_a_second_run_replaces_the_first_whole(raw: RawTables, tmp_path: Path) -> None:
    ingest_tables(raw, tmp_path / "canonical")
    fewer = replace(raw, modalities={"text": raw.modalities["text"]})
    ingest_tables(fewer, tmp_path / "canonical", until="2024-03-02T00:00:00+00:00")
    data = Canonical(tmp_path / "canonical")
    assert data.days() == ["2024-03-01"]
    assert list(data.modalities()) == ["text"]


def test_a_broken_parquet_file_beside_movielens(movielens: Path, tmp_path: Path) -> None:
    config = ingest_config("movielens", str(movielens), until=None)
    ingest.run(config, tmp_path / "canonical")
    before = folder_hash(tmp_path / "canonical")
    texts = movielens / "item_text.parquet"
    images = movielens / "item_image.parquet"
    whole = pa.table({"item_id": range(5000), "text": [str(i) for i in range(5000)]})
    for table, told in (
        (whole.rename_columns(["movie", "text"]), r"item_text\.parquet: column 'item_id' .* is missing"),
        (
            with_column(whole, "text", range(5000), pa.int64()),
            r"item_text\.parquet: column 'text' is int64; it must be",
        ),
    ):
        pq.write_table(table, texts)
        with pytest.raises(ValueError, match=told):
            ingest.run(config, tmp_path / "canonical")
    pq.write_table(whole, texts)
    texts.write_bytes(texts.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"item_text\.parquet is no whole parquet file.*Write it again"):
        ingest.run(config, tmp_path / "canonical")
    texts.unlink()
    pq.write_table(pa.table({"item_id": [10], "vector": ["0.1 0.2"]}), images)
    with pytest.raises(ValueError, match="movielens modality image: column 'vector' is string; it must be list"):
        ingest.run(config, tmp_path / "canonical")
    assert folder_hash(tmp_path / "canonical") == before


def test_a_time_of_no_zone_is_never_taken_for_utc() -> None:
    assert parse_time("x", "2024-03-01T02:00:00+02:00") == datetime(2024, 3, 1, tzinfo=UTC)
    with pytest.raises(ValueError, match=r"x is '2024-03-01', a time without a zone; add one, e\.g\. (.*)") as caught:
        parse_time("x", "2024-03-01")
    parse_time("x", str(caught.value).split()[-1])  # what it says to write can be written


# ---- what becomes of the rows -----------------------------------------------------------------------------------


def quarantined(canonical: Path) -> dict[str, pa.Table]:
    tables = [pq.read_table(file) for file in sorted((canonical / "quarantine").glob("*.parquet"))]
    return {table["reason"][0].as_py(): table for table in tables}


def test_a_few_broken_rows_go_to_quarantine(raw: RawTables, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = ingest_tables(no_time(raw, 2), tmp_path / "canonical")
    assert facts["rows"] == {"read": 3200, "later": 0, "written": 3198, "left_out": {"no timestamp": 2}}
    assert facts["impressions"] == 3198 == Canonical(tmp_path / "canonical").events().num_rows
    (rows,) = quarantined(tmp_path / "canonical").values()
    assert rows["user_id"].to_pylist() == raw.events["user_id"].to_pylist()[:2]
    told = capsys.readouterr().err
    assert re.search(r"read +│ +3,200", told) and re.search(r"no timestamp +│ +-2", told)
    assert re.search(r"written +│ +3,198", told)


def test_what_a_source_left_out_is_counted_and_kept(raw: RawTables, tmp_path: Path) -> None:
    aside, broken = pa.table({"line": ["a", "b", "c"]}), pa.table({"line": ["?"]})
    given = replace(raw, set_aside={"rating of 3": aside}, rejected={"torn": broken})
    facts = ingest_tables(given, tmp_path / "canonical")
    assert facts["rows"] == {"read": 3204, "later": 0, "written": 3200, "left_out": {"torn": 1, "rating of 3": 3}}
    found = quarantined(tmp_path / "canonical")
    assert found["rating of 3"]["line"].to_pylist() == ["a", "b", "c"] and len(found["torn"]) == 1
    many = replace(raw, set_aside={"rating of 3": pa.table({"line": ["a"] * 4000})})  # no fault, so no limit
    assert ingest_tables(many, tmp_path / "other")["rows"]["read"] == 7200
    with pytest.raises(ValueError, match=r"40 of 3240 rows are broken.*torn: 40, e\.g\. \{'line': '\?'\}"):
        ingest_tables(replace(raw, rejected={"torn": pa.table({"line": ["?"] * 40})}), tmp_path / "third")


NOON = datetime(2024, 3, 1, 12, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)


def deliveries(
    raw: RawTables, *rows: tuple[int | None, datetime | None, int, str | None, datetime | None]
) -> RawTables:
    """user, time, label, device, arrival; of one item."""
    user, time, label, device, arrival = zip(*rows, strict=True)
    events = pa.table(
        {
            "user_id": pa.array(user, pa.int64()),
            "item_id": pa.array([int(raw.items["item_id"][0].as_py())] * len(rows)),
            "timestamp": pa.array(time, pa.timestamp("us", tz="UTC")),
            "label": pa.array(label, pa.int8()),
            "device": device,
            "created_at": pa.array(arrival, pa.timestamp("us", tz="UTC")),
        }
    )
    return replace(raw, events=events, users=with_column(raw.users, "user_id", list(range(len(raw.users)))))


def test_a_day_delivered_again_counts_once_and_the_newest_row_of_an_impression_counts(
    raw: RawTables, tmp_path: Path
) -> None:
    first, again, later = NOON + HOUR, NOON + 2 * HOUR, NOON + 3 * DAY
    given = deliveries(
        raw,
        (1, NOON, 0, "tv", first), (2, NOON, 0, "tv", first), (3, NOON, 1, "tv", None), (4, NOON, 0, "tv", first),
        (1, NOON, 0, "tv", again),  # repeated
        (2, NOON, 1, "tv", again),  # corrected: the click came late
        (3, NOON, 0, "tv", first),  # corrects the row whose arrival is unknown
        (4, NOON + HOUR, 0, "tv", later),  # another impression, late
        (2, NOON, 1, "phone", later),  # corrected once more
        (5, NOON, 1, "tv", NOON + 20 * HOUR),  # on the next day, which is not late
    )  # fmt: skip
    facts = ingest_tables(given, tmp_path / "whole")
    events = Canonical(tmp_path / "whole").events()
    found = [(e["user_id"], e["label"], e["device"], e["created_at"]) for e in events.to_pylist()]
    assert sorted(found) == [
        (1, 0, "tv", first), (2, 1, "phone", again), (3, 0, "tv", first), (4, 0, "tv", first), (4, 0, "tv", later),
        (5, 1, "tv", NOON + 20 * HOUR),
    ]  # fmt: skip
    assert facts["rows"] == {"read": 10, "later": 0, "written": 6, "left_out": {"repeated": 1, "corrected later": 3}}
    assert facts["unusual_days"] == {"2024-03-01": {"rows": 6, "late": 1, "repeated": 1, "corrected later": 3}}
    kept = quarantined(tmp_path / "whole")
    assert kept["repeated"]["created_at"].to_pylist() == [first]
    assert sorted(kept["corrected later"]["label"].to_pylist()) == [0, 1, 1]
    assert (tmp_path / "whole" / "events").is_dir() and "created_at" not in attributes(events, EVENTS)


def test_a_day_delivered_again_as_it_was_changes_nothing(raw: RawTables, tmp_path: Path) -> None:
    """Not even the order of rows of one moment, in whatever order they come again."""
    rows = [(user, NOON + user % 3 * HOUR, user % 2, "tv", NOON + user * HOUR) for user in range(20)]
    again = [(*row[:4], NOON + 3 * DAY) for row in rows[5:15]]
    ingest_tables(deliveries(raw, *rows), tmp_path / "once")
    facts = ingest_tables(deliveries(raw, *reversed(again), *rows), tmp_path / "twice")
    assert facts["rows"] == {"read": 30, "later": 0, "written": 20, "left_out": {"repeated": 10}}
    once, twice = (Canonical(tmp_path / name).events() for name in ("once", "twice"))
    assert once.equals(twice)
    assert folder_hash(tmp_path / "once" / "events") == folder_hash(tmp_path / "twice" / "events")


def test_a_label_is_known_since_it_was_last_changed(raw: RawTables, tmp_path: Path) -> None:
    at = [NOON + hours * HOUR for hours in range(6)]
    given = deliveries(
        raw,
        (1, NOON, 1, "tv", at[1]), (1, NOON, 1, "phone", at[2]), (1, NOON, 1, None, at[3]),  # its context changed
        (2, NOON, 1, "tv", at[1]), (2, NOON, 0, "tv", at[2]), (2, NOON, 1, "tv", at[3]), (2, NOON, 1, "tv", at[4]),
        (3, NOON, 1, "tv", at[1]), (3, NOON, 0, "tv", at[2]), (3, NOON, 0, "tv", at[5]),
        (4, NOON, 1, "tv", None), (4, NOON, 1, "phone", at[2]),  # known at once, and still so
    )  # fmt: skip
    ingest_tables(given, tmp_path / "canonical")
    found = Canonical(tmp_path / "canonical").events().to_pylist()
    assert [(e["user_id"], e["label"], e["device"], e["created_at"]) for e in found] == [
        (1, 1, None, at[1]), (2, 1, "tv", at[3]), (3, 0, "tv", at[2]), (4, 1, "phone", None),
    ]  # fmt: skip


def test_a_broken_row_removes_no_whole_one(raw: RawTables, tmp_path: Path) -> None:
    """And a whole one mends the broken ones before it: their day was delivered again."""
    rows = [(user, NOON, user % 2, "tv", NOON + 2 * HOUR) for user in range(100)]
    broken = [(5, NOON, 2, "tv", NOON + 3 * HOUR), (6, NOON, 2, "tv", NOON + HOUR), (7, NOON, 2, "tv", None)]
    given = deliveries(raw, *rows, *broken)
    facts = ingest_tables(given, tmp_path / "canonical")
    assert facts["rows"]["left_out"] == {"label is not 0 or 1": 1, "corrected later": 2}
    assert facts["broken"] == {"label is not 0 or 1": 1}
    assert Canonical(tmp_path / "canonical").events()["label"].to_pylist() == [user % 2 for user in range(100)]
    found = quarantined(tmp_path / "canonical")
    assert found["label is not 0 or 1"]["user_id"].to_pylist() == [5]
    assert found["corrected later"]["user_id"].to_pylist() == [6, 7]


def test_rows_without_a_user_are_no_versions_of_each_other(raw: RawTables, tmp_path: Path) -> None:
    whole = [(user, NOON, 1, "tv", NOON + HOUR) for user in range(300)]
    nobody = [(None, NOON, label, "tv", NOON + hours * HOUR) for label, hours in ((0, 1), (1, 2), (1, 3))]
    given = deliveries(raw, *whole, *nobody)
    given = replace(given, users=pa.table({"user_id": range(-1, 300)}))
    facts = ingest_tables(given, tmp_path / "canonical")
    assert facts["rows"] == {"read": 303, "later": 0, "written": 300, "left_out": {"unknown user": 3}}


FAR = datetime(2099, 1, 1, tzinfo=UTC)
UNTIL = NOON + DAY
NOT_YET = "not known before until"


@pytest.mark.parametrize("until", [UNTIL, None], ids=["until", "no until"])
@pytest.mark.parametrize(
    ("time", "arrival", "fate", "fate_without_until"),
    [
        (UNTIL, UNTIL - HOUR, "happens after it arrived", None),
        (FAR, UNTIL - HOUR, "happens after it arrived", "happens after it arrived"),
        (NOON, FAR, "later than tomorrow", "later than tomorrow"),
        (FAR, None, "later than tomorrow", "later than tomorrow"),
        (FAR, "no column", "later than tomorrow", "later than tomorrow"),
        (None, NOON, "no timestamp", "no timestamp"),
        (None, "no column", "no timestamp", "no timestamp"),
        (None, UNTIL, NOT_YET, "no timestamp"),
        (FAR, UNTIL, NOT_YET, "happens after it arrived"),
        (NOON, UNTIL, NOT_YET, None),
        (UNTIL + HOUR, UNTIL + 2 * HOUR, NOT_YET, None),
        (UNTIL, None, NOT_YET, None),
        (UNTIL, "no column", NOT_YET, None),
    ],
)
def test_every_row_has_a_fate(
    time: datetime | None, arrival: Any, fate: str | None, fate_without_until: str | None, until: datetime | None,
    raw: RawTables, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    whole = [(user, NOON, 1, "tv", None) for user in range(120)]
    given = deliveries(raw, *whole, (130, time, 1, "tv", None if arrival == "no column" else arrival))
    if arrival == "no column":
        given = replace(given, events=given.events.drop_columns("created_at"))
    fate = fate if until else fate_without_until
    broken = {fate: 1} if fate not in (None, NOT_YET) else {}
    facts = ingest_tables(given, tmp_path / "canonical", until and until.isoformat())
    assert facts["rows"] == {
        "read": 121, "later": int(fate == NOT_YET), "written": 120 if fate else 121, "left_out": broken,
    }  # fmt: skip
    assert facts["broken"] == broken
    assert not fate or re.search(rf"{fate} +│ +-1", capsys.readouterr().err)


def test_rows_that_are_not_known_yet_excuse_no_broken_ones(raw: RawTables, tmp_path: Path) -> None:
    rows = [(user, NOON, 1 + user // 99, "tv", NOON) for user in range(100)]
    later = [(user, UNTIL, 1, "tv", UNTIL) for user in range(100)]
    ingest_tables(deliveries(raw, *rows, *later), tmp_path / "canonical", UNTIL.isoformat())
    with pytest.raises(ValueError, match="2 of 101 rows are broken, more than"):
        ingest_tables(
            deliveries(raw, *rows, *later, (8, NOON, 3, "tv", UNTIL - HOUR)), tmp_path / "more", UNTIL.isoformat()
        )


def test_an_adapter_that_loses_rows_is_told(raw: RawTables, tmp_path: Path) -> None:
    torn = {"torn": pa.table({"line": ["?"]})}
    assert ingest_tables(replace(raw, rejected=torn, read=3201), tmp_path / "canonical")["rows"]["read"] == 3201
    with pytest.raises(
        ValueError, match=r"planted: 3200 rows were read, and 3199 came out .* `rejected` or `set_aside`"
    ):
        ingest_tables(replace(raw, events=raw.events.slice(1), read=3200), tmp_path / "lost")


def test_a_later_delivery_changes_no_byte_of_what_was_known(raw: RawTables, tmp_path: Path) -> None:
    until = NOON + DAY
    early = [(user, NOON + user * HOUR, user % 2, "tv", NOON + 9 * HOUR) for user in range(8)]
    early += [(0, NOON, 1, "tv", NOON + 10 * HOUR)]
    late = [(user, NOON + user * HOUR, 1 - user % 2, "tv", until) for user in range(8)]  # all of it corrected
    late += [(9, NOON, 1, "tv", until + HOUR), (5, until, 1, "tv", until)]
    hashes, found = [], []
    for name, rows in {"before": early, "after": [*late[4:], *early, *late[:4]]}.items():
        found.append(ingest_tables(deliveries(raw, *rows), tmp_path / name, until=until.isoformat()))
        (tmp_path / name / "source.json").unlink()  # it counts what is not known yet
        hashes.append(folder_hash(tmp_path / name))
    assert hashes[0] == hashes[1]
    assert [facts.pop("rows") for facts in found] == [
        {"read": 9 + later, "later": later, "written": 8, "left_out": {"corrected later": 1}} for later in (0, 10)
    ]
    assert found[0] == found[1]
    known = ingest_tables(deliveries(raw, *early, *late), tmp_path / "later", until=(until + DAY).isoformat())
    assert known["impressions"] == 10 and folder_hash(tmp_path / "later") != hashes[0]


def by_impression(rows: list[dict[str, Any]]) -> list[list[int]]:
    """The rows of each impression by age, impressions by the place of their oldest."""
    groups: dict[tuple, list[int]] = {}
    for at, row in enumerate(rows):
        groups.setdefault((row["user_id"], row["item_id"], row["timestamp"]), []).append(at)
    for group in groups.values():
        group.sort(key=lambda at: (rows[at]["created_at"] or datetime.min.replace(tzinfo=UTC), at))
    return sorted(groups.values())


def drawn(seed: int, rows: int = 300) -> pa.Table:
    rng = np.random.default_rng(seed)
    return pa.table(
        {
            "user_id": rng.integers(-1, 3, rows), "item_id": rng.integers(0, 4, rows),
            "timestamp": pa.array(rng.integers(0, 4, rows)).cast(TIMESTAMP),
            "label": pa.array(rng.integers(0, 2, rows), pa.int8()),
            "device": pa.array(rng.choice(["a", "b"], rows), mask=rng.random(rows) < 0.3),
            "created_at": pa.array(rng.integers(0, 6, rows), mask=rng.random(rows) < 0.2).cast(TIMESTAMP),
        }
    )  # fmt: skip


@pytest.mark.parametrize(("seed", "rows"), [(0, 300), (1, 300), (2, 300), (3, 1), (4, 0)])
def test_versions_by_the_definition(seed: int, rows: int) -> None:
    table = drawn(seed, rows)
    listed = table.to_pylist()
    wanted: list[dict[str, Any]] = []
    older: dict[str, list[int]] = {"repeated": [], "corrected later": []}
    for group in by_impression(listed):
        newest = since = group[-1]
        for at in reversed(group):
            if listed[at]["label"] != listed[newest]["label"]:
                break
            since = at
        wanted.append(listed[newest] | {"created_at": listed[since]["created_at"]})
        for at, after in pairwise(group):
            equal = all(listed[at][name] == listed[after][name] for name in ("label", "device"))
            older["repeated" if equal else "corrected later"].append(at)
    counted, found = revisions.versions(table)
    assert counted.to_pylist() == wanted and counted.schema == table.schema
    assert {reason: t.to_pylist() for reason, t in found.items()} == {
        reason: [listed[at] for at in sorted(rows)] for reason, rows in older.items()
    }


@pytest.mark.parametrize("seed", range(3))
def test_what_is_mended_by_the_definition(seed: int) -> None:
    broken, whole = drawn(seed, 40), drawn(seed + 10, 60)
    listed = pa.concat_tables([broken, whole]).to_pylist()
    wanted = [False] * len(listed)
    for group in by_impression(listed):
        for place, at in enumerate(group):
            wanted[at] = any(later >= 40 for later in group[place + 1 :])
    assert revisions.mended(broken, whole).tolist() == wanted[:40]
    assert 0 < sum(wanted[:40]) < 40


def test_days_that_never_came_are_told(raw: RawTables, tmp_path: Path) -> None:
    day = pc.strftime(raw.events["timestamp"], format="%d")
    events = raw.events.filter(pc.invert(pc.is_in(day, value_set=pa.array(["03", "04"]))))
    facts = ingest_tables(replace(raw, events=events), tmp_path / "canonical")
    assert facts["unusual_days"] == {"2024-03-03": {"rows": 0}, "2024-03-04": {"rows": 0}}


def test_pictures_come_from_named_hosts_alone(raw: RawTables, tmp_path: Path) -> None:
    """The port is closed. So a request to it fails and counts as broken, and one that is refused is only left out."""
    places = pa.array(["http://127.0.0.1:9/a.png", *[None] * (len(raw.items) - 1)])
    given = replace(raw, items=raw.items.append_column("image", places), modalities={})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "read", lambda *_, **__: given)
        found = ingest.run(replace(ingest_config(), picture_hosts=[]), tmp_path / "refused")
        left_out = {"host is not in ingest.picture_hosts": 1}
        assert found["pictures"] == {"named": 1, "written": 0, "left_out": left_out}
        with pytest.raises(ValueError, match=r"1 of 1 pictures cannot be read.*cannot be opened"):
            ingest.run(replace(ingest_config(), picture_hosts=["127.0.0.1"]), tmp_path / "asked")
