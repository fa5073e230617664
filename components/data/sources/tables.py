"""The rows of a user's tables, gathered in a database that spills to disk, and the reasons why rows are broken."""

# ruff: noqa: S608 - the names in these queries are quoted by `values.name` and `values.text`
from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console

from components.common.contracts import SPLIT
from components.data.sources import Window, brief, values
from components.data.sources.mapping import NAMES, Paths, TableConfig
from components.data.sources.partitions import is_needed
from components.data.sources.reading import File, find

IDS = {"user_id": "users", "item_id": "items"}
TEXTS = ("title", "tags", "text")  # whose values may have line breaks


@dataclass(frozen=True)
class Tables:
    """The rows of the user's files, gathered in a database.

    window       of the rows that are wanted
    most         rows to take of the first and the last file of a table; None: all rows of all files
    text_ids     user_id, item_id -> whether the ids are text: the first table that has them decides
    split_words  what the files call the parts of the split -> rows
    """

    db: duckdb.DuckDBPyConnection
    raw: str
    window: Window
    most: int | None
    text_ids: dict[str, bool] = field(default_factory=dict)
    split_words: Counter[str] = field(default_factory=Counter)

    def gather(self, table: str, config: TableConfig, files: list[File], required: str) -> tuple[list[str], int]:
        """Tables NAME (file, row, c0, c1, …) and NAME_broken (file, line, row, reason, given), batch by batch.

        Returns the columns, first the canonical ones that are there, then the features; and the rows of all files. In
        the database the columns have numbers: no name of a user's column can clash with ours there.
        """
        columns: list[str] = []
        rows, made = 0, False
        kinds = "file varchar, line bigint, row bigint, reason varchar, given varchar"
        self.db.execute(f"create table {table}_broken ({kinds})")
        for at, file in enumerate(files):
            theirs = _theirs(table, config, file, required)
            if columns and columns != list(theirs):
                raise ValueError(
                    f"ingest.files.{table}: {file.name} has {list(theirs)}, the files before it {columns}; "
                    "give all files of a table the same columns"
                )
            if not columns and (note := file.unusual_separator()):
                Console(stderr=True, highlight=False).print(f"{file.name}: {note}", markup=False, soft_wrap=True)
            columns = list(theirs)
            texts = tuple(name for ours, name in theirs.items() if ours in TEXTS)
            row = 0
            for batch in file.batches(list(dict.fromkeys(theirs.values())), texts):
                found = batch.rows if self.most is None else batch.rows.slice(0, max(self.most - row, 0))
                if len(batch.broken):
                    self.db.register("lines", batch.broken)
                    broken = f'insert into {table}_broken select ?, line, null, reason, "values" from lines'
                    self.db.execute(broken, [file.name])
                    self.db.unregister("lines")
                    rows += len(batch.broken)
                self._stage(table, config, file, theirs, found, (at, row), made=made)
                if batch.lines is not None:
                    self._number_lines(table, file, row, batch.lines)
                row, made = row + len(found), True
                if self.most is not None and row >= self.most:
                    break
            rows += row
        if not made:
            names = ", ".join(file.name for file in files)
            raise ValueError(f"ingest.files.{table}: no row in {names}; mend ingest.files.{table}.path or the files")
        return columns, rows

    def _stage(
        self, table: str, config: TableConfig, file: File, theirs: dict[str, str], batch: pa.Table,
        start: tuple[int, int], *, made: bool,
    ) -> None:  # fmt: skip
        """Add a batch to the table, its broken rows to NAME_broken, and its text ids to the vocabularies."""
        for ours in set(IDS) & set(theirs):
            if ours not in self.text_ids and len(batch):
                self.text_ids[ours] = values.has_text_ids(batch[theirs[ours]])
        if SPLIT in theirs:
            words = pc.value_counts(batch[theirs[SPLIT]].cast(pa.string())).to_pylist()
            self.split_words.update({word["values"].strip(): word["counts"] for word in words if word["values"]})
        where = f"ingest.files.{table}: {file.name}"
        staged, reason, words = _staged(batch.schema, theirs, config, self.text_ids, where)
        given = ", ".join(f"{values.name(name)} := {values.name(name)}" for name in dict.fromkeys(theirs.values()))
        at, row = start
        self.db.register("batch", batch)
        self.db.execute(
            f"create temp view staged as select {at} as file, {row} + row_number() over () - 1 as row, "
            f"{reason} as reason, struct_pack({given})::varchar as given, {staged} from batch"
        )
        whole = f"select file, row, {', '.join(numbered(list(theirs)))} from staged where reason is null"
        self.db.execute(f"insert into {table} {whole}" if made else f"create table {table} as {whole}")
        broken = f"insert into {table}_broken select ?, null, row, reason, given from staged where reason is not null"
        self.db.execute(broken, [file.name])
        for ours, text in words.items():
            self.db.execute(f"create table if not exists words_{ours} (id bigint, text varchar)")
            self.db.execute(f"insert into words_{ours} select distinct {values.text_id(text)}, {text} from batch")
        self.db.execute("drop view staged")
        self.db.unregister("batch")

    def _number_lines(self, table: str, file: File, row: int, lines: np.ndarray) -> None:
        """Give the broken rows of a batch the numbers of their lines."""
        rows = self.db.execute(
            f"select row from {table}_broken where file = ? and row >= ?", [file.name, row]
        ).fetchnumpy()
        at = np.asarray(rows["row"], np.int64)
        if len(at):
            self.db.register("numbers", pa.table({"row": at, "line": lines[at - row]}))
            self.db.execute(
                f"update {table}_broken set line = numbers.line from numbers where {table}_broken.row = numbers.row "
                "and file = ?", [file.name],
            )  # fmt: skip
            self.db.unregister("numbers")

    def files(self, table: str, path: Paths) -> list[File]:
        found = needed(table, find(self.raw, table, path), self.window)
        return found if self.most is None else [found[at] for at in sorted({0, len(found) - 1})]

    def vocabulary(self, name: str, ids: pa.ChunkedArray) -> pa.Table:
        """Id and text of these ids. Raises ValueError where two texts have one id."""
        clash = f"select min(text), max(text) from words_{name} group by id having count(distinct text) > 1 limit 1"
        for one, other in self.db.sql(clash).fetchall():
            raise ValueError(
                f"ingest.files: {name} {brief(one)!r} and {brief(other)!r} have the same 63 bits of MD5; rename one"
            )
        words = f"select distinct id as {name}, text from words_{name} where text is not null order by id"
        found = self.db.sql(words).to_arrow_table()
        return found.filter(pc.is_in(found[name], value_set=pc.unique(ids)))


def needed(table: str, files: list[File], window: Window) -> list[File]:
    """The files that may hold rows of the window: of users, items and vectors also those of days before it.

    Raises ValueError where there are files, and all of them are of other days.
    """
    wanted = window if table == "events" else Window(until=window.until)
    found = [file for file in files if is_needed(file.day, wanted)]
    if not found:
        days = sorted(str(file.day) for file in files)
        raise ValueError(
            f"ingest.files.{table}: no file of the days of the window; there are files of {days[0]} to {days[-1]}. "
            "Give another ingest.until, or more ingest.window_days"
        )
    return found


def numbered(columns: list[str], some: set[str] | None = None) -> list[str]:
    """What the columns, or some of them, are called in the database."""
    return [f"c{at}" for at, name in enumerate(columns) if some is None or name in some]


def _theirs(table: str, config: TableConfig, file: File, required: str) -> dict[str, str]:
    """Our name -> the file's name of every column that is read. Raises ValueError where one is not there."""
    there = file.columns()
    theirs = {}
    for ours in NAMES[table]:
        given = config.columns.get(ours, ours)
        if given in there:
            theirs[ours] = given
        elif ours in config.columns or ours == required:
            remedy = f"Map it: ingest.files.{table}.columns: {{{ours}: …}}"
            if len(there) == 1 and file.ending != ".parquet":
                remedy = "One column is few: separate the columns by a comma, a semicolon, a tab or |"
            raise ValueError(
                f"ingest.files.{table}: {file.name} has no column {given!r} for {ours}; it has {brief(there)}. {remedy}"
            )
    for feature in (*config.categorical, *config.numeric):
        if feature not in there:
            raise ValueError(
                f"ingest.files.{table}: {file.name} has no column {feature!r}; it has {brief(there)}. "
                "Mend `categorical` or `numeric`, or the file"
            )
        if feature in theirs:
            raise ValueError(f"ingest.files.{table}: {feature!r} is a canonical column, and no feature besides")
        theirs[feature] = feature
    return theirs


def _staged(
    schema: pa.Schema, theirs: dict[str, str], config: TableConfig, text_ids: dict[str, bool], where: str
) -> tuple[str, str, dict[str, str]]:
    """SQL: each column in its canonical type, by its number; why a row is broken, or null; and the texts of ids."""
    columns, reasons, words = [], [], {}
    for at, (ours, given) in enumerate(theirs.items()):
        kind = schema.field(given).type
        if pa.types.is_nested(kind) and ours != "tags":
            raise ValueError(f"{where}: column {given!r} is {kind}; only the tags of the items can be a list")
        found, is_text = f"batch.{values.name(given)}", text_ids.get(ours, False)
        value, wrong = values.canonical(found, kind, ours, numeric=ours in config.numeric, text_ids=is_text)
        if is_text:
            words[ours] = values.given(found, kind) + "::varchar"
        columns.append(f"{value} as c{at}")
        reasons += [f"when {broken} then {values.text(f'{given} is {what}')}" for what, broken in wrong.items()]
    return ", ".join(columns), f"case {' '.join(reasons)} end" if reasons else "null::varchar", words
