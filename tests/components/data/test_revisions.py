"""What becomes of each row: which version counts, what is set aside, what is not known yet."""

from __future__ import annotations

import re
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
from components.common.contracts import EVENTS, TIMESTAMP, Canonical, attributes
from components.data import revisions
from components.data.sources import RawTables
from components.data.sources.simulator import read
from tests.components.small_world import SIMULATOR, WINDOW, ingest_tables, with_column


@pytest.fixture(scope="module")
def raw() -> RawTables:
    return read("", SIMULATOR, WINDOW)


def no_time(raw: RawTables, rows: int) -> RawTables:
    times = raw.events["timestamp"].to_pylist()
    return replace(raw, events=with_column(raw.events, "timestamp", [*[None] * rows, *times[rows:]]))


def quarantined(canonical: Path) -> dict[str, pa.Table]:
    tables = [pq.read_table(file) for file in sorted((canonical / "quarantine").glob("*.parquet"))]
    return {table["reason"][0].as_py(): table for table in tables}


def test_a_few_broken_rows_go_to_quarantine(raw: RawTables, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = ingest_tables(no_time(raw, 2), tmp_path / "canonical")
    assert facts["rows"] == {"read": 3200, "later": 0, "outside": 0, "written": 3198, "left_out": {"no timestamp": 2}}
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
    assert facts["rows"] == {
        "read": 3204,
        "later": 0,
        "outside": 0,
        "written": 3200,
        "left_out": {"torn": 1, "rating of 3": 3},
    }
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
    assert facts["rows"] == {
        "read": 10,
        "later": 0,
        "outside": 0,
        "written": 6,
        "left_out": {"repeated": 1, "corrected later": 3},
    }
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
    assert facts["rows"] == {"read": 30, "later": 0, "outside": 0, "written": 20, "left_out": {"repeated": 10}}
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
    assert facts["rows"] == {"read": 303, "later": 0, "outside": 0, "written": 300, "left_out": {"unknown user": 3}}


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
        "read": 121, "later": int(fate == NOT_YET), "outside": 0, "written": 120 if fate else 121, "left_out": broken,
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
        {"read": 9 + later, "later": later, "outside": 0, "written": 8, "left_out": {"corrected later": 1}}
        for later in (0, 10)
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
