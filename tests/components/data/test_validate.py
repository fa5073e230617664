"""validate: every planted fault is found, named and shown; clean data passes; nothing runs on what did not pass."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.common.artifacts import folder_hash, write_json
from components.common.contracts import HISTORIES, HISTORY, Canonical
from components.common.splits import SplitConfig
from components.common.verdict import require
from components.data import ingest, rules, validate
from components.data.frames import days as frames_of_days
from components.data.frames.columns import column_frame, tells_label
from components.data.frames.days import day_frame, figure_frame, recent_days
from components.data.frames.rows import event_frame
from components.data.frames.vectors import vector_frame
from components.data.sources import RawTables, simulator
from components.data.sources.files import TableConfig
from components.data.thresholds import CHANCE, FLOORS, SIGMA, ValidateConfig
from components.features import embed, features, views
from tests.components.small_world import (
    NO_FILES,
    SIMULATOR,
    UNTIL,
    VALIDATE,
    WINDOW,
    ingest_config,
    ingest_simulator,
    ingest_tables,
    with_column,
)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ingest_simulator(tmp_path_factory.mktemp("clean") / "canonical")


@dataclass
class Judged:
    """What validate said of a folder: the error's text ("" where it passed), the report, the Data Docs."""

    error: str
    report: dict
    report_file: Path
    docs: Path

    @property
    def broken(self) -> set[str]:
        """table.column: rule of every broken rule that stops, and `?` before one that does not."""
        return {
            "?" * (rule["severity"] != "stop")
            + f"{rule['table']}.{rule['column']}: {rule['rule'].removeprefix('expect_')}"
            for rule in self.report["rules"]
            if not rule["passed"]
        }

    def rule(self, table: str, column: str) -> dict:
        (found,) = (r for r in self.report["rules"] if (r["table"], r["column"]) == (table, column) and not r["passed"])
        return found

    def examples(self, table: str, column: str) -> list[dict]:
        return self.rule(table, column)["examples"]


def judged(canonical: Path, config: ValidateConfig = VALIDATE) -> Judged:
    report, docs = (canonical.with_name(f"{canonical.name}-{name}") for name in ("report.json", "docs"))
    error = ""
    try:
        validate.run(config, canonical, report, docs)
    except ValueError as raised:
        error = str(raised)
    return Judged(error, json.loads(report.read_text()), report, docs)


@dataclass
class Planter:
    """A copy of the clean folder, and the ways to spoil it."""

    root: Path

    def edit(self, name: str, change: Callable[[pa.Table], pa.Table]) -> None:
        pq.write_table(change(pq.read_table(self.root / name, partitioning=None)), self.root / name)

    def day(self, day: str, change: Callable[[pa.Table], pa.Table]) -> None:
        self.edit(f"events/day={day}/part-0.parquet", change)

    def until(self, until: str | None) -> None:
        facts = json.loads((self.root / "source.json").read_text())
        write_json(self.root / "source.json", facts | {"until": until})


def put(column: str, values: dict[int, object]) -> Callable[[pa.Table], pa.Table]:
    """Replace the values of some rows of a column."""

    def change(table: pa.Table) -> pa.Table:
        found = table[column].to_pylist()
        for row, value in values.items():
            found[row] = value
        return with_column(table, column, found)

    return change


@pytest.fixture(scope="module")
def planter(clean: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Planter]:
    def make() -> Planter:
        root = tmp_path_factory.mktemp("planted") / "canonical"
        shutil.copytree(clean, root)
        return Planter(root)

    return make


@pytest.fixture(scope="module")
def passed(clean: Path) -> Judged:
    return judged(clean)


def pages(docs: Path) -> str:
    return (docs / "index.html").read_text() + " ".join(f.as_posix() for f in docs.rglob("*.html"))


def test_clean_data_passes_every_rule(passed: Judged, clean: Path) -> None:
    assert passed.error == "" and passed.report["passed"] is True and passed.broken == set()
    tables = {"events", "days", "figures", "columns", "items", "users", "quarantine", "freshness", "newest day"}
    tables |= {f"{kind} {name}" for kind in ("modality", "coverage", "new items") for name in ("text", "image")}
    assert {rule["table"] for rule in passed.report["rules"]} == tables == passed.report["rows"].keys()
    assert passed.report["rows"]["events"] == Canonical(clean).events().num_rows
    assert passed.report["not_judged"] == []
    require(passed.report_file, clean)
    for table in tables:  # the Data Docs show each table's result
        assert f"/canonical-{table}.html" in pages(passed.docs)
    assert "Failed" not in (passed.docs / "index.html").read_text()


# ---- one row, one cell: a folder holds several faults that do not hide each other --------------------------------


@pytest.fixture(scope="module")
def cells(planter: Callable[[], Planter]) -> Judged:
    """NaN, infinity, wrong label, strangers, a repeated id, a misplaced event."""
    planted = planter()
    planted.edit("modalities/text.parquet", put("vector", {4: [0.1, float("nan"), 0, 0, 0, 1.0]}))
    planted.edit(
        "modalities/image.parquet", put("vector", {7: [float("inf")] + [1.0] * 4, 9: [float("-inf")] * 4 + [1.0]})
    )
    planted.day("2024-03-02", put("label", {0: 2, 1: -1, 5: 3, 6: 4}))
    planted.day("2024-03-03", put("item_id", {2: 4_242}))
    planted.day("2024-03-03", put("propensity", {0: 0.0, 1: 1.5, 4: -0.1}))
    planted.day("2024-03-03", put("position", {5: 0}))
    planted.day("2024-03-04", put("user_id", {3: 9_999}))
    planted.edit("items.parquet", lambda t: pa.concat_tables([t, t.slice(10, 1)]))
    moved = pq.read_table(planted.root / "events/day=2024-03-05/part-0.parquet", partitioning=None).slice(0, 1)
    planted.day("2024-03-06", lambda t: pa.concat_tables([t, moved]))
    return judged(planted.root)


def test_each_spoiled_cell_is_found_and_nothing_else(cells: Judged) -> None:
    assert cells.report["passed"] is False
    assert cells.broken == {
        "modality text.non_finite_values: column_values_to_be_between",
        "modality image.non_finite_values: column_values_to_be_between",
        "events.label: column_values_to_be_in_set",
        "events.propensity: column_values_to_be_between",
        "events.position: column_values_to_be_between",
        "events.item_is_known: column_values_to_be_in_set",
        "events.user_is_known: column_values_to_be_in_set",
        "events.is_in_its_day: column_values_to_be_in_set",
        "items.item_id: column_values_to_be_unique",
    }


@pytest.mark.parametrize(
    ("table", "column", "rows", "shows"),
    [
        ("modality text", "non_finite_values", 1, [{"row": 4, "non_finite_values": 1, "length": 6}]),
        ("modality image", "non_finite_values", 2,
         [{"row": 7, "non_finite_values": 1}, {"row": 9, "non_finite_values": 4}]),
        ("events", "label", 4, [{"row": 400, "label": 2}, {"row": 401, "label": -1}, {"row": 405, "label": 3}]),
        ("events", "propensity", 3, [{"row": 800, "propensity": 0.0}, {"row": 801, "propensity": 1.5}, {"row": 804}]),
        ("events", "position", 1, [{"row": 805, "position": 0}]),
        ("events", "item_is_known", 1, [{"row": 802, "item_id": 4_242}]),
        ("events", "user_is_known", 1, [{"row": 1203, "user_id": 9_999}]),
        ("events", "is_in_its_day", 1, [{"row": 2400}]),
        ("items", "item_id", 2, [{"row": 10}, {"row": 94}]),
    ],
)  # fmt: skip
def test_a_spoiled_cell_is_shown(table: str, column: str, rows: int, shows: list[dict], cells: Judged) -> None:
    verdict = cells.rule(table, column)
    assert verdict["severity"] == "stop" and verdict["broken_rows"] == rows
    examples = verdict["examples"]
    assert [{k: e[k] for k in wanted} for e, wanted in zip(examples, shows, strict=True)] == shows
    (line,) = (line for line in cells.error.splitlines() if line.strip().startswith(f"{table}.{column}: "))
    assert verdict["rule"] in line and f"{rows} row(s), e.g. " in line
    for example in examples:
        assert all(f"{key!r}: {value!r}" in line for key, value in example.items())


def test_the_error_says_where_to_look(cells: Judged) -> None:
    assert f"breaks 9 rule(s); Data Docs: {cells.docs}/index.html" in cells.error
    assert "Failed" in (cells.docs / "index.html").read_text()
    assert "every event's item_id is in items" in cells.error  # in words too


@pytest.fixture(scope="module")
def rows(planter: Callable[[], Planter]) -> Judged:
    """Whole rows: a future time, nulls, lengths, zero and stranger's vectors, a repeated user, repeated impressions."""
    planted = planter()
    planted.day("2024-03-08", put("timestamp", {0: datetime(2024, 3, 9, 5, tzinfo=UTC)}))
    planted.day("2024-03-07", put("label", {0: None}))
    planted.day("2024-03-06", lambda t: pa.concat_tables([t, t.slice(0, 30)]))
    planted.edit("modalities/text.parquet", put("vector", {2: [1.0, 2.0], 3: []}))
    planted.edit("modalities/image.parquet", put("vector", {0: [0.0] * 5}))
    planted.edit("modalities/image.parquet", put("item_id", {1: 77}))
    planted.edit("users.parquet", lambda t: pa.concat_tables([t, t.slice(3, 1)]))
    return judged(planted.root)


def test_spoiled_rows_are_found_and_nothing_else(rows: Judged) -> None:
    assert rows.broken == {
        "events.timestamp: column_values_to_be_between",
        "events.is_in_its_day: column_values_to_be_in_set",  # the future lies in another partition, too
        "events.label: column_values_to_not_be_null",
        "?events.is_first: column_values_to_be_in_set",
        "modality text.is_usual_length: column_values_to_be_in_set",
        "?modality text.norm: column_values_to_be_between",  # the empty vector, more than one in a hundred
        "modality text.norm: column_values_to_be_between",
        "modality image.norm: column_values_to_be_between",
        "figures.repeated: column_values_to_be_between",
        "modality image.item_is_known: column_values_to_be_in_set",
        "?modality image.norm: column_values_to_be_between",
        "users.user_id: column_values_to_be_unique",
    }
    assert rows.report["passed"] is False
    (future,) = rows.examples("events", "timestamp")
    assert future["timestamp"].startswith("2024-03-09 05:00")
    assert [(e["row"], e["length"]) for e in rows.examples("modality text", "is_usual_length")] == [(2, 2), (3, 0)]
    assert rows.rule("events", "is_first")["broken_rows"] == 30
    assert len(rows.examples("events", "is_first")) == validate.EXAMPLES
    assert [e["item_id"] for e in rows.examples("modality image", "item_is_known")] == [77]
    assert "breaks 9 rule(s)" in rows.error  # warnings are none of them
    assert "events.is_first:" not in rows.error and "is all zeros" not in rows.error
    assert "modality text.is_usual_length: expect_column_values_to_be_in_set" in rows.error
    assert "all text vectors have one length" in rows.error


def test_a_warning_alone_stops_nothing(planter: Callable[[], Planter], caplog: pytest.LogCaptureFixture) -> None:
    planted = planter()
    planted.edit("modalities/image.parquet", lambda t: t.slice(0, 30))
    planted.edit("items.parquet", put("title", {3: None}))
    found = judged(planted.root)
    assert found.error == "" and found.report["passed"] is True
    assert found.broken == {
        "?coverage image.missing_share: column_values_to_be_between",
        "?items.title: column_values_to_not_be_null",
    }
    assert "coverage image.missing_share" in caplog.text and "'missing_share': 0.68" in caplog.text
    assert "items.title" in caplog.text


# ---- days -------------------------------------------------------------------------------------------------------


def test_an_empty_day_and_a_jump_of_the_label_rate(planter: Callable[[], Planter]) -> None:
    planted = planter()
    shutil.rmtree(planted.root / "events/day=2024-03-05")
    planted.day("2024-03-07", lambda t: with_column(t, "label", [1] * len(t)))
    found = judged(planted.root)
    assert found.broken == {
        "days.rows_if_judged: column_values_to_be_between",
        "days.label_rate: column_values_to_be_between",
        "figures.label_rate: column_values_to_be_between",
    }
    (empty,) = found.examples("days", "rows_if_judged")
    assert empty["day"].startswith("2024-03-05") and empty["rows"] == 0
    (jump,) = found.examples("days", "label_rate")
    assert jump["day"].startswith("2024-03-07") and jump["label_rate"] == 1.0
    assert "no day among the newest is empty" in found.error and "2024-03-05" in found.error


def test_a_thin_day_and_stale_data(planter: Callable[[], Planter]) -> None:
    planted = planter()
    planted.day("2024-03-06", lambda t: t.take(list(range(0, 400, 10))))
    planted.until("2024-03-10T12:00:00+00:00")
    found = judged(planted.root)
    assert found.broken == {
        "newest day.is_whole: column_values_to_be_in_set",
        "figures.volume: column_values_to_be_between",
        "days.rows_if_judged: column_values_to_be_between",  # the day before `until` has no event
        "freshness.age_hours: column_values_to_be_between",
    }
    (thin,) = found.examples("figures", "volume")
    assert thin["day"].startswith("2024-03-06") and thin["figure"] == "volume"
    assert (thin["value"], thin["usual"]) == (pytest.approx(np.log(40)), pytest.approx(np.log(400)))
    assert thin["off"] == pytest.approx(-np.log(10) / (np.log(2) + 4 / np.sqrt(40)))
    # each day is beside the days before it, never beside itself
    config = replace(VALIDATE, trailing_days=2)
    frame = day_frame(recent_days(Canonical(planted.root), config, None), config)
    assert frame["usual_rows"].tolist() == [220, 220] and frame["rows"].tolist() == [400, 400]
    (stale,) = found.examples("freshness", "age_hours")
    assert 36 < stale["age_hours"] < 37
    assert "freshness.age_hours: expect_column_values_to_be_between {'max_value': 36" in found.error


def test_the_judged_days(clean: Path) -> None:
    """The calendar's newest days, each beside the median of those before it."""
    data = Canonical(clean)
    until = datetime(2024, 3, 9, tzinfo=UTC)

    def days(config: ValidateConfig = VALIDATE, until: datetime | None = until) -> pd.DataFrame:
        return day_frame(recent_days(data, config, until), config)

    frame = days()
    assert list(frame["day"].dt.day) == [4, 5, 6, 7, 8]
    assert (frame["rows"] == 400).all() and (frame["usual_rows"] == 400).all()
    label = data.events()["label"].to_numpy().reshape(8, 400)
    assert frame["label_rate"].to_numpy() == pytest.approx(label.mean(axis=1)[3:])
    # an hour into a day, that day is not due yet; at its end it is
    assert days(until=until + timedelta(hours=1))["day"].dt.day.max() == 8
    assert days(until=until + timedelta(days=1))["day"].dt.day.max() == 9
    # a volume that says nothing is not judged
    config = replace(VALIDATE, min_day_rows=401)
    assert days(config)[["rows_if_judged", "label_rate"]].isna().all(axis=None)
    assert figure_frame(recent_days(data, config, until), data, config).empty


@pytest.mark.parametrize("hour", [6, 12])
def test_a_day_that_is_not_over_is_not_judged(hour: int, tmp_path: Path) -> None:
    """Neither at `until`, nor, where that is null, where its events end much earlier than those of other days."""
    now = datetime(2024, 3, 8, hour, tzinfo=UTC)
    facts = ingest.run(ingest_config(until=now.isoformat(), window_days=8), tmp_path / "canonical")
    assert facts["last_day"] == "2024-03-08" and 7 * 400 < facts["impressions"] < 7.6 * 400
    found = judged(tmp_path / "canonical")
    assert (found.error, found.broken) == ("", set())
    assert found.report["not_judged"] == ["days: 2024-03-08 is not complete"]
    assert found.report["rows"]["events"] == facts["impressions"]  # its rows are, one by one

    Planter(tmp_path / "canonical").until(None)
    found = judged(tmp_path / "canonical")
    assert (found.error, found.broken) == ("", set())
    assert found.report["not_judged"] == ["freshness: ingest.until is null", "days: 2024-03-08 is not complete"]


def test_a_first_day_that_is_not_over(tmp_path: Path) -> None:
    ingest.run(ingest_config(until="2024-03-01T20:00:00+00:00", window_days=1), tmp_path / "canonical")
    found = judged(tmp_path / "canonical")
    assert found.error == "" and "days: 2024-03-01 is not complete" in found.report["not_judged"]


def jumping() -> RawTables:
    """Users come one after the other, until on the last day all are there, and clicks are as likely as not."""
    raw = simulator.read("", SIMULATOR, WINDOW)
    last = np.arange(len(raw.events)) >= 7 * 400
    rng = np.random.default_rng(0)
    user, label = (raw.events[name].to_numpy() for name in ("user_id", "label"))
    user = np.where(last, user, np.sort(user))
    label = np.where(last, rng.random(len(last)) < 0.6, label)
    return replace(raw, events=with_column(with_column(raw.events, "user_id", user), "label", label.astype(np.int8)))


def timeless(raw: RawTables) -> RawTables:
    """The same as of a source whose times are an order and no more."""
    events = raw.events
    for name in HISTORY:
        events = events.append_column(name, pa.repeat(pa.scalar(0, pa.int64()), len(events)))
    return replace(raw, events=events, histories=HISTORIES.empty_table())


def test_days_are_held_to_each_other_where_there_are_days(tmp_path: Path) -> None:
    ingest_tables(jumping(), tmp_path / "timed")
    assert judged(tmp_path / "timed").broken == {
        "figures.label_rate: column_values_to_be_between",
        "figures.returning: column_values_to_be_between",
    }
    ingest_tables(timeless(jumping()), tmp_path / "timeless")
    found = judged(tmp_path / "timeless")
    assert (found.error, found.broken) == ("", set())
    assert "figures: no day has enough days before it to know what is usual" in found.report["not_judged"]
    assert found.report["rows"]["days"] == 1  # of all rows, for its share of clicks and what tells them


def test_what_tells_the_label_of_a_timeless_source(tmp_path: Path) -> None:
    raw = timeless(jumping())
    rank = np.where(np.random.default_rng(1).random(len(raw.events)) < 0.05, 0, raw.events["label"].to_numpy())
    events = raw.events.append_column("rank", pa.array(rank).cast(pa.string()))
    ingest_tables(replace(raw, events=events), tmp_path / "canonical")
    assert judged(tmp_path / "canonical").broken == {"columns.tells_label: column_values_to_be_between"}
    ingest_tables(replace(raw, events=with_column(raw.events, "label", [0] * len(events))), tmp_path / "none")
    assert judged(tmp_path / "none").broken == {"days.label_rate: column_values_to_be_between"}


def test_figures_equal_those_computed_one_by_one(clean: Path) -> None:
    data, until = Canonical(clean), datetime(2024, 3, 9, tzinfo=UTC)
    frame = figure_frame(recent_days(data, VALIDATE, until), data, VALIDATE)
    events = data.events().to_pandas()
    events["day"] = events["timestamp"].dt.day
    events = events.merge(data.users().to_pandas(), on="user_id")
    day, before = events[events["day"] == 7], events[events["day"].between(2, 6)]

    def figure(name: str, of: str = "") -> pd.Series:
        (row,) = frame[(frame["figure"] == name) & (frame["of"] == of) & (frame["day"].dt.day == 7)].to_dict("records")
        assert row["off"] == pytest.approx((row["value"] - row["usual"]) / row["allowed"])
        return row

    def distance(one: pd.Series, other: pd.Series) -> float:
        return one.value_counts(normalize=True).sub(other.value_counts(normalize=True), fill_value=0).abs().sum() / 2

    for of in ("device", "age_group", "region"):
        assert figure("mix", of)["value"] == pytest.approx(distance(day[of], before[of]))
        assert figure("missing", of)["value"] == 0
    assert figure("hours")["value"] == pytest.approx(distance(day["timestamp"].dt.hour, before["timestamp"].dt.hour))
    known = events[events["day"] < 7]["user_id"]
    assert figure("returning")["value"] == pytest.approx(day["user_id"].isin(known).mean())
    assert figure("top_user")["value"] == pytest.approx(day["user_id"].value_counts().max() / len(day))
    assert figure("top_item")["value"] == pytest.approx(day["item_id"].value_counts().max() / len(day))
    assert figure("volume")["value"] == pytest.approx(np.log(400))
    clicks = events.groupby("day")["label"].sum().astype(int)
    odds = np.log((clicks + 0.5) / (400 - clicks + 0.5))
    rate = figure("label_rate")
    assert rate["value"] == pytest.approx(odds[7]) and rate["usual"] == pytest.approx(odds.loc[2:6].median())
    spread = (odds.loc[2:6] - odds.loc[2:6].median()).abs().median()
    p = (clicks.sum() + 0.5) / (8 * 400 + 1)  # of the eight days, all of which are among twice `trailing_days`
    chance = CHANCE / np.sqrt(400 * p * (1 - p))
    assert rate["allowed"] == pytest.approx(FLOORS["label_rate"] + 5 * SIGMA * spread + chance)


def told_one_by_one(code: np.ndarray, label: np.ndarray) -> float:
    """Each row's label beside the mean of the other rows of its value, by pandas."""
    rows = pd.DataFrame({"code": code, "label": label})
    rows = rows[rows.duplicated("code", keep=False)]
    group = rows.groupby("code")["label"]
    others = (group.transform("sum") - rows["label"]) / (group.transform("size") - 1)
    away = rows["label"] - rows["label"].mean()
    return float(np.sqrt(max(0, (away * (others - rows["label"].mean())).sum() / (away**2).sum())))


def test_how_well_a_feature_predicts_the_label(clean: Path) -> None:
    """On the day where it is highest, or over all judged days."""
    data = Canonical(clean)
    recent = recent_days(data, VALIDATE, None)
    found = column_frame(recent, data, VALIDATE).set_index("column")["tells_label"]
    events = data.events().to_pandas().merge(data.users().to_pandas(), on="user_id", how="left")
    day = events["timestamp"].dt.day
    for name in ("device", "region", "age_group"):
        parts = [events[day == one] for one in range(4, 9)] + [events[day >= 4]]
        wanted = max(told_one_by_one(part[name], part["label"]) for part in parts)
        assert found[name] == pytest.approx(wanted)


def test_how_well_columns_of_many_values_predict_the_label() -> None:
    """Values that say nothing stay near 0 and copies of the label come to 1, however few rows a value has."""
    rng = np.random.default_rng(0)
    label = (rng.random(20_000) < 0.2).astype(np.int8)
    for values in (2, 500, 5_000, 20_000):
        nothing = rng.integers(0, values, len(label))
        assert tells_label(nothing, label, 200) < 0.2
        assert tells_label(2 * nothing + label, label, 200) == pytest.approx(1)
    few = rng.permutation(20_000) // 2  # every value twice
    assert tells_label(few, label, 200) == pytest.approx(told_one_by_one(few, label))
    assert tells_label(2 * few + label, label, 200) == pytest.approx(1)
    assert tells_label(np.arange(20_000), label, 200) == 0  # no value comes again: no model can learn from it
    two = np.where(np.arange(20_000) < 2, 0, np.arange(20_000)) * 2 + label
    assert tells_label(two, label, 200) == 0  # and two rows are too few to say anything


def tabular(rows: int, seed: int, leak: bool = False) -> pa.Table:
    """The README's tabular data with a user and an item of thousands of values; users differ in how often they click.
    The leak is a session of a few rows whose name follows from the label."""
    rng = np.random.default_rng(seed)
    world = np.random.default_rng(99)
    taste, charm = world.normal(0, 4.5, 3_000), world.normal(0, 0.7, 2_000)
    user, item = rng.integers(0, len(taste), rows), rng.integers(0, len(charm), rows)
    label = rng.random(rows) < 1 / (1 + np.exp(-taste[user] - charm[item]))
    session = 2 * rng.integers(0, 5_000, rows) + (label if leak else rng.integers(0, 2, rows))
    return pa.table(
        {
            "label": label.astype(np.int8),
            "user": [f"{value:08x}" for value in user],
            "item": [f"{value:08x}" for value in item],
            "session": [f"{value:08x}" for value in session],
        }
    )


@pytest.mark.parametrize("leak", [False, True])
def test_tabular_data_with_thousands_of_users_and_items(leak: bool, tmp_path: Path) -> None:
    """A user's clicks say much about that user's next one; that is no leak. A session named after the label is."""
    (tmp_path / "raw").mkdir()
    for seed, (part, rows) in enumerate({"train": 16_000, "valid": 2_000, "test": 2_000}.items()):
        pq.write_table(tabular(rows, seed, leak), tmp_path / "raw" / f"{part}.parquet")
    table = TableConfig(
        path={part: f"{part}.parquet" for part in ("train", "valid", "test")},
        columns={}, categorical=["user", "item", "session"], numeric=[],
    )  # fmt: skip
    config = ingest_config("files", str(tmp_path / "raw"), None, replace(NO_FILES, events=table))
    ingest.run(config, tmp_path / "canonical")
    found = judged(tmp_path / "canonical")
    if not leak:
        assert (found.error, found.broken) == ("", set())
        return
    assert found.broken == {"columns.tells_label: column_values_to_be_between"}
    (example,) = found.examples("columns", "tells_label")
    assert example["column"] == "session" and example["tells_label"] == pytest.approx(1)
    assert "leave it out of the data if it is only known after the click, or raise validate.max_label_leak" in (
        found.error
    )
    assert judged(tmp_path / "canonical", replace(VALIDATE, max_label_leak=1.0)).error == ""  # the remedy that it names


def test_a_leak_whose_values_repeat_over_days_alone(clean: Path, tmp_path: Path) -> None:
    """A name that each day has once: no day shows the leak, the days together do."""
    raw = simulator.read("", SIMULATOR, WINDOW)
    label = raw.events["label"].to_numpy()
    day = raw.events["timestamp"].to_numpy().astype("datetime64[D]").astype(int)
    rank = pd.Series(label).groupby([day, label]).cumcount().to_numpy()
    events = raw.events.append_column("ticket", pa.array(2 * rank + label).cast(pa.string()))
    ingest_tables(replace(raw, events=events), tmp_path / "canonical", UNTIL)
    assert judged(tmp_path / "canonical").broken == {"columns.tells_label: column_values_to_be_between"}
    thin = replace(VALIDATE, min_day_rows=500)  # no day has enough rows; the newest five together have
    assert judged(tmp_path / "canonical", thin).broken == {"columns.tells_label: column_values_to_be_between"}


def test_vector_frame_equals_rows_computed_one_by_one() -> None:
    rng = np.random.default_rng(0)
    vectors = [None if i % 5 == 0 else rng.normal(size=3 + (i == 7)).tolist() for i in range(20)]
    vectors[3], vectors[4] = [0.0] * 3, [float("nan"), float("inf"), 2.0]
    table = pa.table({"item_id": range(20), "vector": pa.array(vectors, pa.list_(pa.float32()))})
    frame = vector_frame(table, pa.chunked_array([pa.array(range(19))]), 5.0)
    present = [i for i in range(20) if vectors[i] is not None]
    assert frame["item_id"].tolist() == present
    assert frame["item_is_known"].tolist() == [i < 19 for i in present]
    assert frame["is_usual_length"].tolist() == [i != 7 for i in present]
    assert frame["non_finite_values"].tolist() == [2 if i == 4 else 0 for i in present]
    norms = [np.linalg.norm([v for v in vectors[i] if np.isfinite(v)]) for i in present]
    assert frame["norm"].to_numpy() == pytest.approx(norms, rel=1e-6)
    log = np.log([norm or np.nan for norm in norms])
    away = log - np.nanmedian(log)
    allowed = np.log(4) + 5 * SIGMA * np.nanmedian(np.abs(away))
    assert frame["off"].to_numpy() == pytest.approx(away / allowed, abs=1e-6, nan_ok=True)
    assert frame["off"].isna().tolist() == [i == 3 for i in present]  # of zeros there is no logarithm
    assert vector_frame(table.slice(0, 1), pa.chunked_array([pa.array([0])]), 5.0).empty


# ---- what may go on ---------------------------------------------------------------------------------------------


def test_require_takes_only_a_report_of_these_bytes_that_passed(
    passed: Judged, clean: Path, cells: Judged, planter: Callable[[], Planter], tmp_path: Path
) -> None:
    spoiled = cells.report_file.with_name("canonical")
    with pytest.raises(ValueError, match=r"\.json: the data did not pass; correct them and run `dvc repro validate`"):
        require(cells.report_file, spoiled)
    planted = planter()
    require(passed.report_file, planted.root)
    planted.day("2024-03-08", lambda t: t.slice(1))
    with pytest.raises(ValueError, match=r"is about other data than .* holds now; run `dvc repro validate`"):
        require(passed.report_file, planted.root)
    with pytest.raises(ValueError, match="is not there; run `dvc repro validate`"):
        require(tmp_path / "report.json", clean)


def test_later_stages_refuse_what_did_not_pass(cells: Judged, tmp_path: Path) -> None:
    canonical = cells.report_file.with_name("canonical")
    kept = tmp_path / "features" / "receipt.json"
    kept.parent.mkdir()
    kept.write_text("{}")
    with pytest.raises(ValueError, match="the data did not pass"):
        embed.run(
            embed.EmbedConfig(
                dim=4, text_features=100, text_dim=8, text_encoder=None, image_encoder=None, seed=1, fit=None
            ),
            SplitConfig(valid_share=0.1, test_share=0.1),
            canonical,
            cells.report_file,
            tmp_path / "embedding",
        )
    with pytest.raises(ValueError, match="the data did not pass"):
        features.run(
            views.FeaturesConfig(availability_lag_seconds=0, popularity_days=7, history_length=5),
            canonical,
            cells.report_file,
            tmp_path / "embedding",
            kept.parent,
        )
    assert [file.name for file in tmp_path.iterdir()] == ["features"]
    assert kept.is_file()  # a refusal takes nothing away


def test_without_until_no_rule_follows_the_clock(clean: Path) -> None:
    columns = event_frame(Canonical(clean)).columns
    (limit,) = (
        r for r in rules.event_rules(None, columns) if r.column == "timestamp" and "between" in r.expectation_type
    )
    assert limit.min_value is not None and limit.max_value is None


def test_events_are_judged_column_by_column(clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Great Expectations maps a Python function over the values of a column whose type it does not know: float32."""
    tables = validate.suites(VALIDATE, Canonical(clean), json.loads((clean / "source.json").read_text()))

    def one_by_one(self: pd.Series, *_: Any, **__: Any) -> None:
        raise AssertionError(f"{self.name} is judged one value at a time")

    monkeypatch.setattr(pd.Series, "map", one_by_one)
    verdicts = validate.judge({"events": tables["events"]}, tmp_path / "docs")
    assert {"true_probability", "propensity", "position"} < {verdict["column"] for verdict in verdicts}
    assert all(verdict["passed"] for verdict in verdicts)


# ---- the newest day ---------------------------------------------------------------------------------------------


WHOLE = "newest day.is_whole: column_values_to_be_in_set"


def newest(planted: Planter) -> dict[str, Any]:
    """What is said of the newest day, without Great Expectations."""
    data = Canonical(planted.root)
    until = datetime(2024, 3, 9, tzinfo=UTC)
    (row,) = frames_of_days.newest_frame(recent_days(data, VALIDATE, until), data, VALIDATE).to_dict("records")
    return row


def test_the_newest_day_is_whole_missing_half_there_or_cut(planter: Callable[[], Planter]) -> None:
    planted = planter()
    assert newest(planted)["is_whole"] and newest(planted)["why"] == ""
    planted.day("2024-03-08", lambda t: t.slice(0, 300))  # its evening is missing: fewer rows by a quarter
    last = newest(planted)
    assert not last["is_whole"] and "hours before midnight, usually 0." in last["why"]
    planted.day("2024-03-08", lambda t: t.take(list(range(0, 300, 5))))
    assert newest(planted)["why"] == "60 rows, usually 400"
    shutil.rmtree(planted.root / "events/day=2024-03-08")
    assert newest(planted)["why"] == "no event" and newest(planted)["rows"] == 0


def test_a_day_that_came_in_part_stops_the_run_or_is_told(planter: Callable[[], Planter]) -> None:
    planted = planter()
    planted.day("2024-03-08", lambda t: t.slice(0, 100))
    found = judged(planted.root)
    assert WHOLE in found.broken and "'day': '2024-03-08" in found.error and "100 rows, usually 400" in found.error
    assert "run it when the rest has come" in found.error and "ingest.missing_day to go_on" in found.error
    facts = json.loads((planted.root / "source.json").read_text())
    write_json(planted.root / "source.json", facts | {"missing_day": "go_on"})
    found = judged(planted.root)
    assert (found.error, found.broken) == ("", {f"?{WHOLE}"})
    assert found.report["not_judged"][0] == (
        "days: 2024-03-08 is not whole (100 rows, usually 400): see ingest.missing_day"
    )


def test_until_beyond_the_data_stops_the_run(planter: Callable[[], Planter]) -> None:
    planted = planter()
    planted.until("2024-03-10T00:00:00+00:00")  # the newest event is 24 hours old, which is fresh enough
    found = judged(planted.root)
    assert WHOLE in found.broken and "freshness.age_hours" not in str(found.broken)
    assert "2024-03-09" in found.error and "no event" in found.error


def test_without_until_old_data_are_told_and_the_clock_is_in_no_output(
    planter: Callable[[], Planter], caplog: pytest.LogCaptureFixture
) -> None:
    planted = planter()
    planted.until(None)
    first = judged(planted.root)
    assert first.error == "" and "the newest event is of 2024-03-08, " in caplog.text
    days = (datetime.now(UTC) - datetime(2024, 3, 8, tzinfo=UTC)).days
    assert f"{days:,} days ago" in str(validate.old_data(json.loads((planted.root / "source.json").read_text())))
    before = (folder_hash(first.docs), first.report_file.read_bytes())
    second = judged(planted.root)
    assert (folder_hash(second.docs), second.report_file.read_bytes()) == before
    assert validate.old_data({"until": UNTIL, "last_day": "2024-03-08"}) is None


# ---- several at once --------------------------------------------------------------------------------------------


def judge_at_once(started: Any, canonical: Path, report: Path, docs: Path) -> None:
    from great_expectations import get_context  # noqa: F401  seconds, before all start together

    started.wait(120)
    with contextlib.suppress(ValueError):
        validate.run(VALIDATE, canonical, report, docs)


@pytest.mark.slow
def test_several_validations_at_once_do_not_meet(passed: Judged, clean: Path, cells: Judged, tmp_path: Path) -> None:
    """Two of one project with outputs of their own, and one of another project: each says what it says alone."""
    spoiled = cells.report_file.with_name("canonical")
    jobs = {"one": clean, "two": clean, "other": spoiled}
    spawn = get_context("spawn")
    started = spawn.Barrier(len(jobs))
    running = [
        spawn.Process(target=judge_at_once, args=(started, folder, tmp_path / f"{name}.json", tmp_path / name))
        for name, folder in jobs.items()
    ]
    for process in running:
        process.start()
    for process in running:
        process.join(300)
        assert process.exitcode == 0
    for name, alone in {"one": passed, "two": passed, "other": cells}.items():
        assert json.loads((tmp_path / f"{name}.json").read_text()) == alone.report
        shown = pages(tmp_path / name)
        assert all(f"/canonical-{table}.html" in shown for table in alone.report["rows"])
        assert ("Failed" in (tmp_path / name / "index.html").read_text()) == (name == "other")


def test_a_quarantine_is_told_and_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What ingest left out is in the report, by reason and with a row; the rows that stayed pass."""
    raw = simulator.read("", SIMULATOR, WINDOW)
    labels = raw.events["label"].to_numpy().copy()
    labels[[5, 700]] = 2
    raw = replace(raw, events=put("user_id", {9: 4})(with_column(raw.events, "label", labels)))
    facts = ingest_tables(raw, tmp_path / "canonical", "2024-03-08T00:00:00+00:00")
    assert facts["broken"] == {"label is not 0 or 1": 2, "unknown user": 1}
    found = judged(tmp_path / "canonical")
    assert found.error == "" and found.report["passed"] is True
    assert found.broken == {"?quarantine.rows: column_values_to_be_between"}
    assert found.report["quarantined"] == facts["broken"] and found.report["rows"]["events"] == 2797
    verdict = found.rule("quarantine", "rows")
    assert verdict["severity"] == "quarantine"
    first, second = sorted(verdict["examples"], key=lambda example: example["reason"])
    assert (first["reason"], first["rows"], first["share"]) == ("label is not 0 or 1", 2, 2 / 2800)
    assert (second["reason"], second["rows"]) == ("unknown user", 1) and "'user_id': '4'" in second["example"]
    assert "quarantine: quarantine.rows" in caplog.text
