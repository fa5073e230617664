"""features: the sources equal a count by hand, the online store serves them, and a difference is found."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.common.artifacts import folder_hash, read_json
from components.common.contracts import ARRIVAL, TIMESTAMP, Canonical
from components.common.dataset import popularity_level
from components.features import features, views
from components.features.views import VIEWS, FeaturesConfig
from tests.components.small_world import (
    DAY,
    DAYS,
    FEATURES,
    START,
    Folders,
    Row,
    hand_tables,
    known_clicks,
    known_counts,
    plain_rows,
    prepare,
    with_arrivals,
    with_column,
)

Sources = dict[str, list[dict]]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return prepare(hand_tables(), tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def rows(prepared: Folders) -> list[Row]:
    return plain_rows(Canonical(prepared.canonical).events())


def sources(folder: Path) -> Sources:
    """The sources with event_timestamp as microseconds, and the click log."""
    found = {}
    for file in [*(folder / "sources").glob("*.parquet"), folder / "click_log.parquet"]:
        table = pq.read_table(file)
        if "event_timestamp" in table.column_names:
            at = table.column_names.index("event_timestamp")
            table = table.set_column(at, "us", table["event_timestamp"].cast(pa.int64()))
        found[file.stem] = table.to_pylist()
    return found


CONFIGS = {
    "no lag": FeaturesConfig(availability_lag_seconds=0, popularity_days=3, history_length=6),
    "lag": FEATURES,
    "a day's lag": FeaturesConfig(
        availability_lag_seconds=DAY + 7, popularity_days=1, history_length=1
    ),
    "all of it": FeaturesConfig(
        availability_lag_seconds=0, popularity_days=100, history_length=1000
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=CONFIGS)
def written(
    request: pytest.FixtureRequest, prepared: Folders, tmp_path_factory: pytest.TempPathFactory
) -> tuple[FeaturesConfig, Sources, datetime]:
    config = CONFIGS[request.param]
    output = tmp_path_factory.mktemp("sources")
    (output / "sources").mkdir()
    _, end = views.write_sources(config, Canonical(prepared.canonical), prepared.embedding, output)
    return config, sources(output), end


Written = tuple[FeaturesConfig, Sources, datetime]


def test_click_log_is_every_click_once_by_user_and_time(written: Written, rows: list[Row]) -> None:
    clicks = sorted((r.user, r.micro, r.item) for r in rows if r.label)
    assert [(r["user_id"], r["us"], r["item_id"]) for r in written[1]["click_log"]] == clicks


def test_user_clicks_point_at_what_is_known(written: Written, rows: list[Row]) -> None:
    config, found, _ = written
    lag = config.availability_lag_seconds
    log = found["click_log"]
    moments = {(r.user, (r.second + 1 + lag) * 1_000_000) for r in rows if r.label}
    assert [(r["user_id"], r["us"]) for r in found["user_clicks"]] == sorted(moments)  # one row a user and second
    ties = 0
    for row in found["user_clicks"]:
        history = [c["item_id"] for c in log[row["clicks_start"] : row["clicks_end"]]]
        assert history == known_clicks(rows, row["user_id"], row["us"], lag)
        # a microsecond earlier, the last second's clicks were not known: they come together
        before = known_clicks(rows, row["user_id"], row["us"] - 1, lag)
        assert len(before) < len(history)
        ties += len(history) - len(before) > 1
    assert ties > 10


def test_user_history_is_the_newest_clicks(written: Written, rows: list[Row]) -> None:
    config, found, _ = written
    lag, forever = config.availability_lag_seconds, 10**18
    users = sorted({r.user for r in rows if r.label})
    assert [r["user_id"] for r in found["user_history"]] == users
    for row in found["user_history"]:
        assert row["history"] == known_clicks(rows, row["user_id"], forever, lag)[-config.history_length :]
        newest = max(r.second for r in rows if r.user == row["user_id"] and r.label)
        assert row["us"] == (newest + 1 + lag) * 1_000_000


def test_item_popularity_at_every_midnight(written: Written, rows: list[Row]) -> None:
    """What Feast finds as of a midnight, the newest row not later, is the count by hand; also an hour before it."""
    config, found, _ = written
    lag = config.availability_lag_seconds
    zeros = 0
    for item in {r.item for r in rows}:
        own = [r for r in found["item_popularity"] if r["item_id"] == item]
        assert len({r["us"] for r in own}) == len(own)
        for day in range(DAYS + 1):
            for moment in (START + day * DAY + lag, START + day * DAY + lag - 1):
                known = [r for r in own if r["us"] <= moment * 1_000_000]
                newest = max(known, key=lambda r: r["us"], default=None)
                served = None if newest is None else (newest["views"], newest["clicks"])
                assert served == known_counts(rows, item, moment * 1_000_000, lag, config.popularity_days)
                zeros += served == (0, 0)
    assert (zeros > 0) == (config.popularity_days < DAYS)  # an item that drops out is served as zero, not as it was
    assert all((r["us"] - lag * 1_000_000) % (DAY * 1_000_000) == 0 for r in found["item_popularity"])


def test_the_rest_of_the_sources(written: Written, prepared: Folders, rows: list[Row]) -> None:
    _, found, end = written
    raw = hand_tables()
    profile = [(r["user_id"], r["region"], r["us"]) for r in found["user_profile"]]
    first = min(r.micro for r in rows)
    users = zip(raw.users["user_id"].to_pylist(), raw.users["region"].to_pylist(), strict=True)
    assert profile == [(user, region, first) for user, region in users]
    vectors = {r["item_id"]: r for r in pq.read_table(prepared.embedding / "item_embedding.parquet").to_pylist()}
    assert len(found["item_embedding"]) == len(vectors) - 1  # one has none
    for row in found["item_embedding"]:
        assert row["embedding"] == vectors[row["item_id"]]["embedding"]
        assert row["us"] == int(vectors[row["item_id"]]["created_at"].timestamp()) * 1_000_000
    assert end == datetime.fromtimestamp(max(r["us"] for t in found.values() for r in t) / 1e6, UTC)


def test_nothing_is_known_before_it_arrived(tmp_path: Path) -> None:
    """Histories and counts by the definition, where rows come late; the clicks lie as they became known."""
    late = prepare(with_arrivals(hand_tables()), tmp_path)
    events = Canonical(late.canonical).events()
    rows = plain_rows(events)
    arrival = [micro or 0 for micro in events[ARRIVAL].cast(pa.int64()).to_pylist()]
    (tmp_path / "sources").mkdir()
    views.write_sources(FEATURES, Canonical(late.canonical), late.embedding, tmp_path)
    found, lag = sources(tmp_path), FEATURES.availability_lag_seconds * 1_000_000
    known = [max((r.second + 1) * 1_000_000 + lag, came) for r, came in zip(rows, arrival, strict=True)]
    clicks = sorted((r.user, at, r.micro, r.item) for r, at in zip(rows, known, strict=True) if r.label)
    assert [(c["user_id"], c["us"], c["item_id"]) for c in found["click_log"]] == [(u, us, i) for u, _, us, i in clicks]
    assert sum(one[0] == other[0] and one[2] > other[2] for one, other in pairwise(clicks)) > 20  # late ones matter
    assert [(r["user_id"], r["us"]) for r in found["user_clicks"]] == sorted({(user, at) for user, at, _, _ in clicks})
    for row in found["user_clicks"]:
        history = [item for user, at, _, item in clicks if user == row["user_id"] and at <= row["us"]]
        assert [c["item_id"] for c in found["click_log"][row["clicks_start"] : row["clicks_end"]]] == history
    for row in found["user_history"]:
        own = [c for c in clicks if c[0] == row["user_id"]]
        assert row["history"] == [c[3] for c in own][-FEATURES.history_length :] and row["us"] == own[-1][1]
    for item in {r.item for r in rows}:
        own = [r for r in found["item_popularity"] if r["item_id"] == item]
        for day in range(DAYS + 1):
            moment, first = (START + day * DAY) * 1_000_000 + lag, day - FEATURES.popularity_days
            window = [  # the whole days before that midnight: what had arrived by then
                r.label
                for r, came in zip(rows, arrival, strict=True)
                if r.item == item and came <= moment and first <= (r.second - START) // DAY < day
            ]
            past = [r for r in own if r["us"] <= moment]
            served = max(past, key=lambda r: r["us"], default={"views": 0, "clicks": 0})
            assert (served["views"], served["clicks"]) == (len(window), sum(window))


@pytest.mark.parametrize("device", [None, "tv"], ids=["as they were", "with another context"])
def test_days_delivered_again_change_no_source(device: str | None, tmp_path: Path) -> None:
    """Nothing that is joined or served; so the training sets of the days between are what they were."""
    raw = with_arrivals(hand_tables())
    once = prepare(raw, tmp_path / "once")
    before = Canonical(once.canonical).events()
    day = (before["timestamp"].cast(pa.int64()).to_numpy() // 1_000_000 - START) // DAY
    again = before.filter(pa.array((day == 2) | (day == 4))).select(raw.events.column_names)
    came = pa.repeat(pa.scalar((START + 12 * DAY) * 1_000_000, pa.int64()), len(again)).cast(TIMESTAMP)
    again = with_column(again, ARRIVAL, came)
    if device:
        again = with_column(again, "device", pa.repeat(device, len(again)))
    twice = prepare(replace(raw, events=pa.concat_tables([again, raw.events])), tmp_path / "twice")
    events = Canonical(twice.canonical).events()
    assert events.drop_columns("device").equals(before.drop_columns("device"))
    assert events["device"].equals(before["device"]) == (device is None)
    for made in (once, twice):
        (made.features / "sources").mkdir(parents=True)
        views.write_sources(FEATURES, Canonical(made.canonical), made.embedding, made.features)
    assert folder_hash(once.features) == folder_hash(twice.features)


def test_users_without_attributes_are_known(prepared: Folders, tmp_path: Path) -> None:
    raw = hand_tables()
    bare = prepare(replace(raw, users=raw.users.select(["user_id"])), tmp_path / "bare")
    (tmp_path / "sources").mkdir()
    views.write_sources(FEATURES, Canonical(bare.canonical), bare.embedding, tmp_path)
    assert {r["known"] for r in sources(tmp_path)["user_profile"]} == {"yes"}


def test_popularity_level() -> None:
    counts = np.array([0, 1, 2, 3, 6, 7, 8, 1022, 1023, 2**40 - 1])
    assert popularity_level(counts).tolist() == [0, 1, 1, 2, 2, 3, 3, 9, 10, 40]
    every = np.arange(5000)
    assert popularity_level(every).tolist() == [int(c + 1).bit_length() - 1 for c in every]
    assert popularity_level(counts).dtype == np.int64


# ---- the stage --------------------------------------------------------------------------------------------------


def test_the_receipt_counts_and_the_same_input_gives_the_same_bytes(
    prepared: Folders, rows: list[Row], tmp_path: Path
) -> None:
    made = [prepared.features, tmp_path / "again"]
    receipts = [
        features.run(FEATURES, prepared.canonical, prepared.report, prepared.embedding, folder) for folder in made
    ]
    found = sources(prepared.features)
    last = max(r.micro for r in rows)
    assert receipts[0] == receipts[1] == read_json(made[0] / "receipt.json", "features")
    assert receipts[0]["clicks"] == sum(r.label for r in rows) == len(found["click_log"])
    assert receipts[0]["rows"] == {name: len(found[name]) for name in VIEWS}
    assert receipts[0]["embedding_version"] == read_json(prepared.embedding / "fit.json", "embed")["version"]
    assert datetime.fromisoformat(receipts[0]["log_until"]).timestamp() == pytest.approx(last / 1e6, abs=1e-6)
    assert receipts[0]["until"] == receipts[0]["log_until"]  # this world has no `ingest.until`
    assert folder_hash(made[0]) == folder_hash(made[1])
    assert sorted(file.name for file in made[0].iterdir()) == ["click_log.parquet", "receipt.json", "sources"]


def test_queries_scale_with_events_and_not_with_days() -> None:
    """An item shown twice, ten years apart, has four rows of popularity: it enters and leaves the window, twice."""
    us = [START * 1_000_000, (START + 3650 * DAY) * 1_000_000]
    events = pa.table({"item_id": [1, 1], "us": us, "label": pa.array([1, 0], pa.int8()), "arrival": [0, 0]})
    with duckdb.connect() as db:
        db.register("events", events)
        found = db.sql(views.ITEM_POPULARITY, params={"day": views.DAY, "lag": 0, "days": 7}).fetchall()
    day = [(row[1] // views.DAY) - START // DAY for row in found]
    assert list(zip(day, [r[2:] for r in found], strict=True)) == [(1, (1, 1)), (8, (0, 0)), (3651, (1, 0))]
