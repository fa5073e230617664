"""An online store on SQLite: the file of Feast's store, written at once, or as a copy of another with what differs.

Two things are added to what Feast has. rows/VIEW.parquet holds a hash of each row as it was written, so that the next
store finds what changed in the sources. In the file, the table `changed` names the rows that were written since: a push
does that. A copy takes them from the sources again, and then gets the clicks of the journal.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from contextlib import closing
from datetime import UTC, datetime
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.features.layout import batches, entity_keys

if TYPE_CHECKING:
    from feast import FeatureView

ROWS = "rows"
CHANGED = "create table changed (view text, entity_key blob, primary key (view, entity_key)) without rowid"
NOTE = """
    create trigger "changed_{view}_{event}" after {event} on "{table}" begin
        insert into changed select '{view}', new.entity_key
        where not exists (select 1 from changed where view = '{view}' and entity_key = new.entity_key);
    end
"""
EVENTS = ("insert", "update")


def write(
    db: sqlite3.Connection,
    project: str,
    views: list[FeatureView],
    rows: dict[str, pa.Table],
    folder: Path,
    like: Path | None,
) -> int | None:
    """Write the views' rows, and take them from `rows`, into the tables that `apply` has made.

    Returns how many differ from the store `like`; None without one.
    """
    (folder / ROWS).mkdir()
    for setting in ("journal_mode = off", "synchronous = off"):  # the folder is synced before it is named
        db.execute(f"pragma {setting}")
    if like:
        with closing(sqlite3.connect(like / "online.db")) as old:
            old.backup(db)
    written = 0
    for view in views:
        table, own, (key,) = f"{project}_{view.name}", rows.pop(view.name), view.join_keys
        hashes = digest(own, key)
        pq.write_table(hashes, folder / ROWS / f"{view.name}.parquet")
        if like:
            for event in EVENTS:
                db.execute(f'drop trigger "changed_{view.name}_{event}"')
            touched = db.execute("select entity_key from changed where view = ?", [view.name])
            ids = np.frombuffer(b"".join(entity[-8:] for (entity,) in touched), "<i8")
            differ, gone = difference(hashes, pq.read_table(like / ROWS / f"{view.name}.parquet"), ids)
            remove(db, table, entity_keys(key, np.concatenate([differ, gone])))
            own = own.filter(pc.is_in(own[key], value_set=pa.array(differ)))
            written += len(differ) + len(gone)
        else:  # one tree, sorted by key; as Feast makes it, there are three
            (made,) = db.execute("select sql from sqlite_master where type = 'table' and name = ?", [table]).fetchone()
            db.execute(f'drop table "{table}"')
            db.execute(f"{made} without rowid")
        insert(db, table, view, own)
    if views:
        db.execute("drop table if exists changed")
        db.execute(CHANGED)
    for view in views:
        for event in EVENTS:
            db.execute(NOTE.format(view=view.name, event=event, table=f"{project}_{view.name}"))
    return written if like else None


def insert(db: sqlite3.Connection, table: str, view: FeatureView, rows: pa.Table) -> None:
    columns = "entity_key, feature_name, value, value_text, event_ts"
    statement = f'insert into "{table}" ({columns}) values (?, ?, ?, ?, ?)'  # noqa: S608 - our own names
    db.execute("begin")
    for batch in batches(view, rows):
        known = local_seconds(batch.microseconds).tolist()
        by_feature = (
            zip(batch.keys, repeat(feature), values, batch.texts[feature], known)
            for feature, values in batch.values.items()
        )
        db.executemany(statement, chain.from_iterable(zip(*by_feature, strict=True)))
    db.execute("commit")


def remove(db: sqlite3.Connection, table: str, keys: Iterable[bytes]) -> None:
    db.execute("begin")
    db.executemany(f'delete from "{table}" where entity_key = ?', ((key,) for key in keys))  # noqa: S608 - our own names
    db.execute("commit")


def digest(rows: pa.Table, key: str) -> pa.Table:
    """id and a hash of the row. Another release of DuckDB may hash otherwise: then every row is written again."""
    columns = ", ".join(f'"{name}"' for name in sorted(rows.column_names))
    with duckdb.connect() as db:
        db.register("rows", rows)
        return db.sql(f'select "{key}" as id, hash({columns}) as hash from rows order by id').to_arrow_table()  # noqa: S608


def difference(now: pa.Table, before: pa.Table, touched: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the rows to write, and of those to remove. `touched`: written since `before`, whatever its hash says."""
    with duckdb.connect() as db:
        for name, table in (("now", now), ("past", before), ("touched", pa.table({"id": touched}))):
            db.register(name, table)
        differ = db.sql(
            "select id from now anti join past using (id, hash) union select id from now semi join touched using (id) "
            "order by id"
        ).fetchnumpy()
        gone = db.sql(
            "select id from (select id from past union select id from touched) anti join now using (id) order by id"
        ).fetchnumpy()
    return differ["id"].astype(np.int64), gone["id"].astype(np.int64)


def local_seconds(microseconds: np.ndarray) -> np.ndarray:
    """What Feast's SQLite store keeps of a time: the seconds of its UTC clock, taken as a clock of this machine's zone.
    It reads them back the same way."""
    quarter, place = np.unique(microseconds // 900_000_000, return_inverse=True)  # no zone changes within one
    offsets = [
        int(datetime.fromtimestamp(900 * q, UTC).replace(tzinfo=None).timestamp()) - 900 * q for q in quarter.tolist()
    ]
    return microseconds // 1_000_000 + np.array(offsets, np.int64)[place]
