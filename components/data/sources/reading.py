"""Parquet, CSV and TSV files of any filesystem that fsspec knows, read in batches of bounded size.

A CSV file is parsed in blocks of whole lines. In every block the records are compared with the lines: where a record
spans lines, its quotes decide whether that can be right. A stray quote would swallow all rows up to the next quote.
Such a line is broken, and the lines after it are read as if it was not there.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from csv import reader as parse_line
from dataclasses import dataclass
from datetime import date
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import csv

from components.data.sources import brief
from components.data.sources.partitions import day_of

SEPARATORS = {".csv": ",", ".tsv": "\t"}
KNOWN_SEPARATORS = (",", ";", "\t", "|")
COMPRESSED = (".gz", ".bz2", ".xz", ".zip")
BATCH = 65_536  # rows of parquet at once
BLOCK = 1 << 24  # bytes of CSV at once
FIRST_BLOCK = 1 << 16  # after a stray quote
LONGEST_RECORD = 1 << 20  # bytes that a quoted value may be continued for in the next block
HEADER = 1 << 20  # bytes in which the header must end
MARK = "\x1e"  # a record of our own at the end of a block: a quote that is still open swallows it
TORN = "line is torn"
OPEN_QUOTE = 'a quote (") is not closed on its line'
LINE_BREAKS = re.compile(r"[\r\n]+")
MOST_REPEATS = 1000  # that a regular expression of RE2 can have
BROKEN = pa.schema([("line", pa.int64()), ("reason", pa.string()), ("values", pa.string())])


@dataclass(frozen=True)
class Batch:
    """Rows of a file, and the lines that are no row.

    rows    the columns, as they are in parquet and as text in CSV
    lines   int64 [rows]: the line on which each row begins, 1 is the header; None: parquet
    broken  BROKEN
    """

    rows: pa.Table
    lines: np.ndarray | None
    broken: pa.Table


@dataclass(frozen=True)
class File:
    """One parquet, CSV or TSV file (the latter two also compressed), and the day that its path tells."""

    system: Any
    path: str
    day: date | None = None

    @property
    def name(self) -> str:
        return str(self.system.unstrip_protocol(self.path)).removeprefix("file://")

    @property
    def ending(self) -> str:
        """`.parquet`, `.csv` or `.tsv`. Raises ValueError on another one."""
        base = posixpath.basename(self.path).lower()
        if base.endswith(".parquet"):
            return ".parquet"
        ending = posixpath.splitext(base.removesuffix(next((e for e in COMPRESSED if base.endswith(e)), "")))[1]
        if ending in SEPARATORS:
            return ending
        remedy = "save it as CSV or parquet" if ending in (".xlsx", ".xls", ".ods") else "convert or rename it"
        raise ValueError(f"{self.name}: files end in .parquet, .csv, .tsv, .csv.gz or .tsv.gz; {remedy}")

    def columns(self) -> list[str]:
        """Raises ValueError where a name comes twice."""
        if self.ending == ".parquet":
            names: list[str] = self._parquet(lambda file: file.schema_arrow.names)
        else:
            names = self.header()[0]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{self.name}: the header has the names {twice} more than once; give each column its own")
        return names

    def header(self) -> tuple[list[str], str]:
        """The names of a CSV file, and the separator that they have between them."""
        with self._told(), self._opened() as opened:
            first = _read(opened, HEADER)
            return _header(first, SEPARATORS[self.ending])[:2]

    def unusual_separator(self) -> str | None:
        """A sentence for a person, where a CSV file has another separator than its ending says."""
        if self.ending == ".parquet" or (separator := self.header()[1]) == SEPARATORS[self.ending]:
            return None
        return f"the columns are separated by {separator!r}, as in its header"

    def batches(self, columns: list[str], texts: tuple[str, ...] = ()) -> Iterator[Batch]:
        """These columns. In CSV, a value may have line breaks where its column is one of `texts` or is not read."""
        if self.ending != ".parquet":
            with self._told(), self._opened() as opened:
                for batch in _csv_batches(opened, SEPARATORS[self.ending], set(columns) - set(texts)):
                    yield Batch(batch.rows.select(columns), batch.lines, batch.broken)
            return
        with self._told(), self.system.open(self.path) as opened:
            for found in pq.ParquetFile(opened).iter_batches(BATCH, columns=columns):
                yield Batch(_plain(pa.Table.from_batches([found])).select(columns), None, BROKEN.empty_table())

    def table(self) -> pa.Table:
        return self._parquet(lambda file: file.read())

    def _parquet(self, ask: Callable[[pq.ParquetFile], Any]) -> Any:
        with self._told(), self.system.open(self.path) as opened:
            return ask(pq.ParquetFile(opened))

    def _opened(self) -> Any:
        return self.system.open(self.path, compression="infer")

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Whatever cannot be read becomes a ValueError: each filesystem has errors of its own."""
        try:
            yield
        except Exception as error:
            kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
            remedy = "Save it as UTF-8" if "UTF8" in str(error) else "Mend the file or the access to it"
            raise ValueError(f"{self.name} cannot be read whole: {kind}{brief(error)}. {remedy}") from error


def find(raw: str, table: str, path: str | list[str]) -> list[File]:
    """The files of a path or glob below `raw`, by name; of a list, one path after the other.

    Raises ValueError where one of them is not there or out of reach.
    """
    if isinstance(path, list):
        return [file for one in path for file in find(raw, table, one)]
    url = path if "://" in path or posixpath.isabs(path) else posixpath.join(raw, path)
    missing = f"no file at {url}; mend ingest.files.{table}.path or ingest.raw"
    try:
        system, pattern = fsspec.core.url_to_fs(url)
        if set("*?[") & set(path):
            found = sorted(system.glob(pattern))
        else:  # `isfile` is false whatever went wrong
            found = [pattern] if system.info(pattern)["type"] == "file" else []
    except FileNotFoundError as error:  # fsspec says so of a server that does not answer, too
        found = []
        if cause := _network_error(error):
            missing = f"{url} cannot be reached: {brief(cause)}. Mend the address, or start the server"
    except ImportError as error:  # a filesystem whose package is not installed
        raise ValueError(f"ingest.files.{table}: {url} cannot be opened: {error}") from None
    except Exception as error:  # each filesystem of fsspec has errors of its own
        message = f"{url} cannot be opened: {type(error).__name__}: {brief(error)}"
        raise ValueError(f"ingest.files.{table}: {message}. Mend the path or the access to it") from error
    if not found:
        raise ValueError(f"ingest.files.{table}: {missing}")
    return [File(system, file, day_of(file, pattern)) for file in found]


def _network_error(error: BaseException | None) -> BaseException | None:
    """The error of the network that led to this one, if there is one."""
    while error is not None:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _plain(table: pa.Table) -> pa.Table:
    """Dictionaries, such as pandas' categories, as the values that they stand for."""
    for at, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            table = table.set_column(at, field.name, table[field.name].cast(field.type.value_type))
    return table


# ---- CSV --------------------------------------------------------------------------------------------------------


def _read(opened: Any, size: int) -> bytes:
    """So many bytes, fewer at the end of the file: a stream may give less than it is asked for."""
    parts = []
    while size and (part := opened.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _header(data: bytes, usual: str) -> tuple[list[str], str, int]:
    """The names, the separator, and where the header's line ends.

    The separator is the known one that the header has most of, and `usual` of two that are equal.
    """
    start = len(data) - len(data.removeprefix(b"\xef\xbb\xbf").lstrip(b"\r\n"))
    line = b"".join(data[start : start + HEADER].splitlines(keepends=True)[:1])
    if not line:
        raise ValueError("Empty CSV file")
    text = line.decode().rstrip("\r\n")
    outside = "".join(text.split('"')[::2])
    separator = max((usual, *KNOWN_SEPARATORS), key=outside.count)
    return next(parse_line([text], delimiter=separator)), separator, start + len(line)


def _csv_batches(opened: Any, usual: str, strict: set[str]) -> Iterator[Batch]:
    """All columns of the file; no value of the strict ones has a line break.

    After a line with a stray quote the blocks are small, because what follows is parsed again; then they grow.
    """
    data = _read(opened, max(BLOCK, HEADER))
    names, separator, start = _header(data, usual)
    line, size, more = 1 + len(_line_ends(data[:start])), BLOCK, True
    while True:
        if more and len(data) - start < size:
            read = _read(opened, max(size, BLOCK))
            data, start, more = data[start:] + read, 0, bool(read)
        stop = min(start + size, len(data))
        is_last = stop == len(data) and not more
        if not is_last:  # whole lines, and not between \r and \n
            at = max(data.rfind(b"\n", start, stop), data.rfind(b"\r", start, stop - 1))
            if at < start:
                if size > 4 * BLOCK:
                    raise ValueError(f"line {line:,} has more than {4 * BLOCK:,} bytes, so this is no CSV")
                size *= 2
                continue
            stop = at + 1
        if start < stop:
            batch, used, is_stray = _parse_block(data[start:stop], line, names, separator, strict, more=not is_last)
            size = FIRST_BLOCK if is_stray else size * 2 if not used else min(size * 2, BLOCK)
            line += len(_line_ends(data[start : start + used]))
            start += used
            yield batch
        elif is_last:
            return


def _line_ends(data: bytes) -> np.ndarray:
    """The positions behind each line of the data; the last line may have no end of its own."""
    bytes_B = np.frombuffer(data, np.uint8)
    is_end = bytes_B == 10
    if b"\r" in data:  # one alone ends a line too
        is_end |= (bytes_B == 13) & ~np.append(bytes_B[1:] == 10, False)
    ends = np.flatnonzero(is_end) + 1
    return ends if len(ends) and ends[-1] == len(data) else np.append(ends, len(data)) if data else ends


def _parse_block(
    block: bytes, first_line: int, names: list[str], separator: str, strict: set[str], *, more: bool
) -> tuple[Batch, int, bool]:
    """The records of whole lines; how many bytes of them were used; and whether a stray quote ended the reading.

    With `more`, a record that is open at the end is left for the next block. A line with a stray quote is the last that
    is used: all that was parsed after it may be wrong.
    """
    bytes_B = np.frombuffer(block, np.uint8)
    stops = _line_ends(block)
    starts = np.append(0, stops[:-1])
    is_empty = (stops - starts <= 2) & np.isin(bytes_B[starts], (10, 13)) & np.isin(bytes_B[stops - 1], (10, 13))
    lines = np.flatnonzero(~is_empty)
    table, torn, is_open = _parse(block, names, separator)
    is_torn = np.zeros(len(table) + len(torn), dtype=bool)
    is_torn[[number - 1 for number, _ in torn]] = True
    spans = np.zeros(len(is_torn), dtype=np.int64)  # lines that a record has after its first
    strays = np.zeros(len(is_torn), dtype=bool)
    if len(lines) != len(is_torn):
        spans[~is_torn], strays[~is_torn] = _line_breaks(table, separator, strict)
        spans[is_torn] = [len(LINE_BREAKS.findall(record.rstrip("\r\n"))) for _, record in torn]
        strays |= is_torn & (spans > 0)
    ends = np.cumsum(1 + spans)
    if not is_open and len(lines) != (ends[-1] if len(ends) else 0):
        raise ValueError(f"the records of the {len(lines):,} lines from line {first_line:,} on cannot be told apart")
    begins = lines[ends - 1 - spans]
    used, read, is_stray = len(block), len(is_torn), False
    if is_open:
        tail = int(starts[begins[-1]])
        if more and len(block) - tail <= LONGEST_RECORD and not strays[:-1].any():
            used, read = tail, read - 1
            strays[-1] = False
        else:
            strays[-1] = True
    if strays.any():
        read, is_stray = int(np.argmax(strays)), True
        used = int(stops[begins[read]])
    broken = [(at, TORN) for at in begins[:read][is_torn[:read]]] + ([(begins[read], OPEN_QUOTE)] if is_stray else [])
    values = [block[starts[at] : stops[at]].decode(errors="replace").rstrip("\r\n") for at, _ in broken]
    found = [pa.array([first_line + at for at, _ in broken]), pa.array([why for _, why in broken]), pa.array(values)]
    rows = begins[:read][~is_torn[:read]]
    table = table.slice(0, len(rows))
    return Batch(table, first_line + rows, pa.table(found, names=BROKEN.names).cast(BROKEN)), used, is_stray


def _parse(text: bytes, names: list[str], separator: str) -> tuple[pa.Table, list[tuple[int, str]], bool]:
    """The rows as text; number (from 1) and text of every record of another width; whether the last one is open."""
    torn: list[tuple[int, str]] = []

    def note(row: csv.InvalidRow) -> str:
        torn.append((int(row.number), str(row.text)))
        return "skip"

    end = b"" if text.endswith((b"\n", b"\r")) else b"\n"
    marked = text + end + (MARK + separator * (len(names) - 1) + "\n").encode()
    table = csv.read_csv(
        pa.BufferReader(marked),
        csv.ReadOptions(use_threads=False, block_size=len(marked), column_names=names),
        csv.ParseOptions(delimiter=separator, newlines_in_values=True, invalid_row_handler=note),
        csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False),
    )
    if len(table) and table[names[0]][-1].as_py() == MARK:
        return table.slice(0, len(table) - 1), torn, False
    return table, torn, True


def _line_breaks(table: pa.Table, separator: str, strict: set[str]) -> tuple[np.ndarray, np.ndarray]:
    """How many lines each row spans beyond its first; and which rows hold lines that must be rows of their own.

    No value of a strict column has a line break. A value of another column may have some, unless the lines in it look
    like rows: they have the separators of a row, and begin with a number where the rows do. Where rows do not, all
    lines must look like rows: many a line of a text has a few commas.
    """
    spans, strays = np.zeros(len(table), dtype=np.int64), np.zeros(len(table), dtype=bool)
    mark = rf"\x{ord(separator):02x}"
    cell = f"[^{mark}\n]*{mark}"
    numbers = r"[+-]?\d+" + mark
    for at, name in enumerate(table.column_names):
        has_break = pc.match_substring_regex(table[name], r"[\r\n]").to_numpy()
        rows = np.flatnonzero(has_break)
        if not len(rows):
            continue
        values = pc.replace_substring_regex(table[name].take(rows), r"[\r\n]+", "\n")  # empty lines count for nothing
        spans[rows] += pc.count_substring(values, "\n").to_numpy()
        if name in strict:
            strays[rows] = True
            continue
        is_number = pc.mean(pc.match_substring_regex(table[table.column_names[0]], r"^[+-]?\d+$")).as_py() > 0.5
        first = numbers if is_number else cell
        count = min(len(table.column_names), MOST_REPEATS)
        row = first + f"(?:{cell}){{{max(count - 2, 0)}}}[^\n]*"
        last = (first if at else "") + f"(?:{cell}){{{min(max(at - 1, 0), MOST_REPEATS)}}}[^\n]*"
        form = f"^[^\n]*(?:\n{row})*\n{last}$" + (f"|\n{row}\n" if is_number else "")
        looks_so = pc.match_substring_regex(values, form).to_numpy()
        strays[rows[looks_so]] = True
    return spans, strays
