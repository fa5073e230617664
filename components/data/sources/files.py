"""Your own parquet or CSV files, local or behind any URL that fsspec opens, mapped by `ingest.files` in params.yaml.

    events   user_id, item_id, timestamp, created_at, label, split, and the columns that become features
    users    user_id, and attributes                                          optional
    items    item_id, created_at, title, tags, text, image, and attributes    optional
    vectors  a parquet file for each modality: item_id, vector                optional

Of the events' columns only `label` must be there. Without a user or an item column, all rows belong to one, 0, which is
no feature. Without a timestamp, rows keep their order, and the split must be given: by a column, or by a path for each
part. Such plain tabular data (Criteo, Avazu) has no histories and no popularity. An item's image is the path of its
picture, below ingest.raw and nowhere else, or an http(s) URL. DVC watches ingest.raw alone: a table that is named by an
absolute path or a URL elsewhere is read whenever `ingest` runs, but a change of it does not make `ingest` run.

Ids are whole numbers or text. A column of ids is text where most of its first 1000 values are no whole numbers; then
each text is encoded (`values.text_id`), and users_vocabulary.parquet or items_vocabulary.parquet says which id is which
text. Items, users and vectors are encoded as the events are.

A value that cannot be read (a label of 2, a time without a zone, a word for a number) sends its row to quarantine with
the file and the reason. In one event table, a row that an earlier file held too is set aside as repeated. Files count
in the order of their names: where a later file holds an impression (user, item and timestamp) but not this row of it,
the row is set aside as corrected. With `created_at` mapped, the time of arrival decides that, in `ingest`.
"""

# ruff: noqa: S608 - these queries name columns by number
from __future__ import annotations

import tempfile
from dataclasses import dataclass

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from components.common.contracts import ARRIVAL, HISTORIES, HISTORY, IMAGE, SPLIT, TIMESTAMP, VECTORS
from components.data.sources import RawTables, Window, brief, timeless, values
from components.data.sources.mapping import NAMES, PARTS, FilesConfig, Paths, TableConfig
from components.data.sources.tables import IDS, Tables, numbered

MEMORY = "2GB"  # of the table that rows are gathered in, which spills to disk beyond
IMPRESSION = {"user_id", "item_id", "timestamp"}


def read(raw: str, config: FilesConfig, window: Window, rows: int | None = None) -> RawTables:
    """The tables; with `rows`, so many rows of the first and the last file of each.

    Raises ValueError that names table, column, file and remedy where the mapping and the files do not agree.
    """
    if config.events.path is None:
        raise ValueError(
            "ingest.files.events.path is null; name the files of your impressions, e.g. events/*.parquet "
            f"(`python -m components inspect {raw}` proposes the whole section)"
        )
    with tempfile.TemporaryDirectory(prefix="clickloop-files-") as spill, duckdb.connect() as db:
        db.execute(f"set memory_limit = '{MEMORY}'; set temp_directory = '{spill}'; set timezone = 'UTC'")
        tables = Tables(db, raw, window, rows)
        found = _events(tables, config.events)
        events = found.events
        first = pc.min(events["timestamp"])
        users = _table(tables, "users", config.users, events["user_id"])
        items = _table(tables, "items", config.items, events["item_id"])
        modalities = {name: _vectors(tables, name, path) for name, path in config.vectors.items()}
        vocabularies = {
            IDS[name]: tables.vocabulary(name, (users if name == "user_id" else items)[name])
            for name in IDS
            if tables.text_ids.get(name)
        }
    tags = items["tags"]
    if pa.types.is_string(tags.type) or pa.types.is_null(tags.type):
        tags = pc.split_pattern(tags.cast(pa.string()), config.separator)
    names = items["item_id"].cast(pa.string())
    if words := vocabularies.get("items"):
        names = words["text"].take(pc.index_in(items["item_id"], value_set=words["item_id"].combine_chunks()))
    known = items["created_at"]
    if without_times := HISTORY[0] in events.column_names:  # rows whose times are made up know every item
        known = pa.nulls(len(items), TIMESTAMP)
    pictures = items[IMAGE]
    whole = pc.or_(pc.match_substring(pictures, "://"), pc.starts_with(pictures, "/"))
    pictures = pc.if_else(whole, pictures, pc.binary_join_element_wise(raw.rstrip("/"), pictures, "/"))
    for name, column in {
        "tags": tags,
        "title": pc.coalesce(items["title"], names),
        "created_at": pc.coalesce(known, first),
        IMAGE: pictures,
    }.items():
        items = items.set_column(items.column_names.index(name), name, column)
    return RawTables(
        events=events,
        users=users,
        items=items.sort_by("item_id"),
        modalities=modalities,
        histories=HISTORIES.empty_table() if without_times else None,
        rejected=found.rejected,
        set_aside=found.set_aside,
        vocabularies=vocabularies,
        derived=tuple(name for name in ("users", "items") if getattr(config, name).path is None),
        read=found.read,
        facts={
            "numeric": config.events.numeric,
            **({"split_words": dict(tables.split_words)} if set(tables.split_words) - set(PARTS) else {}),
        },
    )


# ---- tables -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Events:
    events: pa.Table
    rejected: dict[str, pa.Table]
    set_aside: dict[str, pa.Table]
    read: int


def _events(tables: Tables, config: TableConfig) -> _Events:
    """The events; by reason, the broken rows and those that another file repeats or corrects; and the count."""
    db = tables.db
    parts: dict[str, Paths] = config.path if isinstance(config.path, dict) else {"": config.path or []}
    files = [(part, file) for part in ("", *PARTS) if part in parts for file in tables.files("events", parts[part])]
    columns, rows = tables.gather("events", config, [file for _, file in files], required="label")
    timed, given = "timestamp" in columns, "" not in parts
    if SPLIT in columns and given:
        raise ValueError("ingest.files.events: a path for each part, and a split column too; give the one or the other")
    if not timed and not given and SPLIT not in columns:
        raise ValueError(
            f"ingest.files.events: {files[0][1].name} has no timestamp and no split column, so no row is later than "
            "another; map one of the two in `columns`, or give a path for train, valid and test each"
        )
    rejected = _by_reason(db, "events_broken", ["file", "line", "row", "given"], ["file", "line", "row", "values"])
    kind, fate = "view", "null"
    if timed and len(files) > 1:  # without times, equal rows are impressions of their own
        row = ", ".join(numbered(columns))
        kind, fate = "table", f"when min(file) over (partition by {row}) < file then 'repeated by a later file'"
        if set(columns) >= IMPRESSION and ARRIVAL not in columns:
            impression = ", ".join(numbered(columns, IMPRESSION))
            newest = f"max(file) over (partition by {row}) < max(file) over (partition by {impression})"
            fate += f" when {newest} then 'corrected by a later file'"
        fate = f"case {fate} end"
    db.execute(f"create {kind} marked as select *, {fate} as reason from events")
    split = [f"list_position({list(PARTS)}, {column})" for column in numbered(columns, {SPLIT})]
    found = db.sql(
        f"select * from marked where reason is null order by {', '.join([*split, 'file', 'row'])}"
    ).to_arrow_table()
    set_aside = _by_reason(db, "marked", numbered(columns), columns)
    events = found.select(numbered(columns)).rename_columns(columns)
    if given:
        events = events.append_column(SPLIT, pa.array([part for part, _ in files]).take(found["file"].combine_chunks()))
    for name in set(IDS) - set(columns):
        events = events.append_column(name, pa.repeat(pa.scalar(0, pa.int64()), len(events)))
    if not timed:
        events = events.append_column("timestamp", timeless(len(events)))
        for name in HISTORY:
            events = events.append_column(name, pa.repeat(pa.scalar(0, pa.int64()), len(events)))
    return _Events(events, rejected, set_aside, rows)


def _by_reason(db: duckdb.DuckDBPyConnection, table: str, columns: list[str], names: list[str]) -> dict[str, pa.Table]:
    """Reason -> the rows that have it: these columns under these names, in the order of the files."""
    reasons = db.sql(f"select distinct reason from {table} where reason is not null order by all").fetchall()
    order = "file, line, row" if "line" in columns else "file, row"
    query = f"select {', '.join(columns)} from {table} where reason = ? order by {order}"
    return {reason: db.sql(query, params=[reason]).to_arrow_table().rename_columns(names) for (reason,) in reasons}


def _table(tables: Tables, name: str, config: TableConfig, ids: pa.ChunkedArray) -> pa.Table:
    """The users or the items; those of the events where there is no file. Raises ValueError on a broken row."""
    key, names = NAMES[name][0], NAMES[name]
    if config.path is None:
        found = pa.table({key: pc.unique(ids)})
    else:
        assert not isinstance(config.path, dict), "the config refuses it"
        columns, _ = tables.gather(name, config, tables.files(name, config.path), required=key)
        broken = tables.db.sql(f"select file, line, row, reason, given from {name}_broken order by all").fetchall()
        if broken:
            file, line, row, reason, content = broken[0]
            place = f"row {row}" if line is None else f"line {line}"
            raise ValueError(
                f"ingest.files.{name}: {len(broken)} broken row(s), e.g. in {file}, {place}: {reason}: "
                f"{brief(content)}. Mend the file"
            )
        found = tables.db.sql(f"select * from {name} order by file, row").to_arrow_table()
        found = found.select(numbered(columns)).rename_columns(columns)
    for absent in set(names) - set(found.column_names):
        found = found.append_column(absent, pa.nulls(len(found), TIMESTAMP if absent == "created_at" else pa.string()))
    return found.sort_by(key)


def _vectors(tables: Tables, name: str, path: Paths) -> pa.Table:
    found = []
    for file in tables.files(f"vectors.{name}", path):
        if missing := sorted(set(VECTORS.names) - set(file.columns())):
            raise ValueError(
                f"ingest.files.vectors.{name}: {file.name} has no column {missing}; it has {file.columns()}. Write "
                "item_id and vector, a list of numbers for each item"
            )
        vectors = file.table().select(VECTORS.names)
        if tables.text_ids.get("item_id"):
            tables.db.register("ids", vectors.select(["item_id"]))
            query = f"select {values.text_id('item_id')} as item_id from ids"
            vectors = vectors.set_column(0, "item_id", tables.db.sql(query).to_arrow_table()["item_id"])
            tables.db.unregister("ids")
        found.append(vectors)
    return pa.concat_tables(found)
