"""Your own parquet or CSV files, local or behind any URL that fsspec opens, mapped by `ingest.files` in params.yaml.

    events   user_id, item_id, timestamp, created_at, label, split, and the columns that become features
    users    user_id, and attributes                                          optional
    items    item_id, created_at, title, tags, text, image, and attributes    optional
    vectors  a parquet file a modality: item_id, vector                       optional

Of the events' columns only `label` must be there. Without a user or an item column all rows are of one, 0, which is
no feature; without a timestamp rows keep their order and the split must be given: a column, or a file for each part.
Such plain tabular data (Criteo, Avazu) has no histories and no popularity. An item's image is the path of its picture,
below ingest.raw and nowhere else, or an http(s) URL. DVC watches ingest.raw alone: what the absolute path of a table
or a URL names elsewhere is read whenever `ingest` runs, and never makes it run.

A value that cannot be read (a label of 2, a time without a zone, a word for a number) sends its row to quarantine with
the file and the reason. In one event table, a row that an earlier file held too is set aside as repeated. Files count
by their names: where a later one holds an impression (user, item and timestamp) and not this row of it, the row is set
aside as corrected. With `created_at` mapped, the arrival decides that, in `ingest`.
"""

# ruff: noqa: S608 - the names in these queries are quoted by `_name` and `_text`
from __future__ import annotations

import posixpath
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import duckdb
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import csv

from components.common.contracts import ARRIVAL, EVENTS, HISTORIES, HISTORY, IMAGE, ITEMS, SPLIT, USERS, UTC, VECTORS
from components.data.sources import RawTables, timeless

if TYPE_CHECKING:
    from components.data.ingest import IngestConfig

NAMES = {
    "events": (*EVENTS.names, ARRIVAL, SPLIT),
    "users": tuple(USERS.names),
    "items": (*ITEMS.names, IMAGE),
}
PARTS = ("train", "valid", "test")
SEPARATORS = {".csv": ",", ".tsv": "\t"}
MEMORY = "2GB"  # of the table that rows are gathered in, which spills to disk beyond
BATCH = 65_536  # rows of parquet at once
BLOCK = 1 << 24  # bytes of CSV at once
ZONE = r"(Z|[+-]\d{2}(:?\d{2})?)$"
WHOLE = r"[+-]?\d+(\.0*)?"  # of an id in text: 7.0 is what pandas writes where another row has none
SECONDS = (-62_135_596_800, 253_402_300_800)  # of the years 1 to 9999, which is all that Python's datetime knows
TIMES = "timestamptz '0001-01-01 00:00:00Z' and timestamptz '9999-12-31 23:59:59.999999Z'"
IMPRESSION = {"user_id", "item_id", "timestamp"}


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """path         a file or a glob, below ingest.raw; for events also {train: …, valid: …, test: …}; null: no table
    columns      canonical name: the files' name, where they differ
    categorical  columns that become features as they are, whole numbers and strings alike
    numeric      columns that become features in buckets: floor(ln(x)²) above 2, else whole x (`models.schema.bucket`)
    """

    path: str | dict[str, str] | None
    columns: dict[str, str]
    categorical: list[str]
    numeric: list[str]

    def __post_init__(self) -> None:
        if isinstance(self.path, dict) and (not {"train", "valid"} <= set(self.path) <= set(PARTS)):
            raise ValueError(f"path has the parts {list(self.path)}; give train, valid and, if there is one, test")
        features = [*self.categorical, *self.numeric]
        if twice := sorted({name for name in features if features.count(name) > 1}):
            raise ValueError(f"columns {twice} are named twice; a column is categorical or numeric")


@dataclass(frozen=True, kw_only=True)
class FilesConfig:
    """events, users, items  the tables; users and items may be left out: then they are those of the events
    vectors                modality: a parquet file or glob of item_id and vector
    separator              between the tags of an item, where they are one string
    """

    events: TableConfig
    users: TableConfig
    items: TableConfig
    vectors: dict[str, str]
    separator: str

    def __post_init__(self) -> None:
        for table, names in NAMES.items():
            if unknown := sorted(set(getattr(self, table).columns) - set(names)):
                raise ValueError(f"{table}.columns maps {unknown}; the canonical names are {', '.join(names)}")


def read(config: IngestConfig) -> RawTables:
    """Raises ValueError that names table, column, file and remedy where the mapping and the files do not agree."""
    mapping = config.files
    if mapping.events.path is None:
        raise ValueError("ingest.files.events.path is null; name the files of your impressions, e.g. events/*.parquet")
    with tempfile.TemporaryDirectory(prefix="clickloop-files-") as spill, duckdb.connect() as db:
        db.execute(f"set memory_limit = '{MEMORY}'; set temp_directory = '{spill}'; set timezone = 'UTC'")
        events, rejected, set_aside, rows = _events(db, config.raw, mapping.events)
        first = pc.min(events["timestamp"])
        users = _table(db, config.raw, "users", mapping.users, events["user_id"])
        items = _table(db, config.raw, "items", mapping.items, events["item_id"])
    tags = items["tags"]
    if pa.types.is_string(tags.type) or pa.types.is_null(tags.type):
        tags = pc.split_pattern(tags.cast(pa.string()), mapping.separator)
    titles = pc.coalesce(items["title"], items["item_id"].cast(pa.string()))
    known = items["created_at"]
    if without_times := HISTORY[0] in events.column_names:  # rows whose times are made up know every item
        known = pa.nulls(len(items), UTC)
    created = pc.coalesce(known, first)
    pictures = items[IMAGE]
    whole = pc.or_(pc.match_substring(pictures, "://"), pc.starts_with(pictures, "/"))
    pictures = pc.if_else(whole, pictures, pc.binary_join_element_wise(config.raw.rstrip("/"), pictures, "/"))
    for name, column in {"tags": tags, "title": titles, "created_at": created, IMAGE: pictures}.items():
        items = items.set_column(items.column_names.index(name), name, column)
    return RawTables(
        events=events,
        users=users,
        items=items.sort_by("item_id"),
        modalities={name: _vectors(config.raw, name, path) for name, path in mapping.vectors.items()},
        histories=HISTORIES.empty_table() if without_times else None,
        rejected=rejected,
        set_aside=set_aside,
        read=rows,
        facts={"numeric": mapping.events.numeric},
    )


# ---- tables -----------------------------------------------------------------------------------------------------


def _events(
    db: duckdb.DuckDBPyConnection, raw: str, table: TableConfig
) -> tuple[pa.Table, dict[str, pa.Table], dict[str, pa.Table], int]:
    """The events; the broken rows, and those that another file has or corrects, by reason; and how many were read."""
    parts = table.path if isinstance(table.path, dict) else {"": str(table.path)}
    files = [(part, file) for part in ("", *PARTS) if part in parts for file in _files(raw, "events", parts[part])]
    columns, rows = _gather(db, "events", table, [file for _, file in files], required=("label",))
    timed, given = "timestamp" in columns, "" not in parts
    if SPLIT in columns and given:
        raise ValueError("ingest.files.events: a path for each part, and a split column too; give the one or the other")
    if not timed and not given and SPLIT not in columns:
        raise ValueError(
            f"ingest.files.events: {files[0][1].name} has no timestamp and no split column, so no row is later than "
            "another; map one of the two in `columns`, or give a path for train, valid and test each"
        )
    rejected = _by_reason(db, "events_broken", ["file", "row", "given"], ["file", "row", "values"])
    kind, fate = "view", "null"
    if timed and len(files) > 1:  # without times, equal rows are equal impressions and no more
        row = ", ".join(_numbered(columns))
        kind, fate = "table", f"when min(file) over (partition by {row}) < file then 'repeated by a later file'"
        if set(columns) >= IMPRESSION and ARRIVAL not in columns:
            impression = ", ".join(_numbered(columns, IMPRESSION))
            newest = f"max(file) over (partition by {row}) < max(file) over (partition by {impression})"
            fate += f" when {newest} then 'corrected by a later file'"
        fate = f"case {fate} end"
    db.execute(f"create {kind} marked as select *, {fate} as reason from events")
    split = [f"list_position({list(PARTS)}, {column})" for column in _numbered(columns, {SPLIT})]
    found = db.sql(
        f"select * from marked where reason is null order by {', '.join([*split, 'file', 'row'])}"
    ).to_arrow_table()
    set_aside = _by_reason(db, "marked", _numbered(columns), columns)
    events = found.select(_numbered(columns)).rename_columns(columns)
    if given:
        events = events.append_column(SPLIT, pa.array([part for part, _ in files]).take(found["file"].combine_chunks()))
    for name in {"user_id", "item_id"} - set(columns):
        events = events.append_column(name, pa.repeat(pa.scalar(0, pa.int64()), len(events)))
    if not timed:
        events = events.append_column("timestamp", timeless(len(events)))
        for name in HISTORY:
            events = events.append_column(name, pa.repeat(pa.scalar(0, pa.int64()), len(events)))
    return events, rejected, set_aside, rows


def _by_reason(db: duckdb.DuckDBPyConnection, table: str, columns: list[str], names: list[str]) -> dict[str, pa.Table]:
    """The rows that have a reason, by it: these columns under these names, in the order of the files."""
    reasons = db.sql(f"select distinct reason from {table} where reason is not null order by all").fetchall()
    query = f"select {', '.join(columns)} from {table} where reason = ? order by file, row"
    return {reason: db.sql(query, params=[reason]).to_arrow_table().rename_columns(names) for (reason,) in reasons}


def _table(db: duckdb.DuckDBPyConnection, raw: str, name: str, table: TableConfig, ids: pa.ChunkedArray) -> pa.Table:
    """The users or the items; those of the events where there is no file. Raises ValueError on a broken row."""
    key, names = NAMES[name][0], NAMES[name]
    if table.path is None:
        found = pa.table({key: pc.unique(ids)})
    else:
        columns, _ = _gather(db, name, table, _files(raw, name, str(table.path)), required=(key,))
        if broken := db.sql(f"select * from {name}_broken").fetchall():
            file, _, reason, values = broken[0]
            raise ValueError(
                f"ingest.files.{name}: {len(broken)} broken row(s), e.g. in {file}: {reason}: {values}. Mend the file"
            )
        found = db.sql(f"select * from {name} order by file, row").to_arrow_table()
        found = found.select(_numbered(columns)).rename_columns(columns)
    for absent in set(names) - set(found.column_names):
        found = found.append_column(absent, pa.nulls(len(found), UTC if absent == "created_at" else pa.string()))
    return found.sort_by(key)


def _gather(
    db: duckdb.DuckDBPyConnection, name: str, table: TableConfig, files: list[File], required: tuple[str, ...]
) -> tuple[list[str], int]:
    """Tables NAME (file, row, c0, c1, …) and NAME_broken (file, row, reason, given), batch by batch.

    Returns the columns, the canonical ones that are there, then the features; and the rows of all files. The columns
    have numbers in the database: whatever their names are, none is that of another column there.
    """
    columns: list[str] = []
    rows, made = 0, False
    db.execute(f"create table {name}_broken (file varchar, row bigint, reason varchar, given varchar)")
    for at, file in enumerate(files):
        theirs = _theirs(name, table, file, required)
        if columns and columns != list(theirs):
            raise ValueError(
                f"ingest.files.{name}: {file.name} has {list(theirs)}, the files before it {columns}; "
                "give all files of a table the same columns"
            )
        columns = list(theirs)
        numbered = ", ".join(_numbered(columns))
        given = ", ".join(f"{_name(column)} := {_name(column)}" for column in dict.fromkeys(theirs.values()))
        torn: list[str] = []
        row = 0
        for batch in file.batches(list(dict.fromkeys(theirs.values())), torn):
            values, reason = _staged(batch.schema, theirs, table, f"ingest.files.{name}: {file.name}")
            db.register("batch", pa.Table.from_batches([batch]))
            db.execute(
                f"create temp view staged as select {at} as file, {row} + row_number() over () - 1 as row, "
                f"{reason} as reason, struct_pack({given})::varchar as given, {values} from batch"
            )
            whole = f"select file, row, {numbered} from staged where reason is null"
            db.execute(f"insert into {name} {whole}" if made else f"create table {name} as {whole}")
            broken = "select ?, row, reason, given from staged where reason is not null"
            db.execute(f"insert into {name}_broken {broken}", [file.name])
            db.execute("drop view staged")
            db.unregister("batch")
            row, made = row + len(batch), True
        if torn:
            db.register("lines", pa.table({"line": torn}))
            db.execute(f"insert into {name}_broken select ?, null, 'line is torn', line from lines", [file.name])
            db.unregister("lines")
        rows += row + len(torn)
    if not made:
        told = ", ".join(file.name for file in files)
        raise ValueError(f"ingest.files.{name}: no row in {told}; mend ingest.files.{name}.path or the files")
    return columns, rows


def _numbered(columns: list[str], some: set[str] | None = None) -> list[str]:
    """What the columns, or some of them, are called in the database."""
    return [f"c{at}" for at, name in enumerate(columns) if some is None or name in some]


def _theirs(name: str, table: TableConfig, file: File, required: tuple[str, ...]) -> dict[str, str]:
    """Our name -> the file's name of every column that is read. Raises ValueError where one is not there."""
    there = file.columns()
    theirs = {}
    for ours in NAMES[name]:
        given = table.columns.get(ours, ours)
        if given in there:
            theirs[ours] = given
        elif ours in table.columns or ours in required:
            raise ValueError(
                f"ingest.files.{name}: {file.name} has no column {given!r} for {ours}; it has {there}. "
                f"Map it: ingest.files.{name}.columns: {{{ours}: …}}"
            )
    for feature in (*table.categorical, *table.numeric):
        if feature not in there:
            raise ValueError(
                f"ingest.files.{name}: {file.name} has no column {feature!r}; it has {there}. "
                "Mend `categorical` or `numeric`, or the file"
            )
        if feature in theirs:
            raise ValueError(f"ingest.files.{name}: {feature!r} is a canonical column, and no feature besides")
        theirs[feature] = feature
    return theirs


# ---- values -----------------------------------------------------------------------------------------------------


def _staged(schema: pa.Schema, theirs: dict[str, str], table: TableConfig, where: str) -> tuple[str, str]:
    """SQL: each column in its canonical type, by its number; and why a row is broken, or null."""
    values, reasons = [], []
    for at, (ours, given) in enumerate(theirs.items()):
        kind = schema.field(given).type
        if pa.types.is_nested(kind) and ours != "tags":
            raise ValueError(f"{where}: column {given!r} is {kind}; a list can be the tags of the items alone")
        value, reason = _value(f"batch.{_name(given)}", kind, ours, ours in table.numeric)
        values.append(f"{value} as c{at}")
        reasons += [f"when {broken} then {_text(f'{given} is {told}')}" for told, broken in reason.items()]
    return ", ".join(values), f"case {' '.join(reasons)} end" if reasons else "null::varchar"


def _name(column: str) -> str:
    return '"' + column.replace('"', '""') + '"'


def _text(words: str) -> str:
    return "'" + words.replace("'", "''") + "'"


def _value(column: str, kind: pa.DataType, ours: str, numeric: bool) -> tuple[str, dict[str, str]]:
    """SQL for the canonical value; and what is wrong with it -> SQL for where. Empty text is no value."""
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    given = f"nullif(trim({column}), '')" if text else column
    number = f"try_cast({given} as double)"
    if numeric:
        bucket = f"try_cast(if({number} > 2, floor(ln({number}) ** 2), trunc({number})) as bigint)::varchar"
        return f"if(isfinite({number}), {bucket}, null)", {"no number": f"{given} is not null and {number} is null"}
    match ours:
        case "user_id" | "item_id":
            value = f"try_cast({given} as bigint)"  # it rounds, so that 7.5 would be another's id
            whole = f"regexp_full_match({given}, '{WHOLE}')" if text else f"{value} = {given}"
            wrong = {"missing": f"{given} is null"}
            wrong["no whole number of 64 bits"] = f"{value} is null or not {whole}"
            if pa.types.is_floating(kind):
                most = 2 ** (np.finfo(kind.to_pandas_dtype()).nmant + 1)
                wrong["a float too large to be exact"] = f"abs({given}) >= {most}"
            return value, wrong
        case "label":
            value = f"coalesce({number}, try_cast({given}::varchar as boolean)::double)"  # false and true will do
            wrong = {"missing": f"{given} is null", "neither 0 nor 1": f"{value} is null or {value} not in (0, 1)"}
            return f"try_cast({value} as tinyint)", wrong
        case "timestamp" | "created_at":
            value, wrong = _time(given, kind, text)
            # an item may be without a time of arrival, an event without its time is none
            return value, {**({"missing": f"{given} is null"} if ours == "timestamp" else {}), **wrong}
        case "split":
            return f"{given}::varchar", {"no part": f"{given} is null or {given}::varchar not in {PARTS}"}
        case "tags" if pa.types.is_nested(kind):
            return f"{given}::varchar[]", {}
    return f"{given}::varchar", {}


def _time(given: str, kind: pa.DataType, text: bool) -> tuple[str, dict[str, str]]:
    """A timestamp with a zone, an ISO text with one, or seconds since 1970."""
    value = f"try_cast({given} as timestamptz)"
    told = {}
    if pa.types.is_timestamp(kind):
        told["a time without a zone"] = "true" if kind.tz is None else "false"
    else:
        number = f"try_cast({given} as double)"
        seconds = f"{number} >= {SECONDS[0]} and {number} < {SECONDS[1]}"
        time = f"if({seconds}, make_timestamptz(round({number} * 1000000)::bigint), null)"
        if pa.types.is_floating(kind) and kind.bit_width < 64:
            told["a float of too few bits for a time"] = "true"
        told["too large for seconds since 1970: write seconds, not milliseconds"] = f"not ({seconds})"
        if text:
            value = f"if({number} is null, {value}, {time})"
            told["a time without a zone"] = (
                f"{value} is not null and {number} is null and not regexp_matches({given}, '{ZONE}')"
            )
        else:
            value = time
    told["no time"] = f"not coalesce({value} between {TIMES}, false)"
    return value, {name: f"{given} is not null and {broken}" for name, broken in told.items()}


# ---- files ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class File:
    """One parquet, CSV or TSV file (the latter two also compressed) of a filesystem that fsspec knows."""

    system: Any
    path: str

    @property
    def name(self) -> str:
        return str(self.system.unstrip_protocol(self.path)).removeprefix("file://")

    @property
    def separator(self) -> str | None:
        """None: parquet. Raises ValueError on another ending."""
        for ending, separator in SEPARATORS.items():
            if ending in posixpath.basename(self.path):
                return separator
        if self.path.endswith(".parquet"):
            return None
        raise ValueError(f"{self.name}: files end in .parquet, .csv, .tsv, .csv.gz or .tsv.gz; rename it")

    def columns(self) -> list[str]:
        if self.separator is None:
            return self._parquet(lambda file: file.schema_arrow.names)
        with self._told(), self._csv(None, []) as reader:
            return list(reader.schema.names)

    def batches(self, columns: list[str], torn: list[str]) -> Iterator[pa.RecordBatch]:
        """The columns, as they are in parquet and as text in CSV; lines of another width go to `torn`."""
        if self.separator is None:
            with self._told(), self.system.open(self.path) as opened:
                yield from pq.ParquetFile(opened).iter_batches(BATCH, columns=columns)
        else:
            with self._told(), self._csv(columns, torn) as reader:
                yield from reader

    def table(self) -> pa.Table:
        return self._parquet(lambda file: file.read())

    def _parquet(self, ask: Callable[[pq.ParquetFile], Any]) -> Any:
        with self._told(), self.system.open(self.path) as opened:
            return ask(pq.ParquetFile(opened))

    def _csv(self, columns: list[str] | None, torn: list[str]) -> csv.CSVStreamingReader:
        def note(row: csv.InvalidRow) -> str:
            torn.append(str(row.text))
            return "skip"

        names = None if columns is None else dict.fromkeys(columns, pa.string())
        return csv.open_csv(
            self.system.open(self.path, compression="infer"),
            csv.ReadOptions(use_threads=False, block_size=BLOCK),
            csv.ParseOptions(delimiter=self.separator, invalid_row_handler=note),
            csv.ConvertOptions(include_columns=columns, column_types=names, strings_can_be_null=False),
        )

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What cannot be read, be it broken or out of reach, is a ValueError: each filesystem has errors of its own."""
        try:
            yield
        except Exception as error:
            told = f"{self.name} cannot be read whole: {type(error).__name__}: {error}"
            raise ValueError(f"{told}. Mend the file or the access to it") from error


def _files(raw: str, table: str, path: str) -> list[File]:
    """The files of a path or glob below `raw`, by name. Raises ValueError where there is none."""
    url = path if "://" in path or posixpath.isabs(path) else posixpath.join(raw, path)
    try:
        system, pattern = fsspec.core.url_to_fs(url)
        if set("*?[") & set(path):
            found = sorted(system.glob(pattern))
        else:  # `isfile` is false whatever went wrong
            found = [pattern] if system.info(pattern)["type"] == "file" else []
    except FileNotFoundError:
        found = []
    except ImportError as error:  # a filesystem whose package is not installed
        raise ValueError(f"ingest.files.{table}: {url} cannot be opened: {error}") from None
    except Exception as error:  # each filesystem of fsspec has errors of its own
        told = f"{url} cannot be opened: {type(error).__name__}: {error}"
        raise ValueError(f"ingest.files.{table}: {told}. Mend the path or the access to it") from error
    if not found:
        raise ValueError(f"ingest.files.{table}: no file at {url}; mend ingest.files.{table}.path or ingest.raw")
    return [File(system, file) for file in found]


def _vectors(raw: str, name: str, path: str) -> pa.Table:
    tables = []
    for file in _files(raw, f"vectors.{name}", path):
        if missing := sorted(set(VECTORS.names) - set(file.columns())):
            raise ValueError(
                f"ingest.files.vectors.{name}: {file.name} has no column {missing}; it has {file.columns()}. Write "
                "item_id and vector, a list of numbers for each item"
            )
        tables.append(file.table().select(VECTORS.names))
    return pa.concat_tables(tables)
