"""Reading of CSV: no row is lost in silence, whatever quotes, line ends and separators a file has."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.data.sources import reading
from components.data.sources.reading import OPEN_QUOTE, TORN, File, find

ROWS = 1800


def lines(rows: int = ROWS, end: str = "\n") -> list[str]:
    return [f"{i},{i % 7},{i % 2},name {i}{end}" for i in range(rows)]


def write(folder: Path, text: str | bytes, name: str = "a.csv") -> File:
    data = text.encode() if isinstance(text, str) else text
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    (file,) = find(str(folder), "events", name)
    return file


def read(file: File, columns: str = "a b c d", texts: tuple[str, ...] = ()) -> tuple[pa.Table, list[int], list[dict]]:
    batches = list(file.batches(columns.split(), texts))
    found = pa.concat_tables([batch.rows for batch in batches])
    numbers = [int(n) for batch in batches if batch.lines is not None for n in batch.lines]
    return found, numbers, [row for batch in batches for row in batch.broken.to_pylist()]


HEADER = "a,b,c,d\n"


@pytest.mark.parametrize("block", [1 << 24, 4000, 300])
@pytest.mark.parametrize("columns", ["a b c d", "a b c"], ids=["read", "not read"])
@pytest.mark.parametrize(
    "strays", [(5,), (5, 105), (5, 6), (5, 105, 400), (1795,), (0, 1799), tuple(range(0, 1800, 90))]
)
def test_a_stray_quote_costs_its_own_line_alone(
    strays: tuple[int, ...], columns: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of them swallowed the 100 rows between, and one near the end all rows after it."""
    monkeypatch.setattr(reading, "BLOCK", block)
    monkeypatch.setattr(reading, "LONGEST_RECORD", 2 * block)
    given = lines()
    for at in strays:
        given[at] = given[at].replace("name", '"name')
    found, numbers, broken = read(write(tmp_path, HEADER + "".join(given)), columns)
    kept = [i for i in range(ROWS) if i not in strays]
    assert found["a"].to_pylist() == [str(i) for i in kept] and numbers == [i + 2 for i in kept]
    assert sorted(row["line"] for row in broken) == [at + 2 for at in strays]
    assert {row["reason"] for row in broken} == {OPEN_QUOTE}
    assert broken[0]["values"] == given[broken[0]["line"] - 2].rstrip("\n")


@pytest.mark.parametrize("block", [1 << 24, 700])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_text_may_have_line_breaks(block: int, end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also empty lines, over the end of a block, and before a stray quote."""
    monkeypatch.setattr(reading, "BLOCK", block)
    given = [f'{i},{i % 7},{i % 2},"first, ""part""{end}{end}second {i}{end}"{end}' for i in range(60)]
    given[40] = f'40,1,"1,x{end}'
    given.insert(20, end)
    file = write(tmp_path, "a,b,c,d" + end + "".join(given))
    for columns, texts in (("a b c d", ("d",)), ("a b c", ())):
        found, numbers, broken = read(file, columns, texts)
        assert found["a"].to_pylist() == [str(i) for i in range(60) if i != 40]
        assert [(row["line"], row["reason"]) for row in broken] == [(2 + 4 * 40 + 1, OPEN_QUOTE)]
        assert numbers[:21] == [2 + 4 * i + (i >= 20) for i in range(21)]
    texts_found = read(file, "a b c d", ("d",))[0]["d"].to_pylist()
    assert texts_found[3] == f'first, "part"{end}{end}second 3{end}'


def test_a_line_break_in_a_column_that_is_no_text(tmp_path: Path) -> None:
    given = lines(5)
    given[2] = '2,"2\n",0,name 2\n'
    found, _, broken = read(write(tmp_path, HEADER + "".join(given)))
    assert found["a"].to_pylist() == ["0", "1", "3", "4"]
    assert [(row["line"], row["reason"], row["values"]) for row in broken] == [
        (4, OPEN_QUOTE, '2,"2'),
        (5, OPEN_QUOTE, '",0,name 2'),
    ]


def test_a_torn_line_has_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BLOCK", 200)
    given = lines(100)
    given[3:3], given[70:70] = ["\n", "\n"], ["1,2,3,4,5\n"]
    _, _, broken = read(write(tmp_path, HEADER + "".join(given) + '7,8,"'))
    assert [(row["line"], row["reason"]) for row in broken] == [(72, TORN), (105, OPEN_QUOTE)]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_every_line_end_is_one(
    end: str, last: bool, bom: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "BLOCK", 64)
    text = end.join(["a,b,c,d", *lines(50, "")]) + (end if last else "")
    found, numbers, broken = read(write(tmp_path, bom + text.encode()))
    assert found["a"].to_pylist() == [str(i) for i in range(50)] and not broken
    assert numbers == list(range(2, 52))


@pytest.mark.parametrize("seed", range(6))
def test_random_quotes_and_breaks_lose_no_line(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line is in a row or among the broken; rows that have nothing to do with a quote are all there."""
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(reading, "BLOCK", int(rng.integers(40, 4000)))
    given = lines(300, "")
    touched = set()
    for at in rng.integers(0, 300, 25):
        place = rng.integers(0, len(given[at]) + 1)
        given[at] = given[at][:place] + rng.choice(['"', '""', ",", '"\n', '\n"']) + given[at][place:]
        touched.add(str(at))
    text = HEADER + "\n".join(given) + "\n"
    found, numbers, broken = read(write(tmp_path, text), texts=("d",))
    assert {str(i) for i in range(300)} - touched <= set(found["a"].to_pylist())
    starts = sorted([*numbers, *(row["line"] for row in broken)])
    assert len(starts) == len(set(starts)) and starts[0] == 2


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.CSV", "a.csv.gz"])
def test_the_header_names_the_separator(separator: str, name: str, tmp_path: Path) -> None:
    text = HEADER.replace(",", separator) + "".join(lines(3)).replace(",", separator)
    file = write(tmp_path, text, name)
    assert file.header() == (["a", "b", "c", "d"], separator)
    assert read(file)[0]["d"].to_pylist() == ["name 0", "name 1", "name 2"]


def test_a_header_that_names_a_column_twice(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]), tmp_path / "b.parquet")
    for file in (write(tmp_path, "a,b,a\n1,2,3\n"), *find(str(tmp_path), "events", "b.parquet")):
        with pytest.raises(ValueError, match=r"the header has the names \['a'\] more than once"):
            file.columns()


def test_the_last_ending_counts(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / "x.csv.parquet")
    (file,) = find(str(tmp_path), "events", "*.parquet")
    assert file.columns() == ["a"] and next(iter(file.batches(["a"]))).rows["a"].to_pylist() == [1]
    with pytest.raises(ValueError, match=r"x\.csv\.json: files end in"):
        write(tmp_path, "{}", "x.csv.json").columns()


def test_values_of_a_dictionary_are_read_as_they_are(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": pa.array(["x", None, "y"]).dictionary_encode()}), tmp_path / "x.parquet")
    (file,) = find(str(tmp_path), "events", "x.parquet")
    assert next(iter(file.batches(["a"]))).rows["a"].type == pa.string()


def test_a_message_shows_few_characters(tmp_path: Path) -> None:
    file = write(tmp_path, HEADER.encode() + b"1,2,3," + b"\xff" * 100_000 + b"\n")
    with pytest.raises(ValueError, match=r"cannot be read whole.*UTF8.*Save it as UTF-8") as caught:
        read(file)
    assert len(str(caught.value)) < 600


def test_a_server_that_does_not_answer(unused_port: int) -> None:
    with pytest.raises(ValueError, match=rf"127\.0\.0\.1:{unused_port}/a\.csv cannot be reached: .*{unused_port}"):
        find(f"http://127.0.0.1:{unused_port}", "events", "a.csv")


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])
