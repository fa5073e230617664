"""Events, items and quarantined rows as the rules judge them, one row each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.common.contracts import (
    ARRIVAL,
    EVENTS,
    ITEMS,
    LOGGED,
    ORACLE,
    POSITION,
    PROPENSITY,
    USERS,
    Canonical,
    attributes,
)

# A letter or a dash whose UTF-8 bytes were read as Latin-1 or Windows-1252, and the sign for unreadable bytes.
MOJIBAKE = "[ÂÃ][\u0080-\u00bfŒœŠšŸŽžƒˆ˜–—‘’‚“”„†‡•…‰‹›€™]|â[\u0080€][\u0080-\u00bf™œž“”˜¦¢]|\ufffd"


def event_frame(data: Canonical) -> pd.DataFrame:
    """One row an event, with columns that say whether its item, user, day and times are right."""
    events, items = data.events(), data.items()
    own = [name for name in (*EVENTS.names, ORACLE, *LOGGED) if name in events.column_names]
    frame = events.select(own).to_pandas()
    # Great Expectations judges types that it does not know one value at a time.
    frame = frame.astype({name: np.float64 for name in (ORACLE, PROPENSITY, POSITION) if name in own})
    row = pc.index_in(events["item_id"], value_set=items["item_id"].combine_chunks(), skip_nulls=True)
    created = items["created_at"].take(row.combine_chunks())
    frame["item_is_known"] = pc.is_valid(row).to_numpy()
    frame["item_exists"] = pc.greater_equal(events["timestamp"], created).fill_null(True).to_numpy()
    frame["user_is_known"] = is_in(events["user_id"], data.users()["user_id"])
    frame["is_in_its_day"] = events["timestamp"].to_numpy().astype("datetime64[D]") == partition_days(data)
    frame["is_first"] = ~frame.duplicated(["user_id", "item_id", "timestamp"])
    if ARRIVAL in events.column_names:
        happened = pc.less_equal(events["timestamp"], events[ARRIVAL])
        frame["happened_before_arrival"] = happened.fill_null(True).to_numpy()
    return frame


def item_frame(data: Canonical) -> pd.DataFrame:
    items = data.items()
    frame = items.select(["item_id", "created_at", "title"]).to_pandas()
    frame["is_readable"] = True
    for name in ("title", "text", *attributes(items, ITEMS)):
        frame["is_readable"] &= ~pc.match_substring_regex(items[name], MOJIBAKE).fill_null(False).to_numpy()
    return frame


def quarantine_frame(root: Path, broken: dict[str, int], known: int) -> pd.DataFrame:
    """One row a reason why ingest left rows out: how many, their share of the known rows, and one of them."""
    rows = []
    for file in sorted((root / "quarantine").glob("*.parquet")):
        first = next(pq.ParquetFile(file).iter_batches(1)).to_pylist()[0]
        if (reason := first.pop("reason")) in broken:
            example = str({name: str(value) for name, value in first.items()})
            rows.append({"reason": reason, "rows": broken[reason], "share": broken[reason] / known, "example": example})
    return pd.DataFrame(rows, columns=["reason", "rows", "share", "example"])


def features(events: pa.Table, data: Canonical) -> Iterator[tuple[str, np.ndarray]]:
    """(name, one code an event, -1 if its value is missing) for each context and each attribute of users and items."""
    owners = ((events, EVENTS, None), (data.users(), USERS, "user_id"), (data.items(), ITEMS, "item_id"))
    for table, schema, key in owners:
        for name in attributes(table, schema):
            codes = table[name].combine_chunks().dictionary_encode().indices.fill_null(-1).to_numpy()
            if key is not None:
                row = pc.index_in(events[key], value_set=table[key].combine_chunks()).fill_null(-1).to_numpy()
                codes = np.where(row < 0, -1, codes[row])
            yield name, codes


def is_in(column: pa.ChunkedArray, known: pa.ChunkedArray) -> np.ndarray:
    return pc.is_in(column, value_set=known.combine_chunks(), skip_nulls=True).to_numpy()


def partition_days(data: Canonical) -> np.ndarray:
    """The day whose folder holds each event: datetime64[D]."""
    files = (data.root / "events" / f"day={day}" / "part-0.parquet" for day in data.days())
    rows = [pq.ParquetFile(file).metadata.num_rows for file in files]
    return np.array(data.days(), dtype="datetime64[D]").repeat(rows)
