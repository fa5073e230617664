"""The canonical data: what every source is turned into and every later step may rely on.

    events/day=YYYY-MM-DD/part-0.parquet   user_id, item_id, timestamp, label, [OPTIONAL columns], context columns
    users.parquet                          user_id, attribute columns
    items.parquet                          item_id, created_at, title, tags, text, attribute columns
    modalities/NAME.parquet                item_id, vector: float32, one length; a missing modality is null or no row
    pictures.parquet                       item_id, image: the file's bytes; only where items name pictures
    histories.parquet                      item_id: only where the source gives the histories itself
    users_vocabulary.parquet, items_vocabulary.parquet   id, text: only where the source's ids are text
    quarantine/N-REASON.parquet            the rows that were left out, each with its reason
    source.json                            what the source says of itself: counts, days, the first day that is trained
                                           on (train_from), the oracle's AUC, and which context columns hold numbers as
                                           their `models.schema.bucket`

Columns beyond the named ones are strings, and each becomes a categorical feature: on events a context of the
impression, on users and items an attribute. The optional columns of events are never features:

    true_probability            a simulator's own click probability: it measures the ceiling of every model
    created_at                  when the row arrived; of two rows of one impression the newer counts
    split                       train, valid or test, where the source gives the split
    history_start, history_end  the row's history is histories[start:end], oldest first
    propensity, position        how likely the system that was logged was to show this item there, in (0, 1], and where
                                that was, 1 at the top: both or neither
    slate                       rows of one number were shown together, such as one page of results; else a row is alone

A source's items may name their pictures, a path below `ingest.raw` or an http(s) URL each, in the column `image`.
`ingest` copies what lies there, and the column ends with it: it is no attribute, and no later step looks outside of
this folder.

A source that has no times (`sources.timeless`) gives its histories, be they empty: its timestamps are an order and no
more, so no history and no popularity is counted over them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.common.artifacts import read_json

TIMESTAMP = pa.timestamp("us", tz="UTC")
END_OF_TIME = 253_402_300_800_000_000  # the year 10,000, which Python's datetime does not have
BATCH = 16_384
ORACLE = "true_probability"
ARRIVAL = "created_at"
SPLIT = "split"
REMEDY = "run `dvc repro ingest`, or give ingest.window_days more days"
HISTORY = ("history_start", "history_end")
PROPENSITY, POSITION, SLATE = "propensity", "position", "slate"
IMAGE = "image"

EVENTS = pa.schema([("user_id", pa.int64()), ("item_id", pa.int64()), ("timestamp", TIMESTAMP), ("label", pa.int8())])
LOGGED = {PROPENSITY: pa.float32(), POSITION: pa.int16(), SLATE: pa.int64()}  # what the logging system tells of a row
OPTIONAL = {
    ORACLE: pa.float32(), ARRIVAL: TIMESTAMP, SPLIT: pa.string(), **dict.fromkeys(HISTORY, pa.int64()), **LOGGED,
}  # fmt: skip
USERS = pa.schema([("user_id", pa.int64())])
ITEMS = pa.schema(
    [
        ("item_id", pa.int64()),
        ("created_at", TIMESTAMP),
        ("title", pa.string()),
        ("tags", pa.list_(pa.string())),
        ("text", pa.string()),
    ]
)
HISTORIES = pa.schema([("item_id", pa.int64())])
VECTORS = pa.schema([("item_id", pa.int64()), ("vector", pa.list_(pa.float32()))])
PICTURES = pa.schema([("item_id", pa.int64()), (IMAGE, pa.binary())])


@dataclass(frozen=True)
class Canonical:
    """The tables of a canonical folder, read when asked for."""

    root: Path

    def days(self) -> list[str]:
        """The days that have a partition, YYYY-MM-DD, in order."""
        return sorted(folder.name.removeprefix("day=") for folder in (self.root / "events").glob("day=*"))

    def events(self, since: str | None = None) -> pa.Table:
        """All impressions, or those from a day on, in time order, ties as the source had them."""
        days = [day for day in self.days() if since is None or day >= since]
        if not days:
            raise ValueError(f"{self.root}/events holds no day{f' from {since} on' if since else ''}; {REMEDY}")
        files = [self.root / "events" / f"day={day}" / "part-0.parquet" for day in days]
        return pa.concat_tables([_read(file, EVENTS, OPTIONAL) for file in files])

    def training_events(self) -> pa.Table:
        """The impressions that are trained, validated and tested on. The others are in histories and popularity."""
        return self.events(read_json(self.root / "source.json", "ingest")["train_from"])

    def numeric(self) -> list[str]:
        """The context columns that hold numbers as their `models.schema.bucket`."""
        found: list[str] = read_json(self.root / "source.json", "ingest").get("numeric", [])
        return found

    def users(self) -> pa.Table:
        return _read(self.root / "users.parquet", USERS, {})

    def items(self) -> pa.Table:
        return _read(self.root / "items.parquet", ITEMS, {})

    def modalities(self) -> dict[str, pa.Table]:
        """name -> (item_id, vector) for every vector modality, by name."""
        return dict(self.each_modality())

    def each_modality(self) -> Iterator[tuple[str, pa.Table]]:
        """The same, one after the other: they are the widest tables."""
        for file in sorted((self.root / "modalities").glob("*.parquet")):
            yield file.stem, _read(file, VECTORS, {}, extra_columns=False)

    def count_pictures(self) -> int:
        file = self.root / "pictures.parquet"
        return int(pq.ParquetFile(file).metadata.num_rows) if file.is_file() else 0

    def pictures(self) -> Iterator[pa.Table]:
        """(item_id, image) of the items that have a picture, a row group at a time. There must be some."""
        with pq.ParquetFile(self.root / "pictures.parquet") as opened:
            for group in range(opened.num_row_groups):  # iter_batches keeps what it has read until its end
                yield opened.read_row_group(group)

    def histories(self) -> pa.ChunkedArray | None:
        """The item ids that history_start and history_end of the events point at; None where they are derived."""
        file = self.root / "histories.parquet"
        return _read(file, HISTORIES, {}, extra_columns=False)["item_id"] if file.is_file() else None


def attributes(table: pa.Table, schema: pa.Schema) -> list[str]:
    """The columns beyond the contract: each is a categorical feature."""
    known = {*schema.names, *(OPTIONAL if schema is EVENTS else ())}
    return [name for name in table.column_names if name not in known]


def conform(table: pa.Table, schema: pa.Schema, where: str, *, optional: dict[str, pa.DataType] | None = None,
            extra_columns: bool = True) -> pa.Table:  # fmt: skip
    """The table with the contract's column order, checked column by column.

    Widths may differ (int32 for int64, large_string for string, other time units); kinds may not.
    Raises ValueError that names the place, the column, what was found and what is needed.
    """
    optional = optional or {}
    columns: dict[str, pa.ChunkedArray] = {}
    for field in schema:
        if field.name not in table.column_names:
            raise ValueError(
                f"{where}: column {field.name!r} ({field.type}) is missing; it has {table.column_names}. "
                "Add the column, or map one to this name"
            )
    for name in table.column_names:
        column = table[name]
        if name in schema.names:
            columns[name] = _cast(column, schema.field(name).type, f"{where}: column {name!r}")
        elif name in optional:
            columns[name] = _cast(column, optional[name], f"{where}: column {name!r}")
        elif extra_columns:
            columns[name] = _cast(column, pa.string(), f"{where}: extra column {name!r}")
        else:
            raise ValueError(f"{where}: unknown column {name!r}; only {schema.names} belong here")
    order = [*schema.names, *(name for name in table.column_names if name not in schema.names)]
    return pa.table({name: columns[name] for name in order})


def _cast(column: pa.ChunkedArray, wanted: pa.DataType, where: str) -> pa.ChunkedArray:
    found = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_timestamp(wanted) and pa.types.is_timestamp(found) and found.tz is None:
        raise ValueError(
            f"{where} has times without a zone ({found}); make them UTC, e.g. pandas `.dt.tz_localize('UTC')`"
        )
    if _kind(found) != _kind(wanted) and not pa.types.is_null(found):
        raise ValueError(f"{where} is {found}; it must be {wanted}. Convert it where the data is written")
    try:
        cast = column.cast(wanted)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{where} does not fit {wanted}: {error}") from None
    if wanted == TIMESTAMP and (pc.max(cast.cast(pa.int64())).as_py() or 0) >= END_OF_TIME:
        raise ValueError(
            f"{where} has times beyond the year 9999: numbers of another unit, such as milliseconds read as seconds? "
            "Convert it where the data is written"
        )
    return cast


def _kind(kind: pa.DataType) -> str:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return f"list of {_kind(kind.value_type)}"
    for name, test in {
        "integer": pa.types.is_integer,
        "float": pa.types.is_floating,
        "string": lambda t: pa.types.is_string(t) or pa.types.is_large_string(t),
        "timestamp": pa.types.is_timestamp,
    }.items():
        if test(kind):
            return name
    return str(kind)


def _read(file: Path, schema: pa.Schema, optional: dict[str, pa.DataType], *, extra_columns: bool = True) -> pa.Table:
    table = read_parquet(file)
    return conform(table, schema, str(file), optional=optional, extra_columns=extra_columns)


def read_parquet(file: Path) -> pa.Table:
    """One parquet file. Raises ValueError where it is missing, cut short or no parquet."""
    if not file.is_file():
        raise ValueError(f"{file} is not there; run `dvc repro ingest`, or check the path")
    try:
        opened = pq.ParquetFile(file)  # in batches: at once, vectors take three times their size
        return pa.Table.from_batches(opened.iter_batches(BATCH), opened.schema_arrow)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file} is no whole parquet file: {error}. Write it again") from None


def vector_matrix(vectors: pa.ChunkedArray, where: str) -> pa.FixedSizeListArray:
    """A list column whose lists all have one length, as a fixed-size list (zero copies of the values).

    Raises ValueError that names both lengths and example rows.
    """
    lengths = pc.list_value_length(vectors)
    counts = pc.value_counts(lengths.drop_null().combine_chunks()).to_pylist()
    if len(counts) > 1:
        raise ValueError(f"{where}: vectors of several lengths: {counts}; one modality has one length")
    if not counts or not counts[0]["values"]:
        raise ValueError(f"{where}: no vector in it; leave the modality's file out instead")
    array = vectors.combine_chunks()
    return array.cast(pa.list_(pa.float32(), counts[0]["values"]))


def write_days(events: pa.Table, root: Path) -> list[str]:
    """Write events as one parquet file a UTC day; rows keep their order within it. Returns the days."""
    day = pc.floor_temporal(events["timestamp"], unit="day").combine_chunks()
    order = pc.sort_indices(day)  # Arrow's sort is stable
    counts = pc.value_counts(day.take(order))
    names, start = [], 0
    for first, rows in zip(counts.field(0).to_pylist(), counts.field(1).to_pylist(), strict=True):
        names.append(f"{first:%Y-%m-%d}")
        folder = root / f"day={names[-1]}"
        folder.mkdir(parents=True)
        pq.write_table(events.take(order.slice(start, rows)), folder / "part-0.parquet")
        start += rows
    return names
