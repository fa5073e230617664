"""MicroLens: small files of exactly the challenge's layout, through every stage to a trained model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from components.common.contracts import Canonical, read_parquet
from components.common.dataset import Dataset
from components.common.splits import SplitConfig, split_rows
from components.data import ingest, validate
from components.data.sources import timeless
from components.features import dataset, embed, features, publish
from components.features.dataset import DatasetConfig
from components.features.embed import EmbedConfig
from components.features.store import feature_store
from models.schema import SPECIAL
from tests.components.small_world import FEATURES, PUBLISH, SPLIT, VALIDATE, Folders, ingest_config, learn, new_repo

USERS, ITEMS, WIDTH, LENGTH = 60, 40, 128, 100
ROWS = {"train": 900, "valid": 150, "test": 120}
Layout = dict[str, pa.Table]


def lists(values: np.ndarray, kind: pa.DataType) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel(), kind), values.shape[1])


def layout(seed: int = 0) -> Layout:
    """MicroLens_1M_x1: users' sequences grow, and some users are longer than the 100 positions. Item 0 is padding."""
    rng = np.random.default_rng(seed)
    lives = [rng.integers(1, ITEMS + 1, rng.integers(2, 12) if u % 9 else 130) for u in range(USERS)]
    tables: Layout = {}
    for name, rows in ROWS.items():
        user = rng.integers(0, USERS, rows)
        item = rng.integers(1, ITEMS + 1, rows)
        seq = np.zeros((rows, LENGTH), dtype=np.int32)
        for row, u in enumerate(user):
            seen = lives[u][: rng.integers(0, len(lives[u]) + 1)][-LENGTH:]
            seq[row, LENGTH - len(seen) :] = seen
        tables[name] = pa.table(
            {
                "user_id": user + 1,
                "item_id": item,
                "item_seq": lists(seq, pa.int32()),
                "likes_level": rng.integers(0, 11, rows),
                "views_level": rng.integers(0, 11, rows),
                "label": (rng.random(rows) < np.where(item % 2, 0.9, 0.1)).astype(np.int64),
            }
        )
    tables["test"] = tables["test"].drop_columns("label").append_column("ID", pa.array(range(ROWS["test"])))
    tags = rng.integers(1, 9, (ITEMS + 1, 5))
    tags[:, 3:] = 0
    tags[5] = 0
    vectors = rng.normal(size=(ITEMS + 1, WIDTH)).astype(np.float32)
    tags[0], vectors[[0, 7]] = 0, 0  # item 7 has no vector
    tables["item_info"] = pa.table(
        {
            "item_id": np.arange(ITEMS + 1),
            "item_tags": lists(tags, pa.int64()),
            "item_emb_d128": lists(vectors, pa.float32()),
        }
    )
    return tables


def write(tables: Layout, root: Path) -> Path:
    root.mkdir(parents=True)
    for name, table in tables.items():
        pq.write_table(table, root / f"{name}.parquet", row_group_size=100)
    return root


def feature_file(root: Path, seed: int = 1) -> None:
    rng = np.random.default_rng(seed)
    ids = np.arange(1, ITEMS + 1)
    table = {
        "item_id": ids,
        "item_title": [f"Title {i}" for i in ids],
        "txt_emb_BERT": lists(rng.normal(size=(ITEMS, 12)).astype(np.float32), pa.float32()),
        "img_emb_CLIPRN50": lists(rng.normal(size=(ITEMS, 9)).astype(np.float32), pa.float32()),
    }
    pq.write_table(pa.table(table), root / "item_feature.parquet")


def sequences(table: pa.Table) -> list[list[int]]:
    return [[item for item in row if item] for row in table["item_seq"].to_pylist()]


@pytest.fixture(scope="module")
def given() -> Layout:
    return layout()


@pytest.fixture(scope="module")
def folders(given: Layout, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Every stage up to the dataset, as production runs them."""
    found = Folders(tmp_path_factory.mktemp("microlens"))
    raw = write(given, found.root / "MicroLens_1M_x1")
    new_repo(found)
    ingest.run(ingest_config("microlens", str(raw), until=None), found.canonical)
    validate.run(VALIDATE, found.canonical, found.report, found.root / "docs")
    config = EmbedConfig(dim=16, text_features=10, text_dim=3, text_encoder=None, image_encoder=None, seed=1, fit=None)
    embed.run(config, SPLIT, found.canonical, found.report, found.embedding)
    features.run(FEATURES, found.canonical, found.report, found.embedding, found.features)
    config = DatasetConfig(history_length=LENGTH, min_count=1, max_tags=5)
    dataset.run(config, SPLIT, found.canonical, found.features, found.repo, found.dataset)
    return found


@pytest.fixture(scope="module")
def data(folders: Folders) -> Dataset:
    return Dataset.open(folders.dataset)


def test_every_row_has_the_history_that_the_files_give_it(data: Dataset, given: Layout) -> None:
    wanted = sequences(given["train"]) + sequences(given["valid"])
    batch = data.batch(torch.arange(len(wanted)))
    log = data.catalog.item_ids_I[data.click_log.long()]
    found = [log[start:end].tolist() for start, end in zip(batch.start_B, batch.end_B, strict=True)]
    assert found == wanted
    assert data.schema.history_length == LENGTH
    ids = pc.take(data.catalog.item_ids_I.numpy(), pa.array(batch.item_B.numpy()))
    assert ids.to_pylist() == given["train"]["item_id"].to_pylist() + given["valid"]["item_id"].to_pylist()
    labels = given["train"]["label"].to_pylist() + given["valid"]["label"].to_pylist()
    assert batch.label_B is not None and batch.label_B.tolist() == labels


def test_the_given_split_is_kept(data: Dataset) -> None:
    rows = (ROWS["train"], ROWS["train"] + ROWS["valid"])
    assert data.splits == {"train": (0, rows[0]), "valid": rows, "test": rows}  # no test labels: valid is judged


def test_levels_are_the_rows_context_and_nothing_is_counted_over_times_that_are_none(
    data: Dataset, given: Layout
) -> None:
    origin = {f.name: f.origin for f in data.schema.impression_fields}
    assert origin == {"user_id": "user", "likes_level": "context", "views_level": "context"}
    raw = [str(v) for name in ("train", "valid") for v in given[name]["views_level"].to_pylist()]
    assert data.columns["field.views_level"].tolist() == data.encoder.encode("views_level", raw).tolist()


def test_items_are_the_files_without_padding(data: Dataset, folders: Folders, given: Layout) -> None:
    items = Canonical(folders.canonical).items()
    assert items["item_id"].to_pylist() == list(range(1, ITEMS + 1))
    tags = [[str(t) for t in row if t] for row in given["item_info"]["item_tags"].to_pylist()[1:]]
    assert items["tags"].to_pylist() == tags and [] in tags
    (multimodal,) = Canonical(folders.canonical).modalities().items()
    assert multimodal[0] == "multimodal" and set(range(1, ITEMS + 1)) - set(multimodal[1]["item_id"].to_pylist()) == {7}
    assert multimodal[1]["vector"].to_pylist()[0] == given["item_info"]["item_emb_d128"].to_pylist()[1]
    assert data.catalog.vector_IE is not None
    assert (data.catalog.vector_IE[SPECIAL:].norm(dim=1) == 0).nonzero().flatten().tolist() == [6]


def test_sequences_are_stored_once(folders: Folders, given: Layout) -> None:
    """What a user's longer sequence begins with takes no room of its own."""
    stored = Canonical(folders.canonical).histories()
    assert stored is not None
    owned: dict[int, set[tuple[int, ...]]] = {}
    for name in ("train", "valid"):
        for user, seq in zip(given[name]["user_id"].to_pylist(), sequences(given[name]), strict=True):
            owned.setdefault(user, set()).add(tuple(seq))
    least = sum(
        len(seq) for own in owned.values() for seq in own
        if not any(other != seq and other[: len(seq)] == seq for other in own)
    )  # fmt: skip
    assert len(stored) == least < sum(len(seq) for own in owned.values() for seq in own) / 1.5
    assert len(read_parquet(folders.features / "click_log.parquet")) == least


def test_test_rows_without_labels_are_set_aside(folders: Folders, given: Layout) -> None:
    rows = read_parquet(folders.canonical / "quarantine" / "0-test-has-no-label.parquet")
    assert rows["item_id"].to_pylist() == given["test"]["item_id"].to_pylist()
    assert set(rows["reason"].to_pylist()) == {"test has no label"}
    assert Canonical(folders.canonical).events().num_rows == ROWS["train"] + ROWS["valid"]
    told = json.loads((folders.canonical / "source.json").read_text())["rows"]
    assert told["known"] == sum(ROWS.values()) and told["left_out"] == {"test has no label": ROWS["test"]}


def test_the_server_reads_the_newest_history(folders: Folders, given: Layout, tmp_path: Path) -> None:
    newest: dict[int, list[int]] = {}
    for name in ("train", "valid"):
        newest |= dict(zip(given[name]["user_id"].to_pylist(), sequences(given[name]), strict=True))
    table = read_parquet(folders.features / "sources" / "user_history.parquet")
    served = dict(zip(table["user_id"].to_pylist(), table["history"].to_pylist(), strict=True))
    assert served == {user: seq[-FEATURES.history_length :] for user, seq in newest.items() if seq}
    publish.fill(PUBLISH, folders.features, folders.repo, tmp_path / "store")
    with feature_store(tmp_path / "store") as store:
        user = next(iter(served))
        online = store.get_online_features(["user_history:history"], [{"user_id": user}]).to_dict()
    assert list(online["history"][0]) == served[user]


@pytest.mark.parametrize("model", ["qin", "sdcnv3"])
def test_models_train_on_it(model: str, data: Dataset, networks) -> None:
    assert learn(model, networks[model], data, epochs=4) > 0.7  # odd items are clicked


def test_labelled_test_rows_are_the_test_split(given: Layout, tmp_path: Path) -> None:
    labelled = given | {"test": given["test"].append_column("label", pa.array([0, 1] * (ROWS["test"] // 2)))}
    ingest.run(ingest_config("microlens", str(write(labelled, tmp_path / "raw")), until=None), tmp_path / "canonical")
    events = Canonical(tmp_path / "canonical").events()
    cut = split_rows(events, SplitConfig(valid_share=0.1, test_share=0.1))
    assert cut.ranges(len(events)) == {"train": (0, 900), "valid": (900, 1050), "test": (1050, 1170)}
    assert not (tmp_path / "canonical" / "quarantine").exists()


def test_the_folder_above_brings_titles_and_the_modalities(given: Layout, tmp_path: Path) -> None:
    write(given, tmp_path / "raw" / "MicroLens_1M_x1")
    feature_file(tmp_path / "raw")
    ingest.run(ingest_config("microlens", str(tmp_path / "raw"), until=None), tmp_path / "canonical")
    data = Canonical(tmp_path / "canonical")
    assert data.items()["title"].to_pylist()[:2] == ["Title 1", "Title 2"] == data.items()["text"].to_pylist()[:2]
    assert {name: len(t["vector"][0].as_py()) for name, t in data.modalities().items()} == {"text": 12, "image": 9}


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (
            lambda t: t | {"train": t["train"].drop_columns("item_seq")},
            r"train\.parquet: columns \['item_seq'\] are mi",
        ),
        (lambda t: t | {"valid": t["valid"].drop_columns("label")}, r"valid\.parquet: columns \['label'\] are missing"),
        (lambda t: {k: v for k, v in t.items() if k != "train"}, r"train\.parquet is not there; name the folder that"),
        (lambda t: {k: v for k, v in t.items() if k != "item_info"}, r"item_info\.parquet is not there"),
        (
            lambda t: t | {"item_info": t["item_info"].drop_columns("item_tags")},
            r"item_info\.parquet: columns \['item_tags'\] are missing",
        ),
    ],
)
def test_another_layout_is_told(spoil, told: str, given: Layout, tmp_path: Path) -> None:
    raw = write(spoil(given), tmp_path / "raw")
    with pytest.raises(ValueError, match=told):
        ingest.run(ingest_config("microlens", str(raw), until=None), tmp_path / "canonical")
    assert not (tmp_path / "canonical").exists()


def test_until_has_no_meaning_without_times(given: Layout, tmp_path: Path) -> None:
    raw = write(given, tmp_path / "raw")
    with pytest.raises(ValueError, match=r"ingest\.until is .* but microlens has no times; set it to null"):
        ingest.run(ingest_config("microlens", str(raw)), tmp_path / "canonical")


@pytest.mark.parametrize("rows", [1, 2, 86_400, 86_401, 300_000])
def test_times_of_rows_that_have_none(rows: int) -> None:
    """In order, one a second, in days of nearly equal size that come one after the other."""
    times = timeless(rows).to_numpy().astype("datetime64[us]")
    assert len(times) == rows and str(times[0]) == "2000-01-01T00:00:00.000000"
    assert (np.diff(times) >= np.timedelta64(1, "s")).all()
    days, counts = np.unique(times.astype("datetime64[D]"), return_counts=True)
    assert len(days) == -(-rows // 86_400) and (np.diff(days) == np.timedelta64(1, "D")).all()
    assert counts.max() - counts.min() <= 1
