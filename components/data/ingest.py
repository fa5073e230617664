"""ingest: a source's raw files -> canonical events by day, users, items, modalities.

What cannot be made canonical (a missing column, a wrong type, a time without a zone) stops here, before anything is
written; a row that is wrong by itself (an unknown item, a label of 2) goes to quarantine; what the rows say together,
and what is wrong with items and vectors, is judged by `validate`.

Every row that a source read is written to events, or counted under the reason why not: rows left out are in
quarantine/, and of rows that are not known before `until` there is their number in source.json. Where rows say when
they arrived (`created_at`), days may be delivered again: user, item and timestamp name an impression, the newest whole
row of it counts, and what arrived at `until` or later is not known. So but for that number, ingest of the same `until`
gives the same bytes, whatever was delivered since.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC as ZONE
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from components.common.artifacts import new_folder, write_json
from components.common.config import parse_time
from components.common.contracts import (
    ARRIVAL,
    EVENTS,
    HISTORIES,
    HISTORY,
    IMAGE,
    ITEMS,
    OPTIONAL,
    ORACLE,
    USERS,
    UTC,
    VECTORS,
    attributes,
    conform,
    write_days,
)
from components.data import pictures, sources
from components.data.sources import RawTables
from components.data.sources.files import FilesConfig
from components.data.sources.simulator import SimulatorConfig

# Names that later steps give to features, or to columns of their joins.
RESERVED = {
    "user_id", "item_id", "row_id", "event_timestamp", "tags", "embedding", "history", "views", "clicks",
    "clicks_start", "clicks_end", "known", *OPTIONAL,
}  # fmt: skip
POPULARITY = {"views_level", "clicks_level"}  # features too, unless the source gives its histories itself
UNKNOWN_YET = "not known before until"  # counted, never written: no fault, and no part of this data
NO_LABEL = "label is not 0 or 1"
IMPRESSION = ("user_id", "item_id", "timestamp")  # what names one, where rows say when they arrived
DAY = np.timedelta64(1, "D")
MONTH = 30  # days, in which a day without a row is unusual
SHOWN = 14  # unusual days in the terminal; source.json has all


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """source        simulator, movielens, microlens or files
    raw           the path the source reads; the simulator has no files, its code is its input
    until         ISO time with a zone: events of later, or that arrived later, are left out, and freshness is
                  measured back from it; null takes every event, and then freshness is not judged
    max_rejected  share of the known rows that may be broken and go to quarantine; beyond it, ingest stops
    simulator     the world that the simulator draws
    files         your own tables, where the source is `files`
    """

    source: str
    raw: str
    until: str | None
    max_rejected: float
    simulator: SimulatorConfig
    files: FilesConfig

    def __post_init__(self) -> None:
        sources.check(self.source, self.raw)
        if self.until is not None:
            parse_time("ingest.until", self.until)
        if not 0 <= self.max_rejected < 1:
            raise ValueError(f"max_rejected is {self.max_rejected}; it is a share in [0, 1)")


def run(config: IngestConfig, output: Path) -> dict[str, Any]:
    """Write the canonical folder, and print what became of the rows. Returns its facts (`source.json`)."""
    raw = sources.read(config)
    read = len(raw.events) + sum(map(len, (*raw.rejected.values(), *raw.set_aside.values())))
    if raw.read not in (None, read):
        raise ValueError(
            f"{config.source}: {raw.read} rows were read, and {read} came out of the adapter; it must give those that "
            "it leaves out as `rejected` or `set_aside`"
        )
    events = conform(raw.events, EVENTS, f"{config.source} events", optional=OPTIONAL)
    users = conform(raw.users, USERS, f"{config.source} users")
    items = conform(raw.items, ITEMS, f"{config.source} items", optional={IMAGE: pa.string()})
    items, named = take_pictures(config, raw, items)
    given = set(HISTORY) <= set(events.column_names)
    extra = [*attributes(events, EVENTS), *attributes(users, USERS), *attributes(items, ITEMS)]
    reserved = RESERVED if given else RESERVED | POPULARITY
    if clashing := sorted({name for name in extra if name in reserved or extra.count(name) > 1}):
        raise ValueError(
            f"{config.source}: extra columns {clashing} have a name that another table's column or a feature of the "
            "pipeline has; rename them where the data is written"
        )
    if given:
        _require_histories(config, raw, events)
    events, users, items = (trimmed(t, s) for t, s in ((events, EVENTS), (users, USERS), (items, ITEMS)))
    until = None if config.until is None else parse_time("ingest.until", config.until)
    if until is not None and given:
        raise ValueError(f"ingest.until is {config.until!r}, but {config.source} has no times; set it to null")
    events, rejected, set_aside, later = settle(raw, events, users, items, until)
    left_out = rejected | set_aside
    ledger = {
        "read": read,
        "later": later,
        "written": len(events),
        "left_out": {reason: len(rows) for reason, rows in left_out.items()},
    }
    assert read == later + len(events) + sum(map(len, left_out.values())), f"rows were lost: {ledger}"
    broken = sum(map(len, rejected.values()))
    if broken > config.max_rejected * (read - later):
        told = "; ".join(f"{reason}: {len(rows)}, e.g. {_first(rows)}" for reason, rows in rejected.items())
        raise ValueError(
            f"{config.source}: {broken} of {read - later} rows are broken, more than ingest.max_rejected "
            f"({config.max_rejected}) of them ({told}); mend the files, or raise the limit"
        )
    if not len(events):
        raise ValueError(f"ingest: no event before until={config.until!r} in {config.raw}; give a later time")
    events = events.take(pc.sort_indices(events["timestamp"]))  # stable: ties stay as the source had them
    days = unusual_days(events, set_aside)
    with new_folder(output) as folder:
        written = write_days(events, folder / "events")
        pq.write_table(users, folder / "users.parquet")
        pq.write_table(items, folder / "items.parquet")
        (folder / "modalities").mkdir()
        for name, table in raw.modalities.items():
            vectors = conform(table, VECTORS, f"{config.source} modality {name}", extra_columns=False)
            file = folder / "modalities" / f"{name}.parquet"
            pq.write_table(vectors.sort_by("item_id"), file, use_dictionary=False)  # no float comes twice
        copied = copy_pictures(config, named, folder) if len(named) else None
        if given and raw.histories is not None:
            pq.write_table(raw.histories, folder / "histories.parquet")
        if left_out:
            (folder / "quarantine").mkdir(exist_ok=True)
        for at, (reason, rows) in enumerate(left_out.items()):
            names = ["given reason" if name == "reason" else name for name in rows.column_names]
            told = rows.rename_columns(names).append_column("reason", pa.repeat(reason, len(rows)))
            pq.write_table(told, folder / "quarantine" / f"{at}-{re.sub(r'[^A-Za-z0-9]+', '-', reason)}.parquet")
        facts = {
            "source": config.source,
            "until": config.until,
            "impressions": len(events),
            "label_rate": float(pc.mean(events["label"]).as_py() or 0),
            "days": len(written),
            "first_day": written[0],
            "last_day": written[-1],
            "users": len(users),
            "items": len(items),
            "vectors": {name: len(table) for name, table in sorted(raw.modalities.items())},
            **({"pictures": copied} if copied else {}),
            "rows": ledger,
            "broken": {reason: len(rows) for reason, rows in rejected.items()},
            "unusual_days": days,
            **raw.facts,
        }
        if ORACLE in events.column_names:
            facts["oracle_auc"] = _auc(events["label"].to_numpy(), events[ORACLE].to_numpy())
        write_json(folder / "source.json", facts)
    show(ledger, days)
    return facts


def summary(facts: dict[str, Any]) -> dict[str, str]:
    lines = {
        "impressions": f"{facts['impressions']:,}, {facts['label_rate']:.1%} clicked",
        "days": f"{facts['days']:,}, {facts['first_day']} to {facts['last_day']}",
        "users, items": f"{facts['users']:,} and {facts['items']:,}",
    }
    if "oracle_auc" in facts:
        lines["oracle"] = f"AUC {facts['oracle_auc']:.4f}, the ceiling of any model"
    return lines


def trimmed(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The extra columns as the server reads a request (`models.schema.trimmed`): no spaces (Unicode's Zs) around a
    value, and none where nothing is left."""
    for name in attributes(table, schema):
        column = pc.replace_substring_regex(table[name], r"^\p{Zs}+|\p{Zs}+$", "")
        column = pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)
        table = table.set_column(table.column_names.index(name), name, column)
    return table


def take_pictures(config: IngestConfig, raw: RawTables, items: pa.Table) -> tuple[pa.Table, pa.Table]:
    """The items without the column that names their pictures; and item_id and image of those that name one."""
    if IMAGE not in items.column_names:
        return items, pa.table({"item_id": [], IMAGE: []})
    named = items.select(["item_id", IMAGE]).filter(pc.is_valid(items[IMAGE])).sort_by("item_id")
    if len(named) and IMAGE in raw.modalities:
        raise ValueError(
            f"{config.source}: items name pictures in the column {IMAGE!r}, and there are vectors {IMAGE!r} too; "
            "give the one or the other"
        )
    return items.drop_columns(IMAGE), named


def copy_pictures(config: IngestConfig, named: pa.Table, folder: Path) -> dict[str, Any]:
    """Write pictures.parquet, and what could not be read to quarantine/. Returns the counts, for source.json.

    An item whose picture is left out has none, as one that names none. Raises ValueError where they are too many.
    """
    left_out = pictures.copy(named, config.raw, folder / "pictures.parquet")
    if len(left_out) > config.max_rejected * len(named):
        raise ValueError(
            f"{config.source}: {len(left_out)} of {len(named)} pictures cannot be read, more than "
            f"ingest.max_rejected ({config.max_rejected}) of them ({pictures.describe(left_out)}); mend the files or "
            f"the column {IMAGE!r} of the items, or raise the limit"
        )
    if len(left_out):
        (folder / "quarantine").mkdir(exist_ok=True)
        pq.write_table(left_out, folder / "quarantine" / "pictures.parquet")
        told = f"{len(left_out)} of {len(named)} pictures left out: {pictures.describe(left_out)}"
        Console(stderr=True, highlight=False).print(told, markup=False)
    reasons = {count["values"]: count["counts"] for count in pc.value_counts(left_out["reason"]).to_pylist()}
    return {"named": len(named), "written": len(named) - len(left_out), "left_out": reasons}


def settle(
    raw: RawTables, events: pa.Table, users: pa.Table, items: pa.Table, until: datetime | None
) -> tuple[pa.Table, dict[str, pa.Table], dict[str, pa.Table], int]:
    """The events that count; what is broken and what is set aside, by reason; and how many are not known yet."""
    events, wrong = keep_whole(events, users, items, until)
    later = len(wrong.pop(UNKNOWN_YET, ()))
    set_aside = dict(raw.set_aside)
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
    return events, rejected, set_aside, later


def keep_whole(
    events: pa.Table, users: pa.Table, items: pa.Table, until: datetime | None
) -> tuple[pa.Table, dict[str, pa.Table]]:
    """The events that are whole and known before `until`; and those that are not, by reason.

    What says when it arrived is known from then on, the rest from when it happened. A time beyond tomorrow is never
    true, and neither is a row that is known before it happened; UNKNOWN_YET is no fault.
    """
    tomorrow = pa.scalar(datetime.now(ZONE) + timedelta(days=1), UTC)
    limit = tomorrow if until is None else pa.scalar(until, UTC)
    labels = pa.array([0, 1], pa.int8())

    def known(rows: pa.Table) -> pa.ChunkedArray:
        return pc.coalesce(*(rows[name] for name in (ARRIVAL, "timestamp") if name in rows.column_names))

    def is_unknown(rows: pa.Table, column: str, values: pa.Array) -> pa.ChunkedArray:
        return pc.invert(pc.is_in(rows[column], value_set=values, skip_nulls=True))

    left_out = {}
    for reason, is_so in {
        "later than tomorrow": lambda rows: pc.greater_equal(known(rows), tomorrow),
        UNKNOWN_YET: lambda rows: pc.greater_equal(known(rows), limit),
        "no timestamp": lambda rows: pc.is_null(rows["timestamp"]),
        "happens after it arrived": lambda rows: pc.greater_equal(rows["timestamp"], limit),
        "unknown user": lambda rows: is_unknown(rows, "user_id", users["user_id"].combine_chunks()),
        "unknown item": lambda rows: is_unknown(rows, "item_id", items["item_id"].combine_chunks()),
        NO_LABEL: lambda rows: is_unknown(rows, "label", labels),
    }.items():
        marked = is_so(events).fill_null(False)
        if pc.any(marked).as_py():
            left_out[reason] = events.filter(marked)
            events = events.filter(pc.invert(marked))
    return events, left_out


def versions(events: pa.Table) -> tuple[pa.Table, dict[str, pa.Table]]:
    """Of whole events that say when they arrived: the newest row of each impression, in the place of its oldest; and
    the older rows: `repeated`, where the next differs in nothing but the arrival, and `corrected later`.

    The newest row has the arrival from which on its label was known without a break: a day that comes again, or with
    another context, changes no history.
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
    """Which of the broken events have a whole one of their impression that arrived later. bool [rows of broken]"""
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
    """Day -> its rows, and how many arrived a day or more after its end, were repeated or corrected later; the days
    with any of these, and those of the last month that have no row."""
    found = {"rows": _count(events)}
    if ARRIVAL in events.column_names:
        end = events["timestamp"].to_numpy().astype("datetime64[D]") + DAY
        arrival = events[ARRIVAL].fill_null(0).to_numpy()
        found["late"] = _count(events.filter(pa.array(arrival >= end + DAY)))
    for reason, rows in set_aside.items():
        if "timestamp" in rows.column_names and rows.schema.field("timestamp").type == EVENTS.field("timestamp").type:
            found[reason] = _count(rows)
    last = np.datetime64(max(found["rows"]))
    month = np.arange(max(np.datetime64(min(found["rows"])), last - MONTH * DAY), last).astype(str).tolist()
    days = sorted({*month, *(day for counts in found.values() for day in counts)})
    told = {day: {what: counts.get(day, 0) for what, counts in found.items() if day in counts or what == "rows"}
            for day in days}  # fmt: skip
    return {day: counts for day, counts in told.items() if len(counts) > 1 or not counts["rows"]}


def _count(rows: pa.Table) -> dict[str, int]:
    days, counts = np.unique(rows["timestamp"].to_numpy().astype("datetime64[D]"), return_counts=True)
    return dict(zip(days.astype(str).tolist(), counts.tolist(), strict=True))


def show(ledger: dict[str, Any], days: dict[str, dict[str, int]]) -> None:
    """The tables for the terminal."""
    told = {"read": ledger["read"], UNKNOWN_YET: -ledger["later"]}
    told |= {reason: -rows for reason, rows in ledger["left_out"].items()}
    table = Table("rows", "", title="What became of the rows", title_justify="left")
    table.columns[1].justify = "right"
    for what, rows in {k: v for k, v in told.items() if v}.items():
        table.add_row(what, f"{rows:,}")
    table.add_section()
    table.add_row("written", f"{ledger['written']:,}")
    console = Console(stderr=True, highlight=False)
    console.print(table)
    if days:
        names = list(dict.fromkeys(name for counts in days.values() for name in counts))
        table = Table("day", *names, title=f"Unusual days ({len(days)})", title_justify="left")
        for day, counts in list(days.items())[-SHOWN:]:
            table.add_row(day, *(f"{counts.get(name, 0):,}" for name in names))
        console.print(table)


def _require_histories(config: IngestConfig, raw: RawTables, events: pa.Table) -> None:
    """Raises ValueError where the events point outside of the histories that the source gives."""
    if raw.histories is None or raw.histories.schema != HISTORIES:
        raise ValueError(f"{config.source} events have {HISTORY}; give `histories`, a table of {HISTORIES}")
    start, end = (events[name].to_numpy() for name in HISTORY)
    if not ((start >= 0) & (start <= end) & (end <= len(raw.histories))).all():
        raise ValueError(f"{config.source}: {HISTORY} leave [0, {len(raw.histories)}]; mend the source")


def _first(rows: pa.Table) -> dict[str, str]:
    return {name: str(value) for name, value in rows.slice(0, 1).to_pylist()[0].items() if value is not None}


def _auc(labels: np.ndarray, scores: np.ndarray) -> float | None:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels, scores)) if 0 < labels.mean() < 1 else None
