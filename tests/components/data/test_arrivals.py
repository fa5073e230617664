"""arrivals: which raw files a window needs, and whether a day is there."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.common.artifacts import folder_hash
from components.common.contracts import Canonical
from components.data import arrivals, ingest
from components.data.ingest import IngestConfig
from components.data.sources import Window, listing
from components.data.sources.files import FilesConfig, TableConfig
from components.data.sources.partitions import day_of, is_needed
from tests.components.small_world import NO_FILES, ingest_config

FIRST = date(2024, 3, 1)
DAYS = 6
ROWS = 20


def events(day: date, rows: int = ROWS, click: bool = True) -> pa.Table:
    midnight = datetime(day.year, day.month, day.day, tzinfo=UTC)
    return pa.table(
        {
            "user_id": [i % 3 for i in range(rows)],
            "item_id": [i % 4 for i in range(rows)],
            "timestamp": pa.array([midnight + timedelta(hours=i) for i in range(rows)], pa.timestamp("us", "UTC")),
            "label": [int(click and i % 2 == 0) for i in range(rows)],
        }
    )


def put(raw: Path, name: str, table: pa.Table) -> Path:
    file = raw / name
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file)
    os.utime(file, (1_700_000_000, 1_700_000_000))  # so long ago that its hash is remembered
    return file


def partition(day: date) -> str:
    return f"events/day={day}/part-0.parquet"


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six days of events, by day, in a folder whose own name has a date; the hashes are remembered beside it."""
    folder = tmp_path / "backup-2020-01-01" / "raw"
    for at in range(DAYS):
        put(folder, partition(FIRST + timedelta(at)), events(FIRST + timedelta(at)))
    monkeypatch.setattr(listing, "remembered_hashes", lambda: tmp_path / "hashes.json")
    return folder


def files(path: str = "events/day=*/*.parquet") -> FilesConfig:
    return replace(NO_FILES, events=TableConfig(path=path, columns={}, categorical=[], numeric=[]))


def config(raw: Path, last: int, window_days: int = 2, lead_days: int = 1, path: str | None = None) -> IngestConfig:
    """The run of the day FIRST + last."""
    until = datetime.combine(FIRST + timedelta(last + 1), datetime.min.time(), UTC).isoformat()
    mapping = files(path) if path else files()
    return ingest_config("files", str(raw), until, mapping, window_days=window_days, lead_days=lead_days)


def listed(config: IngestConfig, output: Path) -> list[str]:
    arrivals.run(config, output)
    return [file["path"] for file in json.loads(output.read_text())["files"]]


# ---- the day of a path ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "glob"),
    [
        ("/r/events/day=2026-01-11/part-0.parquet", "/r/events/day=*/*.parquet"),
        ("/r/events/dt=20260111/hour=05/a.csv", "/r/events/**/*.csv"),
        ("/r/year=2026/month=1/day=11/a.csv", "/r/*/*/*/*.csv"),
        ("/r/2026/01/11/a.csv", "/r/*/*/*/*.csv"),
        ("/r/clicks-2026-01-11.csv", "/r/*.csv"),
        ("/r/clicks_20260111.csv.gz", "/r/clicks*"),
        ("/r/clicks-2026-01-11T05.csv", "/r/*"),
        ("/r/2025-05-05/date=2026-01-11/part-2026-01-12.parquet", "/r/2025-05-05/*/*"),  # the key, and not the name
    ],
)
def test_a_path_tells_its_day(path: str, glob: str) -> None:
    assert day_of(path, glob) == date(2026, 1, 11)


@pytest.mark.parametrize(
    ("path", "glob"),
    [
        ("/r/2026-01-11/events.csv", "/r/2026-01-11/*.csv"),  # the folder was named, and not found
        ("/r/clicks-2026-01-11.csv", "/r/clicks-2026-01-11.csv"),
        ("/r/from-2026-01-01-to-2026-01-31.csv", "/r/*"),
        ("/r/part-20260231.csv", "/r/*"),
        ("/r/part-1202601115.csv", "/r/*"),
        ("/r/year=2026/month=1/a.csv", "/r/*/*/*.csv"),
        ("/r/events.csv", "/r/*"),
    ],
)
def test_a_path_that_tells_no_day_or_several(path: str, glob: str) -> None:
    assert day_of(path, glob) is None


def test_a_file_is_needed_from_the_day_of_since_to_the_day_before_until() -> None:
    window = Window(since=datetime(2026, 1, 5, tzinfo=UTC), until=datetime(2026, 1, 7, 6, tzinfo=UTC))
    needed = [day for day in range(1, 12) if is_needed(date(2026, 1, day), window)]
    assert needed == [5, 6, 7]  # the day that until cuts too
    assert is_needed(None, window) and is_needed(date(1999, 1, 1), Window())


# ---- the list ---------------------------------------------------------------------------------------------------


def test_tomorrows_partition_changes_nothing_today_and_is_read_tomorrow(raw: Path, tmp_path: Path) -> None:
    """The window of day 4 is days 2 to 4: one more day of its files, whatever it holds, is not even opened."""
    today = config(raw, last=4)
    assert listed(today, tmp_path / "1.json") == [partition(FIRST + timedelta(at)) for at in (2, 3, 4)]
    facts = ingest.run(today, tmp_path / "canonical", tmp_path / "1.json")
    assert (facts["first_day"], facts["train_from"], facts["last_day"]) == ("2024-03-03", "2024-03-04", "2024-03-05")
    assert facts["rows"]["read"] == facts["rows"]["written"] == 3 * ROWS
    before = folder_hash(tmp_path / "canonical")
    put(raw, partition(FIRST), pa.table({"other": ["columns"]}))
    (raw / partition(FIRST + timedelta(DAYS - 1))).write_bytes(b"half a file")
    put(raw, partition(FIRST + timedelta(DAYS)), events(FIRST + timedelta(DAYS)))
    listed(today, tmp_path / "2.json")
    assert (tmp_path / "2.json").read_bytes() == (tmp_path / "1.json").read_bytes()
    ingest.run(today, tmp_path / "canonical", tmp_path / "2.json")
    assert folder_hash(tmp_path / "canonical") == before
    put(raw, partition(FIRST + timedelta(DAYS - 1)), events(FIRST + timedelta(DAYS - 1)))
    assert listed(config(raw, last=5), tmp_path / "3.json") == [partition(FIRST + timedelta(at)) for at in (3, 4, 5)]


def test_a_late_file_is_told_once_and_changes_the_list(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    today = config(raw, last=4)
    listed(today, tmp_path / "1.json")
    capsys.readouterr()
    assert listed(today, tmp_path / "2.json") and "late" not in capsys.readouterr().err
    put(raw, "events/day=2024-03-04/part-1.parquet", events(FIRST + timedelta(3), rows=3))
    put(raw, partition(FIRST + timedelta(2)), events(FIRST + timedelta(2), click=False))
    facts = arrivals.run(today, tmp_path / "2.json")
    said = capsys.readouterr().err
    assert facts["late"] == 2 and arrivals.summary(facts)["late"].startswith("2 files came")
    assert "late: 1 file(s) of 2024-03-04 came or changed" in said and "day=2024-03-04/part-1.parquet" in said
    assert "late: 1 file(s) of 2024-03-03" in said and "python -m components run 2024-03-03" in said
    assert (tmp_path / "1.json").read_bytes() != (tmp_path / "2.json").read_bytes()
    assert arrivals.run(today, tmp_path / "3.json")["late"] == 0
    assert (tmp_path / "3.json").read_bytes() == (tmp_path / "2.json").read_bytes()


def test_a_second_listing_reads_no_file_and_a_change_of_one_is_seen(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    today = config(raw, last=4)
    listed(today, tmp_path / "1.json")
    opened: list[str] = []
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda own, *a, **k: (opened.append(own.name), real(own, *a, **k))[1])
    listed(today, tmp_path / "2.json")
    assert "part-0.parquet" not in opened
    changed = raw / partition(FIRST + timedelta(3))
    content = bytearray(changed.read_bytes())
    content[8] ^= 1  # the size is the same
    changed.write_bytes(content)
    opened.clear()
    listed(today, tmp_path / "2.json")
    assert opened.count("part-0.parquet") == 1
    assert (tmp_path / "1.json").read_bytes() != (tmp_path / "2.json").read_bytes()


def test_files_that_change_while_they_are_read_stop_ingest(raw: Path, tmp_path: Path) -> None:
    today = config(raw, last=4)
    listed(today, tmp_path / "1.json")
    put(raw, "events/day=2024-03-04/part-1.parquet", events(FIRST + timedelta(3), rows=3))
    with pytest.raises(ValueError, match=r"1 file\(s\) came, went or changed .*day=2024-03-04/part-1\.parquet; run it"):
        ingest.run(today, tmp_path / "canonical", tmp_path / "1.json")
    assert not (tmp_path / "canonical").exists()


def test_pictures_that_items_name_are_listed(raw: Path, tmp_path: Path) -> None:
    put(raw, "items.parquet", pa.table({"item_id": [0, 1, 2, 3], "image": ["photos/0.png", None, None, None]}))
    (raw / "photos").mkdir()
    (raw / "photos" / "0.png").write_bytes(b"a picture")
    items = TableConfig(path="items.parquet", columns={}, categorical=[], numeric=[])
    today = config(raw, last=4)
    today = replace(today, files=replace(today.files, items=items))
    paths = listed(today, tmp_path / "1.json")
    assert "photos/0.png" in paths and "items.parquet" in paths and partition(FIRST) not in paths
    (raw / "photos" / "0.png").write_bytes(b"a pictur3")
    listed(today, tmp_path / "2.json")
    assert (tmp_path / "1.json").read_bytes() != (tmp_path / "2.json").read_bytes()


def test_users_and_items_of_earlier_days_are_read_and_of_later_days_not(raw: Path, tmp_path: Path) -> None:
    for day in (FIRST, FIRST + timedelta(DAYS)):
        put(raw, f"users/{day}.parquet", pa.table({"user_id": [0, 1, 2] if day == FIRST else [3]}))
    users = TableConfig(path="users/*.parquet", columns={}, categorical=[], numeric=[])
    today = config(raw, last=4)
    today = replace(today, files=replace(today.files, users=users))
    assert "users/2024-03-01.parquet" in listed(today, tmp_path / "1.json")
    ingest.run(today, tmp_path / "canonical", tmp_path / "1.json")
    assert Canonical(tmp_path / "canonical").users()["user_id"].to_pylist() == [0, 1, 2]


def test_a_window_without_files(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no file of the days of the window; there are files of 2024-03-01 to 2024-03"
    ):
        listed(config(raw, last=40), tmp_path / "1.json")


def test_files_of_a_store_have_its_checksums(tmp_path: Path) -> None:
    import fsspec

    root = f"memory://{tmp_path.name}"
    with fsspec.open(f"{root}/events/2024-03-05.csv", "wb") as opened:
        opened.write(b"user_id,item_id,timestamp,label\n1,2,1709600400,1\n")
    today = replace(config(tmp_path, 4, path="events/*.csv"), raw=root)
    memory = tmp_path / "hashes.json"
    one, same = (listing.listing("files", root, today.files, today.window(), memory).files for _ in range(2))
    assert one == same and (one[0].path, one[0].day) == ("events/2024-03-05.csv", "2024-03-05")


def test_the_simulator_has_no_files(tmp_path: Path) -> None:
    assert listed(ingest_config(), tmp_path / "1.json") == []


# ---- days -------------------------------------------------------------------------------------------------------


def test_a_day_by_files(raw: Path) -> None:
    found = config(raw, last=4)
    assert arrivals.missing(found, date(2024, 3, 6)) is None
    assert (
        arrivals.missing(found, date(2024, 3, 7))
        == "there is no file of 2024-03-07; the newest files are of 2024-03-06"
    )
    assert arrivals.newest_day(found) == date(2024, 3, 6)


def test_a_folder_is_whole_once_it_has_the_marker_that_others_have(raw: Path) -> None:
    found = config(raw, last=4)
    for at in range(DAYS - 1):
        (raw / f"events/day={FIRST + timedelta(at)}" / "_SUCCESS").touch()
    assert "day=2024-03-06 has no _SUCCESS yet" in str(arrivals.missing(found, date(2024, 3, 6)))
    assert arrivals.newest_day(found) == date(2024, 3, 5)
    (raw / "events/day=2024-03-06/_SUCCESS").touch()
    assert arrivals.missing(found, date(2024, 3, 6)) is None
    assert arrivals.newest_day(found) == date(2024, 3, 6)


def test_todays_files_are_no_whole_day(raw: Path) -> None:
    today = datetime.now(UTC).date()
    put(raw, partition(today), events(today))
    assert arrivals.newest_day(config(raw, last=4)) == date(2024, 3, 6)


def test_a_day_of_files_that_tell_none(tmp_path: Path, raw: Path) -> None:
    other = tmp_path / "other"
    put(other, "all.parquet", pa.concat_tables([events(FIRST), events(FIRST + timedelta(1), rows=2)]))
    found = config(other, last=4, path="*.parquet")
    assert arrivals.missing(found, FIRST + timedelta(1)) is None
    assert arrivals.missing(found, FIRST + timedelta(2)) == (
        f"{other} has no event of 2024-03-03 or later; its newest is of 2024-03-02 01:00 UTC"
    )
    assert arrivals.newest_day(found) == FIRST + timedelta(1)


def test_a_source_without_times_has_no_days(tmp_path: Path, raw: Path) -> None:
    rows = events(FIRST).drop_columns("timestamp").append_column("split", pa.array(["train", "valid"] * (ROWS // 2)))
    put(tmp_path / "plain", "all.parquet", rows)
    with pytest.raises(ValueError, match="files has no times, so it has no days; run `dvc repro` instead"):
        arrivals.newest_day(config(tmp_path / "plain", last=4, path="*.parquet"))


def test_the_days_of_the_simulator() -> None:
    assert arrivals.missing(ingest_config(), date(2031, 1, 1)) is None
    assert arrivals.newest_day(ingest_config()) == date(2024, 3, 8)


def test_movielens_has_the_day_of_its_last_rating(tmp_path: Path) -> None:
    (tmp_path / "ratings.dat").write_text("1::10::5::978300760\n2::10::1::978387162\n")
    (tmp_path / "users.dat").write_text("1::F::1::10::4\n2::M::25::1::7\n")
    (tmp_path / "movies.dat").write_text("10::A (1999)::Drama\n")
    found = ingest_config("movielens", str(tmp_path), until=None)
    assert arrivals.newest_day(found) == date(2001, 1, 1)
    assert arrivals.missing(found, date(2001, 1, 1)) is None
    assert "has no event of 2001-01-02 or later" in str(arrivals.missing(found, date(2001, 1, 2)))
