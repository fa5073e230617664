"""ingest: canonical in, canonical out; bad input stops before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC as ZONE
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components import ingest
from components.artifacts import folder_hash
from components.contracts import Canonical
from components.sources import RawTables
from components.sources.simulator import read
from tests.components.small_world import ingest_config, ingest_tables, with_column

RATINGS = "1::10::5::978300760\n2::10::1::978300761\n"


@pytest.fixture(scope="module")
def raw() -> RawTables:
    return read(ingest_config())


@pytest.fixture
def movielens(tmp_path: Path) -> Path:
    folder = tmp_path / "ml"
    folder.mkdir()
    (folder / "ratings.dat").write_text(RATINGS)
    (folder / "users.dat").write_text("1::F::1::10::4\n2::M::25::1::7\n")
    (folder / "movies.dat").write_text("10::A (1999)::Drama\n")
    return folder


def test_what_goes_in_comes_out(raw: RawTables, tmp_path: Path) -> None:
    facts = ingest_tables(raw, tmp_path / "canonical")
    data = Canonical(tmp_path / "canonical")
    assert data.events().num_rows == facts["impressions"] == len(raw.events)
    for name in raw.events.column_names:
        assert data.events()[name].to_pylist() == raw.events[name].to_pylist(), name
    assert data.users().to_pylist() == raw.users.to_pylist()
    assert data.items().to_pylist() == raw.items.to_pylist()
    assert {k: v.to_pylist() for k, v in data.modalities().items()} == {
        k: v.to_pylist() for k, v in raw.modalities.items()
    }
    assert facts["label_rate"] == pytest.approx(np.mean(raw.events["label"].to_pylist()))
    assert (facts["first_day"], facts["last_day"], facts["days"]) == ("2024-03-01", "2024-03-08", 8)
    assert json.loads((tmp_path / "canonical" / "source.json").read_text()) == facts


def test_until_leaves_later_events_out_in_any_zone(raw: RawTables, tmp_path: Path) -> None:
    facts = ingest_tables(raw, tmp_path / "canonical", until="2024-03-03T01:00:00+01:00")
    assert (facts["last_day"], facts["impressions"]) == ("2024-03-02", 800)
    moment = raw.events["timestamp"][10].as_py()
    earlier = sum(t < moment for t in raw.events["timestamp"].to_pylist())  # the moment itself is out
    assert ingest_tables(raw, tmp_path / "other", until=moment.isoformat())["impressions"] == earlier


@pytest.mark.parametrize(
    ("until", "told"),
    [
        ("2024-03-03T00:00:00", "ingest.until is '2024-03-03T00:00:00', a time without a zone; add one, e.g. 2024-03-"),
        ("yesterday", "ingest.until is 'yesterday'; write an ISO time such as"),
    ],
)
def test_until_must_be_a_time_with_a_zone(until: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ingest_config(until=until)


def test_nothing_before_until(raw: RawTables, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no event before until='1999-01-01T00:00:00.00:00' .* give a later time"):
        ingest_tables(raw, tmp_path / "canonical", until="1999-01-01T00:00:00+00:00")
    assert list(tmp_path.iterdir()) == []


def without_zone(raw: RawTables) -> RawTables:
    return replace(raw, events=with_column(raw.events, "timestamp", naive(len(raw.events)), pa.timestamp("us")))


def naive(rows: int) -> list[datetime]:
    return [datetime(2024, 3, 1) + timedelta(seconds=i) for i in range(rows)]


def bad_label(raw: RawTables) -> RawTables:
    return replace(raw, events=with_column(raw.events, "label", [1000] * len(raw.events), pa.int64()))


def no_time(raw: RawTables) -> RawTables:
    times = raw.events["timestamp"].to_pylist()
    return replace(raw, events=with_column(raw.events, "timestamp", [None, None, *times[2:]]))


def bad_vector(raw: RawTables) -> RawTables:
    text = raw.modalities["text"]
    return replace(raw, modalities={"image": raw.modalities["image"], "text": text.rename_columns(["item_id", "x"])})


BAD: dict[str, tuple[Callable[[RawTables], RawTables], str]] = {
    "missing event column": (
        lambda raw: replace(raw, events=raw.events.drop_columns("label")),
        r"planted events: column 'label' \(int8\) is missing; it has \['user_id',",
    ),
    "missing item column": (
        lambda raw: replace(raw, items=raw.items.drop_columns("created_at")),
        r"planted items: column 'created_at' .* is missing",
    ),
    "wrong type": (
        lambda raw: replace(raw, users=pa.table({"user_id": ["a", "b"]})),
        "planted users: column 'user_id' is string; it must be int64",
    ),
    "no zone": (without_zone, r"planted events: column 'timestamp' has times without a zone.*make them UTC, e\.g\."),
    "label too large": (bad_label, "planted events: column 'label' does not fit int8: Integer value 1000"),
    "no time": (no_time, "planted events: 2 rows have no timestamp; fill them"),
    "number as an attribute": (
        lambda raw: replace(raw, users=raw.users.append_column("age", pa.array(range(len(raw.users))))),
        "planted users: extra column 'age' is int64; it must be string",
    ),
    "one name in two tables": (
        lambda raw: replace(raw, users=raw.users.append_column("device", pa.array(["tv"] * len(raw.users)))),
        r"planted: extra columns \['device'\] have a name that another table's column .*; rename them",
    ),
    "a feature's name": (
        lambda raw: replace(raw, items=raw.items.append_column("views", pa.array(["9"] * len(raw.items)))),
        r"planted: extra columns \['views'\] have a name .* or a feature of the pipeline has; rename them",
    ),
    "modality without vector": (bad_vector, "planted modality text: column 'vector' .* is missing"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_leaves_nothing_and_touches_nothing(name: str, raw: RawTables, tmp_path: Path) -> None:
    spoil, told = BAD[name]
    output = tmp_path / "canonical"
    with pytest.raises(ValueError, match=told):
        ingest_tables(spoil(raw), output)
    assert list(tmp_path.iterdir()) == []
    ingest_tables(raw, output)
    before = folder_hash(output)
    with pytest.raises(ValueError, match=told):
        ingest_tables(spoil(raw), output)
    assert folder_hash(output) == before
    assert list(tmp_path.iterdir()) == [output]


def test_a_second_run_replaces_the_first_whole(raw: RawTables, tmp_path: Path) -> None:
    ingest_tables(raw, tmp_path / "canonical")
    fewer = replace(raw, modalities={"text": raw.modalities["text"]})
    ingest_tables(fewer, tmp_path / "canonical", until="2024-03-02T00:00:00+00:00")
    data = Canonical(tmp_path / "canonical")
    assert data.days() == ["2024-03-01"]
    assert list(data.modalities()) == ["text"]


def test_a_broken_parquet_file_beside_movielens(movielens: Path, tmp_path: Path) -> None:
    config = ingest_config("movielens", str(movielens), until=None)
    ingest.run(config, tmp_path / "canonical")
    before = folder_hash(tmp_path / "canonical")
    texts = movielens / "item_text.parquet"
    images = movielens / "item_image.parquet"
    whole = pa.table({"item_id": range(5000), "text": [str(i) for i in range(5000)]})
    for table, told in (
        (whole.rename_columns(["movie", "text"]), r"item_text\.parquet: column 'item_id' .* is missing"),
        (
            with_column(whole, "text", range(5000), pa.int64()),
            r"item_text\.parquet: column 'text' is int64; it must be",
        ),
    ):
        pq.write_table(table, texts)
        with pytest.raises(ValueError, match=told):
            ingest.run(config, tmp_path / "canonical")
    pq.write_table(whole, texts)
    texts.write_bytes(texts.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"item_text\.parquet is no whole parquet file.*Write it again"):
        ingest.run(config, tmp_path / "canonical")
    texts.unlink()
    pq.write_table(pa.table({"item_id": [10], "vector": ["0.1 0.2"]}), images)
    with pytest.raises(ValueError, match="movielens modality image: column 'vector' is string; it must be list"):
        ingest.run(config, tmp_path / "canonical")
    assert folder_hash(tmp_path / "canonical") == before


def test_a_time_of_no_zone_is_never_taken_for_utc() -> None:
    assert ingest.parse_time("x", "2024-03-01T02:00:00+02:00") == datetime(2024, 3, 1, tzinfo=ZONE)
    with pytest.raises(ValueError, match=r"x is '2024-03-01', a time without a zone; add one, e\.g\. (.*)") as caught:
        ingest.parse_time("x", "2024-03-01")
    ingest.parse_time("x", str(caught.value).split()[-1])  # what it says to write can be written
