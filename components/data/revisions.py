"""Which version of an impression counts, and what becomes of every row that a source read.

Where rows say when they arrived (`created_at`), days may be delivered again: user, item and timestamp name an
impression, and its newest whole row counts. A row that arrived at `until` or later is not known yet. So ingest of the
same `until` gives the same bytes, whatever was delivered since.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from components.common.contracts import ARRIVAL, TIMESTAMP
from components.data.sources import RawTables, Window

UNKNOWN_YET = "not known before until"  # counted and never written: such a row is not broken
OUTSIDE = "before the window"  # the same
AGAIN = ("repeated", "corrected")  # how the reasons begin of rows that were delivered again
NO_LABEL = "label is not 0 or 1"
IMPRESSION = ("user_id", "item_id", "timestamp")  # what names an impression, where rows say when they arrived
DAY = np.timedelta64(1, "D")
MONTH = 30  # days, in which a day without a row is unusual


def settle(
    raw: RawTables, events: pa.Table, users: pa.Table, items: pa.Table, window: Window
) -> tuple[pa.Table, dict[str, pa.Table], dict[str, pa.Table], dict[str, int]]:
    """The events that count; what is broken and what is set aside, by reason; and how many rows are beyond the window:
    UNKNOWN_YET, and OUTSIDE."""
    counts = dict.fromkeys((UNKNOWN_YET, OUTSIDE), 0)
    set_aside = {}
    for reason, rows in raw.set_aside.items():
        set_aside[reason], apart = _sort_out(rows, _beyond(window)) if _is_timed(rows) else (rows, {})
        counts = {name: count + len(apart.get(name, ())) for name, count in counts.items()}
    events, wrong = keep_whole(events, users, items, window)
    counts = {name: count + len(wrong.pop(name, ())) for name, count in counts.items()}
    if ARRIVAL in events.column_names:
        broken = wrong.pop(NO_LABEL, events.slice(0, 0))
        is_mended = pa.array(mended(broken, events))
        events, older = versions(events)
        older["corrected later"] = pa.concat_tables([older["corrected later"], broken.filter(is_mended)])
        wrong[NO_LABEL] = broken.filter(pc.invert(is_mended))
        set_aside |= older
    rejected, set_aside = (
        {reason: rows for reason, rows in by_reason.items() if len(rows)}
        for by_reason in (raw.rejected | wrong, set_aside)
    )
    return events, rejected, set_aside, counts


def keep_whole(
    events: pa.Table, users: pa.Table, items: pa.Table, window: Window
) -> tuple[pa.Table, dict[str, pa.Table]]:
    """The events that are whole, in the window and known before its end; and the others, by reason.

    A row is known from its arrival on, or, where it has none, from its time on. A time later than tomorrow cannot be
    true, and no row can arrive before it happened. A row that is UNKNOWN_YET or OUTSIDE is not broken.
    """
    now = datetime.now(UTC)
    tomorrow = pa.scalar(max(now, window.until or now) + timedelta(days=1), TIMESTAMP)
    limit = tomorrow if window.until is None else pa.scalar(window.until, TIMESTAMP)
    labels = pa.array([0, 1], pa.int8())

    def is_unknown(rows: pa.Table, column: str, values: pa.Array) -> pa.ChunkedArray:
        return pc.invert(pc.is_in(rows[column], value_set=values, skip_nulls=True))

    return _sort_out(events, {
        "later than tomorrow": lambda rows: pc.greater_equal(_known(rows), tomorrow),
        **_beyond(window),
        "no timestamp": lambda rows: pc.is_null(rows["timestamp"]),
        "happens after it arrived": lambda rows: pc.greater_equal(rows["timestamp"], limit),
        "unknown user": lambda rows: is_unknown(rows, "user_id", users["user_id"].combine_chunks()),
        "unknown item": lambda rows: is_unknown(rows, "item_id", items["item_id"].combine_chunks()),
        NO_LABEL: lambda rows: is_unknown(rows, "label", labels),
    })  # fmt: skip


def _sort_out(
    rows: pa.Table, reasons: dict[str, Callable[[pa.Table], pa.ChunkedArray]]
) -> tuple[pa.Table, dict[str, pa.Table]]:
    """The rows of which no reason is true, and the others, each under the first reason that is."""
    left_out = {}
    for reason, is_so in reasons.items():
        marked = is_so(rows).fill_null(False)
        if pc.any(marked).as_py():
            left_out[reason] = rows.filter(marked)
            rows = rows.filter(pc.invert(marked))
    return rows, left_out


def _beyond(window: Window) -> dict[str, Callable[[pa.Table], pa.ChunkedArray]]:
    """Whether a row lies beyond a bound of the window, by reason."""
    bounds = {}
    if window.until is not None:
        until = pa.scalar(window.until, TIMESTAMP)
        bounds[UNKNOWN_YET] = lambda rows: pc.greater_equal(_known(rows), until)
    if window.since is not None:
        since = pa.scalar(window.since, TIMESTAMP)
        bounds[OUTSIDE] = lambda rows: pc.less(rows["timestamp"], since)
    return bounds


def _is_timed(rows: pa.Table) -> bool:
    return "timestamp" in rows.column_names and rows.schema.field("timestamp").type == TIMESTAMP


def _known(rows: pa.Table) -> pa.ChunkedArray:
    """When each row was known."""
    return pc.coalesce(*(rows[name] for name in (ARRIVAL, "timestamp") if name in rows.column_names))


def versions(events: pa.Table) -> tuple[pa.Table, dict[str, pa.Table]]:
    """The newest row of each impression, at the place of its oldest row; and the older rows by reason.

    events  whole events that say when they arrived
    An older row is `repeated` where the next row differs in the arrival alone, else it is `corrected later`. The newest
    row gets the arrival since which its label has not changed: a day that is delivered again, or with another context,
    changes no history.
    """
    order, again = _by_impression(events)
    equal = {
        name: _as_before(events[name].combine_chunks().dictionary_encode().indices.fill_null(-1).to_numpy()[order])
        for name in set(events.column_names) - {ARRIVAL, *IMPRESSION}
    }
    repeats = again & np.all(list(equal.values()), axis=0)
    newest = np.flatnonzero(~np.roll(again, -1))
    oldest, since = (_starts(going_on)[newest] for going_on in (again, again & equal["label"]))
    place = np.argsort(order[oldest])
    counted = events.take(order[newest[place]])
    arrival = events[ARRIVAL].take(order[since[place]])
    return counted.set_column(counted.column_names.index(ARRIVAL), ARRIVAL, arrival), {
        "repeated": events.take(np.sort(order[np.roll(repeats, -1)])),
        "corrected later": events.take(np.sort(order[np.roll(again & ~repeats, -1)])),
    }


def mended(broken: pa.Table, whole: pa.Table) -> np.ndarray:
    """Whether a whole event of the same impression arrived later than the broken one. bool [rows of broken]"""
    users = pc.unique(broken["user_id"])
    both = pa.concat_tables([broken, whole.filter(pc.is_in(whole["user_id"], value_set=users))])
    order, again = _by_impression(both)
    impression = np.append(np.cumsum(~again), 0)
    at = np.where(order >= len(broken), np.arange(len(order)), len(order))
    next_whole = np.minimum.accumulate(at[::-1])[::-1]
    found = np.empty(len(order), dtype=bool)
    found[order] = impression[next_whole] == impression[:-1]
    return found[: len(broken)]


def _by_impression(events: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """The rows by impression and age, and whether each, in this order, is of the same impression as the one before.

    A row without an arrival is the oldest; of equal arrivals the later in the table is the newer.
    """
    keys = [events[name].cast(pa.int64()).to_numpy() for name in IMPRESSION]
    arrival = events[ARRIVAL].cast(pa.int64()).fill_null(np.iinfo(np.int64).min).to_numpy()
    order = np.lexsort((arrival, *keys))
    again = np.all([_as_before(key[order]) for key in keys], axis=0)
    again[:1] = False
    return order, again


def _as_before(values: np.ndarray) -> np.ndarray:
    return np.diff(values, prepend=values[:1]) == 0


def _starts(going_on: np.ndarray) -> np.ndarray:
    """Position -> the one at which its run begins."""
    return np.maximum.accumulate(np.where(going_on, 0, np.arange(len(going_on))))


def unusual_days(events: pa.Table, set_aside: dict[str, pa.Table]) -> dict[str, dict[str, int]]:
    """Day -> how many rows it has, and how many of them came late, were repeated or were corrected later.

    Late is a day or more after the end of the day. Only days with such rows are here, and the days of the last month
    that have no row.
    """
    found = {"rows": _count(events)}
    if ARRIVAL in events.column_names:
        end = events["timestamp"].to_numpy().astype("datetime64[D]") + DAY
        arrival = events[ARRIVAL].fill_null(0).to_numpy()
        found["late"] = _count(events.filter(pa.array(arrival >= end + DAY)))
    for reason, rows in set_aside.items():
        if reason.startswith(AGAIN) and _is_timed(rows):
            found[reason] = _count(rows)
    last = np.datetime64(max(found["rows"]))
    month = np.arange(max(np.datetime64(min(found["rows"])), last - MONTH * DAY), last).astype(str).tolist()
    days = sorted({*month, *(day for counts in found.values() for day in counts)})
    counted = {day: {what: counts.get(day, 0) for what, counts in found.items() if day in counts or what == "rows"}
            for day in days}  # fmt: skip
    return {day: counts for day, counts in counted.items() if len(counts) > 1 or not counts["rows"]}


def _count(rows: pa.Table) -> dict[str, int]:
    days, counts = np.unique(rows["timestamp"].to_numpy().astype("datetime64[D]"), return_counts=True)
    return dict(zip(days.astype(str).tolist(), counts.tolist(), strict=True))
