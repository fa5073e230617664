"""dataset: the whole point-in-time join against the definition, row by row; nothing of the future; bytes that hold."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from components.common.artifacts import folder_hash, write_json
from components.common.contracts import ARRIVAL, LOGGED, ORACLE, POSITION, PROPENSITY, SLATE, TIMESTAMP, Canonical
from components.common.dataset import Dataset, narrow, popularity_level
from components.common.splits import SplitConfig, rows_by_day, split_days
from components.data.sources import RawTables
from components.features import dataset, embed, features, views
from components.features.dataset import DatasetConfig, Joined
from models.schema import PADDING, SPECIAL, UNKNOWN
from tests.components.small_world import (
    DAY,
    DAYS,
    FEATURES,
    SPLIT,
    START,
    Folders,
    Row,
    hand_tables,
    known_clicks,
    known_counts,
    plain_rows,
    prepare,
    with_column,
)

CONFIG = DatasetConfig(history_length=4, min_count=3, max_tags=3)
LAG = FEATURES.availability_lag_seconds


def with_oracle(raw: RawTables) -> RawTables:
    share = np.random.default_rng(5).random(len(raw.events), dtype=np.float32)
    place = np.arange(len(raw.events)) % 3 + 1
    told = {ORACLE: share, PROPENSITY: 1 - share, POSITION: place.astype(np.int16), SLATE: -place // 3}
    events = raw.events
    for name, values in told.items():
        events = events.append_column(name, pa.array(values))
    return replace(raw, events=events)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A dataset by the steps as production runs them."""
    made = prepare(with_oracle(hand_tables()), tmp_path_factory.mktemp("dataset"))
    features.run(FEATURES, made.canonical, made.report, made.embedding, made.features)
    dataset.run(CONFIG, SPLIT, made.canonical, made.features, made.repo, made.dataset)
    return made


@pytest.fixture(scope="module")
def data(folders: Folders) -> Dataset:
    return Dataset.open(folders.dataset)


@pytest.fixture(scope="module")
def rows(folders: Folders) -> list[Row]:
    return plain_rows(Canonical(folders.canonical).events())


@pytest.fixture(scope="module")
def training(data: Dataset, rows: list[Row]) -> list[Row]:
    return rows[: data.splits["train"][1]]


def field(data: Dataset, name: str) -> np.ndarray:
    return data.columns[f"field.{name}"].long().numpy()


def indices(values: list, training: list, min_count: int = CONFIG.min_count) -> list[int]:
    """The definition: sorted values that training rows hold often enough from 2 on; 1 for others; 0 for a null."""
    known = sorted(v for v, n in Counter(v for v in training if v is not None).items() if n >= min_count)
    return [PADDING if v is None else known.index(v) + SPECIAL if v in known else UNKNOWN for v in values]


def histories(data: Dataset, select: slice = slice(None)) -> list[list[int]]:
    """Raw item ids of every row's history."""
    batch = data.batch(torch.arange(len(data.columns["label"]))[select])
    log = data.catalog.item_ids_I[data.click_log.long()]
    return [log[start:end].tolist() for start, end in zip(batch.start_B, batch.end_B, strict=True)]


# ---- the join ---------------------------------------------------------------------------------------------------


def test_rows_in_are_rows_out_in_their_order(data: Dataset, rows: list[Row], folders: Folders) -> None:
    assert len(data.columns["label"]) == len(rows) == 55 * DAYS + 10
    assert len({(r.user, r.item, r.micro) for r in rows}) < len(rows)  # repeated impressions are rows of their own
    assert data.columns["label"].tolist() == [r.label for r in rows]
    assert data.user_ids(slice(None)).tolist() == [r.user for r in rows]
    assert data.catalog.item_ids_I[data.columns["item"].long()].tolist() == [r.item for r in rows]
    for column, name in {"oracle": ORACLE, **{name: name for name in LOGGED}}.items():
        assert np.array_equal(data.columns[column].numpy(), Canonical(folders.canonical).events()[name].to_numpy())


def test_a_history_is_what_was_clicked_and_known_before(data: Dataset, rows: list[Row]) -> None:
    wanted = [known_clicks(rows, r.user, r.micro, LAG) for r in rows]
    assert histories(data) == [h[-CONFIG.history_length :] for h in wanted]
    # the world is one where the rule matters: clicks at the impression's own second, in the lag, and longer histories
    clicks = {(r.user, r.second) for r in rows if r.label}
    assert sum((r.user, r.second) in clicks for r in rows if not r.label) > 10
    assert sum(any((r.user, r.second - s) in clicks for s in range(1, LAG)) for r in rows) > 10
    assert max(map(len, wanted)) > CONFIG.history_length and min(map(len, wanted)) == 0


def test_popularity_is_that_of_earlier_whole_days(data: Dataset, rows: list[Row], training: list[Row]) -> None:
    counts = [known_counts(rows, r.item, r.micro, LAG, FEATURES.popularity_days) for r in rows]
    for position, name in enumerate(("views_level", "clicks_level")):
        levels = [None if c is None else int(popularity_level(np.array(c[position]))) for c in counts]
        assert field(data, name).tolist() == indices(levels, levels[: len(training)])
        assert levels.count(None) > 50 and levels.count(0) > 0 and len(set(levels)) > 3
        feature = next(f for f in data.schema.features if f.name == name)
        assert (feature.owner, feature.origin, feature.vocab) == ("impression", "item", None)


def test_profile_and_context(data: Dataset, rows: list[Row], training: list[Row], folders: Folders) -> None:
    users = Canonical(folders.canonical).users()
    region = dict(zip(users["user_id"].to_pylist(), users["region"].to_pylist(), strict=True))
    for name, values in {
        "user_id": [r.user for r in rows],
        "region": [region[r.user] for r in rows],
        "device": [r.device for r in rows],
    }.items():
        assert field(data, name).tolist() == indices(values, values[: len(training)]), name
    origin = {f.name: f.origin for f in data.schema.impression_fields}
    assert origin == {
        "user_id": "user", "region": "user", "device": "context", "views_level": "item", "clicks_level": "item",
    }  # fmt: skip
    assert {PADDING, UNKNOWN} < set(field(data, "device"))  # a null, and a value too rare
    assert PADDING in field(data, "region")
    assert not {ORACLE, *LOGGED} & set(origin)


def joined(raw: RawTables, root: Path) -> tuple[Joined, pa.Table, list[list[int]]]:
    """Feast's join of a world, without the online store; and every row's whole history as item ids."""
    made = prepare(raw, root)
    canonical = Canonical(made.canonical)
    (made.features / "sources").mkdir(parents=True)
    views.write_sources(FEATURES, canonical, made.embedding, made.features)
    found, _ = dataset.join(canonical.events(), canonical.items(), made.features, made.repo)
    log = pq.read_table(made.features / "click_log.parquet")["item_id"].to_numpy()
    return (
        found,
        canonical.events(),
        [log[a:b].tolist() for a, b in zip(found.clicks_start, found.clicks_end, strict=True)],
    )


MOMENT = (START + 6 * DAY + 1_000) * 1_000_000


def deleted(events: pa.Table, later: np.ndarray) -> pa.Table:
    return events.filter(pa.array(~later))


def shuffled(events: pa.Table, later: np.ndarray) -> pa.Table:
    rng = np.random.default_rng(1)
    where = np.flatnonzero(later)
    for name in ("user_id", "item_id", "device"):
        order = np.arange(len(events))
        order[where] = rng.permutation(where)
        events = with_column(events, name, events[name].take(order).to_pylist())
    label = events["label"].to_numpy().copy()
    label[where] = 1 - label[where]
    return with_column(events, "label", label)


@pytest.mark.parametrize("change", [deleted, shuffled])
def test_no_row_knows_of_a_later_event(
    change: Callable[[pa.Table, np.ndarray], pa.Table], tmp_path: Path, folders: Folders
) -> None:
    raw = hand_tables()
    later = raw.events["timestamp"].cast(pa.int64()).to_numpy() > MOMENT
    assert 0.2 < later.mean() < 0.5
    (before, events, history), (after, others, other_history) = (
        joined(raw, tmp_path / "as it was"),
        joined(replace(raw, events=change(raw.events, later)), tmp_path / "changed"),
    )
    rows, other_rows = (
        [i for i, us in enumerate(e["timestamp"].cast(pa.int64()).to_pylist()) if us <= MOMENT]
        for e in (events, others)
    )
    assert len(rows) == len(other_rows) == (~later).sum()
    assert [history[i] for i in rows] == [other_history[i] for i in other_rows]
    for name in before.fields:
        one, other = (j.fields[name].take(pa.array(r)) for j, r in ((before, rows), (after, other_rows)))
        assert one.to_pylist() == other.to_pylist(), name
    # while the rows after it do change, so the comparison above can fail
    if change is shuffled:
        moved = [i for i in range(len(events)) if history[i] != other_history[i]]
        assert len(moved) > 50 and not set(moved) & set(rows)


def test_a_late_correction_changes_no_byte_of_yesterdays_dataset(tmp_path: Path) -> None:
    """Corrected labels and late clicks that are delivered at `until` or later are not known to its dataset."""
    raw = hand_tables()
    moment = raw.events["timestamp"].cast(pa.int64()).to_numpy()
    until, end = ((START + day * DAY) * 1_000_000 for day in (7, DAYS + 1))

    def delivery(rows: np.ndarray, arrival: np.ndarray | int, flip: bool) -> pa.Table:
        events = raw.events.filter(pa.array(rows))
        label = events["label"].to_numpy()
        events = with_column(events, "label", 1 - label if flip else label, pa.int8())
        return events.append_column(ARRIVAL, pa.array(np.broadcast_to(arrival, len(moment))[rows]).cast(TIMESTAMP))

    late = np.arange(len(moment)) % 11 == 0
    early = delivery(~late, moment + 500_000, flip=False)
    later = [
        delivery(late, until, flip=False),
        delivery(~late & (np.arange(len(moment)) % 3 == 0), until + 5, flip=True),
    ]
    hashes = {}
    for name, (tables, at) in {
        "as it was": ([early], until),
        "corrected since": ([*later, early], until),
        "of a later day": ([*later, early], end),
    }.items():
        moment_of = datetime.fromtimestamp(at / 1e6, UTC).isoformat()
        made = prepare(replace(raw, events=pa.concat_tables(tables)), tmp_path / name, moment_of)
        features.run(FEATURES, made.canonical, made.report, made.embedding, made.features)
        dataset.run(CONFIG, SPLIT, made.canonical, made.features, made.repo, made.dataset)
        hashes[name] = folder_hash(made.dataset)
    assert hashes["as it was"] == hashes["corrected since"] != hashes["of a later day"]


class Unfaithful:
    """A store whose join loses a row, or gives one twice: what other offline stores do."""

    def __init__(self, rows: list[int]) -> None:
        self._rows = rows

    def get_feature_service(self, name: str) -> str:
        return name

    def get_historical_features(self, entity_df: pd.DataFrame, features: str) -> Unfaithful:
        self._found = pa.Table.from_pandas(entity_df, preserve_index=False).take(self._rows)
        return self

    def to_arrow(self) -> pa.Table:
        return self._found


def test_rows_in_must_be_rows_out() -> None:
    rows = pa.table({"user_id": [5, 6, 7]})
    assert dataset.point_in_time(Unfaithful([2, 0, 1]), "training", rows).equals(rows)
    for lost in ([0, 2], [0, 1, 2, 2], [0, 1, 1]):
        with pytest.raises(ValueError, match=rf"3 rows went into Feast's join, {len(lost)} came back"):
            dataset.point_in_time(Unfaithful(lost), "training", rows)


# ---- vocabularies and catalog -----------------------------------------------------------------------------------


def test_catalog_rows(data: Dataset, training: list[Row], folders: Folders) -> None:
    table = Canonical(folders.canonical).items().sort_by("item_id").to_pylist()
    catalog, schema = data.catalog, data.schema
    assert catalog.item_ids_I[SPECIAL:].tolist() == [i["item_id"] for i in table]
    assert catalog.rows(torch.tensor([table[3]["item_id"], 5])).tolist() == [3 + SPECIAL, UNKNOWN]
    assert [f.name for f in schema.item_fields] == ["item_id", "decade"]
    shown = [r.item for r in training]
    decade = {i["item_id"]: i["decade"] for i in table}
    item = indices([i["item_id"] for i in table], shown)
    decades = indices([i["decade"] for i in table], [decade[i] for i in shown])
    assert catalog.categorical_IG.tolist() == [[0, 0], [1, 1], *map(list, zip(item, decades, strict=True))]
    assert UNKNOWN in item and PADDING in decades  # items too new or too rare to know, and one without a decade


def test_tags_are_cut_and_padded(data: Dataset, training: list[Row], folders: Folders) -> None:
    """A tag counts once an item that training shows."""
    table = Canonical(folders.canonical).items().sort_by("item_id").to_pylist()
    shown = {r.item for r in training}
    tags = [(i["tags"] or [])[: CONFIG.max_tags] for i in table]
    counted = [t for i, own in zip(table, tags, strict=True) if i["item_id"] in shown for t in own]
    feature = next(f for f in data.schema.features if f.name == "tags")
    assert (feature.kind, feature.owner, feature.length) == ("multi", "item", CONFIG.max_tags)
    wanted = [indices(own, counted) + [PADDING] * (CONFIG.max_tags - len(own)) for own in tags]
    assert data.catalog.sets["tags"].tolist() == [[0] * CONFIG.max_tags] * SPECIAL + wanted
    assert "all" in feature.vocab and not any(t.startswith("own") for t in feature.vocab)
    assert "pair" not in feature.vocab  # three items have it, of which training shows two
    assert [0] * CONFIG.max_tags in wanted and any(UNKNOWN in own for own in wanted)


def test_vectors_are_zero_where_there_is_none(data: Dataset, folders: Folders) -> None:
    rows = pq.read_table(folders.embedding / "item_embedding.parquet").sort_by("item_id").to_pylist()
    missing = {r["item_id"] for r in rows if r["embedding"] is None}
    assert len(missing) == 1
    zero = [0.0] * 3
    wanted = [zero if r["item_id"] in missing else r["embedding"] for r in rows]
    assert data.catalog.vector_IE.dtype == torch.float32
    assert data.catalog.vector_IE.tolist() == [zero, zero, *wanted]
    assert data.schema.vector.size == 3


def test_an_item_that_is_newer_than_all_events_has_its_vector_and_one_from_after_until_has_none(
    folders: Folders,
) -> None:
    canonical = Canonical(folders.canonical)
    items, events = canonical.items(), canonical.events()
    newest = pc.max(events["timestamp"])
    new = pc.greater(items["created_at"], newest).to_numpy()
    assert new.sum() == 1
    _, vectors = dataset.join(events, items, folders.features, folders.repo)
    assert vectors[new].any()
    created = items["created_at"].filter(pa.array(new))[0].as_py()
    for until, known in ((created, False), (created + timedelta(microseconds=1), True)):
        _, vectors = dataset.join(events, items, folders.features, folders.repo, until.isoformat())
        assert vectors[new].any() == known
        assert vectors[~new].any()


def test_vocabularies_know_training_rows_only(data: Dataset, folders: Folders, training: list[Row]) -> None:
    """Values that only later rows hold, however often, get no index; the schema stays what it was."""
    canonical = Canonical(folders.canonical)
    found, vectors = dataset.join(canonical.events(), canonical.items(), folders.features, folders.repo)
    device = found.fields["device"].to_pylist()
    device[len(training) :] = ["new"] * (len(device) - len(training))
    changed = found._replace(fields=found.fields | {"device": pa.chunked_array([device])})
    encoder, catalog = dataset.fit(
        CONFIG, changed, len(training), canonical, vectors, data.schema.embedding_version
    )  # fmt: skip
    assert encoder.schema == data.schema
    later = dataset.encode(CONFIG, changed, encoder, catalog)["field.device"][len(training) :]
    assert set(later.tolist()) == {UNKNOWN}


@pytest.mark.parametrize("min_count", [1, 2, 50])
def test_min_count(min_count: int, data: Dataset, folders: Folders, training: list[Row]) -> None:
    canonical = Canonical(folders.canonical)
    found, vectors = dataset.join(canonical.events(), canonical.items(), folders.features, folders.repo)
    config = replace(CONFIG, min_count=min_count)
    encoder, _ = dataset.fit(config, found, len(training), canonical, vectors, "v")
    counts = Counter(r.user for r in training)
    assert encoder.integers["user_id"].tolist() == sorted(u for u, n in counts.items() if n >= min_count)
    devices = Counter(r.device for r in training if r.device)
    vocab = next(f for f in encoder.schema.features if f.name == "device").vocab
    assert vocab == tuple(sorted(d for d, n in devices.items() if n >= min_count))


# ---- splits and files -------------------------------------------------------------------------------------------


def test_splits_are_whole_days(data: Dataset, rows: list[Row]) -> None:
    day = [(r.second - START) // DAY for r in rows]
    (a, b), (c, d), (e, f) = (data.splits[name] for name in ("train", "valid", "test"))
    assert (a, b, d, f) == (0, c, e, len(rows))
    days = [set(day[start:end]) for start, end in ((a, b), (c, d), (e, f))]
    assert days == [{0, 1, 2, 3, 4}, {5, 6}, {7, 8}]  # 15 and 20 percent of nine days, rounded up to days
    days = [data.facts[name] for name in ("valid_from", "test_from", "ends")]
    assert days == ["2024-03-06", "2024-03-08", "2024-03-10"]
    assert data.newest_day == (day.index(8), len(rows))
    assert data.midnight("ends") == "2024-03-10T00:00:00+00:00"
    for name, (start, end) in data.splits.items():
        assert data.facts["label_rate"][name] == pytest.approx(np.mean([r.label for r in rows[start:end]]))


@pytest.mark.parametrize(
    ("rows", "valid", "test", "days"),
    [
        ([10] * 10, 0.1, 0.1, ("d8", "d9")),
        ([10] * 10, 0.11, 0.1, ("d7", "d9")),
        ([100, 100, 1, 1, 1], 0.01, 0.01, None),  # the last three hold the test share, the day before valid's
        ([50, 30, 20], 0.3, 0.2, ("d1", "d2")),
    ],
)
def test_the_fewest_last_days_that_hold_the_share(
    rows: list[int], valid: float, test: float, days: tuple[str, str] | None
) -> None:
    names = [f"d{i}" for i in range(len(rows))]
    cut = split_days(names, rows, SplitConfig(valid_share=valid, test_share=test))
    total = sum(rows)
    assert total - cut.test_start >= test * total > sum(rows[names.index(cut.test_day) + 1 :])
    held = cut.test_start - cut.valid_start
    assert held >= valid * total > held - rows[names.index(cut.valid_day)]
    assert cut.valid_start == sum(rows[: names.index(cut.valid_day)]) > 0
    if days:
        assert (cut.valid_day, cut.test_day) == days


@pytest.mark.parametrize("rows", [[10], [10, 10], [1, 1, 100]])
def test_days_that_cannot_be_split(rows: list[int]) -> None:
    names = [f"d{i}" for i in range(len(rows))]
    with pytest.raises(ValueError, match=rf"split: {len(rows)} days \(d0\.\..*; give more days or smaller shares"):
        split_days(names, rows, SplitConfig(valid_share=0.1, test_share=0.1))


def test_rows_by_day(rows: list[Row], folders: Folders) -> None:
    counted = Counter(f"2024-03-0{1 + (r.second - START) // DAY}" for r in rows)
    assert list(rows_by_day(Canonical(folders.canonical).events()).items()) == sorted(counted.items())


def test_types_are_narrow(data: Dataset, rows: list[Row]) -> None:
    columns = data.columns
    assert {n: c.dtype for n, c in columns.items() if n.startswith("field.")} == {
        f"field.{f.name}": torch.uint8 for f in data.schema.impression_fields
    }
    assert {columns[name].dtype for name in ("label", "length", "item", "end", "user")} == {torch.uint8}
    assert int(columns["end"].max()) > 127  # no sign to lose
    assert columns["user_ids"].dtype == torch.int16 and columns["oracle"].dtype == torch.float32
    logged = 4 + 1 + 2  # propensity, position, slate
    # fields, item, end, length, label, user, oracle
    assert data.facts["bytes_per_row"] == 5 + 1 + 1 + 1 + 1 + 1 + 4 + logged
    assert data.facts["clicks"] == len(data.click_log) == sum(r.label for r in rows)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([0, 255], torch.uint8),
        ([0, 256], torch.int16),
        ([-1, 0], torch.int16),
        ([0, 2**15], torch.int32),
        ([-(2**31), 0], torch.int32),
        ([0, 2**31], torch.int64),
    ],
)
def test_narrowest_type(values: list[int], kind: torch.dtype) -> None:
    column = narrow(torch.tensor(values))
    assert column.dtype == kind and column.tolist() == values


def test_batch_gathers_any_rows(data: Dataset, rows: list[Row]) -> None:
    picked = torch.tensor([430, 3, 3, 77])
    batch, whole = data.batch(picked), data.batch(slice(0, len(rows)))
    assert batch.fields_BF.shape == (4, 5) and batch.fields_BF.dtype == torch.int64
    assert batch.part is None
    for name in batch._fields[:-1]:
        assert torch.equal(getattr(batch, name), getattr(whole, name)[picked]), name
    names = [f.name for f in data.schema.impression_fields]
    for position, name in enumerate(names):
        assert np.array_equal(whole.fields_BF[:, position].numpy(), field(data, name))
    assert batch.label_B.dtype == torch.float32
    assert (whole.end_B - whole.start_B <= CONFIG.history_length).all() and (whole.start_B >= 0).all()
    assert data.user_ids(picked).tolist() == [rows[i].user for i in picked]


def test_equal_input_gives_equal_bytes(folders: Folders, tmp_path: Path) -> None:
    again = tmp_path / "dataset"
    dataset.run(CONFIG, SPLIT, folders.canonical, folders.features, folders.repo, again)
    assert folder_hash(again) == folder_hash(folders.dataset)


@pytest.mark.parametrize("name", ["rows.safetensors", "encoder/schema.json", "encoder/catalog.safetensors"])
def test_open_refuses_other_files(name: str, folders: Folders, tmp_path: Path) -> None:
    copy = tmp_path / "dataset"
    shutil.copytree(folders.dataset, copy)
    Dataset.open(copy)
    content = bytearray((copy / name).read_bytes())
    if name.endswith(".json"):
        content = content.replace(b'"north"', b'"nord"')
    else:
        content[-1] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"is not the .* that was written; run `dvc repro dataset`"):
        Dataset.open(copy)


def test_open_and_run_need_what_comes_before(folders: Folders, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dataset\.json is not there; run `dvc repro dataset`"):
        Dataset.open(tmp_path)
    with pytest.raises(ValueError, match=r"receipt\.json is not there; run `dvc repro features`"):
        dataset.run(CONFIG, SPLIT, folders.canonical, tmp_path, folders.repo, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failing_run_leaves_the_earlier_dataset(folders: Folders) -> None:
    before = folder_hash(folders.dataset)
    with pytest.raises(ValueError, match=r"split: 9 days .* cannot be split"):
        dataset.run(
            CONFIG,
            SplitConfig(valid_share=0.49, test_share=0.49),
            folders.canonical,
            folders.features,
            folders.repo,
            folders.dataset,
        )
    assert folder_hash(folders.dataset) == before


def test_rows_before_train_from_are_histories_and_popularity_alone(
    data: Dataset, folders: Folders, tmp_path: Path
) -> None:
    """The other rows stay as they are: their labels, histories and popularity know the days before."""
    canonical = tmp_path / "canonical"
    shutil.copytree(folders.canonical, canonical)
    facts = json.loads((canonical / "source.json").read_text())
    write_json(canonical / "source.json", facts | {"train_from": "2024-03-04"})
    dataset.run(CONFIG, SPLIT, canonical, folders.features, folders.repo, tmp_path / "dataset")
    fewer = Dataset.open(tmp_path / "dataset")
    lead = sum(rows for day, rows in rows_by_day(Canonical(canonical).events()).items() if day < "2024-03-04")
    assert 0 < lead == len(data.columns["label"]) - len(fewer.columns["label"])
    assert fewer.splits["train"][0] == 0 and fewer.splits["test"][1] == len(fewer.columns["label"])
    assert torch.equal(fewer.columns["label"], data.columns["label"][lead:])
    assert histories(fewer) == histories(data, slice(lead, None))
    assert max(map(len, histories(fewer, slice(0, 20)))) > 0  # clicks of the days before
    assert (fewer.columns["field.views_level"][:20] != PADDING).any()
    assert embed.training_items(Canonical(canonical), SPLIT) == pc.unique(
        Canonical(canonical).events()["item_id"].slice(lead, fewer.splits["train"][1])
    )
