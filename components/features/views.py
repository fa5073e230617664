"""The tables that Feast joins and materializes, a parquet file a view, made from the canonical data.

user_profile      the users' attributes
user_clicks       at each click: where the user's history lies in the click log. It is known one second later at the
                  earliest, so that clicks in the same second as an impression stay out of its history
user_history      the newest clicks themselves, for serving
item_popularity   views and clicks of the last whole days, known from the next midnight on
item_embedding    the fused vector, known from the item's creation on

Where events say when they arrived (`created_at`), nothing is known before that. A click that comes late is in no
history of an impression before its arrival. In every later history it stands where it became known.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.common.contracts import ARRIVAL, HISTORY, TIMESTAMP, USERS, Canonical, attributes, read_parquet

VIEWS = ("user_profile", "user_clicks", "user_history", "item_popularity", "item_embedding")
ONLINE_VIEWS = ("user_profile", "user_history", "item_popularity", "item_embedding")
NO_ATTRIBUTES = "known"  # what a view of users without attributes serves, for it must serve some; no model reads it


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """availability_lag_seconds  a click, and a day's counts, are known this long after they happened
    popularity_days           days that views and clicks are counted over
    history_length            newest clicks kept for serving
    """

    availability_lag_seconds: int
    popularity_days: int
    history_length: int

    def __post_init__(self) -> None:
        if self.availability_lag_seconds < 0:
            raise ValueError(f"availability_lag_seconds is {self.availability_lag_seconds}; it cannot be negative")
        for name in ("popularity_days", "history_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


def write_sources(config: FeaturesConfig, data: Canonical, embedding: Path, output: Path) -> tuple[datetime, datetime]:
    """The parquet files that Feast joins and materializes. Returns two times: of the newest event, and of the last
    that becomes known."""
    events = data.events()
    lag_us = config.availability_lag_seconds * SECOND
    with duckdb.connect() as db:
        never_late = pa.repeat(pa.scalar(None, TIMESTAMP), len(events))
        arrival = events[ARRIVAL] if ARRIVAL in events.column_names else never_late
        db.register(
            "events",
            pa.table(
                {
                    "user_id": events["user_id"],
                    "item_id": events["item_id"],
                    "label": events["label"],
                    "us": events["timestamp"].cast(pa.int64()),
                    "arrival": arrival.cast(pa.int64()).fill_null(0),
                }
            ),
        )
        # Clicks once, by user and by when they are known; a row's position in this order is what every history
        # points at.
        db.execute(CLICKS, {"second": SECOND, "lag": lag_us})

        def ask(query: str, **values: int) -> pa.Table:
            return _known_at(db.sql(query, params=values).to_arrow_table())

        tables = {
            "click_log": db.sql("select user_id, item_id, us from clicks order by position").to_arrow_table(),
            "user_clicks": ask(USER_CLICKS),
            "user_history": ask(USER_HISTORY, length=config.history_length),
            "item_popularity": ask(ITEM_POPULARITY, day=DAY, lag=lag_us, days=config.popularity_days),
        }
    if (histories := data.histories()) is not None:
        tables |= given_histories(config, events, histories)
    first = pc.min(events["timestamp"])
    users = data.users()
    tables["user_profile"] = users.append_column("event_timestamp", pa.repeat(first, len(users)).cast(TIMESTAMP))
    if not attributes(users, USERS):
        tables["user_profile"] = tables["user_profile"].append_column(NO_ATTRIBUTES, pa.repeat("yes", len(users)))
    vectors = read_parquet(embedding / "item_embedding.parquet")
    vectors = vectors.filter(pc.is_valid(vectors["embedding"]))
    tables["item_embedding"] = pa.table(
        {
            "item_id": vectors["item_id"],
            "embedding": vectors["embedding"].cast(pa.list_(pa.float32())),
            "event_timestamp": vectors["created_at"],
        }
    )
    pq.write_table(tables.pop("click_log"), output / "click_log.parquet")
    for name, table in tables.items():
        pq.write_table(table, output / "sources" / f"{name}.parquet")
    known_until = max(pc.max(table["event_timestamp"]).as_py() for table in tables.values() if len(table))
    return pc.max(events["timestamp"]).as_py(), known_until


def given_histories(config: FeaturesConfig, events: pa.Table, histories: pa.ChunkedArray) -> dict[str, pa.Table]:
    """The tables of a source that gives the histories itself: an event's is known at that very event.

    Its times are only an order, so there is no popularity.
    """
    rows = pa.table(
        {
            "user_id": events["user_id"],
            "clicks_start": events[HISTORY[0]],
            "clicks_end": events[HISTORY[1]],
            "event_timestamp": events["timestamp"],
        }
    ).sort_by([("user_id", "ascending"), ("event_timestamp", "ascending")])
    users = rows["user_id"].to_numpy()
    newest = rows.take(pa.array(np.flatnonzero(np.append(users[1:] != users[:-1], True))))
    end = newest["clicks_end"].to_numpy()
    length = np.minimum(end - newest["clicks_start"].to_numpy(), config.history_length)
    offsets = np.concatenate([[0], np.cumsum(length)])
    items = histories.take(pa.array(np.repeat(end - offsets[1:], length) + np.arange(offsets[-1]))).combine_chunks()
    history = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), items)
    nothing = pa.schema(
        [("item_id", pa.int64()), ("event_timestamp", TIMESTAMP), ("views", pa.int64()), ("clicks", pa.int64())]
    )
    return {
        "click_log": pa.table({"item_id": histories}),
        "user_clicks": rows,
        "user_history": pa.table(
            {"user_id": newest["user_id"], "history": history, "event_timestamp": newest["event_timestamp"]}
        ).filter(pa.array(length > 0)),
        "item_popularity": nothing.empty_table(),
    }


SECOND = 1_000_000  # microseconds, as in the canonical timestamps
DAY = 86_400 * SECOND

CLICKS = """
    create table clicks as
    select *, row_number() over (order by user_id, known, us, item_id) - 1 as position
    from (
        select user_id, item_id, us, greatest((us // $second + 1) * $second + $lag, arrival) as known
        from events
        where label = 1
    )
"""

USER_CLICKS = """
    select user_id, min(first) as clicks_start, max(position) + 1 as clicks_end, known as us
    from (select *, min(position) over (partition by user_id) as first from clicks)
    group by user_id, known
    order by user_id, us
"""

USER_HISTORY = """
    select user_id, list(item_id order by position) as history, max(known) as us
    from (select *, row_number() over (partition by user_id order by position desc) as age from clicks)
    where age <= $length
    group by user_id
    order by user_id
"""

# A running sum over the days on which something enters the window or leaves it: rows grow with events, not with days.
# A late event enters at the first midnight after its arrival, and leaves with its own day.
ITEM_POPULARITY = """
    with daily as (
        select item_id, us // $day as day, greatest(us // $day, (arrival - $lag - 1) // $day) as enters,
               count(*) as views, sum(label)::bigint as clicks
        from events
        group by all
    ), steps as (
        select item_id, enters as day, views, clicks from daily where enters < day + $days
        union all select item_id, day + $days, -views, -clicks from daily where enters < day + $days
    ), sums as (
        select item_id, day, sum(views) as views, sum(clicks) as clicks from steps group by all
    )
    select item_id, (day + 1) * $day + $lag as us,
           sum(views) over past :: bigint as views, sum(clicks) over past :: bigint as clicks
    from sums
    where day <= (select max(us) // $day from events)
    window past as (partition by item_id order by day)
    order by item_id, us
"""


def _known_at(table: pa.Table) -> pa.Table:
    """Microseconds `us` -> the event_timestamp that Feast joins on."""
    position = table.column_names.index("us")
    return table.set_column(position, "event_timestamp", table["us"].cast(pa.int64()).cast(TIMESTAMP))
