"""ingest: canonical in, canonical out; bad input stops before anything is written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.common.artifacts import folder_hash
from components.common.config import parse_time
from components.common.contracts import Canonical
from components.data import ingest, sources
from components.data.sources import RawTables
from components.data.sources.simulator import read
from models import schema
from tests.components.small_world import SIMULATOR, WINDOW, ingest_config, ingest_tables, with_column

RATINGS = "1::10::5::978300760\n2::10::1::978300761\n"


@pytest.fixture(scope="module")
def raw() -> RawTables:
    return read("", SIMULATOR, WINDOW)


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
    rows = {"known": 3200, "outside": 0, "written": 3200, "left_out": {}}
    assert json.loads((tmp_path / "canonical" / "source.json").read_text()) == facts | {"rows": rows}


def test_extra_columns_are_read_as_the_server_reads_a_request(raw: RawTables, tmp_path: Path) -> None:
    spaces = [chr(code) for code in range(1, sys.maxunicode) if chr(code).isspace()]
    given = [*(f"{space}a{space}b{space}" for space in spaces), *spaces, "", None, "a"]
    tables = {}
    for name in ("events", "users", "items"):
        table = getattr(raw, name)
        extra = pa.array([given[i % len(given)] for i in range(len(table))], pa.string())
        tables[name] = table.append_column(f"extra_{name}", extra)
    ingest_tables(replace(raw, **tables), tmp_path / "canonical")
    data = Canonical(tmp_path / "canonical")
    for name, table in tables.items():
        found = getattr(data, name)()[f"extra_{name}"].to_pylist()
        assert found == [None if v is None else schema.trimmed(v) for v in table[f"extra_{name}"].to_pylist()]
    assert "a b" in found and "\ta\tb\t" in found


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


def no_time(raw: RawTables, rows: int = 40) -> RawTables:
    times = raw.events["timestamp"].to_pylist()
    return replace(raw, events=with_column(raw.events, "timestamp", [*[None] * rows, *times[rows:]]))


def with_pointers(raw: RawTables, start: int, end: int, items: list[int] | None) -> RawTables:
    events = raw.events
    for name, at in (("history_start", start), ("history_end", end)):
        events = events.append_column(name, pa.repeat(at, len(events)))
    return replace(raw, events=events, histories=None if items is None else pa.table({"item_id": items}))


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
    "more broken rows than the limit": (
        no_time,
        r"planted: 40 of 3200 rows are broken, more than ingest\.max_rejected \(0\.01\) .*no timestamp: 40, e\.g\. "
        r"\{'user_id'.* mend the files, or raise the limit",
    ),
    "an event column's name": (
        lambda raw: replace(raw, users=raw.users.append_column("split", pa.array(["a"] * len(raw.users)))),
        r"planted: extra columns \['split'\] have a name",
    ),
    "histories without a table": (
        lambda raw: with_pointers(raw, 0, 0, None),
        r"planted events have \('history_start', 'history_end'\); give `histories`",
    ),
    "histories out of their table": (
        lambda raw: with_pointers(raw, 1, 4, [5, 6, 7]),
        r"planted: \('history_start', 'history_end'\) leave \[0, 3\]",
    ),
    "a position without a propensity": (
        lambda raw: replace(raw, events=raw.events.drop_columns("propensity")),
        r"planted events have \['position'\]; give 'propensity' and 'position' both",
    ),
    "a slate without both": (
        lambda raw: replace(
            raw,
            events=raw.events.drop_columns(["propensity", "position"]).append_column(
                "slate", pa.array(range(len(raw.events)))
            ),
        ),
        r"planted events have \['slate'\]; give 'propensity' and 'position' both",
    ),
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
    "a counted feature's name": (
        lambda raw: replace(raw, events=raw.events.append_column("views_level", pa.array(["9"] * len(raw.events)))),
        r"planted: extra columns \['views_level'\] have a name",
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
    assert parse_time("x", "2024-03-01T02:00:00+02:00") == datetime(2024, 3, 1, tzinfo=UTC)
    with pytest.raises(ValueError, match=r"x is '2024-03-01', a time without a zone; add one, e\.g\. (.*)") as caught:
        parse_time("x", "2024-03-01")
    parse_time("x", str(caught.value).split()[-1])  # what it says to write can be written


def test_pictures_come_from_named_hosts_alone(raw: RawTables, tmp_path: Path) -> None:
    """The port is closed. So a request to it fails and counts as broken, and one that is refused is only left out."""
    places = pa.array(["http://127.0.0.1:9/a.png", *[None] * (len(raw.items) - 1)])
    given = replace(raw, items=raw.items.append_column("image", places), modalities={})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "read", lambda *_, **__: given)
        found = ingest.run(replace(ingest_config(), picture_hosts=[]), tmp_path / "refused")
        left_out = {"host is not in ingest.picture_hosts": 1}
        assert found["pictures"] == {"named": 1, "written": 0, "left_out": left_out}
        with pytest.raises(ValueError, match=r"1 of 1 pictures cannot be read.*cannot be opened"):
            ingest.run(replace(ingest_config(), picture_hosts=["127.0.0.1"]), tmp_path / "asked")


def test_a_window_counts_the_rows_before_it_and_writes_them_nowhere(raw: RawTables, tmp_path: Path) -> None:
    """Six days, of which four are trained on; the rows of the first two days are counted, broken or not."""
    labels = [7, *raw.events["label"].to_pylist()[1:]]
    given = replace(
        raw, events=with_column(raw.events, "label", labels), set_aside={"repeated": raw.events.slice(0, 3)}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "read", lambda *_, **__: given)
        facts = ingest.run(ingest_config(window_days=4, lead_days=2), tmp_path / "canonical")
    assert facts["rows"] == {"read": 3203, "later": 0, "outside": 803, "written": 2400, "left_out": {}}
    assert (facts["first_day"], facts["train_from"], facts["last_day"]) == ("2024-03-03", "2024-03-05", "2024-03-08")
    assert not (tmp_path / "canonical" / "quarantine").exists()


@pytest.mark.parametrize(
    ("until", "first", "since"),
    [
        ("2024-03-09T00:00:00+00:00", "2024-03-05", "2024-03-03"),
        ("2024-03-09T02:00:00+02:00", "2024-03-05", "2024-03-03"),
        ("2024-03-08T06:00:00+00:00", "2024-03-05", "2024-03-03"),  # the day that it cuts is one of the four
    ],
)
def test_the_days_of_a_window(until: str, first: str, since: str) -> None:
    config = ingest_config(until=until, window_days=4, lead_days=2)
    assert config.train_from() == datetime.fromisoformat(f"{first}T00:00:00+00:00")
    window = config.window()
    assert (window.since, window.until) == (datetime.fromisoformat(f"{since}T00:00:00+00:00"), parse_time("x", until))
    everything = replace(ingest_config(until=until), window_days=None)
    assert everything.train_from() is None and everything.window().since is None


def test_a_window_needs_its_end() -> None:
    with pytest.raises(ValueError, match=r"window_days is 4, but until is null.*give until, or set"):
        ingest_config(until=None, window_days=4)
    with pytest.raises(ValueError, match="window_days is 0; it must be at least 1, or null"):
        ingest_config(window_days=0)
    with pytest.raises(ValueError, match="lead_days is -1; it must be 0 or more"):
        ingest_config(lead_days=-1)
